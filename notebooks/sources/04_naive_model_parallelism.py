# %% [markdown] tags=["opening"]
# # 04 · Naive model parallelism
#
# **You will be able to** train a model whose stages live in different processes, each with its own weights and its
# own optimizer; show that it computes what one device computes; measure which share of the time a stage works; and
# say what this is good for all the same.
#
# **You need** [lesson 03](03_two_processes_that_talk.ipynb). **Minutes:** 20 to read, 1 to run.
#
# **New terms:** [naive model parallelism](00_start_here.ipynb#naive-model-parallelism),
# [utilisation](00_start_here.ipynb#utilisation), [timeline](00_start_here.ipynb#timeline),
# [makespan](00_start_here.ipynb#makespan).
#
# In lesson 03 one micro-batch crossed a border and its gradient came back, on two ranks, with code for each of them.
# Now the same for any number of stages, for a whole mini-batch, and with a stopwatch.

# %% tags=["where"]
from course_utils.course_map import where

where("04")

# %% [markdown]
# ## The two stages
# Eight blocks, four for each rank; a mini-batch of 64 numbers in four micro-batches. Look at the bytes: which of the
# two is the heavier?

# %% tags=["nbval-check-output", "claim:parts"]
from course_utils.number_words import batch
from course_utils.stages import CutModel, by_count, stage_table
from course_utils.transformer import TransformerConfig

config = TransformerConfig(d_model=128)
cut = CutModel(config, by_count(8, 2))
micro_batches = batch(range(1_000_000), seed=0, step=0, size=64).split(4)
num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
print(stage_table(cut.builders, cut.partition))

# %% [markdown]
# The decoder. What one stage holds the other does not, and no rank ever sees the whole.
#
# The simplest way to train them is *naive model parallelism*: one micro-batch at a time goes through all stages,
# forward and then backward, and only then the next one begins.

# %% [markdown] tags=["stub"]
# ## Write it first
# One step, the same function on every rank. For each micro-batch in turn stage $k$ receives activations, computes its
# forward and sends on; then it receives gradients, computes its backward and sends back. The first stage has nobody
# before it, the last nobody behind it: there the loss is made. From `course_utils.links` you have `send_carry(worker,
# tensors, peer, label)`; `receive_carry(worker, specs, peer, label)`, which returns a tuple with `None` in the empty
# places; and `present(tensors)`, the tensors that are not `None`. From [lesson 02](02_cut_it.ipynb) you have
# `cut.carry_after(stage, micro_batch.geometry)`, the specs of what a stage hands on.

# %% tags=["stub", "nbval-check-output"]
import torch

from course_utils.checks import check
from course_utils.links import present, receive_carry, send_carry
from course_utils.pipeline import sum_over_tokens


def naive_step(worker, stage, cut, micro_batches, num_tokens):
    """Add up the gradients of all micro-batches in `.grad`. Returns {micro-batch: its share of the loss} on the last
    rank, {} on the others. A share is `sum_over_tokens(logits, micro_batch, num_tokens)`."""
    ...  # your turn: about eighteen lines; `one_micro_batch` of lesson 03 is where to begin


check("04.naive_step", naive_step)

# %% [markdown]
# ## The step, with a stopwatch
# Here it is in full, and each forward and backward is noted in a `Timeline`: by rank, from when to when. Waiting and
# sending are not noted: whatever is not F or B is idle. Follow one micro-batch with your finger, first as rank 0,
# then as rank 1.

# %%
import time
from contextlib import contextmanager


@contextmanager
def noted(timeline, kind, stage, m):
    began = time.perf_counter()
    yield
    timeline.add(stage.index, kind, stage.index, m, began, time.perf_counter())


# %%
def timed_step(worker, stage, cut, micro_batches, num_tokens, timeline):
    k, losses = worker.rank, {}
    for m, micro_batch in enumerate(micro_batches):
        geometry, what, leaves = micro_batch.geometry, f"of micro-batch {m}", (None, None)
        if not stage.is_first:
            leaves = receive_carry(worker, cut.carry_after(k - 1, geometry), k - 1, f"the activations {what}")
        with noted(timeline, "F", stage, m):
            for leaf in present(leaves):
                leaf.requires_grad_()
            carry = stage(leaves, micro_batch)
            if stage.is_last:
                losses[m] = sum_over_tokens(carry[0], micro_batch, num_tokens)
        roots, gradients = losses.get(m), None  # the gradient of a loss is 1, and need not be given
        if not stage.is_last:
            send_carry(worker, carry, k + 1, f"the activations {what}")
            roots = present(carry)
            gradients = present(receive_carry(worker, cut.carry_after(k, geometry), k + 1, f"the gradients {what}"))
        with noted(timeline, "B", stage, m):
            torch.autograd.backward(roots, gradients)
        if not stage.is_first:
            send_carry(worker, [leaf.grad for leaf in present(leaves)], k - 1, f"the gradients {what}")
    return losses


# %% [markdown]
# Only the two `if not stage.is_first` and the two about the last stage know where a rank stands. Both sides of each
# message are in this one function. Whenever one rank sends, its partner's next message is the matching receive: that
# is why nothing deadlocks.
#
# Around it, what a rank does in a run. The first step only warms up; the second is kept.

# %%
from course_utils.fingerprints import StageRecord, fingerprint, step_summary
from course_utils.timeline import Timeline, merge


def two_steps(worker, cut, micro_batches, num_tokens):
    stage = cut.build(worker.rank, seed=0)
    for _ in range(2):
        stage.zero_grad()
        timeline = Timeline(worker.world_size, "naive model parallelism, measured", "seconds")
        losses = timed_step(worker, stage, cut, micro_batches, num_tokens, timeline)
    return timeline, step_summary(losses, stage.named_parameters_globally())


# %% [markdown]
# ## First the bits
# The baseline runs the same four micro-batches on one device, one after the other.

# %% tags=["fingerprint", "claim:same-bits"]
from course_utils.processes import launch
from course_utils.stages import one_thread

model = CutModel(config, by_count(8, 1)).build(0, seed=0)
losses = {}
with one_thread():
    for m, micro_batch in enumerate(micro_batches):
        logits, _ = model((None, None), micro_batch)
        losses[m] = sum_over_tokens(logits, micro_batch, num_tokens)
        losses[m].backward()
one_device = fingerprint([step_summary(losses, model.named_parameters_globally())])
results = launch(two_steps, 2, cut, micro_batches, num_tokens)
two_stages = fingerprint(summary for _, summary in results)
print("one device:", one_device)
print("two stages:", two_stages)
assert two_stages == one_device

# %% [markdown]
# The function never says "two". Four ranks, as threads this time:

# %% tags=["claim:four-stages"]
from course_utils.threads import run_in_threads

quarters = CutModel(config, by_count(8, 4))
four = run_in_threads(two_steps, 4, quarters, micro_batches, num_tokens)
print("four stages:", fingerprint(summary for _, summary in four))
assert fingerprint(summary for _, summary in four) == one_device

# %% [markdown]
# ## Then the time
# Two processes, two cores. The *makespan* is the time from the first start to the last end of a step, over all ranks.
# **Predict** the *utilisation*: the share of the makespan in which a rank computes, on average over both ranks.
#
# The intervals of two processes go on one axis. On one machine that is allowed: all its processes read the same
# `perf_counter`, and `merge` relies on it. Clocks of several machines differ, and `merge` must be told by how much.

# %%
from course_utils.predictions import predict

guess = predict("utilisation, naive", K=2, M=4, unit="share of the time", value=None)

# %% tags=["claim:utilisation"]
from itertools import pairwise

timeline = merge([timeline for timeline, _ in results])
in_order = sorted(timeline, key=lambda interval: interval.start)
for one, next_one in pairwise(in_order):
    assert one.end <= next_one.start  # at no moment do two ranks compute
assert timeline.efficiency <= 1 / 2
guess.settle(measured=timeline.efficiency, formula=1 / 2)
print(" ".join(f"{i.kind}{i.micro_batch} on rank {i.rank}," for i in in_order[:4]), "...")

# %%
from course_utils.charts import describe_prediction, draw_prediction
from course_utils.plots import describe_timeline, draw_timeline, show

show(draw_timeline(timeline), says=describe_timeline(timeline, with_bubble=False))

# %% [markdown]
# One works while the other waits, without exception: F0 on rank 1 needs what F0 on rank 0 made, B0 on rank 0 needs
# the gradient from rank 1, and the next micro-batch begins only after that. At any moment at most one of $K$ ranks
# computes, so together they cannot reach more than $1/K$. What is missing from $1/K$ is messages, and whatever else
# the machine had to do.

# %%
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# ## The package's version
# The executor of the course, `Pipeline`, runs this order too: it is a *schedule*, a list of actions for each rank,
# which [lesson 06](06_the_gpipe_schedule.ipynb) takes apart.

# %% tags=["nbval-check-output"]
from course_utils.schedules import naive

print(naive(num_stages=2, num_micro_batches=4).to_text())

# %% [markdown]
# What it adds to the step above: it takes any schedule, also with several stages on a rank; plans are compared before
# data moves (`agree`, lesson 03); a send is not waited for at once; it records waits and sends as well; and it can
# recompute, and compute in low precision with a loss scale, which later lessons bring. What must not change is the
# string.

# %% tags=["claim:package"]
from course_utils.pipeline import Pipeline
from course_utils.transfer import agree


def run_pipeline(worker, cut, schedule, micro_batches, num_tokens):
    stage = cut.build(worker.rank, seed=0)
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after)
    plan = pipeline.plan(micro_batches)
    agree(worker.transport, plan)
    losses = pipeline.step(micro_batches, plan, num_tokens)
    return step_summary(losses, stage.named_parameters_globally())


package = fingerprint(launch(run_pipeline, 2, cut, naive(2, 4), micro_batches, num_tokens))
print("the package:", package)
assert package == one_device

# %% [markdown]
# ## More stages
# With $K=4$ the share should fall to a quarter. This machine may not have four cores to show it, so the stages sleep
# instead of computing; messages, waits and processes are real. The picture says so.

# %%
guess = predict("utilisation, naive, emulated", K=4, M=4, unit="share of the time", value=None)

# %% tags=["claim:quarter"]
from course_utils.emulation import emulate

emulated = emulate(naive(4, 4), forward=0.01, backward=0.02)
assert 1 / 8 < emulated.efficiency <= 1 / 4
guess.settle(measured=emulated.efficiency, formula=1 / 4)
print(f"formula {1 / 4:.3f}, emulated {emulated.efficiency:.3f}")

# %%
says = f"{describe_timeline(emulated, with_bubble=False)} {describe_prediction(guess)}"
show(draw_timeline(emulated), says=says)

# %% [markdown]
# The more stages, the more stand still. More devices make this way of training no faster at all.
#
# ## Unequal stages
# Back to two stages: seven blocks on rank 0 and only the head on rank 1. **Predict:** how many times as long does a
# step take as with four and four?

# %%
guess = predict("time of a step, 7 + 1 blocks over 4 + 4", unit="times", K=2, value=None)

# %%
import statistics


def take_turns(worker, cuts, micro_batches, num_tokens, turns=5):
    return [[two_steps(worker, cut, micro_batches, num_tokens)[0] for cut in cuts] for _ in range(turns)]


lopsided = CutModel(config, (range(0, 7), range(7, 8)))
rank_0, rank_1 = launch(take_turns, 2, [cut, lopsided], micro_batches, num_tokens)
turns = [[merge(both) for both in zip(*turn, strict=True)] for turn in zip(rank_0, rank_1, strict=True)]
even, uneven = (statistics.median(step.makespan for step in steps) for steps in zip(*turns, strict=True))
guess.settle(measured=uneven / even, formula=1.0)
print(f"7 + 1 blocks take {uneven / even:.2f} times as long as 4 + 4")

# %%
from course_utils.charts import describe_bars, draw_bars

shares = {}
for name, steps in zip(["4 + 4 blocks", "7 + 1 blocks"], zip(*turns, strict=True), strict=True):
    for rank in (0, 1):
        shares[f"{name}, rank {rank}"] = statistics.median(step.utilisation(rank) for step in steps)
labels = {"unit": "share of the time", "title": f"Utilisation by rank, median of {len(turns)} turns"}

# %%
show(draw_bars(shares, **labels), says=describe_bars(shares, **labels))

# %% [markdown]
# The two ranks share the work in another way, but it is the same work: in the naive order a step takes the *sum* of
# all stages, wherever you cut. (The ratio differs from 1 by caches, messages and noise; run it again and see how
# much.) That is peculiar to this order. As soon as stages work at the same time the slowest one decides. Simulated,
# with a forward of 2 + 2 or of 3 + 1 units, and a backward like it:

# %% tags=["nbval-check-output", "claim:slowest"]
from course_utils.schedules import gpipe
from course_utils.simulation import simulate

for schedule, name in ((naive(2, 4), "naive"), (gpipe(2, 4), "GPipe")):
    balanced, skewed = (simulate(schedule, forward=f, backward=f).makespan for f in ([2, 2], [3, 1]))
    print(f"{name}: {balanced:g} with equal stages, {skewed:g} with unequal ones")
    assert (skewed > balanced) == (name == "GPipe")

# %% [markdown]
# ## Each rank its own optimizer
# Adam treats every weight by itself, so each rank simply steps an optimizer of its own over its own weights. No
# message should be needed. (What is *not* local, the norm for clipping, is the subject of [lesson 09](09_gradient_clipping.ipynb).) `learn` repeats
# one mini-batch, and tells of its rank the losses, the number of weights, which parameters never changed, and the
# digests of all weights.

# %%
from types import SimpleNamespace


def learn(worker, cut, micro_batches, num_tokens, steps, step=timed_step):
    stage = cut.build(worker.rank, seed=0)
    before = [weight.detach().clone() for weight in stage.parameters()]
    optimizer, curve, record = torch.optim.Adam(stage.parameters(), lr=1e-3), [], StageRecord()
    for _ in range(steps):
        optimizer.zero_grad()
        timeline = Timeline(worker.world_size, "not looked at")
        losses = step(worker, stage, cut, micro_batches, num_tokens, timeline)
        curve.append(sum(loss.item() for loss in losses.values()))
        optimizer.step()
    named = list(stage.named_parameters_globally())
    record.add_weights(named)
    unchanged = [name for (name, weight), old in zip(named, before, strict=True) if torch.equal(weight, old)]
    size = sum(weight.numel() for weight in stage.parameters())
    return SimpleNamespace(curve=curve, size=size, unchanged=unchanged, weights=record.summary())


# %% [markdown]
# One device with one optimizer, in a plain loop. Will the weights still agree to the last bit after five steps?

# %% tags=["fingerprint", "claim:weights"]
model, record = CutModel(config, by_count(8, 1)).build(0, seed=0), StageRecord()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
with one_thread():
    for _ in range(5):
        optimizer.zero_grad()
        for micro_batch in micro_batches:
            logits, _ = model((None, None), micro_batch)
            sum_over_tokens(logits, micro_batch, num_tokens).backward()
        optimizer.step()
record.add_weights(model.named_parameters_globally())
one_optimizer = fingerprint([record.summary()])
two_optimizers = fingerprint(rank.weights for rank in launch(learn, 2, cut, micro_batches, num_tokens, 5))
print("weights after five steps, one optimizer: ", one_optimizer)
print("weights after five steps, two optimizers:", two_optimizers)
assert two_optimizers == one_optimizer

# %% [markdown]
# They do: the stages exchanged activations and gradients, the optimizers nothing.


# %% [markdown]
# ## A mistake made on purpose
# Every rank takes the same number of blocks: the number of blocks divided by $K$. With 30 layers on 4 stages
# somebody's model had 28 ([Megatron-LM#1304](https://github.com/NVIDIA/Megatron-LM/issues/1304)), and torchtitan's
# DeepSeek lost layers the same way ([torchtitan#963](https://github.com/pytorch/torchtitan/pull/963)). A third
# decoder layer gives us nine blocks. Look for an error message.

# %% tags=["mistake", "nbval-check-output", "claim:lost"]
deeper = TransformerConfig(d_model=128, decoder_layers=3)
per_stage = 9 // 2
careless = CutModel(deeper, tuple(range(k * per_stage, (k + 1) * per_stage) for k in range(2)))
ranks = launch(learn, 2, careless, micro_batches, num_tokens, 10)
there = sum(rank.size for rank in ranks)
whole = sum(weight.numel() for weight in CutModel(deeper, by_count(9, 1)).build(0, seed=0).parameters())
print("the loss fell:", ranks[1].curve[-1] < ranks[1].curve[0])
print(f"{there:,} weights of {whole:,} are there; missing:", careless.builders[8].name)
assert there < whole

# %% [markdown]
# There is none. Here the missing block is the head: the loss takes the 128 numbers of the hidden state for scores of
# 128 words, and falls. A falling loss says that *something* learns. Count instead: every block must be in some stage,
# exactly once, and `by_count` sees to it, as does whoever draws up the table:

# %% tags=["nbval-check-output", "claim:counted"]
try:
    stage_table(careless.builders, careless.partition)
except ValueError as error:
    print(error)
careful = CutModel(deeper, by_count(9, 2))
there = sum(rank.size for rank in launch(learn, 2, careful, micro_batches, num_tokens, 1))
print(f"{there:,} weights of {whole:,} are there")
assert there == whole

# %% [markdown]
# ## What it is good for all the same
# Not speed. But each rank holds only its own weights, gradients, Adam's numbers and graphs. Suppose a device has room
# for less than the whole: then this way of training works and one device does not. **Predict** the peak of the
# heavier rank, as a share of one device's peak.

# %%
guess = predict("peak of the heavier rank over one device", K=2, unit="share", value=None)

# %% tags=["claim:fits"]
from course_utils.memory import measure_memory, memory_table
from course_utils.recipes import TrainingConfig

recipe = TrainingConfig(stages=2, micro_batches=4, schedule="naive", model=config)
ranks = measure_memory(recipe)
(alone,) = measure_memory(TrainingConfig(stages=1, micro_batches=4, schedule="naive", model=config))
heavier = max(rank.peak for rank in ranks)
assert sum(rank.stages[0].parameters for rank in ranks) == alone.stages[0].parameters
assert heavier < alone.peak
guess.settle(measured=heavier / alone.peak, formula=1 / 2)
print("one device:", memory_table([alone]), "two stages:", memory_table(ranks), sep="\n")

# %%
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# The weights add up exactly: nothing is held twice. The heavier rank is above one half, because the stages are not
# equal, and *messages* are new. (On one device the 4 bytes there are the loss, just computed and in no stash.) With
# $K$ stages a model may be about $K$ times as large, at the speed of one device. [Lesson
# 06](06_the_gpipe_schedule.ipynb) makes the other ranks work meanwhile; for that the mini-batch must first be cut in
# a way that changes no result.

# %% [markdown] tags=["summary"]
# ## What you know now
# - Two stages divide the weights; what one holds the other does not. <!-- shown: parts -->
# - The naive step over two processes has the bits of one device. <!-- shown: same-bits -->
# - The same function runs on four ranks, with the same bits. <!-- shown: four-stages -->
# - At no moment do two ranks compute, so utilisation is at most 1/2. <!-- shown: utilisation -->
# - The package's executor with the naive schedule gives the same string. <!-- shown: package -->
# - With four stages the utilisation is at most 1/4. <!-- shown: quarter -->
# - In the naive order the sum of the stages decides, in GPipe's the slowest. <!-- shown: slowest -->
# - With an optimizer on each rank the weights after five steps have the bits of one device. <!-- shown: weights -->
# - A cut that loses a block trains without an error. <!-- shown: lost -->
# - Counting weights against the whole model finds it. <!-- shown: counted -->
# - Each rank needs less memory than one device, and no weight is held twice. <!-- shown: fits -->
#
# **Kept for later:** the executor in `course_utils/pipeline.py`; `naive` in `course_utils/schedules.py`; `Timeline`
# and `merge` in `course_utils/timeline.py`; `measure_memory` in `course_utils/memory.py`.
#
# **Practise:** in a copy of `timed_step` let rank 0 `continue` with the next micro-batch as soon as it has sent, and
# let rank 1 send nothing back. Train with it: `launch(learn, 2, cut, micro_batches, num_tokens, 10, your_step)`. Does
# the loss on rank 1, `curve`, fall? Which weights are `unchanged`, and what else would have told you?
# Exercises: [unit 04](../exercises/04_naive_model_parallelism/04_naive_model_parallelism.ipynb).
#
# **Next:** [05 · Micro-batches](05_micro_batches.ipynb)

# %% [markdown]
# ## Questions
# 1. Why can the utilisation of one rank be above 1/2, with two ranks?
# 2. Would two micro-batches instead of four change the utilisation?
# 3. Which of the two ranks could begin to work earlier without changing any result, and on what?
# 4. Why does Adam need no message between the ranks?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. The bound holds for the average. A stage that has most of the work computes most of the time, and the other one
#    all the less.
# 2. No. Each micro-batch passes through all stages alone, and the next one waits; only the weight of the messages
#    changes.
# 3. Rank 0: the forward of micro-batch 1 needs nothing of rank 1. It could run while rank 1 computes micro-batch 0.
#    That is GPipe.
# 4. Its step for a weight depends on that weight's gradients alone, and they are where the weight is.
#
# The step without a stopwatch:


# %% tags=["answers", "nbval-check-output"]
def naive_step(worker, stage, cut, micro_batches, num_tokens):
    k, losses = worker.rank, {}
    for m, micro_batch in enumerate(micro_batches):
        geometry, leaves = micro_batch.geometry, (None, None)
        if not stage.is_first:
            leaves = receive_carry(worker, cut.carry_after(k - 1, geometry), k - 1, f"activations {m}")
            for leaf in present(leaves):
                leaf.requires_grad_()
        carry = stage(leaves, micro_batch)
        if stage.is_last:
            losses[m] = sum_over_tokens(carry[0], micro_batch, num_tokens)
            losses[m].backward()
        else:
            send_carry(worker, carry, k + 1, f"activations {m}")
            gradients = receive_carry(worker, cut.carry_after(k, geometry), k + 1, f"gradients {m}")
            torch.autograd.backward(present(carry), present(gradients))
        if not stage.is_first:
            send_carry(worker, [leaf.grad for leaf in present(leaves)], k - 1, f"gradients {m}")
    return losses


check("04.naive_step", naive_step)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), section 2.2 and figure 2b (naive
# model parallelism) · Narayanan et al., 2021, *Efficient Large-Scale Language Model Training*, [arXiv
# 2104.04473](https://arxiv.org/abs/2104.04473), section 2.2 · PyTorch:
# [torch.distributed](https://docs.pytorch.org/docs/stable/distributed.html), "Point-to-point communication";
# [torch.autograd.backward](https://docs.pytorch.org/docs/stable/generated/torch.autograd.backward.html).
