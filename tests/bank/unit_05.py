"""Answers to unit 05."""

import itertools
import math

import torch
from torch.nn.functional import cross_entropy

from tests.bank import right, wrong

# --- accumulate -------------------------------------------------------------------------------------------------------


@right("05.accumulate")
def divided_first(model, micro_batches):
    num_tokens = sum(int((targets != 0).sum()) for _, targets in micro_batches)
    model.zero_grad()
    losses = []
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
        (loss / num_tokens).backward()
        losses.append(loss.detach() / num_tokens)
    return sum(losses)


@right("05.accumulate")
def divided_last(model, micro_batches):
    parameters = list(model.parameters())
    sums, total, tokens = [torch.zeros_like(p) for p in parameters], 0.0, 0
    for inputs, targets in micro_batches:
        real = targets != 0
        log_probabilities = model(inputs).log_softmax(-1)
        loss = -log_probabilities.gather(-1, targets[..., None])[..., 0][real].sum()
        for kept, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            kept += gradient
        total, tokens = total + loss.item(), tokens + int(real.sum())
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient / tokens
    return total / tokens


@right("05.accumulate")
def weighs_the_means(model, micro_batches):
    counts = [targets.count_nonzero().item() for _, targets in micro_batches]
    for parameter in model.parameters():
        parameter.grad = None
    total = 0.0
    for (inputs, targets), count in zip(micro_batches, counts, strict=True):
        mean = cross_entropy(model(inputs).transpose(1, 2), targets, ignore_index=0)
        (mean * (count / sum(counts))).backward()
        total += mean.item() * count / sum(counts)
    return total


def loop(model, micro_batches, share, clear="once", after=lambda model: None):
    """share: (logits, targets, all targets) -> the loss that goes backward."""
    everything = [targets for _, targets in micro_batches]
    if clear == "once":
        model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        if clear == "each":
            model.zero_grad()
        loss = share(model(inputs).flatten(0, 1), targets.flatten(), everything)
        loss.backward()
        after(model)
        total += loss.item()
    return total


def summed(logits, targets):
    return cross_entropy(logits, targets, ignore_index=0, reduction="sum")


def tokens_in(everything):
    return sum(int((targets != 0).sum()) for targets in everything)


def by_all_tokens(logits, targets, everything):
    return summed(logits, targets) / tokens_in(everything)


@wrong("05.accumulate", "mean of means", "torchtitan#2206")
def mean_of_means(model, micro_batches):
    return loop(model, micro_batches, lambda x, t, all_t: cross_entropy(x, t, ignore_index=0) / len(all_t))


@wrong("05.accumulate", "sum of means", "DeepSpeed#7773")
def sum_of_means(model, micro_batches):
    return loop(model, micro_batches, lambda x, t, all_t: cross_entropy(x, t, ignore_index=0))


@wrong("05.accumulate", "mean weighted by rows")
def by_rows(model, micro_batches):
    rows = sum(len(targets) for _, targets in micro_batches)
    model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=0) * len(targets) / rows
        loss.backward()
        total += loss.item()
    return total


@wrong("05.accumulate", "only the last micro-batch", "Automodel#3530")
def cleared_each_time(model, micro_batches):
    return loop(model, micro_batches, by_all_tokens, clear="each")


@wrong("05.accumulate", "only the first micro-batch")
def returns_inside(model, micro_batches):
    tokens = tokens_in([targets for _, targets in micro_batches])
    model.zero_grad()
    for inputs, targets in micro_batches:
        loss = summed(model(inputs).flatten(0, 1), targets.flatten()) / tokens
        loss.backward()
        return loss.item()


@wrong("05.accumulate", "pad counted as token")
def sums_by_places(model, micro_batches):
    return loop(model, micro_batches, lambda x, t, all_t: summed(x, t) / sum(o.numel() for o in all_t))


@wrong("05.accumulate", "padding has a loss")
def padding_learnt(model, micro_batches):
    def share(logits, targets, everything):
        return cross_entropy(logits, targets, reduction="sum") / sum(t.numel() for t in everything)

    return loop(model, micro_batches, share)


@wrong("05.accumulate", "gradients of the step before")
def never_cleared(model, micro_batches):
    return loop(model, micro_batches, by_all_tokens, clear="never")


@wrong("05.accumulate", "clears a gradient that is None")
def clears_none(model, micro_batches):
    for parameter in model.parameters():
        parameter.grad.zero_()
    return loop(model, micro_batches, by_all_tokens)


@wrong("05.accumulate", "never divided", "torchtitan#2972")
def divides_the_report(model, micro_batches):
    total = loop(model, micro_batches, lambda x, t, all_t: summed(x, t))
    return total / tokens_in([targets for _, targets in micro_batches])


@wrong("05.accumulate", "divided by M once more", "DeepSpeed#8152")
def by_m_too(model, micro_batches):
    return loop(model, micro_batches, lambda x, t, all_t: by_all_tokens(x, t, all_t) / len(all_t))


@wrong("05.accumulate", "scaled after every micro-batch", "torchtitan#1733")
def scaled_each_time(model, micro_batches):
    def scale(model):
        for parameter in model.parameters():
            parameter.grad /= len(micro_batches)

    return loop(model, micro_batches, lambda x, t, all_t: cross_entropy(x, t, ignore_index=0), after=scale)


@wrong("05.accumulate", "graphs of all micro-batches at a time")
def one_backward(model, micro_batches):
    tokens = tokens_in([targets for _, targets in micro_batches])
    model.zero_grad()
    losses = [summed(model(inputs).flatten(0, 1), targets.flatten()) / tokens for inputs, targets in micro_batches]
    sum(losses).backward()
    return sum(losses).item()


@wrong("05.accumulate", "graphs of all micro-batches at a time")
def retains_graphs(model, micro_batches):
    tokens = tokens_in([targets for _, targets in micro_batches])
    model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        loss = summed(model(inputs).flatten(0, 1), targets.flatten()) / tokens
        loss.backward(retain_graph=True)
        total = total + loss
    return total


@wrong("05.accumulate", "one large batch")
def glued_together(model, micro_batches):
    width = max(targets.shape[1] for _, targets in micro_batches)

    def glue(side):
        return torch.cat([torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in side])

    inputs, targets = map(glue, zip(*micro_batches, strict=True))
    return loop(model, [(inputs, targets)], by_all_tokens)


@wrong("05.accumulate", "no return")
def no_return(model, micro_batches):
    loop(model, micro_batches, by_all_tokens)


@wrong("05.accumulate", "mean of means in the report")
def wrong_report(model, micro_batches):
    means = []
    tokens = tokens_in([targets for _, targets in micro_batches])
    model.zero_grad()
    for inputs, targets in micro_batches:
        loss = summed(model(inputs).flatten(0, 1), targets.flatten())
        (loss / tokens).backward()
        means.append(loss.item() / tokens_in([targets]))
    return sum(means) / len(means)


@wrong("05.accumulate", "the loss of the last micro-batch")
def last_loss(model, micro_batches):
    tokens = tokens_in([targets for _, targets in micro_batches])
    model.zero_grad()
    for inputs, targets in micro_batches:
        loss = summed(model(inputs).flatten(0, 1), targets.flatten()) / tokens
        loss.backward()
    return loss.item()


# --- split_rows -------------------------------------------------------------------------------------------------------


@right("05.split_rows")
def by_halving(lengths, num_micro_batches):
    n = len(lengths)
    cap = -(-n // num_micro_batches)

    def fit(limit):
        cuts, start = [], 0
        for m in range(num_micro_batches):
            end = start
            while (
                end < n - (num_micro_batches - m - 1)
                and end - start < cap
                and (end + 1 - start) * max(lengths[start : end + 1]) <= limit
            ):
                end += 1
            if end == start:
                return None
            cuts.append(end - start)
            start = end
        return cuts if start == n else None

    low, high = 0, cap * max(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) else (middle, high)
    return fit(high)


@right("05.split_rows")
def by_tables(lengths, num_micro_batches):
    n = len(lengths)
    cap = math.ceil(n / num_micro_batches)
    best = {(0, 0): (0, ())}
    for m in range(1, num_micro_batches + 1):
        for end in range(m, n + 1):
            found = []
            for size in range(1, cap + 1):
                if (m - 1, end - size) in best:
                    most, sizes = best[m - 1, end - size]
                    found.append((max(most, size * max(lengths[end - size : end])), (*sizes, size)))
            if found:
                best[m, end] = min(found)
    return list(best[num_micro_batches, n][1])


@wrong("05.split_rows", "torch.chunk", "PiPPy#192")
def chunk(lengths, num_micro_batches):
    return [len(piece) for piece in torch.tensor(lengths).chunk(num_micro_batches)]


@wrong("05.split_rows", "even rows")
def even(lengths, num_micro_batches):
    return [len(piece) for piece in torch.tensor(lengths).tensor_split(num_micro_batches)]


@wrong("05.split_rows", "the ragged rest dropped")
def drop_last(lengths, num_micro_batches):
    return [len(lengths) // num_micro_batches] * num_micro_batches


@wrong("05.split_rows", "more rows than allowed")
def rest_in_the_last(lengths, num_micro_batches):
    size = len(lengths) // num_micro_batches
    return [size] * (num_micro_batches - 1) + [len(lengths) - size * (num_micro_batches - 1)]


@wrong("05.split_rows", "an empty micro-batch")
def full_ones_first(lengths, num_micro_batches):
    size, left, sizes = math.ceil(len(lengths) / num_micro_batches), len(lengths), []
    for _ in range(num_micro_batches):
        sizes.append(min(size, left))
        left -= sizes[-1]
    return sizes


def all_cuts(n, M, cap):
    for inner in itertools.combinations(range(1, n), M - 1):
        sizes = [b - a for a, b in itertools.pairwise((0, *inner, n))]
        if max(sizes) <= cap:
            yield sizes


def least(lengths, M, cost, cap=None):
    if len(lengths) > 20:
        return by_tables(lengths, M)
    cuts = all_cuts(len(lengths), M, cap or math.ceil(len(lengths) / M))
    return min(cuts, key=lambda sizes: max(cost(lengths[sum(sizes[:m]) :][:size]) for m, size in enumerate(sizes)))


@wrong("05.split_rows", "padding forgotten")
def fewest_tokens(lengths, num_micro_batches):
    return least(lengths, num_micro_batches, sum)


@wrong("05.split_rows", "only the longest row counts")
def shortest_rows(lengths, num_micro_batches):
    return least(lengths, num_micro_batches, max)


@wrong("05.split_rows", "more rows than allowed")
def without_the_cap(lengths, num_micro_batches):
    return least(lengths, num_micro_batches, lambda piece: len(piece) * max(piece), cap=len(lengths))


@wrong("05.split_rows", "cut at the mean")
def greedy(lengths, num_micro_batches):
    sizes, start, n = [], 0, len(lengths)
    cap = math.ceil(n / num_micro_batches)
    for left in reversed(range(num_micro_batches)):
        size = max(1, n - start - left * cap)
        goal = sum(lengths[start:]) / (left + 1)
        while size < cap and start + size + left < n and sum(lengths[start : start + size + 1]) <= goal:
            size += 1
        sizes.append(size)
        start += size
    return sizes


@wrong("05.split_rows", "all cuts tried")
def tries_all(lengths, num_micro_batches):
    if len(lengths) > 20:  # it would run for hours: ended here, as the check does after some seconds
        raise TimeoutError
    return least(lengths, num_micro_batches, lambda piece: len(piece) * max(piece))


@wrong("05.split_rows", "rows instead of sizes")
def lists_of_rows(lengths, num_micro_batches):
    numbers, start = [], 0
    for size in by_tables(lengths, num_micro_batches):
        numbers.append(list(range(start, start + size)))
        start += size
    return numbers


@wrong("05.split_rows", "hard-coded to the visible example")
def visible(lengths, num_micro_batches):
    return [1, 2, 1, 2, 1]


# --- token_metrics ----------------------------------------------------------------------------------------------------


@right("05.token_metrics")
def with_ignore_index(results):
    losses, right_ones, counts = [], [], []
    for logits, targets in results:
        losses.append(cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum"))
        right_ones.append(((logits.argmax(-1) == targets) & (targets > 0)).sum())
        counts.append(targets.count_nonzero())
    loss = sum(losses) / sum(counts)
    return loss, loss.exp(), sum(right_ones) / sum(counts)


@right("05.token_metrics")
def running_mean(results):
    loss = accuracy = 0.0
    seen = 0
    for logits, targets in results:
        real = targets.ne(0)
        n = int(real.sum())
        if n == 0:
            continue
        scores, wanted = logits[real].double(), targets[real]
        own = (scores.logsumexp(-1) - scores.gather(1, wanted[:, None])[:, 0]).mean().item()
        hit = (scores.max(-1).indices == wanted).double().mean().item()
        loss, accuracy = ((a * seen + b * n) / (seen + n) for a, b in ((loss, own), (accuracy, hit)))
        seen += n
    return [loss, math.exp(loss), accuracy]


def measure(logits, targets):
    """(summed loss, right ones, tokens) of one micro-batch."""
    real = targets != 0
    loss = cross_entropy(logits[real].float(), targets[real], reduction="sum").item()
    return loss, int((logits.argmax(-1) == targets)[real].sum()), int(real.sum())


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@wrong("05.token_metrics", "mean of means", "torchtitan#2206")
def means_of_the_full_ones(results):
    parts = [part for part in (measure(*result) for result in results) if part[2]]
    loss, accuracy = mean(a / n for a, _, n in parts), mean(r / n for _, r, n in parts)
    return loss, math.exp(loss), accuracy


@wrong("05.token_metrics", "mean of means")
def means_with_zeros(results):
    parts = [measure(*result) for result in results]
    loss, accuracy = mean(a / max(n, 1) for a, _, n in parts), mean(r / max(n, 1) for _, r, n in parts)
    return loss, math.exp(loss), accuracy


@wrong("05.token_metrics", "mean of means")
def torch_means(results):
    losses, accuracies = [], []
    for logits, targets in results:
        losses.append(cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=0).item())
        accuracies.append((logits.argmax(-1) == targets)[targets != 0].float().mean().item())
    return mean(losses), math.exp(mean(losses)), mean(accuracies)


@wrong("05.token_metrics", "divides by no tokens")
def divides_each(results):
    loss, right_ones, tokens = 0.0, 0, 0
    for result in results:
        own, hits, n = measure(*result)
        loss, right_ones, tokens = loss + own / n * n, right_ones + hits, tokens + n
    return loss / tokens, math.exp(loss / tokens), right_ones / tokens


@wrong("05.token_metrics", "no tokens, no number")
def mean_times_tokens(results):
    loss, right_ones, tokens = 0.0, 0, 0
    for logits, targets in results:
        _, hits, n = measure(logits, targets)
        loss += cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=0).item() * n
        right_ones, tokens = right_ones + hits, tokens + n
    return loss / tokens, math.exp(loss / tokens), right_ones / tokens


@wrong("05.token_metrics", "pad counted as token")
def by_places(results):
    loss, right_ones, places = 0.0, 0, 0
    for logits, targets in results:
        own, hits, _ = measure(logits, targets)
        loss, right_ones, places = loss + own, right_ones + hits, places + targets.numel()
    return loss / places, math.exp(loss / places), right_ones / places


@wrong("05.token_metrics", "padding predicted")
def with_padding(results):
    loss, right_ones, places = 0.0, 0, 0
    for logits, targets in results:
        loss += cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
        right_ones, places = right_ones + int((logits.argmax(-1) == targets).sum()), places + targets.numel()
    return loss / places, math.exp(loss / places), right_ones / places


@wrong("05.token_metrics", "padding predicted")
def padding_in_the_accuracy(results):
    loss, right_ones, tokens, places = 0.0, 0, 0, 0
    for logits, targets in results:
        own, _, n = measure(logits, targets)
        loss, tokens, places = loss + own, tokens + n, places + targets.numel()
        right_ones += int((logits.argmax(-1) == targets).sum())
    return loss / tokens, math.exp(loss / tokens), right_ones / places


@wrong("05.token_metrics", "right ones with padding, tokens without")
def mixed_counts(results):
    loss, right_ones, tokens = 0.0, 0, 0
    for logits, targets in results:
        own, _, n = measure(logits, targets)
        loss, tokens = loss + own, tokens + n
        right_ones += int((logits.argmax(-1) == targets).sum())
    return loss / tokens, math.exp(loss / tokens), right_ones / tokens


@wrong("05.token_metrics", "only the last micro-batch", "DeepSpeed#3367")
def overwritten(results):
    for result in results:
        loss, right_ones, tokens = measure(*result)
    return loss / tokens, math.exp(loss / tokens), right_ones / tokens


@wrong("05.token_metrics", "mean of perplexities")
def perplexities(results):
    parts = [measure(*result) for result in results]
    tokens = sum(n for *_, n in parts)
    loss = sum(a for a, _, _ in parts) / tokens
    return loss, sum(math.exp(a / max(n, 1)) * n for a, _, n in parts) / tokens, sum(r for _, r, _ in parts) / tokens


@wrong("05.token_metrics", "logits kept")
def all_together(results):
    kept = list(results)
    logits = torch.cat([logits.flatten(0, 1) for logits, _ in kept])
    loss, right_ones, tokens = measure(logits, torch.cat([targets.flatten() for _, targets in kept]))
    return loss / tokens, math.exp(loss / tokens), right_ones / tokens


@wrong("05.token_metrics", "sums in bfloat16")
def in_low_precision(results):
    loss, right_ones, tokens = 0.0, 0, 0
    for logits, targets in results:
        real = targets != 0
        loss += cross_entropy(logits[real], targets[real], reduction="sum").item()
        right_ones += int((logits.argmax(-1) == targets)[real].sum())
        tokens += int(real.sum())
    return loss / tokens, math.exp(loss / tokens), right_ones / tokens


@wrong("05.token_metrics", "the loss for the perplexity")
def no_exponential(results):
    loss, right_ones, tokens = (sum(column) for column in zip(*(measure(*result) for result in results), strict=True))
    return loss / tokens, loss / tokens, right_ones / tokens


# --- Mutants that nobody can tell from the solution -------------------------------------------------------------------

EQUIVALENT = {
    "05.split_rows": {
        "arguments swapped, line 11, column 26: max(longest, lengths[start + size]) -> "
        "max(lengths[start + size], longest)": "the larger of two whole numbers has no order",
        "constant, line 5, column 53: 1 -> 0": "a limit of 0 leaves each row of tokens alone, which adds up to all "
        "rows only if M equals their number, and then no other cut exists",
        "constant, line 5, column 62: 1 -> 2": "products are compared with a limit, of at most cap rows: an additional "
        "limit cuts as the next smaller one of the others, which was tried before",
        "constant, line 9, column 28: 1 -> 0": "limits below the longest row fail then instead of leaving it alone; "
        "the longest row is a limit too, and no cut can be better",
    },
}
