"""What torch.profiler's trace of one rank says about forwards and backwards. `timeline.from_profiler` calls this.

The format is Chrome's Trace Event Format as Kineto writes it: operators are complete events (`"ph": "X"`) of category
`cpu_op`, what `record_function` marks is a `user_annotation`, and arrows of category `fwdbwd` lead from an operator of
a forward to its operator in a backward. On a GPU there are events of category `kernel` besides, whose `External id` is
that of the operator that launched them.
"""

import gzip
import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

COMMUNICATION = re.compile(r"c10d::|nccl|record_param_comms", re.I)
AUTOGRAD = "autograd::engine::evaluate_function"
# What torch's schedules and our own text form call an action. I and W are the two halves of a backward.
OF_A_SCHEDULE = re.compile(r"(?:PP:)?(?P<stage>\d+)(?P<kind>[FBIW])(?P<micro_batch>\d+)")
OF_GPIPE = re.compile(r"(?P<kind>Forward|Backward) (?P<micro_batch>\d+)")


class Label(NamedTuple):
    """kind: F or B. stage: None if the trace does not say it."""

    kind: str
    stage: int | None
    micro_batch: int


class Span(NamedTuple):
    """Microseconds of the trace's clock, and what was done."""

    start: float
    end: float
    label: Label


@dataclass(frozen=True)
class RankTrace:
    """What a rank computed. `rank` is what the trace says, None if it does not; `base` is its zero in nanoseconds."""

    rank: int | None
    host: str
    base: int
    spans: list[Span]


def read(path: str | Path, gap: float, step: int | None) -> RankTrace:
    """The computing of one rank; see `timeline.from_profiler`. Raises ValueError, naming the file."""
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            trace = json.loads(file.read())
        events = trace["traceEvents"]
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is no trace of torch.profiler ({error}): give what export_chrome_trace wrote"
        ) from None
    try:
        spans = spans_of(events, gap, step)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    about = trace.get("distributedInfo", {})
    return RankTrace(about.get("rank"), trace.get("host_name", ""), trace.get("baseTimeNanoseconds", 0), spans)


def spans_of(events: list[dict[str, Any]], gap: float, step: int | None) -> list[Span]:
    """When one rank computed: between communications, and without gaps of more than `gap` microseconds."""
    complete = sorted((e for e in events if e.get("ph") == "X" and "dur" in e), key=lambda e: (e["ts"], -e["dur"]))
    marks = [e for e in complete if e.get("cat") == "user_annotation"]
    operators = [e for e in complete if e.get("cat") == "cpu_op"]
    # Only operators: marks such as `gloo:recv` last until the message has come, whatever is computed meanwhile.
    talking = Cover(e for e in operators if COMMUNICATION.match(e["name"]))
    computing = [e for e in operators if not COMMUNICATION.match(e["name"]) and not talking.covers(e["ts"])]
    if step is not None:
        within = Cover(e for e in marks if e["name"] == f"ProfilerStep#{step}")
        computing = [e for e in computing if within.covers(e["ts"])]
    if not computing:
        raise ValueError(
            "no operator in it computes" + f" in ProfilerStep#{step}" * (step is not None) + "; record with "
            "ProfilerActivity.CPU, a whole step"
        )
    named = [(e["ts"], e["ts"] + e["dur"], label) for e in marks if (label := label_of(e["name"]))]
    labelled = by_name(computing, named) if named else by_arrows(computing, events, talking, gap)
    kernels = [e for e in complete if e.get("cat") == "kernel" and not COMMUNICATION.search(e["name"])]
    if kernels:
        launched_for = {e["args"].get("External id"): label for e, label in labelled if "args" in e}
        labelled = [
            (e, launched_for[of]) for e in kernels if (of := e.get("args", {}).get("External id")) in launched_for
        ]
        talking = Cover(())  # on a GPU it goes on beside the kernels
    if not labelled:
        raise ValueError("nothing in it computes inside its marks: they must stand round forwards and backwards")
    return join(labelled, talking, gap)


def label_of(name: str) -> Label | None:
    if match := OF_A_SCHEDULE.fullmatch(name):
        return Label("F" if match["kind"] == "F" else "B", int(match["stage"]), int(match["micro_batch"]))
    if match := OF_GPIPE.fullmatch(name):
        return Label(match["kind"][0], None, int(match["micro_batch"]))
    return None


def by_name(computing: list[dict], named: list[tuple[float, float, Label]]) -> list[tuple[dict, Label]]:
    """The operators inside marked actions. A mark contains waits; its operators do not."""
    starts = [start for start, _, _ in named]
    found = []
    for event in computing:
        place = bisect_right(starts, event["ts"]) - 1
        if place >= 0 and event["ts"] < named[place][1]:
            found.append((event, named[place][2]))
    return found


def by_arrows(computing: list[dict], events: list[dict], talking: "Cover", gap: float) -> list[tuple[dict, Label]]:
    """Without marks: what autograd runs is a backward, and what its arrows come from is that micro-batch's forward.

    A backward goes through its graph from the newest operator to the oldest, so where an arrow comes from later than
    all before it, the next micro-batch begins: forwards and backwards must run in ascending order. Work in which no
    arrow begins or ends, an optimizer's for example, is left out. Raises a ValueError if there is no arrow.
    """
    autograd = [e for e in computing if e["name"].startswith(AUTOGRAD)]
    arrows: dict[Any, dict[str, float]] = defaultdict(dict)
    for event in events:
        if event.get("cat") == "fwdbwd":
            arrows[event["id"]][event["ph"]] = event["ts"]
    begins, backward = [event["ts"] for event in autograd], Cover(autograd)
    # An arrow that ends elsewhere is of another step.
    pairs = [(ends["f"], ends["s"]) for ends in arrows.values() if len(ends) == 2 and backward.covers(ends["f"])]
    groups: list[Group] = []
    for end, start in sorted(pairs):
        if not groups or start > groups[-1].newest:
            groups.append(Group(start, start, begins[bisect_right(begins, end) - 1]))
        groups[-1] = groups[-1]._replace(oldest=min(start, groups[-1].oldest))
    if not groups:
        raise ValueError(
            "nothing in it tells which operators belong to a forward or a backward: wrap each in "
            'torch.profiler.record_function("0F3"), for stage 0, forward, micro-batch 3'
        )
    labels = {kind: [Label(kind, None, number) for number in range(len(groups))] for kind in "FB"}
    labelled = []
    for event in computing:
        if backward.covers(event["ts"]):
            number = max(0, bisect_right([group.backward for group in groups], event["ts"]) - 1)
            labelled.append((event, labels["B"][number]))
        else:
            away = [max(group.oldest - event["ts"], event["ts"] - group.newest) for group in groups]
            labelled.append((event, labels["F"][away.index(min(away))]))
    ends_of_arrows = sorted(time for ends in arrows.values() for time in ends.values())
    connected = [piece for piece in join(labelled, talking, gap) if any_in(ends_of_arrows, piece.start, piece.end)]
    starts = [piece.start for piece in connected]

    def is_connected(time: float) -> bool:
        place = bisect_right(starts, time) - 1
        return place >= 0 and time < connected[place].end

    return [(event, label) for event, label in labelled if is_connected(event["ts"])]


class Group(NamedTuple):
    """A micro-batch: the starts of its forward's newest and oldest operator, and of its backward."""

    newest: float
    oldest: float
    backward: float


def any_in(times: list[float], start: float, end: float) -> bool:
    """Whether one of some sorted times lies in an interval."""
    place = bisect_left(times, start)
    return place < len(times) and times[place] <= end


def join(labelled: Iterable[tuple[dict, Label]], talking: "Cover", gap: float) -> list[Span]:
    """Operators of one action as one span, unless they are further apart than `gap` or there was communication between.

    An action is told by its label, the object: the next step has equal ones. Between operators Python runs; that is
    part of a stage's work.
    """
    spans: list[Span] = []
    for event, label in labelled:
        start, end = event["ts"], event["ts"] + event["dur"]
        last = spans[-1] if spans else None
        if last and start < last.end:  # inside the one before, or on another thread or stream at the same time
            spans[-1] = Span(last.start, max(last.end, end), last.label)
        elif last and last.label is label and start - last.end <= gap and not talking.begins_in(last.end, start):
            spans[-1] = Span(last.start, end, label)
        else:
            spans.append(Span(start, end, label))
    return spans


class Cover:
    """The times at which at least one of some events lasts."""

    def __init__(self, events: Iterable[dict[str, Any]]):
        self.starts: list[float] = []
        self.ends: list[float] = []
        for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def covers(self, time: float) -> bool:
        place = bisect_right(self.starts, time) - 1
        return place >= 0 and time < self.ends[place]

    def begins_in(self, start: float, end: float) -> bool:
        return any_in(self.starts, start, end)
