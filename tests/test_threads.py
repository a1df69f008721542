"""The ranks as threads: they hang exactly where the validator says so, no message is swapped, and errors are named."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from schedule_strategies import random_schedule

from course_utils import threads
from course_utils.checks.report import TookTooLong, time_limit
from course_utils.schedules import Action, Message, Schedule, forward_only, gpipe, looped, one_f_one_b, parse
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transfer import Exchange, PlanMismatch, StepPlan
from course_utils.transformer import CarrySpec
from course_utils.transports import TransferError, WaitTimeout, Worker
from course_utils.validity import QUEUES, Cycle, PostingPlan, posting_plan, validate

# --- A step without a model: each message is one number, its own name -------------------------------------------


class Swapped(AssertionError):
    """A message arrived in the place of another."""


class EarlyClose(AssertionError):
    """A send was taken for acknowledged before its receiver had it."""


class WatchedExchange(Exchange):
    """An exchange that looks whether acknowledged sends really are through."""

    acknowledging = True

    def close(self, sent: Message) -> None:
        if self.acknowledging and not all(operation.done for operation in self.outbox[sent]):
            raise EarlyClose(f"{sent} is still under way")
        super().close(sent)

    def finish(self) -> None:
        self.acknowledging = False
        super().finish()


class InOrderOfNeed(Exchange):
    """A mistake: receives are posted in the order in which this rank needs them."""

    def __init__(self, transport: Any, schedule: Schedule, *others: Any):
        super().__init__(transport, schedule, *others)
        needed = [message for action in schedule.actions[transport.rank] if (message := schedule.received_by(action))]
        for channel in self.to_post:
            self.to_post[channel] = [m for m in reversed(needed) if schedule.channel(m) == channel]


def names_of(schedule: Schedule) -> dict[Message, float]:
    messages = [message for messages in schedule.channels.values() for message in messages]
    return {message: float(number) for number, message in enumerate(messages)}


def one_number_each(schedule: Schedule) -> StepPlan:
    """Every message is (a tensor of one number, nothing)."""
    carry = (CarrySpec(torch.Size([1]), torch.float32, True), None)
    return StepPlan([(1, 1, 1)] * schedule.num_micro_batches, lambda stage, geometry: carry, schedule.num_stages)


def run_rank(
    worker: Worker,
    schedule: Schedule,
    postings: Sequence[PostingPlan],
    exchange_class: type[Exchange] = WatchedExchange,
) -> dict[str, int]:
    """What the pipeline does in a step, without computing anything. Returns how many receives were posted at most."""
    names = names_of(schedule)
    exchange = exchange_class(worker.transport, schedule, one_number_each(schedule), postings[worker.rank], "cpu")
    done: set[Action] = set()
    for number, action in enumerate(schedule.actions[worker.rank], start=1):
        source = schedule.source_of(action)
        if (message := schedule.received_by(action)) is not None:
            (arrived, nothing) = exchange.receive(message)
            assert arrived is not None and nothing is None
            if arrived.item() != names[message]:
                raise Swapped(f"rank {worker.rank} expected {message} and got number {arrived.item():g}")
        elif source is not None and source not in done:
            raise Deadlock(f"{action} needs {source}, which comes later on the same rank")
        done.add(action)
        exchange.begin_action(number)
        if (message := schedule.sent_by(action)) is not None:
            exchange.send(message, (torch.tensor([names[message]]), None))
    exchange.finish()
    assert not exchange.inbox and not exchange.outbox and not any(exchange.to_post.values())
    return exchange.peak_posted


def postings_of(schedule: Schedule) -> list[PostingPlan]:
    """A schedule that hangs has no plan: its receives are posted when they are needed."""
    try:
        return [posting_plan(schedule, rank) for rank in range(schedule.num_ranks)]
    except Cycle:
        return [PostingPlan({}, {})] * schedule.num_ranks


def hangs_in_threads(schedule: Schedule, postings: Sequence[PostingPlan], queues: str) -> bool:
    try:
        run_in_threads(run_rank, schedule.num_ranks, schedule, postings, queues=queues, limit=10)
    except Deadlock:
        return True
    return False


def hangs_by_the_validator(schedule: Schedule, queues: str) -> bool:
    try:
        validate(schedule, queues)
    except Cycle:
        return True
    return False


def compare(seed: int, count: int) -> Counter[tuple[str, bool]]:
    """Run random schedules under all models; how often each hung. AssertionError at the first disagreement."""
    rng = random.Random(seed)
    table: Counter[tuple[str, bool]] = Counter()
    for _ in range(count):
        schedule = random_schedule(rng)
        postings = postings_of(schedule)
        for queues in QUEUES:
            said, seen = hangs_by_the_validator(schedule, queues), hangs_in_threads(schedule, postings, queues)
            assert said == seen, (
                f"{queues}: validator {said}, threads {seen}\n{schedule.rank_of_stage}\n{schedule.to_text()}"
            )
            table[queues, seen] += 1
    return table


def test_threads_hang_exactly_where_the_validator_says_so() -> None:
    """And whatever runs, runs without a swapped message or a send that is taken for acknowledged too early."""
    table = compare(seed=1, count=300)
    for queues in QUEUES:
        assert table[queues, True] > 30 and table[queues, False] > 30


NAMED = [gpipe(4, 8), one_f_one_b(4, 8), one_f_one_b(3, 2), looped(2, 2, 3), looped(3, 2, 2)]


@pytest.mark.parametrize("schedule", NAMED, ids=["gpipe", "1f1b", "1f1b, M < K", "looped", "looped on three"])
@pytest.mark.parametrize("queues", QUEUES)
def test_named_schedules_in_threads(schedule: Schedule, queues: str) -> None:
    expected = hangs_by_the_validator(schedule, queues)
    assert hangs_in_threads(schedule, postings_of(schedule), queues) == expected


@pytest.mark.parametrize("queues", QUEUES)
def test_forward_only_in_threads(queues: str) -> None:
    for schedule in (forward_only(one_f_one_b(4, 5)), forward_only(looped(2, 3, 2))):
        expected = False
        try:
            validate(schedule, queues, forward_only=True)
        except Cycle:
            expected = True
        assert hangs_in_threads(schedule, postings_of(schedule), queues) == expected


def test_receives_in_the_order_of_need_would_swap_messages() -> None:
    """Two borders share the line from rank 0 to rank 1, which needs their messages in another order than they come."""
    schedule = parse("0F0,2F0,0F1,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1")
    validate(schedule)
    postings = [PostingPlan({}, {})] * 2
    run_in_threads(run_rank, 2, schedule, postings, Exchange, limit=10)
    with pytest.raises(Swapped, match="rank 1 expected the activations of micro-batch 1 and got number 1"):
        run_in_threads(run_rank, 2, schedule, postings, InOrderOfNeed, limit=10)


@pytest.mark.parametrize("num_stages, num_micro_batches", [(2, 8), (3, 2), (4, 8), (6, 16)])
def test_how_many_receives_an_exchange_posts(num_stages: int, num_micro_batches: int) -> None:
    """1F1B: activations at most min(M, K - k + 1), gradients at most min(M, K - k). GPipe: all of them."""
    for schedule in (one_f_one_b(num_stages, num_micro_batches), gpipe(num_stages, num_micro_batches)):
        peaks = run_in_threads(run_rank, num_stages, schedule, postings_of(schedule), limit=10)
        for k, peak in enumerate(peaks):
            if schedule == gpipe(num_stages, num_micro_batches):
                first, last = k == 0, k == num_stages - 1
                assert peak == {
                    "activations": 0 if first else num_micro_batches,
                    "gradients": 0 if last else num_micro_batches,
                }
            else:
                assert peak["activations"] <= min(num_micro_batches, num_stages - k + 1)
                assert peak["gradients"] <= min(num_micro_batches, num_stages - k)


def test_in_a_queue_nothing_is_posted_early() -> None:
    peaks = run_in_threads(run_rank, 3, gpipe(3, 4), postings_of(gpipe(3, 4)), queues="directed pair", limit=10)
    assert all(number <= 1 for peak in peaks for number in peak.values())


# --- Deadlocks --------------------------------------------------------------------------------------------------


@pytest.mark.timed
def test_a_deadlock_is_named_within_a_tenth_of_a_second() -> None:
    schedule = one_f_one_b(4, 8)
    postings = postings_of(schedule)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        with pytest.raises(Deadlock) as caught:
            run_in_threads(run_rank, 4, schedule, postings, queues="pair")
        times.append(time.perf_counter() - begin)
        assert str(caught.value).endswith("'s queue: both wait, this is a deadlock")
    assert min(times) < 0.1


def test_the_cycle_of_1f1b_with_one_queue_per_pair() -> None:
    schedule = one_f_one_b(2, 2)
    with pytest.raises(Deadlock) as caught:
        run_in_threads(run_rank, 2, schedule, postings_of(schedule), queues="pair")
    assert str(caught.value) == (
        "stage 0 waits for stage 1 to take the activations of micro-batch 1, which is behind another in stage 1's "
        "queue; stage 1 waits for stage 0 to take the gradients of micro-batch 0, which is behind another in stage 0's "
        "queue: both wait, this is a deadlock"
    )


def both_receive_first(worker: Worker) -> None:
    peer, number = 1 - worker.rank, torch.zeros(1)
    worker.transport.wait(worker.transport.irecv(number, peer, f"letter {peer}"))
    worker.transport.wait(worker.transport.isend(number, peer, f"letter {worker.rank}"))


def test_two_ranks_that_both_receive_first() -> None:
    with pytest.raises(Deadlock) as caught:
        run_in_threads(both_receive_first, 2)
    assert str(caught.value) == (
        "stage 0 waits for letter 1 from stage 1; stage 1 waits for letter 0 from stage 0: "
        "both wait, this is a deadlock"
    )
    verdict = caught.value.verdict
    assert verdict is not None and (verdict.kind, verdict.ranks, verdict.culprit) == ("deadlock", (0, 1), None)


def test_two_ranks_that_both_send_first_and_wait() -> None:
    def both_send_first(worker: Worker) -> None:
        peer, number = 1 - worker.rank, torch.zeros(1)
        worker.transport.wait(worker.transport.isend(number, peer, "a letter"))
        worker.transport.wait(worker.transport.irecv(number, peer, "a letter"))

    with pytest.raises(Deadlock) as caught:
        run_in_threads(both_send_first, 2)
    assert str(caught.value) == (
        "stage 0 waits for stage 1 to take a letter; stage 1 waits for stage 0 to take a letter: "
        "both wait, this is a deadlock"
    )


def test_who_only_waits_for_a_cycle_is_not_named_in_it() -> None:
    def wait_for(worker: Worker) -> None:
        peer = {0: 1, 1: 2, 2: 1, 3: 0}[worker.rank]
        worker.transport.wait(worker.transport.irecv(torch.zeros(1), peer, "a letter"))

    with pytest.raises(Deadlock) as caught:
        run_in_threads(wait_for, 4)
    assert str(caught.value) == (
        "stage 1 waits for a letter from stage 2; stage 2 waits for a letter from stage 1: "
        "both wait, this is a deadlock"
    )


def test_a_circle_of_three() -> None:
    with pytest.raises(Deadlock) as caught:
        run_in_threads(
            lambda worker: worker.transport.wait(
                worker.transport.irecv(torch.zeros(1), (worker.rank + 1) % 3, f"letter {worker.rank}")
            ),
            3,
        )
    assert str(caught.value) == (
        "stage 0 waits for letter 0 from stage 1; stage 1 waits for letter 1 from stage 2; "
        "stage 2 waits for letter 2 from stage 0: all of them wait, this is a deadlock"
    )


@pytest.mark.timed
@pytest.mark.parametrize("others", ["receive", "have ended"])
def test_it_does_not_take_all_ranks_to_wait(others: str) -> None:
    """A circle, or a wait for a rank that has ended, is known at once, although another rank still computes."""
    go_on = threading.Event()

    def step(worker: Worker) -> None:
        if worker.rank == 2:
            go_on.wait(10)
        elif worker.rank == 0 or others == "receive":
            try:
                worker.transport.wait(worker.transport.irecv(torch.zeros(1), 1 - worker.rank, "a letter"))
            finally:
                times.append(time.perf_counter() - begin)
                go_on.set()

    times: list[float] = []
    begin = time.perf_counter()
    with pytest.raises(Deadlock, match="this is a deadlock" if others == "receive" else "stage 1 has ended: it will"):
        run_in_threads(step, 3)
    assert min(times) < 0.1


@pytest.mark.timed
def test_messages_before_it_on_the_same_line_hold_a_message_up() -> None:
    """The gradients are alone in their queue, but on the line they come after activations that never move."""

    class Label(str):
        kind = property(lambda self: self.split()[0])

    def step(worker: Worker) -> None:
        peer, numbers = 1 - worker.rank, torch.zeros(3, 1)
        if worker.rank == 0:
            kept = [
                worker.transport.irecv(numbers[0], peer, Label("activations back")),
                worker.transport.isend(numbers[1], peer, Label("activations forth")),
                worker.transport.isend(numbers[2], peer, Label("gradients")),
            ]
        else:
            kept = [
                worker.transport.irecv(numbers[1], peer, Label("activations forth")),
                worker.transport.isend(numbers[0], peer, Label("activations back")),
                worker.transport.irecv(numbers[2], peer, Label("gradients")),
            ]
            time.sleep(0.5)  # long after it is known
        try:
            worker.transport.wait(kept[-1])
        finally:
            times.append(time.perf_counter() - begin)

    times: list[float] = []
    begin = time.perf_counter()
    with pytest.raises(Deadlock) as caught:
        run_in_threads(step, 2, queues="pair and kind")
    assert str(caught.value) == (
        "stage 0 waits for activations back from stage 1, which is behind another in stage 1's queue; "
        "stage 1 waits for activations forth from stage 0, which is behind another in stage 0's queue: "
        "both wait, this is a deadlock"
    )
    assert min(times) < 0.3


def test_a_message_to_oneself_never_arrives_but_is_named() -> None:
    with pytest.raises(Deadlock, match="stage 0 waits for a letter from stage 0: it waits for itself"):
        run_in_threads(lambda worker: worker.transport.wait(worker.transport.irecv(torch.zeros(1), 0, "a letter")), 1)


@pytest.mark.parametrize("queues", ["buffered", "rank"])
def test_a_send_waits_for_the_send_before_it_in_its_queue(queues: str) -> None:
    """Rank 0 writes to 1 and then to 2; rank 2 writes to 1 after its letter came, and rank 1 wants that one first."""

    def step(worker: Worker) -> None:
        letters: dict[int, list[tuple[str, int]]] = {
            0: [("send", 1), ("send", 2)],
            1: [("recv", 2), ("recv", 0)],
            2: [("recv", 0), ("send", 1)],
        }
        sends = []
        for kind, peer in letters[worker.rank]:
            if kind == "send":
                sends.append(worker.transport.isend(torch.zeros(1), peer, f"letter {worker.rank}{peer}"))
            else:
                worker.transport.wait(worker.transport.irecv(torch.zeros(1), peer, f"letter {peer}{worker.rank}"))
        for operation in sends:
            worker.transport.wait(operation)

    if queues == "buffered":
        run_in_threads(step, 3, queues=queues)
    else:
        with pytest.raises(
            Deadlock, match="stage 2 waits for letter 02 from stage 0, which is behind another in stage 0's queue: all"
        ):
            run_in_threads(step, 3, queues=queues)


def test_a_slow_rank_is_no_deadlock() -> None:
    def slow(worker: Worker) -> float:
        number = torch.full((1,), 7.0 * worker.rank)
        if worker.rank == 1:
            time.sleep(0.3)
            worker.transport.wait(worker.transport.isend(number, 0, "a letter"))
        else:
            worker.transport.wait(worker.transport.irecv(number, 1, "a letter"))
        return number.item()

    assert run_in_threads(slow, 2) == [7.0, 7.0]


# --- Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_in_one_rank_stops_the_others_and_is_the_one_raised(failing: int) -> None:
    class Broken(Exception):
        pass

    ended = []

    def step(worker: Worker) -> None:
        try:
            if worker.rank == failing:
                time.sleep(0.05)  # the others wait by now
                raise Broken("stage is broken")
            worker.transport.wait(worker.transport.irecv(torch.zeros(1), failing, "a letter"))
        except TransferError as error:
            ended.append(str(error))
            raise

    begin = time.perf_counter()
    with pytest.raises(Broken, match="^stage is broken$"):
        run_in_threads(step, 3)
    assert time.perf_counter() - begin < 1
    others = [rank for rank in range(3) if rank != failing]
    assert sorted(ended) == [
        f"stage {rank} waits for a letter from stage {failing}, but stage {failing} failed" for rank in others
    ]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_an_exception_in_the_middle_of_a_step() -> None:
    """Everybody else is in the step: none of them hangs, and what they could not receive is not what is raised."""
    schedule = one_f_one_b(4, 8)
    postings = postings_of(schedule)

    def step(worker: Worker) -> None:
        if worker.rank == 2:
            original = worker.transport.isend

            def isend(tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> Any:
                if isinstance(label, Message) and label.kind == "gradients" and label.micro_batch == 3:
                    raise ZeroDivisionError("the loss is not finite")
                return original(tensor, peer, label, control)

            worker.transport.isend = isend  # type: ignore[method-assign]
        run_rank(worker, schedule, postings)

    begin = time.perf_counter()
    with pytest.raises(ZeroDivisionError, match="the loss is not finite"):
        run_in_threads(step, 4)
    assert time.perf_counter() - begin < 1


def test_a_rank_that_ends_early() -> None:
    def leave(worker: Worker) -> None:
        if worker.rank == 0:
            worker.transport.wait(worker.transport.irecv(torch.zeros(1), 1, "the last letter"))

    with pytest.raises(Deadlock) as caught:
        run_in_threads(leave, 2)
    assert str(caught.value) == (
        "stage 0 waits for the last letter from stage 1, but stage 1 has ended: it will never send"
    )
    verdict = caught.value.verdict
    assert verdict is not None and (verdict.kind, verdict.culprit) == ("abandoned", 1)


def test_a_rank_that_leaves_out_its_last_action() -> None:
    schedule = gpipe(2, 2)
    short = Schedule(2, (0, 1), (schedule.actions[0], schedule.actions[1][:-1]))
    postings = [posting_plan(schedule, rank) for rank in (0, 1)]

    def step(worker: Worker) -> None:
        # Rank 0 still believes in the whole schedule.
        run_rank(worker, schedule if worker.rank == 0 else short, postings)

    with pytest.raises(Deadlock) as caught:
        run_in_threads(step, 2)
    assert str(caught.value) == (
        "stage 0 waits for the gradients of micro-batch 1 from stage 1, but stage 1 has ended: it will never send"
    )


@pytest.mark.parametrize(
    "sent, buffer, words",
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "stage 0 sends a letter as 2x3 float32, stage 1 expects 3x2 float32"),
        (torch.zeros(4), torch.zeros(5), "stage 0 sends a letter as 4 float32, stage 1 expects 5 float32"),
        (torch.zeros(()), torch.zeros(1), "stage 0 sends a letter as a scalar float32, stage 1 expects 1 float32"),
        (torch.zeros(2), torch.zeros(2).to(torch.int64), "as 2 float32, stage 1 expects 2 int64"),
    ],
)
@pytest.mark.parametrize("late", [0, 1])
def test_a_mismatch_of_shape_or_dtype_is_named(sent: torch.Tensor, buffer: torch.Tensor, words: str, late: int) -> None:
    def step(worker: Worker) -> None:
        time.sleep(0.02 * (worker.rank == late))
        if worker.rank == 0:
            worker.transport.wait(worker.transport.isend(sent, 1, "a letter"))
        else:
            worker.transport.wait(worker.transport.irecv(buffer, 0, "a letter"))

    with pytest.raises(TransferError, match=words):
        run_in_threads(step, 2)


def test_a_stage_that_gives_something_else_than_the_plan() -> None:
    schedule = gpipe(2, 1)
    message = Message(0, 1, 0)

    def step(worker: Worker, *tensors: torch.Tensor) -> None:
        postings = postings_of(schedule)
        exchange = Exchange(worker.transport, schedule, one_number_each(schedule), postings[worker.rank], "cpu")
        if worker.rank == 0:
            exchange.send(message, tensors)
        else:
            exchange.receive(message)

    with pytest.raises(PlanMismatch, match=r"stage 0 to 1\): the plan says 1 float32, .* gave 2 float32"):
        run_in_threads(step, 2, torch.zeros(2), None)
    with pytest.raises(PlanMismatch, match="the stage gave nothing"):
        run_in_threads(step, 2, None, None)
    with pytest.raises(PlanMismatch, match="the plan has 2 tensors, the stage gave 1"):
        run_in_threads(step, 2, torch.zeros(1))


def test_a_wait_has_a_limit() -> None:
    def late(worker: Worker) -> None:
        if worker.rank == 0:
            worker.transport.wait(worker.transport.irecv(torch.zeros(1), 1, "a letter"))
        else:
            worker.transport.computing("a long sum")
            time.sleep(0.3)

    with pytest.raises(
        WaitTimeout,
        match=r"^stage 1 is slow: stage 0 waits for it, it has been in a long sum for 0\.\d s; "
        "stage 0 waits for a letter from stage 1: given up after 0.1 s$",
    ):
        run_in_threads(late, 2, limit=0.1)


# --- The rest of what a function on K ranks may rely on ----------------------------------------------------------


def test_results_come_by_rank_and_events_at_once() -> None:
    events: list[tuple[int, str]] = []

    def step(worker: Worker, factor: int) -> int:
        worker.emit("begun")
        assert torch.get_num_threads() == 1
        return factor * worker.rank + worker.world_size

    assert run_in_threads(step, 3, 10, on_event=lambda rank, event: events.append((rank, event))) == [3, 13, 23]
    assert sorted(events) == [(0, "begun"), (1, "begun"), (2, "begun")]
    assert run_in_threads(step, 1, 10) == [1]


def test_messages_between_two_ranks_keep_their_order_and_control_messages_go_apart() -> None:
    def step(worker: Worker) -> list[float]:
        numbers = [torch.full((1,), float(i)) for i in range(4)]
        if worker.rank == 0:
            operations = [worker.transport.isend(number, 1, "data", control=i == 2) for i, number in enumerate(numbers)]
        else:
            numbers = [torch.zeros(1) for _ in range(4)]
            operations = [worker.transport.irecv(numbers[0], 0, "control", control=True)]
            operations += [worker.transport.irecv(number, 0, "data") for number in numbers[1:]]
        for operation in operations:
            worker.transport.wait(operation)
        return [number.item() for number in numbers]

    for queues in QUEUES:
        assert run_in_threads(step, 2, queues=queues)[1] == [2, 0, 1, 3]


def test_what_is_received_is_a_copy() -> None:
    def step(worker: Worker) -> float:
        tensor = torch.full((1,), 5.0)
        if worker.rank == 0:
            worker.transport.wait(worker.transport.isend(tensor, 1, "a letter"))
            tensor.fill_(9.0)
            return 0.0
        buffer = torch.zeros(1)
        worker.transport.wait(worker.transport.irecv(buffer, 0, "a letter"))
        time.sleep(0.02)
        return buffer.item()

    assert run_in_threads(step, 2)[1] == 5.0


def test_arguments_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="world_size is 0"):
        run_in_threads(lambda worker: None, 0)
    with pytest.raises(ValueError, match="unknown model of queues 'nccl'"):
        run_in_threads(lambda worker: None, 2, queues="nccl")


def test_a_rank_that_computes_for_ever_is_given_up_and_named():
    ended = threading.Event()

    def busy(worker: Worker) -> None:
        if worker.rank == 1:
            ended.wait(30)

    try:
        with pytest.raises(
            WaitTimeout, match=r"given up after 0.2 s \(run_limit\): stage 1 computes, stage 0 has ended\n"
        ):
            run_in_threads(busy, 2, run_limit=0.2)
    finally:
        ended.set()


def test_a_rank_that_survives_its_time_out_no_longer_counts_as_waiting():
    """Otherwise the ranks' next waits would look like a deadlock."""

    def patient(worker: Worker) -> str:
        buffer = torch.zeros(1)
        if worker.rank == 0:
            with contextlib.suppress(WaitTimeout):
                worker.transport.wait(worker.transport.irecv(buffer, 1, "what never comes", control=True))
            time.sleep(0.2)
            worker.transport.wait(worker.transport.isend(buffer, 1, "a late letter"))
        else:
            time.sleep(0.15)
            operation = worker.transport.irecv(buffer, 0, "a late letter")
            for _ in range(20):
                with contextlib.suppress(WaitTimeout):
                    worker.transport.wait(operation)
                    return "came"
        return "done"

    assert run_in_threads(patient, 2, limit=0.1) == ["done", "came"]


def test_the_same_deadlock_has_the_same_text_whoever_blocked_first():
    def cycle(worker: Worker, first: int) -> None:
        if worker.rank != first:
            time.sleep(0.02)
        worker.transport.wait(worker.transport.irecv(torch.zeros(1), 1 - worker.rank, "a letter"))

    texts = set()
    for first in (0, 1):
        with pytest.raises(Deadlock) as caught:
            run_in_threads(cycle, 2, first)
        texts.add(str(caught.value))
    assert texts == {
        "stage 0 waits for a letter from stage 1; stage 1 waits for a letter from stage 0: "
        "both wait, this is a deadlock",
    }


def ranks_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rank")]


def computes_for_ever(worker: Worker) -> None:
    while True:
        with contextlib.suppress(Exception):  # a stop must not be one
            sum(range(100))


def test_ranks_that_compute_for_ever_end_with_their_run() -> None:
    with pytest.raises(WaitTimeout, match="given up after 0.3 s"):
        run_in_threads(computes_for_ever, 3, run_limit=0.3)
    assert ranks_left() == []
    with pytest.raises(TookTooLong), time_limit(0.3):
        run_in_threads(computes_for_ever, 3)
    assert ranks_left() == []


def test_the_error_of_a_rank_is_told_although_another_one_computes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_fails(worker: Worker) -> None:
        if worker.rank == 1:
            raise ValueError("of rank 1")
        computes_for_ever(worker)

    monkeypatch.setattr(threads, "LAST_SECONDS", 0.2)
    with pytest.raises(ValueError, match="of rank 1"):
        run_in_threads(one_fails, 2)
    assert ranks_left() == []
