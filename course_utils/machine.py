"""What this machine can do, and what the lessons make of it: `print(describe_machine(inspect_machine()))`.

Two facts decide what a pipeline can gain here: how many cores this process may use, and whether two workers that do the
same are equally fast. On processors with fast and slow cores, and on machines that are busy with other things, they are
not, and then two stages of equal cost do not take equal time.
"""

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from course_utils.processes import launch
from course_utils.recipes import TrainingConfig, with_precision
from course_utils.stages import one_thread
from course_utils.transports import Worker

ALIKE = 1.1  # workers whose speeds differ by less than this factor count as equally fast
BUSY = 0.2  # of the processor's time in use by others: above it times say little
GB = 1e9
CGROUP = Path("/sys/fs/cgroup")  # where a container of Linux says what it may use


@dataclass(frozen=True)
class Machine:
    """What a machine check has found.

    Attributes:
        cores: that this process may use.
        memory: bytes that this process may use, taken by others or not.
        gpus: their names.
        busy: the share of the processor's time that other programs used just before or just after, whichever is more.
        instructions: the widest instructions that PyTorch uses on this processor, "AVX2" for example.
        alone: matrix products per second of one worker while the other one does nothing.
        together: the same of each of two workers while both work.
        backend: what carries the messages between stages in the lessons.
        precision: "fp32" or "bf16", what "auto" chooses for the capstone's model.
    """

    cores: int
    memory: int
    gpus: tuple[str, ...]
    busy: float
    instructions: str
    alone: float
    together: tuple[float, float]
    backend: str
    precision: str

    @property
    def unequal(self) -> float:
        """How many times as fast as the slower one the faster one of two identical workers is."""
        return max(self.together) / min(self.together)

    @property
    def gain(self) -> float:
        """How many times as much two workers get done as one that works alone; 2 at most, apart from noise."""
        return sum(self.together) / self.alone


def inspect_machine(seconds: float = 0.1) -> Machine:
    """Look at this machine; it takes about three seconds, most of them to start two processes.

    Args:
        seconds: how long a worker counts at a time; it does so five times alone and five times beside the other one.

    Raises:
        StageError: processes cannot be started here.
    """
    before = work_of_others()
    workers = launch(count_products, 2, seconds)
    busy = max(before, work_of_others())
    return Machine(
        cores=usable_cores(),
        memory=usable_memory(),
        gpus=names_of_gpus(),
        busy=busy,
        instructions=torch.backends.cpu.get_cpu_capability(),
        alone=workers[0][0],
        together=(workers[0][1], workers[1][1]),
        backend="gloo",
        precision=with_precision(TrainingConfig(precision="auto")).precision,
    )


def count_products(worker: Worker, seconds: float, repetitions: int = 5, size: int = 192) -> tuple[float, float]:
    """What each worker runs: (products per second while the other one waits, while both work). Medians.

    Alone is rank 0 only; rank 1 says 0 there.
    """
    matrix = torch.ones(size, size)
    products_per_second(matrix, seconds)  # the first products of a process are slower
    alone, together = [0.0], []
    for _ in range(repetitions):
        dist.barrier()
        if worker.rank == 0:
            alone.append(products_per_second(matrix, seconds))
        dist.barrier()
        together.append(products_per_second(matrix, seconds))
    return statistics.median(alone[1:] or alone), statistics.median(together)


def products_per_second(matrix: torch.Tensor, seconds: float) -> float:
    """How many times a second this thread multiplies the matrix by itself."""
    count, started = 0, time.perf_counter()
    with one_thread():
        while (passed := time.perf_counter() - started) < seconds or count == 0:
            matrix @ matrix  # noqa: B018
            count += 1
    return count / passed


def work_of_others(seconds: float = 0.3) -> float:
    """The share of the processor's time that is in use while this process waits: between 0 and 1."""
    return psutil.cpu_percent(seconds) / 100


def beside_others(work: Callable, *arguments: Any) -> tuple[Any, float]:
    """Do work in this process; return its result and the share of the processor's time that others used meanwhile."""
    began = time.perf_counter(), time.process_time(), seconds_in_use()
    result = work(*arguments)
    passed, own, all_in_use = (
        time.perf_counter() - began[0],
        time.process_time() - began[1],
        seconds_in_use() - began[2],
    )
    return result, max(0.0, (all_in_use - own) / (passed * (psutil.cpu_count() or 1)))


def seconds_in_use() -> float:
    """For how many seconds the cores of this machine have worked, together and for whomever."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)  # of programs with a low priority; not on Windows


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has if it is bound to some, or in a container."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (*read_words(CGROUP / "cpu.max"), "max", "max")[:2]
    if quota.isdecimal() and period.isdecimal():
        return max(1, min(bound, math.ceil(int(quota) / int(period))))
    return bound


def usable_memory() -> int:
    """Bytes of memory that this process may use: of the machine, or of the container if that has less."""
    total = psutil.virtual_memory().total
    limit = (*read_words(CGROUP / "memory.max"), "max")[0]
    return min(total, int(limit)) if limit.isdecimal() else total


def read_words(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").split()
    except OSError:
        return []


def names_of_gpus() -> tuple[str, ...]:
    """The GPUs that PyTorch can use; a driver that does not fit counts as none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about such a driver
        if torch.cuda.is_available():
            return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return ("Apple's GPU",) if torch.backends.mps.is_available() else ()


# --- In words --------------------------------------------------------------------------------------------------------


def describe_machine(machine: Machine) -> str:
    """The findings as sentences, and what follows from each for the lessons; one line each."""
    return "\n".join(
        (
            of_cores(machine),
            f"Memory: {machine.memory / GB:.1f} GB.",
            of_gpus(machine),
            of_others(machine.busy),
            of_instructions(machine),
            of_workers(machine),
            of_precision(machine),
            f"Backend: {machine.backend}, for messages between processes on this machine.",
        )
    )


def of_cores(machine: Machine) -> str:
    if machine.cores == 1:
        return (
            "Cores: this process may use 1, so two stages take turns on it. All lessons run; measured pipelines "
            "cannot be faster than one process here."
        )
    return f"Cores: this process may use {machine.cores}. Lessons measure with two stages, a core for each."


def of_gpus(machine: Machine) -> str:
    if not machine.gpus:
        return "GPUs: none that PyTorch can use. The lessons need none."
    return f"GPUs: {', '.join(machine.gpus)}. The lessons compute on the processor all the same."


def of_others(busy: float) -> str:
    """What other programs do to measurements; `busy` is their share of the processor's time."""
    used = f"Other programs: they use {busy:.0%} of the processor's time"
    if busy < BUSY:
        return f"{used}, little enough to measure beside them."
    return f"{used}. Times that are measured now say little: wait until they are done, then run the cell again."


def of_instructions(machine: Machine) -> str:
    return (
        f"Instructions: PyTorch uses {machine.instructions} here. With others the last bits of sums differ, so "
        "compare fingerprints on one machine only."
    )


def of_workers(machine: Machine) -> str:
    """Whether two identical workers are equally fast, and whether they hinder each other."""
    if machine.unequal < ALIKE:
        equal = f"differ by {machine.unequal - 1:.0%}: two stages of equal cost take about equal time"
    else:
        equal = (
            f"differ by {machine.unequal - 1:.0%}: two stages of equal cost do not take equal time here (fast and "
            "slow cores, or other work on this machine)"
        )
    together = f"Together they get {machine.gain:.2f} times as much done as one alone."
    if machine.busy >= BUSY or machine.gain > 2 * ALIKE:
        together += " Other programs disturbed this: draw no conclusion from it."
    return f"Workers: two identical ones {equal}. {together}"


def of_precision(machine: Machine) -> str:
    other = "fp32" if machine.precision == "bf16" else "bf16"
    return (
        f'Precision: where a lesson says "auto", matrix products are computed in {machine.precision}; a layer of the '
        f"capstone's model takes longer in {other} here."
    )
