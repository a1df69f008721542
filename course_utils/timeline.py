"""When each rank computes what: a list of intervals, predicted by a simulation or recorded in a run.

A timeline answers the two questions of a pipeline: how long does a step take, and which share of the ranks' time is
lost while they wait? That lost share is called the *bubble*. The literature divides it by two different things, so here
it has two names; a figure without its convention says nothing.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = {"F": "forward", "B": "backward"}  # what a rank may compute, in the letters of `schedules.Action`


class Interval(NamedTuple):
    """One rank computes one micro-batch of one stage, from start to end."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass
class Timeline:
    """Intervals in which ranks compute. It is iterated over as `Interval`s and kept in columns, 29 bytes per interval.

    A rank does one thing at a time, so the intervals of a rank must not overlap.

    Attributes:
        num_ranks: K; a rank may stand idle all the time.
        label: where the times come from, for example "simulated"; every picture shows it.
        unit: what the times are measured in.
        rank, stage, micro_batch: columns of whole numbers.
        kind: column of the character codes of "F" and "B".
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
        """Append one interval. ValueError for a rank or kind that does not exist and for times that run backwards."""
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

    @property
    def makespan(self) -> float:
        """From the first start to the last end on any rank; 0 for a timeline without intervals."""
        return max(self.end) - min(self.start) if len(self) else 0.0

    def busy(self, rank: int) -> float:
        """The time in which a rank computes."""
        times = zip(self.rank, self.start, self.end, strict=True)
        return math.fsum(end - start for owner, start, end in times if owner == rank)

    def utilisation(self, rank: int) -> float:
        """The share of the makespan in which a rank computes, from 0 to 1."""
        return self.busy(rank) / self.length_of_a_step()

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
        return self.idle() / (self.num_ranks * step - self.idle())

    def idle(self) -> float:
        """The time in which ranks wait, added over all ranks."""
        busy = math.fsum(end - start for start, end in zip(self.start, self.end, strict=True))
        return self.num_ranks * self.makespan - busy

    def length_of_a_step(self) -> float:
        """The makespan, if there is something to divide by it. Raises a ValueError for a timeline without length."""
        if self.makespan == 0.0:
            raise ValueError("the timeline has no length, so no share of it can be computed; add intervals first")
        return self.makespan
