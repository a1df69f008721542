"""The check of lesson 10 accepts right answers in several styles and says what is wrong with others."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from course_utils.checks import lesson_10
from course_utils.optimization import Noam
from tests.answers import said


class Stub(LRScheduler):
    def __init__(self, optimizer, d_model, warm_up, factor=1.0):
        self.d_model, self.warm_up, self.factor = d_model, warm_up, factor
        super().__init__(optimizer)

    def get_lr(self):
        """A list with the rate of each parameter group."""
        ...  # your turn


class ByCases(Stub):
    """Another style: an `if` and the peak instead of `min`."""

    def get_lr(self):
        n, peak = self.last_epoch + 1, self.factor / math.sqrt(self.d_model * self.warm_up)
        shape = n / self.warm_up if n < self.warm_up else math.sqrt(self.warm_up / n)
        return tuple(base * peak * shape for base in self.base_lrs)


class ByLambda(LambdaLR):
    """From torch's own class, which does the counting and the multiplying."""

    def __init__(self, optimizer, d_model, warm_up, factor=1.0):
        super().__init__(optimizer, lambda n: factor * d_model**-0.5 * min((n + 1) ** -0.5, (n + 1) * warm_up**-1.5))


def wrong(
    first=1,
    join=min,
    rise=lambda n, w: n * w**-1.5,
    fall=lambda n: n**-0.5,
    width=lambda d: d**-0.5,
    factor=lambda f: f,
    base=lambda self: self.base_lrs,
):
    """An answer, some part of it exchanged."""

    class Answer(Stub):
        def get_lr(self):
            n = self.last_epoch + first
            scale = factor(self.factor) * width(self.d_model) * join(rise(n, self.warm_up), fall(n))
            return [each * scale for each in base(self)]

    return Answer


class NothingReturned(ByCases):
    def get_lr(self):
        super().get_lr()


class OneNumber(ByCases):
    def get_lr(self):
        return super().get_lr()[0]


class OneGroup(ByCases):
    def get_lr(self):
        return [super().get_lr()[0]]


class CountsInGetLr(Stub):
    def __init__(self, optimizer, d_model, warm_up, factor=1.0):
        self.n = 0
        super().__init__(optimizer, d_model, warm_up, factor)

    def get_lr(self):
        self.n += 1
        scale = self.factor * self.d_model**-0.5 * min(self.n**-0.5, self.n * self.warm_up**-1.5)
        return [base * scale for base in self.base_lrs]


class ForgetsWhenSaved(ByCases):
    def state_dict(self):
        return {}


class NotAScheduler:
    def __init__(self, optimizer, d_model, warm_up, factor): ...


class NoMethod(LRScheduler): ...


RIGHT = "14 steps with two parameter groups have the rates of the formula"
ANSWERS = {
    "the package's": (Noam, RIGHT),
    "by cases": (ByCases, RIGHT),
    "by torch's LambdaLR": (ByLambda, RIGHT),
    "not written": (Stub, "not written yet"),
    "no method": (NoMethod, "not written yet"),
    "no scheduler": (NotAScheduler, "Expected a class that is made from LRScheduler"),
    "a function": (lambda n: n**-0.5, "Expected a class that is made from LRScheduler"),
    "from 0": (wrong(first=0), "get_lr raised ZeroDivisionError when self.last_epoch was 0"),
    "from 0, guarded": (wrong(first=0, fall=lambda n: max(n, 1) ** -0.5), "The first update has the rate 0"),
    "from 2": (wrong(first=2), "Every step has the rate of the next one"),
    "larger": (wrong(join=max), "The larger of the two terms was taken"),
    "sum": (wrong(join=lambda a, b: a + b), "The two terms were added up"),
    "only rises": (wrong(fall=lambda n: math.inf), "rises and never falls"),
    "only falls": (wrong(rise=lambda n, w: math.inf), "falls from the first step on"),
    "no power of warm_up": (wrong(rise=lambda n, w: n), "falls from the first step on"),
    "too steep": (wrong(rise=lambda n, w: n * w**-0.5), "The rise is too steep"),
    "no width": (wrong(width=lambda d: 1), "The width d_model is left out"),
    "width upside down": (wrong(width=lambda d: d**0.5), "A wider model gets a higher rate here"),
    "width without its root": (wrong(width=lambda d: 1 / d), "by d_model itself, not by its root"),
    "no factor": (wrong(factor=lambda f: 1), "`factor` is left out"),
    "no base": (wrong(base=lambda self: [1.0 for _ in self.base_lrs]), "they are in self.base_lrs"),
    "compounds": (
        wrong(base=lambda self: [group["lr"] for group in self.optimizer.param_groups]),
        "Each rate is made from the one before it",
    ),
    "something else": (wrong(factor=lambda f: 2 * f), "step 1 should have the rate 0.0547723; it has 0.109545."),
    "nothing returned": (NothingReturned, "Is a `return` missing?"),
    "a number": (OneNumber, "a list of 2 rates was expected, one per group; came 0.05"),
    "one group": (OneGroup, "a list of 2 rates was expected, one per group; came [0.05"),
    "counts in get_lr": (CountsInGetLr, "get_lr was asked twice at the same step"),
    "saves nothing": (ForgetsWhenSaved, "Saved after 2 steps and loaded by a new scheduler, step 4 should have"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_check_says_what_an_answer_is(name, capsys):
    answer, sentence = ANSWERS[name]
    text = said(capsys, "10.noam", answer)
    assert sentence in text
    assert (": right." in text) == (sentence == RIGHT)


def test_each_mistake_that_is_named_has_rates_of_its_own():
    """Otherwise the check could not tell them apart, and would have to guess."""
    found = [lesson_10.formula(**options) for options in [{}, *lesson_10.MISTAKES.values()]]
    for i, one in enumerate(found):
        assert not any(lesson_10.are_close(one, other) for other in found[:i])
    optimizer, noam = lesson_10.build(Noam)
    assert lesson_10.are_close(found[0], lesson_10.run(optimizer, noam, lesson_10.STEPS))


# --- What the lesson says of schedulers -------------------------------------------------------------------------------


def small(scheduler=Noam):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    return optimizer, scheduler(optimizer, 128, 3)


def test_a_scheduler_that_is_loaded_writes_nothing_into_the_optimizer():
    """So a resumed run has to load both: question of the section on resuming."""
    optimizer, noam = small()
    for _ in range(4):
        optimizer.step()
        noam.step()
    other, loaded = small()
    first = other.param_groups[0]["lr"]
    loaded.load_state_dict(noam.state_dict())
    assert other.param_groups[0]["lr"] == first != optimizer.param_groups[0]["lr"] == loaded.get_last_lr()[0]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_with_twice_the_width_a_factor_of_root_two_keeps_the_rates():
    """Answer 1."""
    rates = []
    for width, factor in ((128, 1.0), (256, math.sqrt(2))):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        rates.append(lesson_10.run(optimizer, Noam(optimizer, width, 5, factor), lesson_10.STEPS))
    assert lesson_10.are_close(*rates)
