"""What a learner has done of the exercises: `my_work/progress.json`, written in one step, read by nobody else.

For each task when its unit was first opened, how often an answer was checked, and when one was first right.
"""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from course_utils.workspace import MY_WORK, write_atomically

FILE = MY_WORK / "progress.json"


@dataclass
class Done:
    """What is known of one task; times in the form 2026-03-01T14:05."""

    opened: str = ""
    attempts: int = 0
    passed: str = ""


def read() -> dict[str, Done]:
    """{task: what was done}; empty if there is no file yet, or it is damaged."""
    try:
        kept = json.loads(FILE.read_text("utf-8"))
        return {str(name): Done(str(d["opened"]), int(d["attempts"]), str(d["passed"])) for name, d in kept.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def opened(names: list[str]) -> None:
    """A unit with these tasks was opened."""
    kept = read()
    for name in names:
        if not kept.setdefault(name, Done()).opened:
            kept[name].opened = now()
    keep(kept)


def attempted(name: str, passed: bool) -> None:
    """An answer to a task was checked."""
    kept = read()
    done = kept.setdefault(name, Done(opened=now()))
    done.attempts += 1
    if passed and not done.passed:
        done.passed = now()
    keep(kept)


def now() -> str:
    return datetime.now().isoformat(timespec="minutes")


def keep(kept: dict[str, Done]) -> None:
    """Write the file, unless this is not a learner's copy: solutions that are built or graded are nobody's progress."""
    if not Path.cwd().is_relative_to(FILE.parent):
        return
    if FILE.exists() and not read():  # damaged: it stays, for whoever can read it
        FILE.replace(FILE.with_suffix(".damaged.json"))
        print(f"progress.json could not be read; it is kept as {FILE.with_suffix('.damaged.json').name}")
    try:
        write_atomically(FILE, json.dumps({n: asdict(d) for n, d in kept.items()}, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        print(f"Your progress is not kept: {error}")
