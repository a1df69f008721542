"""Run on many machines: this process is one rank of a job that torchrun, or Slurm's srun, has started.

    train(config, run=run_this_rank)  # in a script that `torchrun --nnodes 2 ... script.py` starts on both machines

`processes.launch` starts the processes itself, on one machine, and talks to them through pipes. Here all are there
already. They find each other through a store at MASTER_ADDR:MASTER_PORT and talk over the network; neither asks who is
at the other end, so both belong on a private network. What comes from there is numbers and text, and never code.

Sources: <https://docs.pytorch.org/docs/stable/elastic/run.html>, <https://slurm.schedmd.com/srun.html>.
"""

import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import torch.distributed.elastic.multiprocessing.errors as elastic_errors
from torch import Tensor

from course_utils._plain import put_together, raw, room_for, spec_of, take_apart
from course_utils._worker import describe
from course_utils.checkpoint import SaveReport
from course_utils.clocks import estimate_offsets
from course_utils.jobs import Job, job_for
from course_utils.processes import StageError
from course_utils.stages import one_thread
from course_utils.timeline import Timeline
from course_utils.training_state import Step
from course_utils.transfer import tell_all
from course_utils.transports import TorchTransport, Transport, Worker
from course_utils.waits import names

CLASSES = (Step, SaveReport, Timeline)  # what may be made out of what the other ranks send, besides plain values
POLL = 0.05  # seconds between two looks at the store


# --- Run it ----------------------------------------------------------------------------------------------------------


def run_this_rank(
    function: Callable,
    world_size: int,
    *arguments: Any,
    startup_limit: float = 300.0,
    wait_limit: float = 60.0,
    on_event: Callable[[int, Any], None] | None = None,
) -> list:
    """Run function(worker, *arguments) as this rank of the job; return the results of all ranks, on every rank.

    All ranks call it alike. At the end each one holds what all have returned, in training the weights of the whole
    model. A rank waits for the others no longer than `wait_limit`, so none may come to its end much later than another.

    Args:
        startup_limit: seconds until all ranks must have come.
        wait_limit: seconds that this rank waits for a single message.
        on_event: called with (rank, event) for each `worker.emit(event)`: live for this rank's own events, after the
            end for those of others.

    Raises:
        ValueError: no launcher has started this process, or for another number of ranks, or the ranks were given
            different arguments.
        StageError: not all ranks came, or this one failed. If it only lost another one, that one's own error says why.
    """
    job = job_for(world_size)
    if dist.is_initialized():
        raise ValueError("torch.distributed has been initialised already; call destroy_process_group() before this")
    own_events: list[Any] = []

    def emit(event: Any) -> None:
        take_apart(event, [])  # raises TypeError here and now if it could not travel
        own_events.append(event)
        if on_event is not None:
            on_event(job.rank, event)

    try:
        with one_thread():
            transport = join(job, startup_limit, wait_limit)
            compare_arguments(transport, arguments)
            result = function(Worker(job.rank, world_size, transport, emit), *arguments)
            results, events = zip(*share(transport, (result, own_events)), strict=True)
    except Exception as error:
        elastic_errors.get_error_handler().record_exception(error)  # for torchrun, which then shows the first one
        if isinstance(error, (NotAlike, StageError)):
            raise
        raise failure(job, error) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # closes the connections: others that wait for this rank need not wait longer
    for rank, theirs in enumerate(events):
        if on_event is not None and rank != job.rank:
            for event in theirs:
                on_event(rank, event)
    return list(results)


def failure(job: Job, error: Exception) -> StageError:
    """What went wrong on this rank, in the words of `processes.launch`."""
    kind, summary, traceback, _ = describe(error)
    elsewhere = "\n\nThe other rank's own output says why it ended." if kind == "closed" else ""
    return StageError(f"{job} failed: {summary}{elsewhere}\n\n{traceback.rstrip()}", kind, job.rank)


class NotAlike(ValueError):
    """The ranks were not started with the same arguments."""


def compare_arguments(transport: Transport, arguments: Sequence[Any]) -> None:
    """Raises NotAlike, on all ranks, if a rank was given something else than rank 0."""
    own: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        if is_dataclass(argument):
            kind = type(argument).__name__
            own |= {f"{number}: {kind}.{f.name}": as_text(getattr(argument, f.name)) for f in fields(argument)}
        else:
            own[f"{number}: argument {number}"] = as_text(argument)
    first, *others = tell_all(transport, own, "what it was asked to run")
    for rank, theirs in enumerate(others, start=1):
        for name in [*first, *(name for name in theirs if name not in first)]:
            here, there = first.get(name, "absent"), theirs.get(name, "absent")
            if here != there:
                raise NotAlike(
                    f"{name.split(': ')[1]} is {here[:200]} on rank 0 and {there[:200]} on rank {rank}: start all "
                    "ranks with the same options, and let all see the same folder of checkpoints"
                )


def as_text(value: Any) -> str:
    """The same for equal values on all machines: without places in memory, and of a path only its last part."""
    return value.name if isinstance(value, Path) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


# --- Find the others -------------------------------------------------------------------------------------------------


def join(job: Job, startup_limit: float, wait_limit: float) -> TorchTransport:
    """Make the default group, for control, and a second one, for data, both over gloo. Raises StageError."""
    give_up = time.monotonic() + startup_limit
    try:
        store = store_of(job, startup_limit)
    except dist.DistError as error:
        raise StageError(
            f"{job} did not reach MASTER_ADDR {job.address}, MASTER_PORT {job.port} within {startup_limit:g} s "
            f"(startup_limit): rank 0 must have been started, and this machine must reach that port. {error}",
            "limit",
        ) from None
    limit = timedelta(seconds=wait_limit)
    with interface_for(job) as address:
        name = meet(job, store, address, give_up, startup_limit)
        options: dict[str, Any] = {"rank": job.rank, "world_size": job.world_size, "timeout": limit}
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), **options)
        data_group = dist.new_group(backend="gloo", timeout=limit)
    return TorchTransport(job.rank, job.world_size, data_group, limit=wait_limit)


@cache
def store_of(job: Job, limit: float) -> Any:
    """The store through which the ranks find each other. Kept: without torchrun it lives in rank 0's process."""
    query = f"env://?rank={job.rank}&world_size={job.world_size}"
    return next(dist.rendezvous(query, timeout=timedelta(seconds=limit)))[0]


def meet(job: Job, store: Any, address: str, give_up: float, startup_limit: float) -> str:
    """Wait until all ranks are there; return a name that only they know, and only for this once.

    torchrun keeps its store when it starts the ranks anew, with all that an earlier attempt has left in it, and its
    count of restarts differs between machines (<https://github.com/pytorch/pytorch/issues/135712>). So each rank writes
    a number drawn at random, and with it the numbers that it sees of the others: when all see the same, none of them is
    from an earlier attempt.

    Raises:
        StageError: somebody did not come, or listens where the others cannot reach it.
    """
    own = secrets.token_hex(8)
    peers = [rank for rank in range(job.world_size) if rank != job.rank]
    while True:
        entries = {rank: json.loads(store.get(f"rank {rank}")) for rank in peers if store.check([f"rank {rank}"])}
        seen = {str(rank): entry["number"] for rank, entry in entries.items()} | {str(job.rank): own}
        store.set(f"rank {job.rank}", json.dumps({"number": own, "seen": seen, "address": address}))
        if all(rank in entries and entries[rank]["seen"] == seen for rank in peers):
            break
        if time.monotonic() > give_up:
            there = [rank for rank, entry in entries.items() if entry["seen"].get(str(job.rank)) == own]
            missing = [rank for rank in peers if rank not in there] or peers
            raise StageError(
                f"{names('rank', missing)} did not come within {startup_limit:g} s (startup_limit), says {job}. Were "
                "all machines started, and do their own outputs say why not?",
                "limit",
            )
        time.sleep(POLL)
    addresses = {job.rank: address} | {rank: entry["address"] for rank, entry in entries.items()}
    loopback = [rank for rank, where in addresses.items() if ipaddress.ip_address(where).is_loopback]
    if 0 < len(loopback) < job.world_size:
        raise StageError(
            f"{names('rank', sorted(loopback))} would listen on {addresses[loopback[0]]}, where no other machine "
            "reaches it: MASTER_ADDR means something else there. Give torchrun --local-addr, or set "
            "GLOO_SOCKET_IFNAME to the interface that leads to the others (`ip address` lists them)",
            "limit",
        )
    return sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


@contextmanager
def interface_for(job: Job) -> Iterator[str]:
    """Let gloo listen on the network interface over which MASTER_ADDR is reached; gives its address.

    By itself it would listen on the address that the host's own name has, which is often that of loopback.
    GLOO_SOCKET_IFNAME, if it is set, has its way.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    address = address_towards(job)
    for name, found in psutil.net_if_addrs().items() if sys.platform != "win32" else ():
        here = [a.address.split("%")[0] for a in found if a.family in (socket.AF_INET, socket.AF_INET6)]
        if chosen is None and address in here:
            os.environ["GLOO_SOCKET_IFNAME"] = name
        elif chosen == name and here:
            address = here[0]
    try:
        yield address
    finally:
        if chosen is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


def address_towards(job: Job) -> str:
    """The address of this machine from which it reaches the store. Raises OSError if there is no way."""
    error: OSError | None = None
    for family, kind, _, _, place in socket.getaddrinfo(job.address, job.port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # sends nothing: the system only looks for the way
                return probe.getsockname()[0].split("%")[0]
        except OSError as caught:
            error = caught
    raise error or OSError(f"MASTER_ADDR {job.address} has no address")


# --- Bring the results together --------------------------------------------------------------------------------------


def share(transport: Transport, mine: Any) -> list[Any]:
    """What every rank has, by rank: as text and as raw tensors. Timelines are put on the clock of rank 0."""
    own: list[Tensor] = []
    described = take_apart(mine, own)
    what = "its results"
    ranks = tell_all(transport, {"value": described, "tensors": [spec_of(tensor) for tensor in own]}, what)
    peers = [rank for rank in range(transport.world_size) if rank != transport.rank]
    rooms = {peer: [room_for(spec) for spec in ranks[peer]["tensors"]] for peer in peers} | {transport.rank: own}
    operations = []
    for peer in peers:
        filled = [raw(room) for room in rooms[peer] if room.numel()]
        operations += [transport.irecv(room, peer, what, control=True) for room in filled]
        operations += [transport.isend(raw(t), peer, what, control=True) for t in own if t.numel()]
    for operation in operations:
        transport.wait(operation)
    values = [put_together(rank["value"], rooms[number], CLASSES) for number, rank in enumerate(ranks)]
    recorded = [list(timelines_in(value)) for value in values]
    if any(recorded):
        offsets = estimate_offsets(transport)
        for timelines, ahead, uncertainty in zip(recorded, offsets.ahead, offsets.uncertainty, strict=True):
            # Ranks of one machine read one clock: what was found to differ is then within the uncertainty.
            for timeline in timelines if abs(ahead) > uncertainty else ():
                for column in (timeline.start, timeline.end):
                    for i, moment in enumerate(column):
                        column[i] = moment - ahead
    return values


def timelines_in(value: Any) -> Iterator[Timeline]:
    """Those that are somewhere in lists, tuples and dicts."""
    if isinstance(value, Timeline):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from timelines_in(item)
