"""What the server that forks the workers imports before the first of them: torch, and nothing of the course.

The server imports a copy of this file from a folder of its own, the folder of the caller's temporary files. It forks a
worker in milliseconds because torch is loaded already; the course's modules each worker imports anew, so that an edited
file counts from the next run on.
"""

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import psutil

HOME = Path(__file__).parent
SERVER = os.getpid()
PR_SET_CHILD_SUBREAPER = 36  # Linux: this process becomes the parent of those below it that have lost theirs
SECONDS_TO_END = 2.0

# A session of its own: Ctrl-C in the caller's terminal reaches the caller alone.
with contextlib.suppress(OSError):
    os.setsid()


# What a worker that has died leaves behind falls to the server, which reaps it and should not wonder.
if hasattr(ctypes.CDLL(None), "prctl"):
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
warnings.filterwarnings("ignore", message="forkserver: waitpid returned unexpected pid")


@atexit.register
def end_with_the_caller() -> None:
    """The server ends when its caller has gone, even by kill -9: with the workers, all below them, and the files."""
    if os.getpid() != SERVER:
        return
    give_up = time.monotonic() + SECONDS_TO_END
    while end_all_below() and time.monotonic() < give_up:  # until nothing is left that could start another
        time.sleep(0.002)
    shutil.rmtree(HOME, ignore_errors=True)
    if os.getpgid(0) == SERVER:
        os.killpg(SERVER, signal.SIGKILL)


def end_all_below() -> bool:
    """Whether there was anything to end."""
    found = False
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if one.status() != psutil.STATUS_ZOMBIE:
                found = True
                one.kill()
    return found


try:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HOME / "inductor"))  # made on import; here it is removed again
    import cloudpickle  # noqa: F401
    import torch._dynamo  # noqa: F401  a second of work that each worker's first optimizer step would do by itself
    import torch.distributed  # noqa: F401
finally:
    with contextlib.suppress(FileNotFoundError):  # the caller has stopped in the meantime
        (HOME / f"ready-{SERVER}").touch()
