"""The time of a step over a long line, 20 ms in each direction: the course's engine against PyTorch's own.

    sudo python -m tests.benchmarks.delay_line

Needs Linux, root, /dev/net/tun, and the commands `ip` (iproute2) and `unshare` (util-linux). The two hosts are network
namespaces of this machine, one per rank. Each rank's process begins in a new namespace without a name, which the kernel
removes with the process: nothing can be left behind. The line between them is a pair of TAP devices: a thread of this
program reads the frames that one host sends and writes them to the other 20 ms later.

Both engines run steps of a training loop, without an optimizer; ours also exchanges gradient norms and the next plan.
The engines take turns, the first step of each turn is not counted, and the result is the median of the ratios of steps.
Only ratios mean anything. All gradients are compared, bit for bit. Everything has a limit and ends within two minutes.
"""

import argparse
import fcntl
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from course_utils.transports import TorchTransport, Worker
from tests.benchmarks.engines import OurEngine, TorchEngine, both_engines, ratios

DELAY = 0.020  # seconds, in each direction
NUM_MICRO_BATCHES = 8
LIMIT = 120  # seconds for everything
WAIT_LIMIT = 20  # seconds for a single wait of a rank
MTU = 9000  # bytes of the largest packet
LARGEST_FRAME = MTU + 18  # the header of Ethernet, and a tag
COURSE = Path(__file__).resolve().parents[2]

# From <linux/if_tun.h>: make a device that gives and takes Ethernet frames with nothing before them.
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def open_tap() -> tuple[int, str]:
    """A new TAP device: its descriptor, whose closing removes it, and the name that the kernel gave it."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"course%d", IFF_TAP | IFF_NO_PI)
    answer = fcntl.ioctl(descriptor, TUNSETIFF, request)
    return descriptor, answer[:16].rstrip(b"\0").decode()


def carry_frames(ends: tuple[int, int], delay: float, stop: int) -> None:
    """Take each frame from one end to the other `delay` seconds later, until `stop` can be read or a host has gone."""
    go_first()
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: deque[tuple[float, int, bytes]] = deque()  # (when, where to, frame); all frames take equally long
    while True:
        pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select([*ends, stop], [], [], pause)
        if stop in readable:
            return
        for end in readable:
            try:
                frame = os.read(end, LARGEST_FRAME)
            except OSError:  # that host has gone, and its device with it
                return
            under_way.append((time.monotonic() + delay, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            with suppress(OSError):  # that host has not switched its device on, or has gone; a line loses such frames
                os.write(end, frame)


@contextmanager
def delay_line(delay: float) -> Iterator[tuple[str, str]]:
    """A line with that delay in each direction; gives the names of the devices at its two ends."""
    (first, first_name), (second, second_name) = open_tap(), open_tap()
    stop, stopper = os.pipe()
    carrier = threading.Thread(target=carry_frames, args=((first, second), delay, stop), daemon=True)
    carrier.start()
    try:
        yield first_name, second_name
    finally:
        os.close(stopper)
        carrier.join()
        for descriptor in (first, second, stop):
            os.close(descriptor)


def measure(repetitions: int = 2, steps: int = 3, delay: float = DELAY) -> dict[str, dict[str, float]]:
    """{schedule: {"ours": milliseconds of a step, "torch": milliseconds, "ratio": median of ours/torch}}.

    Raises:
        RuntimeError: a rank failed, or was not done in time; with what it wrote.
    """
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        devices = cleanup.enter_context(delay_line(delay))
        give_up = time.monotonic() + LIMIT
        processes = []
        for rank, device in enumerate(devices):
            arguments = ["--rank", rank, "--device", device, "--folder", folder, "-r", repetitions, "-s", steps]
            processes.append(start_host(rank, folder, [str(argument) for argument in arguments], cleanup))
        for process, device in zip(processes, devices, strict=True):
            wait_until(lambda process=process: has_own_network(process), give_up, "a new network namespace")
            # This fails if the process has ended already, and a rank without its device ends: both are reported below.
            subprocess.run(
                ["ip", "link", "set", device, "netns", str(process.pid)], stderr=subprocess.DEVNULL, check=False
            )
        wait_until(lambda: all(process.poll() is not None for process in processes), give_up, "the ranks to end")
        for rank, process in enumerate(processes):
            if process.returncode:
                raise RuntimeError(f"rank {rank} failed:\n" + (folder / f"output {rank}").read_text())
        ranks = [json.loads((folder / f"answer {rank}").read_text()) for rank in (0, 1)]
    return {name: ratios([rank[name] for rank in ranks]) for name in ranks[0]}


def start_host(rank: int, folder: Path, arguments: list[str], cleanup: ExitStack) -> subprocess.Popen:
    """Run this module as a rank in a network namespace of its own; `cleanup` ends it."""
    output = cleanup.enter_context((folder / f"output {rank}").open("w"))
    command = ["unshare", "--net", sys.executable, "-m", "tests.benchmarks.delay_line", *arguments]
    process = subprocess.Popen(command, cwd=COURSE, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    cleanup.callback(process.wait)
    cleanup.callback(process.kill)
    return process


def has_own_network(process: subprocess.Popen) -> bool:
    """Whether it has left the namespace of this process, or has ended: then its output says why."""
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return True


def wait_until(happened: Callable[[], bool], give_up: float, what: str) -> None:
    while not happened():
        if time.monotonic() > give_up:
            raise RuntimeError(f"gave up waiting for {what}")
        time.sleep(0.01)


def run_rank(rank: int, device: str, folder: Path, repetitions: int, steps: int) -> None:
    """One rank: join the other over the line, measure, write the seconds to a file."""
    go_first()
    signal.alarm(LIMIT)  # ends this process even if nobody is left to do so
    wait_until(lambda: device in [name for _, name in socket.if_nameindex()], time.monotonic() + WAIT_LIMIT, device)
    for command in (
        f"ip address add 10.78.0.{rank + 1}/24 dev {device}",
        f"ip link set {device} mtu {MTU} up",
        "ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = device
    limit = timedelta(seconds=WAIT_LIMIT)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2, timeout=limit
    )
    transport = TorchTransport(rank, 2, dist.new_group(backend="gloo", timeout=limit), limit=WAIT_LIMIT)
    engines = both_engines(Worker(rank, 2, transport, emit=print), NUM_MICRO_BATCHES, blocks_per_stage=1)
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for _ in range(repetitions):
        for name, pair in engines.items():
            seconds[name] += map(list, zip(*(seconds_of_steps(engine, steps) for engine in pair), strict=True))
    (folder / f"answer {rank}").write_text(json.dumps(seconds))
    dist.barrier()
    os._exit(0)  # not waiting for the groups' threads


def seconds_of_steps(engine: OurEngine | TorchEngine, steps: int) -> list[float]:
    """A turn of an engine; its first step is not counted."""
    dist.barrier()
    ends = engine.train(1 + steps)
    return [end - begin for begin, end in itertools.pairwise(ends)]


def go_first() -> None:
    """Let this thread go before other programs where that is allowed: a busy machine is no part of the line's delay."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a step over a line with a delay; needs root.")
    parser.add_argument("--delay", type=float, default=1e3 * DELAY, help="milliseconds (default: %(default)g)")
    parser.add_argument("-r", "--repetitions", type=int, default=2, help="turns of each (default: %(default)s)")
    parser.add_argument("-s", "--steps", type=int, default=3, help="timed in each turn (default: %(default)s)")
    for name, kind in (("--rank", int), ("--device", str), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options.device, options.folder, options.repetitions, options.steps)
    print(
        f"a step of training, K=2, M={NUM_MICRO_BATCHES}, over {options.delay:g} ms: milliseconds, median of the ratios"
    )
    print(f"{'':6}{'ours':>8}{'torch':>8}{'ratio':>8}")
    for name, row in measure(options.repetitions, options.steps, options.delay / 1e3).items():
        print(f"{name:6}{row['ours']:8.0f}{row['torch']:8.0f}{row['ratio']:8.3f}")


if __name__ == "__main__":
    main()
