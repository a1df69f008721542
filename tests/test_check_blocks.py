"""What a pipeline cannot carry is said before a run, block by block, with the remedy."""

import pytest
import torch
from torch import nn

from course_utils.check_blocks import check_blocks
from course_utils.number_words import batch
from course_utils.transformer import TransformerConfig, block_builders

MICRO_BATCH = batch(range(100, 999), seed=0, step=0, size=4)


class First(nn.Module):
    """Token ids to (rows, length, 6)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, carry, micro_batch, generator):
        return self.table(micro_batch.source), None


class Second(nn.Module):
    """A linear layer and whatever a test adds to it."""

    def __init__(self, change=lambda self, hidden: self.linear(hidden)):
        super().__init__()
        self.linear, self.change = nn.Linear(6, 6), change

    def forward(self, carry, micro_batch, generator):
        given = self.change(self, carry[0])
        return given if isinstance(given, tuple | list | str) else (given, None)


def said(*blocks):
    return [str(finding) for finding in check_blocks(blocks, MICRO_BATCH)]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_blocks_of_the_course_have_no_problem(dropout):
    config = TransformerConfig(d_model=16, heads=2, dropout=dropout)
    blocks = [builder.build(seed=0) for builder in block_builders(config)]
    assert check_blocks(blocks, MICRO_BATCH) == []
    assert all(parameter.grad is None for block in blocks for parameter in block.parameters())


def in_place(self, hidden):
    hidden += 1
    return self.linear(hidden)


def in_place_without_gradient(self, hidden):
    hidden.detach().mul_(2)
    return self.linear(hidden)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            in_place,
            "changes in place what it receives, which at a border is a leaf; use an operation that makes a new tensor",
        ),
        (in_place_without_gradient, "changes in place what it receives"),
        (lambda self, hidden: (hidden, None, None), "returns a tuple of 3, and not a carry; return (hidden, memory)"),
        (lambda self, hidden: [hidden, None], "returns a list, and not a carry"),
        (lambda self, hidden: (hidden, "x"), "returns a tuple, and not a carry"),
        (lambda self, hidden: self.linear(hidden).argmax(-1), "hidden is torch.int64, through which no gradient flows"),
        (lambda self, hidden: self.linear(hidden).detach(), "hidden has no history, so no gradient flows back"),
        (lambda self, hidden: (self.linear(hidden), hidden.long()), "memory is torch.int64"),
    ],
)
def test_a_problem_is_named_with_the_remedy(change, sentence):
    found = check_blocks([First(), Second(change)], MICRO_BATCH)
    assert [(finding.block, finding.is_problem) for finding in found] == [(1, True)]
    assert str(found[0]).startswith("block 1 (Second): ") and sentence in str(found[0])


def test_statistics_of_a_micro_batch():
    def normalised(self, hidden):
        return self.norm(self.linear(hidden).transpose(1, 2)).transpose(1, 2)

    block = Second(normalised)
    block.norm = nn.BatchNorm1d(6)
    before = block.norm.running_mean.clone(), block.norm.num_batches_tracked.clone()
    (sentence,) = said(First(), block)
    assert "BatchNorm1d computes its statistics per micro-batch" in sentence and "LayerNorm or GroupNorm" in sentence
    assert torch.equal(block.norm.running_mean, before[0]) and block.norm.num_batches_tracked == before[1]
    block.norm.eval()
    assert said(First(), block) == []


def test_what_is_allowed_is_said_as_such():
    frozen = Second()
    frozen.requires_grad_(False)
    (nothing_to_train,) = said(First(), frozen)
    assert "allowed: it has nothing to train" in nothing_to_train
    (view,) = said(First(), Second(lambda self, hidden: hidden[:, :2]))
    assert "allowed: hidden is a view of what it received" in view and "clone()" in view
    assert said(First(), Second(lambda self, hidden: hidden)) == []  # handed on as it came


def test_after_a_block_that_gives_no_carry_nothing_is_guessed():
    blocks = [First(), Second(lambda self, hidden: "nothing"), Second()]
    assert [finding.block for finding in check_blocks(blocks, MICRO_BATCH)] == [1]


def test_an_error_of_a_block_is_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        said(First(), Second(lambda self, hidden: self.linear(hidden[..., :3])))
