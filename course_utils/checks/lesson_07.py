"""Checks of lesson 07: what a schedule keeps."""

from collections.abc import Callable

from course_utils.checks.report import Wrong
from course_utils.schedules import Schedule, gpipe, looped, naive, one_f_one_b, parse
from course_utils.simulation import peak_stash

CASES = {
    "naive(3, 4)": naive(3, 4),
    "gpipe(3, 5)": gpipe(3, 5),
    "one_f_one_b(4, 8)": one_f_one_b(4, 8),
    "one_f_one_b(4, 2)": one_f_one_b(4, 2),
    "two forwards, then two backwards, twice": parse(
        "0F0,0F1,0B0,0B1,0F2,0F3,0B2,0B3\n1F0,1F1,1B0,1B1,1F2,1F3,1B2,1B3"
    ),
    "looped(2, 2, 3), two stages per rank": looped(2, 2, 3),
}


def count_stash(answer: Callable) -> str:
    """A function of a schedule that gives the peak stash of each rank."""
    for name, schedule in CASES.items():
        compare(name, schedule, answer(schedule))
    return f"The peak of every rank was compared for {len(CASES)} schedules, among them 1F1B with M < K."


def compare(name: str, schedule: Schedule, came: object) -> None:
    """Raises Wrong unless the peaks are right, and says which mistake it is if one is known."""
    expected = peak_stash(schedule)
    if came is None:
        raise Wrong(f"{name}: nothing came. Is a `return` missing?")
    if not isinstance(came, list | tuple):
        raise Wrong(f"{name}: expected one number per rank, {expected}, came {came!r}.")
    peaks = list(came)
    if peaks == expected:
        return
    text = f"{name}: expected {expected}, came {peaks}."
    if len(peaks) != schedule.num_ranks:
        raise Wrong(f"{text} There must be one number per rank, {schedule.num_ranks} here.")
    if not any(peaks):
        raise Wrong(
            f"{text} That is what is kept after a backward. The most at any moment is asked for, also after a forward."
        )
    if peaks == [sum(action.kind == "F" for action in row) for row in schedule.actions]:
        raise Wrong(f"{text} These are all forwards; a backward frees what its forward had left.")
    if peaks == [max(expected)] * schedule.num_ranks:
        raise Wrong(f"{text} That is the highest of all ranks; each has a peak of its own.")
    if any(a > b for a, b in zip(peaks, expected, strict=True)):
        raise Wrong(f"{text} Look at two things: does every backward take one away, and does each rank begin at 0?")
    raise Wrong(f"{text} Look at two things: when is the highest noted, after a forward or later, and does F add one?")
