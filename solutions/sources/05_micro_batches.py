# %% [markdown] tags=["opening"]
# # Exercises 05 · Micro-batches
#
# **You need** [lesson 05](../../notebooks/05_micro_batches.ipynb). **Minutes:** 70. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
import math

import torch
from torch.nn.functional import cross_entropy

from course_utils.checks import call, check, hint, start

start("05")

# %% [markdown]
# ## 1 · The loop, from memory
# Accumulate the gradients of micro-batches, so that they are those of the whole mini-batch, and return its loss. **Target:** gradients and
# loss within $10^{-5}$ of those of one device that takes all rows at once, with never more rows kept for a backward than the largest
# micro-batch has.
#
# | | |
# | --- | --- |
# | `micro_batches` | a list of `(inputs, targets)`, ids of shape (rows, length); rows and lengths differ from one to the next |
# | `targets` | 0 is padding: it has no loss and is no token |
# | `model(inputs)` | returns logits of shape (rows, length, vocabulary) |
# | `.grad` | may hold the gradients of the step before, or `None` |


# %% tags=["answer:accumulate"]
def accumulate(model, micro_batches):
    """Leave the gradients of the mini-batch's mean loss per token in `.grad`; return that loss, a number."""
    ### BEGIN SOLUTION
    num_tokens = sum(int((targets != 0).sum()) for _, targets in micro_batches)
    model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum") / num_tokens
        loss.backward()
        total += loss.item()
    return total
    ### END SOLUTION


# %% [markdown]
# Five rows in micro-batches of 2, 2 and 1, against one device that takes all five at once:

# %%
from course_utils.checks.unit_05 import Pieces, SmallModel, make_pieces, whole_batch
from course_utils.checks.values import print_numbers

example = Pieces(tokens=((3, 1), (7, 6), (2,)), seed=0, left_over=True)
print(f"all rows at once: loss {whole_batch(example)['loss']:.6f}")
mine = call(accumulate, SmallModel(example), make_pieces(example))
if mine is not None:
    call(print_numbers, "three micro-batches:", "loss {:.6f}", mine)

# %% tags=["check:accumulate", "nbval-check-output"]
check("unit05.accumulate", accumulate)

# %% [markdown] tags=["solution"]
# **Why.** A sum may be taken in parts, and `backward` adds to `.grad`. So each micro-batch gives the sum over its tokens, divided by the
# tokens of *all* micro-batches. The gradients are cleared once, before the first of them. The backward stands inside the
# loop, so that one graph is freed before the next is made; `item()` leaves a number, which holds no graph.
#
# **One wrong way:** to let `cross_entropy` take the mean of each micro-batch, and to divide by their number.


# %% tags=["solution", "nbval-check-output"]
def mean_of_means(model, micro_batches):
    model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=0) / len(micro_batches)
        loss.backward()
        total += loss.item()
    return total


check("unit05.accumulate", mean_of_means)

# %% [markdown]
# ## 2 · Cut the rows well
# Cut $n$ rows into $M$ micro-batches of rows that follow each other. A micro-batch is padded to its longest row, so it takes *rows times
# longest row* places, and the largest one sets the memory and the pace. **Target:** exactly $M$ micro-batches, none empty, none with more than
# $\lceil n / M \rceil$ rows, and among all such cuts one whose largest micro-batch has the **fewest places possible**. 44 rows in 12 must be cut
# within seconds. There are this many ways to do that:

# %% tags=["nbval-check-output"]
lengths = [5, 1, 1, 4, 3, 2, 6]
print(f"cuts of 44 rows into 12: {math.comb(43, 11):,}")
print("torch.chunk, 7 rows into 5:", [len(piece) for piece in torch.arange(7).chunk(5)])


# %% tags=["answer:split_rows"]
def split_rows(lengths, num_micro_batches):
    """The number of rows of each micro-batch, a list that adds up to len(lengths); lengths: tokens per row."""
    ### BEGIN SOLUTION
    cap = math.ceil(len(lengths) / num_micro_batches)
    limits = sorted({rows * length for rows in range(1, cap + 1) for length in lengths})
    for limit in limits:
        sizes, start = [], 0
        for others in reversed(range(num_micro_batches)):
            size, longest = 1, lengths[start]
            while size < cap and start + size + others < len(lengths):
                longest = max(longest, lengths[start + size])
                if (size + 1) * longest > limit:
                    break
                size += 1
            sizes.append(size)
            start += size
        if start == len(lengths):
            return sizes
    ### END SOLUTION


# %% [markdown]
# Your cut of the seven rows, in places:

# %%
from course_utils.checks.unit_05 import show_cut

mine = call(split_rows, lengths, 5)
if mine is not None:
    call(show_cut, lengths, mine)

# %% tags=["check:split_rows", "nbval-check-output"]
check("unit05.split_rows", split_rows)

# %% [markdown] tags=["solution"]
# **Why.** "Is this limit enough?" is easier than "which limit is the smallest?". Under a given limit every micro-batch may as well take as
# many rows as it can: what is left for the others only gets less. Only products of a number of rows and a length can be the answer, so
# these few are tried, small ones first. `others` is the number of rows that must be left, one for each micro-batch to come. (A limit below
# the longest row does no harm: that row stands alone then, and no cut can be better than the longest row.)
#
# **One wrong way:** `even_sizes` of the lesson. It gives $M$ micro-batches, but it does not look into them.


# %% tags=["solution", "nbval-check-output"]
def even_rows(lengths, num_micro_batches):
    size, larger = divmod(len(lengths), num_micro_batches)
    return [size + 1] * larger + [size] * (num_micro_batches - larger)


check("unit05.split_rows", even_rows)

# %% [markdown]
# ## 3 · Numbers for the report
# The last stage hands over its results one micro-batch at a time, and you report the mini-batch: mean loss per token, perplexity (the
# exponential of that loss), and accuracy, the share of tokens whose largest logit is the right one. **Target:** each within $10^{-4}$ of
# the whole batch's, with the logits of **one** micro-batch alive when the next is asked for.
#
# | | |
# | --- | --- |
# | `results` | an iterator of `(logits, targets)`; it can be gone through once |
# | `logits` | (rows, length, vocabulary), float32 or bfloat16; compute in float32 |
# | `targets` | (rows, length), 0 is padding; a micro-batch may be all padding |


# %% tags=["answer:token_metrics"]
def token_metrics(results):
    """(loss, perplexity, accuracy) of all tokens of a mini-batch, three numbers."""
    ### BEGIN SOLUTION
    loss, right, tokens = 0.0, 0, 0
    for logits, targets in results:
        real = targets != 0
        loss += cross_entropy(logits[real].float(), targets[real], reduction="sum").item()
        right += int((logits.argmax(dim=-1) == targets)[real].sum())
        tokens += int(real.sum())
    return loss / tokens, math.exp(loss / tokens), right / tokens
    ### END SOLUTION


# %% [markdown]
# Three micro-batches: one of 17 tokens, one of 1, one of 16.

# %%
from course_utils.checks.unit_05 import Results, make_results

mine = call(token_metrics, make_results(Results(((9, 8), (1,), (7, 9)), seed=0, dtype="float32")))
if mine is not None:
    call(print_numbers, "yours:", "loss {:.4f}, perplexity {:.4f}, accuracy {:.4f}", mine)

# %% tags=["check:token_metrics", "nbval-check-output"]
check("unit05.token_metrics", token_metrics)

# %% [markdown] tags=["solution"]
# **Why.** Sums and counts can be added up micro-batch by micro-batch, and they are single numbers. Ratios and exponentials cannot, so these come
# last. A micro-batch without tokens adds nothing to any sum and needs no case of its own.
#
# **One wrong way:** to collect a perplexity per micro-batch and to weigh it by its tokens. That is right for means, and perplexity is not one.


# %% tags=["solution", "nbval-check-output"]
def mean_of_perplexities(results):
    loss, perplexity, right, tokens = 0.0, 0.0, 0, 0
    for logits, targets in results:
        real = targets != 0
        count = int(real.sum())
        own = cross_entropy(logits[real].float(), targets[real], reduction="sum").item()
        loss += own
        perplexity += count * math.exp(own / max(count, 1))
        right += int((logits.argmax(dim=-1) == targets)[real].sum())
        tokens += count
    return loss / tokens, perplexity / tokens, right / tokens


check("unit05.token_metrics", mean_of_perplexities)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), section 2.2 · [torchtitan#2206](https://github.com/pytorch/torchtitan/pull/2206): tokens
# weighed wrongly · [DeepSpeed#7773](https://github.com/deepspeedai/DeepSpeed/issues/7773): sums of means · [torchtitan#1733](https://github.com/pytorch/torchtitan/issues/1733):
# scaled after every step · [Automodel#3530](https://github.com/NVIDIA-NeMo/Automodel/pull/3530): only the last micro-batch ·
# [PiPPy#192](https://github.com/pytorch/PiPPy/pull/192): `torch.chunk`.
