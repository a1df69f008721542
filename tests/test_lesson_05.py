"""What the check of lesson 05 says to right and wrong answers."""

from collections.abc import Callable

import pytest
import torch

from course_utils.pipeline import sum_over_tokens
from tests.answers import said


def make(
    order: Callable = lambda pieces: pieces,
    divisor: Callable = lambda piece, num_tokens, M: num_tokens,
    detach: bool = True,
    before: Callable = lambda model: None,
    result: Callable = lambda losses: losses,
) -> Callable:
    """An answer, some part of it exchanged. before: what is done in each round of the loop before the backward."""

    def accumulate(model, micro_batches):
        num_tokens = sum(piece.num_tokens for piece in micro_batches)
        losses = []
        for piece in order(micro_batches):
            logits, _ = model((None, None), piece)
            loss = sum_over_tokens(logits, piece, divisor(piece, num_tokens, len(micro_batches)))
            before(model)
            loss.backward()
            losses.append(loss.detach() if detach else loss)
        return result(losses)

    return accumulate


def clear(model: torch.nn.Module) -> None:
    model.zero_grad()


def backward_at_the_end(model, micro_batches):
    num_tokens = sum(piece.num_tokens for piece in micro_batches)
    losses = [sum_over_tokens(model((None, None), piece)[0], piece, num_tokens) for piece in micro_batches]
    sum(losses).backward()
    return losses


def no_backward(model, micro_batches):
    num_tokens = sum(piece.num_tokens for piece in micro_batches)
    return [sum_over_tokens(model((None, None), piece)[0], piece, num_tokens) for piece in micro_batches]


def returns_too_early(model, micro_batches):
    num_tokens = sum(piece.num_tokens for piece in micro_batches)
    for piece in micro_batches:
        loss = sum_over_tokens(model((None, None), piece)[0], piece, num_tokens)
        loss.backward()
        return [loss]


def unwritten(model, micro_batches):
    """Add up the gradients of all micro-batches; return their shares of the loss, a list."""
    ...  # your turn


@pytest.mark.parametrize(
    "result",
    [
        lambda losses: losses,
        lambda losses: dict(enumerate(losses)),
        lambda losses: [loss.item() for loss in losses],
        torch.stack,
    ],
    ids=["list", "dict", "floats", "tensor"],
)
def test_the_answer_is_accepted(capsys, result):
    assert said(capsys, "05.accumulate", make(result=result)).startswith("05.accumulate: right. Four ragged pieces;")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("result", [lambda losses: losses, torch.stack], ids=["list", "tensor"])
def test_losses_that_hold_their_graphs_are_accepted_and_mentioned(capsys, result):
    text = said(capsys, "05.accumulate", make(detach=False, result=result))
    assert text.startswith("05.accumulate: right. ") and "still hold on to their graphs" in text
    assert "graphs" not in said(capsys, "05.accumulate", make(result=result))


def divided_by_places(model, micro_batches):
    places = sum(piece.target_output.numel() for piece in micro_batches)
    return make(divisor=lambda piece, n, M: places)(model, micro_batches)


WRONG = {
    "not written": (unwritten, "not written yet"),
    "mean of means": (make(divisor=lambda piece, n, M: piece.num_tokens * M), "the mean of the micro-batches' means"),
    "sum of means": (make(divisor=lambda piece, n, M: piece.num_tokens), "divided by its own tokens"),
    "sum": (make(divisor=lambda piece, n, M: 1), "was the sum never divided"),
    "divided by the places": (divided_by_places, "the number of places: that counts padding"),
    "divided by M too": (make(divisor=lambda piece, n, M: n * M), "4 times too small"),
    "cleared in the loop": (make(before=clear), "Only the last micro-batch"),
    "descending": (make(order=reversed), "right but for their last bits"),
    "backward at the end": (backward_at_the_end, "right but for their last bits"),
    "no backward": (no_backward, "Does a backward run for every micro-batch"),
    "return in the loop": (returns_too_early, "Only the first micro-batch"),
    "one left out": (make(order=lambda pieces: pieces[:3]), "The gradient of "),
    "nothing returned": (make(result=lambda losses: None), "nothing came. Is a `return` missing"),
    "one number": (make(result=sum), "one number came"),
    "twice the losses": (make(result=lambda losses: [2 * loss for loss in losses]), "The loss of micro-batch 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, name):
    answer, sentence = WRONG[name]
    text = said(capsys, "05.accumulate", answer)
    assert sentence in text
    assert ": right." not in text
