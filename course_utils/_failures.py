"""What can end a run, and which of several reports is nearest to the cause."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# Which report is nearest to the cause, and how many seconds after the first report a nearer one may still come in.
PATIENCE = {"died": 0.0, "exception": 0.05, "timeout": 0.3, "closed": 0.3}

# A full disk, a used-up quota (not on Windows), a disk to be read only, a folder of others, or one that was removed.
CANNOT_WRITE = (
    errno.ENOENT,
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)


@dataclass
class Failure:
    """Why a stage, or the run as a whole, did not get to its end."""

    kind: str  # died | exception | timeout | closed, or for the run as a whole: limit | stopped
    rank: int | None
    summary: str
    traceback: str = ""
    at: float = field(default_factory=time.monotonic)  # seconds
    how: str = ""  # it died, in a few words

    @property
    def distance(self) -> tuple[int, float]:
        """From the cause: the smallest is the one to show first."""
        return list(PATIENCE).index(self.kind), self.at


class RunEnded(Exception):
    """Ends the watch over a run that did not get to its end."""

    def __init__(self, failure: Failure):
        super().__init__(failure.summary)
        self.failure = failure


def death(rank: int, exit_code: int | None) -> Failure:
    """The failure of a stage whose process ended without a word."""
    if exit_code is None or exit_code >= 0:
        summary = f"its process ended with exit code {exit_code} before it had a result, and without an exception"
        return Failure("died", rank, summary, how=f"exit code {exit_code}")
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
    return Failure("died", rank, f"its process was killed by {name}{hint}", how=f"killed by signal {-exit_code}")


def endless(wait_limit: float) -> Failure:
    """The failure of a run that is a deadlock."""
    given_up = f"the run did not wait for {wait_limit:g} s (wait_limit)"
    return Failure("timeout", None, f"no wait of a deadlock ends: {given_up}")


@contextmanager
def says_what_cannot_be_written(folder: Callable[[], Path | str]) -> Iterator[None]:
    """Names the folder and the remedy if the few small files of a run cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in CANNOT_WRITE:
            raise
        why = os.strerror(error.errno)
        raise OSError(
            error.errno,
            f"no stage can start, because the files of a run cannot be written to {folder()} ({why}): make room there, "
            "or set TMPDIR to another folder and start Python again",
        ) from error
