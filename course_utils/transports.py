"""How messages travel between the ranks of one run: a small interface, and torch.distributed behind it.

The other implementation, K threads of one process, is in `threads.py`. Code above this module (the pipeline, the
training loop) cannot tell which of the two it runs on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from course_utils.waits import Wait, noun_for


class TransferError(RuntimeError):
    """A message could not be sent or received."""


class WaitTimeout(TransferError):
    """A wait ran out: the message says who waited for what, from whom, and for how long."""


class PeerLost(TransferError):
    """The process at the other end of a message has gone."""


def describe(tensor: Any) -> str:
    """`2x3 float32`, of a tensor or of what is known of one before it exists; `nothing` for None."""
    if tensor is None:
        return "nothing"
    return f"{'x'.join(map(str, tensor.shape)) or 'a scalar'} {str(tensor.dtype).removeprefix('torch.')}"


@dataclass(eq=False)
class Operation:
    """One side of a message: a send or a receive of one rank."""

    kind: str  # "send" or "recv"
    rank: int
    peer: int
    label: object
    tensor: torch.Tensor
    control: bool
    work: Any = None  # torch forgets to deliver a message whose `work` nobody keeps
    number: int = 0  # of the operations of its kind to or from this peer: the partner has the same number there

    @property
    def channel(self) -> tuple[int, int]:
        """The two ranks, sender first."""
        return (self.rank, self.peer) if self.kind == "send" else (self.peer, self.rank)

    @property
    def noun(self) -> str:
        return noun_for(self.label, *self.channel)

    def as_wait(self, seconds: float = 0.0) -> Wait:
        return Wait(self.rank, self.peer, str(self.label), self.kind == "send", seconds)


class StatusBlock:
    """Where a rank writes down what it is doing.

    Nobody reads this one. That of `_status_file` the caller reads, even while the rank is stuck.
    """

    def issued(self, operation: Operation) -> None: ...

    def waiting(self, operation: Operation) -> None: ...

    def gave_up(self, operation: Operation) -> None: ...

    def computing(self, text: str | None = None) -> None: ...


class Transport(Protocol):
    """Messages of one rank.

    Messages between two ranks arrive in the order in which they were sent, so nothing carries a tag. `control` messages
    (plans, norms, tokens) travel apart from the data of the pipeline. `label` says in words what the message is; it is
    only used to explain a wait.

    `posts_early`: whether receives may be posted long before they are needed. Transports that imitate queues
    say no, because there a receive that was posted early stands in the way of others.

    `wire_device`: where tensors of the pipeline must lie to be sent or received; control messages lie on the CPU.
    """

    rank: int
    world_size: int
    posts_early: bool
    wire_device: str

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> Any:
        """Start to send a contiguous tensor; keep what is returned, and the tensor, until `wait` has returned."""

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> Any:
        """Start to receive into a buffer of exactly the shape and dtype that the peer sends."""

    def wait(self, operation: Any) -> None:
        """Wait until an operation is through. Raises WaitTimeout, PeerLost, or in threads Deadlock."""

    def computing(self, text: str) -> None:
        """Say what this rank does from now on, between its waits, "B of micro-batch 5": for whoever waits for it."""


@dataclass
class Worker:
    """What a function that runs on every rank gets as its first argument."""

    rank: int
    world_size: int
    transport: Transport
    emit: Callable[[Any], None]  # sends a small value to the caller, live


class TorchTransport:
    """Messages over torch.distributed. The default group carries control messages, `data_group` the pipeline's data.

    `limit`: seconds after which a wait is given up; it must be the time-out with which the groups were made.
    """

    posts_early = True
    wire_device = "cpu"

    def __init__(
        self,
        rank: int,
        world_size: int,
        data_group: Any,
        status: StatusBlock | None = None,
        limit: float = 60.0,
    ):
        self.rank, self.world_size, self.data_group, self.limit = rank, world_size, data_group, limit
        self.status = status or StatusBlock()
        # Where each directed pair of ranks has a group of its own; see `devices.use_nccl`.
        self.data_groups: dict[tuple[int, int], Any] = {}

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> Operation:
        return self.begin("send", dist.isend, tensor, peer, label, control)

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> Operation:
        return self.begin("recv", dist.irecv, buffer, peer, label, control)

    def begin(
        self, kind: str, start: Callable, tensor: torch.Tensor, peer: int, label: object, control: bool
    ) -> Operation:
        """Raises PeerLost if gloo knows already that the connection is closed."""
        operation = Operation(kind, self.rank, peer, label, tensor, control)
        group = None if control else self.data_groups.get(operation.channel, self.data_group)
        try:
            operation.work = start(tensor, peer, group=group)
        except RuntimeError as error:
            if "transport" not in str(error):  # a fault of the tensor
                raise
            self.status.issued(operation)
            self.status.gave_up(operation)
            before = f"before it could {'send' if kind == 'send' else 'receive'} {label}"
            raise PeerLost(f"{operation.noun} {self.rank} had lost {operation.noun} {peer} {before}") from error
        self.status.issued(operation)
        return operation

    def wait(self, operation: Operation) -> None:
        self.status.waiting(operation)
        try:
            operation.work.wait()
        except RuntimeError as error:
            self.status.gave_up(operation)
            noun = operation.noun
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise WaitTimeout(f"{noun} {self.rank} {operation.as_wait(self.limit).past(noun)}") from error
            what = f"while it {operation.as_wait().past(noun)}"
            raise PeerLost(f"{noun} {self.rank} lost {noun} {operation.peer} {what}") from error
        self.status.computing()

    def computing(self, text: str) -> None:
        self.status.computing(text)
