"""Files for trace viewers, checked against the rules of the Trace Event Format.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU; and what Perfetto's importer adds to
it: times become whole nanoseconds, no thread has the number of another process's thread, none has number 0.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils import trace
from course_utils.schedules import one_f_one_b, rematerialise
from course_utils.simulation import simulate
from course_utils.timeline import KINDS, Timeline
from course_utils.trace import write_trace
from tests.test_timeline import a_million, random_timeline, recorded, with_everything

METADATA = {  # the five metadata events of the format, and the argument that each one needs
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def broken_rules(whole: dict) -> list[str]:
    """Which rules a trace in the form of an object breaks; only complete and metadata events are known."""
    broken, threads = [], {}
    if not isinstance(whole.get("traceEvents"), list):
        return ["no list of traceEvents"]
    for event in whole["traceEvents"]:
        wanted = {"ph": str, "name": str, "pid": int, "tid": int, "args": dict}
        missing = [field for field, kind in wanted.items() if not isinstance(event.get(field), kind)]
        if missing:
            broken.append(f"{missing} in {event}")
        elif event["ph"] == "M":
            argument, kind = METADATA.get(event["name"], ("", int))
            if not isinstance(event["args"].get(argument), kind):
                broken.append(f"metadata {event}")
        elif event["ph"] == "X":
            times = [event.get("ts"), event.get("dur")]
            if not all(map(is_number, times)) or min(times) < 0 or not isinstance(event.get("cat"), str):
                broken.append(f"times or category of {event}")
            else:
                start, lasts = (round(value * 1000) for value in times)
                threads.setdefault((event["pid"], event["tid"]), []).append((start, -(start + lasts)))
        else:
            broken.append(f"phase {event['ph']}")
    for thread, spans in threads.items():
        if 0 in thread or len({pid for pid, tid in threads if tid == thread[1]}) > 1:
            broken.append(f"number of thread {thread}")
        around: list[int] = []  # the ends of those events that are not over yet, the innermost last
        for start, minus_end in sorted(spans):  # of those that begin together the longest first
            while around and around[-1] <= start:
                around.pop()
            if around and -minus_end > around[-1]:
                broken.append(f"partial overlap at {start} in thread {thread}")
            around.append(-minus_end)
    return broken


def read(path: Path) -> dict:
    """What a strict reader finds: no NaN, no doubled name."""

    def pairs(found: list[tuple]) -> dict:
        assert len(dict(found)) == len(found), f"doubled name in {found}"
        return dict(found)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    whole = json.loads(path.read_text("utf-8"), object_pairs_hook=pairs, parse_constant=refuse)
    assert broken_rules(whole) == []
    return whole


def of_phase(whole: dict, phase: str) -> list[dict]:
    return [event for event in whole["traceEvents"] if event["ph"] == phase]


GOOD = {"ph": "X", "name": "0F0", "cat": "forward", "ts": 1, "dur": 2, "pid": 1, "tid": 2, "args": {}}


@pytest.mark.parametrize(
    "change",
    [{"ph": "Y"}, {"pid": "1"}, {"tid": None}, {"ts": -1}, {"dur": None}, {"dur": True}, {"args": []}, {"tid": 0}],
)
def test_the_rules_are_looked_at(change: dict) -> None:
    assert broken_rules({"traceEvents": [GOOD]}) == []
    assert broken_rules({"traceEvents": [GOOD | change]}) != []
    assert broken_rules({}) != []


def test_the_rules_for_nesting_are_looked_at() -> None:
    def at(start: float, lasts: float) -> dict:
        return GOOD | {"ts": start, "dur": lasts}

    assert broken_rules({"traceEvents": [at(0, 9), at(1, 2), at(3, 6), at(3, 1), at(9, 0), at(9, 1), at(5, 0)]}) == []
    assert broken_rules({"traceEvents": [at(0, 9), at(8.999, 1)]}) != []
    assert broken_rules({"traceEvents": [at(0, 1), at(0, 1) | {"pid": 2}]}) != []


def test_every_interval_is_an_event(tmp_path: Path) -> None:
    timeline = with_everything()
    whole = read(write_trace(timeline, tmp_path / "step.json"))
    assert whole["otherData"] == {"timelines": [{"label": "made by hand", "unit": "s", "microseconds_per_unit": 1e6}]}
    found = [
        (e["tid"] - 2, e["name"], e["cat"], e["ts"], e["dur"], e["args"]["stage"], e["args"]["micro_batch"], e["pid"])
        for e in of_phase(whole, "X")
    ]
    assert found == [
        (i.rank, f"{i.stage}{i.kind}{i.micro_batch}", KINDS[i.kind], 1e6 * (i.start - 10), 1e6 * (i.end - i.start))
        + (i.stage, i.micro_batch, 1)
        for i in sorted(timeline, key=lambda i: (i.start, i.end))
    ]


def test_ranks_have_names_and_an_order(tmp_path: Path) -> None:
    whole = read(write_trace([recorded(), simulate(one_f_one_b(3, 1))], tmp_path / "step.json"))
    found = [(e["name"], e["pid"], e["tid"], *e["args"].values()) for e in of_phase(whole, "M")]
    assert [entry for entry in found if entry[0] == "thread_name"] == [
        ("thread_name", 1, 3, "rank 0"),
        ("thread_name", 1, 4, "rank 1"),
        ("thread_name", 2, 5, "rank 0"),
        ("thread_name", 2, 6, "rank 1"),
        ("thread_name", 2, 7, "rank 2"),
    ]
    assert [entry[1:] for entry in found if entry[0] == "thread_sort_index"] == [
        (1, 3, 0), (1, 4, 1), (2, 5, 0), (2, 6, 1), (2, 7, 2)
    ]  # fmt: skip
    assert [(entry[1], entry[3]) for entry in found if entry[0] == "process_name"] == [
        (1, "made by hand"),
        (2, "simulated: forward 1, backward 1, transfer 0"),
    ]
    assert {(e["pid"], e["tid"]) for e in of_phase(whole, "X")} == {(e[1], e[2]) for e in found if "thread" in e[0]}
    assert [min(e["ts"] for e in of_phase(whole, "X") if e["pid"] == pid) for pid in (1, 2)] == [0, 0]


def test_units(tmp_path: Path) -> None:
    for unit, factor in {"seconds": 1e6, "ms": 1e3, "us": 1, "units of time": 1e3}.items():
        timeline = simulate(one_f_one_b(1, 1), forward=2.5)
        timeline.unit = unit
        first, second = of_phase(read(write_trace(timeline, tmp_path / "step.json")), "X")
        assert (first["ts"], first["dur"], second["ts"], second["dur"]) == (0, 2.5 * factor, 2.5 * factor, factor)
    with pytest.raises(ValueError, match="the unit is 'days'; a trace needs one of seconds, s, milliseconds"):
        write_trace(Timeline(1, "slow", unit="days"), tmp_path / "days.json")
    with pytest.raises(ValueError, match="no timeline to write"):
        write_trace([], tmp_path / "none.json")


@given(st.integers(0, 2**32))
def test_no_two_events_of_a_thread_overlap_by_rounding(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    timeline = random_timeline(random.Random(seed), num_ranks=2, most=30)
    whole = read(write_trace(timeline, tmp_path_factory.getbasetemp() / "rounded.json"))
    events, first = of_phase(whole, "X"), min(timeline.start, default=0.0)
    assert len(events) == len(timeline)
    for event, interval in zip(events, sorted(timeline, key=lambda i: (i.start, i.end)), strict=True):
        assert event["ts"] == pytest.approx(1e6 * (interval.start - first), abs=0.0006)
        assert event["ts"] + event["dur"] == pytest.approx(1e6 * (interval.end - first), abs=0.0006)


def test_long_times_are_exact_to_the_nanosecond() -> None:
    assert trace.microseconds(10**17 + 1) == "100000000000000.001" and trace.microseconds(7) == "0.007"


def test_a_label_may_hold_anything(tmp_path: Path) -> None:
    label = 'said "50 %" \\ of\nwhat, 日本'
    whole = read(write_trace(Timeline(1, label), tmp_path / "label.json"))
    assert whole["otherData"]["timelines"][0]["label"] == of_phase(whole, "M")[0]["args"]["name"] == label
    assert of_phase(whole, "X") == []


# --- The file ---------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trace(recorded(), tmp_path / "step.json")
    before = path.read_bytes()

    def broken(*arguments: object) -> None:
        yield "half a line"
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(trace, "events", broken)
        with pytest.raises(OSError, match="no space"):
            write_trace(with_everything(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["step.json"]
    assert write_trace(with_everything(), str(path)) == path
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["step.json"]


def test_it_is_not_there_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    events = trace.events

    def watched(*arguments):
        for line in events(*arguments):
            seen.append((tmp_path / "step.json").exists())
            yield line

    monkeypatch.setattr(trace, "events", watched)
    write_trace(recorded(), tmp_path / "step.json")
    assert seen == [False] * 4


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_trace(recorded(), tmp_path / "nowhere" / "step.json")


def test_many_events_are_written_one_after_another(tmp_path: Path) -> None:
    """Usually within a second; the limit says that it hung."""
    started = time.perf_counter()
    path = write_trace(a_million(num_intervals=200_000), tmp_path / "long.json")
    assert time.perf_counter() - started < 20
    with path.open(encoding="utf-8") as file:
        assert sum('"ph": "X"' in line for line in file) == 200_000
    path.unlink()


def test_a_simulation_with_recomputation(tmp_path: Path) -> None:
    timeline = simulate(rematerialise(one_f_one_b(3, 4), "always"), [1 / 3, 2 / 7, 0.1], 0.7, transfer=1e-5)
    assert len(of_phase(read(write_trace(timeline, tmp_path / "step.json")), "X")) == len(timeline)
