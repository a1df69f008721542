"""The price of a schedule: against a second way to compute it, against figures found by hand, and drawn as text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_strategies import any_valid_schedule, random_schedule

from course_utils.schedules import (
    POLICIES,
    Action,
    Schedule,
    forward_only,
    gpipe,
    looped,
    naive,
    one_f_one_b,
    parse,
    rematerialise,
)
from course_utils.simulation import Kept, kept, peak_inputs, peak_stash, simulate, staircase
from course_utils.timeline import Interval, Timeline
from course_utils.validity import QUEUES, Cycle, MissingAction, NotAscending, validate


def with_recomputation() -> st.SearchStrategy[Schedule]:
    """Schedules that run, with none, all or nearly all of their forwards recomputed."""
    return st.builds(rematerialise, any_valid_schedule(), st.sampled_from(POLICIES))


def starts(timeline: Timeline) -> dict[Action, float]:
    return {Action(i.kind, i.stage, i.micro_batch): i.start for i in timeline}


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


def by_waiting(schedule: Schedule, costs: dict[str, list[float]], transfer: float) -> dict[Action, float]:
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
            ends[action] = free[rank] = begins[action] + costs[action.kind][action.stage]
            done[rank] += 1
    return begins


@given(with_recomputation(), st.data())
def test_the_longest_path_is_what_waiting_gives(schedule: Schedule, data: st.DataObject) -> None:
    costs = st.lists(st.integers(1, 5), min_size=schedule.num_stages, max_size=schedule.num_stages)
    forward, backward, recompute = data.draw(costs), data.draw(costs), data.draw(st.none() | costs)
    transfer = data.draw(st.integers(0, 3))
    found = starts(simulate(schedule, forward, backward, transfer, recompute=recompute))
    assert found == by_waiting(schedule, {"F": forward, "B": backward, "R": recompute or forward}, transfer)


@given(with_recomputation())
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


# --- Recomputation ----------------------------------------------------------------------------------------------


def test_a_recomputation_runs_while_the_gradient_is_under_way() -> None:
    """Rank 0 has computed its forward again before the gradient comes; rank 1, which waits for none, takes longer."""
    schedule = rematerialise(gpipe(2, 1), "always")
    timeline = simulate(schedule, forward=[2, 3], backward=5, transfer=0.5, recompute=[4, 1])
    assert list(timeline) == [
        Interval(0, "F", 0, 0, 0.0, 2.0),
        Interval(0, "R", 0, 0, 2.0, 6.0),
        Interval(0, "B", 0, 0, 12.0, 17.0),
        Interval(1, "F", 1, 0, 2.5, 5.5),
        Interval(1, "R", 1, 0, 5.5, 6.5),
        Interval(1, "B", 1, 0, 6.5, 11.5),
    ]
    assert timeline.label == "simulated: forward 2/3, backward 5, recompute 4/1, transfer 0.5"
    assert timeline.efficiency == 15 / 34 and timeline.utilisation(0) == 11 / 17


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_recomputing_everything_lengthens_the_backward(make) -> None:
    """By as much as it costs, but K - 1 times less: all ranks but the last do it while they wait for a gradient."""
    plain, again = make(4, 8), rematerialise(make(4, 8), "always")
    assert simulate(plain, 1, 2).makespan == 33
    assert simulate(again, 1, 2).makespan == simulate(plain, 1, 3).makespan - 3 == 41
    assert simulate(again, 1, 2).label == "simulated: forward 1, backward 2, recompute 1, transfer 0"
    assert simulate(plain, 1, 2, recompute=7).label == "simulated: forward 1, backward 2, transfer 0"


def test_the_last_micro_batch_of_gpipe_need_not_be_recomputed() -> None:
    """GPipe's last rank turns round at once: it saves one recomputation, and the ranks before it wait as long."""
    figures = {policy: simulate(rematerialise(gpipe(3, 4), policy), 1, 2).makespan for policy in POLICIES}
    assert figures == {"never": 18, "except_last": 21, "always": 22}


@given(with_recomputation())
def test_what_is_kept_counts_each_micro_batch_once(schedule: Schedule) -> None:
    """Against a walk that looks, after each action, at what has happened to every micro-batch."""
    for row, states in zip(schedule.actions, kept(schedule), strict=True):
        done: set[Action] = set()
        for action, state in zip(row, states, strict=True):
            done.add(action)
            open_ones = [a for a in done if a.kind == "F" and a._replace(kind="B") not in done]
            graphs = [a for a in open_ones if a._replace(kind="R") not in row or a._replace(kind="R") in done]
            assert state == (len(graphs), len(open_ones) - len(graphs))
        assert not row or states[-1] == (0, 0)


def test_memory_with_recomputation() -> None:
    policies = {policy: rematerialise(gpipe(3, 4), policy) for policy in POLICIES}
    assert {policy: peak_stash(s) for policy, s in policies.items()} == {
        "never": [4, 4, 4],
        "except_last": [2, 2, 2],
        "always": [1, 1, 1],
    }
    assert {policy: peak_inputs(s) for policy, s in policies.items()} == {
        "never": [0, 0, 0],
        "except_last": [3, 3, 3],
        "always": [4, 4, 4],
    }
    assert peak_inputs(rematerialise(one_f_one_b(3, 4), "always")) == [3, 2, 1]
    assert kept(rematerialise(naive(1, 2), "except_last")) == [
        [Kept(0, 1), Kept(1, 0), Kept(0, 0), Kept(1, 0), Kept(0, 0)]
    ]
    evaluation = forward_only(rematerialise(gpipe(2, 3), "always"))
    assert kept(evaluation) == [[(0, 0)] * 3] * 2 and peak_inputs(evaluation) == peak_stash(evaluation) == [0, 0]


def test_a_rank_that_does_nothing_keeps_nothing() -> None:
    idle = Schedule(1, (0, 2), ((Action("F", 0, 0), Action("B", 0, 0)), (), (Action("F", 1, 0), Action("B", 1, 0))))
    assert peak_stash(idle) == [1, 0, 1] and peak_inputs(idle) == [0, 0, 0]


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
        ({"recompute": 0}, "recompute is 0; a cost is a number, finite and positive"),
        ({"recompute": [1, 1, 1]}, "recompute has 3 costs"),
        ({"queues": "nccl"}, "unknown model of queues 'nccl'"),
    ],
)
def test_costs_that_cannot_be(costs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(gpipe(2, 2), **costs)


def test_a_schedule_that_cannot_run_has_no_price() -> None:
    for price in (simulate, peak_stash, peak_inputs, kept, staircase):
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


def test_a_staircase_with_recomputation() -> None:
    schedule = rematerialise(gpipe(2, 2), "except_last")
    assert staircase(schedule, backward=2) == (
        "rank 0  F0 F1 R0 .  .  .  B0--- B1---\n"
        "rank 1  .  F0 F1 R0 B0--- B1--- .  .\n"
        "simulated: forward 1, backward 2, recompute 1, transfer 0, in slots. F0: forward of micro-batch 0; "
        "R: the same forward once more; a dot: idle."
    )
    assert "R0---" in staircase(schedule, recompute=2)


@given(with_recomputation(), st.integers(1, 3), st.integers(1, 3), st.none() | st.integers(1, 3))
def test_a_staircase_shows_what_the_timeline_holds(
    schedule: Schedule, forward: int, backward: int, recompute: int | None
) -> None:
    timeline = simulate(schedule, forward, backward, recompute=recompute)
    *lanes, legend = staircase(schedule, forward, backward, recompute).split("\n")
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


@pytest.mark.parametrize("costs", [{"forward": 0.5}, {"backward": [1, 1.25]}, {"recompute": 1.25}])
def test_a_staircase_has_whole_slots(costs: dict) -> None:
    with pytest.raises(ValueError, match="is (0.5|1.25); a staircase has whole slots"):
        staircase(naive(2, 1), **costs)
