"""What the checks of all lessons share: how they say what is wrong, and how they end what does not end."""

import dis
import linecache
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from course_utils.threads import raise_in_thread

# What is left of a function whose body is a docstring, `...` or `pass`, in Python 3.11 to 3.14.
OF_AN_EMPTY_BODY = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE", "COPY_FREE_VARS", "CACHE"}


class Wrong(Exception):
    """An answer is not right: the message says what was expected and what came, never how to write it."""


class TookTooLong(BaseException):
    """Raised inside an answer that is still running at its limit. No answer can catch it by `except Exception`."""


def is_unwritten(answer: Callable) -> bool:
    """Whether a function does nothing yet."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return False
    instructions = list(dis.get_instructions(code))
    only_none = all(i.argval is None for i in instructions if i.opname in ("LOAD_CONST", "RETURN_CONST"))
    return only_none and {i.opname for i in instructions} <= OF_AN_EMPTY_BODY


def place_in(answer: Callable, error: BaseException) -> str:
    """The line of the answer from which an error came, if it came from one."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not lines or file is None or lines[-1] is None:
        return ""
    return f", in line {lines[-1]} of the cell: `{linecache.getline(file, lines[-1]).strip()}`"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what runs in the block after some seconds, on every system: by an exception at its next line of Python."""
    thread, lock = threading.get_ident(), threading.Lock()
    ended, raised = threading.Event(), threading.Event()

    def end() -> None:
        with lock:
            if not ended.is_set():
                raised.set()
                raise_in_thread(thread, TookTooLong)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
        with lock:
            ended.set()
        for _ in range(1000 * raised.is_set()):  # at the last moment: it comes through within a few lines
            time.sleep(0)
    finally:
        timer.cancel()
        with lock:
            ended.set()


def call_on_gradients(answer: Callable, *arguments: Any) -> Any:
    """What an answer returns. Raises Wrong if it takes a gradient that is None for a tensor."""
    try:
        return answer(*arguments)
    except (AttributeError, TypeError) as error:
        if "NoneType" in str(error):
            raise Wrong(
                f"It raised {type(error).__name__} on a parameter without a gradient: p.grad is None there."
            ) from error
        raise


def expect(what: str, expected: Any, came: Any) -> None:
    """Raises Wrong unless both are equal; tensors in shape, dtype and every bit."""
    if isinstance(expected, torch.Tensor):
        check_tensor(what, expected, came)
        if not torch.equal(expected, came):
            raise Wrong(f"{what}: {first_difference(expected, came)}")
    elif came is None:
        raise Wrong(f"{what}: expected {expected!r}, nothing came. Is a `return` missing?")
    elif came != expected:
        raise Wrong(f"{what}: expected {expected!r}, came {came!r}.")


def expect_close(what: str, expected: Any, came: Any, tolerance: float) -> None:
    """Raises Wrong unless a number, or the norm of a tensor's difference, is at most `tolerance` away."""
    if isinstance(expected, torch.Tensor):
        check_tensor(what, expected, came)
        away = (expected - came).norm().item()
        if not away <= tolerance:
            raise Wrong(
                f"{what}: off by {away:.3g} in norm, {tolerance:.3g} is allowed. {first_difference(expected, came)}"
            )
    elif came is None:
        raise Wrong(f"{what}: expected {expected:.6g}, nothing came. Is a `return` missing?")
    else:
        try:
            number = float(came)
        except (TypeError, ValueError):
            raise Wrong(f"{what}: expected a number, {expected:.6g}, came {came!r}.") from None
        if not math.isclose(number, expected, rel_tol=0, abs_tol=tolerance):
            raise Wrong(f"{what}: expected {expected:.6g}, came {number:.6g}.")


def check_tensor(what: str, expected: torch.Tensor, came: Any) -> None:
    """Raises Wrong unless `came` is a tensor of the expected shape and dtype."""
    if came is None:
        raise Wrong(
            f"{what}: expected a tensor, nothing came. Is a `return` missing, or a gradient that never arrived?"
        )
    if not isinstance(came, torch.Tensor):
        raise Wrong(f"{what}: expected a tensor, came {came!r}.")
    if came.shape != expected.shape:
        raise Wrong(f"{what}: expected the shape {tuple(expected.shape)}, came {tuple(came.shape)}.")
    if came.dtype != expected.dtype:
        raise Wrong(f"{what}: expected {expected.dtype}, came {came.dtype}.")


def are_close(expected: Mapping[str, torch.Tensor], came: Mapping[str, torch.Tensor]) -> bool:
    """Whether gradients differ, taken together, by no more than sums in another order do."""
    distance = torch.stack([(gradient - came[name]).norm() for name, gradient in expected.items()]).norm()
    return bool(distance <= 1e-5 * torch.stack([gradient.norm() for gradient in expected.values()]).norm())


def first_difference(expected: torch.Tensor, came: torch.Tensor) -> str:
    """`At [0, 2]: expected 1.5, came 2.`: where two tensors of one shape first differ."""
    places = (expected != came).nonzero()
    if not len(places):
        return ""
    place = tuple(places[0].tolist())
    at = f"at {list(place)}: " if place else ""
    return f"{at}expected {expected[place].item():.6g}, came {came[place].item():.6g}."
