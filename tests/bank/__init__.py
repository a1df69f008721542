"""Answers to the exercises, right ones in different styles and wrong ones that people really give.

    @right("06.at_most")
    def in_text(num_stages, num_micro_batches, cap): ...

    @wrong("06.at_most", "GPipe")                       # the mistake's name; who is told another one is misled
    @wrong("05.accumulate", "mean of means", "DeepSpeed#7773")   # and the thread in which somebody made it

Each unit has a module here. `course.py feedback-report` and tests/test_feedback.py try them all.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Answer:
    """One answer to a task, "06.at_most"; `mistake` is empty if it is right, `source` where people have made it."""

    task: str
    answer: Callable
    mistake: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        return f"{self.task}-{self.answer.__name__}"


ANSWERS: list[Answer] = []


def right(task: str) -> Callable[[Callable], Callable]:
    """A right answer to a task."""
    return wrong(task, "")


def wrong(task: str, mistake: str, source: str = "") -> Callable[[Callable], Callable]:
    """An answer with a mistake."""

    def note(answer: Callable) -> Callable:
        ANSWERS.append(Answer(task, answer, mistake, source))
        return answer

    return note


def modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"tests.bank.{path.stem}") for path in sorted(Path(__file__).parent.glob("unit_*.py"))
    ]


def all_answers() -> list[Answer]:
    """Of all units."""
    modules()
    return ANSWERS


def equivalents() -> dict[str, dict[str, str]]:
    """Mutants of solutions that nobody can tell from the solution: {"06.at_most": {what was changed: the reason}}.

    A unit's module lists its own as EQUIVALENT, by hand.
    """
    return {task: listed for module in modules() for task, listed in getattr(module, "EQUIVALENT", {}).items()}
