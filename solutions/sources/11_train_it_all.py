# %% [markdown] tags=["opening"]
# # Exercises 11 · Train it all
#
# **You need** [lesson 11](../../notebooks/11_train_it_all.ipynb). **Minutes:** 65. Each task stands on its own: one that is not solved
# costs nothing in the next.

# %% tags=["setup"]
import math

from course_utils.checks import call, check, hint, start
from course_utils.plots import describe_timeline, draw_timeline, show
from course_utils.schedules import SCHEDULES, rematerialise
from course_utils.simulation import kept, simulate
from course_utils.stages import by_count

start("11")

# %% [markdown]
# ## 1 · The order of a step, from memory
# `rank` is one rank of a pipeline. Its parts are given, and their order is yours. **Target:** weights, learning rate and loss scale of one
# device to $10^{-5}$ on 1 to 3 ranks, also after steps in which a gradient of one rank is not finite, with **one exchange** per step. In such
# a step neither the weights nor the learning rate may change, on no rank.
#
# | | |
# | --- | --- |
# | `rank.zero_grad()` | forgets the gradients |
# | `rank.forward_backward(loss_scale)` | adds this rank's gradients, times `loss_scale`, to those that are there |
# | `rank.multiply_gradients(factor)` | multiplies all gradients of this rank |
# | `rank.own_norm()` | the norm of this rank's gradients; inf or NaN if one of them is not finite |
# | `rank.exchange(number)` | tells a number to all ranks and returns the list of all; every rank must call it |
# | `rank.optimizer_step()`, `rank.learning_rate_step()` | changes the weights; moves the learning rate |
# | `rank.update_loss_scale(skipped)` | may change `rank.loss_scale` |
# | `rank.loss_scale`, `rank.max_norm` | the loss scale now; the largest global norm that is not clipped |


# %% tags=["answer:training_step"]
def training_step(rank):
    """One step of training on one rank. Returns True if the weights changed, False if the step was skipped."""
    ### BEGIN SOLUTION
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    norm = math.hypot(*rank.exchange(rank.own_norm()))
    skipped = not math.isfinite(norm)
    if not skipped:
        if norm > rank.max_norm:
            rank.multiply_gradients(rank.max_norm / norm)
        rank.optimizer_step()
        rank.learning_rate_step()
    rank.update_loss_scale(skipped)
    return not skipped
    ### END SOLUTION


# %% [markdown]
# What rank 0 of 2 did. In step 1 a gradient of rank 1 overflows; rank 0 has only finite ones.

# %%
from course_utils.checks.unit_11 import log_of_steps

call(log_of_steps, training_step)

# %% tags=["check:training_step", "nbval-check-output"]
check("unit11.training_step", training_step)

# %% [markdown] tags=["solution"]
# **Why.** The norm is taken of gradients without the loss scale, otherwise the scale decides what is clipped. All ranks see all norms, so all
# of them compute the same global norm, `hypot` of the ranks' norms, and one that is not finite tells every rank to skip: nobody has to ask. The loss
# scale is told in any case, because a skipped step is what makes it smaller; it comes last, because until then the gradients need the
# old one. The learning rate counts updates, so it moves with the optimizer.
#
# **One wrong way:** each rank looks at its own gradients to decide
# ([fairscale#179](https://github.com/facebookresearch/fairscale/pull/179): with sharded gradients one GPU skipped, the other stepped and
# hung). The rank that overflowed skips, the other one waits for its norm:


# %% tags=["solution", "nbval-check-output"]
def skips_alone(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    rank.multiply_gradients(1 / rank.loss_scale)
    skipped = not math.isfinite(rank.own_norm())
    if not skipped:
        norm = math.hypot(*rank.exchange(rank.own_norm()))
        rank.multiply_gradients(min(1.0, rank.max_norm / norm))
        rank.optimizer_step()
        rank.learning_rate_step()
    rank.update_loss_scale(skipped)
    return not skipped


check("unit11.training_step", skips_alone)

# %% [markdown] tags=["solution"]
# **Another:** to clip first and unscale afterwards ([pytorch/examples#1196](https://github.com/pytorch/examples/issues/1196)). Nothing
# raises, and the loss falls, slowly.


# %% tags=["solution", "nbval-check-output"]
def clips_first(rank):
    rank.zero_grad()
    rank.forward_backward(rank.loss_scale)
    norm = math.hypot(*rank.exchange(rank.own_norm()))
    skipped = not math.isfinite(norm)
    if not skipped:
        rank.multiply_gradients(min(1.0, rank.max_norm / norm))
        rank.multiply_gradients(1 / rank.loss_scale)
        rank.optimizer_step()
        rank.learning_rate_step()
    rank.update_loss_scale(skipped)
    return not skipped


check("unit11.training_step", clips_first)

# %% [markdown]
# ## 2 · The fastest plan
# You get a cluster and a model, and choose how to train: number of stages, number of micro-batches, schedule, and whether to recompute. **Target:** the
# **shortest step** of all plans in which **no stage needs more than a device's memory**. Devices are alike and so are blocks; numbers are small so
# that you can follow them. Three clusters, with the times to reach:

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_11 import FIXED, target

for cluster in (FIXED[0], FIXED[2], FIXED[4]):
    print(f"{cluster}: target {target(cluster):g} ms")

# %% [markdown]
# | `cluster.` | |
# | --- | --- |
# | `devices`, `memory` | how many; MB of each |
# | `message` | ms that a message takes between two stages |
# | `rows`, `blocks` | of the mini-batch; of the model |
# | `start`, `per_row` | ms of a stage's forward: `start`, whatever its size, and `per_row` for each row in each of its blocks |
# | `weights` | MB of a block, with gradients and optimizer |
# | `activations` | MB that a row's graph takes in a block, from its forward to its backward |
# | `inputs` | MB of a row that a stage has received: all that it keeps of it until a recomputation |
#
# A backward takes twice as long as its forward. $K$ is at most the number of devices, `by_count(blocks, K)` fills the stages, and $M$ must
# divide the rows. To recompute is `rematerialise(schedule, "always")`. `simulate(schedule, forward, backward, message)` gives the time; `kept(schedule)`
# says, for each stage and after each of its actions, how many micro-batches it keeps as `graphs` and how many only as `inputs`.


# %% tags=["answer:fastest_plan"]
def fastest_plan(cluster):
    """(K, M, schedule, recompute) of the fastest plan that fits, for example (2, 4, "1f1b", False); None if none fits.

    schedule: "gpipe" or "1f1b". recompute: True or False.
    """
    ### BEGIN SOLUTION
    best, least = None, math.inf
    for K in range(1, min(cluster.devices, cluster.blocks) + 1):
        sizes = [len(stage) for stage in by_count(cluster.blocks, K)]
        for M in (M for M in range(1, cluster.rows + 1) if cluster.rows % M == 0):
            rows = cluster.rows // M
            forward = [cluster.start + cluster.per_row * rows * size for size in sizes]
            for name in ("gpipe", "1f1b"):
                for recompute in (False, True):
                    schedule = SCHEDULES[name](K, M)
                    if recompute:
                        schedule = rematerialise(schedule, "always")
                    stash = [
                        max(size * cluster.activations * now.graphs + cluster.inputs * now.inputs for now in moments)
                        for size, moments in zip(sizes, kept(schedule), strict=True)
                    ]
                    needs = [size * cluster.weights + rows * s for size, s in zip(sizes, stash, strict=True)]
                    time = simulate(schedule, forward, [2 * f for f in forward], cluster.message).makespan
                    if max(needs) <= cluster.memory and time < least:
                        best, least = (K, M, name, recompute), time
    return best
    ### END SOLUTION


# %% [markdown]
# Your plan for the first cluster:

# %%
from course_utils.checks.unit_11 import Plan, memory_of, timeline_of


def show_plan(fastest_plan):
    plan = Plan(*fastest_plan(FIXED[0]))
    timeline = timeline_of(FIXED[0], plan)
    print(f"{plan}: {timeline.makespan:g} ms, {memory_of(FIXED[0], plan)} of {FIXED[0].memory} MB")
    show(draw_timeline(timeline), says=describe_timeline(timeline))


call(show_plan, fastest_plan)

# %% tags=["check:fastest_plan", "nbval-check-output"]
check("unit11.fastest_plan", fastest_plan)

# %% [markdown] tags=["solution"]
# **Why.** No rule gives the plan, because the choices pull at each other. More micro-batches: less bubble and a smaller graph each, but more starts and
# messages. More stages: fewer blocks on each, but a longer bubble. 1F1B keeps fewer graphs, but a message in its steady state is waited
# for, where GPipe sends one after another. Recomputing costs a forward and frees memory for a better choice elsewhere. There are few
# plans, and each has its price in milliseconds: so price them all.
#
# **One wrong way:** as many micro-batches as there are rows, because then the bubble is smallest. With small micro-batches somebody's pipeline became
# slower ([fairscale#51](https://github.com/facebookresearch/fairscale/issues/51)): each one has its fixed costs.


# %% tags=["solution", "nbval-check-output"]
def most_micro_batches(cluster):
    best, least, M = None, math.inf, cluster.rows
    for K in range(1, min(cluster.devices, cluster.blocks) + 1):
        sizes = [len(stage) for stage in by_count(cluster.blocks, K)]
        forward = [cluster.start + cluster.per_row * size for size in sizes]
        for name in ("gpipe", "1f1b"):
            for policy in ("never", "always"):
                schedule = rematerialise(SCHEDULES[name](K, M), policy)
                needs = [
                    size * cluster.weights
                    + max(size * cluster.activations * now.graphs + cluster.inputs * now.inputs for now in moments)
                    for size, moments in zip(sizes, kept(schedule), strict=True)
                ]
                time = simulate(schedule, forward, [2 * f for f in forward], cluster.message).makespan
                if max(needs) <= cluster.memory and time < least:
                    best, least = (K, M, name, policy == "always"), time
    return best


check("unit11.fastest_plan", most_micro_batches)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), sections 2.2 and 2.3 · Narayanan et al., 2021, *Efficient Large-Scale
# Language Model Training*, [arXiv 2104.04473](https://arxiv.org/abs/2104.04473), section 3 · Micikevicius et al., 2018, *Mixed Precision Training*,
# [arXiv 1710.03740](https://arxiv.org/abs/1710.03740).
