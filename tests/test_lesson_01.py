"""The check of lesson 01 accepts the mask, and tells the usual wrong ones apart."""

import pytest
import torch

from course_utils.transformer import causal_mask, padding_mask, target_mask
from tests.answers import said


def unwritten(ids): ...


def negative_infinity(ids):
    return torch.zeros(target_mask(ids).shape).masked_fill(~target_mask(ids), -torch.inf)


def of_one_batch(ids):
    """Knows only one length."""
    return causal_mask(5)[: ids.shape[1], : ids.shape[1]] & padding_mask(ids) if ids.shape[1] == 5 else causal_mask(2)


ANSWERS = {
    "right": target_mask,
    "not written yet": unwritten,
    "The mask holds numbers": negative_infinity,
    "a dimension for its heads": lambda ids: target_mask(ids).squeeze(1),
    "no dimension for the heads nor for the queries": lambda ids: causal_mask(ids.shape[1]) & (ids != 0),
    "one matrix for all rows": lambda ids: causal_mask(ids.shape[1]) & (ids != 0).T,
    "attention has a dimension for its heads too: (5, 1, 5, 5)": lambda ids: (
        causal_mask(ids.shape[1]) & (ids != 0)[:, None]
    ),
    "only the causal half": lambda ids: causal_mask(ids.shape[1]),
    "may still look at padding": lambda ids: causal_mask(ids.shape[1]).expand(len(ids), 1, -1, -1),
    "only the padding half": padding_mask,
    "may still look at words after it": lambda ids: padding_mask(ids).expand(-1, 1, ids.shape[1], -1),
    "exchanged": lambda ids: ~target_mask(ids),
    "the wrong triangle": lambda ids: causal_mask(ids.shape[1]).T & padding_mask(ids),
    "the diagonal is missing": lambda ids: causal_mask(ids.shape[1]).tril(-1) & padding_mask(ids),
    "it must be allowed by both": lambda ids: causal_mask(ids.shape[1]) | padding_mask(ids),
    "Padding was forbidden to look": lambda ids: causal_mask(ids.shape[1]) & (ids != 0)[:, None, :, None],
    "nothing came": lambda ids: {}.get(0),
    "expected a tensor": lambda ids: target_mask(ids).tolist(),
    "expected the shape (2, 1, 2, 2)": of_one_batch,
    "expected torch.bool": lambda ids: target_mask(ids).int(),
    "at [0, 0, 0, 0]": lambda ids: torch.zeros_like(target_mask(ids)),
    "expected the shape (5, 1, 5, 5)": lambda ids: target_mask(ids)[:2],
}


@pytest.mark.parametrize("sentence, answer", ANSWERS.items(), ids=list(ANSWERS))
def test_an_answer_gets_its_sentence(sentence, answer, capsys):
    text = said(capsys, "01.target_mask", answer)
    assert sentence in text
    assert text.startswith("01.target_mask: right.") == (sentence == "right")
