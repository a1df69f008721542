"""What lesson 03 asks for: two ranks that exchange tensors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.report import Wrong, expect
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transports import TransferError, Transport, Worker, describe


class WatchedTransport:
    """A rank's transport that remembers what was begun and what was waited for."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self.begun: list[Any] = []
        self.waited: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def isend(self, *arguments: Any, **options: Any) -> Any:
        self.begun.append(self.transport.isend(*arguments, **options))
        return self.begun[-1]

    def irecv(self, *arguments: Any, **options: Any) -> Any:
        self.begun.append(self.transport.irecv(*arguments, **options))
        return self.begun[-1]

    def wait(self, operation: Any) -> None:
        self.waited.append(operation)
        self.transport.wait(operation)


def exchange(answer: Callable) -> str:
    """answer(worker, mine, peer) -> the peer's tensor."""
    try_it(answer, [0, 1], torch.float32)
    try_it(answer, [0, 2], torch.int64)  # rank 1 does nothing: the peer is not always 1 - rank
    return "Two ranks swapped tensors, neither waited for ever, and both messages were waited for."


def try_it(answer: Callable, pair: list[int], dtype: torch.dtype) -> None:
    tensors = {rank: torch.arange(6).reshape(2, 3).to(dtype) + 10 * rank for rank in pair}

    def swap(worker: Worker) -> tuple[Any, Tensor, list] | None:
        if worker.rank not in pair:
            return None
        watched = WatchedTransport(worker.transport)
        mine = tensors[worker.rank].clone()
        came = answer(replace(worker, transport=watched), mine, sum(pair) - worker.rank)
        return came, mine, [operation for operation in watched.begun if operation not in watched.waited]

    who = f"ranks {pair[0]} and {pair[1]}, {describe(tensors[pair[0]])}"
    try:
        results = run_in_threads(swap, pair[1] + 1, limit=5)
    except Deadlock as stuck:
        raise Wrong(f"With {who}: {stuck}. {advice(stuck)}") from None
    except TransferError as error:
        raise Wrong(f"With {who}: {error}. Look at the shape and the dtype of the buffer.") from None
    for rank in pair:
        _, _, left = results[rank]
        if left:
            raise Wrong(
                f"Rank {rank} never waited for what `{'i' + left[0].kind}` returned. Here that may go well; over gloo "
                "a send that nobody waits for may never be delivered, and a buffer may be read before it is filled."
            )
    for rank in pair:
        came, mine, _ = results[rank]
        if came is None:
            raise Wrong(
                f"What rank {rank} got ({who}): nothing came. Two things to look at: is a `return` missing, or is what "
                "`wait` returns returned? It returns nothing; what arrived is in the buffer."
            )
        expect(f"what rank {rank} got ({who})", tensors[sum(pair) - rank], came)
        if not torch.equal(mine, tensors[rank]):
            raise Wrong(f"Rank {rank}'s own tensor was overwritten while it was being sent: receive into a new one.")


def advice(stuck: Deadlock) -> str:
    """What the way in which it got stuck says about the answer."""
    if stuck.verdict is None or stuck.verdict.kind != "deadlock":
        return "One rank waits for a message of which the other never did its part."
    if "to take" in str(stuck):
        return "Both send and wait until the other takes it, and neither gets as far as to receive."
    return "Both wait for a message that neither of them has begun to send."
