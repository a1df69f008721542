"""One short string for a whole run: equal for two runs that agree in every bit of losses, gradients and weights."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class StageRecord:
    """What one rank adds to the fingerprint of a run.

    Gradients and weights are recorded per parameter, under names that are the same for every cut of the model, so
    that the records of any number of ranks can be put together again.
    """

    def __init__(self) -> None:
        self.hashes: dict[str, hashlib._Hash] = {}
        self.losses: list[list[float]] = []

    def add(self, name: str, tensor: Tensor | None) -> None:
        """Take in the bytes of a gradient or a weight."""
        digest = self.hashes.setdefault(name, hashlib.sha256())
        if tensor is None:
            digest.update(b"none")
        else:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def add_gradients(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for name, parameter in parameters:
            self.add(name, parameter.grad)

    def add_weights(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for name, parameter in parameters:
            self.add(name, parameter)

    def add_losses(self, losses: Mapping[int, Tensor]) -> None:
        """The losses of the micro-batches of one step; only the rank of the last stage has them."""
        if losses:
            self.losses.append([losses[m].item() for m in sorted(losses)])

    def summary(self) -> tuple[dict[str, str], list[list[float]]]:
        """What is handed to `fingerprint`: small, and without open hashes."""
        return {name: digest.hexdigest() for name, digest in self.hashes.items()}, self.losses


def fingerprint(records: Sequence[tuple[dict[str, str], list[list[float]]]]) -> str:
    """The fingerprint of a run, 12 hexadecimal digits, from the summaries of its ranks in any order.

    Raises:
        ValueError: if two ranks recorded the same parameter.
    """
    parameters: dict[str, str] = {}
    losses: list[list[float]] = []
    for hashes, own_losses in records:
        if twice := set(parameters) & set(hashes):
            raise ValueError(f"two ranks recorded {sorted(twice)[0]}; every parameter belongs to one stage")
        parameters.update(hashes)
        losses = own_losses or losses
    whole = hashlib.sha256(repr(losses).encode())
    for name in sorted(parameters):
        whole.update(f"{name}:{parameters[name]}".encode())
    return whole.hexdigest()[:12]
