"""Train the numbers-to-words Transformer over any number of stages, and on one device for comparison."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from course_utils.decoding import as_words, greedy_decode
from course_utils.fingerprints import StageRecord, fingerprint
from course_utils.number_words import Batch, batch, collate, split_numbers, to_words
from course_utils.optimization import Noam, clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.processes import launch
from course_utils.schedules import SCHEDULES, Schedule, forward_only, gpipe
from course_utils.stages import CutModel, by_count, one_thread
from course_utils.threads import run_in_threads
from course_utils.transfer import StepAgreement, agree
from course_utils.transformer import TransformerConfig, block_builders
from course_utils.transports import Worker
from course_utils.validity import validate


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome of a run. Raises ValueError, naming the value, for what cannot be run."""

    stages: int = 2
    micro_batches: int = 8
    schedule: str = "gpipe"
    steps: int = 1200
    batch_size: int = 64
    warm_up: int = 400
    learning_rate_factor: float = 0.35  # at 1.0 the exact match swings by several per cent from step to step
    max_norm: float = 1.0
    seed: int = 0
    model: TransformerConfig = field(default_factory=lambda: TransformerConfig(dropout=0.1))
    lowest: int = 0
    highest: int = 999_999
    training_numbers: int | None = 20_000
    held_out: int = 500
    trim_padding: bool = True
    recorded_steps: int = 20  # the gradients of so many first steps enter the fingerprint

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
        by_count(len(block_builders(self.model)), self.stages)
        numbers = split_numbers(self.lowest, self.highest, self.training_numbers, self.held_out, self.seed)
        if self.batch_size > len(numbers.training):
            raise ValueError(
                f"batch_size is {self.batch_size}, more than the {len(numbers.training)} numbers to train on: "
                "use a smaller batch"
            )
        make_optimizer(self, [])  # refuses what makes no learning rate

    @property
    def cut(self) -> CutModel:
        """The model, cut into stages of equal numbers of blocks."""
        return CutModel(self.model, by_count(len(block_builders(self.model)), self.stages))

    @property
    def max_tokens(self) -> int:
        """The longest answer: a word per digit, and the end token."""
        return len(str(self.highest)) + 1


@dataclass
class Step:
    """What a step of training reports."""

    number: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    skipped: bool


@dataclass
class TrainingResult:
    """A finished run.

    Attributes:
        schedule: what the ranks ran, which need not be the one that config names; None on one device.
        steps: one entry per step.
        seconds: time of the training loop, without start-up and evaluation.
        answers: for each held-out number the words that the model gave.
        weights: {name: tensor} of the whole model.
    """

    config: TrainingConfig
    schedule: Schedule | None
    steps: list[Step]
    seconds: float
    answers: dict[int, str]
    fingerprint: str
    weights: dict[str, Tensor]

    @property
    def exact_match(self) -> float:
        """The fraction of held-out numbers whose words are all right."""
        right = sum(answer == to_words(number) for number, answer in self.answers.items())
        return right / max(1, len(self.answers))


def micro_batches_of(config: TrainingConfig, numbers: tuple[int, ...], step: int) -> list[Batch]:
    """The micro-batches of a step: every rank makes the same ones."""
    whole = batch(numbers, seed=config.seed, step=step, size=config.batch_size)
    return whole.split(config.micro_batches, trim=config.trim_padding)


def make_optimizer(config: TrainingConfig, parameters: list[Tensor]) -> tuple[torch.optim.Adam, Noam]:
    """Adam with the settings of Vaswani et al. (2017), section 5.3, and its learning rate."""
    optimizer = torch.optim.Adam([{"params": parameters}], lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    return optimizer, Noam(optimizer, config.model.d_model, config.warm_up, config.learning_rate_factor)


def train_rank(
    worker: Worker, config: TrainingConfig, cut: CutModel, schedule: Schedule, engine: type[Pipeline] = Pipeline
) -> dict[str, Any]:
    """The training loop of one rank: what `train` runs in every process."""
    stages = {s: cut.build(s, config.seed) for s in schedule.stages_of(worker.rank)}
    named = [pair for stage in stages.values() for pair in stage.named_parameters_globally()]
    parameters: list[Tensor] = [parameter for _, parameter in named]
    place = {name: i for i, name in enumerate(cut.parameter_names)}
    optimizer, noam = make_optimizer(config, parameters)
    pipeline = engine(stages, schedule, worker.transport, cut.carry_after)
    agreement = StepAgreement(worker.transport, len(place))
    numbers = split_numbers(config.lowest, config.highest, config.training_numbers, config.held_out, config.seed)
    record = StageRecord()
    dropout_key = (lambda step: (config.seed, step)) if config.model.dropout > 0 else (lambda step: None)

    micro_batches = micro_batches_of(config, numbers.training, 0)
    plan = pipeline.plan(micro_batches)
    agree(worker.transport, plan)
    started = time.perf_counter()
    for step in range(config.steps):
        agreement.open()
        optimizer.zero_grad()
        num_tokens = sum(m.num_tokens for m in micro_batches)
        losses = pipeline.step(micro_batches, plan, num_tokens, dropout_key(step))
        record.add_losses(losses)
        if step < config.recorded_steps:
            record.add_gradients(named)

        own_norms = gradient_norms(((place[name], parameter) for name, parameter in named), len(place))
        micro_batches = micro_batches_of(config, numbers.training, step + 1)
        plan = pipeline.plan(micro_batches)
        if step + 1 < config.steps:
            pipeline.expect(plan)
        norms = agreement.share(own_norms, plan)
        learning_rate = float(noam.get_last_lr()[0])
        norm = clip_by_global_norm(parameters, norms, config.max_norm)
        if math.isfinite(norm):
            optimizer.step()
            noam.step()
        if losses:
            loss = sum(loss.item() for loss in losses.values())
            worker.emit(Step(step, loss, norm, learning_rate, num_tokens, not math.isfinite(norm)))
    seconds = time.perf_counter() - started
    record.add_weights(named)

    answers: list[str] = []
    if numbers.held_out:
        source = collate(numbers.held_out).source
        answers = as_words(greedy_decode(pipeline, cut, source, config.max_tokens))
    return {
        "seconds": seconds,
        "answers": dict(zip(numbers.held_out, answers, strict=True)),
        "record": record.summary(),
        "weights": {name: parameter.detach() for name, parameter in named},
    }


def train(
    config: TrainingConfig,
    schedule: Schedule | None = None,
    run: Callable[..., list] = launch,
    on_step: Callable[[Step], None] | None = None,
    engine: type[Pipeline] = Pipeline,
) -> TrainingResult:
    """Train over several ranks.

    Args:
        schedule: any valid one; by default `config.schedule`, a stage per rank.
        run: `processes.launch`, or `threads.run_in_threads` for threads of this process.
        on_step: called with every step as soon as it is done.
        engine: what runs the schedule; `torch_engine.TorchPipeline` for comparison.

    Raises:
        ScheduleError, ValueError: before anything starts.
        StageError: if a stage fails, with that stage's traceback.
    """
    if schedule is None:
        schedule = SCHEDULES[config.schedule](config.stages, config.micro_batches)
    config = replace(config, stages=schedule.num_stages, micro_batches=schedule.num_micro_batches)
    validate(schedule)
    steps: list[Step] = []

    def on_event(rank: int, step: Step) -> None:
        steps.append(step)
        if on_step is not None:
            on_step(step)

    ranks = run(train_rank, schedule.num_ranks, config, config.cut, schedule, engine, on_event=on_event)
    weights = {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}
    return TrainingResult(
        config=config,
        schedule=schedule,
        steps=steps,
        seconds=max(rank["seconds"] for rank in ranks),
        answers=ranks[0]["answers"],
        fingerprint=fingerprint([rank["record"] for rank in ranks]),
        weights={name: weights[name] for name in config.cut.parameter_names},
    )


def train_on_one_device(config: TrainingConfig) -> TrainingResult:
    """The same training without a pipeline: a plain loop over the micro-batches. The reference for all others.

    It computes on one thread, see `stages.one_thread`.
    """
    with one_thread():
        return plain_loop(replace(config, stages=1))


def plain_loop(config: TrainingConfig) -> TrainingResult:
    """`train_on_one_device` on as many threads as torch is set to."""
    model = config.cut.build(0, config.seed)
    named = list(model.named_parameters_globally())
    parameters: list[Tensor] = [parameter for _, parameter in named]
    optimizer, noam = make_optimizer(config, parameters)
    numbers = split_numbers(config.lowest, config.highest, config.training_numbers, config.held_out, config.seed)
    record, steps = StageRecord(), []
    started = time.perf_counter()
    for step in range(config.steps):
        micro_batches = micro_batches_of(config, numbers.training, step)
        num_tokens = sum(m.num_tokens for m in micro_batches)
        optimizer.zero_grad()
        losses = {}
        for m, micro_batch in enumerate(micro_batches):
            dropout_key = (config.seed, step, m) if config.model.dropout > 0 else None
            logits, _ = model((None, None), micro_batch, dropout_key)
            loss = sum_over_tokens(logits, micro_batch, num_tokens)
            loss.backward()
            losses[m] = loss.detach()
        record.add_losses(losses)
        if step < config.recorded_steps:
            record.add_gradients(named)
        learning_rate = float(noam.get_last_lr()[0])
        norm = clip_by_global_norm(parameters, gradient_norms(enumerate(parameters), len(parameters)), config.max_norm)
        if math.isfinite(norm):
            optimizer.step()
            noam.step()
        loss_sum = sum(loss.item() for loss in losses.values())
        steps.append(Step(step, loss_sum, norm, learning_rate, num_tokens, not math.isfinite(norm)))
    seconds = time.perf_counter() - started
    record.add_weights(named)
    weights = {name: parameter.detach() for name, parameter in named}
    answers = dict(zip(numbers.held_out, answer(config, weights, numbers.held_out), strict=True))
    return TrainingResult(config, None, steps, seconds, answers, fingerprint([record.summary()]), weights)


def answer(config: TrainingConfig, weights: dict[str, Tensor], numbers: tuple[int, ...] | list[int]) -> list[str]:
    """What a model with these weights says to numbers, in this process.

    Raises:
        ValueError: for anything that is neither a whole number of at least 0 nor a string of digits.
    """
    if not numbers:
        return []
    cut = replace(config, stages=1).cut
    source = collate(numbers).source

    def decode(worker: Worker) -> list[str]:
        stage = cut.build(0, config.seed)
        with torch.no_grad():
            for name, parameter in stage.named_parameters_globally():
                parameter.copy_(weights[name])
        pipeline = Pipeline({0: stage}, forward_only(gpipe(1, 1)), worker.transport, cut.carry_after)
        return as_words(greedy_decode(pipeline, cut, source, max(config.max_tokens, source.shape[1] + 1)))

    return run_in_threads(decode, 1)[0]
