"""What lesson 12 asks for: right diagnoses, and wrong ones that are told what they would have shown."""

import pytest

from course_utils.checks import check
from course_utils.mystery import CASES, CAUSES

RIGHT = {letter: case.cause for letter, case in CASES.items()}


def said(answer, capsys) -> str:
    check("12.diagnose", answer)
    return " ".join(capsys.readouterr().out.split())


def test_the_right_causes(capsys):
    def built_one_by_one():
        causes = {}
        for letter in "EDCBA":
            causes[letter] = RIGHT[letter]
        return causes

    assert said(lambda: dict(RIGHT), capsys) == "12.diagnose: right. All five causes are the right ones."
    assert "right. All five" in said(built_one_by_one, capsys)


@pytest.mark.parametrize("letter", CASES)
@pytest.mark.parametrize("cause", CAUSES)
def test_a_wrong_cause_is_told_what_it_would_show_and_not_the_right_one(letter, cause, capsys):
    if RIGHT[letter] == cause:
        return
    text = said(lambda: RIGHT | {letter: cause}, capsys)
    assert "not right yet. 4 of 5 are right." in text
    assert f"{letter}: {cause!r} would show in {CAUSES[cause]}." in text or f'{letter}: "{cause}" would show' in text
    assert f"{letter}: {RIGHT[letter]!r}" not in text


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda: print(end=""), "Nothing came. Is a `return` missing?"),
        (lambda: list(RIGHT.values()), "Expected a dictionary with the keys A, B, C, D, E"),
        (lambda: {"A": "a slow stage"}, "Expected a dictionary with the keys A, B, C, D, E"),
        (lambda: RIGHT | {"F": "a slow stage"}, "Expected a dictionary with the keys"),
        (lambda: RIGHT | {"A": "bad luck"}, "'bad luck' is none of the causes; copy one"),
        (lambda: dict.fromkeys(CASES, "a slow line"), "0 of 5 are right"),
        (RIGHT, "give the function itself"),
    ],
)
def test_answers_in_another_form(answer, message, capsys):
    assert message in said(answer, capsys)


def test_a_stub_is_not_written_yet(capsys):
    def diagnose():
        """Return causes."""
        ...

    assert "not written yet" in said(diagnose, capsys)
