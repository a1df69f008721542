"""The Python stack of a worker, on request: also of one that is stuck in a wait, in a sleep or in a loop of C.

The caller sends a signal, and faulthandler, which needs no help of the interpreter, writes the stack of the worker's
main thread into a file of the run's folder. Windows has no such signals.
"""

import faulthandler
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 1.0  # seconds for all workers together
SETTLED = 0.02  # seconds: a file that has not grown for so long is complete
NOT_HERE = "no stack: this system has no signal that a process answers with its stack (Windows)"
NONE = "no stack: it is starting, or has ended"
kept_open: list = []


def answer_requests(folder: Path, rank: int) -> None:
    """In the worker: from now on the signal makes it write its stack."""
    if not hasattr(faulthandler, "register"):
        return
    path = folder / f"stack {rank}"
    file = path.with_suffix(".new").open("wb")
    kept_open.append(file)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
    path.with_suffix(".new").rename(path)  # only now may the signal be sent: before, it would have ended the process


def collect(folder: Path, processes: Mapping[int, Any]) -> dict[int, str]:
    """In the caller: the stack of each rank, or why there is none. Takes at most about LIMIT seconds.

    Args:
        processes: by rank, as psutil.Process, which never sends a signal to another process that has got the same id.
    """
    import psutil  # here, because the workers import this module too and need no psutil

    if not hasattr(faulthandler, "register"):
        return {rank: NOT_HERE for rank in processes}
    found = dict.fromkeys(processes, NONE)
    files = {rank: folder / f"stack {rank}" for rank in processes}
    begins = {}
    for rank, process in processes.items():
        with suppress(OSError, psutil.Error):
            begins[rank] = files[rank].stat().st_size
            process.send_signal(signal.SIGUSR1)
            found[rank] = f"no stack: it has not answered within {LIMIT:g} s; perhaps its process is stopped"
    give_up = time.monotonic() + LIMIT
    seen: dict[int, bytes] = {}
    while begins and time.monotonic() < give_up:
        time.sleep(SETTLED)
        for rank, begin in list(begins.items()):
            with suppress(OSError):
                text = files[rank].read_bytes()[begin:]
                if text and text == seen.get(rank):
                    found[rank] = trim(text.decode("utf-8", "replace"))
                    del begins[rank]
                seen[rank] = text
    return found


def trim(stack: str) -> str:
    """The lines of the function that runs and of what it has called, without those by which the worker called it."""
    lines = [line for line in stack.splitlines() if line.startswith("  File ")]
    ours = [i for i, line in enumerate(lines) if '_worker.py", line' in line and line.endswith(" in main")]
    return "\n".join(lines[: ours[0]] if ours and ours[0] else lines)
