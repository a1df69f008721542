"""Exercises of unit 05: gradients of micro-batches from memory, a cut by places, and metrics that weigh by token."""

import math
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy

from course_utils.charts import describe_bars, draw_bars
from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare
from course_utils.number_words import even_sizes
from course_utils.plots import show

PAD = 0
VOCABULARY = 9

Piece = tuple[Tensor, Tensor]  # (inputs, targets) or (logits, targets)


def in_words(pieces: Sequence[Sequence[int]]) -> str:
    return " | ".join(", ".join(map(str, rows)) for rows in pieces)


# --- accumulate -------------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """Micro-batches: for each one the tokens of its rows. `left_over`: whether `.grad` is full at the beginning."""

    tokens: tuple[tuple[int, ...], ...]
    seed: int
    left_over: bool

    def __str__(self) -> str:
        before = "full" if self.left_over else "empty"
        return f"rows of {in_words(self.tokens)} tokens, M={len(self.tokens)} (seed {self.seed}, .grad {before} before)"


class Graph:
    """Stands for what a forward keeps for its backward. It is gone when the backward has freed that."""

    def __init__(self, rows: int):
        self.rows = rows


class SmallModel(torch.nn.Module):
    """Ids (rows, length) -> logits (rows, length, vocabulary); notes how many rows it keeps for backwards."""

    def __init__(self, pieces: Pieces):
        super().__init__()
        generator = torch.Generator().manual_seed(pieces.seed)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, 5, generator=generator))
        self.head = torch.nn.Parameter(2 * torch.randn(VOCABULARY, 5, generator=generator))
        left_over = [torch.randn(p.shape, generator=generator) for p in self.parameters()]
        for parameter, gradient in zip(self.parameters(), left_over, strict=True):
            parameter.grad = gradient if pieces.left_over else None
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._most = {"rows": 0, "graphs": 0, "rows in a call": 0}

    def forward(self, inputs: Tensor) -> Tensor:
        graph = Graph(len(inputs))
        self._graphs.add(graph)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (graph, tensor), lambda kept: kept[1]):
            logits = torch.tanh(self.embedding[inputs]) @ self.head.T
        now = {
            "rows": sum(g.rows for g in self._graphs),
            "graphs": len(self._graphs),
            "rows in a call": graph.rows,
        }
        self._most = {name: max(number, now[name]) for name, number in self._most.items()}
        return logits


def make_pieces(pieces: Pieces) -> list[Piece]:
    """The micro-batches, each padded to its own longest row."""
    generator = torch.Generator().manual_seed(pieces.seed + 1)
    made = []
    for rows in pieces.tokens:
        ids = torch.randint(1, VOCABULARY, (2, len(rows), max(rows)), generator=generator)
        beyond = torch.arange(max(rows)) >= torch.tensor(rows)[:, None]
        ids = ids.masked_fill(beyond, PAD)
        made.append((ids[0], ids[1]))
    return made


def draw_pieces(draw: random.Random) -> list[Pieces]:
    def rows(number: int) -> tuple[int, ...]:
        return tuple(draw.randint(1, 8) for _ in range(number))

    fixed = [((3, 1), (7, 6), (2,)), ((4, 2, 5),)]
    drawn = [tuple(rows(draw.randint(1, 3)) for _ in range(count)) for count in (2, 4, 5)]
    return [Pieces(tokens, draw.randrange(1000), number % 2 == 0) for number, tokens in enumerate([*fixed, *drawn])]


def attempt_accumulate(answer: Callable, pieces: Pieces) -> dict[str, Any]:
    model = SmallModel(pieces)
    loss = answer(model, make_pieces(pieces))
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return {"loss": plain(loss), "gradients": gradients, "most": model._most}


def plain(value: Any) -> Any:
    """A number for a tensor with one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, int | float | str | None) else type(value).__name__


class Sums(NamedTuple):
    """Of each micro-batch: the sum of its tokens' losses, its gradient, tokens, places, rows; and what was in .grad."""

    losses: list[float]
    gradients: list[list[Tensor]]
    tokens: list[int]
    places: list[int]
    rows: list[int]
    before: list[Tensor]


def sums_of(pieces: Pieces) -> Sums:
    model, made = SmallModel(pieces), make_pieces(pieces)
    before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    losses, gradients = [], []
    for inputs, targets in made:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")
        gradients.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        losses.append(loss.item())
    return Sums(
        losses,
        gradients,
        [int((targets != PAD).sum()) for _, targets in made],
        [targets.numel() for _, targets in made],
        [len(targets) for _, targets in made],
        before,
    )


def whole_batch(pieces: Pieces) -> dict[str, Any]:
    """What one device gives for all rows at once: torch's own mean over the tokens, one backward."""
    model, made = SmallModel(pieces), make_pieces(pieces)
    width = max(targets.shape[1] for _, targets in made)
    inputs, targets = (
        torch.cat([torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=PAD) for ids in side])
        for side in zip(*made, strict=True)
    )
    model.zero_grad()
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PAD)
    loss.backward()
    return {"loss": loss.item(), "gradients": [p.grad for p in model.parameters()]}


def weighted(weights: Callable[[Sums], list[float]], before: float = 0.0) -> Callable[[Pieces], list[Tensor]]:
    """The gradients of a loop that gives each micro-batch's sum a weight."""

    def gradients(pieces: Pieces) -> list[Tensor]:
        sums = sums_of(pieces)
        terms = [[w * g for g in own] for w, own in zip(weights(sums), sums.gradients, strict=True)]
        terms.append([before * g for g in sums.before])
        return [torch.stack(parts).sum(dim=0) for parts in zip(*terms, strict=True)]

    return gradients


def right_weights(s: Sums) -> list[float]:
    return [1 / sum(s.tokens)] * len(s.tokens)


ACCUMULATING = (
    Mistake(
        "mean of means",
        "This is the mean of the micro-batches' means: a token with few neighbours weighs more than others.",
        weighted(lambda s: [1 / (n * len(s.tokens)) for n in s.tokens]),
    ),
    Mistake(
        "sum of means",
        "Each micro-batch is divided by its own tokens: the gradients are sums of means.",
        weighted(lambda s: [1 / n for n in s.tokens]),
    ),
    Mistake(
        "mean weighted by rows",
        "The micro-batches' means are weighted by their rows, but rows hold different numbers of tokens.",
        weighted(lambda s: [r / (n * sum(s.rows)) for n, r in zip(s.tokens, s.rows, strict=True)]),
    ),
    Mistake(
        "only the last micro-batch",
        "Only the last micro-batch is in the gradients: something is cleared inside the loop.",
        weighted(lambda s: [0.0] * (len(s.tokens) - 1) + right_weights(s)[:1]),
    ),
    Mistake(
        "only the first micro-batch",
        "Only the first micro-batch is in the gradients.",
        weighted(lambda s: right_weights(s)[:1] + [0.0] * (len(s.tokens) - 1)),
    ),
    Mistake(
        "pad counted as token",
        "The sums are divided by the number of places, padding included. Padding has no loss and is no token.",
        weighted(lambda s: [1 / sum(s.places)] * len(s.tokens)),
    ),
    Mistake(
        "gradients of the step before",
        "What was in .grad before is still in it. It belongs to the step before.",
        weighted(right_weights, before=1.0),
    ),
    Mistake(
        "never divided",
        "The gradients are those of the plain sum: each is as many times too large as there are tokens.",
        weighted(lambda s: [1.0] * len(s.tokens)),
    ),
    Mistake(
        "divided by M once more",
        "The gradients are M times too small. The shares add up to the loss already.",
        weighted(lambda s: [1 / (sum(s.tokens) * len(s.tokens))] * len(s.tokens)),
    ),
    Mistake(
        "scaled after every micro-batch",
        "The gradients were divided by M again after every micro-batch, so the first ones count least.",
        weighted(lambda s: [len(s.tokens) ** (m - len(s.tokens)) / s.tokens[m] for m in range(len(s.tokens))]),
    ),
)


def judge_accumulate(cases: Sequence[Pieces], came: Sequence[Any]) -> str:
    compare(
        cases,
        [value["gradients"] for value in came],
        lambda pieces: whole_batch(pieces)["gradients"],
        ACCUMULATING,
        tolerance=1e-5,
        what="the gradients (0: embedding, 1: head):",
    )
    compare(
        cases,
        [value["loss"] for value in came],
        lambda pieces: whole_batch(pieces)["loss"],
        LOSSES,
        tolerance=1e-5,
        what="the gradients are right; the loss:",
    )
    for pieces, value in zip(cases, came, strict=True):
        judge_kept(pieces, value["most"])
    return (
        f"{len(cases)} mini-batches of up to {max(len(p.tokens) for p in cases)} ragged micro-batches: gradients and "
        "losses of the whole batch, and never more than one micro-batch kept for its backward."
    )


LOSSES = (
    Mistake(
        "mean of means in the report",
        "The loss that is returned is the mean of the micro-batches' means.",
        lambda pieces: mean([a / n for a, n in zip(*sums_of(pieces)[:3:2], strict=True)]),
    ),
    Mistake(
        "the loss of the last micro-batch",
        "What is returned is the last micro-batch's share alone.",
        lambda pieces: sums_of(pieces).losses[-1] / sum(sums_of(pieces).tokens),
    ),
    Mistake(
        "the loss is a sum",
        "What is returned is the sum over the tokens, not divided by their number.",
        lambda pieces: sum(sums_of(pieces).losses),
    ),
)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def judge_kept(pieces: Pieces, most: dict[str, int]) -> None:
    rows = [len(tokens) for tokens in pieces.tokens]
    if most["rows"] <= max(rows):
        return
    shown = f"With {pieces}: {most['rows']} rows were kept for a backward at a time; the largest micro-batch has "
    if most["rows in a call"] == sum(rows):
        raise Named("one large batch", f"{shown}{max(rows)}. The model was called with all {sum(rows)} rows at once.")
    if most["graphs"] == len(rows):
        raise Named(
            "graphs of all micro-batches at a time",
            f"{shown}{max(rows)}. The graphs of all {len(rows)} micro-batches were alive together.",
        )
    raise Wrong(f"{shown}{max(rows)}.")


def none_cleared(kind: str, message: str) -> Named | None:
    if kind == "AttributeError" and message == "'NoneType' object has no attribute 'zero_'":
        return Named(
            "clears a gradient that is None", "A gradient was cleared that was None: .grad may be empty before."
        )
    return None


# --- split_rows -------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of these lengths, to be cut into M micro-batches. `best`: the places of the largest one, 0 if not known."""

    lengths: tuple[int, ...]
    M: int
    best: int = 0

    def __str__(self) -> str:
        return f"rows of {', '.join(map(str, self.lengths))} tokens, M={self.M}"


CAPPED = Rows((1, 1, 1, 1, 1, 9, 9), 4)  # where the limit on the number of rows decides


def draw_rows(draw: random.Random) -> list[Rows]:
    fixed = [
        Rows((5, 1, 1, 4, 3, 2, 6), 5),
        Rows((2, 9, 9, 1), 2),
        Rows((3, 4), 1),
        Rows((6, 1, 2), 3),
        Rows((1, 1, 1, 1, 9), 4),
        CAPPED,
    ]
    drawn = []
    for rows, M in ((9, 4), (10, 3), (11, 4), (12, 5), (13, 6), (11, 5), (12, 4), (10, 7)):
        drawn.append(Rows(tuple(draw.randint(1, 12) for _ in range(rows)), M))
    return [*fixed, *drawn, planted(draw)]


def planted(draw: random.Random) -> Rows:
    """44 rows for 12 micro-batches, far too many cuts to try.

    They come from 12 micro-batches of 12 tokens without padding. No other cut has a smaller largest micro-batch: 12 is
    the mean of the tokens, and nothing has fewer places than tokens.
    """
    sizes = [4] * 9 + [3] * 2 + [2]
    draw.shuffle(sizes)
    return Rows(tuple(12 // size for size in sizes for _ in range(size)), len(sizes), 12)


def largest(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    """The places of the largest micro-batch: rows times the longest row."""
    start, most = 0, 0
    for size in sizes:
        most, start = max(most, size * max(lengths[start : start + size])), start + size
    return most


def smallest_largest(rows: Rows) -> int:
    """By trying all cuts, unless it is known."""
    if rows.best:
        return rows.best
    n, M = len(rows.lengths), rows.M
    cuts = ([b - a for a, b in pairwise((0, *inner, n))] for inner in combinations(range(1, n), M - 1))
    return min(largest(rows.lengths, sizes) for sizes in cuts if max(sizes) <= math.ceil(n / M))


def attempt_rows(answer: Callable, rows: Rows) -> Any:
    came = answer(list(rows.lengths), rows.M)
    if isinstance(came, Tensor):
        came = came.tolist()
    if not isinstance(came, list | tuple) or not all(type(size) is int for size in came):
        return repr(came)[:100]
    return list(came)


def judge_rows(cases: Sequence[Rows], came: Sequence[Any]) -> str:
    known = {
        "torch.chunk": ("torch.chunk", lambda n, M: [len(piece) for piece in torch.arange(n).chunk(M)]),
        "the ragged rest dropped": ("rows divided by M, rounded down", lambda n, M: [n // M] * M),
        "even rows": ("an even cut, whatever is in the rows", even_sizes),
    }
    for rows, value in zip(cases, came, strict=True):
        try:
            judge_cut(rows, value)
        except Wrong as wrong:
            for name, (says, sizes) in known.items():
                if all(v == sizes(len(r.lengths), r.M) for r, v in zip(cases, came, strict=True)):
                    raise Named(name, f"These are the sizes of {says}. {wrong}") from None
            raise
    return (
        f"{len(cases)} mini-batches of up to {max(len(r.lengths) for r in cases)} rows: M micro-batches each, none "
        "empty, and no cut has a smaller largest one."
    )


def judge_cut(rows: Rows, sizes: Any) -> None:
    n, cap = len(rows.lengths), math.ceil(len(rows.lengths) / rows.M)
    at = f"With {rows}"
    if not isinstance(sizes, list):
        forgotten = " Is a `return` missing?" if sizes == "None" else ""
        raise Wrong(f"{at}: expected a list of {rows.M} sizes, whole numbers, came {sizes}.{forgotten}")
    if len(sizes) != rows.M:
        raise Wrong(f"{at}: expected {rows.M} sizes, came {len(sizes)}, {sizes}.")
    if min(sizes) < 1:
        raise Named("an empty micro-batch", f"{at}: micro-batch {sizes.index(min(sizes))} has no row, {sizes}.")
    if sum(sizes) != n:
        raise Wrong(f"{at}: the sizes {sizes} add up to {sum(sizes)}, there are {n} rows.")
    if max(sizes) > cap:
        raise Named(
            "more rows than allowed",
            f"{at}: micro-batch {sizes.index(max(sizes))} has {max(sizes)} rows, {cap} are allowed, {sizes}.",
        )
    most, best = largest(rows.lengths, sizes), smallest_largest(rows)
    if most > best:
        raise Wrong(f"{at}: the largest micro-batch has {most} places with {sizes}; {best} are possible.")


def show_cut(lengths: Sequence[int], came: Any) -> None:
    """The picture of a cut, the places of each micro-batch; a sentence instead if these sizes do not cut the rows."""
    n = len(lengths)
    sizes = attempt_rows(lambda *rows: came, Rows(tuple(lengths), 1))
    if not isinstance(sizes, list) or min(sizes, default=0) < 1 or sum(sizes) != n:
        print(f"No picture: a list of sizes from 1 up that add up to {n} was expected, came {sizes}.")
        return
    places = {}
    for m, piece in enumerate(torch.tensor(lengths).split(sizes)):
        places[f"micro-batch {m}, rows of {piece.tolist()}"] = len(piece) * piece.max().item()
    title = f"{n} rows in {len(sizes)}"
    show(draw_bars(places, "places", title), says=describe_bars(places, "places", title))


# --- token_metrics ----------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What the last stage hands over: for each micro-batch the tokens of its rows, out of `width` places."""

    tokens: tuple[tuple[int, ...], ...]
    seed: int
    dtype: str

    def __str__(self) -> str:
        return f"rows of {in_words(self.tokens)} tokens, M={len(self.tokens)}, {self.dtype} logits (seed {self.seed})"


def make_results(results: Results, alive: list[StorageWeakRef] | None = None) -> Iterator[Piece]:
    """(logits, targets) of one micro-batch after the other; in padding the model mostly predicts padding."""
    generator = torch.Generator().manual_seed(results.seed)
    for rows in results.tokens:
        width = max(1, *rows) + 1  # so that there is padding in every row
        targets = torch.randint(1, VOCABULARY, (len(rows), width), generator=generator)
        targets = targets.masked_fill(torch.arange(width) >= torch.tensor(rows)[:, None], PAD)
        noise = torch.randn((len(rows), width, VOCABULARY), generator=generator)
        sure = 4 * torch.rand((len(rows), 1, 1), generator=generator)
        logits = noise + sure * torch.nn.functional.one_hot(targets, VOCABULARY)
        logits += 0.25 * torch.nn.functional.one_hot(logits.argmax(dim=-1), VOCABULARY)  # no ties, in bfloat16 either
        logits = logits.to(getattr(torch, results.dtype))
        if alive is not None:
            alive.append(StorageWeakRef(logits.untyped_storage()))
        yield logits, targets
        del logits  # only the answer keeps it now


def draw_results(draw: random.Random) -> list[Results]:
    def rows(number: int) -> tuple[int, ...]:
        return tuple(draw.randint(1, 9) for _ in range(number))

    fixed = [((9, 8), (1,), (7, 9)), ((5, 3),), ((6, 2), (0, 0), (4,))]
    drawn = [tuple(rows(draw.randint(1, 4)) for _ in range(count)) for count in (2, 5)]
    long = tuple(tuple(draw.randint(150, 300) for _ in range(2)) for _ in range(3))
    kinds = ["float32"] * 3 + ["bfloat16"] * 2
    made = [Results(tokens, draw.randrange(1000), kind) for tokens, kind in zip([*fixed, *drawn], kinds, strict=True)]
    return [*made, Results(long, draw.randrange(1000), "bfloat16")]


def attempt_metrics(answer: Callable, results: Results) -> dict[str, Any]:
    alive: list[StorageWeakRef] = []
    most = 0

    def one_by_one() -> Iterator[Piece]:
        nonlocal most
        for piece in make_results(results, alive):
            yield piece
            del piece
            most = max(most, sum(not storage.expired() for storage in alive))

    came = answer(one_by_one())
    values = [plain(value) for value in came] if isinstance(came, list | tuple) else plain(came)
    return {"values": values, "most": most}


def all_at_once(results: Results) -> tuple[float, float, float]:
    """Loss, perplexity and accuracy of one device: torch's mean over the tokens of all rows."""
    made = list(make_results(results))
    logits = torch.cat([logits.flatten(0, 1) for logits, _ in made]).double()
    targets = torch.cat([targets.flatten() for _, targets in made])
    loss = cross_entropy(logits, targets, ignore_index=PAD)
    right = (logits.argmax(dim=1) == targets)[targets != PAD]
    return loss.item(), loss.exp().item(), right.double().mean().item()


class Counts(NamedTuple):
    """Of each micro-batch: the sum of its tokens' losses, right tokens, tokens; the same with padding; rows."""

    losses: list[float]
    right: list[float]
    tokens: list[int]
    padded_losses: list[float]
    padded_right: list[float]
    places: list[int]
    rows: list[int]


def counts_of(results: Results) -> Counts:
    columns = []
    for logits, targets in make_results(results):
        losses = cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
        right, real = (logits.argmax(dim=-1) == targets).flatten().double(), (targets != PAD).flatten()
        columns.append(
            (
                losses[real].sum().item(),
                right[real].sum().item(),
                int(real.sum()),
                losses.sum().item(),
                right.sum().item(),
                targets.numel(),
                len(targets),
            )
        )
    return Counts(*map(list, zip(*columns, strict=True)))


def mean_of_means(sums: list[float], tokens: list[int], empty: float, counted: bool) -> float:
    """empty: what a micro-batch without tokens gives; counted: whether it counts as one in the mean."""
    means = [a / n if n else empty for a, n in zip(sums, tokens, strict=True)]
    return sum(a for a, n in zip(means, tokens, strict=True) if n or counted) / (
        len(tokens) if counted else sum(n > 0 for n in tokens)
    )


def metric_mistakes(which: str, place: int) -> list[Mistake]:
    """place: 0 for the loss, 1 for the right tokens."""

    def of(share: Callable[[list[float], Counts], float]) -> Callable[[Results], float]:
        def gives(results: Results) -> float:
            counts = counts_of(results)
            return share((counts.losses, counts.right)[place], counts)

        return gives

    def spoilt(results: Results) -> float:
        if not all(counts_of(results).tokens):
            return math.nan
        return all_at_once(results)[2 * place]

    means = f"This {which} is the mean of the micro-batches' means: a token with few neighbours weighs more."
    return [
        Mistake("mean of means", means, of(lambda a, c: mean_of_means(a, c.tokens, 0.0, True))),
        Mistake("mean of means", means, of(lambda a, c: mean_of_means(a, c.tokens, 0.0, False))),
        Mistake("mean of means", means, of(lambda a, c: mean_of_means(a, c.tokens, math.nan, True))),
        Mistake(
            "pad counted as token",
            f"This {which} divides by all places. Padding is no token.",
            of(lambda a, c: sum(a) / sum(c.places)),
        ),
        Mistake(
            "padding predicted",
            f"This {which} is the mean over all places: to predict padding counts as much as to predict a token.",
            of(lambda a, c: sum((c.padded_losses, c.padded_right)[place]) / sum(c.places)),
        ),
        Mistake(
            "only the last micro-batch",
            f"This {which} is that of the last micro-batch alone.",
            of(lambda a, c: a[-1] / c.tokens[-1]),
        ),
        Mistake(
            "no tokens, no number",
            "The micro-batch without a token makes the whole result NaN. It adds nothing, to no sum.",
            spoilt,
        ),
    ]


def judge_metrics(cases: Sequence[Results], came: Sequence[Any]) -> str:
    for results, value in zip(cases, came, strict=True):
        values = value["values"]
        if not isinstance(values, list) or len(values) != 3:
            forgotten = " Is a `return` missing?" if values is None else ""
            raise Wrong(
                f"With {results}: expected three numbers, loss, perplexity, accuracy, came {values}.{forgotten}"
            )
    columns = list(zip(*(value["values"] for value in came), strict=True))
    perplexities = (
        Mistake(
            "mean of perplexities",
            "The perplexities of the micro-batches were averaged by tokens; perplexity is no mean over tokens.",
            lambda results: average_perplexity(results, by_tokens=True),
        ),
        Mistake(
            "mean of perplexities",
            "The perplexities of the micro-batches were averaged; perplexity is no mean.",
            lambda results: average_perplexity(results, by_tokens=False),
        ),
    )
    for place, name, mistakes in (
        (0, "loss", metric_mistakes("loss", 0)),
        (2, "accuracy", metric_mistakes("accuracy", 1)),
        (1, "perplexity", perplexities),
    ):
        right = {results: all_at_once(results)[place] for results in cases}
        compare(cases, columns[place], right.__getitem__, mistakes, tolerance=1e-4, what=f"{name}:")
    for results, value in zip(cases, came, strict=True):
        if value["most"] > 1:
            raise Named(
                "logits kept",
                f"With {results}: the logits of {value['most']} micro-batches were alive at a time, only those of one "
                "may be.",
            )
    return (
        f"{len(cases)} mini-batches, one with a micro-batch without any token: the numbers of the whole batch, and "
        "the logits of one micro-batch at a time."
    )


def average_perplexity(results: Results, by_tokens: bool) -> float:
    counts = counts_of(results)
    pairs = [(math.exp(a / n), n if by_tokens else 1) for a, n in zip(counts.losses, counts.tokens, strict=True) if n]
    return sum(p * weight for p, weight in pairs) / sum(weight for _, weight in pairs)


def no_tokens(kind: str, message: str) -> Named | None:
    if kind == "ZeroDivisionError":
        return Named("divides by no tokens", "It divided by zero. A micro-batch may be all padding, without a token.")
    return None


TASKS = (
    Task(
        unit="05",
        name="accumulate",
        kind="rebuild",
        minutes=15,
        points=2,
        difficulty=1,
        cases=draw_pieces,
        attempt=attempt_accumulate,
        judge=judge_accumulate,
        look_at=(
            "what each micro-batch's loss is divided by before its backward.",
            "what is in .grad before the first backward, and what happens to it between two of them.",
        ),
        hints=(
            "Take two micro-batches, of 9 tokens and of 1. What should the loss of one token be divided by, and by "
            "what is it divided in your loop?",
            "A sum may be taken in parts, a mean may not: lesson 05 under 'A gradient is a sum' "
            "(../../notebooks/05_micro_batches.ipynb). PyTorch adds each backward's gradients to .grad.",
            "Count the tokens of all micro-batches, without padding. Clear the gradients once. For each micro-batch: "
            "forward, the sum of the tokens' losses, divided by all tokens, backward, add the share to the loss as a "
            "plain number. Return the loss.",
        ),
        on_error=none_cleared,
    ),
    Task(
        unit="05",
        name="split_rows",
        kind="transfer",
        minutes=35,
        points=4,
        difficulty=3,
        cases=draw_rows,
        attempt=attempt_rows,
        judge=judge_rows,
        look_at=(
            "the places of each micro-batch: its rows times its longest row, not its tokens.",
            "whether the rows that are left still make a full row for each micro-batch to come, and no more than fit.",
        ),
        hints=(
            "Suppose somebody told you that 12 places are enough for the largest micro-batch. How would you check "
            "that, going through the rows once?",
            "Turn the question round: not 'how small can it be' but 'does this limit do', for one limit after the "
            "other (a search in what the answer may be: https://en.wikipedia.org/wiki/Binary_search). Why M sizes must "
            "come out is in lesson 05 (../../notebooks/05_micro_batches.ipynb).",
            "List all limits that could be the answer, small ones first. For each: give every micro-batch its first "
            "row, then more rows as long as the limit, the cap and the rows that the others need allow it. If all rows "
            "are used up and no micro-batch is above the limit, these sizes are the result.",
        ),
    ),
    Task(
        unit="05",
        name="token_metrics",
        kind="transfer",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_results,
        attempt=attempt_metrics,
        judge=judge_metrics,
        look_at=(
            "which places count: in the sum, in the number of right ones, and in what both are divided by.",
            "in which precision the sums are taken, and where the divisions stand.",
        ),
        hints=(
            "Three micro-batches hold 17, 1 and 16 tokens. How much does the single token count in your result?",
            "Keep sums and counts, and divide at the very end. What a token is, and what its neighbours must not "
            "change: lesson 05 under 'A mistake made on purpose' (../../notebooks/05_micro_batches.ipynb).",
            "Start with three zeros: summed loss, right tokens, tokens. For each micro-batch: mark the places that are "
            "no padding, turn the logits to float32, and add to each of the three as plain numbers. After the last "
            "one: loss by tokens, its exponential, right tokens by tokens.",
        ),
        on_error=no_tokens,
    ),
)
