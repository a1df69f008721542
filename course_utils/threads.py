"""The ranks of a run as threads of one process: every message is known, so a deadlock is known at once and exactly.

The same function that runs on real processes runs here. Messages can be made to move as in any model of queues of
`validity.py`, and schedules that hang may be run on purpose: instead of hanging they end with a `Deadlock` that names
who waits for whom.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from course_utils.transports import Operation, PeerLost, TransferError, WaitTimeout, Worker, describe
from course_utils.validity import QUEUES, check_model
from course_utils.waits import RankState, Snapshot, Verdict, Wait, follow


class Deadlock(TransferError):
    """Ranks wait for each other in a circle, or for one that has ended: the message says who waits for whom."""

    def __init__(self, message: str, verdict: Verdict | None = None):
        super().__init__(message)
        self.verdict = verdict


@dataclass(eq=False)
class ThreadOperation(Operation):
    """A send or receive between threads: done as soon as the other side is there and both may move."""

    done: bool = False
    queue: "deque[ThreadOperation] | None" = None  # operations of this rank that move one after another

    @property
    def may_move(self) -> bool:
        return self.queue is None or self.queue[0] is self


class Switchboard:
    """Matches the sends and receives of all ranks, and knows as soon as one of them can never go on."""

    def __init__(self, world_size: int, queues: str, limit: float):
        check_model(queues)
        self.world_size, self.limit = world_size, limit
        self.queue_of = QUEUES[queues]
        self.changed = threading.Condition()
        self.open: dict[tuple, dict[str, deque[ThreadOperation]]] = {}  # per channel: operations without a partner yet
        self.queues: dict[tuple[int, Hashable], deque[ThreadOperation]] = {}
        self.actions = world_size * [""]  # what each rank computes, or did before it waited
        self.since = world_size * [time.monotonic()]  # how long it has done so, or waited
        self.waits: dict[int, ThreadOperation] = {}  # what each blocked rank waits for
        self.ended: dict[int, BaseException | None] = {}
        self.noun = "stage"
        self.deadlock: Verdict | None = None
        self.stopped = False

    def issue(self, operation: ThreadOperation) -> ThreadOperation:
        with self.changed:
            if operation.noun != "stage":
                self.noun = operation.noun
            sides = self.open.setdefault((operation.control, operation.channel), {"send": deque(), "recv": deque()})
            sides[operation.kind].append(operation)
            if self.queue_of is not None and not operation.control:
                queue = self.queue_of(operation.channel, getattr(operation.label, "kind", ""))
                operation.queue = self.queues.setdefault((operation.rank, queue), deque())
                operation.queue.append(operation)
            self.move(operation)
            if operation.queue and not operation.done:
                self.changed.notify_all()  # it may have closed a circle of queues
        return operation

    def move(self, operation: ThreadOperation) -> None:
        """Let through all that can move now that this operation is issued, or at the head of its queue."""
        todo = [operation]
        while todo:
            operation = todo.pop()
            sides = self.open[operation.control, operation.channel]
            while sides["send"] and sides["recv"] and sides["send"][0].may_move and sides["recv"][0].may_move:
                send, receive = sides["send"].popleft(), sides["recv"].popleft()
                if send.tensor.shape != receive.tensor.shape or send.tensor.dtype != receive.tensor.dtype:
                    raise TransferError(
                        f"{self.noun} {send.rank} sends {send.label} as {describe(send.tensor)}, "
                        f"{self.noun} {receive.rank} expects {describe(receive.tensor)}"
                    )
                receive.tensor.copy_(send.tensor)
                for side in (send, receive):
                    side.done = True
                    if side.queue is not None:
                        side.queue.popleft()
                        todo.extend(list(side.queue)[:1])
                self.changed.notify_all()

    def wait(self, operation: ThreadOperation) -> None:
        give_up = time.monotonic() + self.limit
        with self.changed:
            self.waits[operation.rank] = operation
            self.since[operation.rank] = time.monotonic()
            try:
                while not operation.done:
                    self.look_for_deadlock(operation)
                    if self.deadlock:
                        raise Deadlock(str(self.deadlock), self.deadlock)
                    failed = [rank for rank, error in self.ended.items() if error is not None]
                    if failed:
                        raise PeerLost(f"{self.tell(operation)}, but {self.noun} {failed[0]} failed")
                    if self.stopped:
                        raise PeerLost(f"{self.tell(operation)}, but the run was stopped")
                    if not self.changed.wait(max(0.0, give_up - time.monotonic())):
                        what = f"{self.tell(operation)}: given up after {self.limit:g} s"
                        raise WaitTimeout(f"{self.snapshot().verdict}; {what}")
            finally:
                del self.waits[operation.rank]
                self.since[operation.rank] = time.monotonic()

    def tell(self, operation: ThreadOperation) -> str:
        return f"{self.noun} {operation.rank} {operation.as_wait().now(self.noun)}"

    def computing(self, rank: int, text: str) -> None:
        with self.changed:
            self.actions[rank], self.since[rank] = text, time.monotonic()

    def wait_for_an_end(self, seconds: float) -> bool:
        """Wait until something changes; whether all ranks have ended."""
        with self.changed:
            if len(self.ended) < self.world_size:
                self.changed.wait(max(0.0, seconds))
            return len(self.ended) == self.world_size

    def stop(self) -> None:
        """End every rank at its next wait."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def end(self, rank: int, error: BaseException | None) -> None:
        with self.changed:
            self.waits.pop(rank, None)
            self.ended[rank] = error
            self.changed.notify_all()

    def look_for_deadlock(self, operation: ThreadOperation) -> None:
        """Follow who waits for whom from one operation on: into a circle, or to a rank that has ended without error."""
        if self.deadlock is None and not any(self.ended.values()):
            path, is_circle = follow(operation, self.needs)
            if is_circle or (path[-1].peer in self.ended and not path[-1].done):
                self.deadlock = self.snapshot().verdict
                self.changed.notify_all()

    def needs(self, operation: ThreadOperation) -> ThreadOperation | None:
        """The operation that has to be done before this one can be; None if there is none such."""
        return None if operation.done else self.ahead_of(operation) or self.waits.get(operation.peer)

    def ahead_of(self, operation: ThreadOperation) -> ThreadOperation | None:
        """The head of the queue that holds an operation up: its own queue, or that of the other side."""
        sides = self.open[operation.control, operation.channel]
        other_side = sides["recv" if operation.kind == "send" else "send"]
        for held_up in (operation, sides[operation.kind][0], *list(other_side)[:1]):
            if held_up.queue is not None and not held_up.may_move:
                return held_up.queue[0]
        return None

    def snapshot(self) -> Snapshot:
        """What all ranks do now."""
        with self.changed:
            now, waits = time.monotonic(), dict[ThreadOperation, Wait]()

            def as_wait(operation: ThreadOperation) -> Wait:
                if operation not in waits:
                    waits[operation] = operation.as_wait(now - self.since[operation.rank])
                    if operation.done:
                        waits[operation].under_way = 0.0
                    elif head := self.ahead_of(operation):
                        waits[operation].ahead = as_wait(head)
                return waits[operation]

            states = []
            for rank in range(self.world_size):
                state = "ended" if rank in self.ended else "waiting" if rank in self.waits else "computing"
                wait = as_wait(self.waits[rank]) if rank in self.waits else None
                states.append(RankState(rank, state, self.actions[rank], now - self.since[rank], wait))
            return Snapshot(states, self.noun, late_from=0.0)


class ThreadTransport:
    """The messages of one rank over a switchboard."""

    wire_device = "cpu"

    def __init__(self, rank: int, board: Switchboard):
        self.rank, self.world_size, self.board = rank, board.world_size, board
        self.posts_early = board.queue_of is None

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> ThreadOperation:
        return self.board.issue(ThreadOperation("send", self.rank, peer, label, tensor, control))

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> ThreadOperation:
        return self.board.issue(ThreadOperation("recv", self.rank, peer, label, buffer, control))

    def wait(self, operation: ThreadOperation) -> None:
        self.board.wait(operation)

    def computing(self, text: str) -> None:
        self.board.computing(self.rank, text)


def run_in_threads(
    function: Callable,
    world_size: int,
    *arguments: Any,
    queues: str = "buffered",
    limit: float = 60.0,
    run_limit: float = 3600.0,
    on_event: Callable[[int, Any], None] | None = None,
) -> list:
    """Run function(worker, *arguments) once per rank, each in a thread; return the results by rank.

    Args:
        queues: the model of queues, a key of `validity.QUEUES`.
        limit: seconds after which a single wait is given up.
        run_limit: seconds after which the whole run is given up.
        on_event: called with (rank, event) for every `worker.emit(event)`, in the thread of the rank.

    Raises:
        Deadlock: as soon as a rank can never go on.
        WaitTimeout: a limit was passed.
        Exception: whatever the function raised first; the other ranks are stopped at their next wait.

    However the run ends, its ranks end with it: one that still computes does so at its next line of Python.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; a run needs at least 1 rank")
    board = Switchboard(world_size, queues, limit)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(1)  # sums of one order, as on one device and in processes
            emit = (lambda event: on_event(rank, event)) if on_event else (lambda event: None)
            results[rank] = function(Worker(rank, world_size, ThreadTransport(rank, board), emit), *arguments)
        except Stopped as caught:
            error = caught  # of a run that has ended: no cause of anything
        except BaseException as caught:
            error = caught
            errors.append(caught)
        board.end(rank, error)

    num_threads = torch.get_num_threads()
    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(world_size)]
    give_up = time.monotonic() + run_limit
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if errors:
                give_up = min(give_up, time.monotonic() + LAST_SECONDS)
            if not board.wait_for_an_end(min(0.05, give_up - time.monotonic())) and time.monotonic() > give_up:
                errors.append(WaitTimeout(f"given up after {run_limit:g} s (run_limit): {board.snapshot()}"))
                break
    finally:
        board.stop()
        end_threads(threads)
        torch.set_num_threads(num_threads)
    if errors:
        raise first_cause(errors)
    return results


LAST_SECONDS = 5.0  # that the other ranks get to reach their next wait after one has failed


class Stopped(BaseException):
    """The run of this thread has ended without it."""


def end_threads(threads: list[threading.Thread]) -> None:
    """Wait a little for threads to end, then raise Stopped in them. One in a call outside of Python may go on."""
    give_up = time.monotonic() + 1.0
    started = [thread for thread in threads if thread.ident is not None]
    for thread in started:
        thread.join(0.2)
    while time.monotonic() < give_up and (running := [thread for thread in started if thread.is_alive()]):
        for thread in running:
            assert thread.ident is not None
            raise_in_thread(thread.ident, Stopped)
        running[0].join(0.05)


def raise_in_thread(ident: int, kind: type[BaseException]) -> None:
    """Raise an exception in another thread, at its next line of Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind))


def first_cause(errors: list[BaseException]) -> BaseException:
    """An error of the function's own before one that only followed from it."""
    return min(errors, key=lambda error: (isinstance(error, PeerLost), isinstance(error, WaitTimeout)))
