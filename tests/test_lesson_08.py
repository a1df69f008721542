"""The check of lesson 08 accepts answers and names what is wrong with others; and which cuts need the view."""

import pytest
import torch

from course_utils.checks import check, lesson_08
from course_utils.number_words import collate
from course_utils.optimization import LossScaler
from course_utils.pipeline import sum_over_tokens
from course_utils.precision import autocast
from course_utils.stages import CutModel, one_thread
from course_utils.transformer import TransformerConfig
from tests.answers import said


class Right:
    """An answer as the lesson has it; the wrong ones below change a part of it."""

    backoff, growth, late = 0.5, 2.0, 0

    def __init__(self, scale=65536.0, growth_interval=2000):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.scale

    def update(self, skipped):
        if skipped:
            self.skip()
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval + self.late:
            self.grow()

    def skip(self):
        self.scale *= self.backoff
        self.good_steps = 0

    def grow(self):
        self.scale *= self.growth
        self.good_steps = 0


class NewTensors(Right):
    """Another style: new gradients, a tensor as the scale, a modulus instead of a second reset."""

    def __init__(self, scale=65536.0, growth_interval=2000):
        super().__init__(torch.tensor(scale), growth_interval)

    def unscale(self, parameters):
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in with_gradient:
            parameter.grad = parameter.grad * (1 / self.scale)

    def update(self, skipped):
        self.good_steps = 0 if skipped else self.good_steps + 1
        grows = self.good_steps and self.good_steps % self.growth_interval == 0
        self.scale = self.scale * (0.5 if skipped else 2.0 if grows else 1.0)


class Unwritten(Right):
    def unscale(self, parameters):
        """Divide the gradients by the scale. A parameter may have none."""
        ...

    def update(self, skipped):
        """After every step: choose the scale of the next one."""
        ...


class HalfWritten(Right):
    def update(self, skipped): ...


class NoMethod:
    def __init__(self, scale, growth_interval): ...


class Multiplies(Right):
    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= self.scale


class OnACopy(Right):
    def unscale(self, parameters):
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient / self.scale


class OfTheWeights(Right):
    def unscale(self, parameters):
        for parameter in parameters:
            parameter.data /= self.scale


class ForgetsNone(Right):
    def unscale(self, parameters):
        for parameter in parameters:
            parameter.grad /= self.scale


class GivesZeros(Right):
    def unscale(self, parameters):
        for parameter in parameters:
            gradient = torch.zeros(1) if parameter.grad is None else parameter.grad
            parameter.grad = gradient / self.scale


class ScalesTwice(Right):
    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.scale**2


class NeverChanges(Right):
    def update(self, skipped):
        self.good_steps += not skipped


class NeverLowers(Right):
    backoff = 1.0


class NeverGrows(Right):
    growth = 1.0


class DoublesWhenSkipped(Right):
    backoff = 2.0


class TooLate(Right):
    late = 1


class TooEarly(Right):
    late = -1


class Inverted(Right):
    def update(self, skipped):
        super().update(not skipped)


class CountsAllGoodSteps(Right):
    def skip(self):
        self.scale *= self.backoff


class NeverBeginsAnew(Right):
    def update(self, skipped):
        if skipped:
            return self.skip()
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale *= self.growth


class Quarters(Right):
    backoff = 0.25


RIGHT = "08.loss_scaler: right. Gradients come out divided"
ANSWERS = {
    Right: RIGHT,
    NewTensors: RIGHT,
    Unwritten: "08.loss_scaler: not written yet.",
    HalfWritten: "08.loss_scaler: not written yet.",
    NoMethod: "There is no method unscale",
    Multiplies: "unscale multiplies by the scale",
    OnACopy: "Are the gradients themselves changed, or a copy",
    OfTheWeights: "unscale has changed a parameter",
    ForgetsNone: "It raised TypeError",
    GivesZeros: "has given a gradient to a parameter that had none",
    ScalesTwice: "A gradient after unscale: at [0]: expected 1, came 0.000976562",
    NeverChanges: "It never changes",
    NeverLowers: "A skipped step does not lower it",
    NeverGrows: "It never grows again",
    DoublesWhenSkipped: "to halve it, not to double it",
    TooLate: "one good step too late",
    TooEarly: "one good step too early",
    Inverted: "have changed places",
    CountsAllGoodSteps: "does the count begin anew after a skipped step",
    NeverBeginsAnew: "begin anew after the scale has grown",
    Quarters: "after the steps good, good, skipped the scale should be 512; it is 256.",
}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.__name__)
def test_the_check_says_what_an_answer_is(answer, capsys):
    text = said(capsys, "08.loss_scaler", answer)
    assert ANSWERS[answer] in text
    assert (": right." in text) == (ANSWERS[answer] == RIGHT)


def test_the_class_is_asked_for_and_not_an_object_of_it(capsys):
    check("08.loss_scaler", Right(1.0, 3))
    assert "give the function itself" in " ".join(capsys.readouterr().out.split())


def test_each_mistake_that_is_named_moves_the_scale_differently():
    """Otherwise the check could not tell them apart, and would have to guess."""
    rows = [tuple(lesson_08.scales(lesson_08.Other(**options))) for options in [{}, *lesson_08.MISTAKES.values()]]
    assert len(set(rows)) == len(rows)
    assert rows[0] == tuple(lesson_08.scales(LossScaler(lesson_08.SCALE, growth_interval=lesson_08.INTERVAL)))


# --- Question 4: which cuts are harmed without the view --------------------------------------------------------------


def gradients(border, hand_over):
    """All gradients of a micro-batch in bfloat16, cut before the block `border`; 0: not cut."""
    partition = (range(border), range(border, 8)) if border else (range(8),)
    cut, micro_batch = CutModel(TransformerConfig(d_model=32, heads=4), partition), collate([123, 904, 655])
    stages = [cut.build(k, seed=0) for k in range(cut.num_stages)]
    with autocast(torch.bfloat16):
        carry = stages[0]((None, None), micro_batch)
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in carry]
        if border:
            handed = tuple(None if leaf is None else hand_over(leaf) for leaf in leaves)
            logits, _ = stages[1](handed, micro_batch)
        else:
            logits = carry[0]
        loss = sum_over_tokens(logits, micro_batch, micro_batch.num_tokens)
    loss.backward()
    if border:
        crossing = [(tensor, leaf.grad) for tensor, leaf in zip(carry, leaves, strict=True) if tensor is not None]
        torch.autograd.backward(*zip(*crossing, strict=True))
    return {name: p.grad for stage in stages for name, p in stage.named_parameters_globally()}


@pytest.mark.parametrize("border", range(1, 8))
def test_the_leaf_harms_where_the_memory_crosses_and_the_view_never_does(border):
    with one_thread():
        uncut, leaf = gradients(0, None), gradients(border, lambda leaf: leaf)
        view = gradients(border, lambda leaf: leaf.view_as(leaf))
    assert all(torch.equal(gradient, view[name]) for name, gradient in uncut.items())
    memory_crosses = border in (4, 5, 6)  # behind the encoder's norm, and before the last decoder layer
    assert all(torch.equal(gradient, leaf[name]) for name, gradient in uncut.items()) != memory_crosses
