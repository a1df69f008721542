"""Checks of lesson 12: what is wrong with five runs."""

from collections.abc import Callable

from course_utils.checks.report import Wrong
from course_utils.mystery import CASES, CAUSES


def diagnose(answer: Callable) -> str:
    """A function without arguments that gives {letter: cause} for all five runs."""
    came = answer()
    if came is None:
        raise Wrong("Nothing came. Is a `return` missing?")
    if not isinstance(came, dict) or set(came) != set(CASES):
        raise Wrong(f"Expected a dictionary with the keys {', '.join(CASES)}, came {came!r}.")
    unknown = [cause for cause in came.values() if cause not in CAUSES]
    if unknown:
        raise Wrong(f"{unknown[0]!r} is none of the causes; copy one of those that are printed above.")
    wrong = [letter for letter, case in CASES.items() if came[letter] != case.cause]
    if wrong:
        texts = [f"{letter}: {came[letter]!r} would show in {CAUSES[came[letter]]}." for letter in wrong]
        right = len(CASES) - len(wrong)
        raise Wrong(f"{right} of {len(CASES)} are right. Compare with what you see: " + " ".join(texts))
    return "All five causes are the right ones."
