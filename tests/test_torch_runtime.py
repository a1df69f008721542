"""Schedules leave the course: a text of ours runs in torch's own schedule runtime, and torch's file in ours.

The runtime is a private class of torch; this file alone uses it, and skips where it has moved.
"""

import csv
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from course_utils.fingerprints import fingerprint, step_summary
from course_utils.number_words import Batch
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.plots import describe_timeline, draw_timeline
from course_utils.processes import launch
from course_utils.schedules import Schedule, gpipe, looped, one_f_one_b, parse
from course_utils.simulation import simulate, staircase
from course_utils.stages import CutModel, by_count, one_thread
from course_utils.threads import run_in_threads
from course_utils.torch_engine import TensorsOnly
from course_utils.transformer import TransformerConfig
from course_utils.transports import Worker
from course_utils.validity import NotAscending, validate
from tests.schedule_strategies import rows_that_run

MODEL = TransformerConfig(d_model=16, heads=2, encoder_layers=3, decoder_layers=3)  # ten blocks
RUNTIME = "torch.distributed.pipelining.schedules._PipelineScheduleRuntime"
IT_HUNG = 120.0


def micro_batches_of(schedule: Schedule) -> list[Batch]:
    """All of one shape, which torch's engine needs, and padded, so that they hold different numbers of tokens."""
    M = schedule.num_micro_batches
    rows = Batch(*(torch.randint(1, 10, (2 * M, 5), generator=torch.Generator().manual_seed(M)) for _ in range(3)))
    rows.target_output[::3, 3:] = 0
    return rows.split(M, trim=False)


def one_device(schedule: Schedule) -> str:
    model, losses = CutModel(MODEL, by_count(10, 1)).build(0, seed=0), {}
    micro_batches = micro_batches_of(schedule)
    num_tokens = sum(m.num_tokens for m in micro_batches)
    with one_thread():
        for m, micro_batch in enumerate(micro_batches):
            loss = sum_over_tokens(model((None, None), micro_batch)[0], micro_batch, num_tokens)
            loss.backward()
            losses[m] = loss.detach()
    return fingerprint([step_summary(losses, model.named_parameters_globally())])


def on_torchs_runtime(worker: Worker, schedules: list[Schedule]) -> list[dict[str, str]]:
    """What one rank adds to the fingerprint of one step of each schedule."""
    return [step_on_torchs_runtime(worker, schedule) for schedule in schedules]


def step_on_torchs_runtime(worker: Worker, schedule: Schedule) -> dict[str, str]:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining import schedules as torch_schedules

    cut = CutModel(MODEL, by_count(10, schedule.num_stages))
    micro_batches = micro_batches_of(schedule)
    num_tokens, geometry = sum(m.num_tokens for m in micro_batches), micro_batches[0].geometry

    def present(border: int) -> list[bool]:
        return [spec is not None for spec in cut.carry_after(border, geometry)]

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sum_over_tokens(logits, Batch(target, target, target), num_tokens)

    own = {stage: cut.build(stage, seed=0) for stage in schedule.stages_of(worker.rank)}
    torchs = []
    for number, stage in own.items():
        adapter = TensorsOnly(stage, present(number - 1) if number else [], present(number))
        group = worker.transport.data_group
        torchs.append(PipelineStage(adapter, number, schedule.num_stages, torch.device("cpu"), group=group))
    M = schedule.num_micro_batches
    runtime: Any = torch_schedules._PipelineScheduleRuntime(torchs, M, loss_fn=loss, scale_grads=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "schedule.csv")
        file.write_text(schedule.to_text())
        runtime._load_csv(str(file))
    whole = [torch.cat([getattr(m, name) for m in micro_batches]) for name in ("source", "target_input")]
    number = torch.arange(M).repeat_interleave(micro_batches[0].rows)
    losses: list[torch.Tensor] = []
    last = schedule.num_stages - 1 in own
    target = torch.cat([m.target_output for m in micro_batches]) if last else None
    arguments = (whole[0],) if 0 in own else ()
    runtime.step(*arguments, target=target, losses=losses, source=whole[0], target_input=whole[1], number=number)
    parameters = [pair for stage in own.values() for pair in stage.named_parameters_globally()]
    return step_summary({m: loss.detach() for m, loss in enumerate(losses)}, parameters)


def on_our_executor(worker: Worker, schedule: Schedule) -> dict[str, str]:
    cut = CutModel(MODEL, by_count(10, schedule.num_stages))
    micro_batches = micro_batches_of(schedule)
    own = {stage: cut.build(stage, seed=0) for stage in schedule.stages_of(worker.rank)}
    pipeline = Pipeline(own, schedule, worker.transport, cut.carry_after)
    losses = pipeline.step(micro_batches, pipeline.plan(micro_batches), sum(m.num_tokens for m in micro_batches))
    return step_summary(losses, [pair for stage in own.values() for pair in stage.named_parameters_globally()])


def random_schedule_of(num_ranks: int, seed: int) -> Schedule:
    """One stage per rank, in order, or two in a loop, as torch's runtime expects them."""
    rng = random.Random(seed)
    rank_of_stage = [stage % num_ranks for stage in range(num_ranks * rng.choice([1, 1, 2]))]
    num_micro_batches = rng.choice([1, 2, 3, 5])
    rows = rows_that_run(rng, rank_of_stage, num_micro_batches)
    return validate(Schedule(num_micro_batches, tuple(rank_of_stage), tuple(map(tuple, rows))))


def schedules_for(num_ranks: int) -> list[Schedule]:
    named = [gpipe(num_ranks, 4), one_f_one_b(num_ranks, 4), looped(num_ranks, 2, 3)]
    return named + [random_schedule_of(num_ranks, seed) for seed in range(25)]


@pytest.fixture
def runtime():
    """Skips where torch has no such class any more."""
    try:
        from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
    except ImportError:
        pytest.skip(f"this torch, {torch.__version__}, has no {RUNTIME}")
    return _PipelineScheduleRuntime


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_schedule_of_ours_runs_in_torchs_runtime_with_the_same_bits(runtime, num_ranks):
    schedules = schedules_for(num_ranks)
    ranks = launch(on_torchs_runtime, num_ranks, schedules, limit=IT_HUNG)
    for schedule, summaries in zip(schedules, zip(*ranks, strict=True), strict=True):
        assert fingerprint(summaries) == one_device(schedule), schedule.to_text()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_schedule_that_torch_wrote_is_read_drawn_priced_and_executed(runtime, num_ranks, tmp_path):
    from torch.distributed.pipelining import ScheduleInterleaved1F1B

    schedule = validate(written_by_torch(ScheduleInterleaved1F1B, num_ranks, tmp_path))
    assert (schedule.num_ranks, schedule.num_stages) == (num_ranks, 2 * num_ranks)
    timeline = simulate(schedule, forward=1, backward=2)
    assert "bubble" in describe_timeline(timeline) and draw_timeline(timeline).axes and staircase(schedule)
    assert fingerprint(run_in_threads(on_our_executor, num_ranks, schedule)) == one_device(schedule)


def test_a_schedule_of_torch_that_adds_gradients_in_another_order_is_refused(runtime, tmp_path):
    from torch.distributed.pipelining import ScheduleLoopedBFS

    with pytest.raises(NotAscending, match="0B1 comes before 0B0"):
        validate(written_by_torch(ScheduleLoopedBFS, 2, tmp_path))


def written_by_torch(kind: Any, num_ranks: int, folder: Path) -> Schedule:
    """The file that torch writes for a schedule of two stages per rank: one line per rank, gaps where it idles."""
    from torch.distributed.pipelining import PipelineStage

    engine = make_schedule(kind, [object.__new__(PipelineStage) for _ in range(2)], num_ranks)
    file = folder / "schedule.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(engine.pipeline_order[rank] for rank in range(num_ranks))
    return parse(file.read_text(), [stage % num_ranks for stage in range(2 * num_ranks)])


def make_schedule(kind: Any, stages: list, num_ranks: int) -> Any:
    """Torch's schedule of stages that will never run, so that no process is needed for its list of actions."""
    for number, stage in enumerate(stages):
        vars(stage).update(
            group_size=num_ranks, group_rank=0, num_stages=2 * num_ranks, stage_index=number * num_ranks, group=None
        )
        vars(stage).update(is_first=False, is_last=False, has_backward=True)
    return kind(stages, 2 * num_ranks, loss_fn=lambda *_: None)
