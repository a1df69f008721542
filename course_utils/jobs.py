"""Which rank is this process, if torchrun or Slurm's srun has started it? Their variables, read and checked.

Sources: <https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables>,
<https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES>.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """What the launcher has told this process.

    Attributes:
        address, port: of the store, which torchrun keeps or else rank 0.
    """

    rank: int
    world_size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"


def job_from(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The job that this process is a rank of, or None if nobody has started it as one.

    Raises:
        ValueError: a variable of the job is missing, or is no number that it can be.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= set(environment):
        rank, world_size = "RANK", "WORLD_SIZE"
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # set by srun alone; the batch script has a PROCID too
        rank, world_size = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    else:
        return None
    size = number_in(environment, world_size, 1)
    own = number_in(environment, rank, 0, size - 1)
    if not environment.get("MASTER_ADDR"):
        raise ValueError(
            "MASTER_ADDR is not set: it must name the machine of rank 0. torchrun sets it; in a job script of Slurm: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        )
    return Job(own, size, environment["MASTER_ADDR"], number_in(environment, "MASTER_PORT", 1, 65535))


def number_in(environment: Mapping[str, str], name: str, lowest: int, highest: int = 2**31) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdecimal() and lowest <= int(text) <= highest):
        bounds = f"of at least {lowest}" if highest == 2**31 else f"from {lowest} to {highest}"
        raise ValueError(
            f"{name} is {f'{text!r}' if name in environment else 'not set'}; it must be a whole number {bounds}. "
            "torchrun sets it, as srun does its own; do not set it by hand for one rank alone"
        )
    return int(text)


def job_for(world_size: int) -> Job:
    """The job that this process is a rank of. Raises ValueError if there is none, or one of another size."""
    job = job_from()
    if job is None:
        raise ValueError(
            "RANK and WORLD_SIZE are not set: no torchrun has started this process, and no srun with several tasks. "
            f"Start it with `torchrun --nproc-per-node {world_size} ...`, or run all ranks from here with "
            "processes.launch"
        )
    if job.world_size != world_size:
        raise ValueError(
            f"WORLD_SIZE is {job.world_size}, but there are {world_size} ranks to run: start {world_size} processes "
            f"(torchrun: --nnodes times --nproc-per-node; srun: --ntasks), or train with --stages {job.world_size}"
        )
    return job
