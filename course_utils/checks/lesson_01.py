"""The task of lesson 01: the mask of the decoder."""

from collections.abc import Callable

import torch
from torch import Tensor

from course_utils.checks.report import Wrong, check_tensor, expect
from course_utils.transformer import causal_mask, padding_mask
from course_utils.transformer import target_mask as mask_of_the_package

LOOK = "True means that a query (row) may look at a key (column)"


def target_mask(answer: Callable) -> str:
    """target_mask(ids) -> (rows, 1, length, length), causal and without padding."""
    # As many rows as places: so a mask without a dimension for the heads comes out at all, in the wrong shape.
    ids = torch.tensor([[1, 5, 6, 0, 0], [1, 4, 0, 0, 0], [1, 3, 5, 7, 9], [1, 8, 2, 6, 0], [1, 0, 0, 0, 0]])
    right, came = mask_of_the_package(ids), answer(ids)
    if isinstance(came, Tensor):
        recognise(came, right, causal_mask(ids.shape[1]), padding_mask(ids))
    check_tensor("the mask", right, came)
    for other in (ids, torch.tensor([[1, 2], [1, 0]])):
        expect(f"the mask of the ids {other.tolist()}", mask_of_the_package(other), answer(other))
    return "Two batches, rows with and without padding."


def recognise(came: Tensor, right: Tensor, causal: Tensor, padding: Tensor) -> None:
    """Raises Wrong for a mask that is wrong in a way that is known."""
    if came.is_floating_point():
        raise Wrong(f"The mask holds numbers; this course uses True and False. {LOOK}.")
    if came.shape == right.squeeze(1).shape:
        raise Wrong(
            f"The shape is {tuple(came.shape)}; attention has a dimension for its heads too: {tuple(right.shape)}."
        )
    if came.shape == right.shape[2:] and not torch.equal(came, causal):
        raise Wrong(
            f"The shape is {tuple(came.shape)}: one matrix for all rows. The ids have no dimension for the heads nor "
            f"for the queries yet; give them both before you join, and the shape is {tuple(right.shape)}."
        )
    mistakes = {
        "A word may still look at padding: only the causal half is there.": causal,
        "A word may still look at words after it: only the padding half is there.": padding,
        f"It is the right mask with True and False exchanged. {LOOK}.": ~right,
        "Every word sees those after it instead of those before it: it is the wrong triangle.": causal.T & padding,
        "A word does not see itself: the diagonal is missing.": causal.tril(-1) & padding,
        "A pair is allowed if one of the two masks allows it; it must be allowed by both.": causal | padding,
        "Padding was forbidden to look, not to be looked at: the dimension of the keys is the last one.": (
            causal & padding.transpose(2, 3)
        ),
    }
    for sentence, mistake in mistakes.items():
        if (
            came.dtype == torch.bool
            and fits(came, right)
            and torch.equal(came.expand_as(right), mistake.expand_as(right))
        ):
            raise Wrong(sentence)


def fits(came: Tensor, right: Tensor) -> bool:
    """Whether it can be broadcast to the right shape."""
    try:
        return torch.broadcast_shapes(came.shape, right.shape) == right.shape
    except RuntimeError:
        return False
