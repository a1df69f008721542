# %% [markdown] tags=["opening"]
# # 07 · The bubble and the stash
#
# **You will be able to** say how much time a schedule loses and how much memory it needs, derive both, measure both, and pay for one with
# the other.
#
# **You need** lesson [06](06_the_gpipe_schedule.ipynb). **Minutes:** 35 to read, 1 to run.
#
# **New terms:** [bubble](00_start_here.ipynb#bubble), [ideal time](00_start_here.ipynb#ideal-time), [stash](00_start_here.ipynb#stash),
# [peak stash](00_start_here.ipynb#peak-stash), [re-materialisation](00_start_here.ipynb#re-materialisation),
# [1F1B](00_start_here.ipynb#1f1b).
#
# The staircase of lesson 06 had grey corners, and its executor a dictionary called `stash`. These are the two prices of a pipeline.

# %% tags=["where"]
from course_utils.course_map import where

where("07")

# %% [markdown]
# ## Count the dots
# Here is GPipe with $K = 4$ and $M = 4$ again. Count the dots in each row.

# %% tags=["nbval-check-output"]
from course_utils.schedules import gpipe
from course_utils.simulation import simulate, staircase

picture = staircase(gpipe(4, 4))
print(picture)
print("dots per row:", [row.count(" .") for row in picture.splitlines()[:4]])

# %% [markdown]
# Six in every row: $K-1$ for the forwards and $K-1$ for the backwards. The last stage gets its first micro-batch after $K-1$ forwards, the first
# stage its last gradient $K-1$ backwards after the last stage is done. So a step lasts as long as $M+K-1$ forwards and backwards,
# and every rank computes for $M$ of them. The rest is the *bubble*:
#
# $$\text{of the total time: } \frac{K-1}{M+K-1} \qquad\qquad \text{of the ideal time: } \frac{K-1}{M}$$
#
# GPipe (2019) states the first, Megatron-LM (2021) and Llama 3 (2024) the second: they divide by the time that a step would take if no rank
# ever waited. If $b$ is the first, $b/(1-b)$ is the second. Whether a backward takes as long as a forward or twice as long makes no
# difference:

# %% tags=["nbval-check-output", "claim:formula"]
for K, M in [(4, 4), (4, 16), (8, 32)]:
    for backward in (1, 2, 3):
        step = simulate(gpipe(K, M), forward=1, backward=backward)
        assert abs(step.bubble_of_total - (K - 1) / (M + K - 1)) < 1e-12
        assert abs(step.bubble_of_ideal - (K - 1) / M) < 1e-12
    print(f"K={K}, M={M}: {step.bubble_of_total:.2%} of the total time, {step.bubble_of_ideal:.2%} of the ideal time")

# %% [markdown]
# The same bubble has two figures. A figure without its base says nothing.
#
# ## Measure it
# A step is recorded, and the bubble is all the time of all ranks in which they do not compute, divided by all their time: waits, sends and
# standing still together. With four stages and eight micro-batches, which share will it be?

# %%
from course_utils.predictions import predict

guess = predict("bubble", K=4, M=8, unit="share of the total time", value=None)  # for example 0.3

# %% [markdown]
# Four and eight stages are emulated: real processes, real messages, the package's executor, and stages that
# sleep instead of computing, because this notebook cannot count on eight idle cores. `emulate_rank` is what `emulate` of lesson 06 runs in each
# process; here one launch runs all $M$. A message is a tensor of 8 x 16 x 128, and the second of two steps is recorded.

# %%
from course_utils.emulation import emulate_rank
from course_utils.processes import launch


def emulated(worker, sizes):
    """The timelines of one rank, one per M."""
    K = worker.world_size
    seconds = {"forward": [0.005] * K, "backward": [0.010] * K, "recompute": [0.005] * K}  # of each stage
    return [emulate_rank(worker, gpipe(K, M), seconds, message_shape=(8, 16, 128), steps=2) for M in sizes]


# %% [markdown]
# Every rank has returned its own timelines; for each $M$, `merge` puts those of all ranks together.

# %%
from course_utils.timeline import Timeline, merge

measured, sizes = {}, (1, 2, 4, 8, 16, 32)
for K in (4, 8):
    steps = zip(*launch(emulated, K, sizes), strict=True)
    measured[K] = {M: merge(step).bubble_of_total for M, step in zip(sizes, steps, strict=True)}
guess = guess.settle(measured=measured[4][8], formula=(4 - 1) / (8 + 4 - 1))
{K: {M: round(share, 3) for M, share in row.items()} for K, row in measured.items()}

# %% [markdown]
# Two stages are real: the Transformer of the course, encoder and decoder, on a mini-batch of 64 rows. The numbers have six
# digits, so all micro-batches have one shape; few of them are enough, and none is held out, because nothing is learned here.

# %%
from course_utils.number_words import batch
from course_utils.recipes import TrainingConfig

config = TrainingConfig(stages=2, micro_batches=8, lowest=100_000, training_numbers=2_000, held_out=0)
whole = batch(range(100_000, 1_000_000), seed=0, step=0, size=64)

# %% [markdown]
# What a rank does: `record_step` is the step of lesson 06 with a timeline. In `take_turns` one schedule after the other runs a step, five times
# over, and the first turn only warms up.

# %%
from course_utils.pipeline import Pipeline
from course_utils.transfer import agree


def record_step(worker, stage, schedule):
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, config.cut.carry_after)
    pipeline.timeline = Timeline(worker.world_size, "measured", "seconds")
    micro_batches = whole.split(schedule.num_micro_batches)
    agree(worker.transport, plan := pipeline.plan(micro_batches))
    pipeline.step(micro_batches, plan, whole.num_tokens)
    return pipeline.timeline


def take_turns(worker, schedules):
    stage = config.cut.build(worker.rank, config.seed)
    return [[record_step(worker, stage, schedule) for schedule in schedules] for turn in range(5)][1:]


# %% [markdown]
# `run_real` puts the two ranks' timelines together. Of the four steps of each $M$ the median counts.

# %%
from statistics import median


def run_real(schedules):
    """For each schedule its steps, each a timeline of both ranks."""
    rank_0, rank_1 = launch(take_turns, 2, schedules)
    turns = [[merge(both) for both in zip(*turn, strict=True)] for turn in zip(rank_0, rank_1, strict=True)]
    return list(zip(*turns, strict=True))


runs = dict(zip(sizes, run_real([gpipe(2, M) for M in sizes]), strict=True))
measured[2] = {M: median(step.bubble_of_total for step in steps) for M, steps in runs.items()}

# %% tags=["claim:sweep"]
for K, row in measured.items():
    assert row[1] > (K - 1) / K - 1e-6, "with one micro-batch GPipe is naive: one stage works at a time"
    assert min(row.values()) < row[1]


# %%
def draw_sweep():
    figure, axes = new_figure(3.6)
    for K, colour in {2: "#0072b2", 4: "#d55e00", 8: "#009e73"}.items():
        axes.plot(range(1, 33), [(K - 1) / (M + K - 1) for M in range(1, 33)], ":", color=colour)  # the formula
        how = "real" if K == 2 else "emulated compute, real messages"
        axes.plot(measured[K].keys(), measured[K].values(), "o-", color=colour, label=f"K={K}, {how}")
    if guess.value is not None:
        axes.plot(8, guess.value, "k*", markersize=12, label="your prediction, K=4, M=8")
    axes.set(xscale="log", xlabel="M, micro-batches", ylabel="bubble, share of the total time", ylim=(0, 1))
    axes.set_xticks(sizes, [str(M) for M in sizes])
    axes.set_title("GPipe's bubble: dotted the formula, points measured")
    axes.legend()
    return figure


# %%
from course_utils.charts import describe_lines, describe_prediction
from course_utils.plots import new_figure, show

above = sum(share > (K - 1) / (M + K - 1) for K, row in measured.items() for M, share in row.items())
points = describe_lines({f"K={K}": row for K, row in measured.items()}, "M", "measured bubble, share of the total time")
show(draw_sweep(), says=f"{points} {above} points lie above the formula. {describe_prediction(guess)}")

# %% [markdown]
# A point above its dotted line has lost time to what the formula does not know: messages, the executor, other work of this machine. The real
# stages have one more reason. The table divides one step of $M=8$:

# %%
from course_utils.breakdown import describe

print(describe(runs[8][0], gpipe(2, 8)))

# %% [markdown]
# Only the column *schedule* is the bubble of the formula, as an estimate: the idle time that a simulation with equal stages has, divided by
# the real step. A real step is longer, so the share may be below the formula's. *Slow neighbour* is what a simulation with the
# measured stage times has besides, the price of unequal stages ([lesson 02](02_cut_it.ipynb) balances them); more micro-batches do not lower it.
# *Sending* is measured: checking, copying and posting messages. *Rest* is what is left: messages under way, stages that take longer one time than another, the
# executor. If the system takes the core from a process inside `F` or `B`, that time counts as *compute*.
#
# More micro-batches are not free either:

# %%
times = {M: median(step.makespan for step in steps) * 1000 for M, steps in runs.items()}
print("milliseconds per step:", {M: round(time) for M, time in times.items()})
best = min(times, key=times.get)
print(f"The bubble is smallest at M={min(measured[2], key=measured[2].get)}, the step is fastest at M={best} here.")
if best == 1:
    print("This small model does not profit: more micro-batches cost more time than they save.")

# %% [markdown]
# Each micro-batch has a fixed price ([lesson 05](05_micro_batches.ipynb)). A smaller share of a longer step may be a loss.
#
# ## A mistake made on purpose
# "How do I measure the bubble?" is a question that users ask again and again
# ([Megatron-LM#691](https://github.com/NVIDIA/Megatron-LM/issues/691),
# [zero-bubble#18](https://github.com/sail-sg/zero-bubble-pipeline-parallelism/issues/18)). Tools answer it with a table. The command-line tool
# [pipenaut](https://pypi.org/project/pipenaut/) 0.1.7 gives 43 % for GPipe and 19 % for 1F1B, and does not say that it changes $M$. In
# *1F1B* (one forward, one backward) a stage begins each backward as soon as it can, and takes turns from then on; the last section draws it. One way to get just these figures:

# %% tags=["mistake", "nbval-check-output", "claim:wrong-base"]
from course_utils.schedules import one_f_one_b

table = {
    "GPipe": simulate(gpipe(4, 4)).bubble_of_total,
    "1F1B": simulate(one_f_one_b(4, 16)).bubble_of_ideal,
}
print({name: f"{bubble:.0%}" for name, bubble in table.items()})
assert table["1F1B"] < table["GPipe"] / 2

# %% [markdown]
# It looks as if 1F1B halved the bubble. Two things differ besides the schedule: $M$, and what the idle time is divided by. Mended:

# %% tags=["nbval-check-output", "claim:same-bubble"]
for M in (4, 16):
    steps = {"GPipe": simulate(gpipe(4, M), backward=2), "1F1B": simulate(one_f_one_b(4, M), backward=2)}
    print(f"M={M}:", {name: f"{step.bubble_of_total:.1%} of the total time" for name, step in steps.items()})
    assert steps["GPipe"].bubble_of_total == steps["1F1B"].bubble_of_total

# %% [markdown]
# At equal $M$, with equal stages and free messages, the two bubbles are equal. Without one of these they are not. Look which schedule is the faster:

# %% tags=["nbval-check-output", "claim:apart"]
for costs in ({"backward": 2, "transfer": 1}, {"forward": [1, 1, 2, 1], "backward": [2, 2, 4, 2]}):
    spans = {name: simulate(f(4, 8), **costs).makespan for name, f in {"GPipe": gpipe, "1F1B": one_f_one_b}.items()}
    print(costs, spans)
    assert spans["GPipe"] != spans["1F1B"]

# %% [markdown]
# GPipe is faster where messages take time: 1F1B has fewer micro-batches under way and waits more often. With these unequal stages 1F1B is. What it
# saves always is something else, and to see it you have to count.

# %% [markdown] tags=["stub"]
# ## Write it first
# A forward leaves what its backward needs; the backward frees it. What is kept in between is the *stash*, counted in micro-batches.
# Write the function that gives, for each rank of a schedule (without recomputation), the most micro-batches that it keeps at once.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def count_stash(schedule):
    """For each row of schedule.actions the highest number of forwards whose backward is still to come."""
    ...  # your turn: about seven lines


check("07.count_stash", count_stash)

# %% [markdown]
# The package's function, for four stages and eight micro-batches:

# %% tags=["nbval-check-output", "claim:counts"]
from course_utils.schedules import naive
from course_utils.simulation import peak_stash

for schedule in (naive, gpipe, one_f_one_b):
    print(f"{schedule.__name__:12}", peak_stash(schedule(4, 8)))
assert peak_stash(gpipe(4, 8)) == [8, 8, 8, 8]

# %% [markdown]
# GPipe keeps all $M$: no backward begins before the last forward. So the cure of the bubble, more micro-batches, is paid for in memory. In bytes: eight rows per
# micro-batch, and $M$ of them. How many times as much will stage 0 keep with $M=8$ as with $M=2$?

# %%
growth = predict("stash of stage 0 over that of M=2", M=8, unit="times", value=None)  # for example 2

# %% tags=["claim:bytes"]
from dataclasses import replace

from course_utils.memory import measure_memory, predict_stash
from course_utils.threads import run_in_threads


def stash_of(schedule):
    """Bytes per rank: counted in a run of the real model, and compared with what the schedule predicts."""
    M = schedule.num_micro_batches
    ranks = measure_memory(replace(config, micro_batches=M, batch_size=8 * M), schedule, run=run_in_threads)
    kept = {stage.stage: stage.micro_batches for rank in ranks for stage in rank.stages}
    assert [rank.stash for rank in ranks] == predict_stash(schedule, kept)
    return [rank.stash for rank in ranks]


stash = {M: stash_of(gpipe(2, M)) for M in (2, 4, 8)}
for M, ranks in stash.items():
    print(f"M={M}: {ranks[0]:,} bytes on stage 0, {ranks[1]:,} on stage 1")
    assert [2 * kept for kept in ranks] == [M * kept for kept in stash[2]]
growth = growth.settle(measured=stash[8][0] / stash[2][0], formula=8 / 2)

# %%
from course_utils.charts import draw_prediction

show(draw_prediction(growth), says=describe_prediction(growth))

# %% [markdown]
# To the byte: the schedule predicts the memory. If you cut
# one mini-batch of a fixed size into more pieces instead, each piece shrinks and the stash stays about the same: then it is the mini-batch that is limited.
#
# ## Keep less, compute again
# *Re-materialisation* keeps of each micro-batch only what the stage received, and computes the forward once more, `R`, just before its
# backward.

# %% tags=["nbval-check-output"]
from course_utils.schedules import rematerialise

again = rematerialise(gpipe(2, 3), "always")
print(staircase(again, forward=1, backward=2))
print("graphs kept at once:", peak_stash(again))

# %% tags=["claim:remat-bytes"]
saved = stash_of(rematerialise(gpipe(2, 8), "always"))
for rank, (before, after) in enumerate(zip(stash[8], saved, strict=True)):
    print(f"stage {rank}: {before:,} bytes, with re-materialisation {after:,}: {before / after:.1f} times less")
    assert after < before / 4

# %% [markdown]
# One graph at a time is left, and on stage 1 the inputs of all micro-batches; stage 0 receives nothing but token ids. The price is time: one more forward per
# micro-batch, a third of $F+B$ if $B$ takes twice as long as $F$. How many times as long does a step take then?

# %%
price = predict("step time with re-materialisation", K=2, M=8, unit="times that without", value=None)  # for example 1.5

# %%
ways = [rematerialise(gpipe(2, 8), policy) for policy in ("never", "always")]
never, always = (median(step.makespan for step in steps) for steps in run_real(ways))
expected = [simulate(schedule, backward=2).makespan for schedule in ways]
price = price.settle(measured=always / never, formula=expected[1] / expected[0])

# %%
show(draw_prediction(price), says=describe_prediction(price))

# %% [markdown]
# The formula's value is below $4/3$, because the first recomputation of stage 0 fills a part of its wait. torchgpipe (2020) reports about 25 % for its models. Does it change
# what is computed? Dropout is on, at 0.1, and draws random masks:

# %% tags=["fingerprint", "claim:same-bits"]
from course_utils.training import train, train_on_one_device

short = replace(config, steps=4)
strings = {policy: train(replace(short, rematerialisation=policy)).fingerprint for policy in ("never", "always")}
strings["one device"] = train_on_one_device(short).fingerprint
for name, string in strings.items():
    print(string, name)
assert len(set(strings.values())) == 1

# %% [markdown]
# The masks come from a generator that is seeded by step, micro-batch and block, so the second forward draws the same ones. With
# the global generator it would draw others, and the gradients would belong to another forward, unless its state is restored, as
# `torch.utils.checkpoint` does.
#
# ## What GPipe measured
# Table 2 of the paper has the throughput of a Transformer with 48 layers, relative to $K=2$, $M=1$. If all stages were equal and messages free it would be
# $KM/(M+K-1)$. Where does the paper's figure lie above that?

# %% tags=["nbval-check-output", "claim:table-2"]
transformer = {1: (1, 1.07, 1.3), 4: (1.7, 3.2, 4.8), 32: (1.8, 3.4, 6.3)}  # Huang et al., 2019, Table 2
amoebanet = {1: (1, 1.13, 1.38), 4: (1.07, 1.26, 1.72), 32: (1.21, 1.84, 3.48)}
print("        formula  Transformer-48  AmoebaNet-D")
for M in transformer:
    for K, *published in zip((2, 4, 8), transformer[M], amoebanet[M], strict=True):
        formula = K * M / (M + K - 1)
        marked = [f"{value:.2f} {'above' * (value > formula):5}" for value in published]
        print(f"M={M:<2} K={K}{formula:7.2f}  {marked[0]:>14}  {marked[1]:>11}".rstrip())
        assert M != 4 or published[0] > formula

# %% [markdown]
# No schedule with one stage per rank and one flush per step (the pipeline runs empty at its end) can beat the formula at an equal batch. The
# Transformer does with $M=4$ throughout, and both models do with $M=1$ from $K=4$ on. The table's caption has the reason: the batch
# size was adjusted to fit memory. More stages can leave room for a larger batch, and larger matrix products run faster. So the table shows a shape, not
# a bubble. AmoebaNet-D, whose layers are unequal, stays far below with $M=32$: that is the column *slow neighbour*.
#
# ## A look ahead: one forward, one backward
# GPipe keeps everything because its backwards come late. 1F1B begins each backward as soon as it can (Narayanan et al., 2021):

# %% tags=["nbval-check-output", "claim:1f1b"]
for name, schedule in {"GPipe": gpipe(4, 8), "1F1B": one_f_one_b(4, 8)}.items():
    step = simulate(schedule)
    print(f"{name}: makespan {step.makespan:g}, bubble {step.bubble_of_total:.4f}, peak stash {peak_stash(schedule)}")
    print(staircase(schedule).rpartition("\n")[0], end="\n\n")
    assert step.makespan == 22 and abs(step.bubble_of_total - 3 / 11) < 1e-12
assert peak_stash(one_f_one_b(4, 8)) == [min(8, 4 - k) for k in range(4)]

# %% [markdown]
# The dots have moved, their number has not. Stage $k$ keeps $\min(M, K-k)$ micro-batches, however large $M$ grows: now more micro-batches cost no memory. In bytes, for two stages:

# %% tags=["claim:1f1b-bytes"]
early = {M: stash_of(one_f_one_b(2, M)) for M in (2, 4, 8)}
for M, ranks in early.items():
    print(f"M={M}: GPipe {stash[M]}, 1F1B {ranks}")
assert early[8] == early[2] and [8 * early[8][k] for k in range(2)] == [(2 - k) * stash[8][k] for k in range(2)]

# %%
lines = {"GPipe": stash, "1F1B": early}
kept = {f"{name}, stage 0": {M: row[0] / 2**20 for M, row in rows.items()} for name, rows in lines.items()}

# %%
from course_utils.charts import draw_lines

axes = ("M", "MiB of stash", "Eight rows per micro-batch")
show(draw_lines(kept, *axes), says=describe_lines(kept, *axes))

# %% [markdown]
# GPipe's line rises with $M$, that of 1F1B is level: more micro-batches make the bubble small, and stage 0 still keeps only $K$ of them.

# %% [markdown] tags=["summary"]
# ## What you know now
# - GPipe's bubble is $(K-1)/(M+K-1)$ of the total time, which is $(K-1)/M$ of the ideal time. <!-- shown: formula -->
# - Measured, it is at least $(K-1)/K$ with one micro-batch, and more micro-batches lower it. <!-- shown: sweep -->
# - Figures with another $M$ and another base make 1F1B look better than it is. <!-- shown: wrong-base -->
# - At equal $M$, with equal stages and free messages, 1F1B and GPipe have one bubble. <!-- shown: same-bubble -->
# - Messages that take time, or unequal stages, tell them apart. <!-- shown: apart -->
# - GPipe keeps $M$ micro-batches on every stage. <!-- shown: counts -->
# - The schedule predicts the stash to the byte, and it grows with $M$. <!-- shown: bytes -->
# - Re-materialisation keeps less than a quarter of it here. <!-- shown: remat-bytes -->
# - It changes no bit, with dropout on. <!-- shown: same-bits -->
# - GPipe's own table lies above the formula at $M=4$: its batches differ. <!-- shown: table-2 -->
# - 1F1B, with equal stages and free messages: the same makespan and bubble, a stash of $\min(M, K-k)$. <!-- shown: 1f1b -->
# - Its bytes do not grow with $M$. <!-- shown: 1f1b-bytes -->
#
# **Kept for later:** `bubble_of_total`, `bubble_of_ideal` in `course_utils/timeline.py`; `peak_stash` in `simulation.py`; `measure_memory`,
# `predict_stash` in `memory.py`; `rematerialise`, `one_f_one_b` in `schedules.py`; `describe` in `breakdown.py`.
#
# **Practise:** with stages that take 1, 1, 2, 1 forward and twice that backward, simulate $K=4$, $M=8$. Which $M$ brings the bubble
# below 30 % of the total time? Is there one?
# Exercises: [unit 07](../exercises/07_bubble_and_stash/07_bubble_and_stash.ipynb).
#
# **Next:** [08 · Mixed precision](08_mixed_precision.ipynb).

# %% [markdown]
# ## Questions
# 1. $K=8$. How large must $M$ be for a bubble of at most 10 % of the total time? And of the ideal time?
# 2. Why does the bubble of equal stages not depend on how long a backward takes?
# 3. A stage is twice as slow as the others. Does a larger $M$ help?
# 4. Re-materialisation makes every step longer. When does it make training faster all the same?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. $7/(M+7) \le 0.1$ gives $M \ge 63$; $7/M \le 0.1$ gives $M \ge 70$.
# 2. Every rank is idle for $K-1$ forwards and $K-1$ backwards, and computes $M$ of each. Their sum cancels.
# 3. It lowers the part that the schedule costs. The others still wait for the slow stage at every micro-batch.
# 4. When the memory that it frees allows a larger mini-batch or more micro-batches, or a model that would not fit at all.
#
# To practise: no $M$ does.

# %% tags=["answers", "nbval-check-output"]
for M in (8, 64, 512):
    step = simulate(gpipe(4, M), forward=[1, 1, 2, 1], backward=[2, 2, 4, 2])
    print(f"M={M}: {step.bubble_of_total:.1%} of the total time")
print(f"three stages work half of the time, so the limit is {3 * (1 - 1 / 2) / 4:.1%}")

# %% [markdown] tags=["answers"]
# The function that you were asked to write:


# %% tags=["answers", "nbval-check-output"]
def count_stash(schedule):
    """For each row of schedule.actions the highest number of forwards whose backward is still to come."""
    peaks = []
    for row in schedule.actions:
        kept = peak = 0
        for action in row:
            kept += 1 if action.kind == "F" else -1
            peak = max(peak, kept)
        peaks.append(peak)
    return peaks


check("07.count_stash", count_stash)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), sections 2.3 and 3, Table 2 · Narayanan et al., 2021, *Megatron-LM*,
# [arXiv 2104.04473](https://arxiv.org/abs/2104.04473), section 2.2 · Llama Team, 2024, *The Llama 3 Herd of Models*,
# [arXiv 2407.21783](https://arxiv.org/abs/2407.21783), section 3.3 · Chen et al., 2016, *Training Deep Nets with Sublinear Memory Cost*,
# [arXiv 1604.06174](https://arxiv.org/abs/1604.06174) · Kim et al., 2020, *torchgpipe*, [arXiv 2004.09910](https://arxiv.org/abs/2004.09910) · PyTorch:
# [torch.utils.checkpoint](https://docs.pytorch.org/docs/stable/checkpoint.html).
