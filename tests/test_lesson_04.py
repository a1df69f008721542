"""What the check of lesson 04 says to right and wrong answers."""

from collections.abc import Callable

import pytest
import torch

from course_utils.links import present, receive_carry, send_carry
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.schedules import naive
from tests.answers import said


def make(
    loss: Callable = sum_over_tokens,
    before_each: Callable = lambda stage: None,
    sends_back: Callable = lambda leaves: [leaf.grad for leaf in present(leaves)],
    waits_for_gradients: bool = True,
    asks: bool = True,
    border_of: Callable = lambda rank: rank,
    walk_back: Callable = lambda carry, gradients: torch.autograd.backward(carry, gradients),
    result: Callable = lambda losses: losses,
) -> Callable:
    """An answer, some part of it exchanged."""

    def naive_step(worker, stage, cut, micro_batches, num_tokens):
        k, losses = worker.rank, {}
        for m, micro_batch in enumerate(micro_batches):
            before_each(stage)
            geometry, leaves = micro_batch.geometry, (None, None)
            if not stage.is_first:
                leaves = receive_carry(worker, cut.carry_after(border_of(k) - 1, geometry), k - 1, f"activations {m}")
                for leaf in present(leaves):
                    leaf.requires_grad_(asks)
            carry = stage(leaves, micro_batch)
            if stage.is_last:
                losses[m] = loss(carry[0], micro_batch, num_tokens)
                losses[m].backward()
            else:
                send_carry(worker, carry, k + 1, f"activations {m}")
                if waits_for_gradients:
                    gradients = receive_carry(worker, cut.carry_after(k, geometry), k + 1, f"gradients {m}")
                    walk_back(present(carry), present(gradients))
            if not stage.is_first:
                send_carry(worker, sends_back(leaves), k - 1, f"gradients {m}")
        return result(losses)

    return naive_step


def with_the_package(worker, stage, cut, micro_batches, num_tokens):
    schedule = naive(cut.num_stages, len(micro_batches))
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after)
    return pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens)


def one_walk_for_each(carry, gradients):
    for tensor, gradient in zip(carry, gradients, strict=True):
        tensor.backward(gradient, retain_graph=True)


def receives_nothing(worker, stage, cut, micro_batches, num_tokens):
    stage((None, None), micro_batches[0])
    return {}


def unwritten(worker, stage, cut, micro_batches, num_tokens):
    """Add up the gradients of all micro-batches in `.grad`."""
    ...  # your turn


def for_two_stages(worker, stage, cut, micro_batches, num_tokens):
    return make()(worker, stage, cut, micro_batches, num_tokens) if worker.rank != 1 else {}


@pytest.mark.parametrize("answer", [make(), with_the_package], ids=["written out", "with the package"])
def test_an_answer_is_accepted(capsys, answer):
    expected = "04.naive_step: right. 3 stages, 2 micro-batches: the bits of one device."
    assert said(capsys, "04.naive_step", answer).strip() == expected


def own_mean(logits, micro_batch, num_tokens):
    return sum_over_tokens(logits, micro_batch, micro_batch.num_tokens)


WRONG = {
    "not written": (unwritten, "not written yet"),
    "gradients not sent back": (
        make(sends_back=lambda leaves: []),
        "this is a deadlock. Every message needs both sides: whoever gets activations owes a gradient",
    ),
    "nobody sends or waits for gradients": (
        make(sends_back=lambda leaves: [], waits_for_gradients=False),
        "Stage 0 has no gradients at all",
    ),
    "the middle does nothing": (for_two_stages, "but stage 1 has ended"),
    "only the last micro-batch": (make(before_each=lambda s: s.zero_grad()), "of the last micro-batch alone"),
    "a mean of its own": (make(loss=own_mean), "is a mean over its own tokens"),
    "no gradient asked for": (make(asks=False), "not right yet"),
    "the specs of another border": (make(border_of=lambda rank: max(1, rank - 1)), "A message went wrong"),
    "the specs of the border behind": (make(border_of=lambda rank: rank + 1), "specs"),
    "nothing received": (receives_nothing, "computes without what its blocks need: this block needs"),
    "a walk for each tensor": (make(walk_back=one_walk_for_each), "right but for their last bits"),
    "ones sent back": (
        make(sends_back=lambda leaves: [torch.ones_like(leaf) for leaf in present(leaves)]),
        "stage 0, the gradient of 00.source_embedding",
    ),
    "nothing returned": (make(result=lambda losses: None), "expected the losses of micro-batches 0 and 1, came None"),
    "the last loss returned": (make(result=lambda losses: losses.get(1)), "expected the losses of micro-batches 0"),
    "a loss doubled": (make(result=lambda losses: {m: 2 * x for m, x in losses.items()}), "the loss of micro-batch 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, name):
    answer, sentence = WRONG[name]
    text = said(capsys, "04.naive_step", answer)
    assert sentence in text
    assert ": right." not in text
