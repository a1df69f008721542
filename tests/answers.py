"""What a check says to an answer."""

from collections.abc import Callable

import pytest

from course_utils.checks import check


def said(capsys: pytest.CaptureFixture, name: str, answer: Callable, **options: float) -> str:
    """The paragraph that `check(name, answer)` prints, as one line."""
    check(name, answer, **options)
    return " ".join(capsys.readouterr().out.split())
