"""Messages between two ranks that wait until they are through, and what such a message costs.

The cost is taken to be latency + bytes / bandwidth, a straight line over the size: the model of Hockney (1994), "The
communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 20(3).
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from course_utils.transformer import CarrySpec
from course_utils.transports import Worker

# --- Messages -------------------------------------------------------------------------------------------------


def send(worker: Worker, tensor: Tensor, peer: int, label: str) -> None:
    """Send a contiguous tensor; return when it is on its way, which is not before the peer has begun to receive.

    Args:
        label: the message in words; it is only used to explain a wait.

    Raises:
        TransferError: the wait ran out, or the peer has gone; in threads `Deadlock`.
    """
    worker.transport.wait(worker.transport.isend(tensor, peer, label))


def receive(worker: Worker, buffer: Tensor, peer: int, label: str) -> Tensor:
    """Fill a buffer of exactly the shape and dtype that the peer sends, and return it. Raises as `send` does."""
    worker.transport.wait(worker.transport.irecv(buffer, peer, label))
    return buffer


def exchange(worker: Worker, mine: Tensor, peer: int) -> Tensor:
    """Give the peer a contiguous tensor and return the peer's, of the same shape and dtype, in a new tensor.

    Both messages are begun before either is waited for, so both ranks may call it at once. Raises as `send` does.
    """
    theirs = torch.empty_like(mine)
    leaving = worker.transport.isend(mine, peer, "its tensor")
    arriving = worker.transport.irecv(theirs, peer, "its tensor")
    worker.transport.wait(leaving)
    worker.transport.wait(arriving)
    return theirs


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The tensors of a carry that are there."""
    return [tensor for tensor in tensors if tensor is not None]


def send_carry(worker: Worker, tensors: Iterable[Tensor | None], peer: int, label: str) -> None:
    """Send each tensor that is there as a message of its own, all at once. Raises as `send` does."""
    outgoing = [tensor.detach().contiguous() for tensor in present(tensors)]
    for operation in [worker.transport.isend(tensor, peer, label) for tensor in outgoing]:
        worker.transport.wait(operation)


def receive_carry(
    worker: Worker, specs: Sequence[CarrySpec | None], peer: int, label: str
) -> tuple[Tensor | None, ...]:
    """Receive what `send_carry` sends: a new tensor for each spec, None where the spec is None. Raises as `send` does.

    Args:
        specs: shape and dtype of each tensor, from `CutModel.carry_after`; nothing of it is sent.
    """
    buffers = tuple(None if spec is None else torch.empty(spec.shape, dtype=spec.dtype) for spec in specs)
    for operation in [worker.transport.irecv(buffer, peer, label) for buffer in present(buffers)]:
        worker.transport.wait(operation)
    return buffers


# --- What they cost -------------------------------------------------------------------------------------------


def ping_pong(worker: Worker, sizes: Sequence[int], repetitions: int = 50) -> dict[int, float]:
    """Between ranks 0 and 1: {bytes: seconds one way}, half of a round trip, the median of all repetitions.

    All sizes take turns, so that other work of the machine meets all of them alike. Raises as `send` does.
    """
    balls = {size: torch.zeros(size, dtype=torch.uint8) for size in sizes}
    trips = []
    for _ in range(repetitions):
        for size, ball in balls.items():
            began = time.perf_counter()
            for server in (0, 1):
                hit = send if worker.rank == server else receive
                hit(worker, ball, 1 - worker.rank, "the ball")
            trips.append((size, (time.perf_counter() - began) / 2))
    return {size: statistics.median(seconds for other, seconds in trips if other == size) for size in sizes}


class Link(NamedTuple):
    """What messages between two ranks cost.

    Attributes:
        latency: seconds that a message takes however small it is.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float, num_messages: int = 1) -> float:
        """What some messages, one after another, take that have so many bytes together."""
        return num_messages * self.latency + num_bytes / self.bandwidth


def fit_link(seconds: Mapping[int, float]) -> Link:
    """The straight line through {bytes: seconds}, by least squares of the relative errors: each size counts alike.

    (Of the absolute errors, the largest messages would count for nearly all, and the latency be anything.)

    Raises:
        ValueError: fewer than two sizes, or times that do not grow with the size.
    """
    if len(seconds) < 2:
        raise ValueError(f"{len(seconds)} size was measured; a straight line needs at least 2")
    sizes, times = np.array(list(seconds)), np.array(list(seconds.values()))
    columns = np.stack([1 / times, sizes / times], axis=1)
    latency, per_byte = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    if per_byte <= 0:
        raise ValueError("the times do not grow with the size; measure larger messages, or more often")
    return Link(float(latency), float(1 / per_byte))
