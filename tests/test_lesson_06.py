"""The check of lesson 06 accepts the answer and names what is wrong with others."""

import pytest

from course_utils import schedules
from course_utils.schedules import Action, one_stage_per_rank
from tests.answers import said


def of_rows(row):
    return lambda K, M: one_stage_per_rank(M, [row(k, K, M) for k in range(K)])


def forwards(k, M):
    return [Action("F", k, m) for m in range(M)]


def backwards(k, M):
    return [Action("B", k, m) for m in range(M)]


def unwritten(num_stages, num_micro_batches):
    """Nothing yet."""
    ...


def raises(num_stages, num_micro_batches):
    return num_stages[0]


ANSWERS = {
    "right": (schedules.gpipe, "06.gpipe: right. Every rank's list"),
    "not written": (unwritten, "06.gpipe: not written yet."),
    "naive": (schedules.naive, "naive order"),
    "descending": (of_rows(lambda k, K, M: forwards(k, M) + backwards(k, M)[::-1]), "both ascend"),
    "forwards descending": (of_rows(lambda k, K, M: forwards(k, M)[::-1] + backwards(k, M)), "both ascend"),
    "backwards first": (of_rows(lambda k, K, M: backwards(k, M) + forwards(k, M)), "before the first backward"),
    "1f1b": (schedules.one_f_one_b, "before the first backward"),
    "no backwards": (of_rows(lambda k, K, M: forwards(k, M)), "once, counted from 0"),
    "counted from 1": (
        of_rows(lambda k, K, M: [a._replace(micro_batch=a.micro_batch + 1) for a in forwards(k, M) + backwards(k, M)]),
        "once, counted from 0",
    ),
    "stage and micro-batch swapped": (
        of_rows(lambda k, K, M: [Action(kind, m, k) for kind in "FB" for m in range(M)]),
        "Which number is an action's stage?",
    ),
    "K and M swapped": (lambda K, M: schedules.gpipe(M, K), "the number of ranks: expected 2, came 3"),
    "wrong M": (
        lambda K, M: schedules.Schedule(M + 1, *vars_of(schedules.gpipe(K, M))),
        "num_micro_batches: expected 1",
    ),
    "rows only": (lambda K, M: [forwards(k, M) + backwards(k, M) for k in range(K)], "one_stage_per_rank"),
    "no return": (lambda K, M: schedules.gpipe(K, M) and None, "Is a `return` missing?"),
    "raises": (raises, "It raised TypeError"),
}


def vars_of(schedule):
    return schedule.rank_of_stage, schedule.actions


@pytest.mark.parametrize("name", ANSWERS)
def test_the_check_says_what_an_answer_is(name, capsys):
    answer, sentence = ANSWERS[name]
    text = said(capsys, "06.gpipe", answer)
    assert sentence in text
    assert (": right." in text) == (name == "right")
