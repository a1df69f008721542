"""Answers to what a lesson asks you to write, checked at once: `check("05.accumulate", accumulate)`.

Each lesson has a module here, and each of its tasks a function in it that takes the answer, tries it and raises
`report.Wrong` with what was expected and what came. A check says what it found and never raises, so "Run all" goes on.
"""

import importlib
import linecache
import traceback
from collections.abc import Callable

from course_utils._lines import in_lines
from course_utils.checks.report import TookTooLong, Wrong, is_unwritten, time_limit

LIMIT = 20.0  # seconds: generous, a check takes less than two


def check(name: str, answer: Callable, limit: float = LIMIT) -> None:
    """Try an answer and print one paragraph about it.

    Args:
        name: lesson and task, such as "05.accumulate".
        answer: what you wrote.
        limit: seconds after which an answer is ended that is still running.

    Raises:
        ValueError: there is no such task. (Whatever the answer does is printed.)
    """
    examine = task(name)
    print(in_lines(f"{name}: {verdict(examine, answer, limit)}"))


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


def place_in(answer: Callable, error: BaseException) -> str:
    """The line of the answer from which an error came, if it came from one."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not lines or file is None or lines[-1] is None:
        return ""
    return f", in line {lines[-1]} of the cell: `{linecache.getline(file, lines[-1]).strip()}`"
