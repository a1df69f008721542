"""Where the time of a step went: what was work, what the schedule itself costs, what the stages cost, and what is left.

A step of K ranks that lasts T seconds costs K * T seconds of their time. This module divides them into parts that add
up to K * T, for a recorded step as for a simulated or an emulated one.
"""

import math
import statistics
import sys
from dataclasses import dataclass
from itertools import chain

from course_utils._lines import in_lines
from course_utils.schedules import Action, Schedule
from course_utils.simulation import simulate
from course_utils.timeline import COMPUTE, Timeline


@dataclass(frozen=True)
class Parts:
    """The time of one rank, or of all ranks together. No part is negative, and they add up to the whole.

    Attributes:
        compute: inside F and B. Measured.
        recompute: inside R. Measured.
        sending: inside "s": copying, checking and handing over messages, also where the rank would have been idle
            anyway. Measured, 0 if sends were not recorded.
        bubble: idle time that the schedule itself causes. An estimate: the rank's idle time in a simulation in which
            all stages take the same time (the mean over all stages of what F, B and R took) and messages take none.
        slow_neighbour: more idle time because stages differ. An estimate: what a simulation in which every stage takes
            its own mean times has beyond the bubble.
        rest: all other time: messages under way, actions of one stage that last longer one time than another, what the
            executor does between actions, other work of the machine. What is left after the other parts.

    The two estimates together are never more than the rank was really idle, so `rest` is not negative either. If the
    idle time is less than a simulation says (means hide that times vary; a send may fill an idle moment), the bubble
    is counted first. A slow stage itself may be idle for *less* time than a stage among equals, because it waits only
    for faster ones: then its bubble is what it is in the simulation with its own times, and slow_neighbour is 0.
    """

    compute: float
    recompute: float
    sending: float
    bubble: float
    slow_neighbour: float
    rest: float

    @property
    def total(self) -> float:
        return self.compute + self.recompute + self.sending + self.bubble + self.slow_neighbour + self.rest


@dataclass(frozen=True)
class Breakdown:
    """The parts of a step, in the unit of its timeline.

    Attributes:
        ranks: the parts of each rank; each adds up to the makespan.
        makespan: how long the step lasted.
        stage_times: for each stage the mean time of one micro-batch, F, B and R together.
    """

    ranks: tuple[Parts, ...]
    makespan: float
    stage_times: tuple[float, ...]

    @property
    def total(self) -> Parts:
        """The parts of all ranks together; they add up to K * makespan."""
        return Parts(*(sum(getattr(parts, name) for parts in self.ranks) for name in PARTS))

    @property
    def slowest_stage(self) -> int:
        """The stage that needs most time for a micro-batch; the first one of several."""
        return self.stage_times.index(max(self.stage_times))


PARTS = {  # and how the table calls them
    "compute": "compute",
    "recompute": "recompute",
    "sending": "sending",
    "bubble": "schedule",
    "slow_neighbour": "slow neighbour",
    "rest": "rest",
}
ALMOST_EQUAL = 1.05  # stages that differ by less are not told apart: times of short actions vary by more
NO_TIME = sys.float_info.min  # what a simulation needs instead of 0; added to any time it changes nothing


def breakdown(timeline: Timeline, schedule: Schedule) -> Breakdown:
    """Divide the time of one step; what each part means stands in `Parts`.

    Args:
        timeline: one whole step, of all ranks (`timeline.merge`).
        schedule: what the ranks ran.

    Raises:
        ValueError: the timeline is not one step of this schedule, or a rank does two things at once.
    """
    as_they_are, among_equals = predict(timeline, schedule), predict(timeline, schedule, equal_stages=True)
    ranks = []
    for rank in range(timeline.num_ranks):
        compute, recompute, sending = (timeline.time_in(kinds, rank) for kinds in ("FB", "R", "s"))
        really_idle = max(0.0, timeline.makespan - compute - recompute - sending)  # sums round
        explained = min(idle_of(as_they_are, rank), really_idle)
        bubble = min(idle_of(among_equals, rank), explained)
        ranks.append(Parts(compute, recompute, sending, bubble, explained - bubble, really_idle - explained))
    per_micro_batch = [math.fsum(times) for times in zip(*mean_times(timeline, schedule).values(), strict=True)]
    return Breakdown(tuple(ranks), timeline.makespan, tuple(per_micro_batch))


def predict(timeline: Timeline, schedule: Schedule, equal_stages: bool = False) -> Timeline:
    """The simulation of a step with the times that were measured in it, to be shown beside it; messages take no time.

    Args:
        timeline, schedule: as for `breakdown`, which raises the same errors.
        equal_stages: give all stages the mean time of all; otherwise each stage gets its own mean times.
    """
    check_step(timeline, schedule)
    times = mean_times(timeline, schedule, equal_stages)
    forward, backward, recompute = ([time or NO_TIME for time in times[kind]] for kind in "FBR")
    simulated = simulate(schedule, forward, backward, recompute=recompute)
    simulated.unit = timeline.unit
    simulated.label = f"simulated with the mean times of {'all stages together' if equal_stages else 'each stage'}"
    return simulated


def mean_times(timeline: Timeline, schedule: Schedule, equal_stages: bool = False) -> dict[str, list[float]]:
    """For F, B and R the mean time that each stage takes for a micro-batch, 0 where it does not do this."""
    durations: dict[str, list[list[float]]] = {kind: [[] for _ in schedule.rank_of_stage] for kind in COMPUTE}
    for _, kind, stage, _, start, end in timeline:
        if kind in COMPUTE:
            durations[kind][stage].append(end - start)
    if equal_stages:
        durations = {kind: [list(chain(*stages))] * len(stages) for kind, stages in durations.items()}
    return {kind: [statistics.fmean(times or [0.0]) for times in stages] for kind, stages in durations.items()}


def idle_of(timeline: Timeline, rank: int) -> float:
    return timeline.makespan - timeline.busy(rank)


def check_step(timeline: Timeline, schedule: Schedule) -> None:
    """Raises a ValueError unless every rank computed its actions of the schedule, once each and in their order."""
    timeline.check()
    if timeline.num_ranks != schedule.num_ranks:
        raise ValueError(f"the timeline has {timeline.num_ranks} ranks, the schedule {schedule.num_ranks}")
    rows: list[list[Action]] = [[] for _ in range(schedule.num_ranks)]
    for rank, kind, stage, micro_batch, _, _ in sorted(timeline, key=lambda interval: (interval.start, interval.end)):
        if kind in COMPUTE:
            rows[rank].append(Action(kind, stage, micro_batch))
    for rank, (found, expected) in enumerate(zip(rows, schedule.actions, strict=True)):
        for place, (one, other) in enumerate(zip(found, expected, strict=False)):
            if one != other:
                raise ValueError(
                    f"the timeline is not a step of this schedule: on rank {rank} its action {place} is {one}, the "
                    f"schedule has {other}"
                )
        if len(found) != len(expected):
            raise ValueError(
                f"the timeline is not one step of this schedule: rank {rank} computes {len(found)} actions, the "
                f"schedule has {len(expected)}; give all ranks of one step"
            )


def describe(timeline: Timeline, schedule: Schedule) -> str:
    """Two sentences and a table: what was lost, to what, and which stage is the slowest. Raises as `breakdown` does."""
    parts = breakdown(timeline, schedule)
    total, all_time = parts.total, timeline.num_ranks * timeline.makespan
    causes = {name: getattr(total, name) for name in ("bubble", "slow_neighbour", "sending", "rest")}
    largest = max(causes, key=lambda name: causes[name])
    names = {"bubble": "the schedule itself", "slow_neighbour": "unequal stages", "sending": "sending"}
    because = f", mostly because of {names.get(largest, 'messages and other work')}" if causes[largest] > 0 else ""
    recomputation = f", {total.recompute / all_time:.1%} recomputation" if total.recompute else ""
    mean, slowest = statistics.fmean(parts.stage_times), max(parts.stage_times)
    if slowest > ALMOST_EQUAL * mean:
        stages = (
            f"The slowest stage is {parts.slowest_stage}: a micro-batch takes it {slowest:.4g} {timeline.unit}, "
            f"{slowest / mean:.2f} times the mean of all stages."
        )
    else:
        stages = f"No stage is much slower than the mean, which is {mean:.4g} {timeline.unit} for a micro-batch."
    sentences = (
        f"The step took {timeline.makespan:.4g} {timeline.unit} ({timeline.label}): {total.compute / all_time:.1%} of "
        f"the ranks' time was useful work{recomputation}, and {timeline.bubble_of_total:.1%} of the total time is "
        f"bubble (GPipe's convention; Megatron-LM's: {timeline.bubble_of_ideal:.1%} of the ideal time){because}. "
        f"{stages}"
    )
    lines = [
        in_lines(sentences),
        "",
        "share of the time" + "".join(f"  {name:>6}" for name in PARTS.values()),
    ]
    rows = {f"rank {rank}": (row, timeline.makespan) for rank, row in enumerate(parts.ranks)}
    for whose, (row, time) in {**rows, "all ranks": (total, all_time)}.items():
        lines.append(
            f"{whose:17}"
            + "".join(f"{getattr(row, part) / time:{max(8, len(name) + 2)}.1%}" for part, name in PARTS.items())
        )
    return "\n".join(lines)
