"""What the server that forks the workers imports before the first of them: torch, and nothing of the course.

The server imports a copy of this file from a folder of its own, the folder of the caller's temporary files. It forks a
worker in milliseconds because torch is loaded already; the course's modules each worker imports anew, so that an edited
file counts from the next run on.
"""

import atexit
import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

HOME = Path(__file__).parent
SERVER = os.getpid()

# A session of its own: Ctrl-C in the caller's terminal reaches the caller alone.
with contextlib.suppress(OSError):
    os.setsid()


@atexit.register
def end_with_the_caller() -> None:
    """The server ends when its caller has gone, even by kill -9: it takes the workers and the temporary files along."""
    if os.getpid() != SERVER:
        return
    for _ in range(50):  # a worker that is still starting may put a file into a folder that is being removed
        shutil.rmtree(HOME, ignore_errors=True)
        if not HOME.exists():
            break
        time.sleep(0.01)
    if os.getpgid(0) == SERVER:
        os.killpg(SERVER, signal.SIGKILL)


try:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HOME / "inductor"))  # made on import; here it is removed again
    import cloudpickle  # noqa: F401
    import torch._dynamo  # noqa: F401  a second of work that each worker's first optimizer step would do by itself
    import torch.distributed  # noqa: F401
finally:
    with contextlib.suppress(FileNotFoundError):  # the caller has stopped in the meantime
        (HOME / f"ready-{SERVER}").touch()
