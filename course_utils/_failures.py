"""What can end a run, and which of several reports is nearest to the cause."""

import signal
import time
from dataclasses import dataclass, field

# Which report is nearest to the cause, and how many seconds after the first report a nearer one may still come in.
PATIENCE = {"died": 0.0, "exception": 0.05, "timeout": 0.3, "closed": 0.3}


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
