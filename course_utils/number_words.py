"""The data of the course: read a number digit by digit, "123" -> "one two three".

The task is small enough to be learnt in a minute on a laptop, and it has everything that makes sequences hard: two
vocabularies, lengths that differ, padding, and an output that is written word by word.

Everything is a pure function of its arguments: a batch depends on (numbers, seed, step, size) alone. So stages in
different processes agree on a batch without sending it, and a run resumed at step 700 sees what it would have seen.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAD, START, END = 0, 1, 2  # PAD has the same id in both vocabularies; START and END are target tokens

Geometry = tuple[int, int, int]  # (rows, source_length, target_length)


class Vocabulary:
    """Tokens and their ids: a token's id is its place in the list."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            raise ValueError(f"a token is listed twice in {self.tokens}: list each token once")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The ids of the tokens; ValueError for a token that is not in the vocabulary."""
        tokens = list(tokens)
        for token in tokens:
            if token not in self._ids:
                raise ValueError(f"unknown token {token!r}: this vocabulary has {', '.join(self.tokens)}")
        return [self._ids[token] for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of the ids, special tokens included; ValueError for an id that no token has."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                raise ValueError(f"unknown token id {i}: this vocabulary has ids 0 to {len(self) - 1}")
        return [self.tokens[i] for i in ids]


SOURCE = Vocabulary(["<pad>", *"0123456789"])
TARGET = Vocabulary(["<pad>", "<start>", "<end>", *WORDS])


def to_words(number: int | str) -> str:
    """The digits of a number as words: 123 -> "one two three", "007" -> "zero zero seven"."""
    return " ".join(WORDS[int(digit)] for digit in _digits(number))


@dataclass(frozen=True)
class Split:
    """Numbers to learn from and numbers that are only asked at the end; no number is in both."""

    training: tuple[int, ...]
    held_out: tuple[int, ...]


def split_numbers(
    lowest: int = 0,
    highest: int = 999_999,
    training: int | None = 20_000,
    held_out: int = 500,
    seed: int = 0,
) -> Split:
    """Draw `held_out` numbers for the exam, then `training` other ones, from lowest..highest (both included).

    Each length gets the same share, as far as it has so many numbers, and the exam takes at most a tenth of a length if
    that suffices. Drawn evenly from 0..999,999, nine numbers in ten would have six digits, and a model that has hardly
    seen a short one reads 16 as "one six six six one".

    training=None takes all that are left. The held-out numbers do not depend on how many are trained on, so runs with
    more or less data take the same exam. ValueError for an empty range or for more numbers than the range holds.
    """
    _check_int("lowest", lowest, at_least=0)
    _check_int("highest", highest, at_least=0)
    if highest < lowest:
        raise ValueError(f"the range {lowest}..{highest} is empty: highest must be at least lowest")
    if highest >= 10**18:
        raise ValueError(f"highest must have at most 18 digits, got {highest}")
    _check_int("held_out", held_out, at_least=0)
    _check_int("seed", seed)
    available = highest - lowest + 1
    if held_out > available:
        raise ValueError(f"held_out={held_out} asks for more than the {available} numbers in {lowest}..{highest}")
    if training is None:
        training = available - held_out
    _check_int("training", training, at_least=0)
    if training + held_out > available:
        raise ValueError(
            f"training={training} and held_out={held_out} together ask for more than the {available} numbers in "
            f"{lowest}..{highest}: ask for fewer, or pass training=None for all that are left"
        )
    lengths = _by_length(lowest, highest)
    tenths = [len(numbers) // 10 for numbers in lengths]
    for_exam = fair_shares(held_out, tenths if sum(tenths) >= held_out else [len(numbers) for numbers in lengths])
    for_training = fair_shares(training, [len(numbers) - n for numbers, n in zip(lengths, for_exam, strict=True)])
    exam: list[int] = []
    others: list[int] = []
    for numbers, asked, learned in zip(lengths, for_exam, for_training, strict=True):
        own_exam = random.Random(f"held out, seed {seed}, from {numbers.start}").sample(numbers, asked)
        # Enough candidates that `learned` remain even when every number of the exam is among them.
        candidates = random.Random(f"training, seed {seed}, from {numbers.start}").sample(numbers, learned + asked)
        unknown = set(candidates) - set(own_exam)
        others += [number for number in candidates if number in unknown][:learned]
        exam += own_exam
    random.Random(f"order, seed {seed}").shuffle(exam)
    return Split(training=tuple(others), held_out=tuple(exam))


def repeat_rare_lengths(numbers: Sequence[int], share: float = 0.04, at_most: int = 10) -> tuple[int, ...]:
    """The same numbers, those of a rare length several times, so that batches drawn from them hold more of it.

    There are only 90 numbers with two digits. Drawn one by one from 20,000 of all lengths they are seen so seldom that
    most of a model's mistakes are theirs.

    Args:
        share: each length is repeated until it makes about this share of `numbers` ...
        at_most: ... but no number stands there more often than this.
    """
    lengths: dict[int, list[int]] = {}
    for number in numbers:
        lengths.setdefault(len(str(number)), []).append(number)
    repeated: list[int] = []
    for same_length in lengths.values():
        times = math.ceil(share * len(numbers) / len(same_length))
        repeated += same_length * max(1, min(at_most, times))
    return tuple(repeated)


def _by_length(lowest: int, highest: int) -> list[range]:
    """The range, cut where numbers get one digit longer."""
    starts = [lowest, *(10**digits for digits in range(1, 18) if lowest < 10**digits <= highest)]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], highest + 1], strict=True)]


def fair_shares(total: int, limits: Sequence[int]) -> list[int]:
    """`total` things among groups, as evenly as their limits allow: 10 with limits 1, 9, 9 -> [1, 5, 4]."""
    shares = [0] * len(limits)
    open_groups = sorted(range(len(limits)), key=lambda i: limits[i])
    while open_groups:
        i = open_groups.pop(0)
        shares[i] = min(limits[i], -(-total // (len(open_groups) + 1)))
        total -= shares[i]
    return shares


@dataclass(frozen=True, eq=False)  # eq=False: == on tensors compares element by element
class Batch:
    """Token ids of some numbers, one per row; shorter rows are filled with PAD at their end.

    For the rows 7 and 42:
        source         [[7 <pad>], [4 2]]
        target_input   [[<start> seven <pad>], [<start> four two]]     what the decoder has written so far
        target_output  [[seven <end> <pad>], [four two <end>]]         what it shall write next, at every position
    """

    source: Tensor  # (rows, source_length) int64
    target_input: Tensor  # (rows, target_length) int64
    target_output: Tensor  # (rows, target_length) int64

    @property
    def rows(self) -> int:
        return self.source.shape[0]

    @property
    def source_length(self) -> int:
        return self.source.shape[1]

    @property
    def target_length(self) -> int:
        return self.target_input.shape[1]

    @property
    def geometry(self) -> Geometry:
        """(rows, source_length, target_length): all that is needed to know every shape inside the model."""
        return self.rows, self.source_length, self.target_length

    @property
    def num_tokens(self) -> int:
        """How many tokens the loss is summed over: <end> counts, padding does not."""
        return int((self.target_output != PAD).sum())

    def split(self, num_micro_batches: int, trim: bool = True) -> list["Batch"]:
        """Cut into micro-batches of consecutive rows; sizes differ by at most one, larger ones first.

        trim=True cuts each micro-batch's padding down to its own longest row; trim=False keeps one padded length.
        (torch.chunk may return fewer pieces than asked for: 7 rows in 5 give 4, and a stage would wait for the fifth.)
        ValueError if there are fewer rows than micro-batches: an empty micro-batch has nothing to compute.
        """
        _check_int("the number of micro-batches", num_micro_batches, at_least=1)
        if num_micro_batches > self.rows:
            raise ValueError(
                f"cannot cut {self.rows} rows into {num_micro_batches} micro-batches without an empty one: "
                f"use at most {self.rows} micro-batches or a larger batch"
            )
        sizes = even_sizes(self.rows, num_micro_batches)
        pieces = zip(
            self.source.split(sizes), self.target_input.split(sizes), self.target_output.split(sizes), strict=True
        )
        return [Batch(*map(_trim, piece)) if trim else Batch(*piece) for piece in pieces]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.source.to(device), self.target_input.to(device), self.target_output.to(device))


def collate(numbers: Sequence[int | str]) -> Batch:
    """One row per number, in the order given, padded to the longest. ValueError if there is no number."""
    if len(numbers) == 0:
        raise ValueError(f"cannot make a batch of no numbers, got {numbers!r}: pass at least one")
    digits = [SOURCE.encode(_digits(number)) for number in numbers]
    words = [TARGET.encode(to_words(number).split()) for number in numbers]
    return Batch(
        source=_pad(digits),
        target_input=_pad([[START, *row] for row in words]),
        target_output=_pad([[*row, END] for row in words]),
    )


def batch(numbers: Sequence[int], seed: int, step: int, size: int) -> Batch:
    """The mini-batch of a step: `size` of the numbers, drawn without replacement, a pure function of its arguments."""
    _check_int("seed", seed)
    _check_int("step", step, at_least=0)
    _check_int("size", size, at_least=1)
    if size > len(numbers):
        raise ValueError(f"size={size} asks for more than the {len(numbers)} numbers: use a smaller batch")
    # A generator of its own, seeded with text: the same in every process, and nobody else's draws disturb it.
    return collate(random.Random(f"batch, seed {seed}, step {step}").sample(numbers, size))


def even_sizes(total: int, parts: int) -> list[int]:
    """`total` things in `parts` groups whose sizes differ by at most one, larger ones first: 7 in 3 -> [3, 2, 2]."""
    size, larger = divmod(total, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def _digits(number: int | str) -> str:
    """The digits of a number, or of a string of digits as it stands."""
    if isinstance(number, str):
        # "²" and "٣" count as digits in Python; the vocabulary has 0 to 9.
        if not (number.isascii() and number.isdigit()):
            raise ValueError(f"not a string of digits: {number!r}; write digits 0 to 9 only, such as '007'")
        return number
    _check_int("a number", number, at_least=0)
    return str(number)


def _check_int(name: str, value: object, at_least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number (an int), got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def _pad(rows: list[list[int]]) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def _trim(ids: Tensor) -> Tensor:
    longest = int((ids != PAD).sum(dim=1).max())
    return ids[:, :longest]
