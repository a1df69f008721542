"""Schedules are data: the named ones drawn out literally, their promises for all sizes, and their text form."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_strategies import any_valid_schedule, looped_schedules, named_schedules, random_schedules, sizes

from course_utils.schedules import (
    POLICIES,
    SCHEDULES,
    Action,
    Message,
    Schedule,
    ScheduleError,
    forward_only,
    gpipe,
    looped,
    naive,
    one_f_one_b,
    parse,
    rematerialise,
)
from course_utils.simulation import peak_stash, simulate, staircase
from course_utils.validity import validate

STAIRCASES = {
    ("naive", 2, 2): """
        F0 .  .  B0 F1 .  .  B1
        .  F0 B0 .  .  F1 B1 .
        """,
    ("gpipe", 2, 2): """
        F0 F1 .  .  B0 B1
        .  F0 F1 B0 B1 .
        """,
    ("gpipe", 3, 4): """
        F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .
        """,
    ("gpipe", 4, 2): """
        F0 F1 .  .  .  .  .  .  B0 B1
        .  F0 F1 .  .  .  .  B0 B1 .
        .  .  F0 F1 .  .  B0 B1 .  .
        .  .  .  F0 F1 B0 B1 .  .  .
        """,
    ("1f1b", 2, 3): """
        F0 F1 .  B0 F2 B1 .  B2
        .  F0 B0 F1 B1 F2 B2 .
        """,
    ("1f1b", 3, 4): """
        F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
        """,
    ("1f1b", 4, 8): """
        F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 F6 B3 F7 B4 .  B5 .  B6 .  B7
        .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 .
        .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 .  B7 .  .
        .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 .  .  .
        """,
    ("1f1b", 4, 2): """
        F0 F1 .  .  .  .  .  B0 .  B1
        .  F0 F1 .  .  .  B0 .  B1 .
        .  .  F0 F1 .  B0 .  B1 .  .
        .  .  .  F0 B0 F1 B1 .  .  .
        """,
}


@pytest.mark.parametrize("name, num_stages, num_micro_batches", STAIRCASES)
def test_the_staircase_looks_like_this(name: str, num_stages: int, num_micro_batches: int) -> None:
    lanes = staircase(SCHEDULES[name](num_stages, num_micro_batches)).split("\n")[:-1]
    picture = STAIRCASES[name, num_stages, num_micro_batches].strip().split("\n")
    assert lanes == [f"rank {rank}  {row.strip()}" for rank, row in enumerate(picture)]


def test_a_looped_schedule_goes_round_the_ranks() -> None:
    assert looped(2, 2, 2).rank_of_stage == (0, 1, 0, 1)
    assert staircase(looped(2, 2, 2)).split("\n")[:-1] == [
        "rank 0  0F0 0F1 2F0 2F1 .   .   2B0 2B1 0B0 0B1",
        "rank 1  .   1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1 .",
    ]


@settings(max_examples=300)
@given(named_schedules())
def test_named_schedules_are_complete_and_valid(schedule: Schedule) -> None:
    validate(schedule)
    num_stages, num_micro_batches = schedule.num_stages, schedule.num_micro_batches
    for stage, row in enumerate(schedule.actions):
        assert sorted(row) == sorted(Action(kind, stage, m) for kind in "FB" for m in range(num_micro_batches))
    assert schedule.rank_of_stage == tuple(range(num_stages))


@settings(max_examples=60)
@given(looped_schedules())
def test_looped_schedules_are_complete_and_valid(schedule: Schedule) -> None:
    validate(schedule)
    assert sum(map(len, schedule.actions)) == 2 * schedule.num_stages * schedule.num_micro_batches


@settings(max_examples=300)
@given(sizes)
def test_gpipe_and_1f1b_take_the_same_time(size: tuple[int, int]) -> None:
    num_stages, num_micro_batches = size
    for forward, backward in ((1, 1), (1, 2), (3, 5)):
        expected = (num_micro_batches + num_stages - 1) * (forward + backward)
        for schedule in (gpipe(*size), one_f_one_b(*size)):
            timeline = simulate(schedule, forward, backward)
            assert timeline.makespan == expected
            assert timeline.bubble_of_total == (num_stages - 1) / (num_micro_batches + num_stages - 1)
            assert timeline.bubble_of_ideal == pytest.approx((num_stages - 1) / num_micro_batches, rel=1e-12)
        assert simulate(naive(*size), forward, backward).makespan == num_stages * num_micro_batches * (
            forward + backward
        )


@settings(max_examples=300)
@given(sizes)
def test_1f1b_keeps_less(size: tuple[int, int]) -> None:
    num_stages, num_micro_batches = size
    assert peak_stash(gpipe(*size)) == [num_micro_batches] * num_stages
    assert peak_stash(one_f_one_b(*size)) == [min(num_micro_batches, num_stages - k) for k in range(num_stages)]
    assert peak_stash(naive(*size)) == [1] * num_stages


def test_published_figures_of_four_stages_and_eight_micro_batches() -> None:
    for schedule, stash in ((one_f_one_b(4, 8), [4, 3, 2, 1]), (gpipe(4, 8), [8, 8, 8, 8])):
        assert simulate(schedule).makespan == 22
        assert simulate(schedule).bubble_of_total == 3 / 11
        assert simulate(schedule).bubble_of_ideal == 3 / 8
        assert simulate(schedule, forward=1, backward=2).makespan == 33
        assert peak_stash(schedule) == stash


@given(any_valid_schedule())
def test_text_round_trip(schedule: Schedule) -> None:
    assert parse(schedule.to_text()) == schedule
    assert parse(schedule.to_text(), schedule.rank_of_stage) == schedule
    assert parse(" \t" + schedule.to_text().replace(",", " ,  ").replace("\n", "\r\n") + "\r\n") == schedule


@given(random_schedules())
def test_the_text_form_also_holds_schedules_that_hang(schedule: Schedule) -> None:
    assert parse(schedule.to_text()) == schedule


def test_the_text_form_is_that_of_torch() -> None:
    assert one_f_one_b(2, 2).to_text() == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1"


def test_a_rank_may_do_nothing() -> None:
    schedule = Schedule(1, (0, 2), ((Action("F", 0, 0), Action("B", 0, 0)), (), (Action("F", 1, 0), Action("B", 1, 0))))
    assert parse(schedule.to_text()) == validate(schedule)
    assert staircase(schedule).split("\n")[1] == "rank 1  .  .  .  ."


@pytest.mark.parametrize(
    "text, words",
    [
        ("0F0,0X0", "'0X0' in line 1"),
        ("0F0,0B0\n1F0,B0", "'B0' in line 2"),
        ("0F0,0F", "'0F' in line 1"),
        ("0F-1", "'0F-1' in line 1"),
        ("0FB0", "'0FB0' in line 1"),
        ("0F0 0B0", "'0F0 0B0' in line 1"),
        ("", "no action"),
        ("\n , \n", "no action"),
        ("0F0,0B0\n2F0,2B0", "stage 1 has no action"),
    ],
)
def test_text_that_is_no_schedule(text: str, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        parse(text)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [(0, 4), (-1, 4), (2, 0), (2, -3)])
def test_sizes_below_one(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf" is {min(size)}; it must be at least 1"):
        SCHEDULES[name](*size)


def test_sizes_of_looped_below_one() -> None:
    for sizes_below in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match=" is 0"):
            looped(*sizes_below)


def test_one_stage_and_one_micro_batch() -> None:
    for make in SCHEDULES.values():
        assert make(1, 1).to_text() == "0F0,0B0"
        assert make(1, 1).channels == {}


def test_messages_cross_only_between_ranks() -> None:
    schedule = Schedule(1, (0, 0, 1), parse("0F0,1F0,1B0,0B0\n2F0,2B0").actions)
    assert schedule.received_by(Action("F", 1, 0)) is None
    assert schedule.source_of(Action("F", 1, 0)) == Action("F", 0, 0)
    assert schedule.target_of(Action("F", 2, 0)) is None and schedule.source_of(Action("B", 2, 0)) is None
    assert schedule.stages_of(0) == [0, 1] and schedule.stages_of(1) == [2]
    assert schedule.channels == {(0, 1): (Message(1, 2, 0),), (1, 0): (Message(2, 1, 0),)}
    assert [str(message) for message in (Message(1, 2, 0), Message(2, 1, 0))] == [
        "the activations of micro-batch 0",
        "the gradients of micro-batch 0",
    ]


@given(any_valid_schedule())
def test_each_message_is_sent_and_received_once(schedule: Schedule) -> None:
    actions = [action for row in schedule.actions for action in row]
    sent = [message for action in actions if (message := schedule.sent_by(action))]
    received = [message for action in actions if (message := schedule.received_by(action))]
    assert sorted(sent) == sorted(received) == sorted(set(sent))
    assert sorted(sent) == sorted(message for messages in schedule.channels.values() for message in messages)


@given(any_valid_schedule())
def test_forward_only_leaves_the_order_of_the_forwards(schedule: Schedule) -> None:
    evaluation = forward_only(schedule)
    assert validate(evaluation, forward_only=True) == evaluation
    for row, whole in zip(evaluation.actions, schedule.actions, strict=True):
        assert list(row) == [action for action in whole if action.kind == "F"]
    assert peak_stash(evaluation) == [0] * schedule.num_ranks


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_the_text_of_a_schedule_with_an_idle_rank(idle):
    rows = list(gpipe(2, 3).actions)
    rows.insert(idle, ())
    ranks = tuple(rank for rank in range(3) if rank != idle)
    schedule = Schedule(3, ranks, tuple(rows))
    assert parse(schedule.to_text(), ranks) == parse(schedule.to_text()) == schedule


def test_an_indented_text_has_no_rank_too_many():
    text = """
        0F0,0B0
        1F0,1B0
        """
    assert parse(text) == gpipe(2, 1)


# --- Re-materialisation ----------------------------------------------------------------------------------------------


@given(any_valid_schedule(), st.sampled_from(POLICIES))
def test_recomputation_stands_directly_before_its_backward(schedule: Schedule, policy: str) -> None:
    recomputing = rematerialise(schedule, policy)
    assert validate(recomputing).num_micro_batches == schedule.num_micro_batches
    last = schedule.num_micro_batches - 1
    for row, original in zip(recomputing.actions, schedule.actions, strict=True):
        assert [action for action in row if action.kind != "R"] == list(original)
        for i, action in enumerate(row):
            if action.kind == "B":
                wanted = policy == "always" or (policy == "except_last" and action.micro_batch != last)
                assert (row[i - 1] == action._replace(kind="R")) == wanted
        if policy != "never":
            assert {a.micro_batch for a in row if a.kind == "R"} == set(range(last + (policy == "always"))) or not row


@given(any_valid_schedule())
def test_recomputation_sends_nothing_and_vanishes_in_evaluation(schedule: Schedule) -> None:
    recomputing = rematerialise(schedule, "always")
    assert recomputing.channels == schedule.channels
    assert forward_only(recomputing) == forward_only(schedule)
    assert parse(recomputing.to_text(), schedule.rank_of_stage) == recomputing


def test_the_text_of_a_recomputing_schedule() -> None:
    assert rematerialise(gpipe(1, 2), "except_last").to_text() == "0F0,0F1,0R0,0B0,0B1"


def test_a_policy_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'sometimes' of re-materialisation; there are never, always, except_last"):
        rematerialise(gpipe(2, 2), "sometimes")
