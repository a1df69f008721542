# %% [markdown] tags=["opening"]
# # Exercises 04 · Naive model parallelism
#
# **You need** [lesson 04](../../notebooks/04_naive_model_parallelism.ipynb). **Minutes:** 60. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
from functools import cache
from math import comb

from course_utils.charts import describe_bars, draw_bars
from course_utils.checks import call, check, hint, start
from course_utils.plots import show
from course_utils.stages import by_count

start("04")

# %% [markdown]
# ## 1 · One step, from memory
# `rank` is one of $K$ ranks, with one stage. Write a step of naive model parallelism: forward through all stages, then backward, one
# micro-batch after another. **Target:** loss and gradients of one device to $10^{-9}$, with **at most 1 graph** at a time on any rank, for 1 to 4
# stages. The loss is the mean over all *rows* of the mini-batch; micro-batches have different numbers of rows.
#
# | | |
# | --- | --- |
# | `rank.index`, `rank.num_stages` | which stage this is, and $K$ |
# | `rank.num_micro_batches`, `rank.num_rows` | of the whole mini-batch |
# | `rank.inputs(m)` | micro-batch `m` as it enters the model; only rank 0 has it |
# | `rank.receive(peer)` | waits for the next tensor from a neighbouring rank and returns it |
# | `rank.send(tensor, peer)` | sends a tensor to a neighbouring rank and waits until it is there |
# | `rank.stage(x)` | the forward of this rank's stage: returns activations; gradients add up in its weights |
# | `rank.loss(activations, m)` | the losses of all rows of micro-batch `m`, added up; only on the last rank |


# %% tags=["answer:naive_step"]
def naive_step(rank):
    """One step on one rank. Returns the loss, a number, on the last rank; what others return does not count."""
    ### BEGIN SOLUTION
    k, last, loss = rank.index, rank.num_stages - 1, 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if k == 0 else rank.receive(k - 1).requires_grad_()
        y = rank.stage(x)
        if k == last:
            share = rank.loss(y, m) / rank.num_rows
            share.backward()
            loss += share.item()
        else:
            rank.send(y, k + 1)
            y.backward(rank.receive(k + 1))
        if k > 0:
            rank.send(x.grad, k - 1)
    return loss
    ### END SOLUTION


# %% [markdown]
# What three stages computed with your step, two micro-batches; one column per action, in the order in which they came. Is there a column
# with more than one entry? There cannot be: that is what is naive about it.

# %%
from course_utils.checks.unit_04 import order_of_a_step

call(order_of_a_step, naive_step)

# %% tags=["check:naive_step", "nbval-check-output"]
check("unit04.naive_step", naive_step)

# %% [markdown] tags=["solution"]
# **Why.** Activations come out of a buffer, and no graph leads there: `requires_grad_()` makes them the leaf at which this stage's walk
# back ends, and `x.grad` is what the stage before is waiting for. On the last rank the walk begins at the loss, on any other at the
# activations, with the gradient that arrived. The division stands in one place, where the loss is made, so every gradient on every stage has it.
#
# **One wrong way:** to divide "on every stage", because each has gradients of its own. The last stage is right then, so a test of the last
# stage passes, and each stage before it has gradients that are too small by one more factor.


# %% tags=["solution", "nbval-check-output"]
def divided_on_each_stage(rank):
    loss = 0.0
    for m in range(rank.num_micro_batches):
        x = rank.inputs(m) if rank.index == 0 else rank.receive(rank.index - 1).requires_grad_()
        y = rank.stage(x)
        if rank.index == rank.num_stages - 1:
            share = rank.loss(y, m) / rank.num_rows
            share.backward()
            loss += share.item()
        else:
            rank.send(y, rank.index + 1)
            y.backward(rank.receive(rank.index + 1) / rank.num_rows)
        if rank.index > 0:
            rank.send(x.grad, rank.index - 1)
    return loss


check("unit04.naive_step", divided_on_each_stage)

# %% [markdown]
# ## 2 · Where to cut
# In the naive order the sum of all stages decides. As soon as stages work at the same time the **slowest** one does, and each must fit into
# its device. Cut a list of blocks into `K` stages so that **the slowest stage is as fast as any cut can make it** and **no stage needs more
# memory than `limit`**. Eight blocks on three stages:

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_04 import Blocks, slowest, stage_sums

times = [1, 2, 2, 2, 2, 4, 5, 9]  # of each block, in milliseconds
memory = [9, 7, 6, 6, 6, 4, 3, 2]  # of each block, in MB
counted = [list(stage) for stage in by_count(8, 3)]
print("by count:", counted)
print("  its stages take", list(stage_sums(times, counted).values()), "ms")
print("  and need       ", list(stage_sums(memory, counted).values()), "MB")
for limit in (34, 28, 22, 15):
    print(f"limit {limit} MB, target for the slowest stage:", slowest(Blocks(tuple(times), tuple(memory), 3, limit)))

# %% [markdown]
# The less memory, the slower; with 15 MB no cut fits, and your function says so. The last of the lists on which it is tried has 60 blocks for 8
# stages. Trying all cuts is no way there:

# %% tags=["nbval-check-output"]
print(f"{comb(59, 7):,} cuts of 60 blocks into 8 stages")


# %% tags=["answer:balance"]
def balance(times, memory, K, limit):
    """The best cut: a list of K lists of block numbers, each stage with at least one block, for example [[0, 1], [2]].

    times, memory: of each block, whole numbers. Raises a ValueError, which names the limit, if no cut fits.
    """

    ### BEGIN SOLUTION
    @cache
    def best(start, stages):
        """(slowest, cut) of the blocks from `start` on; None if no cut of them fits."""
        rest_of_stages, found = stages - 1, []
        for end in range(start + 1, len(times) - rest_of_stages + 1):
            if rest_of_stages == 0 and end < len(times):
                continue
            if sum(memory[start:end]) > limit:
                break
            others = best(end, rest_of_stages) if rest_of_stages else (0, [])
            if others is not None:
                found.append((max(sum(times[start:end]), others[0]), [list(range(start, end)), *others[1]]))
        return min(found, default=None)

    answer = best(0, K)
    if answer is None:
        raise ValueError(f"no cut of {len(times)} blocks into {K} stages fits into {limit} per stage")
    return answer[1]
    ### END SOLUTION


# %% [markdown]
# Yours, with a limit of 28 MB, beside the cut by count:


# %%
def show_stages(balance):
    mine = balance(times, memory, 3, 28)
    print(mine, "needs", list(stage_sums(memory, mine).values()), "MB")
    bars = {f"by count, {stage}": time for stage, time in stage_sums(times, counted).items()}
    bars |= {f"yours, {stage}": time for stage, time in stage_sums(times, mine).items()}
    labels = {"unit": "ms", "title": "Time of each stage"}
    show(draw_bars(bars, **labels), says=describe_bars(bars, **labels))


call(show_stages, balance)

# %% tags=["check:balance", "nbval-check-output"]
check("unit04.balance", balance)

# %% [markdown] tags=["solution"]
# **Why.** Whatever the first stage is, the rest must be cut as well as it can be, and the slower of the two counts. The same rests come up under
# many first stages, and `cache` answers each of them once: at most `len(times) * K` questions instead of all cuts. The limit only
# strikes out first stages; everything else follows. What is asked for is a *largest* time, so a small average or a small sum of squares
# is no substitute.
#
# **One wrong way:** to fill a stage until it has its share of the time, then begin the next one. It looks ahead to nothing: a slow block that comes
# last, or a limit, is met when it is too late.


# %% tags=["solution", "nbval-check-output"]
def filled_up(times, memory, K, limit):
    stages = [[]]
    for index in range(len(times)):
        stages[-1].append(index)
        if sum(times[i] for i in stages[-1]) >= sum(times) / K and len(stages) < K:
            stages.append([])
    return stages


check("unit04.balance", filled_up)

# %% [markdown] tags=["solution"]
# **Another:** the number of blocks divided by $K$, rounded down, for every stage. With 30 layers on 4 stages two were in no stage
# ([Megatron-LM#1304](https://github.com/NVIDIA/Megatron-LM/issues/1304)).


# %% tags=["solution", "nbval-check-output"]
def rounded_down(times, memory, K, limit):
    size = len(times) // K
    return [list(range(k * size, (k + 1) * size)) for k in range(K)]


check("unit04.balance", rounded_down)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), sections 2.1 and 2.2 · Narayanan et al., 2019, *PipeDream*,
# [doi 10.1145/3341301.3359646](https://doi.org/10.1145/3341301.3359646), section 3.1 (stages by dynamic programming) ·
# [Megatron-LM#1304](https://github.com/NVIDIA/Megatron-LM/issues/1304), [torchtitan#963](https://github.com/pytorch/torchtitan/pull/963) (lost layers).
