"""Where a rank computes, and what carries its messages there: the processor and gloo, or a GPU and NCCL.

With a GPU for each rank of a machine, activations and gradients go from GPU to GPU over NCCL. With fewer GPUs several
ranks share one; NCCL refuses that, so their messages go through host memory over gloo. Plans, norms and tokens always
travel over gloo: they are small and needed on the processor.

Written for GPUs, not yet run on one: see "What runs where" in the README for what the promises become there.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from course_utils.transfer import Gathering
from course_utils.transports import TorchTransport, Transport

DEVICES = ("cpu", "cuda")


def check_device(wanted: str) -> None:
    """Raises ValueError for a device that is none, or that this machine does not have."""
    if wanted not in DEVICES:
        raise ValueError(f"unknown device {wanted!r}; there are {', '.join(DEVICES)}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but PyTorch finds no CUDA device here: use 'cpu', or install a build of torch with CUDA "
            "(`python course.py lab --torch cuda`)"
        )


def place_rank(transport: Transport, wanted: str) -> str:
    """The device of this rank, "cpu" or "cuda:1"; its transport then carries data as is best there.

    All ranks must call it, once, before the first message of data.

    Args:
        wanted: "cpu" or "cuda".

    Raises:
        ValueError: see `check_device`.
    """
    check_device(wanted)
    if wanted == "cpu":
        return "cpu"
    # torchrun tells both; `launch` and threads use one machine.
    local_rank = int(os.environ.get("LOCAL_RANK", transport.rank))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", transport.world_size))
    count = torch.cuda.device_count()
    device = f"cuda:{local_rank % count}"
    torch.cuda.set_device(device)
    if isinstance(transport, TorchTransport):
        mine = torch.tensor([count >= ranks_here and dist.is_nccl_available()], dtype=torch.uint8)
        votes = Gathering(transport, 1, "whether each rank has a GPU of its own").share(mine)
        if all(votes):
            use_nccl(transport, device)
    return device


def use_nccl(transport: TorchTransport, device: str) -> None:
    """Let NCCL carry the data: a communicator for each directed pair of ranks, so that no message waits for another's.

    NCCL moves the messages of one communicator strictly in the order in which they were issued; see `validity.QUEUES`
    for what hangs otherwise. All ranks make all groups in the same order; NCCL connects a pair at its first message.
    """
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a wait then has an end on the processor too
    limit, ranks = timedelta(seconds=transport.limit), range(transport.world_size)
    transport.data_groups = {
        (sender, receiver): dist.new_group([sender, receiver], timeout=limit, backend="nccl")
        for sender in ranks
        for receiver in ranks
        if sender != receiver
    }
    transport.wire_device = device
