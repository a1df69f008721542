"""Which schedules are refused and why, under which model of queues; when receives are posted, and sends over."""

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedule_strategies import any_valid_schedule, named_schedules, random_schedules

from course_utils.schedules import (
    Action,
    Message,
    Schedule,
    ScheduleError,
    forward_only,
    gpipe,
    looped,
    one_f_one_b,
    parse,
    rematerialise,
)
from course_utils.validity import (
    QUEUES,
    BackwardBeforeForward,
    Cycle,
    DuplicateAction,
    MissingAction,
    Node,
    NotAscending,
    WrongRank,
    dependencies,
    find_cycle,
    issue_order,
    posting_plan,
    validate,
)


def with_rows(schedule: Schedule, rows: list[list[Action]]) -> Schedule:
    return Schedule(schedule.num_micro_batches, schedule.rank_of_stage, tuple(map(tuple, rows)))


def rows_of(schedule: Schedule) -> list[list[Action]]:
    return [list(row) for row in schedule.actions]


def accepts(schedule: Schedule, queues: str) -> bool:
    try:
        validate(schedule, queues)
    except Cycle:
        return False
    return True


# --- Mutations: one fault is put into a schedule that runs, and is found by its name ----------------------------


@given(any_valid_schedule(), st.data())
def test_an_action_is_dropped(schedule: Schedule, data: st.DataObject) -> None:
    rows = rows_of(schedule)
    row = data.draw(st.sampled_from(rows))
    action = row.pop(data.draw(st.integers(0, len(row) - 1)))
    with pytest.raises(MissingAction, match=f"^{action} is missing"):
        validate(with_rows(schedule, rows))


@given(any_valid_schedule(), st.data())
def test_an_action_is_duplicated(schedule: Schedule, data: st.DataObject) -> None:
    rows = rows_of(schedule)
    action = data.draw(st.sampled_from([action for row in rows for action in row]))
    row = data.draw(st.sampled_from(rows))
    row.insert(data.draw(st.integers(0, len(row))), action)
    with pytest.raises(DuplicateAction, match=f"^{action} appears 2 times"):
        validate(with_rows(schedule, rows))


@given(any_valid_schedule(), st.data())
def test_an_action_is_moved_to_another_rank(schedule: Schedule, data: st.DataObject) -> None:
    assume(schedule.num_ranks > 1)
    rows = rows_of(schedule)
    rank = data.draw(st.integers(0, len(rows) - 1))
    action = rows[rank].pop(data.draw(st.integers(0, len(rows[rank]) - 1)))
    other = data.draw(st.sampled_from([r for r in range(len(rows)) if r != rank]))
    rows[other].insert(data.draw(st.integers(0, len(rows[other]))), action)
    with pytest.raises(WrongRank, match=f"^{action} is on rank {other}, but rank {rank} holds stage {action.stage}"):
        validate(with_rows(schedule, rows))


@given(any_valid_schedule(), st.data())
def test_an_action_that_does_not_exist(schedule: Schedule, data: st.DataObject) -> None:
    rows = rows_of(schedule)
    strangers = [
        Action("F", schedule.num_stages, 0),
        Action("B", 0, schedule.num_micro_batches),
        Action("F", -1, 0),
        Action("X", 0, 0),
    ]
    action = data.draw(st.sampled_from(strangers))
    rows[0].append(action)
    with pytest.raises(WrongRank, match=f"^{action} is on rank 0, but the step has"):
        validate(with_rows(schedule, rows))


@given(any_valid_schedule(), st.data())
def test_a_backward_comes_before_its_forward(schedule: Schedule, data: st.DataObject) -> None:
    rows = rows_of(schedule)
    row = data.draw(st.sampled_from(rows))
    forward = data.draw(st.sampled_from([action for action in row if action.kind == "F"]))
    backward = forward._replace(kind="B")
    row.remove(backward)
    row.insert(row.index(forward), backward)
    with pytest.raises(BackwardBeforeForward, match=f"^{backward} comes before {forward}"):
        validate(with_rows(schedule, rows))


@given(any_valid_schedule(), st.data())
def test_two_forwards_or_two_backwards_of_a_stage_are_swapped(schedule: Schedule, data: st.DataObject) -> None:
    rows = rows_of(schedule)
    candidates = [
        (row, action, action._replace(micro_batch=action.micro_batch + 1))
        for row in rows
        for action in row
        if action.micro_batch + 1 < schedule.num_micro_batches
    ]
    candidates = [(row, first, second) for row, first, second in candidates if not pair_between(row, first, second)]
    assume(candidates)
    row, first, second = data.draw(st.sampled_from(candidates))
    i, j = row.index(first), row.index(second)
    row[i], row[j] = second, first
    with pytest.raises(NotAscending, match=f"^{second} comes before {first}"):
        validate(with_rows(schedule, rows))


def pair_between(row: list[Action], first: Action, second: Action) -> bool:
    """Whether swapping them would also put a backward before its forward."""
    between = row[row.index(first) : row.index(second)]
    other = Action("B", *first[1:]) if first.kind == "F" else Action("F", *second[1:])
    return other in between


@given(named_schedules(min_stages=2, min_micro_batches=2), st.data())
def test_two_waits_are_crossed(schedule: Schedule, data: st.DataObject) -> None:
    """Stage k wants the gradients of m before it sends the activations of m + 1; stage k + 1 wants those first."""
    k = data.draw(st.integers(0, schedule.num_stages - 2))
    m = data.draw(st.integers(0, schedule.num_micro_batches - 2))
    rows = rows_of(schedule)
    rows[k].sort(key=lambda action: action.micro_batch > m)
    rows[k + 1].sort(key=lambda action: not (action.kind == "F" and action.micro_batch <= m + 1))
    crossed = with_rows(schedule, rows)
    for queues in QUEUES:
        with pytest.raises(Cycle, match=r"^deadlock \("):
            validate(crossed, queues)


# Each text has the faults of all texts before it, and one that is named before them.
ALL_FAULTS = [
    (None, "0F0,0F1,0F2,0B0,0B1,0B2 | 1F0,1F1,1B0,1F2,1B1,1B2"),
    (Cycle, "0F0,0B0,0F1,0F2,0B1,0B2 | 1F0,1F1,1B0,1F2,1B1,1B2"),
    (NotAscending, "0F0,0B0,0F2,0F1,0B1,0B2 | 1F0,1F1,1B0,1F2,1B1,1B2"),
    (BackwardBeforeForward, "0F0,0B0,0F2,0F1,0B1,0B2 | 1B0,1F0,1F1,1F2,1B1,1B2"),
    (WrongRank, "0F0,0B0,0F2,0F1,0B1 | 1B0,1F0,1F1,1F2,1B1,1B2,0B2"),
    (DuplicateAction, "0F0,0B0,0F2,0F1,0B1 | 1B0,1F0,1F1,1F2,1B1,1B2,0B2,1F0"),
    (MissingAction, "0F0,0B0,0F2,0F1 | 1B0,1F0,1F1,1F2,1B1,1B2,0B2,1F0"),
]


@pytest.mark.parametrize("error, text", ALL_FAULTS)
def test_of_several_faults_the_first_kind_is_named(error: type[ScheduleError] | None, text: str) -> None:
    schedule = parse(text.replace("|", "\n"), rank_of_stage=[0, 1])
    if error is None:
        assert validate(schedule) is schedule
    else:
        with pytest.raises(ScheduleError) as caught:
            validate(schedule)
        assert caught.type is error


def test_the_stages_of_one_rank_wait_for_each_other_too() -> None:
    backwards = "2B0,1B0,0B0"
    assert validate(parse(f"0F0,1F0,2F0,{backwards}"))
    with pytest.raises(Cycle, match="1F0 on rank 0 waits for 0F0 on rank 0"):
        validate(parse(f"1F0,0F0,2F0,{backwards}"))


def test_forward_only() -> None:
    schedule = one_f_one_b(3, 4)
    evaluation = forward_only(schedule)
    for queues in QUEUES:
        assert validate(evaluation, queues, forward_only=True) is evaluation
    with pytest.raises(MissingAction, match="^0B0 is missing"):
        validate(evaluation)
    with pytest.raises(WrongRank, match="^0B0 is on rank 0, but .* the kinds F$"):
        validate(schedule, forward_only=True)


# --- Models of queues -------------------------------------------------------------------------------------------


def test_1f1b_is_a_cycle_with_one_queue_per_pair() -> None:
    validate(one_f_one_b(2, 2), "directed pair")
    validate(one_f_one_b(2, 2), "pair and kind")
    validate(one_f_one_b(2, 1), "pair")
    for queues in ("pair", "rank"):
        with pytest.raises(Cycle) as caught:
            validate(one_f_one_b(2, 2), queues)
        assert str(caught.value) == (
            f"deadlock ({queues}): "
            "the gradients of micro-batch 0 (stage 1 on rank 1 to stage 0 on rank 0) wait for "
            "the activations of micro-batch 1 (stage 0 on rank 0 to stage 1 on rank 1) ahead of them in a queue; "
            "the activations of micro-batch 1 (stage 0 on rank 0 to stage 1 on rank 1) wait for "
            "the gradients of micro-batch 0 (stage 1 on rank 1 to stage 0 on rank 0) ahead of them in a queue"
        )


def test_two_stages_per_rank_are_a_cycle_with_a_queue_per_pair_and_kind() -> None:
    validate(looped(2, 2, 2), "directed pair")
    for queues in ("pair and kind", "pair", "rank"):
        with pytest.raises(Cycle, match="the activations of micro-batch 0 .stage 1 .*the activations of micro-batch 1"):
            validate(looped(2, 2, 2), queues)


def test_on_three_ranks_a_loop_is_a_cycle_only_with_one_queue_per_rank() -> None:
    assert [queues for queues in QUEUES if not accepts(looped(3, 2, 3), queues)] == ["rank"]


@given(named_schedules())
def test_gpipe_and_naive_run_everywhere_1f1b_needs_directions_or_kinds(schedule: Schedule) -> None:
    is_1f1b = schedule == one_f_one_b(schedule.num_stages, schedule.num_micro_batches)
    crosses = is_1f1b and schedule.num_stages > 1 and schedule.num_micro_batches > 1
    for queues in QUEUES:
        assert accepts(schedule, queues) == (not crosses or queues not in ("pair", "rank"))


@settings(max_examples=300)
@given(random_schedules())
def test_coarser_queues_accept_less(schedule: Schedule) -> None:
    accepted = {queues: accepts(schedule, queues) for queues in QUEUES}
    assert accepted["directed pair"] == accepted["buffered"]
    assert accepted["rank"] <= accepted["pair"] <= accepted["pair and kind"] <= accepted["buffered"]


def test_random_schedules_tell_the_models_apart() -> None:
    """Otherwise the two tests above and the one with threads would say little."""
    seen: dict[tuple[str, bool], int] = {}

    @settings(max_examples=300, database=None)
    @given(random_schedules())
    def count(schedule: Schedule) -> None:
        for queues in QUEUES:
            key = queues, accepts(schedule, queues)
            seen[key] = seen.get(key, 0) + 1

    count()
    for queues in QUEUES:
        assert seen[queues, True] > 30 and seen[queues, False] > 30
    numbers = [seen[queues, True] for queues in ("buffered", "pair and kind", "pair", "rank")]
    assert numbers == sorted(set(numbers), reverse=True)


@given(random_schedules())
def test_a_cycle_is_a_chain_of_waits(schedule: Schedule) -> None:
    for queues in QUEUES:
        needs = dependencies(schedule, queues)
        cycle = find_cycle(needs)
        assert (cycle is None) == accepts(schedule, queues)
        for node, other in zip(cycle or [], (cycle or [])[1:] + (cycle or [])[:1], strict=True):
            assert other in needs[node]


@pytest.mark.timed
def test_a_cycle_is_named_within_a_tenth_of_a_second() -> None:
    schedule = one_f_one_b(8, 16)
    fastest = min(seconds_to_refuse(schedule) for _ in range(3))
    assert fastest < 0.1


def seconds_to_refuse(schedule: Schedule) -> float:
    begin = time.perf_counter()
    with pytest.raises(Cycle):
        validate(schedule, "rank")
    return time.perf_counter() - begin


def test_a_model_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown model of queues 'nccl'; there are buffered, directed pair, "):
        validate(gpipe(2, 2), "nccl")


# --- Receives and acknowledgements ------------------------------------------------------------------------------


@given(any_valid_schedule())
def test_receives_are_issued_in_the_order_of_their_sender(schedule: Schedule) -> None:
    for rank in range(schedule.num_ranks):
        program = list(issue_order(schedule, rank))
        assert [node for what, node in program if what == "run"] == list(schedule.actions[rank])
        for channel, messages in schedule.channels.items():
            if channel[1] == rank:
                issued = [node for what, node in program if what == "recv" and schedule.channel(node) == channel]
                assert issued == list(messages)


def ancestors(needs: dict[Node, list[Node]], node: Node) -> set[Node]:
    """All that has surely ended when the node begins."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        for other in needs[todo.pop()]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


@settings(max_examples=60)
@given(any_valid_schedule())
def test_a_receive_is_posted_at_the_last_moment_that_is_early_enough(schedule: Schedule) -> None:
    """Before a message can be sent, its sender must have seen the action at which it is posted, but not the next."""
    needs = dependencies(schedule)
    for rank, row in enumerate(schedule.actions):
        posted_at = posting_plan(schedule, rank).posted_at
        planned = [message for i in sorted(posted_at) for message in posted_at[i]]
        arriving = {channel: messages for channel, messages in schedule.channels.items() if channel[1] == rank}
        for channel, messages in arriving.items():
            assert [message for message in planned if schedule.channel(message) == channel] == list(messages)
        assert len(planned) == sum(map(len, arriving.values()))
        for i, messages in posted_at.items():
            for message in messages:
                seen = ancestors(needs, message)
                assert i == 0 or row[i - 1] in seen
                assert i == len(row) or row[i] not in seen


@settings(max_examples=60)
@given(any_valid_schedule())
def test_what_is_acknowledged_has_been_used(schedule: Schedule) -> None:
    """And as soon as it can be known: at the first message whose sender has surely seen the action that used ours."""
    needs = dependencies(schedule)
    user = {
        message: action for action in needs if isinstance(action, Action) and (message := schedule.received_by(action))
    }
    for rank, row in enumerate(schedule.actions):
        acknowledged_by = posting_plan(schedule, rank).acknowledged_by
        unknown: list[Message] = []
        for action in row:
            if (arrived := schedule.received_by(action)) is not None:
                seen = ancestors(needs, arrived)
                used = [message for message in unknown if user[message] in seen]
                assert list(acknowledged_by[arrived]) == used
                unknown = [message for message in unknown if message not in used]
            if (sent := schedule.sent_by(action)) is not None:
                unknown.append(sent)


def peaks(schedule: Schedule, rank: int) -> dict[str, int]:
    """How many receives of a kind are posted and not yet used at most, and together with what the backwards need."""
    posted_at = posting_plan(schedule, rank).posted_at
    posted = list(posted_at.get(0, ()))
    stash = 0
    highest = {"activations": 0, "gradients": 0, "all that is kept": 0}

    def look() -> None:
        for kind in ("activations", "gradients"):
            highest[kind] = max(highest[kind], sum(message.kind == kind for message in posted))
        highest["all that is kept"] = max(highest["all that is kept"], stash + len(posted))

    look()
    for number, action in enumerate(schedule.actions[rank], start=1):
        if (message := schedule.received_by(action)) is not None:
            posted.remove(message)
        stash += action.kind == "F"
        posted += posted_at.get(number, ())
        look()
        stash -= action.kind == "B"
    return highest


@settings(max_examples=300)
@given(st.integers(1, 8), st.integers(1, 16))
def test_1f1b_posts_few_receives(num_stages: int, num_micro_batches: int) -> None:
    for k in range(num_stages):
        highest = peaks(one_f_one_b(num_stages, num_micro_batches), k)
        assert highest["activations"] <= (min(num_micro_batches, num_stages - k + 1) if k > 0 else 0)
        assert highest["gradients"] <= (min(num_micro_batches, num_stages - k) if k + 1 < num_stages else 0)


def test_1f1b_keeps_a_few_carries_where_gpipe_keeps_all() -> None:
    assert [peaks(one_f_one_b(4, 16), k)["all that is kept"] for k in range(4)] == [8, 6, 5, 3]
    assert [peaks(gpipe(4, 16), k)["all that is kept"] for k in range(4)] == [32, 32, 32, 16]


@given(st.integers(2, 8), st.integers(1, 16))
def test_gpipe_posts_all_receives_of_a_direction_at_once(num_stages: int, num_micro_batches: int) -> None:
    """Activations at the start of the step; gradients when its last forward begins, without which none can be sent."""
    schedule = gpipe(num_stages, num_micro_batches)
    for rank in range(num_stages):
        expected = {}
        if rank > 0:
            expected[0] = schedule.channels[rank - 1, rank]
        if rank + 1 < num_stages:
            expected[num_micro_batches] = schedule.channels[rank + 1, rank]
        assert posting_plan(schedule, rank).posted_at == expected


def test_a_forward_only_step_posts_all_at_the_start() -> None:
    schedule = forward_only(one_f_one_b(3, 4))
    for rank in (1, 2):
        plan = posting_plan(schedule, rank)
        assert plan.posted_at == {0: schedule.channels[rank - 1, rank]}
        assert not any(plan.acknowledged_by.values())


def test_a_schedule_that_hangs_has_no_posting_plan() -> None:
    crossed = parse(ALL_FAULTS[1][1].replace("|", "\n"))
    with pytest.raises(Cycle, match="no posting plan"):
        posting_plan(crossed, 0)


# --- Re-materialisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text", "says"),
    [
        (None, "0F0,0F1,0R0,0B0,0B1", ""),
        (None, "0F0,0F1,0R1,0B0,0B1", ""),  # early is allowed, it only keeps more
        (BackwardBeforeForward, "0R0,0F0,0B0", "0R0 comes before 0F0"),
        (BackwardBeforeForward, "0F0,0B0,0R0", "0B0 comes before 0R0"),
        (DuplicateAction, "0F0,0R0,0R0,0B0", "0R0 appears 2 times"),
        (NotAscending, "0F0,0F1,0R1,0R0,0B0,0B1", "0R1 comes before 0R0"),
        (WrongRank, "0F0,0F1,0R2,0B0,0B1", "0R2 is on rank 0, but the step has"),
        (WrongRank, "0F0,0F1,1R0,0B0,0B1", "1R0 is on rank 0, but the step has"),
    ],
)
def test_recomputation_has_its_place(error: type[ScheduleError] | None, text: str, says: str) -> None:
    num_micro_batches = text.count("F")
    schedule = Schedule(num_micro_batches, (0,), parse(text, [0]).actions)
    if error is None:
        validate(schedule)
    else:
        with pytest.raises(error, match=says):
            validate(schedule)


def test_recomputation_on_another_rank() -> None:
    with pytest.raises(WrongRank, match="0R0 is on rank 1, but rank 0 holds stage 0"):
        validate(parse("0F0,0B0\n1F0,0R0,1B0", [0, 1]))


def test_evaluation_recomputes_nothing() -> None:
    with pytest.raises(WrongRank, match="0R0 is on rank 0.*the kinds F"):
        validate(parse("0F0,0R0"), forward_only=True)


@given(any_valid_schedule())
def test_recomputation_does_not_change_when_receives_are_posted(schedule: Schedule) -> None:
    """A receive for the backward is posted by the action whose send comes first, not by the recomputation."""
    recomputing = rematerialise(schedule, "always")
    for rank in range(schedule.num_ranks):
        plain, recomputed = posting_plan(schedule, rank), posting_plan(recomputing, rank)

        def by_action(plan, row):
            return {row[i - 1] if i else None: messages for i, messages in plan.posted_at.items()}

        assert by_action(plain, schedule.actions[rank]) == by_action(recomputed, recomputing.actions[rank])
        assert plain.acknowledged_by == recomputed.acknowledged_by
