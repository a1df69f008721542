"""What the workers get from the place where their caller runs."""

import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

# Meant for the caller itself, if torchrun, Slurm or an MPI has started it as one of its own ranks. Libraries that a
# worker imports would take it for that rank, and torch would make its groups in another way or somewhere else.
FOREIGN_VARIABLES = {
    # torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    # how torch's own groups are made, on the network that the caller's ranks share
    *("GLOO_SOCKET_IFNAME", "GLOO_DEVICE_TRANSPORT", "TORCH_GLOO_LAZY_INIT", "TORCH_DIST_INIT_BARRIER"),
    # Slurm, of one task (what belongs to the whole job, such as SLURM_JOB_ID or SLURM_TMPDIR, stays):
    # https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASK_PID", "SLURM_GTIDS"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_SRUN_COMM_HOST", "SLURM_SRUN_COMM_PORT"),
    # MPIs: Intel MPI and MPICH; the prefixes below are those of PMI and PMIx, Open MPI and MVAPICH
    *("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
FOREIGN_PREFIXES = (
    "TORCHELASTIC_",
    "SLURM_STEP",
    "SLURM_PMIX",
    "PMI_",
    "PMIX_",
    "OMPI_COMM_WORLD_",
    "MV2_COMM_WORLD_",
)


@dataclass
class Settings:
    """What a worker must know before it can read its function."""

    folder: Path  # of this run, mode 0700: the FileStore and the status file
    token: bytes  # known to the workers of this run only
    interface: str | None  # the network interface that holds 127.0.0.1
    startup_limit: float  # seconds
    wait_limit: float  # seconds, for one wait
    environment: dict[str, str]
    search_path: list[str]
    sources: dict[str, list[str]]


def settings_for_workers(
    folder: Path, startup_limit: float, wait_limit: float, sources: dict[str, list[str]]
) -> Settings:
    return Settings(
        folder=folder,
        token=secrets.token_bytes(32),
        interface=loopback_interface(),
        startup_limit=startup_limit,
        wait_limit=wait_limit,
        environment=environment_for_workers(),
        search_path=list(sys.path),
        sources=sources,
    )


def environment_for_workers() -> dict[str, str]:
    """The caller's variables as they are now: the server has those of the time when it was started."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in FOREIGN_VARIABLES and not name.startswith(FOREIGN_PREFIXES)
    }


def loopback_interface() -> str | None:
    """The name of the network interface that holds 127.0.0.1, for gloo to listen on; None where gloo takes no names."""
    if sys.platform == "win32":
        return None
    import psutil  # here, because the workers import this module too and need no psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    raise OSError("no network interface has the address 127.0.0.1, which the stages talk over; `ip address` lists them")
