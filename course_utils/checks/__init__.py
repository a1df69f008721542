"""Answers to what a lesson or an exercise asks you to write, checked at once: `check("05.accumulate", accumulate)`.

Each lesson has a module here, and each of its tasks a function in it that takes the answer, tries it and raises
`report.Wrong` with what was expected and what came. Each exercise unit has a module too, whose tasks are `tasks.Task`s:
`check("unit06.two_in_flight", two_in_flight)`. A check says what it found and never raises, so "Run all" goes on.
"""

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

from course_utils import progress
from course_utils._lines import in_lines
from course_utils.checks import tasks
from course_utils.checks.report import TookTooLong, Wrong, is_unwritten, place_in, time_limit

LIMIT = 20.0  # seconds: generous, a check takes less than two


class Points(float):
    """What an answer to an exercise earns: the last line of a check's cell, which is how nbgrader reads it."""

    def __new__(cls, earned: float, possible: float) -> "Points":
        points = super().__new__(cls, earned)
        points.possible = possible
        return points

    possible: float

    def __repr__(self) -> str:
        return f"{float(self):g}"

    def _repr_html_(self) -> str:
        return f"<b>{float(self):g} of {tasks.points(round(self.possible))}</b>"


def check(name: str, answer: Any, limit: float | None = None) -> Points | None:
    """Try an answer and print one paragraph about it.

    Args:
        name: lesson and task, such as "05.accumulate", or unit and task, such as "unit05.accumulate".
        answer: what you wrote.
        limit: seconds after which an answer is ended that is still running; a lesson's has 20, a unit's 10.

    Returns:
        The points for an answer to an exercise, None for one to a lesson.

    Raises:
        ValueError: there is no such task. (Whatever the answer does is printed.)
    """
    if name.startswith("unit"):
        return check_exercise(name, answer, limit or tasks.LIMIT)
    examine = task(name)
    print(in_lines(f"{name}: {verdict(examine, answer, limit or LIMIT)}"))
    return None


# --- Lessons ----------------------------------------------------------------------------------------------------------


def task(name: str) -> Callable[[Callable], str]:
    """The function that examines answers to a task. Raises a ValueError if there is none of that name."""
    lesson, _, what = name.partition(".")
    try:
        module = importlib.import_module(f"course_utils.checks.lesson_{lesson}")
        return getattr(module, what)
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(
            f"there is no task {name!r}; a task is named by lesson and function, as in 05.accumulate"
        ) from None


def verdict(examine: Callable[[Callable], str], answer: Callable, limit: float) -> str:
    if not callable(answer):
        return f"not right yet. What was given is {answer!r}; give the function itself, without calling it."
    if is_unwritten(answer):
        return not_written()
    try:
        with time_limit(limit):
            return f"right. {examine(answer)}"
    except Wrong as wrong:
        return f"not right yet. {wrong}"
    except NotImplementedError:
        return not_written()
    except TookTooLong:
        return f"not right yet. It was still running after {limit:g} s and was ended: is there a loop without an end?"
    except Exception as error:
        return f"not right yet. It raised {type(error).__name__}: {error}{place_in(answer, error)}"


def not_written() -> str:
    return (
        "not written yet. Put your code in place of the `...` and run the cell again, or read on: "
        "the lesson goes on without it, and a solution stands under Answers."
    )


# --- Exercises --------------------------------------------------------------------------------------------------------

LONG = 600.0  # seconds after which hints are offered in any case
last_checked: list[str] = []  # the name of the exercise that was checked last, for `hint(1)`
tried: dict[str, tuple[int, float]] = {}  # {name of an exercise: (wrong answers, when the first check was)}


def check_exercise(name: str, answer: Any, limit: float) -> Points:
    task = tasks.find_task(name)
    last_checked[:] = [name]
    found = tasks.examine(task, answer, seed(), limit)
    if found.written:
        progress.attempted(name, found.passed)
    print(in_lines(f"{task.name}: {found.text}"))
    if found.passed and task.on_processes is not None:
        print(in_lines(task.on_processes(answer)))
    elif not found.passed:
        offer_hints(task, found.written)
    return Points(task.points if found.passed else 0, task.points)


def offer_hints(task: tasks.Task, written: bool) -> None:
    """Say after an answer that is not right how to open hints; where a task asks for patience, after a while."""
    count, since = tried.get(task.full_name, (0, time.monotonic()))
    count += written
    tried[task.full_name] = count, since
    if not task.patience:
        print("Hints, when you want them: hint(1), then hint(2), then hint(3).")
    elif count >= task.patience or time.monotonic() - since > LONG:
        print("You have looked for a while. A symptom, when you want it: hint(1); then hint(2) and hint(3).")
    else:
        print(f"Look on. After {task.patience} wrong answers, or ten minutes, a symptom is offered.")


def seed() -> int:
    """From which the inputs of exercises are drawn: COURSE_SEED, 0 if it is not set; a grader sets another one.

    Raises:
        ValueError: it is no whole number.
    """
    given = os.environ.get("COURSE_SEED", "0")
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"COURSE_SEED is {given!r}; it must be a whole number, for example 7") from None


def hint(level: int, name: str | None = None) -> None:
    """Print a hint about the exercise that was checked last, or about the one that is named.

    Args:
        level: 1, where to look; 2, which idea; 3, the steps in words.
        name: "unit06.two_in_flight".

    Raises:
        ValueError: there is no such level or exercise.
    """
    if level not in (1, 2, 3):
        raise ValueError(f"there is no hint {level!r}; there are 1, 2 and 3")
    if name is None and not last_checked:
        print("Run a cell with a check first, then the hint is about that exercise.")
        return
    task = tasks.find_task(name or last_checked[0])
    print(in_lines(f"{task.name}, hint {level} of 3: {task.hints[level - 1]}"))


def start(unit: str) -> None:
    """Print what a unit asks for, and what you have done of it. Raises a ValueError if there is no such unit."""
    found = tasks.tasks_of(unit)
    progress.opened([task.full_name for task in found])
    kept = progress.read()
    print("rebuild: from memory. transfer: the answer stands in no lesson. From * (short) to *** (hard).")
    for number, task in enumerate(found, start=1):
        done = kept.get(task.full_name, progress.Done())
        state = f"right since {done.passed.replace('T', ' ')}" if done.passed else "open"
        print(
            f"{number}. {task.name:24} {task.kind:9} {task.minutes:3} minutes  {tasks.points(task.points):9} "
            f"{'*' * task.difficulty:4} {state}"
        )


def call(function: Callable, *arguments: Any) -> Any:
    """What a function returns; None and a sentence if your part of it is not written or fails: "Run all" goes on.

    Your part is the function itself, or the first function among its arguments.
    """
    yours = next((a for a in (*arguments, function) if callable(a) and hasattr(a, "__code__")), function)
    name = getattr(yours, "__name__", "the function")
    if is_unwritten(yours):
        print(f"{name} is not written yet.")
        return None
    try:
        with time_limit(tasks.LIMIT):
            return function(*arguments)
    except TookTooLong:
        print(f"{name} was still running after {tasks.LIMIT:g} s and was ended.")
    except NotImplementedError:
        print(f"{name} is not written yet.")
    except Exception as error:
        raised = f"{type(error).__name__}: {error}{place_in(yours, error)}"
        what = f"{name} raised" if place_in(yours, error) else f"With what {name} gave, this could not be shown:"
        print(in_lines(f"{what} {raised}"))
    return None
