"""What you expect of an experiment, written down before you run it, and kept in my_work/ beside what came out.

Nobody grades it. A prediction that was wrong is the moment in which something is learnt, and the last lesson draws how
yours became better over the course.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from course_utils.workspace import MY_WORK, write_atomically

FILE = MY_WORK / "predictions.json"


@dataclass
class Prediction:
    """One quantity of one experiment: what you expected, what a formula says, what was measured.

    Attributes:
        situation: what the quantity depends on, {"K": 4, "M": 8}.
        value: yours, in `unit`; None if you made none.
        first: the value that you gave before you saw the outcome; later ones change `value` only.
    """

    quantity: str
    situation: dict[str, Any]
    unit: str = ""
    value: float | None = None
    first: float | None = None
    formula: float | None = None
    measured: float | None = None

    @property
    def name(self) -> str:
        """`bubble, K=4, M=8`"""
        return ", ".join([self.quantity, *(f"{key}={value}" for key, value in self.situation.items())])

    def settle(self, measured: float, formula: float | None = None) -> "Prediction":
        """Put the outcome beside the prediction, and keep both if there was one."""
        self.measured = as_number("measured", measured)
        self.formula = None if formula is None else as_number("formula", formula)
        keep(self)
        return self


def predict(quantity: str, value: float | None = None, unit: str = "", **situation: Any) -> Prediction:
    """Write down what you expect; without a value the experiment runs all the same.

    Args:
        quantity: what will be measured, "bubble".
        value: your prediction, in `unit`.
        situation: what it depends on, K=4, M=8.

    Raises:
        ValueError: the value is no finite number.
    """
    guess = Prediction(quantity, situation, unit, None if value is None else as_number("value", value))
    unit = f" {unit}" * bool(unit)
    if guess.value is None:
        print(f"{guess.name}: no prediction. Put a number in place of None to make one.")
    else:
        guess.first = guess.value
        keep(guess)
        print(f"{guess.name}: you predict {guess.value:g}{unit}.")
    return guess


def keep(guess: Prediction) -> None:
    """Write a prediction to my_work/. The lesson goes on if that cannot be done, and says so."""
    if guess.value is None:
        return
    kept = read()
    before = kept.get(guess.name, {})
    if before.get("measured") is not None:  # the outcome was known when this value was given
        guess.first = before.get("first")
    kept[guess.name] = {**vars(guess), "measured": before.get("measured") if guess.measured is None else guess.measured}
    try:
        write_atomically(FILE, json.dumps(kept, indent=1, sort_keys=True, default=str) + "\n")
    except OSError as error:
        print(f"Your prediction is not kept for lesson 12: {error}")


def read() -> dict[str, dict[str, Any]]:
    """{name: fields} of all predictions that were kept; empty if there are none or the file is damaged."""
    try:
        kept = json.loads(FILE.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def as_number(what: str, value: Any) -> float:
    """Raises a ValueError for anything that is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {value!r}; it must be a number, for example 0.25")
    return number
