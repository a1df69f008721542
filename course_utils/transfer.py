"""The messages of one step: what each looks like, when its receive is posted, when its send is over.

Nothing here is found out by trial: all ranks compute the same plan of a step before any data moves. That is necessary.
gloo ends the receiving process if a buffer is too small, fills part of it if it is too large, and takes bytes of
another dtype as they are.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from course_utils.number_words import Geometry
from course_utils.schedules import Message, Schedule
from course_utils.transformer import CarrySpec
from course_utils.transports import TransferError, Transport, describe
from course_utils.validity import PostingPlan

Specs = tuple[CarrySpec | None, ...]  # what crosses a border: one entry per tensor of the carry


class PlanMismatch(TransferError):
    """Ranks do not agree about a step, or a stage gave something else than the plan says."""


class StepPlan:
    """Shape, dtype and need of a gradient of every message of a step.

    Args:
        geometries: for each micro-batch (rows, source length, target length).
        carry_after: gives for (stage, geometry) what the stage hands on to the next one.
        num_stages: K.
        wire_dtype: what tensors are sent as, for example torch.bfloat16: half the bytes, and rounded at every border.
            None: as they are, which changes nothing.
        also: whatever else must be the same on all ranks, in words; a schedule's text, for example.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        carry_after: Callable[[int, Geometry], Specs],
        num_stages: int,
        also: str = "",
        wire_dtype: torch.dtype | None = None,
    ):
        self.geometries, self.also, self.wire_dtype = tuple(geometries), also, wire_dtype
        self.carries = [[carry_after(stage, g) for g in self.geometries] for stage in range(num_stages - 1)]

    def specs(self, message: Message) -> Specs:
        """What a stage hands on in a message; gradients flow only for tensors that require one."""
        if message.kind == "activations":
            return self.carries[message.source][message.micro_batch]
        carry = self.carries[message.destination][message.micro_batch]
        return tuple(spec if spec is not None and spec.requires_grad else None for spec in carry)

    def sent_as(self, spec: CarrySpec) -> torch.dtype:
        """The format in which a tensor crosses a border."""
        return self.wire_dtype or spec.dtype

    def num_bytes(self, message: Message) -> int:
        """The size of a message."""
        specs = [spec for spec in self.specs(message) if spec is not None]
        return sum(math.prod(spec.shape) * self.sent_as(spec).itemsize for spec in specs)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ as soon as any message, or anything else that must be the same, differs."""
        return hashlib.sha256(repr((self.geometries, self.carries, self.wire_dtype, self.also)).encode()).digest()

    def __str__(self) -> str:
        pieces = [f"{rows} rows, {source} -> {target} tokens" for rows, source, target in self.geometries]
        borders = [
            f"stage {stage} hands on "
            + " and ".join(
                describe(s) + ("" if s is None or s.requires_grad else " without gradient") for s in carries[0]
            )
            for stage, carries in enumerate(self.carries)
        ]
        wire = [f"sent as {str(self.wire_dtype).removeprefix('torch.')}"] if self.wire_dtype else []
        also = [self.also.replace("\n", " | ")] if self.also else []
        return f"{len(pieces)} micro-batches over {len(borders) + 1} stages: " + "; ".join(
            pieces + borders + wire + also
        )


class Exchange:
    """The messages of one rank during one step.

    Receives are posted in the order in which the sender sends, so no message needs a tag. Sends never block: each is
    kept until a message arrives that the peer can only have sent after it had used ours, the rest until `finish`.
    """

    def __init__(self, transport: Transport, schedule: Schedule, plan: StepPlan, posting: PostingPlan, device: str):
        self.transport, self.schedule, self.plan, self.posting, self.device = transport, schedule, plan, posting, device
        self.inbox: dict[Message, tuple[list, list]] = {}  # posted: buffers, operations
        self.outbox: dict[Message, list] = {}  # sent, not yet known to be used
        self.to_post = {c: list(reversed(ms)) for c, ms in schedule.channels.items() if c[1] == transport.rank}
        self.peak_posted: dict[str, int] = {"activations": 0, "gradients": 0}
        self.begin_action(0)

    def begin_action(self, number: int) -> None:
        """Post the receives that are due when the rank's action `number` (from 1; 0: the step) begins to compute."""
        if self.transport.posts_early:
            for message in self.posting.posted_at.get(number, ()):
                self.post(message)

    def post(self, message: Message) -> None:
        source = self.schedule.channel(message)[0]
        expected = self.to_post[source, self.transport.rank].pop()
        assert message == expected, f"{message} would be posted before {expected}, which is sent first"
        buffers = [
            None
            if spec is None
            else torch.empty(spec.shape, dtype=self.plan.sent_as(spec), device=self.transport.wire_device)
            for spec in self.plan.specs(message)
        ]
        operations = [self.transport.irecv(buffer, source, message) for buffer in buffers if buffer is not None]
        self.inbox[message] = buffers, operations
        posted = sum(other.kind == message.kind for other in self.inbox)
        self.peak_posted[message.kind] = max(self.peak_posted[message.kind], posted)

    def receive(self, message: Message) -> list[torch.Tensor | None]:
        """Wait for a message; one entry per tensor of the carry."""
        channel = self.schedule.channel(message)
        while message not in self.inbox:
            self.post(self.to_post[channel][-1])
        buffers, operations = self.inbox.pop(message)
        for operation in operations:
            self.transport.wait(operation)
        for sent in self.posting.acknowledged_by.get(message, ()):
            self.close(sent)
        specs = self.plan.specs(message)
        return [None if spec is None else b.to(self.device, spec.dtype) for b, spec in zip(buffers, specs, strict=True)]

    def send(self, message: Message, tensors: Sequence[torch.Tensor | None]) -> None:
        """Send what the plan says; what it does not name stays here. Raises PlanMismatch."""
        specs = self.plan.specs(message)
        if len(tensors) != len(specs):
            raise PlanMismatch(f"{message}: the plan has {len(specs)} tensors, the stage gave {len(tensors)}")
        destination = self.schedule.channel(message)[1]
        operations = self.outbox[message] = []
        for tensor, spec in zip(tensors, specs, strict=True):
            if spec is not None:
                checked = check_tensor(f"{message} (stage {message.source} to {message.destination})", tensor, spec)
                outgoing = checked.to(self.transport.wire_device, self.plan.sent_as(spec)).contiguous()
                operations.append(self.transport.isend(outgoing, destination, message))

    def close(self, sent: Message) -> None:
        """Let go of a send that the peer has used: its wait returns at once."""
        for operation in self.outbox.pop(sent):
            self.transport.wait(operation)

    def finish(self) -> None:
        """Wait until all that was sent is on its way."""
        for message in list(self.outbox):
            self.close(message)


def check_tensor(what: str, tensor: torch.Tensor | None, spec: CarrySpec) -> torch.Tensor:
    """The tensor, if it is what the receiver has a buffer for. Raises PlanMismatch."""
    if tensor is None or tensor.shape != spec.shape or tensor.dtype != spec.dtype:
        raise PlanMismatch(f"{what}: the plan says {describe(spec)}, the stage gave {describe(tensor)}")
    return tensor


class Gathering:
    """One tensor of bytes from every rank to every rank, on the control group.

    Receives are posted when it is made, at the start of a step, so that at its end each message is under way as soon
    as it is sent. (An all-reduce sends its messages one after another: over a long line it costs several delays
    instead of one.)
    """

    def __init__(self, transport: Transport, num_bytes: int, label: str):
        self.transport, self.label = transport, label
        self.peers = [peer for peer in range(transport.world_size) if peer != transport.rank]
        self.buffers = {peer: torch.empty(num_bytes, dtype=torch.uint8) for peer in self.peers}
        self.receives = [transport.irecv(self.buffers[peer], peer, label, control=True) for peer in self.peers]

    def share(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's bytes, by rank. mine: (num_bytes,) uint8."""
        sends = [self.transport.isend(mine, peer, self.label, control=True) for peer in self.peers]
        for operation in self.receives + sends:
            self.transport.wait(operation)
        return [self.buffers.get(rank, mine) for rank in range(self.transport.world_size)]


def as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def tell_all(transport: Transport, mine: Any, what: str) -> list[Any]:
    """What every rank has to say, by rank. It travels as JSON: nothing that arrives can be code."""
    text = as_json(mine)
    lengths = Gathering(transport, 8, what).share(as_bytes(len(text).to_bytes(8)))
    longest = max(int.from_bytes(length.numpy().tobytes()) for length in lengths)
    texts = Gathering(transport, longest, what).share(as_bytes(text.ljust(longest)))
    return [json.loads(text.numpy().tobytes()) for text in texts]


def as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def agree(transport: Transport, plan: StepPlan) -> None:
    """Compare the plans of all ranks before the first data moves; later steps compare theirs one step ahead.

    Raises:
        PlanMismatch: on every rank, with all plans that differ.
    """
    gathering = Gathering(transport, len(plan.digest), "the plan, which all ranks compare before they begin")
    check_digests(transport, plan, [t.numpy().tobytes() for t in gathering.share(as_bytes(plan.digest))])


def check_digests(transport: Transport, plan: StepPlan, digests: list[bytes]) -> None:
    """Raises PlanMismatch on all ranks unless all digests, by rank, are the same; all ranks must hold the same list."""
    if len(set(digests)) == 1:
        return
    texts = tell_all(transport, str(plan), "the text of the plan")
    lines = ["the ranks have different plans for the next step:"]
    for rank, (text, digest) in enumerate(zip(texts, digests, strict=True)):
        lines.append(f"  rank {rank}: {text[:SHOWN_TEXT]} (digest {digest.hex()[:8]})")
    parts = [text.split("; ") for text in texts]
    lines.append("they differ in this:")
    for rank, own in enumerate(parts):
        odd = [part for part in own if any(part not in other for other in parts)]
        lines.append(f"  rank {rank}: {'; '.join(odd)[:SHOWN_TEXT] or 'something that this text does not show'}")
    raise PlanMismatch("\n".join(lines))


SHOWN_TEXT = 2000  # characters of a plan that are shown


class StepAgreement:
    """What all ranks tell each other at the end of each step: the norms of their gradients, and their next plan.

    Args:
        num_norms: how many parameters the whole model has; each has its own place in the vector of norms.
    """

    def __init__(self, transport: Transport, num_norms: int):
        self.transport, self.num_norms = transport, num_norms
        self.gathering: Gathering | None = None

    def open(self) -> None:
        """Post the receives: at the start of the step."""
        self.gathering = Gathering(self.transport, 32 + 4 * self.num_norms, "the gradient norms")

    def share(self, norms: torch.Tensor, next_plan: StepPlan) -> torch.Tensor:
        """Fill in the norms of all ranks and compare the next plan.

        Args:
            norms: (num_norms,) float32, zero for parameters of other ranks.

        Returns:
            (num_norms,) float32, the same on every rank.

        Raises:
            PlanMismatch: on every rank.
        """
        assert self.gathering is not None, "open() posts the receives; call it at the start of the step"
        everybody = self.gathering.share(torch.cat([as_bytes(next_plan.digest), norms.view(torch.uint8)]))
        self.gathering = None
        check_digests(self.transport, next_plan, [t[:32].numpy().tobytes() for t in everybody])
        return torch.stack([t[32:].clone().view(torch.float32) for t in everybody]).sum(dim=0)
