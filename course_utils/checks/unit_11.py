"""Exercises of unit 11: the order of a training step from memory, and the fastest plan for a given cluster."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from course_utils import planning
from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare, same
from course_utils.schedules import SCHEDULES, Schedule, rematerialise
from course_utils.simulation import Kept, kept, simulate
from course_utils.stages import by_count
from course_utils.threads import run_in_threads
from course_utils.timeline import Timeline
from course_utils.training_state import TrainingState
from course_utils.transfer import tell_all
from course_utils.transports import TransferError, Worker

# --- training_step ----------------------------------------------------------------------------------------------------

WIDTH = 3  # parameters per rank
MOMENTUM, LEARNING_RATE = 0.9, 0.05
GOOD_STEPS = 2  # in a row, after which the loss scale is doubled


class Run(NamedTuple):
    """Some steps on some ranks. overflows: {(step, rank)} in which a gradient is not finite."""

    ranks: int
    steps: int
    overflows: tuple[tuple[int, int], ...]
    max_norm: float
    loss_scale: float
    seed: int

    def __str__(self) -> str:
        places = " and ".join(f"rank {rank} in step {step}" for step, rank in self.overflows) or "none"
        return f"{self.ranks} ranks, {self.steps} steps, overflow on {places}, seed {self.seed}"


class Numbers:
    """The weights of one rank and the gradients that its steps have: a pull towards 0, and something from the seed."""

    def __init__(self, run: Run, rank: int):
        generator = torch.Generator().manual_seed(100 * run.seed + rank)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.run, self.rank = run, rank
        self.weight = numbers(WIDTH).requires_grad_()
        # steps with small gradients and with large ones, so that some are clipped and some are not
        sizes = torch.tensor([(0.1, 3.0)[step % 2] for step in range(run.steps)], dtype=torch.float64)
        self._pushes = numbers(run.steps, WIDTH) * sizes[:, None] * (rank + 1)
        self._pull = 0.1 + numbers(WIDTH).abs()

    def gradient(self, step: int) -> Tensor:
        """Without a loss scale."""
        gradient = self._pull * 0.1 * self.weight.detach() + self._pushes[step]
        if (step, self.rank) in self.run.overflows:
            gradient[step % WIDTH] = math.inf if self.run.seed % 2 else math.nan
        return gradient


class LossScale:
    """Halved after a skipped step, doubled after GOOD_STEPS good ones in a row."""

    def __init__(self, value: float):
        self.value, self._good = value, 0

    def update(self, skipped: bool) -> None:
        self._good = 0 if skipped else self._good + 1
        if skipped or self._good == GOOD_STEPS:
            self.value *= 0.5 if skipped else 2.0
            self._good = 0


class Rank:
    """One rank of a run, between two calls of `training_step`.

    loss_scale: now. max_norm: the largest global norm. `log` has one line per call; nobody who uses a Rank needs it.
    """

    def __init__(self, worker: Worker, run: Run):
        self._worker, self._numbers, self._scale = worker, Numbers(run, worker.rank), LossScale(run.loss_scale)
        self.max_norm = run.max_norm
        self._optimizer = torch.optim.SGD([self._numbers.weight], lr=LEARNING_RATE, momentum=MOMENTUM)
        self._step, self._updates = 0, 1
        self.log: list[str] = []

    @property
    def loss_scale(self) -> float:
        return self._scale.value

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.log.append("zero_grad")
        self._optimizer.zero_grad()

    def forward_backward(self, loss_scale: float) -> None:
        """All forwards and backwards of this rank. The gradients, times loss_scale, are added to what is there."""
        self.log.append("forward_backward")
        gradient = self._numbers.gradient(self._step) * loss_scale
        weight = self._numbers.weight
        weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def own_norm(self) -> float:
        """Of the gradients of this rank; inf or NaN if one of them is not finite."""
        self.log.append("own_norm")
        return self._gradient().norm().item()

    def exchange(self, number: float) -> list[float]:
        """Tell a number to all ranks; returns those of all, rank by rank. Every rank must call it."""
        self.log.append("exchange")
        return [numbers[0] for numbers in tell_all(self._worker.transport, [float(number)], "a number")]

    def multiply_gradients(self, factor: float) -> None:
        """Multiply all gradients of this rank."""
        self.log.append("multiply_gradients")
        self._gradient().mul_(factor)

    def optimizer_step(self) -> None:
        """Change the weights, by the gradients and by the momentum of the steps before."""
        self.log.append("optimizer_step")
        self._optimizer.step()

    def learning_rate_step(self) -> None:
        """Move on to the learning rate of the next update."""
        self.log.append("learning_rate_step")
        self._updates += 1
        self._optimizer.param_groups[0]["lr"] = LEARNING_RATE * self._updates

    def update_loss_scale(self, skipped: bool) -> None:
        """Tell the loss scale whether the step was skipped."""
        self.log.append("update_loss_scale")
        self._scale.update(bool(skipped))

    def _gradient(self) -> Tensor:
        if self._numbers.weight.grad is None:
            raise ValueError("there are no gradients yet; forward_backward makes them")
        return self._numbers.weight.grad

    def _after(self) -> dict[str, Any]:
        self._step += 1
        weights = self._numbers.weight.tolist()
        return {
            "weights": weights,
            "learning rate": self._optimizer.param_groups[0]["lr"],
            "loss scale": self.loss_scale,
        }


def draw_runs(draw: random.Random) -> list[Run]:
    runs = [Run(2, 3, (), 1.0, 8.0, 1), Run(3, 6, ((2, 0),), 2.0, 16.0, 2), Run(1, 4, ((1, 0),), 1.0, 4.0, 3)]
    for ranks in (2, 3):
        step = draw.randint(1, 3)
        overflows = ((step, draw.randrange(ranks)), (step + 1, draw.randrange(ranks)))
        runs.append(
            Run(ranks, 6, overflows, draw.choice((1.0, 2.0, 3.0)), draw.choice((4.0, 32.0)), draw.randrange(1000))
        )
    return runs


def attempt_steps(answer: Callable, run: Run) -> dict[str, Any]:
    ranks: dict[int, Rank] = {}
    seen: dict[str, Any] = {
        f"rank {k}, after step {step},": None for step in range(run.steps) for k in range(run.ranks)
    }
    came: list[list[Any]] = [[] for _ in range(run.ranks)]
    logs: list[list[list[str]]] = [[] for _ in range(run.ranks)]

    def one_rank(worker: Worker) -> None:
        rank = ranks[worker.rank] = Rank(worker, run)
        for step in range(run.steps):
            rank.log = []
            logs[worker.rank].append(rank.log)
            value = answer(rank)
            came[worker.rank].append(value if value is None or isinstance(value, bool | int | float | str) else "?")
            seen[f"rank {worker.rank}, after step {step},"] = rank._after()

    stuck = ""
    try:
        run_in_threads(one_rank, run.ranks, limit=5)
    except TransferError as error:  # also a Deadlock
        stuck = str(error)
    return {"after": seen, "came": came, "logs": logs, "stuck": stuck}


@dataclass(frozen=True)
class How:
    """How a step is made; the defaults are right."""

    clear: bool = True
    unscale: str = "first"  # or "never", "after clipping"
    norm: str = "global"  # or "own", "sum", "largest"
    only_down: bool = True
    clip: bool = True
    skip: str = "together"  # or "own", "never"
    rate: str = "with the optimizer"  # or "always", "never"
    scale: str = "told"  # or "never", "always good", "opposite", "only good", "only skipped"


def one_device(run: Run, how: How | None = None) -> dict[str, Any]:
    """All ranks' weights in one process: what is seen of each rank after each step."""
    how = how or How()
    ranks = [Numbers(run, rank) for rank in range(run.ranks)]
    optimizers = [torch.optim.SGD([rank.weight], lr=LEARNING_RATE, momentum=MOMENTUM) for rank in ranks]
    scales = [LossScale(run.loss_scale) for _ in ranks]
    updates = [1] * run.ranks
    seen: dict[str, Any] = {}
    for step in range(run.steps):
        for numbers, scale in zip(ranks, scales, strict=True):
            new, old = numbers.gradient(step) * scale.value, numbers.weight.grad
            gradient = new if how.clear or old is None else old + new
            numbers.weight.grad = gradient / scale.value if how.unscale == "first" else gradient
        gradients = [numbers.weight.grad for numbers in ranks if numbers.weight.grad is not None]
        whole = torch.cat(gradients).norm().item()
        owns = [gradient.norm().item() for gradient in gradients]
        for k, (numbers, scale, gradient) in enumerate(zip(ranks, scales, gradients, strict=True)):
            norm = {"global": whole, "own": owns[k], "sum": math.fsum(owns), "largest": max(owns)}[how.norm]
            decides = {"together": whole if how.norm != "own" else owns[k], "own": owns[k], "never": 0.0}[how.skip]
            skipped = not math.isfinite(decides)
            if how.clip and (norm > run.max_norm or not how.only_down):
                gradient.mul_(run.max_norm / norm)
            if how.unscale == "after clipping":
                gradient.div_(scale.value)
            if not skipped:
                optimizers[k].step()
            if (not skipped and how.rate != "never") or how.rate == "always":
                updates[k] += 1
                optimizers[k].param_groups[0]["lr"] = LEARNING_RATE * updates[k]
            tell_scale(scale, skipped, how.scale)
            weights = numbers.weight.tolist()
            rate = optimizers[k].param_groups[0]["lr"]
            seen[f"rank {k}, after step {step},"] = {
                "weights": weights,
                "learning rate": rate,
                "loss scale": scale.value,
            }
    return seen


def tell_scale(scale: LossScale, skipped: bool, how: str) -> None:
    if how == "never" or (how == "only good" and skipped) or (how == "only skipped" and not skipped):
        return
    scale.update({"always good": False, "opposite": not skipped}.get(how, skipped))


def steps_mistake(name: str, says: str, **changes: Any) -> Mistake:
    return Mistake(name, says, lambda run: one_device(run, How(**changes)))


STEP_MISTAKES = (
    steps_mistake("no zero_grad", "The gradients of the step before are still there and are added in.", clear=False),
    steps_mistake(
        "not unscaled", "The gradients still have the loss scale in them when the weights change.", unscale="never"
    ),
    steps_mistake(
        "clip before unscale",
        "The norm was taken, and clipped, while the gradients still had the loss scale in them: what is divided after "
        "that is far too small.",
        unscale="after clipping",
    ),
    steps_mistake(
        "own norm",
        "Each rank clips by the norm of its own gradients and skips by it. The global norm is that of the gradients of "
        "all ranks.",
        norm="own",
    ),
    steps_mistake(
        "sum of norms",
        "The norms of the ranks were added. The norm of the whole is the root of the sum of their squares.",
        norm="sum",
    ),
    steps_mistake("largest norm", "The largest of the ranks' norms was taken for the global norm.", norm="largest"),
    steps_mistake(
        "scaled up",
        "Gradients whose norm is below the largest one were made larger. Clipping only makes smaller.",
        only_down=False,
    ),
    steps_mistake("not clipped", "Nothing was clipped.", clip=False),
    steps_mistake(
        "own decision to skip",
        "Each rank skips by its own gradients: the others update, and from then on they are parts of two models.",
        skip="own",
    ),
    steps_mistake("never skipped", "The weights change even with gradients that are not finite.", skip="never"),
    steps_mistake("rate moves always", "After a skipped step the learning rate moved all the same.", rate="always"),
    steps_mistake("rate never moves", "The learning rate did not move.", rate="never"),
    steps_mistake("loss scale not told", "The loss scale was never told how the step went.", scale="never"),
    steps_mistake(
        "loss scale told of good steps only", "The loss scale was not told that a step was skipped.", scale="only good"
    ),
    steps_mistake(
        "loss scale told of skipped steps only",
        "The loss scale was not told of good steps, so it never grows.",
        scale="only skipped",
    ),
    steps_mistake(
        "loss scale told the opposite",
        "The loss scale was told the opposite of what happened.",
        scale="opposite",
    ),
    steps_mistake(
        "loss scale told that all is well",
        "The loss scale was told that a skipped step was a good one.",
        scale="always good",
    ),
)  # fmt: skip


def judge_steps(runs: Sequence[Run], came: Sequence[Any]) -> str:
    for run, value in zip(runs, came, strict=True):
        if value["stuck"]:
            judge_stuck(run, value)
    try:
        compare(runs, [value["after"] for value in came], one_device, STEP_MISTAKES, tolerance=1e-5)
    except Named as named:
        logs = [log for value in came for logs in value["logs"] for log in logs if "optimizer_step" in log]
        if named.mistake == "not clipped" and any("multiply_gradients" in after_step(log) for log in logs):
            says = "The weights change before the gradients are clipped, so clipping changes nothing."
            raise Named("step before clip", f"{says} {str(named).removeprefix('Nothing was clipped. ')}") from None
        raise
    judge_returned(runs, [value["came"] for value in came])
    for run, value in zip(runs, came, strict=True):
        most = max(log.count("exchange") for logs in value["logs"] for log in logs)
        if most > 1:
            raise Named(
                "more than one exchange",
                f"With {run}: weights, learning rate and loss scale are right, but a rank waits for all others {most} "
                "times in a step. One exchange is enough: what tells whether to skip is in the norms.",
            )
    skipped = sum(len({step for step, _ in run.overflows}) for run in runs)
    return (
        f"{len(runs)} runs on 1 to 3 ranks: weights, learning rate and loss scale are those of one device to 1e-5, "
        f"also after the {skipped} steps that had to be skipped, with one exchange per step."
    )


def judge_stuck(run: Run, value: dict[str, Any]) -> None:
    """In the last step of a run that got stuck: who did not take part in an exchange?"""
    counts = [sum(log.count("exchange") for log in logs) for logs in value["logs"]]
    if min(counts) < max(counts):
        less = counts.index(min(counts))
        raise Named(
            "an exchange without all ranks",
            f"With {run}: the ranks got stuck, because rank {less} called exchange {min(counts)} times and rank "
            f"{counts.index(max(counts))} {max(counts)} times. Every rank must call it in every step, also with "
            "gradients that are not finite: the others wait.",
        )
    raise Wrong(f"With {run}: the ranks got stuck. {value['stuck']}.")


def after_step(log: list[str]) -> list[str]:
    """What was done after the weights had changed."""
    return log[log.index("optimizer_step") :]


def judge_returned(runs: Sequence[Run], came: Sequence[list[list[Any]]]) -> None:
    right = [[step not in {bad for bad, _ in run.overflows} for step in range(run.steps)] for run in runs]
    every = [
        (run, expected, values) for run, expected, ranks in zip(runs, right, came, strict=True) for values in ranks
    ]
    at = "The steps are right. Whether the weights changed: expected"
    if all(set(values) == {None} for _, _, values in every):
        raise Wrong(f"{at} True or False, nothing came. Is a `return` missing?")
    if all(values == [not changed for changed in expected] for _, expected, values in every):
        raise Named("returns the opposite", f"{at} that; what came is whether the step was skipped.")
    for run, expected, values in every:
        if values != expected or not all(isinstance(value, bool) for value in values):
            raise Wrong(f"{at} {expected}, came {values}, with {run}.")


def log_of_steps(answer: Callable) -> None:
    """Print what rank 0 of 2 calls in two steps; in the second one a gradient of rank 1 is not finite."""
    came = attempt_steps(answer, Run(2, 2, ((1, 1),), 1.0, 8.0, 4))
    for step, log in enumerate(came["logs"][0]):
        print(f"step {step}: {', '.join(log)}")
    if came["stuck"]:
        print(came["stuck"])


def steps_on_processes(answer: Callable) -> str:
    """The same on two processes."""
    from course_utils.processes import launch

    run = Run(2, 3, ((1, 1),), 1.0, 8.0, 4)
    ranks = launch(one_process, run.ranks, answer, run)
    expected = [one_device(run)[f"rank {k}, after step {run.steps - 1},"] for k in range(run.ranks)]
    agree = "are those" if same(expected, ranks, 1e-5) else "are NOT those"
    return f"On two real processes weights, learning rate and loss scale {agree} of one device."


def one_process(worker: Worker, answer: Callable, run: Run) -> dict[str, Any]:
    rank = Rank(worker, run)
    for _ in range(run.steps):
        answer(rank)
        seen = rank._after()
    return seen


# --- fastest_plan -----------------------------------------------------------------------------------------------------

BACKWARD = 2  # a backward takes twice as long as its forward


class Cluster(NamedTuple):
    """Devices that are alike, and a model of blocks that are alike. Times in ms, memory in MB.

    devices, memory: how many, and of each. message: time between two stages.
    rows: of the mini-batch. blocks: of the model.
    start: what every forward of a stage takes, whatever its size. per_row: what a row takes in a block.
    weights: of a block, with gradients and optimizer. activations: of a row in a block, for the backward.
    inputs: of a row, that a stage receives.
    """

    devices: int
    memory: int
    message: float
    rows: int
    blocks: int
    start: float
    per_row: float
    weights: int
    activations: int
    inputs: int

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self._asdict().items())


class Plan(NamedTuple):
    K: int
    M: int
    schedule: str
    recompute: bool

    def __str__(self) -> str:
        return f"K={self.K}, M={self.M}, {self.schedule}{', recompute' * self.recompute}"


def all_plans(cluster: Cluster) -> Iterator[Plan]:
    for K in range(1, min(cluster.devices, cluster.blocks) + 1):
        for M in range(1, cluster.rows + 1):
            if cluster.rows % M == 0:
                yield from (Plan(K, M, name, again) for name in ("gpipe", "1f1b") for again in (False, True))


@cache
def order_of(plan: Plan) -> Schedule:
    return rematerialise(SCHEDULES[plan.schedule](plan.K, plan.M), "always" if plan.recompute else "never")


@cache
def moments_of(plan: Plan) -> list[list[Kept]]:
    """What each stage keeps after each of its actions; it does not depend on the cluster."""
    return kept(order_of(plan))


def timeline_of(cluster: Cluster, plan: Plan) -> Timeline:
    """The step, simulated."""
    forward = stage_times(cluster, plan)
    return simulate(order_of(plan), forward, [BACKWARD * time for time in forward], cluster.message)


def stage_times(cluster: Cluster, plan: Plan) -> list[float]:
    """Of a forward of one micro-batch, stage by stage."""
    rows = cluster.rows // plan.M
    return [cluster.start + cluster.per_row * rows * len(stage) for stage in by_count(cluster.blocks, plan.K)]


@cache
def step_time(cluster: Cluster, plan: Plan) -> float:
    return timeline_of(cluster, plan).makespan


def memory_of(cluster: Cluster, plan: Plan) -> int:
    """The most that a stage needs."""
    return max(weights + stash for weights, stash in memory_parts(cluster, plan))


@cache
def memory_parts(cluster: Cluster, plan: Plan) -> list[tuple[int, int]]:
    """(weights, stash at its fullest) of each stage."""
    rows, parts = cluster.rows // plan.M, []
    for stage, moments in zip(by_count(cluster.blocks, plan.K), moments_of(plan), strict=True):
        graph, inputs = rows * len(stage) * cluster.activations, rows * cluster.inputs
        parts.append((len(stage) * cluster.weights, max(graph * now.graphs + inputs * now.inputs for now in moments)))
    return parts


def target(cluster: Cluster) -> float | None:
    """Milliseconds of the fastest plan that fits, None if none does. All plans are tried."""
    return Search().best(cluster)


@dataclass(frozen=True)
class Search:
    """A search for the fastest plan. The defaults are right; others are mistakes."""

    time: Callable[[Cluster, Plan], float] = step_time
    memory: Callable[[Cluster, Plan], float] = memory_of
    allowed: Callable[[Cluster, Plan], bool] = lambda cluster, plan: True

    def finds(self, cluster: Cluster, plan: Plan) -> bool:
        return self.allowed(cluster, plan) and self.memory(cluster, plan) <= cluster.memory

    def best(self, cluster: Cluster) -> float | None:
        return min((self.time(cluster, plan) for plan in all_plans(cluster) if self.finds(cluster, plan)), default=None)

    def would_give(self, cluster: Cluster, plan: Plan | None) -> bool:
        best = self.best(cluster)
        if plan is None or best is None:
            return plan is None and best is None
        return self.finds(cluster, plan) and math.isclose(self.time(cluster, plan), best, rel_tol=1e-9)


def sum_of_peaks(cluster: Cluster, plan: Plan) -> float:
    """The most graphs and the most inputs added, although they do not fall on the same moment."""
    rows, needs = cluster.rows // plan.M, []
    for stage, moments in zip(by_count(cluster.blocks, plan.K), moments_of(plan), strict=True):
        graphs, inputs = max(now.graphs for now in moments), max(now.inputs for now in moments)
        size = len(stage) * cluster.activations
        needs.append(len(stage) * cluster.weights + rows * (size * graphs + cluster.inputs * inputs))
    return max(needs)


def with_fraction(cluster: Cluster, plan: Plan, bubble: float) -> float:
    """A time from a formula for the bubble's share of the total, with the slowest stage."""
    work = plan.M * max(stage_times(cluster, plan)) * (1 + BACKWARD + plan.recompute)
    return work / (1 - bubble) if bubble < 1 else math.inf


SEARCH_MISTAKES = (
    (
        "memory forgotten",
        "These are the fastest plans if memory had no end.",
        Search(memory=lambda cluster, plan: 0),
    ),
    (
        "weights forgotten",
        "These are the fastest plans if weights, gradients and optimizer needed no memory.",
        Search(memory=lambda cluster, plan: max(stash for _, stash in memory_parts(cluster, plan))),
    ),
    (
        "stash forgotten",
        "These are the fastest plans if nothing had to be kept for the backward.",
        Search(memory=lambda cluster, plan: max(weights for weights, _ in memory_parts(cluster, plan))),
    ),
    (
        "peaks of two moments",
        "The most graphs and the most inputs were added. They do not fall on the same moment, so plans that fit were "
        "turned down.",
        Search(memory=sum_of_peaks),
    ),
    (
        "recomputation for nothing",
        "Recomputing was taken to cost no time. It is one more forward per micro-batch.",
        Search(time=lambda cluster, plan: step_time(cluster, plan._replace(recompute=False))),
    ),
    (
        "never recomputes",
        "These are the fastest plans without recomputation.",
        Search(allowed=lambda cluster, plan: not plan.recompute),
    ),
    (
        "messages for nothing",
        "Messages were taken to cost no time.",
        Search(time=lambda cluster, plan: step_time(cluster._replace(message=0), plan)),
    ),
    (
        "starts for nothing",
        "Every forward and backward takes some time whatever its size, and that did not count.",
        Search(time=lambda cluster, plan: step_time(cluster._replace(start=0), plan)),
    ),
    (
        "always the most micro-batches",
        "M is the number of rows every time. The bubble is smallest then, but every micro-batch has its fixed cost.",
        Search(allowed=lambda cluster, plan: cluster.rows == plan.M),
    ),
    (
        "always all devices",
        "Every device got a stage every time. Each border adds its messages, and the bubble grows.",
        Search(allowed=lambda cluster, plan: min(cluster.devices, cluster.blocks) == plan.K),
    ),
    ("always GPipe", "All plans are GPipe's.", Search(allowed=lambda cluster, plan: plan.schedule == "gpipe")),
    ("always 1F1B", "All plans are 1F1B's.", Search(allowed=lambda cluster, plan: plan.schedule == "1f1b")),
    (
        "another bubble formula",
        "(K - 1) / M was taken for the bubble's share of the total time; it is its ratio to the work.",
        Search(time=lambda cluster, plan: with_fraction(cluster, plan, (plan.K - 1) / plan.M)),
    ),
    (
        "a formula for equal stages",
        "The bubble's formula knows no messages and no unequal stages.",
        Search(time=lambda cluster, plan: with_fraction(cluster, plan, (plan.K - 1) / (plan.M + plan.K - 1))),
    ),
)  # fmt: skip

# Found by trying: each of the mistakes above gives a plan that is wrong, and no other mistake's, with one of them.
FIXED = (
    Cluster(3, 36, message=4, rows=6, blocks=4, start=2, per_row=1, weights=5, activations=4, inputs=4),
    Cluster(3, 41, message=1, rows=6, blocks=4, start=3, per_row=1, weights=1, activations=6, inputs=1),
    Cluster(3, 40, message=4, rows=4, blocks=6, start=3, per_row=2, weights=7, activations=5, inputs=4),
    Cluster(3, 24, message=2, rows=4, blocks=3, start=0, per_row=1, weights=6, activations=5, inputs=2),
    Cluster(3, 18, message=4, rows=4, blocks=3, start=3, per_row=2, weights=9, activations=3, inputs=2),
)
NOTHING_FITS = Cluster(2, 9, message=1, rows=2, blocks=2, start=1, per_row=1, weights=8, activations=2, inputs=1)
MORE_DEVICES_THAN_BLOCKS = Cluster(
    4, 60, message=9, rows=4, blocks=2, start=6, per_row=1, weights=8, activations=2, inputs=1
)  # one stage and one micro-batch are best


def draw_clusters(draw: random.Random) -> list[Cluster]:
    return [*FIXED, NOTHING_FITS, MORE_DEVICES_THAN_BLOCKS, draw_cluster(draw), draw_cluster(draw)]


def draw_cluster(draw: random.Random) -> Cluster:
    """With so much memory that the limit counts."""
    cluster = Cluster(
        devices=draw.randint(2, 3),
        memory=0,
        message=draw.choice((0, 1, 2, 4)),
        rows=draw.choice((4, 6)),
        blocks=draw.randint(3, 8),
        start=draw.choice((0, 1, 2, 3)),
        per_row=draw.choice((1, 2)),
        weights=draw.randint(1, 12),
        activations=draw.randint(1, 6),
        inputs=draw.randint(1, 4),
    )
    needs = sorted({memory_of(cluster, plan) for plan in all_plans(cluster)})
    return cluster._replace(memory=draw.choice(needs[: max(2, len(needs) * 2 // 3)]))


def attempt_plan(answer: Callable, cluster: Cluster) -> Any:
    came = answer(cluster)
    if came is None:
        return None
    try:
        K, M, schedule, recompute = came
        return [int(K), int(M), str(schedule), bool(recompute)]
    except (TypeError, ValueError):
        return repr(came)[:200]


def judge_plans(clusters: Sequence[Cluster], came: Sequence[Any]) -> str:
    plans = [as_plan(cluster, value) for cluster, value in zip(clusters, came, strict=True)]
    if all(plan is None for plan in plans):
        raise Wrong("For every cluster nothing came. Is a `return` missing?")
    first = next((c for c, plan in zip(clusters, plans, strict=True) if not Search().would_give(c, plan)), None)
    if first is None:
        return (
            f"{len(clusters)} clusters: every plan fits, and none of the others that fit is faster, simulated. Among "
            f"yours are {' and '.join(sorted({str(plan) for plan in plans if plan is not None})[:2])}."
        )
    wrong = what_is_wrong(first, plans[clusters.index(first)])
    found = [
        (name, says)
        for name, says, search in SEARCH_MISTAKES
        if all(search.would_give(c, plan) for c, plan in zip(clusters, plans, strict=True))
    ]
    if len(found) == 1:
        raise Named(found[0][0], f"{found[0][1]} {wrong}")
    raise wrong


def as_plan(cluster: Cluster, value: Any) -> Plan | None:
    """Raises Wrong, or Named, for something that is no plan for this cluster."""
    at = f"With {cluster}"
    if value is None:
        return None
    if isinstance(value, str):
        raise Wrong(f"{at}: expected (K, M, schedule, recompute), came {value}.")
    plan = Plan(*value)
    if plan.schedule not in ("gpipe", "1f1b"):
        raise Wrong(f"{at}: the schedule is 'gpipe' or '1f1b'; came {plan.schedule!r}.")
    if cluster.devices < plan.K:
        raise Named("more stages than devices", f"{at}: {plan.K} stages on {cluster.devices} devices.")
    if not 1 <= plan.K <= cluster.blocks:
        raise Wrong(f"{at}: {plan.K} stages cannot be filled from {cluster.blocks} blocks, each with at least one.")
    if cluster.rows < plan.M:
        raise Named(
            "more micro-batches than rows", f"{at}: {plan.M} micro-batches of {cluster.rows} rows; some have no row."
        )
    if plan.M < 1 or cluster.rows % plan.M:
        raise Named(
            "rows that do not divide",
            f"{at}: {cluster.rows} rows do not divide into {plan.M} micro-batches of the same size.",
        )
    return plan


def what_is_wrong(cluster: Cluster, plan: Plan | None) -> Wrong:
    best, at = target(cluster), f"With {cluster}"
    if plan is None:
        return Wrong(f"{at}: no plan came, but one fits that takes {best:g} ms.")
    time, need = step_time(cluster, plan), memory_of(cluster, plan)
    if need > cluster.memory:
        return Wrong(f"{at}: {plan} needs {need} MB on one stage; a device has {cluster.memory} MB.")
    return Wrong(f"{at}: {plan} takes {time:g} ms; a plan that fits takes {best:g} ms.")


TASKS = (
    Task(
        unit="11",
        name="training_step",
        kind="rebuild",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_runs,
        attempt=attempt_steps,
        judge=judge_steps,
        look_at=(
            "what the gradients have in them at each moment: the loss scale, other steps, something not finite.",
            "what must happen in a skipped step, what must not, and whether all ranks decide alike.",
        ),
        hints=(
            "Write the eight parts on eight slips of paper and put them in order. For each pair of neighbours ask what "
            "goes wrong if they change places.",
            "Clipping needs gradients without the loss scale, and the norm of all ranks' gradients tells every rank "
            "whether to skip. Lesson 11 has the step under 'Write it first' (../../notebooks/11_train_it_all.ipynb), "
            "lesson 09 the global norm.",
            "Clear. Forward and backward with the loss scale. Divide the gradients by that loss scale. Exchange the "
            "ranks' norms; the global one is the root of the sum of their squares. If it is finite: make the gradients "
            "smaller where it is above the largest allowed, let the optimizer step, then the learning rate. In any "
            "case tell the loss scale whether the step was skipped. Return whether it was not.",
        ),
        instead=(TrainingState.update, TrainingState.take_in, one_device),
        on_processes=steps_on_processes,
    ),
    Task(
        unit="11",
        name="fastest_plan",
        kind="transfer",
        minutes=45,
        points=5,
        difficulty=3,
        cases=draw_clusters,
        attempt=attempt_plan,
        judge=judge_plans,
        look_at=(
            "what a plan costs in time: every start, every row, every message, and each forward that is made twice.",
            "what a stage needs at its fullest, and which plans there are at all.",
        ),
        hints=(
            "Price one plan by hand, 2 stages, 2 micro-batches, GPipe: how long is a forward of each stage, and what "
            "does each keep after its second forward? Then compare with what your function has for it.",
            "There are few plans: go through all of them and keep the fastest that fits. Lesson 07 "
            "(../../notebooks/07_bubble_and_stash.ipynb) has the simulation and what is kept, with and without "
            "re-materialisation.",
            "For each number of stages that devices and blocks allow, each divisor of the rows, both schedules, with "
            "and without recomputation: make the schedule, and recompute always or never. The forward of a stage takes "
            "the start and its rows times its blocks; simulate. Walk through what is kept: the stash is graphs and "
            "inputs of the same moment. Add the weights. If the fullest stage fits, and the time is the least so far, "
            "keep the plan.",
        ),
        instead=(planning.plan, target, Search.best, timeline_of, memory_of),
    ),
)
