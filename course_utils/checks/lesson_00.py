"""The self-test of lesson 00: a step of gradient descent, the chain rule, and what `.grad` does."""

from collections.abc import Callable

import torch
from torch import Tensor

from course_utils.checks.report import Wrong, check_tensor, expect_close


def step(answer: Callable) -> str:
    """gradient_step(w, gradient, learning_rate) -> the next w."""
    w, gradient, learning_rate = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, -4.0, 0.0]), 0.25
    before = w.clone()
    came = answer(w, gradient, learning_rate)
    if not torch.equal(w, before):
        raise Wrong("Your function changed the w that it was given; make a new tensor and leave the old one as it is.")
    right = torch.tensor([0.5, -1.0, 0.5])
    check_tensor("the weights after one step", right, came)
    if torch.allclose(came, before + learning_rate * gradient):
        raise Wrong("You went uphill: the gradient points to where the loss grows. Which sign has the formula?")
    if torch.allclose(came, before - gradient):
        raise Wrong("The step is as long as the gradient itself. What is the learning rate for?")
    expect_close("the weights after one step", right, came, tolerance=1e-6)
    return "Tried on three weights; the given ones were left alone."


def chain(answer: Callable) -> str:
    """chained_gradient(x, f, df, dg) -> the derivative of g(f(x)) at x."""
    for x in (1.5, -0.5):
        came = answer(x, lambda x: x**2, lambda x: 2 * x, lambda y: 3 * y**2)  # g(y) = y**3, so g(f(x)) = x**6
        if isinstance(came, int | float) and not isinstance(came, bool):
            if abs(came - 3 * x**2 * 2 * x) < 1e-9:
                raise Wrong(f"At x = {x}: dg was asked at x, which g never sees. At which number is it needed?")
            if abs(came - 3 * x**4) < 1e-9 or abs(came - 2 * x) < 1e-9:
                raise Wrong(f"At x = {x}: one of the two derivatives is missing; the chain rule needs both.")
            if abs(came - (3 * x**4 + 2 * x)) < 1e-9:
                raise Wrong(f"At x = {x}: you added the two derivatives. How does the chain rule join them?")
        expect_close(f"the derivative of (x²)³ at x = {x}", 6 * x**5, came, tolerance=1e-9)
    return "Tried on (x²)³ at two places."


def add_up(answer: Callable) -> str:
    """add_up(w, losses) -> the gradient of the sum of all losses, one backward per loss."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    w.grad = torch.tensor([100.0, 100.0])  # left over from an earlier step
    calls: list[int] = []

    def loss(number: int, factor: float) -> Callable[[Tensor], Tensor]:
        def value(w: Tensor) -> Tensor:
            calls.append(number)
            return factor * (w**2).sum()

        return value

    came = answer(w, [loss(0, 1.0), loss(1, 2.0), loss(2, 4.0)])
    right = torch.tensor([14.0, 28.0])
    check_tensor("the gradient", right, came)
    if torch.allclose(came, right + 100):
        raise Wrong("An old gradient is still in it: w.grad was not empty when your function was called.")
    if torch.allclose(came, right * 4 / 7):
        raise Wrong("Only the last loss is in it: what an earlier backward left in w.grad was thrown away.")
    if torch.allclose(came, right / 3):
        raise Wrong("That is the mean over the losses; the task asks for the gradient of their sum.")
    expect_close("the gradient", right, came, tolerance=1e-5)
    if sorted(calls) != [0, 1, 2]:
        raise Wrong(f"Each loss should be computed once; the order in which yours were computed is {calls}.")
    return "Three losses, and a gradient of an earlier step that had to go."
