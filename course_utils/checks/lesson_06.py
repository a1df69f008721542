"""Checks of lesson 06: the GPipe schedule as data."""

from collections.abc import Callable

from course_utils.checks.report import Wrong, expect
from course_utils.schedules import Schedule
from course_utils.schedules import gpipe as right_schedule

SIZES = ((1, 1), (2, 3), (3, 2), (4, 8))  # (K, M), also fewer micro-batches than stages


def gpipe(answer: Callable) -> str:
    """A function of (K, M) that gives a Schedule."""
    for num_stages, num_micro_batches in SIZES:
        compare(answer(num_stages, num_micro_batches), num_stages, num_micro_batches)
    sizes = ", ".join(f"K={k} M={m}" for k, m in SIZES)
    return f"Every rank's list of actions was compared for {sizes}."


def compare(came: object, num_stages: int, num_micro_batches: int) -> None:
    """Raises Wrong unless this is the schedule, and says which mistake it is if one is known."""
    case = f"gpipe({num_stages}, {num_micro_batches})"
    if came is None:
        raise Wrong(f"{case} gave nothing. Is a `return` missing?")
    if not isinstance(came, Schedule):
        raise Wrong(f"{case} gave a {type(came).__name__}; make a Schedule of the rows with one_stage_per_rank.")
    expect(f"{case}: the number of ranks", num_stages, came.num_ranks)
    for k, (row, right) in enumerate(
        zip(came.actions, right_schedule(num_stages, num_micro_batches).actions, strict=True)
    ):
        if row == right:
            continue
        kinds = "".join(action.kind for action in row)
        shown = f"rank {k} of {case} is {','.join(map(str, row)) or 'empty'}"
        if {action.stage for action in row} not in (set(), {k}):
            raise Wrong(f"{shown}: rank {k} holds stage {k} and no other. Which number is an action's stage?")
        if sorted(row) != sorted(right):
            raise Wrong(
                f"{shown}: it needs F and B of each of the {num_micro_batches} micro-batches once, counted from 0."
            )
        if kinds == "FB" * num_micro_batches:
            raise Wrong(
                f"{shown}: that is the naive order, a backward after each forward. GPipe first runs all forwards."
            )
        if kinds != "F" * num_micro_batches + "B" * num_micro_batches:
            raise Wrong(f"{shown}: all forwards come before the first backward.")
        raise Wrong(
            f"{shown}: look at the order of micro-batches. Forwards and backwards both ascend, "
            "so that gradients are added in one order everywhere."
        )
    expect(f"{case}: num_micro_batches", num_micro_batches, came.num_micro_batches)
