"""Exercises of unit 01: one training step from memory, and several sequences packed into one row."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from course_utils import number_words, pipeline, transformer
from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare
from course_utils.number_words import END, PAD, START, TARGET
from course_utils.stages import one_thread

FIRST_WORD = END + 1  # ids below it are <pad>, <start> and <end>

# --- one_step ---------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of a mini-batch, as ids of words, and the seed of the model's weights."""

    rows: tuple[tuple[int, ...], ...]
    seed: int

    def __str__(self) -> str:
        return f"rows of {', '.join(str(len(row)) for row in self.rows)} words, seed {self.seed}"


class WordModel(nn.Module):
    """A decoder with one attention layer: model(ids, mask) -> logits (rows, length, 13), scores of the next word.

    Args:
        ids: (rows, length) int64.
        mask: truth values that fit (rows, 1, length, length); True where a query (row) may look at a key (column).

    Raises:
        TypeError: the mask holds something else than truth values.
        ValueError: the mask does not fit.
    """

    WIDTH, LONGEST = 8, 32

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * self.WIDTH**-0.25)

        self.tokens, self.places = weights(len(TARGET), self.WIDTH), weights(self.LONGEST, self.WIDTH)
        self.query, self.key, self.value = (weights(self.WIDTH, self.WIDTH) for _ in range(3))
        self.head = weights(self.WIDTH, len(TARGET))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask holds {mask.dtype}; it must hold True and False")
        rows, length = ids.shape
        self.calls.append((rows, length))
        try:
            one_head = mask.expand(rows, 1, length, length)[:, 0]
        except RuntimeError:
            raise ValueError(
                f"the mask has the shape {tuple(mask.shape)}; it must fit {(rows, 1, length, length)}"
            ) from None
        x = self.tokens[ids] + self.places[:length]
        scores = (x @ self.query) @ (x @ self.key).transpose(1, 2) / self.WIDTH**0.5
        # Not -inf: a query that may look at nothing gets a mean of everything and no NaN, so mistakes stay apart.
        weights = torch.where(one_head, scores, torch.tensor(-1e9)).softmax(-1)
        return (x + weights @ (x @ self.value)) @ self.head


def draw_words(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST_WORD, len(TARGET)) for _ in range(length))


def draw_rows(draw: random.Random) -> list[Rows]:
    lengths = [(1, 2, 3), (4,), (5, 1), (2, 2), *([draw.randint(1, 7) for _ in range(4)] for _ in range(3))]
    return [Rows(tuple(draw_words(draw, length) for length in row), draw.randrange(1000)) for row in lengths]


def attempt_step(answer: Callable, case: Rows) -> dict[str, Any]:
    model = WordModel(case.seed)
    with one_thread():
        loss = answer(model, [list(row) for row in case.rows])
    if isinstance(loss, Tensor):
        loss = loss.item() if loss.numel() == 1 else f"a tensor {tuple(loss.shape)}"
    return {"loss": loss, "gradients": gradients_of(model), "calls": model.calls}


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def word_by_word(case: Rows) -> dict[str, Any]:
    """Loss and gradients without a batch, padding or a mask: each word is asked for behind the words before it."""
    model = WordModel(case.seed)
    losses = []
    for row in case.rows:
        for place, word in enumerate([*row, END]):
            known = torch.tensor([[START, *row[:place]]])
            everything = torch.ones(1, 1, place + 1, place + 1, dtype=torch.bool)
            losses.append(cross_entropy(model(known, everything)[:, -1], torch.tensor([word])))
    loss = torch.stack(losses).mean()
    loss.backward()
    return {"loss": loss.item(), "gradients": gradients_of(model)}


def with_a_mistake(
    case: Rows,
    rows: Callable[[list[int]], tuple[list[int], list[int]]] = lambda row: ([START, *row], [*row, END]),
    mask: Callable[[Tensor], Tensor] = transformer.target_mask,
    reduce: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Any]:
    """A step in which one thing is done otherwise; `reduce` gives what is returned and what the backward starts at."""
    model = WordModel(case.seed)
    pairs = [rows(list(row)) for row in case.rows]
    ids, targets = number_words._pad([one for one, _ in pairs]), number_words._pad([two for _, two in pairs])
    losses = cross_entropy(model(ids, mask(ids)).transpose(1, 2), targets, reduction="none")
    returned, root = (reduce or per_token)(losses, targets != PAD)
    root.backward()
    return {"loss": returned.item(), "gradients": gradients_of(model)}


def per_token(losses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return ((losses * counts).sum() / counts.sum(),) * 2


STEP_MISTAKES = (
    Mistake(
        "shift forgotten",
        "The decoder is asked for the word that it is given at the same place; it must say the next one.",
        lambda case: with_a_mistake(case, rows=lambda row: ([*row, END],) * 2),
    ),
    Mistake(
        "shift forgotten",
        "The decoder is asked for the word that it is given at the same place; it must say the next one.",
        lambda case: with_a_mistake(case, rows=lambda row: ([START, *row],) * 2),
    ),
    Mistake(
        "no <end>",
        "Nobody asks for <end>, so the model would never learn to stop.",
        lambda case: with_a_mistake(case, rows=lambda row: ([START, *row[:-1]], row)),
    ),
    Mistake(
        "padding divides",
        "The sum is divided by all places of the batch, padding included.",
        lambda case: with_a_mistake(case, reduce=lambda x, n: ((x * n).sum() / n.numel(),) * 2),
    ),
    Mistake(
        "padding in the loss",
        "What the model says at padding is part of the loss.",
        lambda case: with_a_mistake(case, reduce=lambda x, n: (x.mean(),) * 2),
    ),
    Mistake(  # the same with a mask that is only causal: at padding the model says something else then
        "padding in the loss",
        "What the model says at padding is part of the loss.",
        lambda case: with_a_mistake(
            case, mask=lambda ids: transformer.causal_mask(ids.shape[1]), reduce=lambda x, n: (x.mean(),) * 2
        ),
    ),
    Mistake(
        "mean of means",
        "Each row's mean counts the same, so a word in a short row weighs more than one in a long row.",
        lambda case: with_a_mistake(case, reduce=lambda x, n: (((x * n).sum(1) / n.sum(1)).mean(),) * 2),
    ),
    Mistake(
        "not divided",
        "The losses of the tokens are added up and not divided by their number.",
        lambda case: with_a_mistake(case, reduce=lambda x, n: ((x * n).sum(),) * 2),
    ),
    Mistake(
        "divided after the backward",
        "The loss is right, but the gradients are those of the sum: the division came after the backward.",
        lambda case: with_a_mistake(case, reduce=lambda x, n: (per_token(x, n)[0], (x * n).sum())),
    ),
    Mistake(
        "mask the wrong way round",
        "True and False are exchanged in the mask. True means that a query may look at a key.",
        lambda case: with_a_mistake(case, mask=lambda ids: ~transformer.target_mask(ids)),
    ),
    Mistake(
        "does not see itself",
        "In the mask the diagonal is missing: a word must see itself.",
        lambda case: with_a_mistake(case, mask=lambda ids: transformer.target_mask(ids).tril(-1)),
    ),
    Mistake(
        "looks ahead",
        "The mask hides padding only, so a word can read its answer at the places after it.",
        lambda case: with_a_mistake(case, mask=transformer.padding_mask),
    ),
)


def judge_steps(cases: Sequence[Rows], came: Sequence[Any]) -> str:
    values = [{"loss": one["loss"], "gradients": one["gradients"]} for one in came]
    if all(g is None for one in values for g in one["gradients"].values()) and values[0]["loss"] is not None:
        raise Named("no backward", f"With {cases[0]}: no parameter of the model has a gradient.")
    with one_thread():
        compare(cases, values, word_by_word, STEP_MISTAKES, tolerance=1e-5)
    for case, one in zip(cases, came, strict=True):
        rows, longest = len(case.rows), 1 + max(map(len, case.rows))
        if len(one["calls"]) != 1:
            raise Named(
                "several calls", f"With {case}: the model was called {len(one['calls'])} times, one call is enough."
            )
        if one["calls"] != [(rows, longest)]:
            raise Wrong(f"With {case}: the model was given ids of the shape {one['calls'][0]}, {(rows, longest)} do.")
    return (
        f"{len(cases)} mini-batches: one call each, no column more than the longest row needs, and loss and gradients "
        "as they are word by word, without padding and masks."
    )


# --- pack -------------------------------------------------------------------------------------------------------------

LENGTHS = (1, 3, 7)  # words; with <start> or <end> 2, 4 and 8 slots


class Sequences(NamedTuple):
    """Sequences of ids of words, to be packed into rows of `width` slots."""

    sequences: tuple[tuple[int, ...], ...]
    width: int

    def __str__(self) -> str:
        return f"sequences of {', '.join(str(len(s)) for s in self.sequences)} words, width {self.width}"


def most_rows(sequences: Sequence[Sequence[int]], width: int) -> int:
    """Rows that the tokens of all sequences fill, the last one perhaps in part.

    Fewer are impossible. So many are always enough if each length, in slots, divides the next longer one and the width
    (Coffman, Garey and Johnson, 1987).
    """
    return -(-sum(len(words) + 1 for words in sequences) // width)


def draw_sequences(draw: random.Random) -> list[Sequences]:
    lengths = [([1, 3, 7, 3, 1], 16), ([7, 7], 8), ([1], 8), ([3, 7, 3, 7], 8), ([1, 3, 1, 1, 7, 1, 3, 7, 1], 16)]
    lengths += [([draw.choice(LENGTHS) for _ in range(draw.randint(5, 12))], draw.choice((8, 16))) for _ in range(5)]
    return [Sequences(tuple(draw_words(draw, length) for length in row), width) for row, width in lengths]


def attempt_pack(answer: Callable, case: Sequences) -> Any:
    came = answer([list(words) for words in case.sequences], case.width)
    if not isinstance(came, tuple | list):
        return type(came).__name__
    return [part if isinstance(part, Tensor) else type(part).__name__ for part in came]


def judge_packs(cases: Sequence[Sequences], came: Sequence[Any]) -> str:
    rows = [len(v[0]) if isinstance(v, list) and v and isinstance(v[0], Tensor) and v[0].dim() else 0 for v in came]
    alone = rows == [len(case.sequences) for case in cases]
    for case, values in zip(cases, came, strict=True):
        judge_pack(case, values, "one row per sequence" if alone else "too many padded slots")
    slots = sum(len(values[0]) * case.width for case, values in zip(cases, came, strict=True))
    padded = sum(len(case.sequences) * (1 + max(map(len, case.sequences))) for case in cases)
    return (
        f"{len(cases)} packs: {slots} slots in all, where one row per sequence takes {padded}, and every token sees "
        "what it sees alone."
    )


def judge_pack(case: Sequences, values: Any, too_many: str) -> None:
    """`too_many` is the name of the mistake of an answer whose pack has too many rows."""
    at = f"With {case}"
    if values == "NoneType":
        raise Wrong(f"{at}: expected four tensors, nothing came. Is a `return` missing?")
    if isinstance(values, str) or len(values) != 4 or not all(isinstance(part, Tensor) for part in values):
        came = values if isinstance(values, str) else [v if isinstance(v, str) else "Tensor" for v in values]
        raise Wrong(f"{at}: expected four tensors (ids, positions, mask, targets), came {came}.")
    ids, positions, mask, targets = values
    rows = len(ids) if ids.dim() else 0
    shapes = {
        "ids": (ids, (rows, case.width), torch.int64),
        "positions": (positions, (rows, case.width), torch.int64),
        "mask": (mask, (rows, 1, case.width, case.width), torch.bool),
        "targets": (targets, (rows, case.width), torch.int64),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            came = f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise Wrong(f"{at}: {name} must be of the shape {shape} and of {dtype}; came {came}.")
    owner = whose(case, ids)
    most = most_rows(case.sequences, case.width)
    if rows > most:
        spare = case.width * rows - int((owner >= 0).sum())
        least = spare - case.width * (rows - most)
        raise Named(
            too_many, f"{at}: {rows} rows, so {spare} padded slots; {most} rows are enough, with {least} padded slots."
        )
    look_at_targets(at, ids, targets, owner)
    look_at_positions(at, positions, owner)
    look_at_mask(at, mask, owner)


def whose(case: Sequences, ids: Tensor) -> Tensor:
    """(rows, width): which sequence of its row a slot belongs to, -1 for a padded one. Raises unless all are there."""
    at = f"With {case}"
    owner, found = torch.full_like(ids, -1), []
    for row, tokens in enumerate(ids.tolist()):
        if END in tokens:
            raise Named(
                "<end> among the ids", f"{at}: <end> is in row {row} of the ids; the decoder is never given it."
            )
        for slot, token in enumerate(tokens):
            if token == START:
                found.append([row])
            elif token != PAD and (slot == 0 or tokens[slot - 1] == PAD):
                raise Wrong(
                    f"{at}: in row {row}, slot {slot} holds {name_of(token)}, where only <start> or padding can stand."
                )
            if token != PAD:
                owner[row, slot] = sum(row == other[0] for other in found)
                found[-1].append(token)
    missing = [list(words) for words in case.sequences]
    for sequence in found:
        words = sequence[2:]
        if words not in missing:
            raise Wrong(
                f"{at}: row {sequence[0]} holds {TARGET.decode(words)}: no sequence of the given, or one twice."
            )
        missing.remove(words)
    if missing:
        raise Named(
            "sequences lost",
            f"{at}: {len(missing)} of {len(case.sequences)} sequences are in no row, "
            f"{TARGET.decode(missing[0])} for one.",
        )
    return owner


def name_of(token: int) -> str:
    return TARGET.tokens[token] if 0 <= token < len(TARGET) else str(token)


def look_at_targets(at: str, ids: Tensor, targets: Tensor, owner: Tensor) -> None:
    """Raises unless each token's target is the next one of its sequence, and padding has none."""
    real, width = owner >= 0, ids.shape[1]
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], PAD)], dim=1)
    right = torch.where(real, torch.where((following == START) | (following == PAD), END, following), PAD)
    if torch.equal(right, targets):
        return
    row, slot = (right != targets).nonzero()[0].tolist()
    if (targets[~real] != PAD).any() and torch.equal(targets[real], right[real]):
        raise Named(
            "padding counted as token",
            f"{at}: {int((targets[~real] != PAD).sum())} padded slots have a target; the loss would count them.",
        )
    if torch.equal(targets, ids):
        raise Named(
            "shift forgotten", f"{at}: the targets are the ids themselves; the decoder must say the next token."
        )
    in_row = (owner[:, 1:] >= 0) & (owner[:, :-1] >= 0)
    if torch.equal(targets[:, :-1][in_row], ids[:, 1:][in_row]) and (targets == START).any():
        raise Named(
            "the next sequence as target",
            f"{at}: the last token of a sequence has the <start> of the next sequence as its target; it must be <end>.",
        )
    expected, came = name_of(int(right[row, slot])), name_of(int(targets[row, slot]))
    raise Wrong(f"{at}: in row {row}, slot {slot} of {width}, the target must be {expected}, came {came}.")


def look_at_positions(at: str, positions: Tensor, owner: Tensor) -> None:
    """Raises unless the positions of each sequence are 0, 1, 2 and so on."""
    for row, slot in (owner >= 0).nonzero().tolist():
        own = owner[row] == owner[row, slot]
        expected, came = slot - int(own.nonzero()[0]), int(positions[row, slot])
        if came == expected:
            continue
        real = owner >= 0
        along = torch.arange(positions.shape[1]).expand_as(positions)
        shown = (
            f"{at}: in row {row}, slot {slot} has position {came}; counted from 0, it is {expected} in its sequence."
        )
        if torch.equal(positions[real], along[real]):
            raise Named("positions do not restart", f"The positions run on through the row. {shown}")
        raise Wrong(shown)
    if (positions < 0).any() or (positions >= positions.shape[1]).any():
        raise Wrong(f"{at}: a padded slot has a position below 0 or beyond the row; no table of positions has that.")


def look_at_mask(at: str, mask: Tensor, owner: Tensor) -> None:
    """Raises unless each token sees its own sequence up to itself, and each padded slot something."""
    real = owner >= 0
    length = owner.shape[1]
    came = mask[:, 0]
    together = (owner[:, :, None] == owner[:, None, :]) & real[:, None, :]
    slots = torch.arange(length)
    not_after = slots[None, :, None] >= slots[None, None, :]
    right = together & not_after
    queries = real[:, :, None].expand_as(came)

    def fits(other: Tensor) -> bool:
        return torch.equal(came[queries], other.expand_as(came)[queries])

    if not fits(right):
        keys = real[:, None, :]
        known = {
            "mask the wrong way round": ("True and False are exchanged", ~right),
            "looks into other sequences": ("a token sees the sequences before its own", not_after & keys),
            "looks ahead": ("a token sees those after it in its sequence", together),
            "does not see itself": ("the diagonal is missing", together & (slots[:, None] > slots)),
            "the wrong triangle": (
                "a token sees those after it instead of those before it",
                together & (slots[:, None] <= slots),
            ),
            "one or the other": ("a pair is allowed if one of the two rules allows it", together | not_after),
        }
        row, query, key = ((came != right) & queries).nonzero()[0].tolist()
        shown = f"In row {row}, slot {query} {'sees' if came[row, query, key] else 'does not see'} slot {key}."
        found = {name: text for name, (text, other) in known.items() if fits(other)}
        if len(found) == 1:
            name, text = found.popitem()
            raise Named(name, f"{at}: in the mask {text}. {shown}")
        raise Wrong(f"{at}: {shown}")
    if not came.any(-1).all():
        row, query = (~came.any(-1)).nonzero()[0].tolist()
        raise Named(
            "a softmax over nothing",
            f"{at}: in row {row}, the padded slot {query} may look at nothing. A softmax over nothing has no value, "
            "and its NaN would reach the weights. What comes out there does not count, so it may look at itself.",
        )


TASKS = (
    Task(
        unit="01",
        name="one_step",
        kind="rebuild",
        minutes=20,
        points=3,
        difficulty=1,
        cases=draw_rows,
        attempt=attempt_step,
        judge=judge_steps,
        look_at=(
            "what the decoder is given and what it shall say, written below each other for a row of two words.",
            "which places count in the sum, and which in the number that it is divided by.",
        ),
        hints=(
            "Write down two rows by hand, one of a single word and one of three: what goes in, what shall come out, "
            "and where is padding?",
            "Input and output are one sequence, shifted by one (teacher forcing); a causal mask hides what comes "
            "after. See 'The data', 'Masks' and 'The loss' in lesson 01 (../../notebooks/01_one_device.ipynb).",
            "Put <start> before each row for the input and <end> behind it for the output, and fill both up with "
            "padding. Make a causal mask, call the model once, add up the losses of all places whose output is "
            "not padding, divide by the number of these places, and call backward on that.",
        ),
        instead=(
            transformer.target_mask,
            transformer.causal_mask,
            pipeline.sum_over_tokens,
            number_words.collate,
            number_words._pad,
        ),
    ),
    Task(
        unit="01",
        name="pack",
        kind="transfer",
        minutes=40,
        points=5,
        difficulty=2,
        cases=draw_sequences,
        attempt=attempt_pack,
        judge=judge_packs,
        look_at=(
            "the second sequence of a row: its first position, its first row in the mask, its last target.",
            "what a padded slot holds in each of the four tensors.",
        ),
        hints=(
            "Draw one row of eight slots with sequences of one and three words in it: ids, positions, targets, and the "
            "mask as an eight by eight square. How do the two squares inside it come about?",
            "Number the sequences of a row, and note in each slot the number of its owner: two slots may see each "
            "other if their owners are the same (Krell et al., 2021, https://arxiv.org/abs/2107.02027). For the "
            "rows: here each length, in slots, divides every longer one.",
            "Sort the sequences, longest first, and fill one row after the other; none leaves a gap then. In each row, "
            "write the input, the output and 0, 1, 2 and so on into the slots of a sequence, and its number into a "
            "tensor of owners. The mask is true where query and key have the same owner and the key does not come "
            "after the query. If padding is an owner too, its slots see at least themselves.",
        ),
        instead=(transformer.target_mask, transformer.causal_mask, number_words.collate, number_words._pad),
    ),
)
