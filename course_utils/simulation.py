"""The price of a schedule, before anything is run: how long it takes, what it must keep, and what it looks like.

The simulation knows two things about a step: what each action and each message waits for (`validity.dependencies`), and
how long each lasts. Everything begins as soon as the last thing it waits for has ended, so the length of a step is the
longest path through these waits. What it leaves out: ranks that share a processor, and lines that get slower when
several messages share them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
    recompute: Costs | None = None,
) -> Timeline:
    """Predict when each action of a step runs.

    A recomputation (`schedules.rematerialise`) needs nothing from other ranks: it begins when the action before it has
    ended, so that it may fill the wait for a gradient.

    Args:
        schedule: a whole step, or one without backwards (`schedules.forward_only`).
        forward, backward: how long one micro-batch takes in a stage, in any unit: one number, or one per stage.
        transfer: how long a message is under way between two ranks; stages of one rank hand over in no time.
        queues: the model of queues, a key of `validity.QUEUES`. In "buffered" messages do not delay each other. In the
            others a receive is issued when the action before it has ended, and a message occupies its queue on both
            sides while it waits there and while it is under way: what is behind it waits too, although it could move
            (head-of-line blocking).
        recompute: how long a micro-batch's forward takes when it is computed once more; None: as long as `forward`.

    Returns:
        A timeline that starts at 0, rank by rank in the order of the schedule.

    Raises:
        ScheduleError: the schedule cannot run; see `validity.validate`.
        ValueError: a cost is no positive number, or there is not one per stage; the transfer is negative.
    """
    cost = {
        "F": costs_per_stage("forward", forward, schedule.num_stages),
        "B": costs_per_stage("backward", backward, schedule.num_stages),
        "R": costs_per_stage("recompute", forward if recompute is None else recompute, schedule.num_stages),
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
    timeline = Timeline(schedule.num_ranks, label_of(schedule, forward, backward, transfer, queues, recompute))
    for rank, row in enumerate(schedule.actions):
        for action in row:
            timeline.add(rank, action.kind, action.stage, action.micro_batch, begins[action], ends[action])
    return timeline


class Kept(NamedTuple):
    """How many pairs (stage, micro-batch) a rank keeps after an action.

    graphs: with all that their backward needs. inputs: only with what the stage received.
    """

    graphs: int
    inputs: int


def kept(schedule: Schedule) -> list[list[Kept]]:
    """What each rank keeps after each of its actions, from first to last.

    A forward leaves its graph, until the backward. If it is recomputed it leaves only its inputs, and the graph is kept
    from the recomputation to the backward (the inputs are then part of it). With g bytes for a graph and i bytes for
    inputs a rank keeps at most max(g * graphs + i * inputs) over its actions. Without backwards nothing is kept.

    Raises:
        ScheduleError: the schedule cannot run.
    """
    check_runs(schedule)
    if without_backwards(schedule):
        return [[Kept(0, 0)] * len(row) for row in schedule.actions]
    rows = []
    for row in schedule.actions:
        recomputed = {action[1:] for action in row if action.kind == "R"}
        change = {("F", False): (1, 0), ("F", True): (0, 1), ("R", True): (1, -1), ("B", False): (-1, 0)}
        now, after = Kept(0, 0), []
        for action in row:
            graphs, inputs = change[action.kind, action.kind != "B" and action[1:] in recomputed]
            now = Kept(now.graphs + graphs, now.inputs + inputs)
            after.append(now)
        rows.append(after)
    return rows


def peak_stash(schedule: Schedule) -> list[int]:
    """For each rank, of how many pairs (stage, micro-batch) it keeps the graph at most; see `kept`.

    This is what a schedule costs in memory: GPipe keeps M on every rank, 1F1B min(M, K - k) on rank k, and either of
    them only 1 if every micro-batch is recomputed; then `peak_inputs` grows instead.

    Raises:
        ScheduleError: the schedule cannot run.
    """
    return [max((now.graphs for now in row), default=0) for row in kept(schedule)]


def peak_inputs(schedule: Schedule) -> list[int]:
    """For each rank, of how many pairs (stage, micro-batch) it keeps only the inputs at most; see `kept`.

    0 without recomputation. The peaks of graphs and inputs need not fall on the same moment.

    Raises:
        ScheduleError: the schedule cannot run.
    """
    return [max((now.inputs for now in row), default=0) for row in kept(schedule)]


def staircase(
    schedule: Schedule,
    forward: int | Sequence[int] = 1,
    backward: int | Sequence[int] = 1,
    recompute: int | Sequence[int] | None = None,
) -> str:
    """The step as a picture of text: one line per rank, one column per slot of time.

    An action of several slots is drawn out with dashes, `B0---`. If a rank holds several stages, the stage comes first:
    `2F0`. The last line says what was assumed.

    Args:
        forward, backward: how many slots one micro-batch takes in a stage: one whole number, or one per stage.
        recompute: the slots of a forward that is computed once more; None: as many as `forward`.

    Raises:
        ScheduleError: the schedule cannot run.
        ValueError: a cost is no whole number of slots.
    """
    for name, cost in (("forward", forward), ("backward", backward), ("recompute", recompute or 1)):
        for slots in costs_per_stage(name, cost, schedule.num_stages):
            if slots != int(slots):
                raise ValueError(f"{name} is {slots:g}; a staircase has whole slots, draw a timeline instead")
    timeline = simulate(schedule, forward, backward, recompute=recompute)
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
    if recomputes(schedule):
        example += "; R: the same forward once more"
    return "\n".join([*lines, f"{timeline.label}, in slots. {example}; a dot: idle."])


def all_actions(schedule: Schedule) -> list[Action]:
    return [action for row in schedule.actions for action in row]


def without_backwards(schedule: Schedule) -> bool:
    """Whether this is a step of evaluation."""
    return all(action.kind == "F" for action in all_actions(schedule))


def recomputes(schedule: Schedule) -> bool:
    """Whether any forward is computed twice."""
    return any(action.kind == "R" for action in all_actions(schedule))


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


def label_of(
    schedule: Schedule, forward: Costs, backward: Costs, transfer: float, queues: str, recompute: Costs | None
) -> str:
    """`simulated: forward 1, backward 2, transfer 0`; recomputation and queues are named if there are any."""

    def text(cost: Costs) -> str:
        return "/".join(f"{value:g}" for value in cost) if isinstance(cost, Iterable) else f"{cost:g}"

    again = f", recompute {text(forward if recompute is None else recompute)}" if recomputes(schedule) else ""
    queued = "" if queues == "buffered" else f", queues by {queues}"
    return f"simulated: forward {text(forward)}, backward {text(backward)}{again}, transfer {transfer:g}{queued}"
