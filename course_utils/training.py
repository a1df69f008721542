"""Train the numbers-to-words Transformer over any number of stages, and on one device for comparison."""

import time
import warnings
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from course_utils.checkpoint import MAY_DIFFER, CheckpointError, Checkpoints, Manifest, SaveReport, compare_config
from course_utils.decoding import as_words, greedy_decode
from course_utils.fingerprints import fingerprint
from course_utils.number_words import collate, to_words
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.precision import LOW_PRECISION, autocast
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig, micro_batches_of, numbers_of, settle, with_precision
from course_utils.schedules import Schedule, forward_only, gpipe
from course_utils.stages import CutModel, one_thread
from course_utils.threads import run_in_threads
from course_utils.timeline import Timeline, merge
from course_utils.training_state import Step, TrainingState, build_rank
from course_utils.transfer import StepAgreement, agree, tell_all
from course_utils.transports import Transport, Worker


@dataclass
class TrainingResult:
    """A finished run.

    Attributes:
        schedule: what the ranks ran, which need not be the one that config names; None on one device.
        steps: one entry per step.
        seconds: time of the training loop, without start-up and evaluation.
        answers: for each held-out number the words that the model gave.
        weights: {name: tensor} of the whole model.
        timelines: {step: what the ranks did in it}, of the steps that were to be recorded.
        saves: what became of each attempt to save a checkpoint.
    """

    config: TrainingConfig
    schedule: Schedule | None
    steps: list[Step]
    seconds: float
    answers: dict[int, str]
    fingerprint: str
    weights: dict[str, Tensor]
    timelines: dict[int, Timeline] = field(default_factory=dict)
    saves: list[SaveReport] = field(default_factory=list)

    @property
    def exact_match(self) -> float:
        """The fraction of held-out numbers whose words are all right."""
        right = sum(answer == to_words(number) for number, answer in self.answers.items())
        return right / max(1, len(self.answers))


def train_rank(
    worker: Worker,
    config: TrainingConfig,
    cut: CutModel,
    schedule: Schedule,
    engine: type[Pipeline] = Pipeline,
    recorded: Container[int] = (),
    checkpoints: Checkpoints | None = None,
    save_every: int = 100,
    manifest: Manifest | None = None,
) -> dict[str, Any]:
    """The training loop of one rank: what `train` runs in every process."""
    pipeline, state = build_rank(worker.transport, config, cut, schedule, engine)
    if manifest is not None:
        state.resume(manifest)
    pipeline.also += f"; {state.started_as()}"
    agreement = StepAgreement(worker.transport, len(state.place))
    numbers = numbers_of(config)
    timelines: dict[int, Timeline] = {}

    micro_batches = micro_batches_of(config, numbers.training, state.steps_done)
    plan = pipeline.plan(micro_batches)
    agree(worker.transport, plan)
    started = time.perf_counter()
    state.ties.compare()
    while state.steps_done < config.steps:
        state.ties.open()
        agreement.open()
        state.optimizer.zero_grad()
        if state.steps_done in recorded:
            label = getattr(worker.transport, "label", "measured")  # another where queues are imitated
            timelines[state.steps_done] = Timeline(worker.world_size, label, "seconds")
        pipeline.timeline = timelines.get(state.steps_done)
        num_tokens = sum(m.num_tokens for m in micro_batches)
        losses = pipeline.step(micro_batches, plan, num_tokens, state.dropout_key(), state.scaler.scale)
        worker.transport.computing("the update of the weights")

        own_norms = state.take_in(losses)
        micro_batches = micro_batches_of(config, numbers.training, state.steps_done + 1)
        plan = pipeline.plan(micro_batches)
        if state.steps_done + 1 < config.steps:
            pipeline.expect(plan)
        norms = agreement.share(own_norms, plan)
        step = state.update(norms, losses, num_tokens)
        if losses:
            worker.emit(step)
        pipeline.watches_values = state.skipped_in_a_row > 0
        if state.skipped_in_a_row == MOST_SKIPPED:
            give_up(worker.transport, pipeline.not_finite)
        if checkpoints and (state.steps_done % save_every == 0 or state.steps_done == config.steps):
            report = checkpoints.save(worker.transport, state.to_save())
            if worker.rank == 0:
                worker.emit(report)
    seconds = time.perf_counter() - started
    state.record.add_weights(state.named)

    answers: list[str] = []
    if numbers.held_out:
        source = collate(numbers.held_out).source
        answers = as_words(greedy_decode(pipeline, cut, source, config.max_tokens))
    return {
        "seconds": seconds,
        "answers": dict(zip(numbers.held_out, answers, strict=True)),
        "record": state.record.summary(),
        "weights": {name: parameter.detach().cpu() for name, parameter in state.named},
        "timelines": timelines,
    }


MOST_SKIPPED = 20  # steps in a row, without a loss scale that could still be lowered


def give_up(transport: Transport, not_finite: str) -> None:
    """End a run that only skips steps, on all ranks alike. not_finite: what this rank knows of the cause.

    Raises:
        FloatingPointError: on the rank where it begins.
        PeerLost: on the others, as soon as it has ended.
    """
    texts = tell_all(transport, not_finite, "the place where values cease to be finite")
    origins = [rank for rank, text in enumerate(texts) if text] or list(range(len(texts)))
    where = " and ".join(filter(None, texts)) or "no single place in the last step"
    message = (
        f"{MOST_SKIPPED} steps in a row were skipped, because gradients were not finite. "
        f"Where values cease to be finite: {where}. "
        "Look at that stage's weights and data; a lower learning rate may help."
    )
    if transport.rank not in origins:  # nobody ends, and stops the others with it, before the rank to blame has
        never_comes = transport.irecv(torch.empty(1), origins[0], "the error that ends the run", control=True)
        transport.wait(never_comes)
    raise FloatingPointError(message)


def train(
    config: TrainingConfig,
    schedule: Schedule | None = None,
    run: Callable[..., list] = launch,
    on_step: Callable[[Step], None] | None = None,
    engine: type[Pipeline] = Pipeline,
    record: Container[int] = (),
    checkpoints: Checkpoints | None = None,
    save_every: int = 100,
    resume: bool = False,
) -> TrainingResult:
    """Train over several ranks.

    Args:
        schedule: any valid one; by default `config.schedule`, a stage per rank.
        run: `processes.launch`, or `threads.run_in_threads` for threads of this process.
        on_step: called with every step as soon as it is done.
        engine: what runs the schedule; `torch_engine.TorchPipeline` for comparison.
        record: steps whose timelines are to be measured.
        checkpoints: where to save every `save_every` steps, and at the end; None: nowhere.
        resume: go on from the newest checkpoint, if there is one; stages, schedule, re-materialisation and the number
            of steps may be others than before (with wire_dtype not the stages: every border rounds).

    Raises:
        ScheduleError, ValueError: before anything starts.
        CheckpointError: a ValueError: before anything starts, if there is a checkpoint already and resume is False, or
            one that cannot be resumed.
        StageError: if a stage fails, with that stage's traceback; also if so many steps in a row are skipped that
            waiting for a good one makes no sense: it says where values cease to be finite.
    """
    config, schedule = settle(config, schedule)
    manifest = manifest_to_resume(config, checkpoints, save_every, resume)
    steps: list[Step] = []
    saves: list[SaveReport] = []

    def on_event(rank: int, event: Step | SaveReport) -> None:
        if isinstance(event, SaveReport):
            saves.append(event)
            if event.problem:
                warnings.warn(event.problem, stacklevel=2)
            return
        steps.append(event)
        if on_step is not None:
            on_step(event)

    arguments = (config, config.cut, schedule, engine, record, checkpoints, save_every, manifest)
    ranks = run(train_rank, schedule.num_ranks, *arguments, on_event=on_event)
    weights = {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}
    return TrainingResult(
        config=config,
        schedule=schedule,
        steps=steps,
        seconds=max(rank["seconds"] for rank in ranks),
        answers=ranks[0]["answers"],
        fingerprint=fingerprint([rank["record"] for rank in ranks]),
        weights={name: weights[name] for name in config.cut.parameter_names},
        timelines={step: merge([rank["timelines"][step] for rank in ranks]) for step in ranks[0]["timelines"]},
        saves=saves,
    )


def manifest_to_resume(
    config: TrainingConfig, checkpoints: Checkpoints | None, save_every: int, resume: bool
) -> Manifest | None:
    """The checkpoint to go on from. Raises ValueError for what would be lost, or cannot be resumed."""
    if save_every < 1:
        raise ValueError(f"save_every is {save_every}; it must be at least 1 step")
    if checkpoints is None:
        if resume:
            raise ValueError("resume needs checkpoints: say where they are")
        return None
    manifest = checkpoints.latest()
    if manifest is None:
        return None
    if not resume:
        raise CheckpointError(
            f"{manifest.folder} is a checkpoint of step {manifest.step}: resume from it, or name another folder"
        )
    # Where messages are rounded, the borders between stages are a part of the arithmetic.
    may_differ = [name for name in MAY_DIFFER if name != "stages" or config.wire_dtype is None]
    compare_config(manifest.config, asdict(config), may_differ)
    if manifest.step > config.steps:
        raise CheckpointError(
            f"{manifest.folder} has done {manifest.step} steps, more than the {config.steps} asked for: ask for more, "
            "or name another folder"
        )
    return manifest


def train_on_one_device(config: TrainingConfig) -> TrainingResult:
    """The same training without a pipeline: a plain loop over the micro-batches. The reference for all others.

    It computes on one thread, see `stages.one_thread`.
    """
    with one_thread():
        return plain_loop(replace(config, stages=1))


def plain_loop(config: TrainingConfig) -> TrainingResult:
    """`train_on_one_device` on as many threads as torch is set to."""
    config = with_precision(config)
    low_precision, device = LOW_PRECISION.get(config.precision), config.device
    model = config.cut.build(0, config.seed, device)
    state = TrainingState(config, config.cut, [model])
    numbers = numbers_of(config)
    steps = []
    started = time.perf_counter()
    while state.steps_done < config.steps:
        micro_batches = [m.to(device) for m in micro_batches_of(config, numbers.training, state.steps_done)]
        num_tokens = sum(m.num_tokens for m in micro_batches)
        state.optimizer.zero_grad()
        state.ties.open()
        losses, key = {}, state.dropout_key()
        with autocast(low_precision, device):
            for m, micro_batch in enumerate(micro_batches):
                logits, _ = model((None, None), micro_batch, None if key is None else (*key, m))
                loss = sum_over_tokens(logits, micro_batch, num_tokens)
                with autocast(low_precision, device, enabled=False):
                    loss.backward(torch.full_like(loss, state.scaler.scale))
                losses[m] = loss.detach()
        norms = state.take_in(losses)
        steps.append(state.update(norms, losses, num_tokens))
    seconds = time.perf_counter() - started
    state.record.add_weights(state.named)
    weights = {name: parameter.detach().cpu() for name, parameter in state.named}
    answers = dict(zip(numbers.held_out, answer(config, weights, numbers.held_out), strict=True))
    return TrainingResult(config, None, steps, seconds, answers, fingerprint([state.record.summary()]), weights)


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
