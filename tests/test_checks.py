"""How answers are checked: every kind of answer gets one paragraph, and none of them stops the lesson."""

import contextlib
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from course_utils.checks import task
from course_utils.checks.report import TookTooLong, Wrong, expect, expect_close, is_unwritten, time_limit
from tests.answers import said

COURSE = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def a_lesson(monkeypatch):
    """A module of checks with one task: double a tensor."""
    module = types.ModuleType("course_utils.checks.lesson_99")

    def double(answer):
        expect("twice [1, 2]", torch.tensor([2.0, 4.0]), answer(torch.tensor([1.0, 2.0])))
        return "A tensor was doubled."

    module.double = double
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_right_answer(capsys):
    assert said(capsys, "99.double", lambda x: x + x) == "99.double: right. A tensor was doubled."


def unwritten_dots(x):
    """Doc."""
    ...  # your turn


def unwritten_pass(x):
    pass


def unwritten_raise(x):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [unwritten_dots, unwritten_pass, unwritten_raise])
def test_an_answer_that_is_not_written(answer, capsys):
    assert said(capsys, "99.double", answer).startswith("99.double: not written yet.")


def test_what_does_something_is_written():
    assert is_unwritten(unwritten_dots) and not is_unwritten(lambda x: 0) and not is_unwritten(print)
    assert not is_unwritten(lambda x: x) and not is_unwritten(test_a_right_answer)


def raises_key_error(x):
    return {}["seven"]


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (lambda x: x, "twice [1, 2]: at [0]: expected 2, came 1."),
        (lambda x: x[:1] * 2, "expected the shape (2,), came (1,)"),
        (lambda x: x.double() * 2, "expected torch.float32, came torch.float64"),
        (lambda x: None if len(x) else 1, "Is a `return` missing"),
        (lambda x: [2.0, 4.0], "expected a tensor, came [2.0, 4.0]"),
        (raises_key_error, "It raised KeyError: 'seven', in line"),
        (lambda: 0, "It raised TypeError"),
        (7, "What was given is 7; give the function itself"),
    ],
)
def test_an_answer_that_is_not_right(answer, sentence, capsys):
    out = said(capsys, "99.double", answer)
    assert out.startswith("99.double: not right yet.") and sentence in out


def test_the_line_of_the_answer_is_shown(capsys):
    assert """of the cell: `return {}["seven"]`""" in said(capsys, "99.double", raises_key_error)


def test_an_endless_answer_is_ended(capsys):
    def endless(x):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.001)

    assert "still running after 0.2 s" in said(capsys, "99.double", endless, limit=0.2)
    time.sleep(0.3)  # nothing comes afterwards


def test_a_limit_that_is_reached_as_the_block_ends_does_no_harm():
    for _ in range(200):
        try:
            with time_limit(0.0005):
                time.sleep(0.0005)
        except TookTooLong:
            pass
    time.sleep(0.05)


def test_a_profiler_works_after_a_check():
    """An asynchronous exception that was taken back, or None in its place, makes a profiler hang in Python 3.11."""
    code = "import cProfile; from course_utils.checks.report import time_limit\nwith time_limit(5): pass\n"
    code += "profile = cProfile.Profile(); profile.enable(); (lambda: 1)(); profile.disable()"
    subprocess.run([sys.executable, "-c", code], cwd=COURSE, check=True, timeout=60)


@pytest.mark.parametrize("name", ["98.double", "99.triple", "double", ""])
def test_a_task_that_is_not_there(name):
    with pytest.raises(ValueError, match="there is no task"):
        task(name)


def test_numbers():
    expect("K", 4, 4)
    expect_close("share", 0.25, 0.2501, 1e-3)
    expect_close("norm", torch.zeros(2), torch.full((2,), 1e-9), 1e-6)
    for expected, came, sentence in [
        (0.25, None, "nothing came"),
        (0.25, "x", "expected a number"),
        (0.25, 0.5, "expected 0.25, came 0.5"),
        (0.25, float("nan"), "came nan"),
        (torch.zeros(2), torch.tensor([0.0, float("nan")]), r"at \[1\]"),
    ]:
        with pytest.raises(Wrong, match=sentence):
            expect_close("it", expected, came, 1e-3)
    with pytest.raises(Wrong, match=r"it: expected \[1\], came \[2\]"):
        expect("it", [1], [2])
    with pytest.raises(Wrong, match="nothing came"):
        expect("it", 3, None)
