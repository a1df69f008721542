"""Checks of lesson 09: the norms of a rank's gradients, and clipping by the norm of all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.report import Wrong, call_on_gradients, check_tensor, expect
from course_utils.optimization import clip_by_global_norm as right_clip
from course_utils.optimization import gradient_norms as right_norms

CLOSE = 1e-5  # relative: sums in another order, or without torch's 1e-6
NUM_NORMS = 7
PLACES = (5, 1, 3, 6)  # of this rank's parameters in the model, as a cut may leave them; the last has no gradient


def pairs() -> list[tuple[int, nn.Parameter]]:
    """This rank's parameters, new ones at each call."""
    generator = torch.Generator().manual_seed(9)
    found = []
    for place, shape in zip(PLACES, ((3, 4), (5,), (2, 2, 2), (4,)), strict=True):
        parameter = nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = 2 * torch.randn(shape, generator=generator)
        found.append((place, parameter))
    found[-1][1].grad = None
    return found


# --- The slots ------------------------------------------------------------------------------------------------


def gradient_norms(answer: Callable) -> str:
    own = pairs()
    before = [clone(parameter.grad) for _, parameter in own]
    came = call_on_gradients(answer, own, NUM_NORMS)
    right = right_norms(pairs(), NUM_NORMS)
    check_tensor("The vector of norms", right, came)
    unchanged("gradient_norms only looks: the gradient of a parameter", before, [p.grad for _, p in own])
    came = came.detach()
    if not close(right, came):
        for other, mistake in other_norms(right):
            if close(other, came):
                raise Wrong(mistake)
        expect("The slots that belong to no parameter of this rank", [0.0] * 4, came[[0, 2, 4, 6]].tolist())
        place = next(place for place in PLACES if not close(right[place], came[place]))
        raise Wrong(f"Slot {place}: expected {right[place]:.6g}, came {came[place]:.6g}.")
    praise = (
        "Three gradients stand at their places in a model of seven parameters; a fourth parameter without one gave 0."
    )
    return praise + other_bits(torch.equal(right, came), "torch.linalg.vector_norm")


def other_norms(right: Tensor) -> list[tuple[Tensor, str]]:
    """What other functions than the right one give, and what to say about it."""
    own = pairs()
    in_order, ones, weights, all_weights, lasts = (torch.zeros(NUM_NORMS) for _ in range(5))
    for number, (place, parameter) in enumerate(own):
        all_weights[place] = parameter.detach().norm()
        if parameter.grad is not None:
            weights[place] = all_weights[place]
            in_order[number] = right[place]
            ones[place] = parameter.grad.abs().sum()
            lasts[place] = parameter.grad.abs().max()
    total = torch.zeros(NUM_NORMS)
    total[list(PLACES[:3])] = right.norm()
    return [
        (right**2, "These are the squares of the norms. The norm of a vector of squares is another number."),
        (
            in_order,
            "The norms stand in the first slots, one after the other. Each belongs to the place that comes with its "
            "parameter, or two ranks would fill the same slots.",
        ),
        *[
            (each, "These are the norms of the weights. It is the gradients that are to be clipped.")
            for each in (weights, all_weights)
        ],
        (ones, "These are sums of absolute values. The norm here is the root of the sum of squares."),
        (lasts, "These are largest absolute values. The norm here is the root of the sum of squares."),
        (total, "Every slot holds the norm of all gradients of this rank. A slot is for one parameter's own."),
    ]


# --- Clipping -------------------------------------------------------------------------------------------------


def clip_by_global_norm(answer: Callable) -> str:
    norms = right_norms(pairs(), NUM_NORMS)
    norms[[0, 2, 4]] = torch.tensor([8.0, 2.0, 5.0])  # of other ranks
    same_bits = look_at_clipping(answer, norms, 1.5)
    for value in (math.nan, math.inf):
        spoilt = norms.clone()
        spoilt[0] = value
        look_at_not_finite(answer, spoilt)
    small = norms / 100
    look_at_small(answer, small)
    praise = (
        "Gradients of one rank were clipped by the norm of all, small ones were left alone, and a norm that is not "
        "finite, of another rank, touched nothing."
    )
    return praise + other_bits(same_bits, "clip_grad_norm_, which divides by the norm plus 1e-6")


def look_at_clipping(answer: Callable, norms: Tensor, max_norm: float) -> bool:
    """Whether the gradients have the bits of the right ones. Raises Wrong if they are not even close."""
    own, expected = parameters(), parameters()
    weights, original = [clone(p) for p in own], norms.clone()
    total = right_clip(expected, norms, max_norm)
    came = call_on_gradients(answer, own, norms, max_norm)
    unchanged("Clipping changes gradients, not weights: a parameter", weights, own)
    expect("The vector of norms, which is the same on every rank and stays so", original, norms)
    flat, right, before = (joined(each) for each in (own, expected, parameters()))
    if not close(right, flat):
        for other, mistake in other_gradients(before, norms, max_norm):
            if close(other, flat):
                raise Wrong(mistake)
        ratio = (flat @ before / (before @ before)).item()
        parallel = close(ratio * before, flat)
        factor = f"they were multiplied by {ratio:.4g}" if parallel else "they are no multiple of what they were"
        raise Wrong(
            f"The global norm is {total:.6g}, the bound {max_norm:g}: this rank's gradients should be multiplied by "
            f"{max_norm / total:.4g}; {factor}."
        )
    look_at_result(came, total, norms, max_norm)
    return torch.equal(right, flat)


def other_gradients(before: Tensor, norms: Tensor, max_norm: float) -> list[tuple[Tensor, str]]:
    own = before.norm()
    pieces = [p.grad.flatten() for p in parameters() if p.grad is not None]
    return [
        (
            before,
            "The gradients are as they were, and the norm is above the bound. Are they changed in place, or was a new "
            "tensor made and dropped?",
        ),
        (
            before * max_norm / own,
            "This rank's gradients were clipped by their own norm. The bound is for the gradients of all ranks "
            "together, whose norms are in `norms`.",
        ),
        (
            before * max_norm / norms.sum(),
            "The norms of the slots were added up. The norm of the whole is that of the vector of norms.",
        ),
        (
            before * max_norm / norms.norm() ** 2,
            "The gradients were divided by the square of the global norm. Is a root missing?",
        ),
        (before / norms.norm(), "The gradients were scaled to a global norm of 1. The bound is `max_norm`."),
        (
            torch.cat([p * (max_norm / p.norm()).clamp(max=1.0) for p in pieces]),
            "Each gradient was clipped by its own norm. That changes the direction, as clipping per stage does.",
        ),
        (
            before.clamp(-max_norm, max_norm),
            "Each element was clipped by itself. That changes the direction; it is the norm that has a bound.",
        ),
    ]


def look_at_result(came: Any, total: float, norms: Tensor, max_norm: float) -> None:
    if came is None:
        raise Wrong("The gradients are right. The norm: expected a number, nothing came. Is a `return` missing?")
    number = as_number(came)
    if not math.isclose(number, total, rel_tol=CLOSE):
        said = " That is the norm after clipping." if math.isclose(number, max_norm, rel_tol=CLOSE) else ""
        raise Wrong(
            f"The gradients are right. The norm that is returned: expected {total:.6g}, before clipping; came "
            f"{number:.6g}.{said}"
        )


def look_at_small(answer: Callable, norms: Tensor) -> None:
    own = parameters()
    call_on_gradients(answer, own, norms, 1.5)
    before = joined(parameters())
    if not torch.equal(joined(own), before):
        ratio = (joined(own) @ before / (before @ before)).item()
        raise Wrong(
            f"The global norm is {norms.norm():.4g}, below the bound of 1.5, so nothing is to be changed; the "
            f"gradients were multiplied by {ratio:.4g}. Clipping never makes a gradient longer."
        )


def look_at_not_finite(answer: Callable, norms: Tensor) -> None:
    own, value = parameters(), norms[0].item()
    came = call_on_gradients(answer, own, norms, 1.5)
    flat = joined(own)
    if not torch.equal(flat, joined(parameters())):
        what = "NaN" if flat.isnan().any() else "0" if not flat.any() else "something else"
        raise Wrong(
            f"Another rank's norm is {value}: the step will be skipped, and no gradient may be touched. This rank's "
            f"became {what}."
        )
    if came is None or math.isfinite(as_number(came)):
        raise Wrong(
            f"Another rank's norm is {value}, and {came!r} was returned. The caller skips the step if the norm is not "
            "finite, so it must be told."
        )


# --- Small things ---------------------------------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    return [parameter for _, parameter in pairs()]


def joined(own: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in own if p.grad is not None])


def clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def unchanged(what: str, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> None:
    for one, other in zip(before, after, strict=True):
        if (one is None) != (other is None) or one is not None and other is not None and not torch.equal(one, other):
            raise Wrong(f"{what} is not what it was before.")


def close(expected: Tensor, came: Tensor) -> bool:
    return bool((expected - came).norm() <= CLOSE * expected.norm())


def as_number(came: Any) -> float:
    try:
        return float(came)
    except (TypeError, ValueError):
        raise Wrong(f"The norm that is returned: expected a number, came {came!r}.") from None


def other_bits(are_same: bool, whose: str) -> str:
    return "" if are_same else f" (The last bits are other ones than those of {whose}.)"
