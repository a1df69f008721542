"""What the benchmarks compare: one small Transformer on two ranks, run by the course's engine and by PyTorch's own.

The model is decoder-only and the micro-batches have one shape: there torch.distributed.pipelining is defined and needs
no adapter. Both engines get the same stage, the same whole batch and the same loss, and cut the batch themselves.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from course_utils.number_words import Batch, Geometry
from course_utils.optimization import clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.schedules import Schedule, gpipe, one_f_one_b
from course_utils.transfer import Specs, StepAgreement, StepPlan, agree
from course_utils.transformer import Carry, CarrySpec
from course_utils.transports import Worker

WIDTH, HEADS, VOCABULARY = 64, 4, 97
ROWS, LENGTH = 16, 8
NUM_STAGES = 2
PLACES_PER_STAGE = 50  # in the vector of norms: more than a stage has parameters

MAKERS = {"GPipe": (gpipe, ScheduleGPipe), "1F1B": (one_f_one_b, Schedule1F1B)}  # ours, torch's


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        projected = self.inward(self.norms[0](hidden)).view(rows, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.outward(attended.transpose(1, 2).reshape(rows, length, WIDTH))
        return hidden + self.feed_forward(self.norms[1](hidden))


class SmallStage(nn.Module):
    """Half of the model, called as torch's engine calls a stage: the tensor that arrived in, the result out."""

    def __init__(self, index: int, num_blocks: int):
        super().__init__()
        torch.manual_seed(index)
        self.is_first, self.is_last = index == 0, index == NUM_STAGES - 1
        blocks = [Block() for _ in range(num_blocks)]
        head = [nn.Linear(WIDTH, VOCABULARY)] if self.is_last else []
        self.layers = nn.Sequential(*[nn.Embedding(VOCABULARY, WIDTH)] if self.is_first else [], *blocks, *head)

    def forward(self, arrived: Tensor) -> Tensor:
        return self.layers(arrived)


class CarryStage:
    """The same stage as the course's engine calls one."""

    def __init__(self, stage: SmallStage):
        self.stage, self.is_last = stage, stage.is_last

    def __call__(self, carry: Carry, micro_batch: Batch, dropout_key: object) -> Carry:
        return self.stage(micro_batch.source if self.stage.is_first else carry[0]), None


def carry_after(stage: int, geometry: Geometry) -> Specs:
    rows, length, _ = geometry
    return CarrySpec((rows, length, WIDTH), torch.float32, requires_grad=True), None


def random_batch() -> Batch:
    """Tokens without padding, so every loss is over the same number of them. (0 would be padding.)"""
    generator = torch.Generator().manual_seed(7)
    source, target = torch.randint(1, VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    return Batch(source, target, target)


class OurEngine:
    """The course's engine. To be made on all ranks at once: they compare their plans."""

    def __init__(self, worker: Worker, stage: SmallStage, schedule: Schedule, batch: Batch):
        self.stage, self.batch = stage, batch
        stages: Any = {worker.rank: CarryStage(stage)}
        self.pipeline = Pipeline(stages, schedule, worker.transport, carry_after)
        self.parameters = list(stage.parameters())
        self.first_place = worker.rank * PLACES_PER_STAGE
        self.agreement = StepAgreement(worker.transport, NUM_STAGES * PLACES_PER_STAGE)
        agree(worker.transport, self.cut()[1])

    def cut(self) -> tuple[list[Batch], StepPlan]:
        micro_batches = self.batch.split(self.pipeline.schedule.num_micro_batches, trim=False)
        return micro_batches, self.pipeline.plan(micro_batches)

    def step(self) -> None:
        """From a mini-batch to its gradients."""
        self.stage.zero_grad()
        micro_batches, plan = self.cut()
        self.pipeline.step(micro_batches, plan, self.batch.num_tokens)

    def train(self, steps: int) -> list[float]:
        """Steps in the order of `training.train_rank`, with clipping and the exchange of norms and of the next plan.

        Returns:
            The moment at which each step ended.
        """
        ends = []
        for step in range(steps):
            self.agreement.open()
            self.step()
            norms = gradient_norms(enumerate(self.parameters, self.first_place), self.agreement.num_norms)
            _, plan = self.cut()
            if step + 1 < steps:
                self.pipeline.expect(plan)
            clip_by_global_norm(self.parameters, self.agreement.share(norms, plan), max_norm=1.0)
            ends.append(time.perf_counter())
        return ends


class TorchEngine:
    """PyTorch's engine."""

    def __init__(self, worker: Worker, stage: SmallStage, kind: Callable, num_micro_batches: int, batch: Batch):
        self.stage, self.batch = stage, batch
        pipeline_stage = PipelineStage(stage, worker.rank, NUM_STAGES, torch.device("cpu"))
        self.schedule = kind(pipeline_stage, num_micro_batches, loss_fn=self.loss, scale_grads=False)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return sum_over_tokens(logits, Batch(target, target, target), self.num_tokens)

    def step(self) -> None:
        """From a mini-batch to its gradients."""
        self.stage.zero_grad()
        self.num_tokens = self.batch.num_tokens
        arguments = (self.batch.source,) if self.stage.is_first else ()
        target = self.batch.target_output if self.stage.is_last else None
        self.schedule.step(*arguments, target=target, return_outputs=False)

    def train(self, steps: int) -> list[float]:
        """Like ours, but without the exchange and the clipping: this engine has none. That is in its favour."""
        ends = []
        for _ in range(steps):
            self.step()
            ends.append(time.perf_counter())
        return ends


def both_engines(
    worker: Worker, num_micro_batches: int, names: Iterable[str] = tuple(MAKERS), blocks_per_stage: int = 2
) -> dict[str, tuple[OurEngine, TorchEngine]]:
    """For each schedule our and torch's engine, all round one stage, made and warm.

    Raises:
        AssertionError: unless all of them give the same gradients, bit for bit.
    """
    stage, batch = SmallStage(worker.rank, blocks_per_stage), random_batch()
    engines = {
        name: (
            OurEngine(worker, stage, make(NUM_STAGES, num_micro_batches), batch),
            TorchEngine(worker, stage, kind, num_micro_batches, batch),
        )
        for name, (make, kind) in ((name, MAKERS[name]) for name in names)
    }
    expected: list[Tensor] = []
    for name, pair in engines.items():
        for engine in pair:
            engine.step()
            gradients = [parameter.grad.clone() for parameter in stage.parameters() if parameter.grad is not None]
            expected = expected or gradients
            same = len(gradients) == len(list(stage.parameters())) and all(map(torch.equal, gradients, expected))
            assert same, f"{name}: {type(engine).__name__} gives other gradients than the first engine"
    return engines


def ratios(ranks: list[list[list[float]]]) -> dict[str, float]:
    """From each rank's [[ours, torch's] seconds per repetition]: both in milliseconds, and ours/torch, as medians.

    A step is over when the last rank is through with it.
    """
    pairs = [[max(seconds) for seconds in zip(*pair, strict=True)] for pair in zip(*ranks, strict=True)]
    return {
        "ours": 1e3 * statistics.median(ours for ours, _ in pairs),
        "torch": 1e3 * statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
    }
