"""Tasks of the exercise units: what an answer is tried on, how what it gave is judged, and three hints.

An answer meets its judge in two steps, because in a classroom they are two processes. `try_out` calls the answer on
inputs drawn from a seed and keeps what came, as plain values; `judge` looks at these values alone. A learner's own
notebook does both on the spot; a grader does the first in a process that can be lost (`sandbox.py`).
"""

import importlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.report import TookTooLong, Wrong, is_unwritten, place_in, time_limit

LIMIT = 10.0  # seconds for all inputs of a task: generous, an answer takes less than one
Cases = Callable[[random.Random], Sequence[Any]]


class Named(Wrong):
    """An answer with a mistake that its values tell apart from every other one that is known."""

    def __init__(self, mistake: str, message: str):
        super().__init__(message)
        self.mistake = mistake


class WrongForm(Wrong):
    """An answer that gave something of another kind than was asked for: no more need be said than what."""


@dataclass(frozen=True)
class Task:
    """One graded task.

    Attributes:
        unit, name: "06" and the function that the learner writes; together "unit06.two_in_flight".
        kind: "rebuild", from memory what the lesson built, or "transfer", what stands in no lesson.
        minutes, points, difficulty: what the learner is told before starting; difficulty from 1 to 3.
        cases: the inputs, drawn from a generator; the same seed gives the same ones. str() of one is shown.
        attempt: (answer, case) -> what the answer gave for it, in values that `_plain` can take apart.
        judge: (cases, what came for each) -> a sentence for a right answer. Raises Wrong, or Named.
        look_at: two things to look at when nobody can say which mistake it is.
        hints: where to look; which idea, with a link; the steps in words. Never code.
        instead: the package's own answers; whoever calls one while an answer is tried is told to write it.
        on_error: what an error of the answer says about it, (type's name, message) -> Named or None.
        on_processes: runs a right answer once on real processes and says what was seen.
        patience: after so many wrong answers, or ten minutes, hints are offered; they can be opened at any time.
    """

    unit: str
    name: str
    kind: str
    minutes: int
    points: int
    difficulty: int
    cases: Cases
    attempt: Callable[[Callable, Any], Any]
    judge: Callable[[Sequence[Any], Sequence[Any]], str]
    look_at: tuple[str, str]
    hints: tuple[str, str, str]
    instead: tuple[Callable, ...] = ()
    on_error: Callable[[str, str], Named | None] = lambda kind, message: None
    on_processes: Callable[[Callable], str] | None = None
    patience: int = 0

    @property
    def full_name(self) -> str:
        return f"unit{self.unit}.{self.name}"


@dataclass
class Outcome:
    """What an answer did. `kind` is "values", "unwritten", "error", "too long" or "no function"."""

    kind: str
    values: list[Any] = field(default_factory=list)
    error: str = ""  # the type of an exception
    message: str = ""
    place: str = ""  # the line of the answer that it came from
    case: int = 0  # the number of the input that it happened with
    spoilt: bool = False  # the process in which the answer was tried is not as it was before


@dataclass
class Verdict:
    """What is told about an answer; `mistake` is the name of the one that was recognised, if one was."""

    passed: bool
    text: str
    mistake: str = ""
    written: bool = True


# --- Finding tasks ----------------------------------------------------------------------------------------------------


def tasks_of(unit: str) -> tuple[Task, ...]:
    """The tasks of a unit, "06", in order. Raises a ValueError if there is no such unit."""
    try:
        return importlib.import_module(f"course_utils.checks.unit_{unit}").TASKS
    except ModuleNotFoundError:
        raise ValueError(f"there is no exercise unit {unit!r}; a unit has the number of its lesson, as in 06") from None


def find_task(name: str) -> Task:
    """The task "unit06.two_in_flight". Raises a ValueError, with the names there are, if there is none."""
    unit, _, what = name.removeprefix("unit").partition(".")
    known = {task.name: task for task in tasks_of(unit)}
    if what not in known:
        raise ValueError(f"unit {unit} has no task {what!r}; it has {', '.join(known)}")
    return known[what]


# --- Trying an answer -------------------------------------------------------------------------------------------------


def try_out(task: Task, answer: Any, seed: int, limit: float = LIMIT) -> Outcome:
    """Call an answer on the inputs of a seed, and keep what came. Whatever the answer does is in the outcome."""
    if not callable(answer):
        return Outcome("no function", message=repr(answer)[:200])
    if is_unwritten(answer):
        return Outcome("unwritten")
    outcome = Outcome("values")
    generator_state = torch.get_rng_state()
    try:
        cases = task.cases(random.Random(seed))
        with told_to_write(task.instead), time_limit(limit):
            for number, case in enumerate(cases):
                outcome.case = number
                outcome.values.append(task.attempt(answer, case))
    except NotImplementedError:
        return Outcome("unwritten")
    except TookTooLong:
        return Outcome("too long", message=f"{limit:g}", case=outcome.case)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit too: an answer that calls exit() is a wrong one
        message = str(error)[:2000]
        return Outcome("error", [], type(error).__name__, message, place_in(answer, error), outcome.case)
    finally:
        torch.set_rng_state(generator_state)
    return outcome


class YoursToWrite(RuntimeError):
    """An answer calls the package's own."""


@contextmanager
def told_to_write(functions: Sequence[Callable]) -> Iterator[None]:
    """While the block runs, these functions only say that they are the ones to be written, whoever holds them."""
    kept: list[tuple[FunctionType, CodeType]] = []
    try:
        for function in functions:
            assert isinstance(function, FunctionType), function
            kept.append((function, function.__code__))
            function.__code__ = stand_in(f"{function.__module__}.{function.__qualname__}")
        yield
    finally:
        for function, code in kept:
            function.__code__ = code


def stand_in(name: str) -> CodeType:
    """The code of a function that takes anything, uses nothing from around it, and raises YoursToWrite."""
    text = (
        "def stand_in(*arguments, **options):\n"
        "    from course_utils.checks.tasks import YoursToWrite\n"
        f"    raise YoursToWrite('{name} is the function that you are to write')\n"
    )
    space: dict[str, Any] = {}
    exec(text, space)
    return space["stand_in"].__code__


# --- Judging ----------------------------------------------------------------------------------------------------------


def judge(task: Task, outcome: Outcome, seed: int) -> Verdict:
    """What is told about an outcome of `try_out` with the same seed."""
    if outcome.kind == "unwritten":
        return Verdict(
            False, "not written yet. Put your code in place of the `...`, run that cell, then this one.", written=False
        )
    if outcome.kind == "no function":
        return Verdict(False, f"not right yet. What was given is {outcome.message}; give the function, uncalled.")
    cases = task.cases(random.Random(seed))
    if outcome.kind == "too long":
        return Verdict(
            False,
            f"not right yet. It was still running after {outcome.message} s and was ended, with "
            f"{told(cases, outcome)}: is there a loop without an end?",
        )
    try:
        if outcome.kind == "error":
            if outcome.error == YoursToWrite.__name__:
                return Verdict(False, f"not right yet. It called the package's own answer: {outcome.message}.")
            if named := task.on_error(outcome.error, outcome.message):
                raise named
            raise WrongForm(
                f"It raised {outcome.error}: {outcome.message.rstrip('.')}{outcome.place}. "
                f"That was with {told(cases, outcome)}."
            )
        praise = judged(task, cases, outcome.values)
    except Named as named:
        return Verdict(False, f"not right yet. {named}", named.mistake)
    except WrongForm as wrong:
        return Verdict(False, f"not right yet. {wrong}")
    except Wrong as wrong:
        first, second = task.look_at
        return Verdict(False, f"not right yet. {wrong} Two things to look at: (1) {first} (2) {second}")
    return Verdict(True, f"right. {praise} {points(task.points)}.")


def judged(task: Task, cases: Sequence[Any], values: Sequence[Any]) -> str:
    """What the task's own judge says; values that it cannot even compare are wrong ones."""
    try:
        return task.judge(cases, values)
    except Wrong:
        raise
    except Exception as error:
        raise WrongForm(
            f"What came has another form than what was asked for: {shown(values[0] if values else values)} "
            f"({type(error).__name__}: {error})."
        ) from error


def told(cases: Sequence[Any], outcome: Outcome) -> str:
    return str(cases[outcome.case])[:300]


def points(number: int) -> str:
    return f"{number} point{'s' * (number != 1)}"


def examine(task: Task, answer: Any, seed: int = 0, limit: float = LIMIT) -> Verdict:
    """Both steps at once."""
    return judge(task, try_out(task, answer, seed, limit), seed)


@dataclass(frozen=True)
class Mistake:
    """A mistake that people make, told apart by what an answer with it gives.

    Attributes:
        name: in two or three words, "mean of means".
        says: what the learner is told: what was done, never how to write it right.
        gives: (case) -> what `attempt` gives for an answer with this mistake; if it raises, the mistake is ruled out.
    """

    name: str
    says: str
    gives: Callable[[Any], Any]


def compare(
    cases: Sequence[Any],
    came: Sequence[Any],
    expected: Callable[[Any], Any],
    mistakes: Sequence[Mistake] = (),
    tolerance: float = 0.0,
    what: str = "",
) -> None:
    """Raises unless every value is as expected: Named if one known mistake, and only one, gives all that came.

    Args:
        expected: (case) -> the right value, found in another way than the answer's if the answer is in no module.
        tolerance: by how much numbers and norms of tensors may differ, relative to the expected one or to 1 if it is
            smaller; 0: not at all.
        what: names the values in the message.
    """
    right = [expected(case) for case in cases]
    first = next((i for i in range(len(cases)) if not same(right[i], came[i], tolerance)), None)
    if first is None:
        return
    found = [mistake for mistake in mistakes if gives_all(mistake, cases, came, tolerance)]
    shown = f"With {cases[first]}: {what}{' ' * bool(what)}{difference(right[first], came[first], tolerance)}"
    if len(found) == 1:
        raise Named(found[0].name, f"{found[0].says} {shown}")
    raise Wrong(shown)


def gives_all(mistake: Mistake, cases: Sequence[Any], came: Sequence[Any], tolerance: float) -> bool:
    try:
        return all(same(mistake.gives(case), value, tolerance) for case, value in zip(cases, came, strict=True))
    except Exception:
        return False


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two values agree; a list and a tuple may, True and 1 may not, NaN agrees with NaN."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not (one.is_floating_point() and tolerance):
            return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
        size = one.double().norm().item()
        return bool((one.double() - other.double()).norm() <= tolerance * max(1.0, size))
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(same(a, b, tolerance) for a, b in zip(one, other, strict=True))
        )
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(same(value, other[key], tolerance) for key, value in one.items())
        )
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        if not numbers or isinstance(one, bool) or isinstance(other, bool):
            return False
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return one == other or abs(one - other) <= tolerance * max(1.0, abs(one))
    return type(one) is type(other) and one == other


def difference(right: Any, came: Any, tolerance: float = 0.0, where: str = "") -> str:
    """`expected 3, came 4.`, with the place where two values first differ."""
    at = f"{where}: " if where else ""
    if came is None and right is not None:
        return f"{at}expected {shown(right)}, nothing came. Is a `return` missing?"
    if isinstance(right, list | tuple) and isinstance(came, list | tuple) and len(right) == len(came):
        for i, (a, b) in enumerate(zip(right, came, strict=True)):
            if not same(a, b, tolerance):
                return difference(a, b, tolerance, f"{where}[{i}]")
    if isinstance(right, Mapping) and isinstance(came, Mapping):
        for key, value in right.items():
            if key not in came:
                return f"{at}nothing came for {key!r}."
            if not same(value, came[key], tolerance):
                return difference(value, came[key], tolerance, f"{where} {key}".strip())
    if isinstance(right, Tensor) and isinstance(came, Tensor):
        if right.shape != came.shape:
            return f"{at}expected the shape {tuple(right.shape)}, came {tuple(came.shape)}."
        if right.dtype != came.dtype:
            return f"{at}expected {right.dtype}, came {came.dtype}."
        if right.dim():
            place = tuple(((right != came) & ~(right.isnan() & came.isnan())).nonzero()[0].tolist())
            return f"{at}at {list(place)} expected {right[place].item():.6g}, came {came[place].item():.6g}."
    return f"{at}expected {shown(right)}, came {shown(came)}."


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}" if value.dim() else f"{value.item():.6g}"
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
