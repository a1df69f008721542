"""Traces of torch.profiler, read as timelines: written by hand, where everything is known, and recorded."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble
from torch.profiler import ProfilerActivity, profile, record_function

from course_utils.number_words import batch
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig
from course_utils.schedules import Schedule, gpipe, looped, one_f_one_b
from course_utils.timeline import Timeline, from_profiler, merge
from course_utils.torch_engine import TorchPipeline
from course_utils.transfer import agree
from course_utils.transports import Worker

AUTOGRAD = "autograd::engine::evaluate_function: MmBackward0"


def event(start: float, length: float, name: str, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    """Times in microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": start, "dur": length, "args": args}


def arrow(number: int, start: float, end: float) -> list[dict[str, Any]]:
    both = {"s": start, "f": end}
    return [{"ph": ph, "cat": "fwdbwd", "id": number, "name": "fwdbwd", "ts": time} for ph, time in both.items()]


def write(path: Path, *events: dict[str, Any] | list, **about: Any) -> Path:
    flat = [one for each in events for one in (each if isinstance(each, list) else [each])]
    text = json.dumps({"traceEvents": flat, **about})
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return path


def rows(timeline: Timeline) -> list[tuple[int, str, int, int, float, float]]:
    """(rank, kind, stage, micro-batch, start, end), times in microseconds."""
    return [(*interval[:4], *(round(1e6 * time, 3) for time in interval[4:])) for interval in timeline]


# --- By hand ---------------------------------------------------------------------------------------------------------


def test_a_mark_contains_the_wait_and_its_operators_do_not(tmp_path):
    path = write(
        tmp_path / "a.json",
        event(0, 100, "Forward 0", "user_annotation"),
        event(5, 1, "c10d::recv_"),
        event(6, 84, "gloo:recv", "user_annotation"),
        event(70, 10, "aten::mm"),
        event(72, 5, "aten::copy_"),
        event(85, 15, "aten::add"),
        event(100, 20, "Backward 0", "user_annotation"),
        event(110, 10, AUTOGRAD),
        event(130, 50, "aten::_foreach_add_"),  # an optimizer, in no mark
    )
    timeline = from_profiler(path)
    assert rows(timeline) == [(0, "F", 0, 0, 0, 30), (0, "B", 0, 0, 40, 50)]
    assert timeline.label == "measured by torch.profiler" and timeline.bubble_of_total == pytest.approx(0.2)


def test_marks_in_the_form_of_a_schedule_name_the_stage(tmp_path):
    path = write(
        tmp_path / "a.json",
        event(0, 10, "2F1", "user_annotation"),
        event(0, 10, "aten::mm"),
        event(10, 10, "PP:1RECV_F0", "user_annotation"),
        event(20, 10, "PP:6I0", "user_annotation"),
        event(20, 10, "aten::mm"),
        event(30, 10, "PP:6W0", "user_annotation"),
        event(31, 9, "aten::mm"),
    )
    # The two halves of a backward are both a backward.
    assert rows(from_profiler(path)) == [(0, "F", 2, 1, 0, 10), (0, "B", 6, 0, 20, 30), (0, "B", 6, 0, 31, 40)]


@pytest.mark.parametrize("gap, pieces", [(0.00004, 1), (0.00002, 2)])
def test_python_between_two_operators_is_computing_and_a_longer_gap_is_not(tmp_path, gap, pieces):
    path = write(
        tmp_path / "a.json",
        event(0, 100, "Forward 0", "user_annotation"),
        event(0, 10, "aten::mm"),
        event(40, 10, "aten::mm"),
    )
    assert len(from_profiler(path, gap=gap)) == pieces


def test_communication_is_no_computing_and_ends_it(tmp_path):
    path = write(
        tmp_path / "a.json",
        event(0, 100, "Forward 0", "user_annotation"),
        event(0, 10, "aten::mm"),
        event(12, 5, "c10d::send"),
        event(13, 3, "aten::detach"),  # inside it
        event(20, 10, "aten::mm"),
    )
    assert rows(from_profiler(path)) == [(0, "F", 0, 0, 0, 10), (0, "F", 0, 0, 20, 30)]


def without_marks() -> list:
    """Two micro-batches as 1F1B runs them: F0 F1 B0 B1, the first forward in two pieces, and an optimizer."""
    return [
        event(0, 5, "aten::tensor_split"),
        event(2000, 10, "aten::embedding"),
        event(4000, 10, "aten::mm"),
        event(4010, 1, "c10d::send"),
        event(4011, 20, "aten::mm"),
        event(4031, 1, "c10d::recv_"),
        event(4040, 20, AUTOGRAD),
        event(4045, 10, "aten::mm"),
        event(4060, 1, "c10d::recv_"),
        event(4070, 20, AUTOGRAD),
        event(4095, 10, "aten::_foreach_add_"),
        *arrow(1, 2000, 4050),
        *arrow(2, 4000, 4045),
        *arrow(3, 4011, 4070),
    ]


def test_without_marks_arrows_tell_the_micro_batches(tmp_path):
    expected = [
        (0, "F", 0, 0, 0, 10),
        (0, "F", 0, 0, 2000, 2010),
        (0, "F", 0, 1, 2011, 2031),
        (0, "B", 0, 0, 2040, 2060),
        (0, "B", 0, 1, 2070, 2090),
    ]
    assert rows(from_profiler(write(tmp_path / "a.json", *without_marks()))) == expected


def test_kernels_of_a_gpu_count_instead_of_the_operators_that_launch_them(tmp_path):
    path = write(
        tmp_path / "a.json.gz",
        event(0, 10, "aten::mm", **{"External id": 1}),
        event(20, 10, AUTOGRAD, **{"External id": 2}),
        event(22, 5, "aten::mm", **{"External id": 3}),
        *arrow(1, 0, 22),
        event(50, 30, "ampere_sgemm", "kernel", **{"External id": 1, "stream": 7}),
        event(60, 90, "ncclDevKernel_SendRecv", "kernel", **{"External id": 1, "stream": 20}),
        event(90, 60, "ampere_sgemm", "kernel", **{"External id": 3, "stream": 7}),
    )
    assert rows(from_profiler(path)) == [(0, "F", 0, 0, 0, 30), (0, "B", 0, 0, 40, 100)]


def test_ranks_are_sorted_and_their_zeros_compared(tmp_path):
    def of(name: str, rank: int, base: int, start: float) -> Path:
        events = event(start, 10, "Forward 0", "user_annotation"), event(start, 10, "aten::mm")
        return write(tmp_path / name, *events, distributedInfo={"rank": rank}, baseTimeNanoseconds=base, host_name="a")

    # As in a pipeline of the ranks 1 and 5. The second one starts 20 microseconds after the first.
    paths = [of("late.json", 5, 1_000_000, 25), of("early.json", 1, 1_000_000, 5)]
    assert rows(from_profiler(paths)) == [(0, "F", 0, 0, 0, 10), (1, "F", 1, 0, 20, 30)]
    paths = [of("late.json", 5, 1_020_000, 5), of("early.json", 1, 1_000_000, 5)]
    assert rows(from_profiler(paths)) == [(0, "F", 0, 0, 0, 10), (1, "F", 1, 0, 20, 30)]
    assert rows(from_profiler(paths, offsets=[0, 5e-6]))[1] == (1, "F", 1, 0, 15, 25)
    with pytest.raises(ValueError, match=r"of the ranks \[5, 5\]; give one for each rank"):
        from_profiler([paths[0], paths[0]])


def test_hosts_have_clocks_of_their_own(tmp_path):
    def of(host: str) -> Path:
        events = event(0, 10, "Forward 0", "user_annotation"), event(0, 10, "aten::mm")
        return write(tmp_path / host, *events, host_name=host)

    with pytest.raises(ValueError, match=r"several hosts \(a, b\), whose clocks differ: give offsets"):
        from_profiler([of("a"), of("b")])
    assert from_profiler([of("a"), of("b")], offsets=[0, 1e-3]).num_ranks == 2


def test_one_step_of_several(tmp_path):
    steps = [[event(at, 90, f"ProfilerStep#{n}", "user_annotation"), *marked(at)] for n, at in [(2, 0), (3, 100)]]
    path = write(tmp_path / "a.json", *steps)
    assert len(from_profiler(path)) == 2
    assert rows(from_profiler(path, step=3)) == [(0, "F", 0, 0, 0, 10)]
    with pytest.raises(ValueError, match=r"a\.json: no operator in it computes in ProfilerStep#4"):
        from_profiler(path, step=4)


def test_one_step_of_several_without_marks(tmp_path):
    """Arrows of a later step tell nothing about this one."""

    def step(number: int, at: float) -> list:
        backwards = [event(at + 20, 10, AUTOGRAD), event(at + 30.5, 10, AUTOGRAD), event(at + 41, 10, AUTOGRAD)]
        # The last of them is an accumulation, in which no arrow ends.
        operators = [event(at, 5, "aten::mm"), event(at + 6, 5, "aten::mm"), *backwards]
        arrows = [*arrow(2 * number, at, at + 21), *arrow(2 * number + 1, at + 6, at + 31)]
        return [event(at, 90, f"ProfilerStep#{number}", "user_annotation"), *operators, *arrows]

    alone = from_profiler(write(tmp_path / "alone.json", step(3, 100)))
    path = write(tmp_path / "a.json", step(2, 0), step(3, 100), step(4, 200))
    for number in (2, 3, 4):
        assert rows(from_profiler(path, step=number)) == rows(alone)
    assert [row[1:4] for row in rows(alone)] == [("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("B", 0, 1)]


def test_marks_without_operators_in_them(tmp_path):
    path = write(tmp_path / "a.json", event(0, 10, "0F0", "user_annotation"), event(20, 10, "aten::mm"))
    with pytest.raises(ValueError, match=r"a\.json: nothing in it computes inside its marks"):
        from_profiler(path)


def marked(at: float) -> list:
    return [event(at, 10, "Forward 0", "user_annotation"), event(at, 10, "aten::mm")]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no trace to read"):
        from_profiler([])
    for name, text in [("a.json", "no json"), ("b.json", "[]"), ("c.json", '{"a": 1}'), ("d.json.gz", "plain")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} is no trace of torch\.profiler \(.*\): give what export_chrome"):
            from_profiler(tmp_path / name)
    with pytest.raises(ValueError, match="no operator in it computes; record with ProfilerActivity.CPU"):
        from_profiler(write(tmp_path / "e.json", event(0, 1, "c10d::send")))
    with pytest.raises(
        ValueError, match=r"f\.json: nothing in it tells .* wrap each in torch\.profiler\.record_function"
    ):
        from_profiler(write(tmp_path / "f.json", event(0, 1, "aten::mm")))
    with pytest.raises(FileNotFoundError):
        from_profiler(tmp_path / "g.json")


# --- Recorded --------------------------------------------------------------------------------------------------------

CONFIG = TrainingConfig(stages=2, micro_batches=4, lowest=100_000, training_numbers=2_000, held_out=0)
WHOLE = batch(range(100_000, 1_000_000), seed=0, step=0, size=16)


class Marked(Pipeline):
    """It marks its actions as a user would."""

    def compute(self, action: Any, *arguments: Any) -> Any:
        with record_function(f"{action.stage}F{action.micro_batch}"):
            return super().compute(action, *arguments)

    def backward(self, action: Any, arrived: Any) -> Any:
        with record_function(f"{action.stage}B{action.micro_batch}"):
            return super().backward(action, arrived)


def profile_step(worker: Worker, schedule: Schedule, engine: type[Pipeline], folder: str) -> Timeline:
    """Two steps, the second profiled: the timeline that the engine records in it, if it is ours."""
    stages = {s: CONFIG_OF[schedule.num_stages].cut.build(s, 0) for s in schedule.stages_of(worker.rank)}
    pipeline = engine(stages, schedule, worker.transport, CONFIG_OF[schedule.num_stages].cut.carry_after)
    micro_batches = WHOLE.split(schedule.num_micro_batches)
    plan = pipeline.plan(micro_batches)
    agree(worker.transport, plan)
    pipeline.step(micro_batches, plan, WHOLE.num_tokens)
    timeline = Timeline(worker.world_size, "measured", "seconds")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        agree(worker.transport, plan)
        pipeline.timeline = None if engine is TorchPipeline else timeline
        pipeline.step(micro_batches, plan, WHOLE.num_tokens)
    profiler.export_chrome_trace(f"{folder}/{worker.rank}.json")
    return timeline


CONFIG_OF = {
    2: CONFIG,
    4: TrainingConfig(stages=4, micro_batches=4, lowest=100_000, training_numbers=2_000, held_out=0),
}


def actions(timeline: Timeline, rank: int) -> list[str]:
    """`0F1`, by their starts; the pieces of one action, one after another, once."""
    ordered = sorted((i for i in timeline if i.rank == rank and i.kind in "FB"), key=lambda i: i.start)
    names = [f"{i.stage}{i.kind}{i.micro_batch}" for i in ordered]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


@pytest.mark.processes
@pytest.mark.parametrize("schedule", [gpipe(2, 4), one_f_one_b(2, 4)], ids=["gpipe", "1f1b"])
def test_torch_s_own_engine(schedule, tmp_path):
    launch(profile_step, 2, schedule, TorchPipeline, str(tmp_path))
    timeline = from_profiler([tmp_path / "0.json", tmp_path / "1.json"])
    for rank, row in enumerate(schedule.actions):
        assert actions(timeline, rank) == [str(action) for action in row]
    assert 0 < timeline.bubble_of_total < 1


@pytest.mark.processes
@pytest.mark.parametrize("engine", [Pipeline, Marked], ids=["by arrows", "by marks"])
@pytest.mark.parametrize("schedule", [gpipe(2, 4), one_f_one_b(2, 4)], ids=["gpipe", "1f1b"])
def test_it_agrees_with_what_the_engine_records(schedule, engine, tmp_path):
    """Receives of our executor are posted early: between two forwards nothing in the trace tells that it waits."""
    own = merge(launch(profile_step, 2, schedule, engine, str(tmp_path)))
    # A machine with other work may stop a process between two operators; the engine counts that as computing too.
    read = from_profiler([tmp_path / "0.json", tmp_path / "1.json"], gap=1.0)
    for rank in (0, 1):
        assert actions(read, rank) == actions(own, rank) == [str(action) for action in schedule.actions[rank]]
        assert 0.6 * own.busy(rank) < read.busy(rank) <= 1.1 * own.busy(rank)  # 1.02 was seen under load


@pytest.mark.processes
def test_two_stages_on_a_rank_are_told_apart_by_marks(tmp_path):
    schedule = looped(2, 2, 4)
    launch(profile_step, 2, schedule, Marked, str(tmp_path))
    read = from_profiler([tmp_path / "0.json", tmp_path / "1.json"])
    for rank, row in enumerate(schedule.actions):
        assert actions(read, rank) == [str(action) for action in row]


def profile_interleaved(worker: Worker, folder: str) -> None:
    """Torch's interleaved schedule, two stages on each of two ranks; torch marks its actions itself."""
    torch.manual_seed(0)
    group = worker.transport.data_group  # type: ignore[attr-defined]
    stages = [
        PipelineStage(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), index, 4, torch.device("cpu"), group=group)
        for index in (worker.rank, worker.rank + 2)
    ]
    schedule = ScheduleInterleavedZeroBubble(stages, 4, loss_fn=nn.functional.mse_loss)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        if worker.rank == 0:
            schedule.step(torch.ones(64, 64))
        else:
            schedule.step(target=torch.zeros(64, 64), losses=[])
    profiler.export_chrome_trace(f"{folder}/{worker.rank}.json")


@pytest.mark.processes
def test_torch_s_schedules_of_several_stages_on_a_rank(tmp_path):
    launch(profile_interleaved, 2, str(tmp_path))
    read = from_profiler([tmp_path / "0.json", tmp_path / "1.json"])
    for rank in (0, 1):
        done = [(i.kind, i.stage, i.micro_batch) for i in read if i.rank == rank]
        expected = {(kind, stage, m) for kind in "FB" for stage in (rank, rank + 2) for m in range(4)}
        assert set(done) == expected
        # Zero bubble: the input's half of a backward and the weights' half, with other work between or not.
        assert len(done) > len(expected)
