# %% [markdown] tags=["opening"]
# # Exercises 09 · Gradient clipping
#
# **You need** [lesson 09](../../notebooks/09_gradient_clipping.ipynb). **Minutes:** 75. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
import math

import torch

from course_utils.charts import describe_lines, draw_lines
from course_utils.checks import call, check, hint, start
from course_utils.plots import show

start("09")

# %% [markdown]
# ## 1 · Clip by the norm of all, from memory
# Each rank has its own gradients, still multiplied by the loss scale, a power of two. Bring them to the right size and clip them by the
# norm of the whole model. **Target:** the norm that is returned has **every bit** of `clip_grad_norm_` on one device, the gradients agree
# **within 1e-6**, and the ranks talk **once**. If the norm is not finite, return it and clip nothing (whether the gradients
# are unscaled then does not matter).
#
# | | |
# | --- | --- |
# | `rank.parameters` | pairs (place in the model, parameter) of this rank; `parameter.grad` may be `None` |
# | `rank.num_parameters` | how many parameters the whole model has |
# | `rank.add_up(vector)` | the sum of the vectors of all ranks, each as long as the others; every rank must call it |


# %% tags=["answer:clip_rank"]
def clip_rank(rank, max_norm, loss_scale):
    """Unscale the gradients of this rank in place, clip them by the norm over all ranks; return that norm, a float."""
    ### BEGIN SOLUTION
    own = [(place, parameter.grad) for place, parameter in rank.parameters if parameter.grad is not None]
    slots = torch.zeros(rank.num_parameters)
    for place, gradient in own:
        gradient /= loss_scale
        slots[place] = torch.linalg.vector_norm(gradient)
    total = torch.linalg.vector_norm(rank.add_up(slots)).item()
    if max_norm < total < math.inf:
        for _, gradient in own:
            gradient *= max_norm / total
    return total
    ### END SOLUTION


# %% [markdown]
# What yours does to two stages, with a loss scale of 16:

# %%
from course_utils.checks.unit_09 import show_a_step

call(show_a_step, clip_rank)

# %% tags=["check:clip_rank", "nbval-check-output"]
check("unit09.clip_rank", clip_rank)

# %% [markdown] tags=["solution"]
# **Why.** A slot is filled by one rank and 0 on the others, so adding up rounds nothing, and the last norm is taken of the same vector as
# on one device. No comparison with a NaN is true: one condition leaves out what is small and what is not finite.
#
# **One wrong way:** to clip first and unscale afterwards, as in [pytorch/examples#1196](https://github.com/pytorch/examples/issues/1196).
# With a loss scale of 1024 the step is 1024 times too short:


# %% tags=["solution", "nbval-check-output"]
def clips_first(rank, max_norm, loss_scale):
    own = [(place, parameter.grad) for place, parameter in rank.parameters if parameter.grad is not None]
    slots = torch.zeros(rank.num_parameters)
    for place, gradient in own:
        slots[place] = gradient.norm()
    total = rank.add_up(slots).norm().item()
    for _, gradient in own:
        gradient *= min(1.0, max_norm / total) / loss_scale
    return total


check("unit09.clip_rank", clips_first)

# %% [markdown]
# ## 2 · One number per stage, any norm
# `clip_grad_norm_` has a `norm_type`: the $p$-norm is $(\sum_i |g_i|^p)^{1/p}$, and for $p = \infty$ the largest $|g_i|$. Find it for the
# whole model. **Target:** each stage tells the others **one number, once**, and the norm is right **within 1e-6**, for every $p \ge 1$ and
# for gradients in float32, bfloat16 and float16.
#
# | | |
# | --- | --- |
# | `gradients` | a list of this stage's tensors; some are `None`, and a stage may have none at all |
# | `p` | a float, `math.inf` among them |
# | `tell(number)` | tells all stages a float, or a tensor with one element; returns the list of what all have told, by stage, as floats |
#
# A NaN in any gradient makes the norm NaN on all stages: they decide by it whether to skip the step.


# %% tags=["answer:norm_of_all"]
def norm_of_all(gradients, p, tell):
    """The p-norm of the gradients of all stages, a float, the same on each."""
    ### BEGIN SOLUTION
    norms = [torch.linalg.vector_norm(g.double(), p) for g in gradients if g is not None]
    mine = torch.linalg.vector_norm(torch.stack(norms), p) if norms else 0.0
    return torch.linalg.vector_norm(torch.tensor(tell(mine), dtype=torch.float64), p).item()
    ### END SOLUTION


# %% [markdown]
# Two stages, one set of gradients, other norms:

# %%
from course_utils.checks.unit_09 import norms_by_p

lines = call(norms_by_p, norm_of_all, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
if lines is not None:
    axes = ("p", "norm", "The norm of all, and of each stage alone")
    show(draw_lines(lines, *axes, log_y=True), says=describe_lines(lines, *axes))

# %% tags=["check:norm_of_all", "nbval-check-output"]
check("unit09.norm_of_all", norm_of_all)

# %% [markdown] tags=["solution"]
# **Why.** The norm of a whole is the norm of its parts' norms: $\left(\sum_k \left(\lVert g_k \rVert_p\right)^p\right)^{1/p}$ holds every
# $|g_i|^p$ once. For $p = \infty$ the same sentence is true of the maximum, so one function serves three times: for a gradient, a stage,
# the model. In float16 a square does not fit from 256 on, because the largest number is 65504; so the sum is made in another precision.
#
# **One wrong way:** Python's `max` for $p = \infty$. It keeps a NaN only if it comes first, because no comparison with NaN is true:

# %% tags=["solution", "nbval-check-output"]
print(max([math.nan, 1.0]), max([1.0, math.nan]), torch.tensor([1.0, math.nan]).max().item())


def with_max(gradients, p, tell):
    norms = [torch.linalg.vector_norm(g.double(), p) for g in gradients if g is not None]
    told = tell(torch.linalg.vector_norm(torch.stack(norms), p) if norms else 0.0)
    return max(told) if p == math.inf else sum(number**p for number in told) ** (1 / p)


check("unit09.norm_of_all", with_max)

# %% [markdown]
# ## 3 · A tied weight counts once
# The first stage looks up an embedding, the last one uses the same matrix for its outputs. Each has a copy, and in a step each copy gets
# a gradient of its own. Make them one weight again, and clip. **Target:** the norm and the gradients of one device with one shared embedding,
# **within 1e-6**; both copies equal **in every bit**; at most **one swap** of the embedding's gradient and **one number** per stage. All norms
# here are finite.
#
# | | |
# | --- | --- |
# | `rank.rank`, `rank.num_stages` | which stage this is, of how many; there may be one alone |
# | `rank.gradients` | `{name: tensor}` of this stage; the first and the last have `"embedding"`; change them in place or replace them |
# | `rank.swap(tensor)` | gives it to the stage with the other copy, and returns the tensor that comes from there |
# | `rank.tell(number)` | tells all stages a float, or a tensor with one element; returns the list of what all have told, by stage, as floats |


# %% tags=["answer:clip_tied"]
def clip_tied(rank, max_norm):
    """Add the copies' gradients, clip all by the global norm; return the norm before clipping, a float."""
    ### BEGIN SOLUTION
    counted = dict(rank.gradients)
    if rank.num_stages > 1 and "embedding" in counted:
        rank.gradients["embedding"] += rank.swap(rank.gradients["embedding"])
        if rank.rank > 0:
            del counted["embedding"]
    told = rank.tell(sum(gradient.double().pow(2).sum() for gradient in counted.values()))
    total = math.sqrt(sum(told))
    if total > max_norm:
        for gradient in rank.gradients.values():
            gradient *= max_norm / total
    return total
    ### END SOLUTION


# %% [markdown]
# What becomes of the two copies, on two stages:

# %%
from course_utils.checks.unit_09 import show_the_copies

call(show_the_copies, clip_tied)

# %% tags=["check:clip_tied", "nbval-check-output"]
check("unit09.clip_tied", clip_tied)

# %% [markdown] tags=["solution"]
# **Why.** On one device autograd adds what both uses of the weight contribute, and only then is there a norm. So the swap comes first. Then
# stage 0 counts the embedding for both. The copies stay equal because $a + b$ and $b + a$ have the same bits, and because every stage adds up the
# numbers of all in the same order, so that all multiply by the same factor. With one stage there is no second copy: autograd has added already.
#
# **One wrong way:** to count both copies, as in [Megatron-LM#7227](https://github.com/NVIDIA/Megatron-LM/pull/7227). Nothing fails, every
# stage agrees; all steps are shorter than they should be.


# %% tags=["solution", "nbval-check-output"]
def counts_twice(rank, max_norm):
    if rank.num_stages > 1 and "embedding" in rank.gradients:
        rank.gradients["embedding"] += rank.swap(rank.gradients["embedding"])
    own = sum(gradient.pow(2).sum() for gradient in rank.gradients.values())
    total = math.sqrt(sum(rank.tell(own)))
    for gradient in rank.gradients.values():
        gradient *= min(1.0, max_norm / total)
    return total


check("unit09.clip_tied", counts_twice)

# %% [markdown]
# ## References
# Pascanu, Mikolov and Bengio, 2013, [arXiv 1211.5063](https://arxiv.org/abs/1211.5063), section 3.2 · Megatron-LM leaves shared
# parameters out of the norm: [get_main_grads_for_grad_norm](https://github.com/NVIDIA/Megatron-LM/blob/001199898c4badd01eaf0785c212d8ed7ce83042/megatron/core/optimizer/optimizer.py) · PyTorch:
# [get_total_norm](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.get_total_norm.html) · tied weights on two stages:
# [pytorch#51931](https://github.com/pytorch/pytorch/issues/51931), [piper#13](https://github.com/uw-syfi/piper/issues/13) · a
# stage's own norm: [torchtitan#596](https://github.com/pytorch/torchtitan/issues/596).
