"""Tied parameters: several that are one, such as an embedding and the output layer that shares its matrix.

On one device one tensor is used twice. In a pipeline the two uses may lie on different stages, so each stage keeps a
copy of its own, as in Megatron-LM (Narayanan et al., 2021, section 4; torch users: pytorch#51931). The copies stay one
parameter because they begin equal and every step adds up their gradients: each owner gets the sum, and the same
optimizer makes the same of it.

The gradients are added once, after the last backward, in model order, on one device as well. So the sum has the same
bits for every cut. (One tensor that is used twice collects its gradients micro-batch by micro-batch: another order of
addition, which differs in the last bits.)
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.stages import CutModel
from course_utils.transfer import PlanMismatch, as_bytes
from course_utils.transports import Transport

Groups = Sequence[Sequence[str]]  # of names of parameters in the whole model


def check_groups(groups: Groups, cut: CutModel) -> None:
    """Raises ValueError, naming the parameter, for what cannot be tied."""
    seen: set[str] = set()
    for group in groups:
        shapes = cut.parameter_shapes  # only here: a configuration without ties builds no block to know them
        if isinstance(group, str) or len(group) < 2:
            raise ValueError(f"tie has the group {group!r}; a group has the names of two or more parameters")
        for name in group:
            if name not in shapes:
                endings = sorted(n for n in shapes if n.rpartition(".")[2] == name.rpartition(".")[2])
                raise ValueError(f"tie names {name!r}, which the model does not have; there are {', '.join(endings)}")
            if name in seen:
                raise ValueError(f"tie names {name} twice; put all that is one parameter into one group")
            if shapes[name] != shapes[group[0]]:
                raise ValueError(
                    f"{group[0]} is {tuple(shapes[group[0]])} and {name} is {tuple(shapes[name])}; "
                    "tied parameters have one shape"
                )
            seen.add(name)


class Ties:
    """The tied parameters as one rank sees them.

    Args:
        groups: names of the parameters that are one; see `check_groups`.
        rank_of: {name: the rank that holds it}, of all tied parameters.
        own: this rank's parameters by name.

    Attributes:
        repeated: the names that the global norm must leave out: the first of each group stands for all.
    """

    def __init__(
        self,
        groups: Groups,
        rank_of: Mapping[str, int],
        own: Mapping[str, Tensor],
        transport: Transport | None,
    ):
        ordered = [sorted(group) for group in groups]  # a name begins with its block's number: model order
        self.repeated = {name for group in ordered for name in group[1:]}
        # Those in which this rank has a part.
        self.groups = [group for group in ordered if any(name in own for name in group)]
        self.rank_of, self.own = rank_of, own
        self.transport: Any = transport  # None will do where one process holds all: it sends nothing
        self.posted: dict[str, tuple[Tensor, Any]] | None = None

    def make_equal(self, cut: CutModel, seed: int) -> None:
        """Begin with the first owner's weights. Each rank draws them itself, one block at a time: nothing is sent."""
        for first, *others in self.groups:
            copies = [self.own[name] for name in others if name in self.own]
            if copies:
                drawn = cut.draw_parameter(first, seed)
                with torch.no_grad():
                    for copy in copies:
                        copy.copy_(drawn)

    def compare(self) -> None:
        """Raises PlanMismatch on their owners if tied parameters are not equal in every bit."""
        digests = {
            name: as_bytes(hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).digest())
            for name, tensor in self.own.items()
            if name in self.rank_of
        }
        digests |= self.share(digests, self.post({name: torch.empty(32, dtype=torch.uint8) for name in self.foreign}))
        for first, *others in self.groups:
            for other in others:
                if not torch.equal(digests[first], digests[other]):
                    raise PlanMismatch(
                        f"tied parameters differ: {first} on rank {self.rank_of[first]} and {other} on rank "
                        f"{self.rank_of[other]} must be equal in every bit; were they loaded from different files?"
                    )

    def open(self) -> None:
        """Post the receives for the gradients: at the start of a step, before those of the norms."""
        like = {name: self.own[own] for group in self.groups for own in group if own in self.own for name in group}
        self.posted = self.post({name: torch.empty_like(like[name], device="cpu") for name in self.foreign})

    def add_up(self) -> None:
        """After the last backward: every owner gets the sum of its group's gradients. One that has none counts as 0."""
        posted, self.posted = self.posted, None
        if posted is None:
            raise RuntimeError("open() posts the receives; call it at the start of the step")
        tied = {name: self.own[name] for group in self.groups for name in group if name in self.own}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for name, p in tied.items()}
        gradients |= self.share(gradients, posted)
        for first, *others in self.groups:
            total = gradients[first].clone()
            for other in others:
                total += gradients[other].to(total.device)
            for name in (first, *others):
                if name in self.own:
                    self.own[name].grad = total.to(self.own[name].device, copy=True)

    @property
    def foreign(self) -> list[str]:
        """The tied parameters of other ranks that this one has a part in, in the order in which they arrive."""
        return [name for group in self.groups for name in group if name not in self.own]

    def post(self, buffers: dict[str, Tensor]) -> dict[str, tuple[Tensor, Any]]:
        """Receives from the owners: {name: (buffer, operation)}."""
        return {
            name: (buffer, self.begin("irecv", buffer, self.rank_of[name], name)) for name, buffer in buffers.items()
        }

    def share(self, mine: Mapping[str, Tensor], posted: dict[str, tuple[Tensor, Any]]) -> dict[str, Tensor]:
        """Send each own tensor to all other ranks of its group; return what has arrived from them, by name."""
        operations = [operation for _, operation in posted.values()]
        for group in self.groups:
            ranks = sorted({self.rank_of[name] for name in group})
            for name in group:
                if name in self.own:
                    peers = [peer for peer in ranks if peer != self.rank_of[name]]
                    operations += [self.begin("isend", mine[name], peer, name) for peer in peers]
        for operation in operations:
            self.transport.wait(operation)
        return {name: buffer for name, (buffer, _) in posted.items()}

    def begin(self, kind: str, tensor: Tensor, peer: int, name: str) -> Any:
        return getattr(self.transport, kind)(tensor.cpu(), peer, f"{name}, which is tied", control=True)
