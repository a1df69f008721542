"""Real processes whose messages move in queues: they hang where threads hang and say the same; the rest runs alike."""

import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch

from course_utils import _status_file, queued
from course_utils.emulation import emulate
from course_utils.links import exchange, receive, send
from course_utils.pipeline import Pipeline
from course_utils.processes import Run, StageError, launch, start
from course_utils.queued import QueuedTransport, Turn, launch_with_queues, with_queues
from course_utils.schedules import Action, Message, Schedule, forward_only, gpipe, looped, one_f_one_b
from course_utils.simulation import simulate
from course_utils.threads import Deadlock, run_in_threads
from course_utils.timeline import Timeline
from course_utils.training import train
from course_utils.transfer import Exchange, StepPlan
from course_utils.transformer import CarrySpec
from course_utils.transports import Operation, TorchTransport, Worker
from course_utils.validity import QUEUES, Cycle, PostingPlan, validate
from course_utils.waits import Snapshot
from tests import models
from tests.models import TINY_RUN, gradients_of, one_step
from tests.schedule_strategies import random_schedule
from tests.test_threads import compare

for module in (sys.modules[__name__], models):  # the workers need not import these files, and pytest with them
    cloudpickle.register_pickle_by_value(module)

IT_HUNG = 60.0  # seconds; nothing here takes nearly as long
Case = tuple[Schedule, str]  # and a model of queues


def run_rank(worker: Worker, schedule: Schedule) -> None:
    """The messages of a step: each is one number, its own name, and is received when it is needed."""
    names = {m: n for n, m in enumerate(message for channel in schedule.channels.values() for message in channel)}
    carry = CarrySpec(torch.Size([1]), torch.float32, True), None
    plan = StepPlan([(1, 1, 1)] * schedule.num_micro_batches, lambda *_: carry, schedule.num_stages)
    messages = Exchange(worker.transport, schedule, plan, PostingPlan({}, {}), "cpu")
    for action in schedule.actions[worker.rank]:
        if (needed := schedule.received_by(action)) is not None:
            arrived = messages.receive(needed)[0]
            if arrived is None or arrived.item() != names[needed]:
                raise ValueError(f"rank {worker.rank} expected {needed}, number {names[needed]}, and got {arrived}")
        worker.transport.computing(str(action))
        if (sent := schedule.sent_by(action)) is not None:
            messages.send(sent, (torch.tensor([float(names[sent])]), None))
    messages.finish()


def runs(schedule: Schedule, queues: str) -> bool:
    try:
        validate(schedule, queues, forward_only="B" not in schedule.to_text())
    except Cycle:
        return False
    return True


def timeless(text: object) -> str:
    return re.sub(r" \(for \d+\.\d s\)", "", str(text))


def deadlock_in_threads(schedule: Schedule, queues: str) -> str:
    """Its sentence, or nothing if the schedule runs."""
    try:
        run_in_threads(run_rank, schedule.num_ranks, schedule, queues=queues, limit=IT_HUNG)
    except Deadlock as deadlock:
        return timeless(deadlock)
    return ""


# --- The two cases that everybody meets -----------------------------------------------------------------------------

# pytorch#172668: "rank 0: [... 0SendF1, 2RecvF0, 2F0]  rank 1: [... 1SendF0, 1RecvF1, 1F1]"
BOTH_SEND_FIRST = forward_only(looped(2, 2, 2))
TWO_MESSAGES = (
    "rank 0 waits for rank 1 to take the activations of micro-batch 1, which is behind another in rank 1's queue; "
    "rank 1 waits for rank 0 to take the activations of micro-batch 0, which is behind another in rank 0's queue: "
    "both wait, this is a deadlock"
)


@pytest.mark.parametrize("queues", QUEUES)
def test_both_send_first_is_a_cycle_of_two_messages(queues: str) -> None:
    """Only if one queue carries what goes to a peer and what comes from it."""
    assert [row[:3] for row in BOTH_SEND_FIRST.actions] == [
        (Action("F", 0, 0), Action("F", 0, 1), Action("F", 2, 0)),
        (Action("F", 1, 0), Action("F", 1, 1), Action("F", 3, 0)),
    ]
    hangs = queues in ("pair and kind", "pair", "rank")
    assert runs(BOTH_SEND_FIRST, queues) == (not hangs)
    assert deadlock_in_threads(BOTH_SEND_FIRST, queues) == (TWO_MESSAGES if hangs else "")
    if hangs:
        with pytest.raises(Cycle) as caught:
            validate(BOTH_SEND_FIRST, queues, forward_only=True)
        assert str(caught.value).count(" ahead of them in a queue") == 2 and ";" in str(caught.value)


SLOW = (1.0, 1.0, 12.0)  # of the forward on each stage: the last one is busy when its second message comes


def waits_for_the_last_stage(timeline: Timeline) -> bool:
    """Whether rank 1 computes with its third message only after rank 2 is through with its first micro-batch."""
    begins = {(kind, stage, m): start for _, kind, stage, m, start, _ in timeline}
    ends = {(kind, stage, m): end for _, kind, stage, m, _, end in timeline}
    return begins["F", 1, 2] >= ends["F", 2, 0]


def test_only_a_simulation_with_queues_shows_the_bubble_at_the_head_of_a_queue() -> None:
    """pytorch#188833 is no hang: the schedule is valid, and runs, under every model; it is only slower."""
    schedule = gpipe(3, 3)
    held_up = {q: waits_for_the_last_stage(simulate(schedule, forward=SLOW, queues=q)) for q in QUEUES}
    assert held_up == dict.fromkeys(QUEUES, False) | {"rank": True}
    assert all(runs(schedule, q) and not deadlock_in_threads(schedule, q) for q in QUEUES)


@pytest.mark.processes
@pytest.mark.parametrize("queues", ["buffered", "rank"])
def test_real_processes_have_that_bubble_too(queues: str) -> None:
    """No time is compared that a busy machine could change: in the queue one thing follows from the other."""
    slow = [0.05 * seconds for seconds in SLOW]
    run = partial(launch_with_queues, queues=queues, limit=IT_HUNG)
    timeline = emulate(gpipe(3, 3), forward=slow, backward=0.001, message_shape=(1,), steps=1, run=run)
    assert waits_for_the_last_stage(timeline) == (queues == "rank")


# --- A machine of one thread: every order of events, every moment of a look -------------------------------------------


class Machine:
    """Ranks with the real `QueuedTransport` and the real status file, in one thread.

    gloo and the threads that wait for it are played: a message is through, on each side for itself, some time after
    both sides have begun it. What happens next is drawn, and so is when a look at the file goes on.
    """

    def __init__(self, case: Case, rng: random.Random, path: Path, patch: pytest.MonkeyPatch):
        schedule, queues = case
        self.rng, self.path, self.num_ranks = rng, path, schedule.num_ranks
        self.begun: dict[tuple[int, int], dict[str, list[str]]] = {}  # what gloo has been given per channel
        self.moving: list[tuple[Callable, tuple]] = []  # what would be a thread
        self.look = self.looking()
        self.claims: list[Snapshot] = []
        patch.setattr(queued.dist, "isend", partial(self.given, "send"))
        patch.setattr(queued.dist, "irecv", partial(self.given, "recv"))
        patch.setattr(queued, "threading", SimpleNamespace(Thread=self.thread, Lock=threading.Lock))
        _status_file.create(path, self.num_ranks)
        self.records = [_status_file.StatusRecord(path, rank, self.num_ranks) for rank in range(self.num_ranks)]
        for record in self.records:
            for name in ("write", "issued", "held_up", "moves"):
                patch.setattr(record, name, partial(self.looked_at, getattr(record, name)))
        self.ranks = [Rank(rank, self.num_ranks, record, queues) for rank, record in enumerate(self.records)]
        self.scripts = [self.script(rank, schedule) for rank in self.ranks]

    def looked_at(self, write: Callable, *arguments: Any) -> None:
        """Before and after each write a look may go on."""
        self.go_on_looking()
        write(*arguments)
        self.go_on_looking()

    def go_on_looking(self) -> None:
        if self.rng.random() < 0.5:
            next(self.look)

    def looking(self) -> Iterator[None]:
        """`_status_file.read`, with a pause between any two ranks."""
        size = _status_file.record_words(self.num_ranks) * _status_file.WORD
        while True:
            records, queues = [], []
            with self.path.open("rb") as file:
                data = _status_file.mmap.mmap(file.fileno(), 0, access=_status_file.mmap.ACCESS_READ)
            order = list(range(self.num_ranks))
            for rank in order:
                records.append(_status_file.read_record(data, rank * size, size))
                yield
            for rank in order:
                queues.append(_status_file.read_queues(data, rank * size, self.num_ranks))
                yield
            look = _status_file.Look(records, queues, time.monotonic_ns())
            snapshot = Snapshot([look.state_of(rank) for rank in order], "rank")
            if any(is_circle for _, is_circle in snapshot.chains):
                self.claims.append(snapshot)

    def given(self, kind: str, tensor: torch.Tensor, peer: int, group: Any) -> object:
        rank, label = group
        channel = (rank, peer) if kind == "send" else (peer, rank)
        self.begun.setdefault(channel, {"send": [], "recv": []})[kind].append(label)
        for sent, received in zip(*self.begun[channel].values(), strict=False):
            assert sent == received, "gloo would give a message to the wrong receive"
        return SimpleNamespace(wait=lambda limit: None)

    def thread(self, target: Callable, args: tuple, **_: Any) -> Any:
        return SimpleNamespace(start=lambda: self.moving.append((target, args)))

    def script(self, rank: "Rank", schedule: Schedule) -> Iterator[Operation | None]:
        """What `run_rank` does: gives an operation that it waits for, or nothing between two steps."""
        transport, sends = rank.transport, []
        to_post = {c: list(messages) for c, messages in schedule.channels.items() if c[1] == rank.rank}
        receives: dict[Message, Operation] = {}
        for action in schedule.actions[rank.rank]:
            if (needed := schedule.received_by(action)) is not None:
                source = schedule.channel(needed)[0]
                while needed not in receives:
                    message = to_post[source, rank.rank].pop(0)
                    receives[message] = transport.irecv(rank.tensor(message), source, message)
                    yield None
                yield receives[needed]
            transport.computing(str(action))
            if (sent := schedule.sent_by(action)) is not None:
                sends.append(transport.isend(rank.tensor(sent), schedule.channel(sent)[1], sent))
            yield None
        yield from sends

    def run(self) -> None:
        """Until nothing can happen any more."""
        waits: dict[int, Operation | None] = dict.fromkeys(range(self.num_ranks))
        while True:
            events: list[Callable[[], Any]] = []
            for index, (_, (operation, _)) in enumerate(self.moving):
                if self.is_met(operation):
                    events.append(partial(self.end, index))
            for rank, wait in waits.items():
                if wait is None or (wait.work.is_over.is_set() if isinstance(wait.work, Turn) else self.is_met(wait)):
                    events.append(partial(self.go_on, rank, waits))
            if not events:
                return
            self.rng.choice(events)()

    def is_met(self, operation: Operation) -> bool:
        """Whether the other side has begun it too."""
        return len(self.begun[operation.channel]["recv" if operation.kind == "send" else "send"]) >= operation.number

    def end(self, index: int) -> None:
        target, arguments = self.moving.pop(index)
        target(*arguments)

    def go_on(self, rank: int, waits: dict[int, Operation | None]) -> None:
        """Leave a wait, do the next step, and enter the next wait."""
        if waits[rank] is not None:
            self.records[rank].computing()
        try:
            waits[rank] = wait = next(self.scripts[rank])
        except StopIteration:
            self.records[rank].ended()
            del waits[rank]
            return
        if wait is not None:
            self.ranks[rank].begin_to_wait(wait)

    def circles(self) -> set[str]:
        """All that the file tells in the end, in words."""
        snapshot = Snapshot(*_status_file.read(self.path, self.num_ranks))
        return {timeless(snapshot.of_circle(path)) for path, is_circle in snapshot.chains if is_circle}


class Rank:
    """A rank of the machine. The "group" of its messages is its number and the message: all that gloo is told."""

    def __init__(self, rank: int, num_ranks: int, record: _status_file.StatusRecord, queues: str):
        self.rank, self.groups = rank, dict[tuple, Any]()
        self.inner = TorchTransport(rank, num_ranks, None, record)
        self.transport = QueuedTransport(self.inner, queues)

    def tensor(self, message: Message) -> torch.Tensor:
        self.inner.data_group = (self.rank, str(message) + str(message.source))
        return torch.zeros(1)

    def begin_to_wait(self, operation: Operation) -> None:
        """The first half of `QueuedTransport.wait`; the second half of it would wait."""

        class Waits(Exception):
            pass

        def stop() -> None:
            raise Waits

        real, operation.work.wait = operation.work.wait, stop
        try:
            self.transport.wait(operation)
        except Waits:
            operation.work.wait = real


def drawn(rng: random.Random, queues: str, hangs: bool) -> Schedule:
    """A random schedule that runs, or one that hangs: where it can, for its queues alone."""
    while True:
        schedule = random_schedule(rng, may_hang=hangs and queues in ("buffered", "directed pair"))
        is_small = 2 <= schedule.num_ranks <= 3 and 2 <= schedule.num_micro_batches <= 5
        if is_small and runs(schedule, queues) != hangs and bool(deadlock_in_threads(schedule, queues)) == hangs:
            return schedule


def random_cases(seed: int, count: int, hangs: bool) -> list[Case]:
    """As many for each model."""
    rng = random.Random(seed)
    return [(drawn(rng, queues, hangs), queues) for _ in range(count) for queues in QUEUES]


def played(case: Case, seed: int, path: Path) -> Machine:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(case, random.Random(seed), path, patch)
        machine.run()
    return machine


@pytest.mark.parametrize("hangs", [False, True], ids=["runs", "hangs"])
def test_a_deadlock_is_said_if_and_only_if_there_is_one(hangs: bool, tmp_path: Path) -> None:
    """Whenever the ranks were read, one after another while they went on: a circle that was seen is there in the end.

    And in the end the file tells of the same circle as threads, which know every message.
    """
    early = 0
    for number, case in enumerate(random_cases(5, 20, hangs)):
        machine = played(case, number, tmp_path / "status")
        circles = machine.circles()
        said = {timeless(c.of_circle(path)) for c in machine.claims for path, is_circle in c.chains if is_circle}
        assert said <= {text.replace("stage", "rank") for text in circles}, case
        assert bool(circles) == hangs, case
        assert not hangs or deadlock_in_threads(*case) in circles, case
        early += bool(said)
        states, _ = _status_file.read(tmp_path / "status", machine.num_ranks)
        assert hangs or {state.state for state in states} == {"ended"}
    assert not hangs or early > 5  # so that there was something to be wrong about


def test_what_the_file_says_of_queues(tmp_path: Path) -> None:
    """One wait behind another of its own rank, one behind another of the other side, one that is under way."""
    path = tmp_path / "status"
    _status_file.create(path, 3)
    assert _status_file.read_model(path, 3) == "buffered"
    records = [_status_file.StatusRecord(path, rank, 3) for rank in range(3)]
    for record in records:
        record.queues("rank")
    assert _status_file.read_model(path, 3) == "rank"

    def issued(kind: str, rank: int, peer: int, label: str) -> Operation:
        operation = Operation(kind, rank, peer, label, torch.zeros(1), False)
        records[rank].issued(operation)
        return operation

    def ahead_of(rank: int) -> list[str]:
        """The waits that a rank depends on, its own first."""
        states, noun = _status_file.read(path, 3)
        chain, is_circle = Snapshot(states).chains[[s.rank for s in states if s.blocked].index(rank)]
        assert not is_circle and chain[-1].under_way is None
        return [f"{wait.rank} {wait.now(noun, with_time=False)}" for wait in chain]

    to_one, from_two = issued("send", 0, 1, "a long " + "lööng " * 60), issued("recv", 0, 2, "letter 2")
    records[0].held_up([(from_two, to_one)])
    records[0].waiting(from_two)
    first, second = ahead_of(0)
    assert first == "0 waits for letter 2 from stage 2, behind another in its queue"
    assert second.startswith("0 waits for stage 1 to take a long lööng ") and len(second) < 256

    from_zero, to_two = issued("recv", 1, 0, "a letter"), issued("send", 1, 2, "letter 1")
    later = issued("recv", 1, 0, "what comes after it")
    records[1].held_up([(from_zero, to_two)])
    assert ahead_of(0)[1:] == [
        second + ", which is behind another in stage 1's queue",
        "1 waits for stage 2 to take letter 1",
    ]
    records[1].held_up([(later, to_two)])  # `from_zero` moves: what is behind it is not in its way
    records[0].held_up([])
    records[0].waiting(to_one)
    wait = _status_file.read(path, 3)[0][0].wait
    assert wait is not None and wait.ahead is None and wait.under_way is not None
    time.sleep(0.05)
    records[1].moves(from_zero)  # it was held up until now
    wait = _status_file.read(path, 3)[0][0].wait
    assert wait is not None and wait.under_way is not None and wait.under_way < 0.05


def test_what_is_held_up_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If its writer dies in the middle of the next, and if it comes round while it is read."""
    path, size = tmp_path / "status", _status_file.record_words(2) * _status_file.WORD
    _status_file.create(path, 2)
    record = _status_file.StatusRecord(path, 1, 2)
    first, second, third = (Operation("recv", 1, 0, f"letter {n}", torch.zeros(1), False, number=n) for n in (1, 2, 3))
    record.held_up([(second, first)])

    class Dies:
        size = _status_file.HELD_UP.size

        @staticmethod
        def pack_into(buffer: Any, place: int, *values: Any) -> None:
            raise KeyboardInterrupt

    class Overtaken(_status_file.mmap.mmap):
        times = 0

        def __getitem__(self, place: Any) -> Any:
            data = super().__getitem__(place)
            self.times += 1
            if self.times == 1:
                record.held_up([])
                record.held_up([(third, second)])
                return data[:5] + super().__getitem__(place)[5:]
            return data

    with monkeypatch.context() as patch:
        patch.setattr(_status_file, "HELD_UP", Dies)
        with pytest.raises(KeyboardInterrupt):
            record.held_up([(third, first), (second, first)])
    with path.open("rb") as file, Overtaken(file.fileno(), 0, access=_status_file.mmap.ACCESS_READ) as mapped:
        plain = bytes(mapped)
        assert _status_file.read_queues(plain, size, 2) == {(False, 0, 2): (False, 0, 1, "letter 1")}  # type: ignore[arg-type]
        assert _status_file.read_queues(mapped, size, 2) == {(False, 0, 3): (False, 0, 2, "letter 2")}
        assert mapped.times == 2


# --- Real processes that hang ---------------------------------------------------------------------------------------


NUM_HANGING = 10


@cache
def hanging_cases() -> list[Case]:
    """Ten: named schedules, and random ones of which each hangs in another way, one of them in a circle of three."""
    cases = [
        (BOTH_SEND_FIRST, "pair"),
        (one_f_one_b(2, 2), "pair"),
        (one_f_one_b(3, 4), "rank"),
        (looped(2, 2, 3), "pair and kind"),
    ]
    rng = random.Random(7)
    known = {deadlock_in_threads(*case) for case in cases}
    for queues, who in [*[(queues, "") for queues in QUEUES], ("rank", "all of them wait")]:
        sentence = ""
        while sentence in known | {""} or who not in sentence:
            schedule = drawn(rng, queues, hangs=True)
            sentence = deadlock_in_threads(schedule, queues)
        known.add(sentence)
        cases.append((schedule, queues))
    return cases


@pytest.mark.processes
@pytest.mark.parametrize("number", range(NUM_HANGING))
def test_what_hangs_in_threads_hangs_in_processes_and_says_the_same(number: int, tmp_path: Path) -> None:
    """The cycle, with the heads of the queues in it; long before anybody's wait has run out."""
    schedule, queues = hanging_cases()[number]
    began = time.monotonic()
    with pytest.raises(StageError) as caught:
        launch_with_queues(run_rank, schedule.num_ranks, schedule, queues=queues, wait_limit=3600.0, limit=IT_HUNG)
    assert time.monotonic() - began < IT_HUNG
    error = caught.value
    assert error.verdict is not None and (error.kind, error.verdict.kind, error.rank) == ("stopped", "deadlock", None)
    in_threads, circles = deadlock_in_threads(schedule, queues), played((schedule, queues), 1, tmp_path / "s").circles()
    assert {in_threads, timeless(error.verdict)} <= circles
    assert len(circles) > 1 or timeless(error.verdict) == in_threads
    first, note, *lines = str(error).replace("\n\n", "\n").split("\n")
    assert first == str(error.verdict)
    assert note == (
        f"the run was ended, because it cannot go on (queues by {queues} imitated, messages real; NCCL buffers small "
        "messages, so on GPUs such a schedule may hang)"
    )
    assert lines[0] == "at that moment:" and len(lines) == 1 + schedule.num_ranks


def test_those_that_hang_are_of_every_sort() -> None:
    sentences = [deadlock_in_threads(*case) for case in hanging_cases()]
    assert len(sentences) == NUM_HANGING and {queues for _, queues in hanging_cases()} == set(QUEUES)
    for words in (", behind another in its queue", "'s queue", "both wait", "all of them wait"):
        assert any(words in text for text in sentences), words
    assert len(set(sentences)) == NUM_HANGING - 1  # one under two models


class Label(str):
    """Of a message without a schedule: its first word is its kind."""

    @property
    def kind(self) -> str:
        return self.split()[0]


def behind_another_on_its_line(worker: Worker) -> None:
    """The gradients are alone in their queue, but on the line they come after activations that never move."""
    transport, peer, one = worker.transport, 1 - worker.rank, torch.zeros(1)
    if worker.rank == 0:
        transport.irecv(one.clone(), peer, Label("activations back"))
        transport.isend(one, peer, Label("activations forth"))
        transport.wait(transport.isend(one, peer, Label("gradients")))
    else:
        transport.irecv(one.clone(), peer, Label("activations forth"))
        transport.isend(one, peer, Label("activations back"))
        transport.irecv(one.clone(), peer, Label("gradients"))
        time.sleep(0.5)  # it waits for nothing: only its queues do


def behind_another_in_each_of_two_queues(worker: Worker) -> None:
    """What rank 0 waits for is behind one in its own queue, and what is before it on the line is in another one."""
    transport, peer, one = worker.transport, 1 - worker.rank, torch.zeros(1)
    if worker.rank == 0:
        for label in ("activations back", "gradients back"):
            transport.irecv(one.clone(), peer, Label(label))
        transport.isend(one, peer, Label("activations forth"))
        transport.wait(transport.isend(one, peer, Label("gradients forth")))
    else:
        transport.wait(transport.irecv(one, peer, "the key", control=True))


@pytest.mark.processes
@pytest.mark.parametrize("fn", [behind_another_on_its_line, behind_another_in_each_of_two_queues])
def test_two_queues_on_one_line_hang_as_in_threads(fn: Callable) -> None:
    with pytest.raises(Deadlock) as in_threads:
        run_in_threads(fn, 2, queues="pair and kind", limit=IT_HUNG)
    with pytest.raises(StageError) as in_processes:
        launch_with_queues(fn, 2, queues="pair and kind", wait_limit=3600.0, limit=IT_HUNG)
    assert timeless(in_processes.value.verdict) == timeless(in_threads.value) and "queue" in str(in_threads.value)


def send_first(worker: Worker) -> None:
    worker.emit("begun")
    exchange(worker, torch.ones(3), 1 - worker.rank)


SEND_FIRST = (
    "stage 0 waits for stage 1 to take its tensor, which is behind another in stage 1's queue; stage 1 waits for stage "
    "0 to take its tensor, which is behind another in stage 0's queue: both wait, this is a deadlock"
)


def until(run: Run, kind: str) -> Snapshot:
    give_up = time.monotonic() + IT_HUNG
    while (snapshot := run.status()).verdict.kind != kind:
        assert time.monotonic() < give_up, snapshot
        time.sleep(0.005)
    return snapshot


@pytest.mark.processes
def test_the_status_of_a_run_with_queues_and_its_error_when_a_wait_runs_out() -> None:
    with start(with_queues(send_first, "pair"), 2, wait_limit=1.0, limit=IT_HUNG) as run:
        snapshot = until(run, "deadlock")
        with pytest.raises(StageError) as caught:
            run.result()
    assert [timeless(line) for line in str(snapshot).splitlines()] == [
        SEND_FIRST,
        "  stage 0 waits for stage 1 to take its tensor, which is behind another in stage 1's queue",
        "  stage 1 waits for stage 0 to take its tensor, which is behind another in stage 0's queue",
        "queues by pair imitated, messages real",
    ]
    error = caught.value
    assert (error.kind, error.rank) == ("timeout", None) and timeless(error).startswith(SEND_FIRST + "\n\nstage ")
    assert re.search(r"WaitTimeout: stage \d waited 1\.0 s for stage \d to take its tensor\n", str(error))


@pytest.mark.processes
def test_a_rank_that_ends_early_is_named_at_once_too() -> None:
    def leave(worker: Worker) -> None:
        if worker.rank == 0:
            receive(worker, torch.zeros(1), 1, "the last letter")

    with pytest.raises(StageError) as caught:
        launch_with_queues(leave, 2, queues="rank", wait_limit=3600.0, limit=IT_HUNG)
    assert (caught.value.rank, caught.value.kind) == (1, "stopped")
    assert timeless(caught.value).startswith(
        "stage 0 waits for the last letter from stage 1, but stage 1 has ended: it will never send\n"
    )


@pytest.mark.processes
def test_other_errors_are_what_they_are_without_queues() -> None:
    """A slow rank is no deadlock, a killed one is named, a tensor that cannot be sent is a fault of its sender."""

    def one_sleeps(worker: Worker) -> None:
        if worker.rank == 1:
            worker.transport.computing("B of micro-batch 5")
            time.sleep(IT_HUNG)
        send(worker, torch.zeros(1), 1, "a letter")

    def one_dies(worker: Worker) -> None:
        if worker.rank == 1:
            time.sleep(0.2)
            os._exit(3)
        receive(worker, torch.zeros(1), 1, "a letter")

    def not_contiguous(worker: Worker) -> None:
        if worker.rank == 0:
            send(worker, torch.zeros(3, 2).T, 1, "a letter")
        receive(worker, torch.zeros(2, 3), 0, "a letter")

    def error_of(fn: Callable) -> StageError:
        with pytest.raises(StageError) as caught:
            launch_with_queues(fn, 2, queues="pair", wait_limit=1.5, limit=IT_HUNG)
        return caught.value

    error = error_of(one_sleeps)
    assert (error.rank, error.kind) == (1, "timeout")
    assert str(error).startswith("stage 1 is slow: stage 0 waits for it, it has been in B of micro-batch 5 for ")
    error = error_of(one_dies)
    assert (error.rank, error.kind) == (1, "died") and "exit code 3" in str(error)
    error = error_of(not_contiguous)
    assert (error.rank, error.kind) == (0, "exception") and "ontiguous" in str(error)


# --- Real processes that run ----------------------------------------------------------------------------------------


def gradients_on_rank(worker: Worker, schedule: Schedule) -> dict[str, Any]:
    """A step of a small Transformer; ranks that the schedule does not have do nothing."""
    if worker.rank >= schedule.num_ranks:
        return {"gradients": {}}
    config = replace(TINY_RUN, stages=schedule.num_stages, micro_batches=schedule.num_micro_batches)
    stages = {stage: config.cut.build(stage, config.seed) for stage in schedule.stages_of(worker.rank)}
    pipeline = Pipeline(stages, schedule, worker.transport, config.cut.carry_after)
    micro_batches, num_tokens = one_step(config)
    pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens)
    return {"gradients": {n: p.grad for stage in stages.values() for n, p in stage.named_parameters_globally()}}


def gradients_of_all(worker: Worker, cases: list[Case]) -> list[dict[str, Any]]:
    """One case after another, each with queues of its own."""
    found = []
    for schedule, queues in cases:
        transport = QueuedTransport(worker.transport, queues)  # type: ignore[arg-type]
        found.append(gradients_on_rank(replace(worker, transport=transport), schedule))
    return found


def running_cases() -> list[Case]:
    """GPipe under every model, others where they run, and two random ones for each model."""
    named = [(gpipe(3, 4), queues) for queues in QUEUES]
    named += [(one_f_one_b(3, 5), "directed pair"), (one_f_one_b(3, 5), "pair and kind")]
    return [*named, (looped(2, 2, 3), "directed pair"), *random_cases(9, 2, hangs=False)]


@pytest.mark.processes
def test_what_runs_in_queues_has_the_same_gradients_in_processes_and_in_threads() -> None:
    cases = running_cases()
    ranks = launch(gradients_of_all, 3, cases, limit=2 * IT_HUNG)
    for case, *in_processes in zip(cases, *ranks, strict=True):
        schedule, queues = case
        expected = gradients_of(run_in_threads(gradients_on_rank, schedule.num_ranks, schedule, queues=queues))
        found = gradients_of(in_processes)
        assert sorted(found) == sorted(expected) and len(found) > 20
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], case


@pytest.mark.processes
def test_a_whole_training_in_queues_has_the_same_fingerprint() -> None:
    """With plans, norms and tokens, which are in no queue."""
    schedule = gpipe(2, TINY_RUN.micro_batches)
    run = partial(launch_with_queues, queues="rank", limit=2 * IT_HUNG)
    in_processes = train(TINY_RUN, schedule, run=run, record={1})
    assert in_processes.timelines[1].label == "measured, queues by rank imitated, messages real"
    in_threads = train(TINY_RUN, schedule, run=partial(run_in_threads, queues="rank"))
    assert in_processes.fingerprint == in_threads.fingerprint == train(TINY_RUN, run=run_in_threads).fingerprint


@pytest.mark.processes
def test_a_run_that_goes_on_in_queues_is_never_said_to_hang() -> None:
    """Looked at all the time, while messages move as fast as they can."""

    def busy(worker: Worker) -> None:
        transport = worker.transport
        for queues in ("pair", "rank", "directed pair"):
            worker.transport = QueuedTransport(transport, queues)  # type: ignore[arg-type]
            for _ in range(10):
                run_rank(worker, gpipe(3, 12))

    run = start(busy, 3, limit=2 * IT_HUNG)
    with run:
        kinds = Counter(run.status().verdict.kind for _ in iter(run._watcher.done.is_set, True))
        run.result()
    assert sum(kinds.values()) > 100
    assert set(kinds) <= {"starting", "running", "message under way", "finished", "slow"}, kinds


# --- The rest -------------------------------------------------------------------------------------------------------


@pytest.mark.weekly
@pytest.mark.slow
def test_threads_hang_exactly_where_the_validator_says_so_on_a_thousand_more_schedules() -> None:
    table = compare(seed=2, count=1000)
    assert all(table[queues, hangs] > 100 for queues in QUEUES for hangs in (False, True)) and table.total() == 5000


def test_what_cannot_be_run_in_queues() -> None:
    with pytest.raises(ValueError, match="unknown model of queues 'nccl'; there are buffered, directed pair"):
        launch_with_queues(send_first, 2, queues="nccl")
    with pytest.raises(TypeError, match="fn is 7, which is no function"):
        launch_with_queues(7, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="threads have queues of their own"):
        run_in_threads(with_queues(send_first, "pair"), 2)


@pytest.mark.processes
def test_an_error_of_the_callers_own_is_not_taken_for_a_run_that_goes_on() -> None:
    def refuse(rank: int, event: object) -> None:
        raise TimeoutError("no more events, please")

    with pytest.raises(TimeoutError, match="no more events, please"):
        launch_with_queues(send_first, 2, queues="buffered", on_event=refuse, limit=IT_HUNG)
