"""The checks of lesson 09 accept right answers in several styles and say what is wrong with others."""

import ast
import math
from pathlib import Path

import pytest
import torch

from course_utils import optimization
from course_utils.threads import run_in_threads
from tests.answers import said

SOURCE = Path(__file__).resolve().parents[1] / "notebooks/sources/09_gradient_clipping.py"

# --- gradient_norms ---------------------------------------------------------------------------------------------------


def slots(value=lambda p: p.grad.norm(), where=lambda place, number: place, start=torch.zeros, skip=True):
    """An answer, some part of it exchanged."""

    def gradient_norms(parameters, num_norms):
        norms = start(num_norms)
        for number, (place, parameter) in enumerate(parameters):
            if parameter.grad is None and skip:
                continue
            norms[where(place, number)] = value(parameter)
        return norms

    return gradient_norms


def by_dictionary(parameters, num_norms):
    norms = {place: torch.linalg.vector_norm(p.grad) for place, p in parameters if p.grad is not None}
    return torch.stack([norms.get(place, torch.tensor(0.0)) for place in range(num_norms)])


def by_hand(parameters, num_norms):
    return slots(lambda p: (p.grad.double() ** 2).sum().sqrt())(parameters, num_norms)


def unwritten(parameters, num_norms):
    """(num_norms,) zeros; at its place the norm of each gradient."""
    ...  # your turn


def nothing_returned(parameters, num_norms):
    slots()(parameters, num_norms)


def clears(parameters, num_norms):
    norms = slots()(parameters, num_norms)
    for _, parameter in parameters:
        parameter.grad = None
    return norms


def only_own(parameters, num_norms):
    return torch.stack([p.grad.norm() for _, p in parameters if p.grad is not None])


def total_everywhere(parameters, num_norms):
    total = torch.cat([p.grad.flatten() for _, p in parameters if p.grad is not None]).norm()
    return slots(lambda p: total)(parameters, num_norms)


def test_the_slots_are_accepted(capsys):
    for answer in (slots(), by_dictionary, optimization.gradient_norms):
        text = said(capsys, "09.gradient_norms", answer)
        assert ": right. Three gradients stand at their places" in text and "other ones" not in text


def test_other_last_bits_are_accepted_and_mentioned(capsys):
    halves = slots(lambda p: torch.nextafter(p.grad.norm(), torch.tensor(9.0)))
    text = said(capsys, "09.gradient_norms", halves)
    assert ": right." in text and "The last bits are other ones than those of torch.linalg.vector_norm" in text
    assert ": right." in said(capsys, "09.gradient_norms", by_hand)


WRONG_SLOTS = {
    "not written": (unwritten, "not written yet"),
    "squares": (slots(lambda p: p.grad.norm() ** 2), "the squares of the norms"),
    "one after the other": (slots(where=lambda place, number: number), "in the first slots, one after the other"),
    "weights": (slots(lambda p: p.detach().norm()), "the norms of the weights"),
    "absolute values": (slots(lambda p: p.grad.abs().sum()), "sums of absolute values"),
    "largest": (slots(lambda p: p.grad.abs().max()), "largest absolute values"),
    "total": (total_everywhere, "the norm of all gradients of this rank"),
    "ones elsewhere": (slots(start=torch.ones), "The slots that belong to no parameter of this rank"),
    "one wrong": (slots(lambda p: p.grad.norm() * (2 if p.dim() == 1 else 1)), "Slot 1: expected"),
    "no gradient": (slots(skip=False), "It raised AttributeError"),
    "too short": (only_own, "expected the shape (7,), came (3,)"),
    "a list": (lambda parameters, n: slots()(parameters, n).tolist(), "expected a tensor, came ["),
    "float64": (slots(start=lambda n: torch.zeros(n, dtype=torch.float64)), "expected torch.float32"),
    "nothing returned": (nothing_returned, "Is a `return` missing"),
    "clears": (clears, "only looks: the gradient of a parameter is not what it was"),
}


@pytest.mark.parametrize("name", WRONG_SLOTS)
def test_wrong_slots_are_told_what_is_wrong(capsys, name):
    answer, sentence = WRONG_SLOTS[name]
    text = said(capsys, "09.gradient_norms", answer)
    assert sentence in text and ": right." not in text


# --- clip_by_global_norm ----------------------------------------------------------------------------------------------


def with_gradient(parameters):
    return [p for p in parameters if p.grad is not None]


def clipper(
    total=lambda parameters, norms: norms.norm(),
    factor=lambda bound, total: min(1.0, bound / total),
    careful=True,
    result=lambda total, parameters: total,
):
    """An answer, some part of it exchanged."""

    def clip_by_global_norm(parameters, norms, max_norm):
        norm = total(parameters, norms).item()
        if math.isfinite(norm) or not careful:
            for parameter in with_gradient(parameters):
                parameter.grad *= factor(max_norm, norm)
        return result(norm, parameters)

    return clip_by_global_norm


def replaces(parameters, norms, max_norm):
    total = norms.norm()
    for parameter in with_gradient(parameters):
        if total > max_norm and total.isfinite():
            parameter.grad = parameter.grad * max_norm / total
    return total


def torchs_own(parameters, norms, max_norm):
    total = norms.norm()
    if total.isfinite():
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total.item()


def on_a_copy(parameters, norms, max_norm):
    total = norms.norm()
    for parameter in with_gradient(parameters):
        gradient = parameter.grad
        gradient = gradient * min(1.0, max_norm / total)
    return total.item()


def each_gradient(parameters, norms, max_norm):
    for parameter in with_gradient(parameters):
        if norms.norm().isfinite():
            parameter.grad *= min(1.0, max_norm / parameter.grad.norm().item())
    return norms.norm().item()


def each_element(parameters, norms, max_norm):
    torch.nn.utils.clip_grad_value_(parameters, max_norm)
    return norms.norm().item()


def weights_too(parameters, norms, max_norm):
    with torch.no_grad():
        for parameter in with_gradient(parameters):
            parameter *= max_norm / norms.norm()
    return norms.norm().item()


def spoils_norms(parameters, norms, max_norm):
    total = clipper()(parameters, norms, max_norm)
    norms *= min(1.0, max_norm / total)
    return total


def forgets_none(parameters, norms, max_norm):
    for parameter in parameters:
        parameter.grad *= max_norm / norms.norm()
    return norms.norm().item()


def clears_when_not_finite(parameters, norms, max_norm):
    if not norms.norm().isfinite():
        for parameter in with_gradient(parameters):
            parameter.grad.zero_()
    return clipper()(parameters, norms, max_norm)


def own_norm(parameters, norms):
    return torch.cat([p.grad.flatten() for p in with_gradient(parameters)]).norm()


def unwritten_clip(parameters, norms, max_norm):
    """Clip in place; return the global norm before."""
    ...  # your turn


@pytest.mark.parametrize("answer", [optimization.clip_by_global_norm, torchs_own, clipper(), replaces])
def test_clipping_is_accepted(capsys, answer):
    text = said(capsys, "09.clip_by_global_norm", answer)
    assert ": right. Gradients of one rank were clipped by the norm of all" in text
    if answer in (optimization.clip_by_global_norm, torchs_own):
        assert "last bits" not in text


def test_other_last_bits_of_clipping_are_accepted_and_mentioned(capsys):
    text = said(
        capsys, "09.clip_by_global_norm", clipper(factor=lambda bound, total: min(1.0, bound / total / 1.000001))
    )
    assert ": right." in text and "The last bits are other ones than those of clip_grad_norm_" in text


WRONG_CLIPS = {
    "not written": (unwritten_clip, "not written yet"),
    "own norm": (clipper(own_norm), "clipped by their own norm"),
    "norms added up": (clipper(lambda _, norms: norms.sum()), "The norms of the slots were added up"),
    "no root": (clipper(lambda _, norms: (norms**2).sum()), "Is a root missing?"),
    "to norm 1": (clipper(factor=lambda bound, total: min(1.0, 1 / total)), "scaled to a global norm of 1"),
    "each gradient": (each_gradient, "Each gradient was clipped by its own norm"),
    "each element": (each_element, "Each element was clipped by itself"),
    "on a copy": (on_a_copy, "The gradients are as they were"),
    "half": (clipper(factor=lambda bound, total: 0.5 * bound / total), "they were multiplied by"),
    "another direction": (
        lambda ps, norms, c: [p.grad.neg_().abs_() for p in with_gradient(ps)] and 1.0,
        "they are no multiple of what they were",
    ),
    "small ones too": (clipper(factor=lambda bound, total: bound / total), "Clipping never makes a gradient longer"),
    "spread": (
        clipper(
            careful=False, factor=lambda bound, total: bound / total if total > bound or math.isnan(total) else 1.0
        ),
        "became NaN",
    ),
    "cleared": (clears_when_not_finite, "This rank's became 0"),
    "hidden": (clipper(result=lambda t, _: t if math.isfinite(t) else 0.0), "so it must be told"),
    "nothing returned": (clipper(result=lambda t, _: None), "nothing came. Is a `return` missing?"),
    "norm after": (clipper(result=lambda t, _: min(t, 1.5)), "That is the norm after clipping"),
    "own norm returned": (
        clipper(result=lambda t, ps: own_norm(ps, None).item()),
        "The norm that is returned: expected",
    ),
    "text": (clipper(result=lambda t, _: "large"), "expected a number, came 'large'"),
    "weights": (weights_too, "Clipping changes gradients, not weights"),
    "norms changed": (spoils_norms, "The vector of norms, which is the same on every rank"),
    "no gradient": (forgets_none, "a parameter without a gradient: p.grad is None"),
}


@pytest.mark.parametrize("name", WRONG_CLIPS)
def test_wrong_clipping_is_told_what_is_wrong(capsys, name):
    answer, sentence = WRONG_CLIPS[name]
    text = said(capsys, "09.clip_by_global_norm", answer)
    assert sentence in text and ": right." not in text


# --- What the lesson itself defines -----------------------------------------------------------------------------------


def defined(name):
    """A function of the lesson."""
    (found,) = (node for node in ast.parse(SOURCE.read_text("utf-8")).body if getattr(node, "name", "") == name)
    names = {"torch": torch}
    exec(compile(ast.Module([found], []), str(SOURCE), "exec"), names)
    return names[name]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_the_ring_gives_every_rank_the_sum(num_ranks):
    ring, vectors = defined("ring_all_reduce"), torch.arange(num_ranks * 11.0).view(num_ranks, 11)
    messages = []

    def on_rank(worker):
        isend = worker.transport.isend
        worker.transport.isend = lambda *a, **options: messages.append(worker.rank) or isend(*a, **options)
        before = vectors[worker.rank].clone()
        result = ring(worker, before)
        assert torch.equal(before, vectors[worker.rank])
        return result

    for result in run_in_threads(on_rank, num_ranks):
        assert torch.equal(result, vectors.sum(dim=0))
    assert all(messages.count(rank) == 2 * (num_ranks - 1) for rank in range(num_ranks))
