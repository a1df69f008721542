"""Who computes which micro-batch of which stage, in which order: a schedule is data.

A schedule lists, for every rank, the actions that the rank carries out from first to last. Everything else about a step
(which messages cross between ranks, what must be kept in memory, how long it takes) follows from that list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule that cannot run; the subclasses in `validity.py` say why."""


class Action(NamedTuple):
    """One stage computes one micro-batch. In text: `0F3`.

    kind: "F" is the forward, "B" the backward pass; "R" recomputes a forward whose results were not kept.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Message(NamedTuple):
    """What crosses the border between two stages: activations on the way forward, gradients on the way back."""

    source: int
    destination: int
    micro_batch: int

    @property
    def kind(self) -> str:
        return "activations" if self.destination > self.source else "gradients"

    def __str__(self) -> str:
        return f"the {self.kind} of micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank, in order.

    Attributes:
        num_micro_batches: M.
        rank_of_stage: for each stage the rank that holds it; usually stage k is on rank k.
        actions: one tuple of actions per rank.
    """

    num_micro_batches: int
    rank_of_stage: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.rank_of_stage)

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds, ascending."""
        return [stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank]

    def source_of(self, action: Action) -> Action | None:
        """The action whose result this one takes in; None for the first forward and the last backward."""
        return self.neighbour(action, {"F": -1, "B": +1})

    def target_of(self, action: Action) -> Action | None:
        """The action that takes in this one's result."""
        return self.neighbour(action, {"F": +1, "B": -1})

    def neighbour(self, action: Action, direction: dict[str, int]) -> Action | None:
        """The same action in the next stage of a direction; recomputation stays within its stage and has none."""
        if action.kind not in direction:
            return None
        stage = action.stage + direction[action.kind]
        return Action(action.kind, stage, action.micro_batch) if 0 <= stage < self.num_stages else None

    def received_by(self, action: Action) -> Message | None:
        """The message that an action needs from another rank, or None if it needs none."""
        source = self.source_of(action)
        if source is None or self.rank_of_stage[source.stage] == self.rank_of_stage[action.stage]:
            return None
        return Message(source.stage, action.stage, action.micro_batch)

    def sent_by(self, action: Action) -> Message | None:
        """The message to another rank that follows an action, or None."""
        target = self.target_of(action)
        return self.received_by(target) if target is not None else None

    def channel(self, message: Message) -> tuple[int, int]:
        """The two ranks, sender first, between which a message travels."""
        return self.rank_of_stage[message.source], self.rank_of_stage[message.destination]

    @cached_property
    def channels(self) -> dict[tuple[int, int], tuple[Message, ...]]:
        """For each pair (sending rank, receiving rank) its messages, in the order in which they are sent."""
        sent: dict[tuple[int, int], list[Message]] = {}
        for row in self.actions:
            for action in row:
                if (message := self.sent_by(action)) is not None:
                    sent.setdefault(self.channel(message), []).append(message)
        return {channel: tuple(messages) for channel, messages in sent.items()}

    def to_text(self) -> str:
        """One line per rank, `0F0,0F1,0B0,0B1`: the format of torch.distributed.pipelining's schedule files."""
        return "\n".join(",".join(map(str, row)) or "," for row in self.actions)


def one_stage_per_rank(num_micro_batches: int, rows: Sequence[Sequence[Action]]) -> Schedule:
    """A schedule in which rank k holds stage k alone."""
    return Schedule(num_micro_batches, tuple(range(len(rows))), tuple(map(tuple, rows)))


def naive(num_stages: int, num_micro_batches: int) -> Schedule:
    """Naive model parallelism: one micro-batch at a time, forward through all stages, then backward."""
    check_sizes(num_stages, num_micro_batches)
    return one_stage_per_rank(
        num_micro_batches,
        [[Action(kind, k, m) for m in range(num_micro_batches) for kind in "FB"] for k in range(num_stages)],
    )


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., 2019, section 2.3).

    Gradients are added in ascending order of micro-batches, as on one device, so that the sums agree to the last bit.
    """
    check_sizes(num_stages, num_micro_batches)
    return one_stage_per_rank(
        num_micro_batches,
        [[Action(kind, k, m) for kind in "FB" for m in range(num_micro_batches)] for k in range(num_stages)],
    )


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """One forward, one backward (Narayanan et al., 2021, section 2.2): stage k keeps min(M, K - k) micro-batches.

    With equal stages, and messages that take no time, it is as fast as GPipe, which keeps M everywhere.
    """
    check_sizes(num_stages, num_micro_batches)
    rows = []
    for k in range(num_stages):
        warm_up = min(num_micro_batches, num_stages - 1 - k)
        row = [Action("F", k, m) for m in range(warm_up)]
        for m in range(num_micro_batches):
            if m + warm_up < num_micro_batches:
                row.append(Action("F", k, m + warm_up))
            row.append(Action("B", k, m))
        rows.append(row)
    return one_stage_per_rank(num_micro_batches, rows)


def looped(num_ranks: int, chunks: int, num_micro_batches: int) -> Schedule:
    """Several stages per rank: stage s is on rank s mod num_ranks; all forwards stage by stage, then all backwards.

    Called looped breadth-first (Lamy-Poirier, 2023). `chunks`: stages per rank, often written V.
    """
    check_sizes(num_ranks, num_micro_batches)
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}; a rank holds at least 1 stage")
    rank_of_stage = tuple(stage % num_ranks for stage in range(num_ranks * chunks))
    rows = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * chunks, num_ranks)
        forwards = [Action("F", s, m) for s in stages for m in range(num_micro_batches)]
        backwards = [Action("B", s, m) for s in reversed(stages) for m in range(num_micro_batches)]
        rows.append((*forwards, *backwards))
    return Schedule(num_micro_batches, rank_of_stage, tuple(rows))


def forward_only(schedule: Schedule) -> Schedule:
    """The same schedule without its backwards and what serves them, for evaluation."""
    rows = tuple(tuple(action for action in row if action.kind == "F") for row in schedule.actions)
    return Schedule(schedule.num_micro_batches, schedule.rank_of_stage, rows)


POLICIES = ("never", "always", "except_last")


def rematerialise(schedule: Schedule, policy: str) -> Schedule:
    """The same schedule with forwards recomputed (Huang et al., 2019, section 2.3; Chen et al., 2016).

    A stage then keeps of a micro-batch only what it received, and computes its forward a second time, `R`, just before
    the backward. Nothing but memory and time changes: dropout draws the same masks again.

    Args:
        policy: "never"; "always"; "except_last", where the last micro-batch keeps its results. In GPipe that costs one
            more micro-batch's memory and saves one of M recomputations.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} of re-materialisation; there are {', '.join(POLICIES)}")
    count = {"never": 0, "always": schedule.num_micro_batches, "except_last": schedule.num_micro_batches - 1}[policy]
    rows = []
    for row in schedule.actions:
        new: list[Action] = []
        for action in row:
            if action.kind == "B" and action.micro_batch < count:
                new.append(Action("R", action.stage, action.micro_batch))
            new.append(action)
        rows.append(tuple(new))
    return Schedule(schedule.num_micro_batches, schedule.rank_of_stage, tuple(rows))


SCHEDULES = {"naive": naive, "gpipe": gpipe, "1f1b": one_f_one_b}


def check_sizes(num_stages: int, num_micro_batches: int) -> None:
    """Raises a ValueError unless both are at least 1."""
    if num_stages < 1:
        raise ValueError(f"the number of stages is {num_stages}; it must be at least 1")
    if num_micro_batches < 1:
        raise ValueError(f"the number of micro-batches is {num_micro_batches}; it must be at least 1")


def parse(text: str, rank_of_stage: Sequence[int] | None = None) -> Schedule:
    """Read what `Schedule.to_text` writes.

    Args:
        text: one line per rank; a line with nothing but a comma is a rank that does nothing; spaces around actions do
            not count.
        rank_of_stage: by default it is taken from the lines in which the stages appear.

    Raises:
        ScheduleError: for a word that is no action, naming the line.
    """
    rows = []
    for number, line in enumerate(text.strip().split("\n")):
        words = [word.strip() for word in line.split(",") if word.strip()]
        rows.append(tuple(parse_action(word, number) for word in words))
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError("the text holds no action; an action looks like 0F3")
    if rank_of_stage is None:
        owner = {action.stage: rank for rank, row in reversed(list(enumerate(rows))) for action in row}
        absent = sorted(set(range(max(owner) + 1)) - set(owner))
        if absent:
            raise ScheduleError(f"stage {absent[0]} has no action, so its rank is unknown; give rank_of_stage")
        rank_of_stage = [owner[stage] for stage in range(len(owner))]
    return Schedule(1 + max(action.micro_batch for action in actions), tuple(rank_of_stage), tuple(rows))


def parse_action(word: str, line: int) -> Action:
    """`0F3` -> Action("F", 0, 3)."""
    for kind in "FBR":
        stage, found, micro_batch = word.partition(kind)
        if found and stage.isdecimal() and micro_batch.isdecimal():
            return Action(kind, int(stage), int(micro_batch))
    raise ScheduleError(f"{word!r} in line {line + 1} is no action; write the stage, F, B or R, the micro-batch: 0F3")
