"""What the check of lesson 02 says to right and wrong answers."""

from collections.abc import Callable

import pytest
import torch

from course_utils.pipeline import sum_over_tokens
from tests.answers import said


def receive(carry: tuple) -> tuple:
    return tuple(None if tensor is None else tensor.detach().requires_grad_() for tensor in carry)


def make(
    receive: Callable = receive,
    go_back: Callable = lambda tensors, gradients: torch.autograd.backward(tensors, gradients),
    result: Callable = lambda loss: loss.detach(),
    retain: bool = False,
) -> Callable:
    """An answer, some part of it exchanged."""

    def step_in_two_stages(first, second, micro_batch, num_tokens):
        sent = first((None, None), micro_batch)
        received = receive(sent)
        logits, _ = second(received, micro_batch)
        loss = sum_over_tokens(logits, micro_batch, num_tokens)
        loss.backward(retain_graph=retain)
        pairs = [(s, r.grad) for s, r in zip(sent, received, strict=True) if s is not None]
        go_back([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        return result(loss)

    return step_in_two_stages


def keep_history(carry: tuple) -> tuple:
    for tensor in carry:
        if tensor is not None:
            tensor.retain_grad()
    return carry


def no_gradients(carry: tuple) -> tuple:
    return tuple(None if tensor is None else tensor.detach() for tensor in carry)


def go_back_from_copies(tensors: list, gradients: list) -> None:
    torch.autograd.backward(tensors, [gradient.clone() for gradient in gradients])


def only_the_first(tensors: list, gradients: list) -> None:
    tensors[0].backward(gradients[0])


def one_after_the_other(tensors: list, gradients: list) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.backward(gradient, retain_graph=True)


def freed(tensors: list, gradients: list) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.backward(gradient)


def twice(tensors: list, gradients: list) -> None:
    torch.autograd.backward(tensors, gradients, retain_graph=True)
    torch.autograd.backward(tensors, gradients)


def of_ones(tensors: list, gradients: list) -> None:
    torch.autograd.backward(tensors, [torch.ones_like(gradient) for gradient in gradients])


def for_a_chain(first, second, micro_batch, num_tokens):
    hidden, _ = first((None, None), micro_batch)
    received = hidden.detach().requires_grad_()
    logits, _ = second((received, None), micro_batch)
    loss = sum_over_tokens(logits, micro_batch, num_tokens)
    loss.backward()
    hidden.backward(received.grad)
    return loss


def unwritten(first, second, micro_batch, num_tokens):
    """Leave the gradients of one step in the parameters of both stages; return the loss."""
    ...  # your turn


def viewed(carry: tuple) -> tuple:
    """As the package does it."""
    viewed.leaves = receive(carry)
    return tuple(None if leaf is None else leaf.view_as(leaf) for leaf in viewed.leaves)


@pytest.mark.parametrize("result", [lambda loss: loss.detach(), lambda loss: loss], ids=["detached", "with its graph"])
def test_the_answer_is_accepted(capsys, result):
    assert said(capsys, "02.step_in_two_stages", make(result=result)).startswith(
        "02.step_in_two_stages: right. Three kinds of borders, and every gradient has the bits of one device."
    )


WRONG = {
    "not written": (unwritten, "not written yet"),
    "history kept": (make(receive=keep_history), "still knows how the first one made it"),
    "history kept, graph retained": (make(receive=keep_history, retain=True), "still knows how the first one made it"),
    "no gradient asked for": (make(receive=no_gradients), "collects no gradient"),
    "no gradient asked for, copies": (make(receive=no_gradients, go_back=go_back_from_copies), "collects no gradient"),
    "no gradient asked for, no way back": (
        make(receive=no_gradients, go_back=lambda *_: None),
        "collects no gradient",
    ),
    "no way back": (make(go_back=lambda *_: None), "does a backward run through the first stage"),
    "one of two gradients": (make(go_back=only_the_first), "do the gradients of both tensors come back"),
    "one after the other": (make(go_back=one_after_the_other), "added at the end, in the parameters"),
    "one after the other, freed": (make(go_back=freed), "does all that was sent enter one single walk"),
    "walked twice": (make(go_back=twice), "the first stage was walked through twice"),
    "gradients of ones": (make(go_back=of_ones), "the gradient of "),
    "a chain": (for_a_chain, "one of the two tensors of the carry may be None"),
    "nothing returned": (make(result=lambda loss: None), "nothing came. Is a `return` missing"),
    "the sum returned": (make(result=lambda loss: 2 * loss.detach()), "the loss: expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, name):
    answer, sentence = WRONG[name]
    text = said(capsys, "02.step_in_two_stages", answer)
    assert sentence in text
    assert ": right." not in text
