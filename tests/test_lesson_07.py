"""The check of lesson 07 accepts the answer and names what is wrong with others."""

import pytest

from course_utils.simulation import peak_stash
from tests.answers import said


def running(row):
    """What is kept after each action."""
    kept, after = 0, []
    for action in row:
        kept += 1 if action.kind == "F" else -1
        after.append(kept)
    return after


def per_rank(of_row):
    return lambda schedule: [of_row(row) for row in schedule.actions]


def unwritten(schedule):
    """Nothing yet."""
    ...


def never_reset(schedule):
    return [rank + max(running(row)) for rank, row in enumerate(schedule.actions)]


ANSWERS = {
    "right": (per_rank(lambda row: max(running(row))), "07.count_stash: right. The peak of every rank"),
    "the package's": (peak_stash, "07.count_stash: right."),
    "not written": (unwritten, "07.count_stash: not written yet."),
    "left at the end": (per_rank(lambda row: running(row)[-1]), "That is what is kept after a backward."),
    "all forwards": (per_rank(lambda row: sum(a.kind == "F" for a in row)), "These are all forwards"),
    "highest of all ranks": (lambda s: [max(peak_stash(s))] * s.num_ranks, "each has a peak of its own"),
    "one number": (lambda s: max(peak_stash(s)), "one number per rank, [1, 1, 1], came 1"),
    "too few": (lambda s: peak_stash(s)[:-1], "There must be one number per rank, 3 here"),
    "a rank begins where the last one ended": (never_reset, "does each rank begin at 0"),
    "noted after the backward": (
        per_rank(lambda row: max(k for k, a in zip(running(row), row, strict=True) if a.kind == "B") or 0),
        "kept after a backward. The most at any moment is asked for",  # of naive: nothing is kept then
    ),
    "one too few": (lambda s: [max(0, peak - 1) or 1 for peak in peak_stash(s)], "when is the highest noted"),
    "no return": (lambda s: peak_stash(s) and None, "Is a `return` missing?"),
    "raises": (lambda s: s.rows, "It raised AttributeError"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_check_says_what_an_answer_is(name, capsys):
    answer, sentence = ANSWERS[name]
    text = said(capsys, "07.count_stash", answer)
    assert sentence in text
    assert (": right." in text) == (sentence.startswith("07.count_stash: right"))
