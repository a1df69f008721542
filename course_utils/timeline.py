"""When each rank does what: a list of intervals, predicted by a simulation or recorded in a run.

A timeline answers the two questions of a pipeline: how long does a step take, and which share of the ranks' time is
lost while they wait? That lost share is called the *bubble*. The literature divides it by two different things, so here
it has two names; a figure without its convention says nothing.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from course_utils import _profiler

# What a rank may do: compute, in the letters of `schedules.Action`, or, when a run was recorded, something else.
COMPUTE = {"F": "forward", "B": "backward", "R": "recompute"}
OTHER = {"w": "wait for a neighbour", "s": "send"}
KINDS = COMPUTE | OTHER


class Interval(NamedTuple):
    """What one rank does for one micro-batch of one stage, from start to end."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass
class Timeline:
    """What the ranks do in a step. It is iterated over as `Interval`s and kept in columns, 29 bytes per interval.

    A rank does one thing at a time, so the intervals of a rank must not overlap: `check` looks. Only F, B and R count
    as computing; a rank that waits, sends, or does nothing that was recorded is idle.

    Attributes:
        num_ranks: K; a rank may stand idle all the time.
        label: where the times come from, for example "simulated"; every picture shows it.
        unit: what the times are measured in.
        rank, stage, micro_batch: columns of whole numbers.
        kind: column of the character codes of the letters in KINDS.
        start, end: columns of times; only differences matter, the clock may start anywhere.
    """

    num_ranks: int
    label: str
    unit: str = "units of time"
    rank: array = field(default_factory=lambda: array("i"), repr=False)
    kind: array = field(default_factory=lambda: array("B"), repr=False)
    stage: array = field(default_factory=lambda: array("i"), repr=False)
    micro_batch: array = field(default_factory=lambda: array("i"), repr=False)
    start: array = field(default_factory=lambda: array("d"), repr=False)
    end: array = field(default_factory=lambda: array("d"), repr=False)

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks is {self.num_ranks}; a timeline has at least 1 rank")
        if not self.label.strip():
            raise ValueError("the label is empty; say where the times come from, for example 'simulated'")

    def add(self, rank: int, kind: str, stage: int, micro_batch: int, start: float, end: float) -> None:
        """Append one interval: about half a microsecond, so that a run can be recorded without slowing it down.

        Not for several threads at once: each records a timeline of its own, and `merge` puts them together.

        Raises:
            ValueError: a rank or kind that does not exist, or times that run backwards.
        """
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank is {rank}; the timeline has the ranks 0 to {self.num_ranks - 1}")
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; known are {', '.join(KINDS)}")
        if not -math.inf < start <= end < math.inf:
            raise ValueError(
                f"{stage}{kind}{micro_batch} lasts from {start} to {end}; it must not end before it starts"
            )
        self.rank.append(rank)
        self.kind.append(ord(kind))
        self.stage.append(stage)
        self.micro_batch.append(micro_batch)
        self.start.append(start)
        self.end.append(end)

    def __len__(self) -> int:
        return len(self.rank)

    def __iter__(self) -> Iterator[Interval]:
        columns = zip(self.rank, self.kind, self.stage, self.micro_batch, self.start, self.end, strict=True)
        for rank, kind, stage, micro_batch, start, end in columns:
            yield Interval(rank, chr(kind), stage, micro_batch, start, end)

    def time_in(self, kinds: str, rank: int | None = None) -> float:
        """The time in which a rank, or with None all ranks together, does one of these kinds, for example "FB"."""
        chosen = np.isin(self.kind, [ord(kind) for kind in kinds])
        if rank is not None:
            if not 0 <= rank < self.num_ranks:
                raise ValueError(f"rank is {rank}; the timeline has the ranks 0 to {self.num_ranks - 1}")
            chosen &= np.array(self.rank) == rank
        durations = np.array(self.end) - np.array(self.start)
        return float(durations[chosen].sum())

    @property
    def makespan(self) -> float:
        """From the first start to the last end of anything on any rank; 0 for a timeline without intervals.

        Waits and sends count as well: a rank that is ready and waits for another already spends its time.
        """
        return float(np.max(self.end) - np.min(self.start)) if len(self) else 0.0

    def busy(self, rank: int) -> float:
        """The time in which a rank computes: forward, backward, and forward once more."""
        return self.time_in("".join(COMPUTE), rank)

    def utilisation(self, rank: int) -> float:
        """The share of the makespan in which a rank computes, from 0 to 1."""
        return self.busy(rank) / self.length_of_a_step()

    @property
    def efficiency(self) -> float:
        """Time inside F and B, divided by the time of all ranks, K * makespan: the share that does useful work.

        To recompute (R) keeps a rank busy, but it repeats work: it lowers the efficiency and not the utilisation.
        """
        return self.time_in("FB") / (self.num_ranks * self.length_of_a_step())

    @property
    def bubble_of_total(self) -> float:
        """Idle time of all ranks, divided by all their time, K * makespan. The convention of GPipe.

        For K equal stages and M micro-batches GPipe states (K - 1) / (M + K - 1), a fraction of the *total* time, and
        calls it negligible when M >= 4 K (Huang et al., 2019, arXiv 1811.06965).
        K = 4, M = 16: 3/19 = 15.8 %, the same bubble that is 18.75 % of the ideal time.
        """
        return self.idle() / (self.num_ranks * self.length_of_a_step())

    @property
    def bubble_of_ideal(self) -> float:
        """Idle time of all ranks, divided by the time in which they compute. The convention of Megatron-LM and Llama 3.

        For K equal stages and M micro-batches both state (K - 1) / M, in their letters (p - 1) / m, a fraction of the
        *ideal* time, in which no rank ever waits (Narayanan et al., 2021, arXiv 2104.04473; Grattafiori et al., 2024,
        arXiv 2407.21783). V chunks per rank, interleaved, divide it by V: (p - 1) / (V m).
        K = 4, M = 16: 3/16 = 18.75 %, the same bubble that is 15.8 % of the total time.
        """
        step = self.length_of_a_step()
        computing = self.num_ranks * step - self.idle()
        if computing <= 0.0:
            raise ValueError("no rank computes anything, so there is no ideal time to divide by")
        return self.idle() / computing

    def idle(self) -> float:
        """The time in which ranks do not compute, added over all ranks."""
        return self.num_ranks * self.makespan - self.time_in("".join(COMPUTE))

    def length_of_a_step(self) -> float:
        """The makespan, if there is something to divide by it. Raises a ValueError for a timeline without length."""
        if self.makespan == 0.0:
            raise ValueError("the timeline has no length, so no share of it can be computed; add intervals first")
        return self.makespan

    def check(self) -> "Timeline":
        """Return the timeline if no rank does two things at once. Raises a ValueError that names two that overlap."""
        rank, start, end = np.array(self.rank), np.array(self.start), np.array(self.end)
        order = np.lexsort((end, start, rank))
        one, next_one = order[:-1], order[1:]
        overlap = np.flatnonzero((rank[one] == rank[next_one]) & (start[next_one] < end[one]))
        if len(overlap):
            i = overlap[0]
            raise ValueError(
                f"rank {rank[one[i]]} does two things at once: {self.describe_interval(one[i])} and "
                f"{self.describe_interval(next_one[i])}; record each step on its own, and each rank once"
            )
        return self

    def describe_interval(self, i: int) -> str:
        """`2F3 from 0.5 to 0.75`"""
        return f"{self.stage[i]}{chr(self.kind[i])}{self.micro_batch[i]} from {self.start[i]} to {self.end[i]}"


def merge(timelines: Sequence[Timeline], offsets: Sequence[float] | None = None) -> Timeline:
    """The recordings of all ranks as one timeline that starts at 0, in the order in which they are given.

    Args:
        timelines: of one step, alike in num_ranks, unit and label; usually one per rank, which holds that rank alone.
        offsets: for each rank how far its clock is ahead, in the unit of the timelines (`clocks.Offsets.ahead`); it is
            subtracted. None: the ranks read one clock, as all processes of a machine do with `time.perf_counter`.

    Raises:
        ValueError: the timelines are not alike, or a rank does two things at once.
    """
    alike = {(timeline.num_ranks, timeline.unit, timeline.label) for timeline in timelines}
    if len(alike) != 1:
        raise ValueError(f"timelines are merged if they have one (num_ranks, unit, label); these have {sorted(alike)}")
    (num_ranks, unit, label) = alike.pop()
    ahead = np.zeros(num_ranks) if offsets is None else np.array(offsets, dtype=float)
    if ahead.shape != (num_ranks,) or not np.isfinite(ahead).all():
        raise ValueError(f"the offsets are {offsets}; there must be a finite one for each of the {num_ranks} ranks")
    merged = Timeline(num_ranks, label, unit)
    for timeline in timelines:
        for name in ("rank", "kind", "stage", "micro_batch", "start", "end"):
            getattr(merged, name).extend(getattr(timeline, name))
    start, end = (np.array(column) - ahead[np.array(merged.rank)] for column in (merged.start, merged.end))
    first = start.min(initial=math.inf)
    merged.start, merged.end = array("d", (start - first).tobytes()), array("d", (end - first).tobytes())
    return merged.check()


def from_profiler(
    paths: str | Path | Sequence[str | Path],
    gap: float = 0.001,
    step: int | None = None,
    offsets: Sequence[float] | None = None,
) -> Timeline:
    """The forwards and backwards in traces that torch.profiler has written of a pipeline, whichever program ran it.

    Only computing is taken: what operators of PyTorch, or kernels of a GPU, did. Marks such as `Forward 3` of
    torch.distributed.pipelining contain the wait for the message and serve only to tell which micro-batch it was; marks
    of the form `0F3` (`torch.profiler.record_function("0F3")`, or torch's own `PP:0F3`) tell the stage too. Without
    marks, autograd's arrows from forward to backward tell the two apart and the micro-batches from each other, and
    other work (an optimizer's) is left out.

    Traces with kernels of a GPU: by the keys that Kineto documents (`cat`, `External id`); written, not run.

    Args:
        paths: what `export_chrome_trace` has written, also with the ending .gz: one file for each rank of the pipeline.
            They are sorted by the rank that they name.
        gap: seconds; what lies between two operators of one micro-batch is computing (of Python) if it is shorter.
        step: only what stands inside `ProfilerStep#N`, as `torch.profiler.profile(schedule=...)` marks steps.
        offsets: for each rank how many seconds its clock is ahead (`merge`). Processes of one host share a clock.

    Returns:
        A timeline in seconds without waits and sends: they are the time in which nothing is computed. `K` is the number
        of files. A stage that the trace does not name is the rank.

    Raises:
        ValueError: a file is no trace or has nothing to take, with its name; two are of one rank; they are of several
            hosts and there are no offsets.
        OSError: a file cannot be read.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("there is no trace to read; give one file for each rank")
    traces = [_profiler.read(path, gap * 1e6, step) for path in paths]
    ranks = [number if trace.rank is None else trace.rank for number, trace in enumerate(traces)]
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"the traces are of the ranks {ranks}; give one for each rank of the pipeline")
    if len({trace.host for trace in traces}) > 1 and offsets is None:
        hosts = ", ".join(sorted({trace.host for trace in traces}))
        raise ValueError(f"the traces come from several hosts ({hosts}), whose clocks differ: give offsets, in seconds")
    traces = [trace for _, trace in sorted(zip(ranks, traces, strict=True), key=lambda pair: pair[0])]
    bases = [(trace.base - traces[0].base) / 1e3 for trace in traces]  # microseconds after the first one's
    first = min(trace.spans[0].start + base for trace, base in zip(traces, bases, strict=True))
    timelines = []
    for rank, (trace, base) in enumerate(zip(traces, bases, strict=True)):
        timeline, zero = Timeline(len(traces), "measured by torch.profiler", "seconds"), first - base
        for start, end, (kind, stage, micro_batch) in trace.spans:
            place = rank if stage is None else stage
            timeline.add(rank, kind, place, micro_batch, (start - zero) / 1e6, (end - zero) / 1e6)
        timelines.append(timeline)
    return merge(timelines, offsets)
