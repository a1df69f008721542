"""The data: words, vocabularies, the split, batches and micro-batches."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from course_utils.number_words import (
    END,
    PAD,
    SOURCE,
    START,
    TARGET,
    Batch,
    Vocabulary,
    batch,
    collate,
    even_sizes,
    fair_shares,
    repeat_rare_lengths,
    split_numbers,
    to_words,
)

NUMBERS = st.integers(0, 999_999)


def tensors(b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return b.source, b.target_input, b.target_output


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def numbers_of(b: Batch) -> list[int]:
    """The numbers of a batch, read back from its digits."""
    return [int("".join(SOURCE.decode(row[row != PAD]))) for row in b.source]


# --- Words and vocabularies ---


@pytest.mark.smoke
def test_numbers_are_read_digit_by_digit():
    assert to_words(123) == "one two three"
    assert to_words(0) == "zero"
    assert to_words("007") == "zero zero seven"
    assert to_words(9876543210) == "nine eight seven six five four three two one zero"


def test_all_digits_and_all_words_have_an_id():
    assert len(SOURCE) == 11 and len(TARGET) == 13
    assert SOURCE.decode(SOURCE.encode("0123456789")) == list("0123456789")
    words = to_words("0123456789").split()
    assert TARGET.decode(TARGET.encode(words)) == words
    assert (SOURCE.tokens[PAD], TARGET.tokens[PAD]) == ("<pad>", "<pad>")
    assert (TARGET.tokens[START], TARGET.tokens[END]) == ("<start>", "<end>")
    assert PAD not in SOURCE.encode("0123456789") and not {PAD, START, END} & set(TARGET.encode(words))


@given(st.lists(st.text(), unique=True, min_size=1), st.data())
def test_decode_undoes_encode(tokens, data):
    vocabulary = Vocabulary(tokens)
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1)))
    assert vocabulary.encode(vocabulary.decode(ids)) == ids


def test_what_a_vocabulary_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="unknown token 'ten'.*nine"):
        TARGET.encode(["one", "ten"])
    with pytest.raises(ValueError, match="unknown token id 13.*0 to 12"):
        TARGET.decode([13])
    with pytest.raises(ValueError, match="unknown token id -1"):
        TARGET.decode([-1])
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["a", "b", "a"])


NOT_NUMBERS = [-1, True, 1.0, None, "", "-5", "12a", "٣", "²", " 7", [7]]


@pytest.mark.parametrize("bad", NOT_NUMBERS, ids=repr)
def test_what_is_not_a_number_is_an_error_that_shows_it(bad):
    with pytest.raises(ValueError) as error:
        to_words(bad)
    assert repr(bad) in str(error.value)
    with pytest.raises(ValueError) as error:
        collate([1, bad])
    assert repr(bad) in str(error.value)


# --- Training and held-out numbers ---


@given(st.data())
def test_training_and_held_out_never_overlap(data):
    lowest = data.draw(st.integers(0, 1000))
    available = data.draw(st.integers(1, 300))
    highest = lowest + available - 1
    held_out = data.draw(st.integers(0, available))
    training = data.draw(st.none() | st.integers(0, available - held_out))
    seed = data.draw(st.integers())
    split = split_numbers(lowest, highest, training, held_out, seed)
    assert not set(split.training) & set(split.held_out)
    drawn = split.training + split.held_out
    assert len(set(drawn)) == len(drawn)
    assert all(lowest <= number <= highest for number in drawn)
    assert len(split.held_out) == held_out
    assert len(split.training) == (available - held_out if training is None else training)
    assert split == split_numbers(lowest, highest, training, held_out, seed)


def test_the_default_split():
    split = split_numbers()
    assert (len(split.training), len(split.held_out)) == (20_000, 500)
    assert not set(split.training) & set(split.held_out)
    assert split != split_numbers(seed=1)
    # The same on every machine and in every version of Python that the course runs on.
    assert split.held_out[:3] == (993, 17770, 396854)
    assert split.training[:3] == (4, 0, 8)


def lengths(numbers: tuple[int, ...]) -> dict[int, int]:
    """{digits: how many numbers have so many}"""
    return dict(sorted(Counter(len(str(number)) for number in numbers).items()))


def test_every_length_gets_a_fair_share_and_leaves_most_of_its_numbers_to_learn_from():
    split = split_numbers()
    assert lengths(split.training) == {1: 9, 2: 81, 3: 810, 4: 6367, 5: 6367, 6: 6366}
    assert lengths(split.held_out) == {1: 1, 2: 9, 3: 90, 4: 134, 5: 133, 6: 133}
    small = split_numbers(0, 999, None, 100)
    assert lengths(small.held_out) == {1: 1, 2: 9, 3: 90}
    assert lengths(split_numbers(95, 104, 2, 8).held_out) == {2: 4, 3: 4}  # a tenth of them would not suffice


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.data())
def test_fair_shares(limits, data):
    total = data.draw(st.integers(0, sum(limits)))
    shares = fair_shares(total, limits)
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    unlimited = [share for share, limit in zip(shares, limits, strict=True) if share < limit]
    assert not unlimited or max(shares) <= min(unlimited) + 1  # who has less was not able to take more


def test_more_training_numbers_leave_the_exam_as_it_is():
    exams = {split_numbers(0, 999, training, 100).held_out for training in (0, 1, 50, 500, 900, None)}
    assert len(exams) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lowest": -3}, "lowest must be at least 0, got -3"),
        ({"lowest": 5, "highest": 4}, r"5\.\.4 is empty"),
        ({"highest": "9"}, "highest must be a whole number .* got '9'"),
        ({"highest": 10**30}, "at most 18 digits"),
        ({"highest": 9, "held_out": 11, "training": None}, r"held_out=11 .* 10 numbers in 0\.\.9"),
        ({"highest": 9, "held_out": 4, "training": 7}, "training=7 and held_out=4 .* 10 numbers"),
        ({"held_out": -1}, "held_out must be at least 0, got -1"),
        ({"training": -1}, "training must be at least 0, got -1"),
        ({"training": 1.5}, "training must be a whole number .* got 1.5"),
        ({"held_out": True}, "held_out must be a whole number .* got True"),
        ({"seed": None}, "seed must be a whole number .* got None"),
    ],
    ids=str,
)
def test_a_split_that_cannot_be_made_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_numbers(**arguments)


# --- Batches ---


def test_collate_pads_at_the_end():
    pair = collate([7, "42"])
    four, two, seven = TARGET.encode(["four", "two", "seven"])
    assert pair.source.tolist() == [[SOURCE.encode("7")[0], PAD], SOURCE.encode("42")]
    assert pair.target_input.tolist() == [[START, seven, PAD], [START, four, two]]
    assert pair.target_output.tolist() == [[seven, END, PAD], [four, two, END]]
    assert {ids.dtype for ids in tensors(pair)} == {torch.int64}
    assert pair.geometry == (pair.rows, pair.source_length, pair.target_length) == (2, 2, 3)
    assert pair.num_tokens == 5 and isinstance(pair.num_tokens, int)
    assert {ids.device.type for ids in tensors(pair.to("meta"))} == {"meta"}


@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_every_row_says_its_number(numbers):
    b = collate(numbers)
    assert numbers_of(b) == numbers
    for number, inputs, outputs in zip(numbers, b.target_input, b.target_output, strict=True):
        words = to_words(number).split()
        assert TARGET.decode(inputs[inputs != PAD]) == ["<start>", *words]
        assert TARGET.decode(outputs[outputs != PAD]) == [*words, "<end>"]
    assert b.num_tokens == sum(len(str(number)) + 1 for number in numbers)


@given(seed=st.integers(), step=st.integers(0, 10**9), size=st.integers(1, 20), disturbance=st.integers(0, 2**32 - 1))
def test_a_batch_is_a_pure_function_of_its_arguments(seed, step, size, disturbance):
    numbers = range(100, 120)
    before = random.getstate(), torch.get_rng_state()
    first = batch(numbers, seed, step, size)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    random.seed(disturbance)
    torch.manual_seed(disturbance)
    assert same(first, batch(numbers, seed, step, size))
    drawn = numbers_of(first)
    assert len(drawn) == size == len(set(drawn)) and set(drawn) <= set(numbers)


def test_the_first_batch_on_every_machine():
    assert numbers_of(batch(range(1_000_000), seed=0, step=0, size=3)) == [780693, 678278, 379315]


def test_steps_and_seeds_give_other_batches():
    drawn = [numbers_of(batch(range(1_000_000), seed, step, 4)) for seed in range(5) for step in range(5)]
    assert len({tuple(numbers) for numbers in drawn}) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 11}, "size=11 .* 10 numbers"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 2.0}, "size must be a whole number .* got 2.0"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"step": True}, "step must be a whole number .* got True"),
        ({"seed": "0"}, "seed must be a whole number .* got '0'"),
    ],
    ids=str,
)
def test_a_batch_that_cannot_be_drawn_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch(**{"numbers": range(10), "seed": 0, "step": 0, "size": 2, **arguments})


def test_a_batch_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no numbers"):
        collate([])


# --- Micro-batches ---


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.data())
def test_micro_batches_hold_the_rows_in_order(numbers, data):
    whole = collate(numbers)
    num_micro_batches = data.draw(st.integers(1, len(numbers)))
    trimmed = whole.split(num_micro_batches)
    padded = whole.split(num_micro_batches, trim=False)
    sizes = [piece.rows for piece in trimmed]
    assert len(sizes) == num_micro_batches and sum(sizes) == len(numbers)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert sum(piece.num_tokens for piece in trimmed) == whole.num_tokens
    start = 0
    for piece, long in zip(trimmed, padded, strict=True):
        own = numbers[start : start + piece.rows]
        start += piece.rows
        assert same(piece, collate(own))  # as if there had never been longer rows
        assert long.geometry == (len(own), whole.source_length, whole.target_length)
        assert numbers_of(long) == own and long.num_tokens == piece.num_tokens


def test_seven_rows_make_five_micro_batches():
    assert [piece.rows for piece in collate(range(7)).split(5)] == [2, 2, 1, 1, 1] == even_sizes(7, 5)


@pytest.mark.parametrize("bad", [0, -1, 4, 1.0, None, True], ids=repr)
def test_micro_batches_that_cannot_be_made_are_an_error(bad):
    with pytest.raises(ValueError, match="micro-batches") as error:
        collate([1, 2, 3]).split(bad)
    assert repr(bad) in str(error.value)


# --- Rare lengths ----------------------------------------------------------------------------------------------------


def test_rare_lengths_are_repeated_up_to_a_share_but_not_more_than_ten_times():
    numbers = [*range(9), *range(10, 91), *range(100, 2000)]
    repeated = Counter(repeat_rare_lengths(numbers, share=0.1, at_most=10))
    assert set(repeated) == set(numbers)
    times = {length: {repeated[n] for n in numbers if len(str(n)) == length} for length in (1, 2, 3, 4)}
    assert times == {1: {10}, 2: {3}, 3: {1}, 4: {1}}  # 199 of 1990 would be a tenth: 22 times 9, 3 times 81


def test_where_no_length_is_rare_nothing_is_repeated():
    numbers = tuple(range(1000, 2000))
    assert repeat_rare_lengths(numbers) == numbers
    assert repeat_rare_lengths(()) == ()
