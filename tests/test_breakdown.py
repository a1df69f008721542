"""Where the time went: parts that add up, figures found by hand, and what no estimate may break."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import any_valid_schedule

from course_utils.breakdown import Breakdown, Parts, breakdown, describe, predict
from course_utils.schedules import (
    POLICIES,
    Action,
    Schedule,
    forward_only,
    gpipe,
    looped,
    one_f_one_b,
    parse,
    rematerialise,
)
from course_utils.simulation import simulate
from course_utils.timeline import Timeline


def as_recorded(schedule: Schedule, seed: int, label: str = "measured") -> Timeline:
    """What a recording could look like: every action lasts as it likes, messages and pauses too; waits and sends."""
    rng = random.Random(seed)
    slow = [rng.choice([0.2, 1.0, 3.0]) for _ in range(schedule.num_stages)]
    timeline = Timeline(schedule.num_ranks, label, unit="seconds")
    arrives: dict[Action | None, float] = {None: 0.0}
    now, done = [rng.random() for _ in range(schedule.num_ranks)], [0] * schedule.num_ranks
    while sum(done) < sum(map(len, schedule.actions)):
        for rank, row in enumerate(schedule.actions):
            if done[rank] == len(row) or schedule.source_of(row[done[rank]]) not in arrives:
                continue
            kind, stage, micro_batch = action = row[done[rank]]
            ready = max(now[rank], arrives[schedule.source_of(action)])
            timeline.add(rank, "w", stage, micro_batch, now[rank], ready)
            begin = ready + rng.choice([0.0, 0.01])
            end = begin + slow[stage] * rng.choice([0.0, 1.0, rng.random()])
            timeline.add(rank, kind, stage, micro_batch, begin, end)
            now[rank] = end + rng.choice([0.0, rng.random()])
            timeline.add(rank, "s", stage, micro_batch, end, now[rank])
            arrives[action] = now[rank] + rng.choice([0.0, 0.1, 1.0])
            done[rank] += 1
    return timeline


def check_sums(parts: Breakdown, timeline: Timeline) -> None:
    for rank, row in enumerate(parts.ranks):
        assert row.total == pytest.approx(timeline.makespan, rel=1e-9)
        assert min(vars(row).values()) >= 0
        assert row.compute + row.recompute == pytest.approx(timeline.busy(rank))
    assert parts.total.total == pytest.approx(timeline.num_ranks * timeline.makespan, rel=1e-9)
    assert parts.total.compute == pytest.approx(timeline.efficiency * timeline.num_ranks * timeline.makespan)


@given(any_valid_schedule(), st.sampled_from(POLICIES), st.integers(0, 2**32))
def test_the_parts_of_a_recording_add_up(schedule: Schedule, policy: str, seed: int) -> None:
    schedule = rematerialise(schedule, policy)
    timeline = as_recorded(schedule, seed)
    parts = breakdown(timeline, schedule)
    check_sums(parts, timeline)
    for rank, row in enumerate(parts.ranks):
        assert row.sending == pytest.approx(timeline.time_in("s", rank))


@given(any_valid_schedule(), st.sampled_from(POLICIES), st.data())
def test_a_simulation_without_messages_is_explained_wholly(
    schedule: Schedule, policy: str, data: st.DataObject
) -> None:
    schedule = rematerialise(schedule, policy)
    costs = st.lists(st.integers(1, 5), min_size=schedule.num_stages, max_size=schedule.num_stages)
    timeline = simulate(schedule, data.draw(costs), data.draw(costs), recompute=data.draw(costs))
    parts = breakdown(timeline, schedule)
    check_sums(parts, timeline)
    assert parts.total.rest == pytest.approx(0, abs=1e-9 * timeline.makespan)


@given(any_valid_schedule(), st.sampled_from(POLICIES), st.integers(1, 5), st.integers(1, 5))
def test_among_equals_all_idle_time_is_the_schedules(schedule: Schedule, policy: str, one: int, other: int) -> None:
    schedule = rematerialise(schedule, policy)
    timeline = simulate(schedule, one, other)
    total = breakdown(timeline, schedule).total
    assert total.bubble == pytest.approx(timeline.idle()) and total.slow_neighbour == pytest.approx(0, abs=1e-9)


def test_a_step_by_hand() -> None:
    """Equal stages would take 2 and 3.5: a step of 11, idle for 5.5. As they are: 11 as well, idle for 8 and 3."""
    timeline = simulate(gpipe(2, 1), forward=[1, 3], backward=[2, 5], transfer=0.5)
    parts = breakdown(timeline, gpipe(2, 1))
    assert parts.makespan == 12 and parts.stage_times == (3, 8) and parts.slowest_stage == 1
    assert parts.ranks == (
        Parts(compute=3, recompute=0, sending=0, bubble=5.5, slow_neighbour=2.5, rest=1),
        Parts(compute=8, recompute=0, sending=0, bubble=3, slow_neighbour=0, rest=1),
    )
    assert parts.total == Parts(11, 0, 0, 8.5, 2.5, 2)
    backwards = Timeline(2, "recorded in another order")
    for interval in reversed(list(timeline)):
        backwards.add(*interval)
    assert breakdown(backwards, gpipe(2, 1)) == parts


def test_what_was_measured_can_be_simulated() -> None:
    """With the mean of what each stage took, or the mean of all stages."""
    schedule = rematerialise(gpipe(2, 2), "except_last")
    timeline = Timeline(2, "measured", unit="ms")
    for rank, row in enumerate(schedule.actions):
        now = 100.0
        for kind, stage, micro_batch in row:
            lasts = {"F": 1, "R": 2, "B": 6}[kind] * (1 + rank) + micro_batch
            timeline.add(rank, kind, stage, micro_batch, now, now + lasts)
            timeline.add(rank, "w", stage, micro_batch, now + lasts, now := now + lasts + 9)
    own, equal = predict(timeline, schedule), predict(timeline, schedule, equal_stages=True)
    assert list(own) == list(simulate(schedule, [1.5, 2.5], [6.5, 12.5], recompute=[2, 4]))
    assert list(equal) == list(simulate(schedule, 2, 9.5, recompute=3))
    assert (own.label, own.unit) == ("simulated with the mean times of each stage", "ms")
    assert (equal.label, equal.unit) == ("simulated with the mean times of all stages together", "ms")
    with pytest.raises(ValueError, match="on rank 0 its action 2 is 0R0, the schedule has 0B0"):
        predict(timeline, rematerialise(gpipe(2, 2), "never"))


def test_sends_and_recomputation_by_hand() -> None:
    """One rank, no bubble: 1 forward, 0.5 to send, 1 to recompute, 0.25 without a record, 2 backward, 0.25 to send."""
    schedule = rematerialise(gpipe(1, 1), "always")
    timeline = Timeline(1, "made by hand", unit="s")
    for kind, start, end in [("F", 3, 4), ("s", 4, 4.5), ("R", 4.5, 5.5), ("B", 5.75, 7.75), ("s", 7.75, 8)]:
        timeline.add(0, kind, 0, 0, start, end)
    assert breakdown(timeline, schedule).ranks == (Parts(3, 1, 0.75, 0, 0, 0.25),)
    assert breakdown(timeline, schedule).stage_times == (4,)


def test_a_send_that_fills_idle_time_is_a_send() -> None:
    """Among equals rank 1 is idle for 2; here it sends for 1 of them."""
    timeline = Timeline(2, "made by hand")
    for rank, kind, start, end in [(0, "F", 0, 1), (1, "F", 1, 2), (1, "B", 2, 3), (1, "s", 3, 4), (0, "B", 3, 4)]:
        timeline.add(rank, kind, rank, 0, start, end)
    assert breakdown(timeline, gpipe(2, 1)).ranks == (Parts(2, 0, 0, 2, 0, 0), Parts(2, 0, 1, 1, 0, 0))


def test_evaluation_and_several_stages_per_rank() -> None:
    for schedule in (forward_only(looped(2, 2, 3)), looped(2, 2, 3)):
        timeline = simulate(schedule, [1, 2, 3, 4], transfer=0.5)
        parts = breakdown(timeline, schedule)
        check_sums(parts, timeline)
        assert parts.slowest_stage == 3 and parts.total.rest > 0


def test_actions_that_took_no_time() -> None:
    """A coarse clock: nothing is divided by it, and the parts still add up."""
    timeline = Timeline(2, "a coarse clock", unit="seconds")
    for rank, kind, start, end in [(0, "F", 0, 0), (1, "F", 0, 0), (1, "B", 0, 1), (0, "B", 1, 1)]:
        timeline.add(rank, kind, rank, 0, start, end)
    check_sums(breakdown(timeline, gpipe(2, 1)), timeline)


@pytest.mark.parametrize(
    "schedule, words",
    [
        (gpipe(3, 2), "the timeline has 2 ranks, the schedule 3"),
        (one_f_one_b(2, 2), "not a step of this schedule: on rank 1 its action 1 is 1F1, the schedule has 1B0"),
        (gpipe(2, 3), "on rank 0 its action 2 is 0B0, the schedule has 0F2"),
        (forward_only(gpipe(2, 2)), "not one step of this schedule: rank 0 computes 4 actions, the schedule has 2"),
        (parse("1F0,1F1,1B0,1B1\n0F0,0F1,0B0,0B1"), "on rank 0 its action 0 is 0F0, the schedule has 1F0"),
    ],
)
def test_another_schedule(schedule: Schedule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        breakdown(simulate(gpipe(2, 2)), schedule)


def test_a_recording_that_is_no_step() -> None:
    half = Timeline(2, "measured")
    for interval in simulate(gpipe(2, 2)):
        if interval.rank == 0:
            half.add(*interval)
    with pytest.raises(ValueError, match="rank 1 computes 0 actions, the schedule has 4; give all ranks of one step"):
        breakdown(half, gpipe(2, 2))
    doubled = simulate(gpipe(2, 2))
    doubled.add(0, "F", 0, 0, 0.5, 0.75)
    with pytest.raises(ValueError, match="rank 0 does two things at once"):
        breakdown(doubled, gpipe(2, 2))
    again = simulate(gpipe(2, 2))
    again.add(0, "F", 0, 0, 9.0, 10.0)
    with pytest.raises(ValueError, match="rank 0 computes 5 actions"):
        breakdown(again, gpipe(2, 2))


# --- In words ---------------------------------------------------------------------------------------------------


def test_the_sentences_and_the_table() -> None:
    schedule = rematerialise(gpipe(2, 1), "always")
    timeline = simulate(schedule, forward=[1, 3], backward=[2, 5], recompute=[1, 0.5], transfer=0.5)
    sentences, table = describe(timeline, schedule).split("\n\n")
    assert max(map(len, sentences.splitlines())) <= 100
    assert sentences.replace("\n", " ") == (
        "The step took 12.5 units of time (simulated: forward 1/3, backward 2/5, recompute 1/0.5, transfer 0.5): "
        "44.0% of the ranks' time was useful work, 6.0% recomputation, and 50.0% of the total time is bubble "
        "(GPipe's convention; Megatron-LM's: 100.0% of the ideal time), mostly because of the schedule itself. "
        "The slowest stage is 1: a micro-batch takes it 8.5 units of time, 1.36 times the mean of all stages."
    )
    assert table == (
        "share of the time  compute  recompute  sending  schedule  slow neighbour    rest\n"
        "rank 0               24.0%       8.0%     0.0%     44.0%           16.0%    8.0%\n"
        "rank 1               64.0%       4.0%     0.0%     24.0%            0.0%    8.0%\n"
        "all ranks            44.0%       6.0%     0.0%     34.0%            8.0%    8.0%"
    )


def test_equal_stages_and_what_was_lost_most() -> None:
    def sentences(timeline: Timeline, schedule: Schedule) -> str:
        return describe(timeline, schedule).split("\n\n")[0].replace("\n", " ")

    even = sentences(simulate(gpipe(4, 8), 1, 2), gpipe(4, 8))
    assert even.endswith("No stage is much slower than the mean, which is 3 units of time for a micro-batch.")
    assert (
        "27.3% of the total time is bubble (GPipe's convention; Megatron-LM's: 37.5% of the ideal time), mostly" in even
    )
    assert "recomput" not in even
    assert "No stage is much slower" in sentences(simulate(gpipe(2, 8), [1, 1.05]), gpipe(2, 8))
    assert "mostly" not in sentences(simulate(gpipe(1, 2)), gpipe(1, 2))
    assert "because of messages and other work." in sentences(simulate(gpipe(2, 2), transfer=100), gpipe(2, 2))
    unequal = sentences(simulate(gpipe(3, 50), [1, 1, 9], [1, 1, 9]), gpipe(3, 50))
    assert "mostly because of unequal stages. The slowest stage is 2" in unequal
