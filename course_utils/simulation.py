"""The price of a schedule, before anything is run: how long it takes, what it must keep, and what it looks like.

The simulation knows two things about a step: what each action and each message waits for (`validity.dependencies`), and
how long each lasts. Everything begins as soon as the last thing it waits for has ended, so the length of a step is the
longest path through these waits. What it leaves out: ranks that share a processor, and lines that get slower when
several messages share them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from course_utils.schedules import Action, Schedule
from course_utils.timeline import Timeline
from course_utils.validity import Node, dependencies, in_dependency_order, validate

Costs = float | Sequence[float]  # the same for all stages, or one per stage


def simulate(
    schedule: Schedule,
    forward: Costs = 1.0,
    backward: Costs = 1.0,
    transfer: float = 0.0,
    queues: str = "buffered",
) -> Timeline:
    """Predict when each action of a step runs.

    Args:
        schedule: a whole step, or one without backwards (`schedules.forward_only`).
        forward, backward: how long one micro-batch takes in a stage, in any unit: one number, or one per stage.
        transfer: how long a message is under way between two ranks; stages of one rank hand over in no time.
        queues: the model of queues, a key of `validity.QUEUES`. In "buffered" messages do not delay each other. In the
            others a receive is issued when the action before it has ended, and a message occupies its queue on both
            sides while it waits there and while it is under way: what is behind it waits too, although it could move
            (head-of-line blocking).

    Returns:
        A timeline that starts at 0, rank by rank in the order of the schedule.

    Raises:
        ScheduleError: the schedule cannot run; see `validity.validate`.
        ValueError: a cost is no positive number, or there is not one per stage; the transfer is negative.
    """
    cost = {
        "F": costs_per_stage("forward", forward, schedule.num_stages),
        "B": costs_per_stage("backward", backward, schedule.num_stages),
    }
    check_cost("transfer", transfer, may_be_zero=True)
    check_runs(schedule, queues)
    needs = dependencies(schedule, queues)
    begins: dict[Node, float] = {}
    ends: dict[Node, float] = {}
    for node in in_dependency_order(needs):
        begins[node] = max((ends[other] for other in needs[node]), default=0.0)
        lasts = cost[node.kind][node.stage] if isinstance(node, Action) else transfer
        ends[node] = begins[node] + lasts
    timeline = Timeline(schedule.num_ranks, label_of(forward, backward, transfer, queues))
    for rank, row in enumerate(schedule.actions):
        for action in row:
            timeline.add(rank, action.kind, action.stage, action.micro_batch, begins[action], ends[action])
    return timeline


def peak_stash(schedule: Schedule) -> list[int]:
    """For each rank, how many pairs (stage, micro-batch) it keeps at most from their forward to their backward.

    This is what a schedule costs in memory: GPipe keeps M on every rank, 1F1B min(M, K - k) on rank k. Without
    backwards nothing is kept.

    Raises:
        ScheduleError: the schedule cannot run.
    """
    check_runs(schedule)
    if without_backwards(schedule):
        return [0] * schedule.num_ranks
    peaks = []
    for row in schedule.actions:
        kept = peak = 0
        for action in row:
            kept += 1 if action.kind == "F" else -1
            peak = max(peak, kept)
        peaks.append(peak)
    return peaks


def staircase(schedule: Schedule, forward: int | Sequence[int] = 1, backward: int | Sequence[int] = 1) -> str:
    """The step as a picture of text: one line per rank, one column per slot of time.

    An action of several slots is drawn out with dashes, `B0---`. If a rank holds several stages, the stage comes first:
    `2F0`. The last line says what was assumed.

    Args:
        forward, backward: how many slots one micro-batch takes in a stage: one whole number, or one per stage.

    Raises:
        ScheduleError: the schedule cannot run.
        ValueError: a cost is no whole number of slots.
    """
    for name, cost in (("forward", forward), ("backward", backward)):
        for slots in costs_per_stage(name, cost, schedule.num_stages):
            if slots != int(slots):
                raise ValueError(f"{name} is {slots:g}; a staircase has whole slots, draw a timeline instead")
    timeline = simulate(schedule, forward, backward)
    several = len(set(schedule.rank_of_stage)) < schedule.num_stages
    names = {
        action: str(action) if several else f"{action.kind}{action.micro_batch}" for action in all_actions(schedule)
    }
    width = max(map(len, names.values()))
    boxes: list[list[str]] = [[] for _ in range(schedule.num_ranks)]
    now = [0] * schedule.num_ranks
    for rank, kind, stage, micro_batch, start, end in timeline:
        boxes[rank] += [".".ljust(width)] * (round(start) - now[rank])
        slots, now[rank] = round(end - start), round(end)
        fill = "-" if slots > 1 else " "
        boxes[rank].append(names[Action(kind, stage, micro_batch)].ljust(slots * (width + 1) - 1, fill))
    for rank, row in enumerate(boxes):
        row += [".".ljust(width)] * (round(timeline.makespan) - now[rank])
    margin = len(f"rank {schedule.num_ranks - 1}")
    lines = [f"{f'rank {rank}'.ljust(margin)}  {' '.join(row).rstrip()}" for rank, row in enumerate(boxes)]
    example = "2F0: forward of micro-batch 0 in stage 2" if several else "F0: forward of micro-batch 0"
    return "\n".join([*lines, f"{timeline.label}, in slots. {example}; a dot: idle."])


def all_actions(schedule: Schedule) -> list[Action]:
    return [action for row in schedule.actions for action in row]


def without_backwards(schedule: Schedule) -> bool:
    """Whether this is a step of evaluation."""
    return all(action.kind == "F" for action in all_actions(schedule))


def check_runs(schedule: Schedule, queues: str = "buffered") -> None:
    """Raises a ScheduleError unless the schedule runs to its end, be it a whole step or one without backwards."""
    validate(schedule, queues, forward_only=without_backwards(schedule))


def costs_per_stage(name: str, cost: Any, num_stages: int) -> list[float]:
    """One cost for each stage. Raises a ValueError for anything that is not `Costs`."""
    costs = list(cost) if isinstance(cost, Iterable) and not isinstance(cost, str) else [cost] * num_stages
    if len(costs) != num_stages:
        raise ValueError(f"{name} has {len(costs)} costs; the schedule has {num_stages} stages")
    for value in costs:
        check_cost(name, value)
    return costs


def check_cost(name: str, value: Any, may_be_zero: bool = False) -> None:
    """Raises a ValueError unless the cost is a number that time can be."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not may_be_zero):
        sign = "not negative" if may_be_zero else "positive"
        raise ValueError(f"{name} is {value!r}; a cost is a number, finite and {sign}")


def label_of(forward: Costs, backward: Costs, transfer: float, queues: str) -> str:
    """`simulated: forward 1, backward 2, transfer 0`; the model of queues is named if there are queues."""

    def text(cost: Costs) -> str:
        return "/".join(f"{value:g}" for value in cost) if isinstance(cost, Iterable) else f"{cost:g}"

    queued = "" if queues == "buffered" else f", queues by {queues}"
    return f"simulated: forward {text(forward)}, backward {text(backward)}, transfer {transfer:g}{queued}"
