"""What answers of several units give, as plain numbers, and printed whatever it is."""

from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np

from course_utils.checks.tasks import shown


def numbers_of(came: Any) -> Any:
    """A list of plain numbers, if it is a list or tuple of numbers; numpy's are turned into Python's."""
    if isinstance(came, list | tuple) or (isinstance(came, np.ndarray) and came.ndim):
        return [plain(value) for value in came]
    return plain(came)


def plain(value: Any) -> Any:
    """A number of torch, numpy or fractions as Python's own; what is no number in words."""
    if isinstance(value, Fraction):
        return float(value)
    if hasattr(value, "item"):
        with suppress(RuntimeError, ValueError):  # more than one number
            value = value.item()
    return value if isinstance(value, int | float | str | None) else repr(value)[:100]


def print_numbers(whose: str, text: str, came: Any) -> None:
    """Print a text with the numbers that an answer gave in its places, or what it gave instead of so many numbers."""
    numbers = numbers_of(came)
    values = numbers if isinstance(numbers, list) else [numbers]
    places = text.count("{")
    if len(values) == places and all(isinstance(value, int | float) for value in values):
        print(whose, text.format(*values))
    else:
        print(f"{whose} {places} number{'s' * (places != 1)} expected, came {shown(came)}.")
