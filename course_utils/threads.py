"""The ranks of a run as threads of one process: every message is known, so a deadlock is known at once and exactly.

The same function that runs on real processes runs here. Messages can be made to move as in any model of queues of
`validity.py`, and schedules that hang may be run on purpose: instead of hanging they end with a `Deadlock` that names
who waits for whom.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import torch

from course_utils.transports import PeerLost, TransferError, WaitTimeout, Worker, describe
from course_utils.validity import QUEUES, check_model


class Deadlock(TransferError):
    """No rank can go on; the message names the circle of waits."""


class ThreadOperation:
    """One side of a message: a send or a receive of one rank."""

    def __init__(self, kind: str, rank: int, peer: int, label: object, tensor: torch.Tensor, control: bool):
        self.kind, self.rank, self.peer, self.label = kind, rank, peer, label
        self.tensor, self.control, self.done = tensor, control, False
        self.queue: deque[ThreadOperation] | None = None  # operations of this rank that move one after another

    @property
    def channel(self) -> tuple[int, int]:
        return (self.rank, self.peer) if self.kind == "send" else (self.peer, self.rank)

    @property
    def may_move(self) -> bool:
        return self.queue is None or self.queue[0] is self

    def __str__(self) -> str:
        if self.kind == "send":
            return f"rank {self.rank} waits for rank {self.peer} to take {self.label}"
        return f"rank {self.rank} waits for {self.label} from rank {self.peer}"


class Switchboard:
    """Matches the sends and receives of all ranks, and knows when nobody can go on."""

    def __init__(self, world_size: int, queues: str, limit: float):
        check_model(queues)
        self.world_size, self.limit = world_size, limit
        self.queue_of = QUEUES[queues]
        self.changed = threading.Condition()
        self.open: dict[tuple, dict[str, deque[ThreadOperation]]] = {}  # per channel: operations without a partner yet
        self.queues: dict[tuple[int, Hashable], deque[ThreadOperation]] = {}
        self.waits: dict[int, ThreadOperation] = {}  # what each blocked rank waits for
        self.ended: dict[int, BaseException | None] = {}
        self.deadlock: str | None = None
        self.stopped = False

    def issue(self, operation: ThreadOperation) -> ThreadOperation:
        with self.changed:
            sides = self.open.setdefault((operation.control, operation.channel), {"send": deque(), "recv": deque()})
            sides[operation.kind].append(operation)
            if self.queue_of is not None and not operation.control:
                queue = self.queue_of(operation.channel, getattr(operation.label, "kind", ""))
                operation.queue = self.queues.setdefault((operation.rank, queue), deque())
                operation.queue.append(operation)
            self.move(operation)
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
                        f"rank {send.rank} sends {send.label} as {describe(send.tensor)}, "
                        f"rank {receive.rank} expects {describe(receive.tensor)}"
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
            try:
                while not operation.done:
                    self.look_for_deadlock()
                    if self.deadlock:
                        raise Deadlock(self.deadlock)
                    failed = [rank for rank, error in self.ended.items() if error is not None]
                    if failed:
                        raise PeerLost(f"{operation}, but rank {failed[0]} failed")
                    if self.stopped:
                        raise PeerLost(f"{operation}, but the run was stopped")
                    if not self.changed.wait(max(0.0, give_up - time.monotonic())):
                        raise WaitTimeout(f"{operation}: given up after {self.limit:g} s")
            finally:
                del self.waits[operation.rank]

    def wait_for_an_end(self, seconds: float) -> bool:
        """Wait until something changes; whether all ranks have ended."""
        with self.changed:
            if len(self.ended) < self.world_size:
                self.changed.wait(max(0.0, seconds))
            return len(self.ended) == self.world_size

    def what_ranks_do(self) -> str:
        """`rank 0 has ended; rank 1 waits for ...; rank 2 computes`"""
        with self.changed:
            states = {rank: f"rank {rank} computes" for rank in range(self.world_size)}
            states |= {rank: str(operation) for rank, operation in self.waits.items()}
            states |= {rank: f"rank {rank} has ended" for rank in self.ended}
            return "; ".join(states.values())

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

    def look_for_deadlock(self) -> None:
        blocked = [operation for operation in self.waits.values() if not operation.done]
        if self.deadlock is None and not any(self.ended.values()) and len(blocked) + len(self.ended) == self.world_size:
            self.deadlock = self.describe_deadlock(min(blocked, key=lambda operation: operation.rank))
            self.changed.notify_all()

    def describe_deadlock(self, operation: ThreadOperation | None) -> str:
        path: list[ThreadOperation] = []
        reasons: list[str] = []
        while operation is not None and operation not in path:
            path.append(operation)
            reason, operation = self.obstacle(operation)
            reasons.append(reason)
        if operation is None:
            return "nobody can go on: " + "; ".join(reasons)
        circle, reasons = path[path.index(operation) :], reasons[path.index(operation) :]
        first = min(range(len(circle)), key=lambda i: (circle[i].rank, reasons[i]))  # whoever blocked first
        return "deadlock: " + "; ".join(reasons[first:] + reasons[:first])

    def obstacle(self, operation: ThreadOperation) -> tuple[str, ThreadOperation | None]:
        """Why an operation does not move, and what must move first; None if its peer has ended."""
        if operation.queue is not None and operation.queue[0] is not operation:
            head = operation.queue[0]
            return f"{operation}, behind another in its queue", head
        other_side = "recv" if operation.kind == "send" else "send"
        partners = self.open[operation.control, operation.channel][other_side]
        if partners and partners[0].queue is not None and not partners[0].may_move:
            head = partners[0].queue[0]
            return f"{operation}, which is behind another in rank {operation.peer}'s queue", head
        if operation.peer in self.ended:
            return f"{operation}, but rank {operation.peer} has ended", None
        return str(operation), self.waits.get(operation.peer)


class ThreadTransport:
    """The messages of one rank over a switchboard."""

    def __init__(self, rank: int, board: Switchboard):
        self.rank, self.world_size, self.board = rank, board.world_size, board
        self.posts_early = board.queue_of is None

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> ThreadOperation:
        return self.board.issue(ThreadOperation("send", self.rank, peer, label, tensor, control))

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> ThreadOperation:
        return self.board.issue(ThreadOperation("recv", self.rank, peer, label, buffer, control))

    def wait(self, operation: ThreadOperation) -> None:
        self.board.wait(operation)


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
        run_limit: seconds after which the whole run is given up. Threads cannot be killed: a rank that computes for
            ever does so until its process ends.
        on_event: called with (rank, event) for every `worker.emit(event)`, in the thread of the rank.

    Raises:
        Deadlock: as soon as no rank can go on.
        WaitTimeout: a limit was passed.
        Exception: whatever the function raised first; the other ranks are stopped at their next wait.
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
                errors.append(WaitTimeout(f"given up: {board.what_ranks_do()}"))
                break
    finally:
        board.stop()
        torch.set_num_threads(num_threads)
    if errors:
        raise first_cause(errors)
    return results


LAST_SECONDS = 5.0  # that the other ranks get to reach their next wait after one has failed


def first_cause(errors: list[BaseException]) -> BaseException:
    """An error of the function's own before one that only followed from it."""
    return min(errors, key=lambda error: (isinstance(error, PeerLost), isinstance(error, WaitTimeout)))
