# %% [markdown] tags=["opening"]
# # 05 · Micro-batches
#
# **You will be able to** cut a mini-batch into micro-batches and add up their gradients to that of the whole, say what stays the
# same to the last bit and what does not, find the loss that weighs tokens wrongly, and say what more pieces save and cost.
#
# **You need** [lesson 04](04_naive_model_parallelism.ipynb), and the fingerprint of [lesson 02](02_cut_it.ipynb).
#
# **Minutes:** 30 to read, 1 to run. **New terms:** [mini-batch](00_start_here.ipynb#mini-batch),
# [gradient accumulation](00_start_here.ipynb#gradient-accumulation), [ragged](00_start_here.ipynb#ragged),
# [mean of means](00_start_here.ipynb#mean-of-means), [token-weighted loss](00_start_here.ipynb#token-weighted-loss).
#
# In the timeline of lesson 04 one stage worked while the other waited. The cure is to hand over *part* of the batch early. Before
# two processes may do that, one process must know that it changes no result: one cell aside, nothing is sent in this lesson.

# %% tags=["where"]
from course_utils.course_map import where

where("05")

# %% [markdown]
# ## A mini-batch, and its pieces
# Twelve numbers, and how many tokens each has to predict: one per digit, and one for the end. The rest of a row is padding.

# %% tags=["nbval-check-output"]
import torch

from course_utils.number_words import PAD, batch, split_numbers

torch.set_num_threads(1)  # as every stage has it
numbers = split_numbers(0, 999_999, training=300, held_out=0).training  # of each length about as many
mini_batch = batch(numbers, seed=0, step=3, size=12)
print("tokens per row:", (mini_batch.target_output != PAD).sum(dim=1).tolist())
print("tokens in all: ", mini_batch.num_tokens, "in", mini_batch.target_output.numel(), "places")

# %% [markdown]
# Rows of such different lengths are the trap of this lesson; keep them in mind. First: how many rows does each piece get?
# PyTorch has a function that sounds right, and its own pipeline project used it. Seven rows, five pieces:

# %% tags=["mistake", "nbval-check-output", "claim:chunk"]
rows = torch.arange(7)
sizes = [len(piece) for piece in rows.chunk(5)]
print("torch.chunk(rows, 5) gives pieces of", sizes)
assert len(sizes) == 4

# %% [markdown]
# *Four* pieces. `chunk` rounds the size of a piece up, to two rows, and stops when the rows are used up; it "does not actually
# guarantee that we get `chunks` chunks" ([PiPPy#192](https://github.com/pytorch/PiPPy/pull/192)). A stage that was promised five would wait for the fifth
# for ever. Better to fix the number of pieces, and let their sizes differ by one:


# %% tags=["nbval-check-output", "claim:even"]
def even_sizes(total, parts):
    """`total` things in `parts` groups whose sizes differ by at most one, larger ones first: 7 in 3 -> [3, 2, 2]."""
    size, larger = divmod(total, parts)
    return [size + 1] * larger + [size] * (parts - larger)


print("7 in 5:", even_sizes(7, 5), "  12 in 4:", even_sizes(12, 4), "  12 in 5:", even_sizes(12, 5))
assert all(len(even_sizes(n, m)) == m and sum(even_sizes(n, m)) == n for n in range(1, 40) for m in range(1, n + 1))

# %% [markdown]
# `Batch.split` cuts this way, and trims the padding of each piece to its own longest row. More pieces than rows are refused, because
# an empty piece has nothing to compute. Our four:

# %% tags=["nbval-check-output"]
pieces = mini_batch.split(4)
for m, piece in enumerate(pieces):
    print(f"micro-batch {m}: {piece.rows} rows of {piece.target_length} places, {piece.num_tokens} tokens")

# %% [markdown]
# ## A gradient is a sum
# The loss of a mini-batch is the sum over its tokens, divided by their number $N$. A sum may be taken in parts: give
# each micro-batch the sum over *its* tokens, divided by *all* $N$. The shares $L^m$ add up to the loss, and so do their gradients:
# $\nabla L(w) = \sum_m \nabla L^m(w)$. This is why the loss of [lesson 01](01_one_device.ipynb) takes the number of tokens as an argument:


# %%
def sum_over_tokens(logits, micro_batch, num_tokens):
    """A micro-batch's share of the loss: the sum over its tokens, divided by the tokens of the whole mini-batch."""
    targets = micro_batch.target_output.reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets, ignore_index=0, reduction="sum"
    )
    return losses / num_tokens


# %% [markdown] tags=["stub"]
# ## Write it first
# PyTorch adds every new gradient to what is in `.grad` already. So all it takes is a loop over the micro-batches: forward
# (`model((None, None), micro_batch)` gives `(logits, None)`), share of the loss, backward, the first micro-batch first. Leave the sum of the gradients in `.grad`.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def accumulate(model, micro_batches):
    """Add up the gradients of all micro-batches; return their shares of the loss, a list."""
    ...  # your turn: about seven lines


check("05.accumulate", accumulate)

# %% [markdown]
# ## The loop, ready for experiments
# For what follows the loop gets two knobs: in which order, and with which loss. It starts from a fresh model every time.

# %%
from types import SimpleNamespace

from course_utils.fingerprints import fingerprint, step_summary
from course_utils.stages import CutModel, by_count
from course_utils.transformer import TransformerConfig

config = TransformerConfig(d_model=64)


def run_pieces(micro_batches, order=None, share=sum_over_tokens):
    model, losses = CutModel(config, by_count(8, 1)).build(0, seed=0), {}
    num_tokens = sum(piece.num_tokens for piece in micro_batches)
    for m in order or range(len(micro_batches)):
        logits, _ = model((None, None), micro_batches[m])
        loss = share(logits, micro_batches[m], num_tokens)
        loss.backward()
        losses[m] = loss.detach()
    named = dict(model.named_parameters_globally())
    gradients = {name: parameter.grad for name, parameter in named.items()}
    return SimpleNamespace(gradients=gradients, losses=losses, bits=fingerprint([step_summary(losses, named.items())]))


# %% [markdown]
# ## What stays the same
# One piece or four: is it the same gradient? First the strings, then the distance. A gradient $g$ counts as close to
# $g'$ if $\|g - g'\|$ is at most $10^{-5}$ of its norm; for tiny gradients, of a thousandth of the global norm, that of
# all gradients together. (A gradient that ought to be zero is noise, and noise has nothing to be compared with.)


# %% tags=["claim:close"]
def is_close(g, other, all_gradients):
    global_norm = torch.stack([gradient.norm() for gradient in all_gradients]).norm()
    return (g - other).norm() <= 1e-5 * max(g.norm(), 1e-3 * global_norm)


one, four = run_pieces([mini_batch]), run_pieces(pieces)
print(f"one piece:   {one.bits}, loss {sum(one.losses.values()):.6f}")
print(f"four pieces: {four.bits}, loss {sum(four.losses.values()):.6f}")
assert all(is_close(g, four.gradients[name], one.gradients.values()) for name, g in one.gradients.items())
assert one.bits != four.bits

# %% [markdown]
# Close, in every parameter, and yet other bits. Floating-point addition rounds, so a sum that is taken in other parts ends in other last bits.
# Then what about the same four parts, added in another order?

# %% tags=["claim:order"]
descending = run_pieces(pieces, order=[3, 2, 1, 0])
again = run_pieces(pieces, order=[0, 1, 2, 3])
print("0, 1, 2, 3:", again.bits)
print("3, 2, 1, 0:", descending.bits)
assert again.bits == four.bits != descending.bits

# %% [markdown]
# So the course settles on one order: each stage takes its micro-batches *ascending*, forward and backward, in every schedule. Then equality with one
# device can be asked for, and it is: two stages, and three, run the same pieces in threads with the package's executor, also
# seven rows in five ragged pieces, which PyTorch's pipelining does not support
# ([pytorch#126600](https://github.com/pytorch/pytorch/issues/126600)). This is the one cell with messages in it.

# %% tags=["fingerprint", "claim:same-bits"]
from course_utils.pipeline import Pipeline
from course_utils.schedules import naive
from course_utils.threads import run_in_threads


def step_on_rank(worker, cut, micro_batches):
    stage = cut.build(worker.rank, seed=0)
    schedule = naive(cut.num_stages, len(micro_batches))
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after)
    num_tokens = sum(piece.num_tokens for piece in micro_batches)
    losses = pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens)
    return step_summary(losses, stage.named_parameters_globally())


for micro_batches in (pieces, batch(numbers, seed=0, step=1, size=7).split(5)):
    found = [run_pieces(micro_batches).bits]
    for K in (2, 3):
        cut = CutModel(config, by_count(8, K))
        found.append(fingerprint(run_in_threads(step_on_rank, K, cut, micro_batches)))
    print(f"M={len(micro_batches)}: one device {found[0]}, two stages {found[1]}, three stages {found[2]}")
    assert len(set(found)) == 1

# %% [markdown]
# One string per set of pieces. This is what "the same" will mean from now on: the same *pieces* give the same *bits*,
# whoever computes them.
#
# ## A mistake made on purpose
# What comes to mind first is the *mean* of each piece, and then the mean of the means. Frameworks had it too: torchtitan divided per micro-batch, which
# weighs tokens wrongly when micro-batches hold different numbers of them ([torchtitan#2206](https://github.com/pytorch/torchtitan/pull/2206)). By how much is the whole gradient off?

# %%
from course_utils.predictions import predict

guess = predict("error of the mean of means", M=4, unit="% of the gradient's norm", value=None)  # put your guess here


# %% tags=["mistake", "claim:mean-of-means"]
def mean_of_means(logits, micro_batch, num_tokens, M=4):
    return sum_over_tokens(logits, micro_batch, micro_batch.num_tokens) / M


def relative_error(wrong, right):
    pairs = [(wrong.gradients[name].flatten(), g.flatten()) for name, g in right.gradients.items()]
    wrong, right = (torch.cat(side) for side in zip(*pairs, strict=True))
    return ((wrong - right).norm() / right.norm()).item()


error = relative_error(run_pieces(pieces, share=mean_of_means), four)
assert error > 0.05
print(f"mean of means: {error:.0%} of the gradient's norm is wrong")

# %%
from course_utils.charts import describe_bars, describe_prediction, draw_bars, draw_prediction
from course_utils.plots import show

guess.settle(measured=100 * error)
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# Where does it come from? A token should weigh $1/N$. In a mean of means it weighs $1/(M N_m)$, and $N_m$ depends on who its neighbours happen to be. The bars show the ratio
# of the two, for a token of each piece; it should be 1.

# %%
weights = {
    f"micro-batch {m}, {p.num_tokens} tokens": mini_batch.num_tokens / (4 * p.num_tokens) for m, p in enumerate(pieces)
}
title = "weight of one token in a mean of means"

# %%
show(draw_bars(weights, "times its right weight", title), says=describe_bars(weights, "times its right weight", title))

# %% [markdown]
# Nothing crashed, and lesson 04 has shown how little a falling loss proves. The mistake goes unnoticed where all pieces hold equally many tokens, for
# example in a test with rows of one length. One division mends it, that of `sum_over_tokens`: by *all* tokens. Know them before the first backward, or scale
# every gradient once, before clipping and the update, as torchtune does ([torchtune#1917](https://github.com/meta-pytorch/torchtune/pull/1917)); here we divide first.

# %% tags=["claim:unnoticed"]
same_length = batch(range(100_000, 1_000_000), seed=0, step=0, size=12).split(4)
error = relative_error(run_pieces(same_length, share=mean_of_means), run_pieces(same_length))
print("tokens per piece:", [piece.num_tokens for piece in same_length], f"relative error {error:.2g}")
assert error < 1e-5

# %% [markdown]
# **The right division at the wrong time.** Backward on the plain sum, and the *printed* loss divided afterwards: the figure on the screen
# is right, the gradients are $N$ times too large ([torchtitan#2972](https://github.com/pytorch/torchtitan/issues/2972)).


# %% tags=["mistake", "claim:too-late"]
def undivided(logits, micro_batch, num_tokens):
    return sum_over_tokens(logits, micro_batch, 1)


late = run_pieces(pieces, share=undivided)
printed = sum(late.losses.values()) / mini_batch.num_tokens
ratio = late.gradients["07.head.linear.weight"].norm() / four.gradients["07.head.linear.weight"].norm()
assert abs(printed / sum(four.losses.values()) - 1) < 1e-5
assert abs(ratio / mini_batch.num_tokens - 1) < 1e-4
print(f"printed loss {printed:.4f}; gradient of the head {ratio:.1f} times too large, N = {mini_batch.num_tokens}")

# %% [markdown]
# Its relatives are as quiet: a division by $M$ at *every* stage, so that the first of two learns from $1/M^2$
# ([DeepSpeed#8152](https://github.com/deepspeedai/DeepSpeed/issues/8152)); gradients cleared between micro-batches, so that only
# the last one counts ([Automodel#3530](https://github.com/NVIDIA-NeMo/Automodel/pull/3530): "Loss looked fine", and only the gradient's norm gave it away).

# %% [markdown]
# ## Update once
# All shares must be gradients at the *same* weights: $w_{t+1} = w_t - \eta \sum_m \nabla L^m(w_t)$. So there is one update after the last micro-batch. An
# update after each one is another algorithm, with small batches:


# %% tags=["claim:once"]
def after_updates(groups):
    """The weights after one update per group of micro-batches."""
    model = CutModel(config, by_count(8, 1)).build(0, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in groups:
        optimizer.zero_grad()
        for piece in group:
            logits, _ = model((None, None), piece)
            sum_over_tokens(logits, piece, mini_batch.num_tokens).backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


at_once, once, each = (after_updates(groups) for groups in ([[mini_batch]], [pieces], [[piece] for piece in pieces]))
near, far = (once - at_once).norm(), (each - at_once).norm()
print(f"weights, distance from one piece: {near:.0e} with one update, {far:.0e} with four")
assert far > 100 * near

# %% [markdown]
# ## What more pieces cost
# Now the price, on the model and the batch size of [lesson 11](11_train_it_all.ipynb): 64 rows, in 1 to 16 pieces, on one device. The arithmetic is the same, however it is cut. How many times as
# long do 16 pieces take as one?

# %%
size = 64
time_guess = predict("time of 16 pieces over one", rows=size, unit="times as long", value=None)

# %%
import statistics
import time

model = CutModel(TransformerConfig(), by_count(8, 1)).build(0, seed=0)
big_batch = batch(range(100_000, 1_000_000), seed=0, step=0, size=size)
cuts = {M: big_batch.split(M) for M in (1, 2, 4, 8, 16)}


def loss_of(piece):
    logits, _ = model((None, None), piece)
    return sum_over_tokens(logits, piece, big_batch.num_tokens)


# %% [markdown]
# Other work on this machine would spoil a comparison, so the five take turns, and the median of each counts:

# %%
seconds = {M: [] for M in cuts}
for _ in range(5):
    for M, own in cuts.items():
        started = time.perf_counter()
        for piece in own:
            loss_of(piece).backward()
        seconds[M].append(time.perf_counter() - started)
milliseconds = {M: 1000 * statistics.median(taken) for M, taken in seconds.items()}
print({M: f"{taken:.0f} ms" for M, taken in milliseconds.items()})

# %%
time_guess.settle(measured=milliseconds[16] / milliseconds[1])
show(draw_prediction(time_guess), says=describe_prediction(time_guess))

# %% [markdown]
# If every micro-batch had a fixed cost, whatever it holds, the time would be a straight line: $M$ times that cost, plus the work on all rows. Is it?
# The fit is of the relative errors, as in [lesson 03](03_two_processes_that_talk.ipynb).

# %%
import numpy as np

from course_utils.charts import describe_lines, draw_lines

measured = np.array(list(milliseconds.values()))
fixed, work = np.polyfit(list(milliseconds), measured, 1, w=1 / measured)
line = {M: M * fixed + work for M in milliseconds}
off = max(abs(line[M] / taken - 1) for M, taken in milliseconds.items())
print(f"fixed cost of a micro-batch {fixed:.1f} ms, work on all rows {work:.0f} ms")
print(f"The times are {'close to' if off < 0.15 else 'not on'} a straight line here: it is at most {off:.0%} off.")
if fixed > 0:
    print(f"Here the fixed costs are half of the time at about M = {max(work, 0) / fixed:.1f}.")
else:
    print("No fixed cost can be seen here: perhaps other work disturbed the measurement. Run the two cells again.")

# %%
both = {"measured": milliseconds, "M times fixed + work": line}
show(draw_lines(both, "M", "ms"), says=describe_lines(both, "M", "ms"))

# %% [markdown]
# Where a fixed cost comes from can be counted. Every operation on a tensor has to be looked up, started and remembered for the backward, and a
# piece of four rows takes as many operations as one of 64:


# %% tags=["claim:operations"]
def operations(loss):
    """How many steps the walk back from a loss takes."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


per_piece = {M: operations(loss_of(own[0])) for M, own in cuts.items()}
print("operations in the walk back from one piece:", per_piece)
assert len(set(per_piece.values())) == 1

# %% [markdown]
# This is one reason why more micro-batches can make a pipeline *slower*: in
# [fairscale#51](https://github.com/facebookresearch/fairscale/issues/51) a benchmark took 30.72 s with one micro-batch, 53.51 s with two and 81.93 s with four.
#
# ## What more pieces save
# Autograd keeps what the backward will need, until it has run. If each piece's backward follows its forward, only one piece's share is kept
# at a time. Against one piece, how much is that with 16?

# %%
bytes_guess = predict("bytes kept with 16 pieces over one", rows=size, unit="of the bytes of one piece", value=None)

# %%
from torch.autograd.graph import saved_tensors_hooks

from course_utils.memory import storages


def peak_bytes(own, forwards_first=False):
    """The most bytes that autograd keeps at once. Tensors may share a storage: each counts once."""
    given = storages([*model.parameters(), *model.buffers(), big_batch.target_output, big_batch.source])
    kept, losses, peak = {}, [], 0

    def note(tensor):
        kept.update((storage, size) for storage, size in storages([tensor]).items() if storage not in given)
        return tensor.detach()

    for piece in own:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            losses.append(loss_of(piece))
        peak = max(peak, sum(size for storage, size in kept.items() if not storage.expired()))
        if not forwards_first:
            losses.pop().backward()
    return peak


# %% [markdown]
# `saved_tensors_hooks` calls `note` for every tensor that is kept; the references in `storages` are weak, so what is freed expires. The second line of the picture is for what comes next: all
# forwards first, as GPipe has it.

# %% tags=["claim:bytes"]
one_by_one = {M: peak_bytes(own) / 2**20 for M, own in cuts.items()}
forwards_first = {M: peak_bytes(own, forwards_first=True) / 2**20 for M, own in cuts.items()}
assert one_by_one[16] < one_by_one[1] / 8
assert 0.8 < forwards_first[16] / forwards_first[1] < 1.25
bytes_guess.settle(measured=one_by_one[16] / one_by_one[1], formula=1 / 16)
print(describe_prediction(bytes_guess))

# %%
both = {"backward after each forward": one_by_one, "all forwards first": forwards_first}
if bytes_guess.value is not None:
    both["your prediction"] = {1: one_by_one[1], 16: bytes_guess.value * one_by_one[1]}

# %%
show(draw_lines(both, "M", "MiB kept", log_x=True), says=describe_lines(both, "M", "MiB kept"))

# %% [markdown]
# With $M$ pieces one after the other about $1/M$ is kept: that is why gradient accumulation is used on single devices too. All forwards first keep
# as much as one large batch. The number of pieces is a choice between three prices, then: fixed costs, memory, and the time that stages wait, which is the reason for pieces in a pipeline and comes in the next two lessons.

# %% [markdown] tags=["summary"]
# ## What you know now
# - `torch.chunk` may give fewer pieces than you ask for. <!-- shown: chunk -->
# - Even sizes give exactly $M$ pieces, none empty. <!-- shown: even -->
# - Pieces and the whole give gradients that are close, with other last bits. <!-- shown: close -->
# - The order in which the pieces are added decides the last bits too. <!-- shown: order -->
# - The same pieces in the same order give the same bits on one device and on two or three stages. <!-- shown: same-bits -->
# - A mean of means weighs tokens wrongly when pieces hold different numbers of them. <!-- shown: mean-of-means -->
# - Where all pieces hold equally many, nobody sees it. <!-- shown: unnoticed -->
# - A division after the backward mends the printed loss only. <!-- shown: too-late -->
# - There is one update per mini-batch; one per micro-batch is another algorithm. <!-- shown: once -->
# - A piece takes as many operations as the whole: one source of the fixed cost. <!-- shown: operations -->
# - Pieces one after the other keep about $1/M$ of the bytes; all forwards first keep as much as the whole. <!-- shown: bytes -->
#
# **Kept for later:** `even_sizes` and `Batch.split` in `course_utils/number_words.py`; `sum_over_tokens` in `course_utils/pipeline.py`; the
# loop over the micro-batches in `plain_loop`, `course_utils/training.py`.
#
# **Practise:** set `size = 16` in the cell of the time's prediction, and run it and the cells after it again. Which of the two numbers of the line changes, and
# at which $M$ are the fixed costs half of the time now?
# Exercises: [unit 05](../exercises/05_micro_batches/05_micro_batches.ipynb).
#
# **Next:** [06 · The GPipe schedule](06_the_gpipe_schedule.ipynb)

# %% [markdown]
# ## Questions
# 1. With two micro-batches, would the descending order have given other bits?
# 2. Here the number of tokens of the whole mini-batch has to be known before the *first* backward. Why, and what could you do without it?
# 3. With `Adam` instead of SGD: how large is the harm of gradients that are $N$ times too large?
# 4. One step of $K$ equal stages takes $M + K - 1$ turns ([lesson 07](07_bubble_and_stash.ipynb)), and a turn $(f + W/M)/K$, with the fixed
#    cost $f$ and the work $W$ of your line. Which $M$ is the fastest?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. No: $a + b$ and $b + a$ round alike. From three on it matters which two are added first.
# 2. Each share is divided by it before its backward. Without it: backward on the plain sums, and divide every gradient once after the
#    last of them, before clipping and the update. The mistake above forgot to.
# 3. Small, as Adam divides by the size of the gradients. But clipping compares their norm with a fixed number, and then nearly
#    every step is clipped. A harm that depends on the optimizer is hard to find.
# 4. $(M + K - 1)(f + W/M)$ is smallest at $M = \sqrt{(K - 1)\,W/f}$: more stages want more pieces, a larger fixed cost wants fewer.
#
# And the loop:


# %% tags=["answers", "nbval-check-output"]
def accumulate(model, micro_batches):
    """Add up the gradients of all micro-batches; return their shares of the loss, a list."""
    num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
    losses = []
    for micro_batch in micro_batches:
        logits, _ = model((None, None), micro_batch)
        loss = sum_over_tokens(logits, micro_batch, num_tokens)
        loss.backward()
        losses.append(loss.detach())
    return losses


check("05.accumulate", accumulate)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, arXiv 1811.06965, sections 2.2 and 2.3 · PyTorch:
# [torch.chunk](https://docs.pytorch.org/docs/stable/generated/torch.chunk.html),
# [saved_tensors_hooks](https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-hooks),
# [cross_entropy](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html).
