"""The price of a schedule: against a second way to compute it, against figures found by hand, and drawn as text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_strategies import any_valid_schedule, random_schedule

from course_utils.schedules import Action, Schedule, forward_only, gpipe, looped, naive, one_f_one_b, parse
from course_utils.simulation import peak_stash, simulate, staircase
from course_utils.timeline import Interval, Timeline
from course_utils.validity import QUEUES, Cycle, MissingAction, NotAscending, validate


def starts(timeline: Timeline) -> dict[Action, float]:
    return {Action(i.kind, i.stage, i.micro_batch): i.start for i in timeline}


# --- Timeline ---------------------------------------------------------------------------------------------------


def recorded() -> Timeline:
    """Two ranks on a clock that does not start at zero."""
    timeline = Timeline(2, "made by hand", unit="s")
    timeline.add(0, "F", 0, 0, 100.0, 101.0)
    timeline.add(1, "F", 1, 0, 101.0, 102.0)
    timeline.add(1, "B", 1, 0, 102.0, 104.0)
    timeline.add(0, "B", 0, 0, 106.0, 108.0)
    return timeline


def test_what_a_timeline_tells() -> None:
    timeline = recorded()
    assert len(timeline) == 4
    assert list(timeline)[2] == Interval(1, "B", 1, 0, 102.0, 104.0)
    assert timeline.makespan == 8
    assert [timeline.busy(rank) for rank in (0, 1)] == [3, 3]
    assert [timeline.utilisation(rank) for rank in (0, 1)] == [3 / 8, 3 / 8]
    assert timeline.bubble_of_total == 10 / 16
    assert timeline.bubble_of_ideal == 10 / 6


def test_the_two_conventions_for_the_bubble() -> None:
    timeline = simulate(gpipe(4, 16))
    assert (timeline.bubble_of_total, timeline.bubble_of_ideal) == (3 / 19, 3 / 16)


def test_a_rank_that_is_idle_counts() -> None:
    timeline = Timeline(2, "made by hand")
    timeline.add(0, "F", 0, 0, 0.0, 1.0)
    assert timeline.utilisation(1) == 0 and timeline.bubble_of_total == 1 / 2 and timeline.bubble_of_ideal == 1


def test_a_timeline_is_kept_in_columns() -> None:
    timeline = recorded()
    assert list(timeline.rank) == [0, 1, 1, 0] and list(timeline.end) == [101, 102, 104, 108]
    assert bytes(timeline.kind) == b"FFBB"
    columns = (timeline.rank, timeline.kind, timeline.stage, timeline.micro_batch, timeline.start, timeline.end)
    assert sum(column.itemsize for column in columns) <= 32  # bytes: a million intervals take 32 MB at most
    assert "array" not in repr(timeline)


@pytest.mark.parametrize(
    "interval, words",
    [
        ((2, "F", 0, 0, 0.0, 1.0), "rank is 2; the timeline has the ranks 0 to 1"),
        ((-1, "F", 0, 0, 0.0, 1.0), "rank is -1"),
        ((0, "X", 0, 0, 0.0, 1.0), "kind is 'X'; known are F, B"),
        ((0, "FB", 0, 0, 0.0, 1.0), "kind is 'FB'"),
        ((0, "F", 3, 4, 2.0, 1.0), "3F4 lasts from 2.0 to 1.0"),
        ((0, "F", 0, 0, float("nan"), 1.0), "0F0 lasts from nan to 1.0"),
        ((0, "F", 0, 0, 0.0, float("inf")), "0F0 lasts from 0.0 to inf"),
    ],
)
def test_intervals_that_cannot_be(interval: tuple, words: str) -> None:
    timeline = recorded()
    with pytest.raises(ValueError, match=words):
        timeline.add(*interval)
    assert len(list(timeline)) == 4  # no column has grown


def test_an_empty_timeline() -> None:
    timeline = Timeline(2, "made by hand")
    assert timeline.makespan == 0 and timeline.busy(0) == 0 and list(timeline) == []
    for share in ("bubble_of_total", "bubble_of_ideal"):
        with pytest.raises(ValueError, match="no length"):
            getattr(timeline, share)
    with pytest.raises(ValueError, match="no length"):
        timeline.utilisation(0)


def test_a_timeline_without_ranks_or_label() -> None:
    with pytest.raises(ValueError, match="num_ranks is 0"):
        Timeline(0, "simulated")
    with pytest.raises(ValueError, match="label is empty"):
        Timeline(1, " ")


# --- Simulation -------------------------------------------------------------------------------------------------


def test_every_cost_is_counted_once() -> None:
    timeline = simulate(gpipe(2, 1), forward=[1, 3], backward=[2, 5], transfer=0.5)
    assert list(timeline) == [
        Interval(0, "F", 0, 0, 0.0, 1.0),
        Interval(0, "B", 0, 0, 10.0, 12.0),
        Interval(1, "F", 1, 0, 1.5, 4.5),
        Interval(1, "B", 1, 0, 4.5, 9.5),
    ]
    assert timeline.label == "simulated: forward 1/3, backward 2/5, transfer 0.5"


def test_stages_of_one_rank_hand_over_in_no_time() -> None:
    assert simulate(parse("0F0,1F0,1B0,0B0"), transfer=100).makespan == 4


def by_waiting(schedule: Schedule, forward: list[float], backward: list[float], transfer: float) -> dict[Action, float]:
    """The starts when messages are buffered, found without a graph: each rank goes on as soon as its input is there."""
    begins: dict[Action, float] = {}
    ends: dict[Action, float] = {}
    free, done = [0.0] * schedule.num_ranks, [0] * schedule.num_ranks
    while len(ends) < sum(map(len, schedule.actions)):
        for rank, row in enumerate(schedule.actions):
            if done[rank] == len(row):
                continue
            action = row[done[rank]]
            source = schedule.source_of(action)
            if source is not None and source not in ends:
                continue
            far = source is not None and schedule.rank_of_stage[source.stage] != rank
            ready = 0.0 if source is None else ends[source] + (transfer if far else 0.0)
            begins[action] = max(free[rank], ready)
            ends[action] = free[rank] = begins[action] + (forward if action.kind == "F" else backward)[action.stage]
            done[rank] += 1
    return begins


@given(any_valid_schedule(), st.data())
def test_the_longest_path_is_what_waiting_gives(schedule: Schedule, data: st.DataObject) -> None:
    costs = st.lists(st.integers(1, 5), min_size=schedule.num_stages, max_size=schedule.num_stages)
    forward, backward, transfer = data.draw(costs), data.draw(costs), data.draw(st.integers(0, 3))
    assert starts(simulate(schedule, forward, backward, transfer)) == by_waiting(schedule, forward, backward, transfer)


@given(any_valid_schedule())
def test_a_rank_does_one_thing_at_a_time_in_the_order_of_the_schedule(schedule: Schedule) -> None:
    timeline = simulate(schedule, forward=2, backward=3, transfer=1)
    assert min(timeline.start) == 0
    for rank, row in enumerate(schedule.actions):
        mine = [interval for interval in timeline if interval.rank == rank]
        assert [Action(i.kind, i.stage, i.micro_batch) for i in mine] == list(row)
        assert all(first.end <= second.start for first, second in zip(mine, mine[1:], strict=False))


def test_forward_only() -> None:
    assert simulate(forward_only(one_f_one_b(3, 4))).makespan == 3 + 4 - 1
    assert simulate(forward_only(looped(2, 2, 4))).makespan == 2 * 4 + 1


def test_an_uneven_stage_sets_the_pace() -> None:
    timeline = simulate(gpipe(3, 10), forward=[1, 2, 1], backward=[1, 2, 1])
    assert timeline.makespan == 10 * (2 + 2) + 2 * (1 + 1)
    assert timeline.utilisation(1) == 40 / 44


# --- Queues -----------------------------------------------------------------------------------------------------


def test_a_message_occupies_its_queue_while_it_is_under_way() -> None:
    """With buffers the line carries many messages at once; in a queue one, and not while its receiver computes."""
    last = Action("F", 1, 3)
    assert starts(simulate(gpipe(2, 4), transfer=3))[last] == 4 + 3
    assert starts(simulate(gpipe(2, 4), transfer=3, queues="directed pair"))[last] == 1 + 4 * 3 + 3 * 1


def test_the_head_of_a_line_costs_a_bubble_and_is_no_hang() -> None:
    """What pytorch#188833 describes: operations that could move wait in a queue behind one that cannot.

    One queue per rank: rank 1 wants micro-batch 1, which has been ready since time 2. But first in its queue stands
    micro-batch 0 on its way to rank 2, from 3 to 4.
    """
    figures = {}
    for queues in ("buffered", "directed pair", "rank"):
        validate(gpipe(3, 2), queues)
        timeline = simulate(gpipe(3, 2), transfer=1, queues=queues)
        figures[queues] = starts(timeline)[Action("F", 1, 1)], timeline.makespan
    assert figures == {"buffered": (3, 12), "directed pair": (4, 14), "rank": (5, 16)}


def test_the_head_of_a_line_with_several_stages_per_rank() -> None:
    makespans = {q: simulate(validate(looped(3, 2, 2), q), transfer=3, queues=q).makespan for q in QUEUES}
    assert makespans == {"buffered": 44, "directed pair": 50, "pair and kind": 50, "pair": 50, "rank": 68}


def test_gradients_and_activations_on_one_line() -> None:
    """Rank 0 sends gradients, then activations, to rank 1, which needs the activations first."""
    schedule = parse("0F0,2F0,2B0,0F1,2F1,2B1,0B0,0B1\n1F0,3F0,3B0,1F1,1B0,3F1,3B1,1B1")
    begins = {q: starts(simulate(schedule, transfer=3, queues=q))[Action("F", 1, 1)] for q in list(QUEUES)[:3]}
    assert begins == {"buffered": 22, "directed pair": 24, "pair and kind": 22}


def test_a_busy_receiver_holds_up_a_queue_even_if_messages_take_no_time() -> None:
    """Rank 2 is slow. Its message waits in rank 1's only queue, and behind it one that rank 1 could compute with."""
    slow = [1, 1, 4]
    assert starts(simulate(gpipe(3, 4), forward=slow, queues="directed pair"))[Action("F", 1, 2)] == 3
    assert starts(simulate(gpipe(3, 4), forward=slow, queues="rank"))[Action("F", 1, 2)] == 2 + 4
    assert simulate(gpipe(3, 4), queues="rank").label.endswith("queues by rank")


@settings(max_examples=200)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_coarser_queues_are_never_faster(seed: int, transfer: int) -> None:
    schedule = random_schedule(random.Random(seed), may_hang=False)
    makespans = []
    for queues in ("buffered", "directed pair", "pair", "rank"):
        try:
            makespans.append(simulate(schedule, transfer=transfer, queues=queues).makespan)
        except Cycle:
            break
    assert makespans == sorted(makespans)
    assert transfer > 0 or makespans[0] == makespans[1]


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "costs, words",
    [
        ({"forward": 0}, "forward is 0; a cost is a number, finite and positive"),
        ({"forward": -1.5}, "forward is -1.5"),
        ({"backward": float("nan")}, "backward is nan"),
        ({"backward": [1, float("inf")]}, "backward is inf"),
        ({"forward": True}, "forward is True"),
        ({"forward": None}, "forward is None"),
        ({"forward": "12"}, "forward is '12'"),
        ({"backward": [1, "2"]}, "backward is '2'"),
        ({"forward": [1, 1, 1]}, "forward has 3 costs; the schedule has 2 stages"),
        ({"backward": []}, "backward has 0 costs"),
        ({"transfer": -1}, "transfer is -1; a cost is a number, finite and not negative"),
        ({"transfer": [1, 1]}, r"transfer is \[1, 1\]"),
        ({"queues": "nccl"}, "unknown model of queues 'nccl'"),
    ],
)
def test_costs_that_cannot_be(costs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(gpipe(2, 2), **costs)


def test_a_schedule_that_cannot_run_has_no_price() -> None:
    for price in (simulate, peak_stash, staircase):
        with pytest.raises(NotAscending):
            price(parse("0F1,0F0,0B0,0B1"))
        with pytest.raises(MissingAction, match="^0B1 is missing"):
            price(parse("0F0,0F1,0B0"))
        with pytest.raises(Cycle):
            price(parse("1F0,0F0,1B0,0B0"))
    with pytest.raises(Cycle, match="rank"):
        simulate(one_f_one_b(2, 2), queues="rank")


# --- Staircases -------------------------------------------------------------------------------------------------


def test_a_staircase_of_gpipe() -> None:
    assert staircase(gpipe(2, 2)) == (
        "rank 0  F0 F1 .  .  B0 B1\n"
        "rank 1  .  F0 F1 B0 B1 .\n"
        "simulated: forward 1, backward 1, transfer 0, in slots. F0: forward of micro-batch 0; a dot: idle."
    )


def test_a_backward_of_two_slots() -> None:
    assert staircase(one_f_one_b(2, 2), backward=2) == (
        "rank 0  F0 F1 .  .  B0--- .  B1---\n"
        "rank 1  .  F0 B0--- F1 B1--- .  .\n"
        "simulated: forward 1, backward 2, transfer 0, in slots. F0: forward of micro-batch 0; a dot: idle."
    )


def test_costs_per_stage_in_a_staircase() -> None:
    assert staircase(gpipe(2, 1), forward=[1, 3], backward=[1, 2]) == (
        "rank 0  F0 .  .  .  .  .  B0\n"
        "rank 1  .  F0------ B0--- .\n"
        "simulated: forward 1/3, backward 1/2, transfer 0, in slots. F0: forward of micro-batch 0; a dot: idle."
    )


def test_the_stage_is_shown_where_a_rank_has_several() -> None:
    assert staircase(looped(2, 2, 1), backward=2) == (
        "rank 0  0F0 .   2F0 .   .   .   2B0---- .   .   0B0----\n"
        "rank 1  .   1F0 .   3F0 3B0---- .   .   1B0---- .   .\n"
        "simulated: forward 1, backward 2, transfer 0, in slots. 2F0: forward of micro-batch 0 in stage 2; a dot: idle."
    )


@given(any_valid_schedule(), st.integers(1, 3), st.integers(1, 3))
def test_a_staircase_shows_what_the_timeline_holds(schedule: Schedule, forward: int, backward: int) -> None:
    timeline = simulate(schedule, forward, backward)
    *lanes, legend = staircase(schedule, forward, backward).split("\n")
    assert legend.startswith(timeline.label)
    several = len(schedule.rank_of_stage) > schedule.num_ranks
    width = 1 + max(len(str(action)) - (not several) for row in schedule.actions for action in row)
    for rank, lane in enumerate(lanes):
        margin = f"rank {rank}  "
        assert lane.startswith(margin)
        lane = lane[len(margin) :].ljust(round(timeline.makespan) * width)
        for interval in (interval for interval in timeline if interval.rank == rank):
            box = lane[round(interval.start) * width : round(interval.end) * width]
            name = str(Action(interval.kind, interval.stage, interval.micro_batch))
            assert box.rstrip("- ") == (name if several else name.lstrip("0123456789"))
        assert lane.count(".") == timeline.makespan - timeline.busy(rank)


@pytest.mark.parametrize("costs", [{"forward": 0.5}, {"backward": [1, 1.25]}])
def test_a_staircase_has_whole_slots(costs: dict) -> None:
    with pytest.raises(ValueError, match="is (0.5|1.25); a staircase has whole slots"):
        staircase(naive(2, 1), **costs)
