"""One short string for a whole run: equal for two runs that agree in every bit of losses, gradients and weights."""

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

LOSSES = "losses"  # the name under which the rank of the last stage records them


class StageRecord:
    """What one rank adds to the fingerprint of a run.

    Gradients and weights are recorded per parameter, under names that are the same for every cut of the model, so
    that the records of any number of ranks can be put together again. Under each name there is a chain of digests:
    whatever is added is hashed together with the digest so far. A digest can be saved and resumed, by another rank as
    well; a hash that is still open could not.

    Args:
        resumed: the part of an earlier `summary` that this rank goes on with.

    Raises:
        ValueError: for something that is no digest.
    """

    def __init__(self, resumed: Mapping[str, str] | None = None) -> None:
        self.digests: dict[str, bytes] = {}
        for name, digest in (resumed or {}).items():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"the digest of {name} is {digest!r}; it must be 64 hexadecimal digits")
            self.digests[name] = bytes.fromhex(digest)

    def add(self, name: str, tensor: Tensor | None) -> None:
        """Take in the bytes of a gradient or a weight."""
        if tensor is None:
            self.chain(name, b"none")
        else:
            self.chain(name, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def chain(self, name: str, data: bytes | memoryview) -> None:
        digest = hashlib.sha256(self.digests.get(name, b""))
        digest.update(data)
        self.digests[name] = digest.digest()

    def add_gradients(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for name, parameter in parameters:
            self.add(name, parameter.grad)

    def add_weights(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        for name, parameter in parameters:
            self.add(name, parameter)

    def add_losses(self, losses: Mapping[int, Tensor]) -> None:
        """The losses of the micro-batches of one step; only the rank of the last stage has them."""
        if losses:
            self.chain(LOSSES, struct.pack(f"<{len(losses)}d", *(losses[m].item() for m in sorted(losses))))

    def summary(self) -> dict[str, str]:
        """{name: digest}: what is handed to `fingerprint`, and what a checkpoint keeps."""
        return {name: digest.hex() for name, digest in self.digests.items()}


def step_summary(losses: Mapping[int, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """What one rank adds to the fingerprint of a single step: its micro-batches' losses, its parameters' gradients.

    Args:
        losses: {micro-batch: loss}; empty on a rank without the last stage.
        parameters: (name in the whole model, parameter), as `Stage.named_parameters_globally` gives them.
    """
    record = StageRecord()
    record.add_losses(losses)
    record.add_gradients(parameters)
    return record.summary()


def fingerprint(records: Iterable[Mapping[str, str]]) -> str:
    """The fingerprint of a run, 12 hexadecimal digits, from the summaries of its ranks in any order.

    Raises:
        ValueError: if two ranks recorded the same parameter, or both recorded losses.
    """
    digests: dict[str, str] = {}
    for record in records:
        if twice := sorted(set(digests) & set(record)):
            raise ValueError(f"two ranks recorded {twice[0]}; every parameter belongs to one stage, losses to the last")
        digests.update(record)
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}:{digests[name]}\n".encode())
    return whole.hexdigest()[:12]
