"""Answers to unit 04."""

from functools import cache
from itertools import accumulate, pairwise

import torch

from course_utils.number_words import even_sizes
from tests.bank import right, wrong

# --- naive_step -------------------------------------------------------------------------------------------------------


@right("04.naive_step")
def by_position(rank):
    first, last = rank.index == 0, rank.index == rank.num_stages - 1
    total = 0.0
    for m in range(rank.num_micro_batches):
        leaf = rank.inputs(m) if first else rank.receive(rank.index - 1)
        leaf.requires_grad_()
        out = rank.stage(leaf)
        if last:
            loss = rank.loss(out, m) / rank.num_rows
            torch.autograd.backward([loss])
            total += loss.item()
        else:
            rank.send(out, rank.index + 1)
            torch.autograd.backward([out], [rank.receive(rank.index + 1)])
        if not first:
            rank.send(leaf.grad, rank.index - 1)
    return total


@right("04.naive_step")
def in_functions(rank):
    before, after = rank.index - 1, rank.index + 1

    def take_in(m):
        return rank.receive(before).requires_grad_(True) if before >= 0 else rank.inputs(m)

    def gradient_from_behind(out, m):
        if after < rank.num_stages:
            rank.send(out.detach(), after)
            return rank.receive(after), None
        leaf = out.detach().requires_grad_()
        loss = rank.loss(leaf, m) / rank.num_rows
        loss.backward()
        return leaf.grad, loss.detach()

    shares = []
    for m in range(rank.num_micro_batches):
        x = take_in(m)
        y = rank.stage(x)
        gradient, share = gradient_from_behind(y, m)
        y.backward(gradient)
        if before >= 0:
            rank.send(x.grad, before)
        shares.append(share)
    return None if shares[0] is None else sum(shares)


@right("04.naive_step")
def as_a_dot_product(rank):
    """The walk back from the sum of activations times their gradient."""
    loss_so_far = torch.zeros((), dtype=torch.float64)
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        if rank.index + 1 == rank.num_stages:
            root = rank.loss(y, m) / rank.num_rows
            loss_so_far += root.detach()
        else:
            rank.send(y, rank.index + 1)
            root = (y * rank.receive(rank.index + 1)).sum()
        root.backward()
        if rank.index:
            rank.send(x.grad, rank.index - 1)
    return loss_so_far.item()


def a_step(
    rank, divide=lambda loss, rank, m: loss / rank.num_rows, walk=lambda y, gradient, rank: y.backward(gradient)
):
    """A right step, but for what is given."""
    total = 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        if rank.index == rank.num_stages - 1:
            loss = divide(rank.loss(y, m), rank, m)
            loss.backward()
            total += loss.item()
        else:
            rank.send(y, rank.index + 1)
            walk(y, rank.receive(rank.index + 1), rank)
        if rank.index > 0:
            rank.send(x.grad, rank.index - 1)
    return total


@wrong("04.naive_step", "mean of means", "torchtitan#2206")
def own_rows(rank):
    rows = rank._step.rows
    return a_step(rank, lambda loss, rank, m: loss / rows[m] / rank.num_micro_batches)


@wrong("04.naive_step", "mean of means")
def sum_of_own_means(rank):
    rows = rank._step.rows
    return a_step(rank, lambda loss, rank, m: loss / rows[m])


@wrong("04.naive_step", "not divided", "torchtitan#2972")
def summed(rank):
    return a_step(rank, lambda loss, rank, m: loss)


@wrong("04.naive_step", "divided by M")
def by_micro_batches(rank):
    return a_step(rank, lambda loss, rank, m: loss / rank.num_micro_batches)


@wrong("04.naive_step", "divided on each stage", "DeepSpeed#8152")
def divided_again(rank):
    return a_step(rank, walk=lambda y, gradient, rank: y.backward(gradient / rank.num_rows))


@wrong("04.naive_step", "not the gradient that arrived")
def of_ones(rank):
    return a_step(rank, walk=lambda y, gradient, rank: y.sum().backward())


@wrong("04.naive_step", "loss of the last micro-batch")
def last_loss(rank):
    last = {}
    a_step(rank, lambda loss, rank, m: last.setdefault("loss", loss / rank.num_rows) and loss / rank.num_rows)
    return 0.0 if not last else of_last(rank)


def of_last(rank):
    """The share of the last micro-batch, computed once more from what the rank holds."""
    from course_utils.checks.unit_04 import loss_of_last

    return loss_of_last(rank._step)["loss"]


@wrong("04.naive_step", "all forwards first")
def like_gpipe(rank):
    kept, total = [], 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        kept.append((x, y))
        if rank.index < rank.num_stages - 1:
            rank.send(y, rank.index + 1)
    for m, (x, y) in enumerate(kept):
        if rank.index == rank.num_stages - 1:
            loss = rank.loss(y, m) / rank.num_rows
            loss.backward()
            total += loss.item()
        else:
            y.backward(rank.receive(rank.index + 1))
        if rank.index > 0:
            rank.send(x.grad, rank.index - 1)
    return total


@wrong("04.naive_step", "no gradient sent")
def sends_nothing_back(rank):
    total = 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        if rank.index == rank.num_stages - 1:
            loss = rank.loss(y, m) / rank.num_rows
            loss.backward()
            total += loss.item()
        else:
            rank.send(y, rank.index + 1)
            y.backward(rank.receive(rank.index + 1))
    return total


@wrong("04.naive_step", "no activations sent")
def sends_nothing_on(rank):
    x = rank.inputs(0) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
    y = rank.stage(x)
    if rank.index == rank.num_stages - 1:
        loss = rank.loss(y, 0) / rank.num_rows
        loss.backward()
        return loss.item()
    y.backward(rank.receive(rank.index + 1))
    rank.send(x.grad, rank.index - 1)


@wrong("04.naive_step", "activations without requires_grad")
def no_leaf(rank):
    total = 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1)
        y = rank.stage(x)
        if rank.index == rank.num_stages - 1:
            loss = rank.loss(y, m) / rank.num_rows
            loss.backward()
            total += loss.item()
        else:
            rank.send(y, rank.index + 1)
            y.backward(rank.receive(rank.index + 1))
        if rank.index > 0:
            rank.send(x.grad, rank.index - 1)
    return total


@wrong("04.naive_step", "a neighbour that is not there")
def round_the_corner(rank):
    for _ in range(rank.num_micro_batches):
        x = rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        rank.send(y, rank.index + 1)
        y.backward(rank.receive(rank.index + 1))
        rank.send(x.grad, rank.index - 1)


@wrong("04.naive_step", "backward twice")
def running_total(rank):
    total = 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        if rank.index == rank.num_stages - 1:
            total = total + rank.loss(y, m) / rank.num_rows
            total.backward(retain_graph=True)
        else:
            rank.send(y, rank.index + 1)
            y.backward(rank.receive(rank.index + 1))
        if rank.index > 0:
            rank.send(x.grad, rank.index - 1)
    return total.detach() if rank.index == rank.num_stages - 1 else total


@wrong("04.naive_step", "no backward")
def backward_at_the_end(rank):
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        if rank.index < rank.num_stages - 1:
            rank.send(y, rank.index + 1)
    if rank.index == rank.num_stages - 1:
        loss = rank.loss(y, m) / rank.num_rows
        loss.backward()
    else:
        y.backward(rank.receive(rank.index + 1))
    if rank.index > 0:
        rank.send(x.grad, rank.index - 1)
    return loss.item() if rank.index == rank.num_stages - 1 else None


# --- balance ----------------------------------------------------------------------------------------------------------


def as_lists(ends):
    return [list(range(begin, end)) for begin, end in pairwise([0, *ends])]


@right("04.balance")
def by_threshold(times, memory, K, limit):
    """Fewest stages for a given slowest stage, and the smallest slowest stage for which K are enough."""

    def greedy(most):
        ends, time, need = [], 0, 0
        for i, (t, b) in enumerate(zip(times, memory, strict=True)):
            if t > most or b > limit:
                return None
            if time + t > most or need + b > limit:
                ends.append(i)
                time = need = 0
            time, need = time + t, need + b
        return [*ends, len(times)] if len(ends) < K else None

    if len(times) < K:
        raise ValueError(f"{len(times)} blocks are no {K} stages, whatever the limit, {limit}")
    for most in range(max(times), sum(times) + 1):
        if ends := greedy(most):
            more = [i for i in range(1, len(times)) if i not in ends]
            return as_lists(sorted(ends + more[: K - len(ends)]))
    raise ValueError(f"no cut into {K} stages fits into {limit}")


@right("04.balance")
def table_by_table(times, memory, K, limit):
    """best[i]: (slowest, ends) of the first i blocks, for one more stage in every round."""
    n, t, b = len(times), [0, *accumulate(times)], [0, *accumulate(memory)]
    best = {0: (0, [])}
    for _ in range(K):
        best = {
            i: min((max(s, t[i] - t[j]), [*ends, i]) for j, (s, ends) in best.items() if j < i and b[i] - b[j] <= limit)
            for i in range(1, n + 1)
            if any(j < i and b[i] - b[j] <= limit for j in best)
        }
    if n not in best:
        raise ValueError(f"nothing fits: limit {limit}, {K} stages")
    return tuple(range(begin, end) for begin, end in pairwise([0, *best[n][1]]))


def recursive(times, memory, K, limit, cost=max, first_end=1, fits=None, may_be_empty=False):
    """Right, but for what is given."""
    n = len(times)
    fits = fits or (lambda i, j: sum(memory[i:j]) <= limit)

    @cache
    def cut(i, k):
        if k == 1:
            return (sum(times[i:]), (n,)) if (i < n or may_be_empty) and fits(i, n) else None
        found = []
        for j in range(i + first_end, n + 1):
            others = cut(j, k - 1) if fits(i, j) else None
            if others:
                found.append((cost(sum(times[i:j]), others[0]), (j, *others[1])))
        return min(found, default=None)

    if cut(0, K) is None:
        raise ValueError(f"no cut into {K} stages fits into the limit of {limit}")
    return as_lists(cut(0, K)[1])


@wrong("04.balance", "by count", "Megatron-LM#1303")
def count_only(times, memory, K, limit):
    ends = list(accumulate(even_sizes(len(times), K))) if len(times) >= K else None
    if ends is None or any(sum(memory[i] for i in stage) > limit for stage in as_lists(ends)):
        raise ValueError(f"does not fit into {limit}")
    return as_lists(ends)


@wrong("04.balance", "by count")
def count_unchecked(times, memory, K, limit):
    if len(times) < K:
        raise ValueError(f"limit {limit}: more stages than blocks")
    return as_lists(accumulate(even_sizes(len(times), K)))


@wrong("04.balance", "memory ignored")
def ignores_memory(times, memory, K, limit):
    return recursive(times, memory, K, limit, fits=lambda i, j: True)


@wrong("04.balance", "lost blocks", "Megatron-LM#1304")
def loses_the_rest(times, memory, K, limit):
    size = len(times) // K
    return [list(range(k * size, (k + 1) * size)) for k in range(K)]


@wrong("04.balance", "leftovers on the last stage", "torchtitan#963")
def rest_on_the_last(times, memory, K, limit):
    size = len(times) // K
    return as_lists([*(k * size for k in range(1, K)), len(times)])


@wrong("04.balance", "filled up to the average")
def greedy_fill(times, memory, K, limit):
    stages = [[]]
    for i in range(len(times)):
        stages[-1].append(i)
        if sum(times[j] for j in stages[-1]) >= sum(times) / K and len(stages) < K:
            stages.append([])
    return stages + [[] for _ in range(K - len(stages))]


@wrong("04.balance", "an empty stage")
def may_be_empty(times, memory, K, limit):
    return recursive(times, memory, K, limit, first_end=0, may_be_empty=True)


@wrong("04.balance", "an error though a cut fits")
def first_fit(times, memory, K, limit):
    """Fills each stage up to the limit and gives up when too few stages come out."""
    stages = [[]]
    for i, need in enumerate(memory):
        if stages[-1] and sum(memory[j] for j in stages[-1]) + need > limit:
            stages.append([])
        stages[-1].append(i)
    if len(stages) != K or max(memory) > limit:
        raise ValueError(f"no cut fits into {limit}")
    return stages


@wrong("04.balance", "sum instead of max")
def sum_of_stages(times, memory, K, limit):
    return recursive(times, memory, K, limit, cost=lambda first, rest: first + rest)


@wrong("04.balance", "sum of squares")
def squares(times, memory, K, limit):
    n = len(times)

    @cache
    def cut(i, k):
        if k == 1:
            return (sum(times[i:]) ** 2, (n,)) if i < n and sum(memory[i:]) <= limit else None
        found = []
        for j in range(i + 1, n):
            others = cut(j, k - 1) if sum(memory[i:j]) <= limit else None
            if others:
                found.append((sum(times[i:j]) ** 2 + others[0], (j, *others[1])))
        return min(found, default=None)

    if cut(0, K) is None:
        raise ValueError(f"nothing fits into {limit}")
    return as_lists(cut(0, K)[1])


@wrong("04.balance", "less than the limit")
def strictly_less(times, memory, K, limit):
    return recursive(times, memory, K, limit, fits=lambda i, j: sum(memory[i:j]) < limit)


@wrong("04.balance", "balances memory")
def swapped(times, memory, K, limit):
    return recursive(memory, memory, K, limit)


@wrong("04.balance", "no error")
def falls_back(times, memory, K, limit):
    try:
        return recursive(times, memory, K, limit)
    except ValueError:
        return recursive(times, memory, min(K, len(times)), sum(memory))


@wrong("04.balance", "an error that says nothing")
def silent_error(times, memory, K, limit):
    try:
        return recursive(times, memory, K, limit)
    except ValueError:
        raise ValueError from None


@wrong("04.balance", "sizes instead of stages")
def gives_sizes(times, memory, K, limit):
    return [len(stage) for stage in recursive(times, memory, K, limit)]


EQUIVALENT = {
    "04.balance": {
        "constant, line 17, column 71: 0 -> -1": "no time is below 0, so the last stage's own time counts",
        "constant, line 17, column 71: 0 -> 1": (
            "it counts only if the slowest stage takes 0, and then every cut that fits is a best one"
        ),
        "operator, line 12, column 36: len(times) - rest_of_stages -> len(times) + rest_of_stages": (
            "the ends that are tried in addition leave a later stage without a block, and no cut is found for those"
        ),
        "arguments swapped, line 19, column 30: max(sum(times[start:end]), others[0]) -> "
        "max(others[0], sum(times[start:end]))": "the maximum of two whole numbers is the same either way round",
    },
}
