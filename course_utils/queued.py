"""Real processes whose messages move in queues, as over NCCL: queues imitated, messages real.

gloo has no queues: whatever has been sent and is expected moves. So a schedule that hangs for the order of its messages
alone (`validity.QUEUES`) runs here. Behind a `QueuedTransport` it hangs as it would there: an operation is handed to
gloo only when the one before it in its queue is through. The same is to be had in threads, with
`run_in_threads(..., queues="pair")`.

    launch_with_queues(step, 2, queues="pair")  # a StageError at once if it hangs: who waits for whom behind what
    train(config, run=functools.partial(launch_with_queues, queues="rank"))

What it does not imitate: NCCL buffers small messages. A schedule that hangs here *may* hang on GPUs, and does so once
its tensors grow.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from course_utils._stage_view import IMITATED
from course_utils._status_file import StatusRecord
from course_utils.processes import StageError, start
from course_utils.transports import Operation, PeerLost, TorchTransport, Worker
from course_utils.validity import QUEUES, check_model

HANGS = ("deadlock", "abandoned")  # verdicts after which no rank of those concerned can ever go on
ON_GPUS = "NCCL buffers small messages, so on GPUs such a schedule may hang"
LOOK_EVERY = 0.05  # seconds
# For a message that nobody waits for yet. How long a rank waits has the transport's own limit; and a time-out of gloo
# would close the connection.
LONGEST = timedelta(days=7)


@dataclass(eq=False)
class Turn:
    """In the place of torch's `Work`, for an operation that may have to wait for its turn in a queue.

    Attributes:
        begin: hands the operation to torch.distributed and returns its Work.
        limit: seconds that whoever calls `wait` waits.
        queue: the operations of its rank that move one after another, the one that moves first.
        line: those of its channel that have not begun to move, in the order in which the other side has them too.
        error: what has come of it instead.
        is_refused: torch.distributed found fault with its tensor; see `TorchTransport.begin`.
    """

    begin: Callable[[], Any]
    limit: float
    queue: deque[Operation]
    line: deque[Operation]
    has_begun: bool = False
    is_over: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    is_refused: bool = False

    def wait(self) -> None:
        """Raises what torch's own Work raises: a RuntimeError."""
        if not self.is_over.wait(self.limit):
            raise RuntimeError(f"timed out after {self.limit:g} s")
        if self.error is not None:
            raise self.error


class QueuedTransport:
    """Messages over torch.distributed of which those of one queue move one after another, in the order of their issue.

    gloo's Work says that it is done to nobody but a thread that waits for it, so each message that moves has one.
    Control messages are in no queue.

    Args:
        transport: what carries the messages; use it no more. Only for messages that gloo carries.
        queues: the model of queues, a key of `validity.QUEUES`; the same on all ranks.

    Raises:
        ValueError: there is no such model.
    """

    def __init__(self, transport: TorchTransport, queues: str):
        check_model(queues)
        self.transport, self.queue_of = transport, QUEUES[queues]
        self.rank, self.world_size, self.wire_device = transport.rank, transport.world_size, transport.wire_device
        self.posts_early = self.queue_of is None  # a receive that was posted early would stand in the way of others
        self.label = f"measured, {IMITATED.format(queues)}" if self.queue_of else "measured"  # of timelines
        self.lock = threading.Lock()
        self.queues: dict[Hashable, deque[Operation]] = {}
        self.lines: dict[tuple[int, int], deque[Operation]] = {}  # per channel
        self.waits_for: Operation | None = None
        self.status = transport.status if isinstance(transport.status, StatusRecord) else None
        if self.status:
            self.status.queues(queues)

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> Operation:
        return self.issue("send", dist.isend, tensor, peer, label, control)

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> Operation:
        return self.issue("recv", dist.irecv, buffer, peer, label, control)

    def issue(
        self, kind: str, start: Callable, tensor: torch.Tensor, peer: int, label: object, control: bool
    ) -> Operation:
        if control or self.queue_of is None:
            return self.transport.begin(kind, start, tensor, peer, label, control)
        channel = (self.rank, peer) if kind == "send" else (peer, self.rank)
        key = self.queue_of(channel, getattr(label, "kind", ""))
        with self.lock:
            queue = self.queues.setdefault(key, deque())
            line = self.lines.setdefault(channel, deque())

            def take_a_turn(*arguments: Any, **more: Any) -> Turn:
                return Turn(partial(start, *arguments, **more), self.transport.limit, queue, line)

            operation = self.transport.begin(kind, take_a_turn, tensor, peer, label, control)
            queue.append(operation)
            line.append(operation)
            self.move()
        return operation

    def move(self) -> None:
        """Let all begin to move whose turn it is: at the head of its queue and first on its line. Holds the lock.

        The line matters where two queues share it: gloo gives the next message to the next receive, whatever it is.
        """
        todo = list(self.queues.values())
        while todo:
            queue = todo.pop()
            if not queue or queue[0].work.has_begun or queue[0].work.line[0] is not queue[0]:
                continue
            operation, turn, work = queue[0], queue[0].work, None
            turn.has_begun = True
            turn.line.popleft()
            if self.status:
                self.status.moves(operation)
            try:
                work = turn.begin()
            except Exception as error:  # for whoever waits for it
                turn.error, turn.is_refused = error, "transport" not in str(error)
            threading.Thread(target=self.see_through, args=(operation, work), name="message", daemon=True).start()
            todo += [turn.line[0].work.queue] if turn.line else []
        self.tell()

    def see_through(self, operation: Operation, work: Any) -> None:
        """Wait until a message has moved, in a thread of its own; then it is the next one's turn."""
        turn = operation.work
        try:
            if work is not None:
                work.wait(LONGEST)
        except Exception as error:
            turn.error = error
        with self.lock:
            turn.queue.popleft()
            self.move()
        turn.is_over.set()

    def tell(self) -> None:
        """Write down what is held up, and by what."""
        if self.status:
            held_up = [line[0] for line in self.lines.values() if line]
            waits_for = self.waits_for
            if waits_for is not None and not waits_for.work.has_begun and waits_for not in held_up:
                held_up.append(waits_for)
            heads = [operation.work.queue[0] for operation in held_up]
            self.status.held_up([pair for pair in zip(held_up, heads, strict=True) if pair[0] is not pair[1]])

    def wait(self, operation: Operation) -> None:
        """Raises as `TorchTransport.wait` does, and what is wrong with a tensor here instead of where it was issued."""
        turn = operation.work
        if isinstance(turn, Turn):
            with self.lock:
                self.waits_for = operation
                self.tell()
        try:
            self.transport.wait(operation)
        except PeerLost:
            if isinstance(turn, Turn) and turn.error and turn.is_refused:
                raise turn.error from None
            raise
        finally:
            self.waits_for = None

    def computing(self, text: str) -> None:
        self.transport.computing(text)


def with_queues(fn: Callable, queues: str) -> Callable:
    """What to give to `processes.start` in the place of fn, so that its messages move in queues.

    Raises:
        TypeError: fn is not callable.
        ValueError: there is no such model of queues.
    """
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}, which is no function; it must be callable as fn(worker, *args)")
    check_model(queues)
    return partial(call_with_queues, fn=fn, queues=queues)


def call_with_queues(worker: Worker, *args: Any, fn: Callable, queues: str) -> Any:
    """In a worker."""
    if not isinstance(worker.transport, TorchTransport):
        raise TypeError("queues over real processes need a TorchTransport; threads have queues of their own")
    return fn(replace(worker, transport=QueuedTransport(worker.transport, queues)), *args)


def launch_with_queues(fn: Callable, world_size: int, *args: Any, queues: str = "pair", **options: Any) -> list:
    """As `processes.launch`, with messages that move in queues; a run that hangs is ended as soon as that is certain.

    Nobody has to wait for the `wait_limit`: a circle of waits, or a wait for a rank that has ended, is never said of a
    run that could go on (`_status_file.read`).

    Args:
        queues: the model of queues, a key of `validity.QUEUES`.
        options: as for `processes.start`.

    Raises:
        StageError: as `processes.launch`; of a run that hangs with kind "stopped" and the verdict, who waits for whom
            behind what.
    """
    with start(with_queues(fn, queues), world_size, *args, **options) as run:
        while True:
            try:
                return run.result(timeout=LOOK_EVERY)
            except TimeoutError:
                snapshot = run.status()
            if snapshot.end:  # badly, just now
                return run.result()
            verdict = snapshot.verdict
            if verdict.kind in HANGS:
                run.stop()
                what = f"the run was ended, because it cannot go on ({IMITATED.format(queues)}; {ON_GPUS})"
                text = "\n".join([f"{verdict}\n", f"{what}\n", "at that moment:", *snapshot.lines])
                raise StageError(text, "stopped", verdict.culprit, verdict)
