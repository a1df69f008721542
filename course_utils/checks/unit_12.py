"""Exercises of unit 12: the eight functions of `bug_hunt.SCRIPT` that are wrong.

What an answer gives is compared with one device, a formula or torch; the checks know no line of the script.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.bug_hunt import SYMPTOMS, load_script
from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare, same
from course_utils.optimization import clip_by_global_norm
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transports import PeerLost, Worker

planted = load_script()  # as it is


# --- split ------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A mini-batch of some rows, cut into M."""

    rows: int
    M: int

    def __str__(self) -> str:
        return f"{self.rows} rows, M={self.M}"


def draw_rows(draw: random.Random) -> list[Rows]:
    fixed = [Rows(8, 4), Rows(7, 5), Rows(10, 4), Rows(9, 4), Rows(5, 1), Rows(3, 3)]
    return fixed + [Rows(m + draw.randint(0, 2 * m), m) for m in (draw.randint(2, 7) for _ in range(5))]


def attempt_split(answer: Callable, case: Rows) -> Any:
    """For each micro-batch the numbers of its rows."""
    rows = torch.arange(case.rows).unsqueeze(1).repeat(1, 3)
    came = answer(rows, case.M)
    if not isinstance(came, list | tuple) or not all(isinstance(piece, Tensor) for piece in came):
        return f"{type(came).__name__}, no list of tensors" if came is not None else None
    wrong = next((piece for piece in came if piece.dim() != 2 or piece.shape[1] != 3), None)
    if wrong is not None:
        return f"a micro-batch of shape {tuple(wrong.shape)}"
    return [piece[:, 0].tolist() for piece in came]


def judge_split(cases: Sequence[Rows], came: Sequence[Any]) -> str:
    for case, pieces in zip(cases, came, strict=True):
        at = f"With {case}:"
        if pieces is None:
            raise Wrong(f"{at} nothing came. Is a `return` missing?")
        if isinstance(pieces, str):
            raise Wrong(f"{at} expected a list of tensors (rows, 3), came {pieces}.")
        if len(pieces) != case.M:
            raise Named(
                "another number of micro-batches", f"{at} {len(pieces)} micro-batches came, the stages wait for M."
            )
        rows, sizes = [row for piece in pieces for row in piece], [len(piece) for piece in pieces]
        if missing := sorted(set(range(case.rows)) - set(rows)):
            raise Named(
                "rows dropped", f"{at} row {missing[0]} is in no micro-batch; {len(missing)} of {case.rows} are lost."
            )
        if len(rows) > case.rows:
            twice = next(row for row in rows if rows.count(row) > 1)
            raise Named("rows used twice", f"{at} row {twice} is in the micro-batches {rows.count(twice)} times.")
        if rows != sorted(rows):
            raise Named("another order", f"{at} the rows come in the order {rows}: they must keep theirs.")
        if max(sizes) - min(sizes) > 1:
            raise Named("uneven sizes", f"{at} the sizes are {sizes}; the largest and the smallest may differ by 1.")
    return (
        f"{len(cases)} sizes: every row is in one micro-batch, in order. The symptom that is gone: {SYMPTOMS['split']}."
    )


# --- attend -----------------------------------------------------------------------------------------------------------


class Padded(NamedTuple):
    """Rows of some lengths, padded to a width."""

    lengths: tuple[int, ...]
    width: int
    d: int
    seed: int

    def __str__(self) -> str:
        return f"rows of {', '.join(map(str, self.lengths))} ids padded to {self.width} places, d={self.d}"


def draw_padded(draw: random.Random) -> list[Padded]:
    drawn = []
    for rows, width in ((1, 4), (3, 6), (4, 8), (2, 5)):
        lengths = tuple(draw.randint(1, width - 1) for _ in range(rows))
        drawn.append(Padded(lengths, width, draw.choice((3, 4, 8)), draw.randrange(10**6)))
    return [Padded((3, 5), 8, 4, draw.randrange(10**6)), *drawn]


def hidden_and_ids(case: Padded) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(case.seed)
    hidden = torch.randn(len(case.lengths), case.width, case.d, generator=noise)
    ids = torch.randint(1, 10, (len(case.lengths), case.width), generator=noise)
    return hidden, ids * (torch.arange(case.width) < torch.tensor(case.lengths).unsqueeze(1))


def real_places(case: Padded, mixed: Any) -> Any:
    """What came for the ids, row after row; nobody reads what stands at the padding."""
    expected = (len(case.lengths), case.width, case.d)
    if not isinstance(mixed, Tensor):
        return mixed if mixed is None else f"a {type(mixed).__name__}"
    if mixed.shape != expected:
        return f"the shape {tuple(mixed.shape)}"
    return torch.cat([row[:length] for row, length in zip(mixed, case.lengths, strict=True)])


def attempt_attend(answer: Callable, case: Padded) -> Any:
    hidden, ids = hidden_and_ids(case)
    return real_places(case, answer(hidden, ids))


def mixed_with(weights: Callable[[Tensor, int], Tensor]) -> Callable[[Padded], Any]:
    """What rows give one by one, if weights(scores between a row's places, its length) are those of the attention."""

    def gives(case: Padded) -> Any:
        hidden, _ = hidden_and_ids(case)
        scores = [row @ row.T / math.sqrt(case.d) for row in hidden]
        rows = [weights(s, n) @ row for s, n, row in zip(scores, case.lengths, hidden, strict=True)]
        return real_places(case, torch.stack(rows))

    return gives


def of_real_places(scores: Tensor, length: int) -> Tensor:
    """The attention of a row as if it had never been padded."""
    weights = torch.zeros_like(scores)
    powers = scores[:, :length].double().exp()
    weights[:, :length] = (powers / powers.sum(1, keepdim=True)).float()
    return weights


def of_padding(scores: Tensor, length: int) -> Tensor:
    weights = torch.zeros_like(scores)
    weights[:, length:] = scores[:, length:].softmax(1)
    return weights


def bonus(scores: Tensor, length: int) -> Tensor:
    return (scores + (torch.arange(len(scores)) < length)).softmax(1)


def penalty(scores: Tensor, length: int) -> Tensor:
    return (scores + (torch.arange(len(scores)) >= length)).softmax(1)


def emptied(scores: Tensor, length: int) -> Tensor:
    """The padding is 0 in queries, keys and values, and still gets its share of the weight."""
    kept = torch.arange(len(scores)) < length
    return (scores * kept).softmax(1) * kept


def causal(scores: Tensor, length: int) -> Tensor:
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(1)


ATTEND_MISTAKES = (
    Mistake(
        "mask polarity",
        "These are the values of places that mix the padding and leave the ids out.",
        mixed_with(of_padding),
    ),
    Mistake(
        "padding takes part", "These are the values of places that mix all places, the padding too.",
        mixed_with(lambda scores, length: scores.softmax(1)),
    ),
    Mistake("a mask of 0 and 1 added", "A mask of numbers is added to the scores, and 1 more is not much.",
            mixed_with(bonus)),
    Mistake("a mask of 0 and 1 added", "A mask of numbers is added to the scores, and here the padding gains by it.",
            mixed_with(penalty)),
    Mistake("padding set to zero", "A hidden state of 0 still gets its share of the weights: exp(0) is 1.",
            mixed_with(emptied)),
    Mistake("causal", "These are the values of places that mix those before them.", mixed_with(causal)),
)  # fmt: skip


def judge_attend(cases: Sequence[Padded], came: Sequence[Any]) -> str:
    compare(cases, came, mixed_with(of_real_places), ATTEND_MISTAKES, tolerance=1e-5)
    return (
        f"{len(cases)} batches: each row gives what it gives alone, without padding. "
        f"The symptom that is gone: {SYMPTOMS['attend']}."
    )


# --- run_layers -------------------------------------------------------------------------------------------------------


class Cuts(NamedTuple):
    """A model of some layers, on 1, 2 and 3 stages."""

    layers: int
    steps: tuple[int, ...]
    micro_batches: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layers} layers, steps {list(self.steps)}, micro-batches {list(self.micro_batches)}"


def draw_cuts(draw: random.Random) -> list[Cuts]:
    return [
        Cuts(4, (0, 1), (0, 1, 2)),
        Cuts(12, (0, 1, draw.randint(2, 40)), (0, 1, 11)),
        Cuts(draw.randint(3, 7), (draw.randint(0, 5), 10, 100), (0, 1, draw.randint(2, 9), 10)),
    ]


class NotedLayer:
    """A layer that draws its dropout mask, writes it down, and makes 2 h + number + 1 of the hidden state h."""

    def __init__(self, number: int, ids: Tensor, calls: list):
        self.number, self._ids, self._calls = number, ids, calls

    def __call__(self, hidden: Tensor, ids: Tensor, noise: torch.Generator) -> Tensor:
        self._calls.append((self.number, ids is self._ids, torch.rand(2, generator=noise).tolist()))
        return 2 * hidden + self.number + 1


def parts(number: int, K: int) -> list[range]:
    return [range(k * number // K, (k + 1) * number // K) for k in range(K)]


def attempt_run_layers(answer: Callable, case: Cuts) -> dict[str, Any]:
    """What each layer was called with, and what came out, by (stages, step, micro-batch)."""
    calls: dict[Any, Any] = {}
    out: dict[Any, Any] = {}
    for where in places_of(case):
        K, _, step, m = where
        ids, hidden, calls[where], out[where] = torch.ones(1, 2), torch.ones(2), [], []
        for numbers in parts(case.layers, K):
            hidden = answer([NotedLayer(number, ids, calls[where]) for number in numbers], hidden, ids, step, m)
            if not isinstance(hidden, Tensor):
                return {"calls": {}, "out": {}, "came": type(hidden).__name__}
        out[where] = hidden[0].item()
    return {"calls": calls, "out": out, "came": ""}


def places_of(case: Cuts) -> Iterator[tuple[int, int, int, int]]:
    """(stages, try, step, micro-batch); one stage is tried twice."""
    for K, again in ((1, 0), (1, 1), (2, 0), (3, 0)):
        yield from ((K, again, step, m) for step in case.steps for m in case.micro_batches)


def judge_run_layers(cases: Sequence[Cuts], came: Sequence[Any]) -> str:
    for case, value in zip(cases, came, strict=True):
        if value["came"]:
            raise Wrong(f"With {case}: expected the hidden state after the last layer, came {value['came']}.")
        judge_calls(case, value["calls"], value["out"])
    for case, value in zip(cases, came, strict=True):
        judge_masks(case, value["calls"])
    return (
        f"{len(cases)} models on 1, 2 and 3 stages: one mask per step, micro-batch and layer, the same for every cut. "
        f"The symptom that is gone: {SYMPTOMS['run_layers']}."
    )


def judge_calls(case: Cuts, calls: dict[Any, Any], out: dict[Any, Any]) -> None:
    expected = 1.0
    for number in range(case.layers):
        expected = 2 * expected + number + 1
    for where in places_of(case):
        K, _, step, m = where
        at = f"With {case}, K={K}, step {step}, micro-batch {m}:"
        numbers = [number for number, _, _ in calls[where]]
        if numbers != list(range(case.layers)):
            raise Named("layers left out", f"{at} the layers ran in the order {numbers}; all were due, in order.")
        if not all(right for _, right, _ in calls[where]):
            raise Wrong(f"{at} a layer was given other ids than those that came in.")
        if out[where] != expected:
            raise Named("not one after the other", f"{at} what came out is not what the last layer made of the others.")


def judge_masks(case: Cuts, calls: dict[Any, Any]) -> None:
    """Every mask must be the same for every cut and in every try, and no two of one model the same."""
    first = next(places_of(case))
    if any(calls[first][i] != calls[1, 1, first[2], first[3]][i] for i in range(case.layers)):
        raise Named("masks that cannot be drawn again", f"With {case}: the same call twice, and the masks differ.")
    step, m = case.steps[0], case.micro_batches[0]
    one, two = ([mask for _, _, mask in calls[K, 0, step, m]] for K in (1, 2))
    if two != one:
        cut = len(parts(case.layers, 2)[0])
        number = next(i for i in range(case.layers) if one[i] != two[i])
        says = f"With {case}: layer {number} has another dropout mask on two stages than on one."
        if two[cut] == two[0] and two[cut + 1] == two[1]:
            raise Named(
                "masks depend on the cut",
                f"{says} There its mask is that of layer {number - cut}: each stage begins to draw anew.",
            )
        raise Wrong(says)
    seen: dict[Any, tuple[int, int, int]] = {}
    for where in places_of(case):
        for number, _, mask in calls[where]:
            key = (*where[2:], number)
            other = seen.setdefault(tuple(mask), key)
            if other != key:
                told = [f"step {s}, micro-batch {m}, layer {n}" for s, m, n in (other, key)]
                raise Named("the same mask twice", f"With {case}: {told[0]} and {told[1]} have the same dropout mask.")
    for where in places_of(case):
        one = calls[1, 0, where[2], where[3]]
        if calls[where] != one:
            raise Wrong(f"With {case}: on {where[0]} stages the masks differ from those on one, at step {where[2]}.")


# --- loss_share -------------------------------------------------------------------------------------------------------


class Ragged(NamedTuple):
    """Micro-batches of rows with some numbers of tokens."""

    tokens: tuple[tuple[int, ...], ...]  # per micro-batch, per row
    width: int
    classes: int
    seed: int

    def __str__(self) -> str:
        inside = " | ".join(", ".join(map(str, rows)) for rows in self.tokens)
        return f"micro-batches with rows of {inside} tokens, padded to {self.width}"


def draw_ragged(draw: random.Random) -> list[Ragged]:
    drawn = []
    for sizes in ((1, 1), (3, 2, 2), (2, 1), (4, 3, 3)):
        width = draw.randint(4, 6)
        tokens = [tuple(draw.randint(1, width - 1) for _ in range(rows)) for rows in sizes]
        drawn.append(Ragged((*tokens[:-1], (*tokens[-1][:-1], 1)), width, draw.randint(3, 5), draw.randrange(10**6)))
    return [Ragged(((7, 6), (2,)), 8, 3, draw.randrange(10**6)), *drawn]


def logits_and_targets(case: Ragged) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(case.seed)
    lengths = torch.tensor([n for rows in case.tokens for n in rows]).unsqueeze(1)
    logits = torch.randn(len(lengths), case.width, case.classes, generator=noise)
    targets = torch.randint(1, case.classes, (len(lengths), case.width), generator=noise)
    return logits, targets * (torch.arange(case.width) < lengths)


def attempt_loss_share(answer: Callable, case: Ragged) -> Any:
    logits, targets = logits_and_targets(case)
    logits.requires_grad_()
    sizes = [len(rows) for rows in case.tokens]
    shares = [answer(a, b, targets) for a, b in zip(logits.split(sizes), targets.split(sizes), strict=True)]
    if any(not isinstance(share, Tensor) or share.dim() or not share.requires_grad for share in shares):
        bad = next(s for s in shares if not isinstance(s, Tensor) or s.dim() or not s.requires_grad)
        return bad if bad is None else f"{type(bad).__name__} without a graph, or not a single number"
    torch.stack(shares).sum().backward()
    return {"shares": [share.item() for share in shares], "gradient": logits.grad}


def expected_shares(case: Ragged) -> dict[str, Any]:
    """By hand: minus the logarithm of each token's probability, over the number of tokens of the mini-batch."""
    logits, targets = logits_and_targets(case)
    probabilities = logits.double().exp() / logits.double().exp().sum(2, keepdim=True)
    number = sum(sum(rows) for rows in case.tokens)
    gradient, losses = torch.zeros_like(probabilities), []
    for row, length in enumerate(n for rows in case.tokens for n in rows):
        losses.append(sum(-math.log(probabilities[row, i, targets[row, i]]) for i in range(length)) / number)
        for i in range(length):
            gradient[row, i] = probabilities[row, i] / number
            gradient[row, i, targets[row, i]] -= 1 / number
    firsts = [sum(len(rows) for rows in case.tokens[:m]) for m in range(len(case.tokens) + 1)]
    shares = [sum(losses[a:b]) for a, b in zip(firsts, firsts[1:], strict=False)]
    return {"shares": shares, "gradient": gradient.float()}


def loss_mistake(name: str, says: str, of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Mistake:
    """of: (losses of all places, targets, all targets) -> the share."""

    def with_mistake(logits: Tensor, targets: Tensor, all_targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return of(losses, targets, all_targets)

    return Mistake(name, says, lambda case: attempt_loss_share(with_mistake, case))


LOSS_MISTAKES = (
    loss_mistake(
        "weighted by rows",
        "A micro-batch with few tokens counts like one with many: its mean was weighted by its rows.",
        lambda losses, own, whole: losses[own.flatten() != 0].mean() * len(own) / len(whole),
    ),
    loss_mistake(
        "divided by its own tokens",
        "The means of the micro-batches are added up: the sum grows with their number.",
        lambda losses, own, whole: losses[own.flatten() != 0].mean(),
    ),
    loss_mistake(
        "padding counted as tokens",
        "The sum was divided by the number of all places, and padding is no token.",
        lambda losses, own, whole: losses[own.flatten() != 0].sum() / whole.numel(),
    ),
    loss_mistake(
        "padding in the loss",
        "The losses at the padding are in the sum.",
        lambda losses, own, whole: losses.sum() / (whole != 0).sum(),
    ),
    loss_mistake(
        "padding in the loss",
        "The losses at the padding are in the sum, and in the number.",
        lambda losses, own, whole: losses.sum() / whole.numel(),
    ),
    loss_mistake(
        "not divided",
        "These are sums: divided by nothing.",
        lambda losses, own, whole: losses[own.flatten() != 0].sum(),
    ),
    loss_mistake(
        "divided by rows",
        "The sum was divided by the number of rows, and the loss is a mean over tokens.",
        lambda losses, own, whole: losses[own.flatten() != 0].sum() / len(whole),
    ),
)


def judge_loss_share(cases: Sequence[Ragged], came: Sequence[Any]) -> str:
    for case, value in zip(cases, came, strict=True):
        if not isinstance(value, dict):
            came_instead = "nothing came. Is a `return` missing?" if value is None else f"came {value}."
            raise Wrong(f"With {case}: expected a tensor with one number and a graph, {came_instead}")
    compare(cases, came, expected_shares, LOSS_MISTAKES, tolerance=1e-5)
    return (
        f"{len(cases)} mini-batches: shares and gradients are those of one mean over all tokens. "
        f"The symptom that is gone: {SYMPTOMS['loss_share']}."
    )


# --- backward ---------------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """K stages, micro-batches of some sizes."""

    K: int
    sizes: tuple[int, ...]
    d: int
    seed: int

    def __str__(self) -> str:
        return f"K={self.K}, micro-batches of {', '.join(map(str, self.sizes))} rows, d={self.d}"


def draw_chains(draw: random.Random) -> list[Chain]:
    fixed = [(1, (3,)), (2, (2, 2)), (2, (3, 3, 2)), (3, (2, 1, 1, 1))]
    drawn = (draw.randint(2, 3), tuple(draw.randint(1, 3) for _ in range(draw.randint(2, 5))))
    return [Chain(K, sizes, draw.randint(2, 4), draw.randrange(10**6)) for K, sizes in [*fixed, drawn]]


def chain(case: Chain) -> tuple[list[nn.Module], list[Tensor]]:
    """Stages, and the input of each micro-batch."""
    noise = torch.Generator().manual_seed(case.seed)
    stages: list[nn.Module] = [nn.Sequential(nn.Linear(case.d, case.d), nn.Tanh()) for _ in range(case.K)]
    for stage in stages:
        for parameter in stage.parameters():
            nn.init.normal_(parameter, generator=noise)
    return stages, [torch.randn(rows, case.d, generator=noise) for rows in case.sizes]


def scaled_loss(hidden: Tensor) -> Tensor:
    return 4 * (hidden - 1).square().sum()


def attempt_backward(answer: Callable, case: Chain) -> Any:
    """The gradients of all stages' parameters after a GPipe step, or a sentence."""
    stages, micro_batches = chain(case)
    kept: list[list[tuple[Tensor | None, Tensor]]] = []
    for hidden in micro_batches:
        kept.append([])
        for k, stage in enumerate(stages):
            leaf = hidden.detach().requires_grad_() if k > 0 else None
            hidden = stage(hidden if leaf is None else leaf)
            kept[-1].append((leaf, scaled_loss(hidden) if k == case.K - 1 else hidden))
    for m, row in enumerate(kept):
        gradient = None
        for k in reversed(range(case.K)):
            leaf, out = row[k]
            gradient = answer(list(stages[k].parameters()), leaf, out, gradient)
            if k > 0 and (not isinstance(gradient, Tensor) or gradient.shape != kept[m][k - 1][1].shape):
                came = f"a tensor {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else repr(gradient)[:60]
                return f"stage {k}, micro-batch {m}: stage {k - 1} waits for a gradient, came {came}"
    return [[p.grad if p.grad is None else p.grad.clone() for p in stage.parameters()] for stage in stages]


def on_one_device(case: Chain) -> list[list[Tensor]]:
    """The same gradients without stages and micro-batches."""
    stages, micro_batches = chain(case)
    parameters = [list(stage.parameters()) for stage in stages]
    loss = scaled_loss(nn.Sequential(*stages)(torch.cat(micro_batches)))
    found = iter(torch.autograd.grad(loss, [p for own in parameters for p in own]))
    return [[next(found) for _ in own] for own in parameters]


def with_backward(change: Callable[[Tensor | None, Tensor], Tensor], send: float = 1.0) -> Callable[[Chain], Any]:
    """change: (gradient before, of this micro-batch) -> after; send: what the leaf's gradient is multiplied by."""

    def answer(parameters: list[Tensor], leaf: Tensor | None, out: Tensor, gradient: Tensor | None) -> Tensor | None:
        wanted = parameters if leaf is None else [*parameters, leaf]
        found = torch.autograd.grad(out, wanted, gradient)
        for parameter, new in zip(parameters, found, strict=False):
            parameter.grad = change(parameter.grad, new)
        return None if leaf is None else send * found[-1]

    return lambda case: attempt_backward(answer, case)


def add(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else before + new


BACKWARD_MISTAKES = (
    Mistake(
        "only the last micro-batch",
        "These are the gradients of the last micro-batch: those of the others were lost.",
        with_backward(lambda before, new: new),
    ),
    Mistake(
        "only the first micro-batch",
        "These are the gradients of the first micro-batch.",
        with_backward(lambda before, new: new if before is None else before),
    ),
    Mistake(
        "added twice",
        "Each gradient is in the sum twice.",
        with_backward(lambda before, new: add(before, 2 * new)),
    ),
    Mistake(
        "halved each time",
        "The gradients were averaged with what was there before, so early micro-batches count less and less.",
        with_backward(lambda before, new: new if before is None else (before + new) / 2),
    ),
    Mistake(
        "scaled by every stage",
        "The last stage is right, and each stage before it has 4 times more: the loss scale is in the loss already.",
        with_backward(add, 4.0),
    ),
)


def judge_backward(cases: Sequence[Chain], came: Sequence[Any]) -> str:
    for case, value in zip(cases, came, strict=True):
        if isinstance(value, str):
            raise Named("no gradient handed on", f"With {case}, {value}.")
        for k, own in enumerate(value):
            if any(gradient is None for gradient in own):
                raise Wrong(f"With {case}: a parameter of stage {k} has no gradient.")
    compare(cases, came, on_one_device, BACKWARD_MISTAKES, tolerance=1e-5, what="gradients, [stage][parameter]")
    return (
        f"{len(cases)} steps on up to 3 stages: the gradients are those of one device and the whole mini-batch. "
        f"The symptom that is gone: {SYMPTOMS['backward']}."
    )


# --- clip -------------------------------------------------------------------------------------------------------------


class Norms(NamedTuple):
    """Gradients of some norms on each rank, max_norm 1."""

    norms: tuple[tuple[float, ...], ...]  # per rank, per parameter
    max_norm: float
    seed: int

    def __str__(self) -> str:
        inside = " | ".join(", ".join(f"{norm:g}" for norm in own) for own in self.norms)
        return f"gradients of norm {inside} on {len(self.norms)} ranks, max_norm={self.max_norm:g}"


def draw_norms(draw: random.Random) -> list[Norms]:
    fixed = [
        (((3.0,), (4.0,)), 2.5),
        (((0.3, 0.1), (0.2,)), 2.0),
        (((2e-7, 1e-7), (3e-7,), (1e-7, 2e-7)), 1.0),  # less than the 1e-6 that torch adds to a norm
        (((0.8,), (0.7,)), 1.0),
        (((2.0, 3.0),), 0.5),
        (((0.5,), (math.inf,)), 1.0),
    ]
    drawn = tuple(tuple(round(draw.uniform(0.1, 3), 1) for _ in range(draw.randint(1, 3))) for _ in range(3))
    return [Norms(norms, max_norm, draw.randrange(10**6)) for norms, max_norm in [*fixed, (drawn, 0.7)]]


def parameters_of(case: Norms) -> list[list[Tensor]]:
    noise = torch.Generator().manual_seed(case.seed)
    found = []
    for own in case.norms:
        found.append([torch.zeros(4, requires_grad=True) for _ in own])
        for parameter, norm in zip(found[-1], own, strict=True):
            direction = torch.randn(4, generator=noise)
            parameter.grad = direction * (norm / direction.norm())
    return found


def attempt_clip(answer: Callable, case: Norms) -> dict[str, Any]:
    """Norms by rank, and the gradients afterwards; those of a step that will be skipped do not count."""
    parameters = parameters_of(case)
    norms: list[float | None] = [math.nan for _ in case.norms]

    def one_rank(worker: Worker) -> None:
        own = parameters[worker.rank]
        came = answer(own, case.max_norm, lambda number: planted.tell_all(worker, number))
        norms[worker.rank] = came if came is None else float(came)

    try:
        run_in_threads(one_rank, len(case.norms), limit=5)
    except (Deadlock, PeerLost) as error:
        return {"stuck": str(error)}
    if math.inf in sum(case.norms, ()):
        return {"norms are finite": [norm is not None and math.isfinite(norm) for norm in norms]}
    return {"norm": norms, "gradient": [[parameter.grad for parameter in own] for own in parameters]}


def clipped_at_once(case: Norms) -> dict[str, Any]:
    """By torch, as if all parameters were on one device."""
    parameters = parameters_of(case)
    if math.inf in sum(case.norms, ()):
        return {"norms are finite": [False for _ in parameters]}
    norm = nn.utils.clip_grad_norm_([p for own in parameters for p in own], case.max_norm).item()
    return {"norm": [norm for _ in parameters], "gradient": [[p.grad for p in own] for own in parameters]}


def with_clip(norm: Callable, scale: Callable) -> Callable[[Norms], Any]:
    """norm: (own norm, those of all) -> what is returned; scale: (that, max_norm, own norm) -> factor."""

    def answer(parameters: list[Tensor], max_norm: float, tell: Callable) -> float:
        own = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
        came = norm(own, tell(own))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= scale(came, max_norm, own)
        return came

    return lambda case: attempt_clip(answer, case)


def together(own: float, all_norms: list[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in all_norms))


def shorten(norm: float, max_norm: float, own: float) -> float:
    return min(1.0, max_norm / (norm + 1e-6))


CLIP_MISTAKES = (
    Mistake(
        "clipped by the stage's own norm",
        "The norm that came is right on every rank. But each rank has shortened its gradients by its own norm, so the "
        "step has another direction than on one device.",
        with_clip(together, lambda norm, max_norm, own: shorten(own, max_norm, own)),
    ),
    Mistake(
        "the stage's own norm",
        "Each rank has told its own norm, and clipped by it.",
        with_clip(lambda own, all_norms: own, shorten),
    ),
    Mistake(
        "norms added up",
        "The norm that came is the sum of the norms. The norm of all is not: 3 and 4 make 5.",
        with_clip(lambda own, all_norms: sum(all_norms), shorten),
    ),
    Mistake(
        "the largest norm",
        "The norm that came is the largest of the ranks' norms.",
        with_clip(lambda own, all_norms: max(all_norms, key=lambda norm: (not math.isfinite(norm), norm)), shorten),
    ),
    Mistake(
        "no root",
        "The norm that came is a sum of squares.",
        with_clip(lambda own, all_norms: sum(norm**2 for norm in all_norms), shorten),
    ),
    Mistake(
        "the mean of the norms",
        "The norm that came is a mean over the ranks.",
        with_clip(lambda own, all_norms: sum(all_norms) / len(all_norms), shorten),
    ),
    Mistake(
        "gradients made longer",
        "Gradients that were short enough were made longer.",
        with_clip(together, lambda norm, max_norm, own: max_norm / (norm + 1e-6)),
    ),
    Mistake(
        "gradients made longer",
        "Gradients that were short enough were made longer.",
        with_clip(together, lambda norm, max_norm, own: max_norm / norm),
    ),
    Mistake(
        "nothing clipped",
        "The norm is right, and no gradient was shortened.",
        with_clip(together, lambda norm, max_norm, own: 1.0),
    ),
)


def judge_clip(cases: Sequence[Norms], came: Sequence[Any]) -> str:
    for case, value in zip(cases, came, strict=True):
        if "stuck" in value:
            raise Named("not every rank tells", f"With {case}: the ranks got stuck. {value['stuck']}.")
        if None in value.get("norm", ()):
            raise Wrong(f"With {case}: no norm came. Is a `return` missing?")
    compare(cases, came, clipped_at_once, CLIP_MISTAKES, tolerance=2e-6)
    return (
        f"{len(cases)} sets of gradients on up to 3 ranks: shortened together, and every rank knows an overflow. "
        f"The symptom that is gone: {SYMPTOMS['clip']}."
    )


# --- after_step -------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Steps that are skipped or not, from a state on."""

    skipped: str  # "s" and "."
    growth: int
    start: tuple[int, int, int, int]  # step, updates, scale, good

    def __str__(self) -> str:
        state = ", ".join(f"{name} {number}" for name, number in zip(COUNTED, self.start, strict=True))
        return f"{state}, growth {self.growth}, then the steps {self.skipped} (s is a skipped one)"


def draw_steps(draw: random.Random) -> list[Steps]:
    fixed = [
        Steps("sss....", 100, (0, 0, 2**24, 0)),
        Steps("........", 3, (0, 0, 1024, 0)),
        Steps("..s...s.....", 3, (5, 4, 4096, 1)),
        Steps("s.s.", 1, (2, 1, 64, 0)),
    ]
    for _ in range(4):
        growth = draw.randint(2, 4)
        start = (draw.randint(10, 90), draw.randint(0, 9), 2 ** draw.randint(5, 20), draw.randrange(growth))
        fixed.append(Steps("".join(draw.choice("...s") for _ in range(draw.randint(6, 14))), growth, start))
    return fixed


COUNTED = ("step", "updates", "scale", "good")


def attempt_after_step(answer: Callable, case: Steps) -> list[dict[str, float]]:
    """The state after every step."""
    step, updates, scale, good = case.start
    state = {"step": step, "updates": updates, "scale": float(scale), "good": good}
    seen = []
    for skipped in case.skipped:
        answer(state, skipped == "s", case.growth)
        seen.append({name: float(state[name]) for name in COUNTED})
    return seen


def counted(case: Steps) -> list[dict[str, float]]:
    """What must have been counted, from how long the runs of good steps are."""
    step, updates, scale, good = case.start
    seen = []
    for n in range(1, len(case.skipped) + 1):
        runs = [len(run) for run in ("." * good + case.skipped[:n]).split("s")]
        powers = sum(run // case.growth for run in runs) - (len(runs) - 1)
        numbers = (step + n, updates + case.skipped[:n].count("."), scale * 2.0**powers, runs[-1] % case.growth)
        seen.append(dict(zip(COUNTED, map(float, numbers), strict=True)))
    return seen


def counting(
    case: Steps, change: Callable[[dict[str, Any], dict[str, Any], bool, int], None]
) -> list[dict[str, float]]:
    """What is counted if change(state, state before the step, skipped, growth) follows each step."""

    def answer(state: dict[str, Any], skipped: bool, growth: int) -> None:
        before = dict(state)
        state["step"] += 1
        state["updates"] += not skipped
        state["good"] = 0 if skipped else state["good"] + 1
        if skipped:
            state["scale"] /= 2
        elif state["good"] == growth:
            state["scale"], state["good"] = 2 * state["scale"], 0
        change(state, before, skipped, growth)

    return attempt_after_step(answer, case)


def counts_all(state: dict[str, Any], before: dict[str, Any], skipped: bool, growth: int) -> None:
    state["updates"] = before["updates"] + 1


def same_batch_again(state: dict[str, Any], before: dict[str, Any], skipped: bool, growth: int) -> None:
    state["step"] = before["step"] + (not skipped)


def good_forgets(state: dict[str, Any], before: dict[str, Any], skipped: bool, growth: int) -> None:
    """A skipped step does not interrupt the good ones."""
    if skipped:
        state["good"] = before["good"]


def never_grows(state: dict[str, Any], before: dict[str, Any], skipped: bool, growth: int) -> None:
    state["scale"] = before["scale"] / 2 if skipped else before["scale"]


def never_falls(state: dict[str, Any], before: dict[str, Any], skipped: bool, growth: int) -> None:
    if skipped:
        state["scale"] = before["scale"]


AFTER_STEP_MISTAKES = (
    Mistake(
        "the schedule moves on a skipped step",
        "A skipped step was counted as an update, so the learning rate moves on although no weight has changed.",
        lambda case: counting(case, counts_all),
    ),
    Mistake(
        "the data stands still",
        "A skipped step was not counted as a step: its mini-batch would come again.",
        lambda case: counting(case, same_batch_again),
    ),
    Mistake(
        "good steps not in a row",
        "The good steps before a skipped one still count.",
        lambda case: counting(case, good_forgets),
    ),
    Mistake("the scale never grows", "The scale never doubles.", lambda case: counting(case, never_grows)),
    Mistake("the scale never falls", "The scale is not halved.", lambda case: counting(case, never_falls)),
)


def judge_after_step(cases: Sequence[Steps], came: Sequence[Any]) -> str:
    start = [dict(zip(COUNTED, map(float, case.start), strict=True)) for case in cases]
    if all(same(one, value[-1]) for one, value in zip(start, came, strict=True)):
        raise Named("nothing changed in place", "The state is as it was before: it must be changed in place.")
    compare(cases, came, counted, AFTER_STEP_MISTAKES, what="after step")
    return (
        f"{len(cases)} series of steps, {cases[0].skipped} among them: updates counts those that changed weights. "
        f"The symptom that is gone: {SYMPTOMS['after_step']}."
    )


# --- restore ----------------------------------------------------------------------------------------------------------


class Resume(NamedTuple):
    """A run that was saved after some steps, and goes on for some more."""

    before: int
    after: int
    d: int
    seed: int

    def __str__(self) -> str:
        return f"saved after {self.before} steps, then {self.after} more, {self.d} weights"


def draw_resumes(draw: random.Random) -> list[Resume]:
    torch.optim.Adam([torch.zeros(1)])  # the first one imports half of torch, for seconds that are not the answer's
    fixed = [(3, 3), (1, 2), (draw.randint(4, 7), draw.randint(2, 4)), (draw.randint(8, 12), 3)]
    return [Resume(before, after, draw.randint(2, 6), draw.randrange(10**6)) for before, after in fixed]


class SmallRun:
    """A run with a warm-up, Adam and a loss scale that matters: its gradients are rounded to half precision."""

    def __init__(self, case: Resume, seed: int):
        noise = torch.Generator().manual_seed(seed)
        self.case = case
        self.parameters = [torch.randn(case.d, generator=noise).requires_grad_() for _ in range(2)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1.0)
        self.state: dict[str, Any] = {"step": 0, "updates": 0, "scale": 2.0**10, "good": 0}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            noise = torch.Generator().manual_seed(1000 * self.case.seed + self.state["step"])
            for parameter in self.parameters:
                target = torch.randn(self.case.d, generator=noise)
                parameter.grad = parameter.detach() - target
            self.optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (self.state["updates"] + 1) / 8)
            self.optimizer.step()
            self.state["step"] += 1
            self.state["updates"] += self.state["step"] % 3 > 0
            self.state["good"] = (self.state["good"] + 1) % 2
            self.state["scale"] *= 1 + (self.state["good"] == 0)

    def seen(self) -> dict[str, Any]:
        return {
            "state": dict(self.state),
            "weights": [parameter.detach().clone() for parameter in self.parameters],
        }


def attempt_restore(answer: Callable, case: Resume) -> dict[str, Any]:
    """State and weights right after the resume, and some steps later."""
    first = SmallRun(case, case.seed)
    first.train(case.before)
    saved = planted.save(first.parameters, first.optimizer, first.state)
    fresh = SmallRun(case, case.seed + 1)
    answer(saved, fresh.parameters, fresh.optimizer, fresh.state)
    at_once = fresh.seen()
    fresh.train(case.after)
    return {"at once": at_once, "later": fresh.seen()}


def never_ended(case: Resume) -> dict[str, Any]:
    """The same run without an end between."""
    run = SmallRun(case, case.seed)
    run.train(case.before)
    at_once = run.seen()
    run.train(case.after)
    return {"at once": at_once, "later": run.seen()}


def restores(*what: str) -> Callable[[Resume], Any]:
    """What a run gives that restores only these of "weights", "optimizer", and the names of the state."""

    def answer(saved: dict[str, Any], parameters: list[Tensor], optimizer: Any, state: dict[str, Any]) -> None:
        if "optimizer" in what:
            optimizer.load_state_dict(saved["optimizer"])
        for parameter, weight in zip(parameters, saved["weights"], strict=True):
            if "weights" in what:
                parameter.data = weight.clone()
        state.update({name: value for name, value in saved["state"].items() if name in what})

    return lambda case: attempt_restore(answer, case)


RESTORE_MISTAKES = (
    Mistake(
        "the state is not restored",
        "Weights and moments are back. The caller's state is as in a new run, so the data, the warm-up and the loss "
        "scale begin anew.",
        restores("weights", "optimizer"),
    ),
    Mistake(
        "the moments are not restored",
        "Weights and state are back. Adam's moments are those of a new run.",
        restores("weights", *COUNTED),
    ),
    Mistake(
        "only the weights",
        "The weights are back, and nothing else.",
        restores("weights"),
    ),
    Mistake(
        "the weights are not restored",
        "The weights are those of a new run.",
        restores("optimizer", *COUNTED),
    ),
    Mistake(
        "only the step",
        "Of the state only the number of the step is back.",
        restores("weights", "optimizer", "step"),
    ),
    Mistake(
        "without the scaler",
        "The loss scale and its count of good steps are those of a new run.",
        restores("weights", "optimizer", "step", "updates"),
    ),
    Mistake(
        "without the schedule",
        "The number of updates is that of a new run, so the warm-up begins anew.",
        restores("weights", "optimizer", "step", "scale", "good"),
    ),
)


def judge_restore(cases: Sequence[Resume], came: Sequence[Any]) -> str:
    compare(cases, came, never_ended, RESTORE_MISTAKES, tolerance=1e-6)
    return (
        f"{len(cases)} resumed runs went on as if they had never ended. "
        f"The symptom that is gone: {SYMPTOMS['restore']}."
    )


# --- The tasks --------------------------------------------------------------------------------------------------------

LESSONS = "../../notebooks/"


def find(name: str, minutes: int, difficulty: int, **others: Any) -> Task:
    """A find: one point, and three hints: a symptom, an experiment that shows it, what must hold in the end."""
    return Task(
        unit="12", kind="transfer", points=1, patience=3, name=name, minutes=minutes, difficulty=difficulty, **others
    )


TASKS = (
    find(
        "split",
        5,
        1,
        cases=draw_rows,
        attempt=attempt_split,
        judge=judge_split,
        look_at=(
            "how many micro-batches there are, and how many rows in each.",
            "a number of rows that M divides not.",
        ),
        hints=(
            "A symptom: whoever counts the rows that the first stage computes in one step counts fewer than the "
            "mini-batch has.",
            "An experiment: cut tensors of 8, 10 and 7 rows into 4, and add up the sizes. Lesson 05 cuts mini-batches "
            f"under 'A mini-batch, and its pieces': {LESSONS}05_micro_batches.ipynb.",
            "What must hold: there are M micro-batches, whatever the number of rows. One behind the other they are the "
            "mini-batch. Where M does not divide the number of rows, some micro-batches have one row more than others.",
        ),
    ),
    find(
        "attend",
        10,
        2,
        cases=draw_padded,
        attempt=attempt_attend,
        judge=judge_attend,
        look_at=(
            "which places of a row an output depends on: change one hidden state at a time.",
            "what becomes of a row if it is computed alone, without padding.",
        ),
        hints=(
            "A symptom: the same run, begun with another embedding of PAD and with nothing else changed, has another "
            "loss in its first step.",
            "An experiment: one row of three ids and two PAD. Add 1 to the hidden state at one place and see which "
            "outputs change; do that for each place. Masks are in lesson 01, "
            f"{LESSONS}01_one_device.ipynb; what True means differs between torch's functions: "
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html.",
            "What must hold: an output at a real place is a mean of the real places of its row, with the softmax of "
            "the scores as weights. Padding has the weight zero, so a row gives the same whatever it is padded with.",
        ),
    ),
    find(
        "run_layers",
        10,
        3,
        cases=draw_cuts,
        attempt=attempt_run_layers,
        judge=judge_run_layers,
        look_at=(
            "what the dropout mask of the third layer depends on, on one stage and on three.",
            "which two masks could be the same.",
        ),
        hints=(
            "A symptom: the loss of the very first step, before any weight has changed, is another one on two stages "
            "than on one. With DROPOUT at 0 it is the same.",
            "An experiment: let every layer print the first numbers of its dropout mask, on one stage and on two, and "
            "look for equal ones. Lesson 07 asks the same of recomputation, where masks must come again: "
            f"{LESSONS}07_bubble_and_stash.ipynb. The thread: https://github.com/pytorch/pytorch/issues/55036.",
            "What must hold: the mask of a layer follows from the step, the micro-batch and the layer's number in the "
            "whole model, and from nothing else: not from the layers that ran before it on its stage. Two layers, two "
            "micro-batches or two steps have different masks, also with 12 layers and 12 micro-batches.",
        ),
    ),
    find(
        "loss_share",
        10,
        2,
        cases=draw_ragged,
        attempt=attempt_loss_share,
        judge=judge_loss_share,
        look_at=(
            "what a token counts beside many others in its micro-batch, and beside few.",
            "what the share is divided by.",
        ),
        hints=(
            "A symptom: with DROPOUT at 0 and 8 rows, the loss of the first step is another one with four "
            "micro-batches than with one.",
            "An experiment: two micro-batches of two rows each, one with 13 tokens, one with 2. Add up their shares, "
            "and compare with the mean loss over all 15 tokens. Lesson 05 under 'A mistake made on purpose': "
            f"{LESSONS}05_micro_batches.ipynb.",
            "What must hold: every token of the mini-batch counts the same, in whichever micro-batch it is. So a "
            "micro-batch adds its losses up, and all of them divide by the same number of tokens.",
        ),
    ),
    find(
        "backward",
        10,
        2,
        cases=draw_chains,
        attempt=attempt_backward,
        judge=judge_backward,
        look_at=(
            "what stands in a parameter's gradient before the second micro-batch, and after it.",
            "what goes back to the stage before.",
        ),
        hints=(
            "A symptom: with rows of the same length and DROPOUT at 0, the printed norm of the gradients is much "
            "smaller with four micro-batches than with one.",
            "An experiment: one stage, two micro-batches. Note a parameter's gradient after the first backward and "
            "after the second, and compare with those of two runs of one micro-batch each. Lesson 05 under 'A gradient "
            f"is a sum': {LESSONS}05_micro_batches.ipynb.",
            "What must hold: after all micro-batches a parameter's gradient is the sum of what each of them gives. The "
            "leaf belongs to one micro-batch, so its gradient is that of this one. Nothing is scaled on the way.",
        ),
    ),
    find(
        "clip",
        10,
        3,
        cases=draw_norms,
        attempt=attempt_clip,
        judge=judge_clip,
        look_at=("the factor that each rank uses.", "gradients that are short enough already."),
        hints=(
            "A symptom: on three stages, after clipping, the norm of all stages' gradients together is above max_norm. "
            "On one stage it is not.",
            "An experiment: two ranks with gradients of norm 3 and 4, max_norm 2.5. What should their norms be "
            f"afterwards, and what are they? Lesson 09 under 'each stage clips its own': {LESSONS}"
            "09_gradient_clipping.ipynb.",
            "What must hold: all ranks multiply by the same factor, max_norm over the norm of all gradients of all "
            "ranks, and by 1 if that norm is small enough. So every rank must know the norm before it shortens "
            "anything, and the direction of the whole gradient stays.",
        ),
        instead=(clip_by_global_norm,),
    ),
    find(
        "after_step",
        5,
        1,
        cases=draw_steps,
        attempt=attempt_after_step,
        judge=judge_after_step,
        look_at=(
            "what each of the four numbers counts, by its description.",
            "the state after three skipped steps.",
        ),
        hints=(
            "A symptom: two runs differ in the loss scale that they begin with. One of them skips its first steps, and "
            "then makes its first update with a higher learning rate than the other did.",
            "An experiment: print the state of a run after each of its first five steps, beside `skipped`. Lesson 10 "
            f"under 'A skipped step moves nothing': {LESSONS}10_noam_warm_up.ipynb.",
            "What must hold: a skipped step uses up a mini-batch and halves the scale, and does nothing else but begin "
            "the count of good steps anew. The learning rate follows the updates of the weights.",
        ),
    ),
    find(
        "restore",
        10,
        2,
        cases=draw_resumes,
        attempt=attempt_restore,
        judge=judge_restore,
        look_at=(
            "what the caller's four objects hold after the call.",
            "what a run needs besides its weights.",
        ),
        hints=(
            "A symptom: a run of four steps is saved and resumed. The log of the resumed run begins with step 0, and "
            "with skipped steps.",
            "An experiment: print the caller's objects before and after the call: a weight, what the optimizer's "
            "state_dict holds, the state. Lesson 11 under 'Killed, and resumed': "
            f"{LESSONS}11_train_it_all.ipynb. Somebody's run that restored less: "
            "https://github.com/PolymathicAI/the_well/issues/77.",
            "What must hold: the objects that the caller has given are the ones that change. Afterwards weights, the "
            "optimizer's moments, and all four numbers of the state are those that were saved.",
        ),
    ),
)
