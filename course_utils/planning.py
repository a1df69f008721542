"""What a training on many devices would cost: planned by counting and simulating, because it cannot be tried here.

A decoder-only Transformer is cut into stages of equal numbers of layers; every device of a pipeline holds one stage,
and several pipelines (replicas) share the data. What a plan leaves out stands in `LEFT_OUT`, and a plan says it.
"""

from dataclasses import dataclass, fields
from typing import Any

from course_utils.number_words import even_sizes
from course_utils.schedules import SCHEDULES, rematerialise
from course_utils.simulation import kept, simulate
from course_utils.timeline import Timeline

# Bytes of Adam in mixed precision: weights and gradients in 16 bits, and in float32 the master weights and two moments
# (Rajbhandari et al., 2020, "ZeRO", section 3.1).
ADAM_BYTES = 16
BYTES_OF_16_BITS = 2
# Bytes that a layer keeps for its backward, per token and unit of width, without the attention matrix, which fused
# kernels compute again (Korthikanti et al., 2022, arXiv 2205.05198, section 4.1, equation 1 without its last term).
ACTIVATION_BYTES = 34
BACKWARD = 2  # times a forward: one product for the inputs' gradient, one for the weights'

LEFT_OUT = (
    "All devices are equally fast all the time: no stragglers, no failures, no checkpoints.",
    "A layer reaches the given share of the device's peak, however small the micro-batch is.",
    "Sending costs the device no time, and messages that share a line do not slow each other down.",
    "The replicas' gradients are added up after the last backward, over the same links; nothing overlaps with it.",
    "Embedding, loss, data and the update of the weights take no time; norms and biases weigh nothing.",
    "Memory has no fragmentation, no workspaces, no buffers for messages.",
    "Tensor, sequence and expert parallelism, sharded optimizers and split backwards are not considered.",
)


@dataclass(frozen=True)
class Model:
    """A decoder-only Transformer, feed-forward width 4 * d_model. sequence: tokens per row."""

    layers: int
    d_model: int
    sequence: int
    vocabulary: int

    def __post_init__(self) -> None:
        check_positive(self)

    @property
    def layer_parameters(self) -> int:
        """4 d^2 in the attention, 8 d^2 in the feed-forward part."""
        return 12 * self.d_model**2

    @property
    def parameters(self) -> int:
        """Of all layers, the embedding and the head."""
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.d_model

    @property
    def layer_flops(self) -> int:
        """Of a layer's forward, per row: 2 per token and parameter, and the attention's products of all pairs of
        tokens (Chowdhery et al., 2022, arXiv 2204.02311, appendix B).
        """
        return self.sequence * (2 * self.layer_parameters + 4 * self.sequence * self.d_model)

    @property
    def head_flops(self) -> int:
        """Of the head's forward, per row."""
        return 2 * self.sequence * self.d_model * self.vocabulary

    def step_flops(self, rows: int) -> int:
        """That a step must do for so many rows: forwards and backwards. What is computed once more does not count."""
        return (1 + BACKWARD) * rows * (self.layers * self.layer_flops + self.head_flops)


@dataclass(frozen=True)
class Cluster:
    """devices: all alike; flops_per_second: a device's peak; memory_bytes: of a device; latency: of a message, in
    seconds; bandwidth: of a link, in bytes per second.
    """

    devices: int
    flops_per_second: float
    memory_bytes: float
    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        check_positive(self, but="latency")
        if self.latency < 0:
            raise ValueError(f"latency is {self.latency}; it must be at least 0 seconds")


@dataclass(frozen=True)
class Plan:
    """What a step would cost. All of it is simulated or counted, nothing is measured.

    Attributes:
        replicas: pipelines beside each other, devices / stages.
        step_seconds: the pipeline's step and the addition of the replicas' gradients after it.
        bubble_of_total: of the pipeline's step.
        tokens_per_second: of all replicas.
        model_flops_utilisation: of all devices, see the function of that name.
        bytes_per_device: for each stage weights, gradients, optimizer and the most that it keeps for backwards.
        fits: whether every stage's bytes are in a device's memory.
        timeline: the step of one pipeline, simulated.
        left_out: what it does not know.
    """

    model: Model
    cluster: Cluster
    stages: int
    micro_batches: int
    replicas: int
    step_seconds: float
    bubble_of_total: float
    tokens_per_second: float
    model_flops_utilisation: float
    bytes_per_device: tuple[float, ...]
    fits: bool
    timeline: Timeline
    left_out: tuple[str, ...] = LEFT_OUT

    def __str__(self) -> str:
        most, memory = max(self.bytes_per_device), self.cluster.memory_bytes
        worst = self.bytes_per_device.index(most)
        return (
            f"{self.cluster.devices} devices as {self.replicas} x {self.stages} stages, M={self.micro_batches}: "
            f"{self.step_seconds:.3g} s a step, bubble {self.bubble_of_total:.1%} of the total time, "
            f"{self.tokens_per_second:,.0f} tokens a second, model FLOPs utilisation "
            f"{self.model_flops_utilisation:.1%}; stage {worst} needs {most / 1e9:.1f} of {memory / 1e9:.0f} GB: "
            f"{'fits' if self.fits else 'does not fit'} (simulated)"
        )


def plan(
    model: Model,
    cluster: Cluster,
    stages: int,
    micro_batches: int,
    rows_per_micro_batch: int = 1,
    schedule: str = "1f1b",
    recompute: bool = False,
    utilisation: float = 0.5,
) -> Plan:
    """The price of a step on `cluster.devices` devices, `stages` in each pipeline.

    Args:
        micro_batches: of each pipeline in a step.
        schedule: a key of `schedules.SCHEDULES`.
        recompute: keep only what a stage receives, and compute its forward once more before its backward.
        utilisation: the share of the device's peak that its computing reaches while it computes.

    Raises:
        ValueError: the stages do not divide the devices or are more than the layers; a number makes no sense.
    """
    for name, value in (("micro_batches", micro_batches), ("rows_per_micro_batch", rows_per_micro_batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}; it must be above 0 and at most 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if stages < 1 or cluster.devices % stages:
        raise ValueError(f"{stages} stages do not divide {cluster.devices} devices into pipelines")
    if stages > model.layers:
        raise ValueError(f"{model.layers} layers cannot fill {stages} stages; use at most one stage per layer")
    layers = even_sizes(model.layers, stages)
    replicas, last = cluster.devices // stages, stages - 1
    rows, hidden = rows_per_micro_batch, rows_per_micro_batch * model.sequence * model.d_model

    flops = [rows * (n * model.layer_flops + model.head_flops * (k == last)) for k, n in enumerate(layers)]
    forward = [each / (utilisation * cluster.flops_per_second) for each in flops]
    message = cluster.latency + BYTES_OF_16_BITS * hidden / cluster.bandwidth
    order = SCHEDULES[schedule](stages, micro_batches)
    order = rematerialise(order, "always") if recompute else order
    timeline = simulate(order, forward, [BACKWARD * time for time in forward], message)
    timeline.label, timeline.unit = f"simulated, {stages} stages, M={micro_batches}", "seconds"

    ends = model.vocabulary * model.d_model  # the embedding on the first stage, the head on the last one
    weights = [n * model.layer_parameters + ends * ((k == 0) + (k == last)) for k, n in enumerate(layers)]
    seconds = timeline.makespan + all_reduce_seconds(max(weights) * BYTES_OF_16_BITS, replicas, cluster)
    per_device = []
    for rank, moments in enumerate(kept(order)):
        graph = ACTIVATION_BYTES * hidden * layers[rank]
        graph += 4 * rows * model.sequence * model.vocabulary * (rank == last)  # the logits in float32
        stash = max(graph * now.graphs + BYTES_OF_16_BITS * hidden * now.inputs for now in moments)
        per_device.append(ADAM_BYTES * weights[rank] + stash)
    all_rows = replicas * micro_batches * rows
    return Plan(
        model=model,
        cluster=cluster,
        stages=stages,
        micro_batches=micro_batches,
        replicas=replicas,
        step_seconds=seconds,
        bubble_of_total=timeline.bubble_of_total,
        tokens_per_second=all_rows * model.sequence / seconds,
        model_flops_utilisation=model_flops_utilisation(
            model.step_flops(all_rows), seconds, cluster.devices * cluster.flops_per_second
        ),
        bytes_per_device=tuple(per_device),
        fits=max(per_device) <= cluster.memory_bytes,
        timeline=timeline,
    )


def all_reduce_seconds(size: float, replicas: int, cluster: Cluster) -> float:
    """Adding up `size` bytes over all replicas in a ring: 2 (R - 1) messages of size / R, one after another."""
    return 2 * (replicas - 1) * (cluster.latency + size / replicas / cluster.bandwidth)


def model_flops_utilisation(flops: float, seconds: float, peak: float) -> float:
    """The share of what the devices could compute that went into the model (Chowdhery et al., 2022, appendix B).

    Args:
        flops: that the step's forwards and backwards need, floating-point operations; recomputation does not count.
        seconds: of the step.
        peak: of all devices together, floating-point operations per second.

    Raises:
        ValueError: for time or a peak that is not positive.
    """
    for name, value in (("seconds", seconds), ("peak", peak)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    return flops / (seconds * peak)


def check_positive(numbers: Any, but: str = "") -> None:
    """Raises a ValueError that names the first field that is not above 0."""
    for each in fields(numbers):
        if each.name != but and not getattr(numbers, each.name) > 0:
            raise ValueError(f"{each.name} is {getattr(numbers, each.name)}; it must be above 0")
