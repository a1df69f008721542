"""How messages travel between the ranks of one run: a small interface, and torch.distributed behind it.

The other implementation, K threads of one process, is in `threads.py`. Code above this module (the pipeline, the
training loop) cannot tell which of the two it runs on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist


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


class StatusBlock(Protocol):
    """Where a rank writes down what it is doing, so that its caller can read it even while the rank is stuck."""

    def waiting(self, text: str) -> None: ...

    def running(self, text: str = "") -> None: ...


class NoStatus:
    """A status block that nobody reads."""

    def waiting(self, text: str) -> None: ...

    def running(self, text: str = "") -> None: ...


class Transport(Protocol):
    """Messages of one rank.

    Messages between two ranks arrive in the order in which they were sent, so nothing carries a tag. `control` messages
    (plans, norms, tokens) travel apart from the data of the pipeline. `label` says in words what the message is; it is
    only used to explain a wait.

    `posts_early`: whether receives may be posted long before they are needed. In-process transports that imitate queues
    say no, because there a receive that was posted early stands in the way of others.
    """

    rank: int
    world_size: int
    posts_early: bool

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> Any:
        """Start to send a contiguous tensor; keep what is returned, and the tensor, until `wait` has returned."""

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> Any:
        """Start to receive into a buffer of exactly the shape and dtype that the peer sends."""

    def wait(self, operation: Any) -> None:
        """Wait until an operation is through. Raises WaitTimeout, PeerLost, or in threads Deadlock."""


@dataclass
class Worker:
    """What a function that runs on every rank gets as its first argument."""

    rank: int
    world_size: int
    transport: Transport
    emit: Callable[[Any], None]  # sends a small value to the caller, live


@dataclass
class Operation:
    """A send or receive under way. torch forgets to deliver a message whose `work` nobody keeps."""

    kind: str
    peer: int
    label: object
    work: Any
    tensor: torch.Tensor

    def __str__(self) -> str:
        if self.kind == "recv":
            return f"{self.label} from rank {self.peer}"
        return f"rank {self.peer} to take {self.label}"


class TorchTransport:
    """Messages over torch.distributed. The default group carries control messages, `data_group` the pipeline's data.

    `limit`: seconds after which a wait is given up; it must be the time-out with which the groups were made.
    """

    posts_early = True

    def __init__(
        self,
        rank: int,
        world_size: int,
        data_group: Any,
        status: StatusBlock | None = None,
        limit: float = 60.0,
    ):
        self.rank, self.world_size, self.data_group, self.limit = rank, world_size, data_group, limit
        self.status = status or NoStatus()

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool = False) -> Operation:
        return self.begin("send", dist.isend, tensor, peer, label, control)

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool = False) -> Operation:
        return self.begin("recv", dist.irecv, buffer, peer, label, control)

    def begin(
        self, kind: str, start: Callable, tensor: torch.Tensor, peer: int, label: object, control: bool
    ) -> Operation:
        """Raises PeerLost if gloo knows already that the connection is closed."""
        try:
            work = start(tensor, peer, group=None if control else self.data_group)
        except RuntimeError as error:
            if "transport" not in str(error):  # a fault of the tensor
                raise
            verb = "send" if kind == "send" else "receive"
            raise PeerLost(f"rank {self.rank} had lost rank {peer} before it could {verb} {label}") from error
        return Operation(kind, peer, label, work, tensor)

    def wait(self, operation: Operation) -> None:
        self.status.waiting(str(operation))
        try:
            operation.work.wait()
        except RuntimeError as error:
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise WaitTimeout(f"rank {self.rank} waited {self.limit:g} s for {operation}") from error
            raise PeerLost(f"rank {self.rank} lost rank {operation.peer} while it waited for {operation}") from error
        self.status.running()
