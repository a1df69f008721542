"""Timelines as a file for a trace viewer: open it in Chrome at chrome://tracing, or in any browser at ui.perfetto.dev.

The format is Chrome's Trace Event Format (Duca and Sinclair, "Trace Event Format", 2016), in its form as a JSON object.
Every interval is a complete event (`"ph": "X"`), every rank a thread that carries its name, every timeline a process.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from course_utils.timeline import KINDS, Timeline

# One of each unit in nanoseconds: the format counts in microseconds, with fractions. Times without a unit, as a
# simulation has them, are shown as milliseconds, and the file says so.
UNITS = {"seconds": 1e9, "s": 1e9, "milliseconds": 1e6, "ms": 1e6, "microseconds": 1e3, "us": 1e3, "units of time": 1e6}


def write_trace(timelines: Timeline | Sequence[Timeline], path: str | Path) -> Path:
    """Write one timeline, or several to compare (measured and simulated, say), each from its own first start.

    The file appears under its name only when it is whole. Events are written one after another, so a long recording
    needs little memory besides its own; a million of them make about 160 MB.

    Raises:
        ValueError: there is no timeline, or one whose unit is not in UNITS.
        OSError: the file cannot be written; what stood there before is still there.
    """
    path = Path(path)
    timelines = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    if not timelines:
        raise ValueError("there is no timeline to write; give one, or a list of them")
    for timeline in timelines:
        if timeline.unit not in UNITS:
            raise ValueError(f"the unit is {timeline.unit!r}; a trace needs one of {', '.join(UNITS)}")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines(timelines))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def lines(timelines: Sequence[Timeline]) -> Iterator[str]:
    """The lines of the file: what is known of each timeline, then its events."""
    about = [
        {"label": timeline.label, "unit": timeline.unit, "microseconds_per_unit": UNITS[timeline.unit] / 1e3}
        for timeline in timelines
    ]
    yield f'{{"otherData": {json.dumps({"timelines": about}, ensure_ascii=False)},\n"traceEvents": ['
    separator = "\n"
    next_thread = len(timelines) + 1  # viewers want numbers that no process and no other thread has, and no 0
    for process, timeline in enumerate(timelines, start=1):
        for event in (*names(timeline, process, next_thread), *events(timeline, process, next_thread)):
            yield separator + event
            separator = ",\n"
        next_thread += timeline.num_ranks
    yield "\n]}\n"


def names(timeline: Timeline, process: int, first_thread: int) -> Iterator[str]:
    """Metadata events (`"ph": "M"`): the label is the name of the process, and ranks are in their order."""

    def metadata(what: str, thread: int, value: dict[str, str | int]) -> str:
        event = {"name": what, "ph": "M", "ts": 0, "pid": process, "tid": thread, "args": value}
        return json.dumps(event, ensure_ascii=False)

    yield metadata("process_name", first_thread, {"name": timeline.label})
    yield metadata("process_sort_index", first_thread, {"sort_index": process})
    for rank in range(timeline.num_ranks):
        yield metadata("thread_name", first_thread + rank, {"name": f"rank {rank}"})
        yield metadata("thread_sort_index", first_thread + rank, {"sort_index": rank})


def events(timeline: Timeline, process: int, first_thread: int) -> Iterator[str]:
    """Complete events, by their start. Starts and ends are rounded to nanoseconds, so neighbours stay neighbours."""
    if not len(timeline):
        return
    order = np.lexsort((timeline.end, timeline.start))
    first, scale = min(timeline.start), UNITS[timeline.unit]
    start = np.rint((np.array(timeline.start) - first) * scale).astype("int64")
    end = np.rint((np.array(timeline.end) - first) * scale).astype("int64")
    for i in order.tolist():
        kind, stage, micro_batch = chr(timeline.kind[i]), timeline.stage[i], timeline.micro_batch[i]
        yield (
            f'{{"name": "{stage}{kind}{micro_batch}", "cat": "{KINDS[kind]}", "ph": "X", '
            f'"ts": {microseconds(start[i])}, "dur": {microseconds(end[i] - start[i])}, '
            f'"pid": {process}, "tid": {first_thread + timeline.rank[i]}, '
            f'"args": {{"stage": {stage}, "micro_batch": {micro_batch}}}}}'
        )


def microseconds(nanoseconds: int) -> str:
    """`1234567` -> `1234.567`, exactly: a float would round long times."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"
