"""Checks of lesson 10: the learning rate of a step, as a scheduler of torch."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from course_utils.checks.report import Wrong, is_unwritten

D_MODEL, WARM_UP, FACTOR, STEPS = 24, 5, 3.0, 14
BASES = (1.0, 0.5)  # of two parameter groups
CLOSE = 1e-9  # relative: the formula with its factors in another order

Series = list[list[float]]  # per step, the rate of each group


def noam(answer: Any) -> str:
    """A subclass of LRScheduler, `answer(optimizer, d_model, warm_up, factor)`."""
    if not (isinstance(answer, type) and issubclass(answer, LRScheduler)):
        raise Wrong(f"Expected a class that is made from LRScheduler, came {answer!r}.")
    if answer.get_lr is LRScheduler.get_lr or is_unwritten(answer.get_lr):
        raise NotImplementedError("get_lr")
    watched = watch(answer)
    optimizer, scheduler = build(watched)
    look_at_rates(run(optimizer, scheduler, STEPS))
    look_at_asking_twice(scheduler)
    look_at_resuming(watched)
    return (
        f"{STEPS} steps with two parameter groups have the rates of the formula, the first is not 0 and the highest is "
        f"that of step {WARM_UP}; a scheduler that was saved and loaded goes on at the same rate."
    )


def watch(answer: Any) -> Any:
    """The same class, which looks at what get_lr returns before torch does."""

    class Watched(answer):
        def get_lr(self) -> Any:
            try:
                rates = super().get_lr()
            except ZeroDivisionError as error:
                raise Wrong(
                    f"get_lr raised ZeroDivisionError when self.last_epoch was {self.last_epoch}. The formula counts "
                    "steps from 1."
                ) from error
            if rates is None:
                raise Wrong("get_lr: expected a list of rates, nothing came. Is a `return` missing?")
            if not isinstance(rates, list | tuple) or len(rates) != len(BASES):
                raise Wrong(
                    f"get_lr: the optimizer has {len(BASES)} parameter groups, so a list of {len(BASES)} rates was "
                    f"expected, one per group; came {rates!r}."
                )
            return rates

    return Watched


def build(scheduler: Any) -> tuple[torch.optim.Optimizer, Any]:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": base} for base in BASES]
    optimizer = torch.optim.Adam(groups)
    return optimizer, scheduler(optimizer, D_MODEL, WARM_UP, FACTOR)


def run(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> Series:
    """The rates with which so many steps were taken."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def formula(
    first: int = 1,
    rise: Callable[[int], float] = lambda step: step * WARM_UP**-1.5,
    fall: Callable[[int], float] = lambda step: step**-0.5,
    join: Callable[..., float] = min,
    width: float = D_MODEL**-0.5,
    factor: float = FACTOR,
    bases: Sequence[float] = BASES,
    compounds: bool = False,
) -> Series:
    """The rates of every step; each argument stands for a mistake that people make."""
    rates, current = [], list(bases)
    for step in range(first, first + STEPS):
        scale = factor * width * join(rise(step), fall(max(step, 1)))
        current = [rate * scale for rate in (current if compounds else bases)]
        rates.append(current)
    return rates


MISTAKES: dict[str, dict[str, Any]] = {
    "The first update has the rate 0, and each later one that of the step before. The formula counts from 1.": {
        "first": 0
    },
    "The first two updates have the same rate, and each later one that of the step before: the formula counts from 1, "
    "and self.last_epoch from 0.": {"first": 0, "rise": lambda step: max(step, 1) * WARM_UP**-1.5},
    "Every step has the rate of the next one: the first update should have that of step 1.": {"first": 2},
    "The larger of the two terms was taken. It is the smaller one that counts.": {"join": max},
    "The two terms were added up. It is the smaller one that counts.": {"join": lambda *terms: sum(terms)},
    "The rate rises and never falls.": {"fall": lambda step: math.inf},
    "The rate falls from the first step on: what has become of the rise, and of its power of warm_up?": {
        "rise": lambda step: math.inf
    },
    "The rise is too steep: which power has `warm_up`?": {"rise": lambda step: step * WARM_UP**-0.5},
    "The width d_model is left out.": {"width": 1.0},
    "A wider model gets a higher rate here. Which sign has the power of d_model?": {"width": D_MODEL**0.5},
    "The rates are divided by d_model itself, not by its root.": {"width": 1 / D_MODEL},
    "`factor` is left out.": {"factor": 1.0},
    "The rates that the optimizer was built with are left out: they are in self.base_lrs, one per group.": {
        "bases": (1.0, 1.0)
    },
    "Each rate is made from the one before it. It is self.base_lrs that the formula multiplies.": {"compounds": True},
}


def look_at_rates(came: Series) -> None:
    """Raises Wrong, naming the mistake if it is a known one, unless the rates are those of the formula."""
    right = formula()
    if are_close(right, came):
        return
    step, group = next(
        (step, group)
        for step in range(STEPS)
        for group in range(len(BASES))
        if not math.isclose(right[step][group], came[step][group], rel_tol=CLOSE)
    )
    text = (
        f"With d_model={D_MODEL}, warm_up={WARM_UP}, factor={FACTOR:g} and a base rate of {BASES[group]:g}, step "
        f"{step + 1} should have the rate {right[step][group]:.6g}; it has {came[step][group]:.6g}."
    )
    hints = [sentence for sentence, options in MISTAKES.items() if are_close(formula(**options), came)]
    raise Wrong(f"{text} {hints[0]}" if len(hints) == 1 else text)


def are_close(one: Series, other: Series) -> bool:
    pairs = [(a, b) for rates, others in zip(one, other, strict=True) for a, b in zip(rates, others, strict=True)]
    return all(math.isclose(a, b, rel_tol=CLOSE) for a, b in pairs)


def look_at_asking_twice(scheduler: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own schedulers would rather be asked in step()
        once, twice = ([float(rate) for rate in scheduler.get_lr()] for _ in range(2))
    if once != twice:
        raise Wrong(
            f"get_lr was asked twice at the same step: it said {once[0]:.6g}, then {twice[0]:.6g}. It only looks; "
            "what counts the steps is self.last_epoch."
        )


def look_at_resuming(scheduler: Any) -> None:
    """Saved in the rise and in the fall, loaded by a new scheduler: does it go on?"""
    right = formula()
    for saved_after in (2, WARM_UP + 3):
        optimizer, first = build(scheduler)
        run(optimizer, first, saved_after)
        optimizer, second = build(scheduler)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        optimizer.step()
        second.step()
        came, expected = float(optimizer.param_groups[0]["lr"]), right[saved_after + 1][0]
        if not math.isclose(came, expected, rel_tol=CLOSE):
            raise Wrong(
                f"Saved after {saved_after} steps and loaded by a new scheduler, step {saved_after + 2} should have "
                f"the rate {expected:.6g}; it has {came:.6g}. Does get_lr count in something that state_dict "
                "does not hold?"
            )
