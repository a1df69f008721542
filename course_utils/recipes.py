"""Everything that decides the outcome of a run, and the two recipes of the course."""

from dataclasses import dataclass, field, replace

import torch

from course_utils.devices import check_device
from course_utils.number_words import Batch, Split, batch, repeat_rare_lengths, split_numbers
from course_utils.optimization import LossScaler, Noam
from course_utils.precision import LOW_PRECISION, resolve
from course_utils.schedules import POLICIES, SCHEDULES, Schedule, rematerialise
from course_utils.stages import CutModel, by_count
from course_utils.ties import check_groups
from course_utils.transformer import EncoderLayer, TransformerConfig, block_builders
from course_utils.validity import validate


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome of a run. Raises ValueError, naming the value, for what cannot be run."""

    stages: int = 2
    micro_batches: int = 8
    schedule: str = "gpipe"
    steps: int = 800
    batch_size: int = 64
    warm_up: int = 150
    learning_rate_factor: float = 0.2  # at 1.0 the exact match swings by several per cent from step to step
    max_norm: float = 1.0
    seed: int = 0
    model: TransformerConfig = field(default_factory=lambda: TransformerConfig(dropout=0.1))
    lowest: int = 0
    highest: int = 999_999
    training_numbers: int | None = 20_000
    held_out: int = 500
    trim_padding: bool = True
    recorded_steps: int = 20  # the gradients of so many first steps enter the fingerprint
    device: str = "cpu"  # or cuda: see `devices`
    precision: str = "fp32"  # of matrix products: fp32, bf16, fp16, or auto, which measures
    loss_scale: float | None = None  # to begin with; None: 65536 for fp16, which needs one, and none for the others
    rematerialisation: str = "never"  # or always, except_last: forwards that are computed again instead of kept
    tie: tuple[tuple[str, ...], ...] = ()  # groups of parameters that are one: see `ties`
    wire_dtype: str | None = None  # bf16 or fp16: what messages between stages are rounded to; None: nothing is rounded

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; there are {', '.join(SCHEDULES)}")
        if self.steps < 0:
            raise ValueError(f"the number of steps is {self.steps}; it must be at least 0")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm is {self.max_norm}; it must be above 0 (infinity clips nothing)")
        if self.batch_size < 1:
            raise ValueError(f"the batch size is {self.batch_size}; it must be at least 1")
        if not 1 <= self.micro_batches <= self.batch_size:
            raise ValueError(
                f"the number of micro-batches is {self.micro_batches}; a batch of {self.batch_size} rows gives 1 to "
                f"{self.batch_size} (no micro-batch may be empty)"
            )
        if self.rematerialisation not in POLICIES:
            raise ValueError(f"unknown re-materialisation {self.rematerialisation!r}; there are {', '.join(POLICIES)}")
        if self.wire_dtype is not None and self.wire_dtype not in LOW_PRECISION:
            raise ValueError(f"unknown wire_dtype {self.wire_dtype!r}; there are None, {', '.join(LOW_PRECISION)}")
        check_device(self.device)
        if self.precision != "auto":
            resolve(self.precision, self.device)  # refuses what is unknown or cannot be run
        if self.loss_scale is not None:
            LossScaler(self.loss_scale)  # refuses what is no scale
        by_count(len(block_builders(self.model)), self.stages)
        check_groups(self.tie, self.cut)
        numbers = split_numbers(self.lowest, self.highest, self.training_numbers, self.held_out, self.seed)
        if self.batch_size > len(numbers.training):
            raise ValueError(
                f"batch_size is {self.batch_size}, more than the {len(numbers.training)} numbers to train on: "
                "use a smaller batch"
            )
        Noam(torch.optim.Adam([{"params": []}]), self.model.d_model, self.warm_up, self.learning_rate_factor)

    @property
    def cut(self) -> CutModel:
        """The model, cut into stages of equal numbers of blocks."""
        return CutModel(self.model, by_count(len(block_builders(self.model)), self.stages))

    @property
    def max_tokens(self) -> int:
        """The longest answer: a word per digit, and the end token."""
        return len(str(self.highest)) + 1


def settle(config: TrainingConfig, schedule: Schedule | None = None) -> tuple[TrainingConfig, Schedule]:
    """What a run really does: nothing is left to be chosen or measured, and the two agree with each other.

    Args:
        schedule: any valid one; by default the one that config names, a stage per rank.

    Raises:
        ScheduleError: it cannot run.
    """
    if schedule is None:
        schedule = SCHEDULES[config.schedule](config.stages, config.micro_batches)
        schedule = rematerialise(schedule, config.rematerialisation)
    validate(schedule)
    config = replace(config, stages=schedule.num_stages, micro_batches=schedule.num_micro_batches)
    return with_precision(config), schedule


def numbers_of(config: TrainingConfig) -> Split:
    """What a run trains on, rare lengths repeated, and what it is examined on."""
    numbers = split_numbers(config.lowest, config.highest, config.training_numbers, config.held_out, config.seed)
    return Split(repeat_rare_lengths(numbers.training), numbers.held_out)


def micro_batches_of(config: TrainingConfig, numbers: tuple[int, ...], step: int) -> list[Batch]:
    """The micro-batches of a step: every rank makes the same ones."""
    whole = batch(numbers, seed=config.seed, step=step, size=config.batch_size)
    return whole.split(config.micro_batches, trim=config.trim_padding)


def with_precision(config: TrainingConfig) -> TrainingConfig:
    """The configuration with "auto" decided: by a layer of its model on a micro-batch as it will be."""
    if config.precision != "auto":
        return config
    micro_batch = micro_batches_of(config, tuple(range(config.highest, config.highest - config.batch_size, -1)), 0)[0]
    device, width = config.device, config.model.d_model
    layer = next(b for b in block_builders(config.model) if b.kind is EncoderLayer).build(config.seed, device)
    micro_batch = micro_batch.to(device)
    hidden = torch.ones(micro_batch.rows, micro_batch.source_length, width, device=device, requires_grad=True)

    def forward_and_backward() -> None:
        result, _ = layer((hidden, None), micro_batch, None)
        result.sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()

    return replace(config, precision=resolve(config.precision, device, work=forward_and_backward))


RECIPES = {
    # Numbers below a million: over four seeds 99.6 to 100 % of those held out are read without a mistake.
    "default": TrainingConfig(),
    # The recipe of the article that this course started from, its bugs mended: numbers below a thousand, 10 epochs of
    # batches of 32, and a warm-up of 4000 steps whose end these 290 never see. No dropout: over three seeds 98 to 100 %
    # of the exam are right without it, 75 to 94 % with 0.1.
    "article": TrainingConfig(
        model=TransformerConfig(),
        micro_batches=4,
        steps=290,
        batch_size=32,
        warm_up=4000,
        learning_rate_factor=1.0,
        highest=999,
        training_numbers=None,
        held_out=100,
    ),
}
