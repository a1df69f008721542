"""Lesson 05: the loop over the micro-batches of a mini-batch."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.report import Wrong, are_close, expect, expect_close
from course_utils.number_words import Batch, collate
from course_utils.pipeline import sum_over_tokens
from course_utils.stages import CutModel, Stage, by_count, one_thread
from course_utils.transformer import TransformerConfig

CONFIG = TransformerConfig(d_model=16, heads=2, encoder_layers=1, decoder_layers=1)
Gradients = dict[str, Tensor]


def accumulate(answer: Callable) -> str:
    pieces = collate([7, 3, 9, 123_456, 90_210, 45, 808_080]).split(4)
    holds_graphs = False
    with one_thread():
        model = new_model()
        came = answer(model, pieces)
        losses = [float(loss) for loss in right_losses(new_model(), pieces)]
        look_at_gradients(model, pieces)
        if came is None:
            raise Wrong("The gradients are right. The losses: expected a list, nothing came. Is a `return` missing?")
        if isinstance(came, Mapping):
            came = [came[m] for m in sorted(came)]
        if isinstance(came, Tensor) and came.dim() == 0 or isinstance(came, float):
            raise Wrong("The gradients are right. The losses: expected one share per micro-batch, one number came.")
        expect("The number of losses", len(pieces), len(came))
        for m, (expected, loss) in enumerate(zip(losses, came, strict=True)):
            if isinstance(loss, Tensor):
                holds_graphs |= loss.requires_grad
                loss = loss.detach()
            expect_close(f"The loss of micro-batch {m}", expected, loss, 1e-5)
    praise = (
        "Four ragged pieces; their gradients have the bits of the course's own loop, and the losses are their shares."
    )
    return praise + " (The losses still hold on to their graphs; detached ones would not.)" * holds_graphs


@cache
def built() -> Stage:
    return CutModel(CONFIG, by_count(6, 1)).build(0, seed=0)


def new_model() -> Stage:
    return copy.deepcopy(built())  # faster than building one


def right_losses(model: Stage, pieces: list[Batch], share: Callable = sum_over_tokens, order: Any = None) -> list[Any]:
    """The course's loop: gradients are left in the model."""
    num_tokens = sum(piece.num_tokens for piece in pieces)
    losses = []
    for m in order or range(len(pieces)):
        logits, _ = model((None, None), pieces[m])
        loss = share(logits, pieces[m], num_tokens)
        loss.backward()
        losses.append(loss.detach())
    return losses


def gradients_of(pieces: list[Batch], share: Callable = sum_over_tokens, order: Any = None) -> Gradients:
    model = new_model()
    right_losses(model, pieces, share, order)
    return {name: parameter.grad for name, parameter in model.named_parameters_globally() if parameter.grad is not None}


def look_at_gradients(model: Stage, pieces: list[Batch]) -> None:
    """Raises Wrong, naming the mistake if it is a known one, unless all gradients have the right bits."""
    came: Gradients = {}
    for name, parameter in model.named_parameters_globally():
        if parameter.grad is None:
            raise Wrong(f"{name} has no gradient. Does a backward run for every micro-batch?")
        came[name] = parameter.grad
    right = gradients_of(pieces)
    if all(torch.equal(gradient, came[name]) for name, gradient in right.items()):
        return
    if are_close(right, came):
        raise Wrong(
            "The gradients are right but for their last bits. Two things to look at: are the micro-batches taken in "
            "ascending order, and does each one's backward follow its own forward?"
        )
    for gradients, mistake in mistakes(pieces):
        if are_close(gradients, came):
            raise Wrong(mistake)
    for factor, mistake in factors(pieces):
        if are_close({name: factor * gradient for name, gradient in right.items()}, came):
            raise Wrong(mistake)
    name = max(right, key=lambda name: (right[name] - came[name]).norm().item())
    expect_close(f"The gradient of {name}", right[name], came[name], 1e-6)


def mistakes(pieces: list[Batch]) -> list[tuple[Gradients, str]]:
    """Gradients of other loops than the right one, and what to say about them."""

    def mean_of_means(logits: Tensor, piece: Batch, num_tokens: int) -> Tensor:
        return sum_over_tokens(logits, piece, piece.num_tokens) / len(pieces)

    def sum_of_means(logits: Tensor, piece: Batch, num_tokens: int) -> Tensor:
        return sum_over_tokens(logits, piece, piece.num_tokens)

    weighs = (
        "so a token in a short micro-batch weighs more than one in a long one. Whose tokens does the loss divide by?"
    )
    return [
        (gradients_of(pieces, mean_of_means), f"This is the mean of the micro-batches' means, {weighs}"),
        (gradients_of(pieces, sum_of_means), f"Each micro-batch is divided by its own tokens, {weighs}"),
        (
            gradients_of(pieces, order=[len(pieces) - 1]),
            "Only the last micro-batch is left in the gradients. Is something cleared or overwritten inside the loop?",
        ),
        (gradients_of(pieces, order=[0]), "Only the first micro-batch is in the gradients. Where does the loop end?"),
    ]


def factors(pieces: list[Batch]) -> list[tuple[float, str]]:
    num_tokens, M = sum(piece.num_tokens for piece in pieces), len(pieces)
    places = sum(piece.target_output.numel() for piece in pieces)
    return [
        (
            num_tokens,
            f"All gradients are {num_tokens} times too large, the number of tokens: was the sum never divided?",
        ),
        (
            num_tokens / places,
            f"The sum is divided by {places}, the number of places: that counts padding, which has no loss. The tokens "
            f"are {num_tokens}.",
        ),
        (1 / M, f"All gradients are {M} times too small: the shares add up already, so nothing is to be divided by M."),
        (2, "All gradients are twice too large: was there a gradient in the model before, or are there two backwards?"),
    ]
