# %% [markdown] tags=["opening"]
# # Exercises 08 · Mixed precision
#
# **You need** [lesson 08](../../notebooks/08_mixed_precision.ipynb). **Minutes:** 70. Each task stands on its own: one that is not solved
# costs nothing in the next.

# %% tags=["setup"]
import torch

from course_utils.charts import describe_lines, draw_lines
from course_utils.checks import call, check, hint, start
from course_utils.checks.unit_08 import Rules
from course_utils.plots import show

start("08")

# %% [markdown]
# ## 1 · The end of a step, from memory
# All backwards of a step are over, and the gradients are those of the loss times the loss scale. Write what each stage does then: one
# decision for all stages, gradients of the right size, a global norm of at most 1, and the scale of the next step. **Target:** on 1, 2 and
# 3 stages, with overflows and NaNs on any of them, weights and scales of **one device** with `torch.amp.GradScaler`, to 5 digits.
#
# | | |
# | --- | --- |
# | `stage.parameters` | the stage's parameters; `.grad` is `None` for some. Nobody has to clear gradients here |
# | `stage.scale` | by which the loss was multiplied; set it for the next step: half after a skipped step, double after enough good ones |
# | `stage.good_steps` | good steps in a row, 0 at first; it is yours to change |
# | `stage.growth_interval` | after so many good steps in a row the scale doubles, and the count begins anew |
# | `stage.any_stage(mine)` | whether `mine` is true on any stage; waits until all stages have called it |
# | `stage.clip()` | clips the gradients of all stages to a global norm of at most 1; waits until all stages have called it; returns the norm before |
# | `stage.update_weights()` | one step of the optimizer, SGD with momentum |


# %% tags=["answer:end_step"]
def end_step(stage):
    """Finish a step on one stage: all stages update their weights, or none does. Returns nothing."""
    ### BEGIN SOLUTION
    gradients = [parameter.grad for parameter in stage.parameters if parameter.grad is not None]
    overflow = not all(gradient.isfinite().all() for gradient in gradients)
    skipped = stage.any_stage(overflow)
    for gradient in gradients:
        gradient.mul_(1 / stage.scale)
    stage.clip()
    if skipped:
        stage.good_steps = 0
        stage.scale *= 0.5
        return
    stage.update_weights()
    stage.good_steps += 1
    if stage.good_steps == stage.growth_interval:
        stage.good_steps = 0
        stage.scale *= 2.0
    ### END SOLUTION


# %% [markdown]
# What two stages do with it, with a growth interval of 2:

# %%
from course_utils.checks.unit_08 import show_steps

call(show_steps, end_step)

# %% tags=["check:end_step", "nbval-check-output"]
check("unit08.end_step", end_step)

# %% [markdown] tags=["solution"]
# **Why.** Whether a step is skipped is asked of all stages, so all have the same scale and the same count for ever after. A stage that has
# overflowed still takes part in `clip`: what waits for all stages may not depend on what one of them has found. The limit of the norm is
# meant for the true gradients, so they are divided first.
#
# **One wrong way:** clip first, then divide ([pytorch/examples#1196](https://github.com/pytorch/examples/issues/1196)). With a loss
# scale of 1024 every global norm above 1 / 1024 is clipped then, and what is left is divided by 1024. Nothing fails; the model just learns slowly.


# %% tags=["solution", "nbval-check-output"]
def clips_first(stage):
    gradients = [parameter.grad for parameter in stage.parameters if parameter.grad is not None]
    skipped = stage.any_stage(not all(gradient.isfinite().all() for gradient in gradients))
    stage.clip()
    for gradient in gradients:
        gradient.mul_(1 / stage.scale)
    stage.good_steps = 0 if skipped else stage.good_steps + 1
    if skipped:
        stage.scale *= 0.5
    else:
        stage.update_weights()
    if stage.good_steps == stage.growth_interval:
        stage.good_steps, stage.scale = 0, stage.scale * 2


check("unit08.end_step", clips_first)

# %% [markdown]
# ## 2 · A loss scale that forgives
# One bad batch gives a NaN at any scale, and lowering the scale for it helps nobody. Megatron-LM therefore has a *hysteresis*: since the
# last growth (or the beginning), the first `hysteresis - 1` overflows leave the scale as it is, and every further one lowers it. (The
# step is skipped either way.) Here are 18 steps, `x` is an overflow: the scales of torch's scaler, which forgives nothing, and those to
# reach with hysteresis 2:

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_08 import History, by_counting, by_torch

script = "..x..x.xx...x...xx"
history = History(Rules(growth_interval=3, hysteresis=2), 1024.0, script)
of_torch = by_torch(history)
print("step        ", *[f"{letter:>4}" for letter in script])
print("torch       ", *[f"{scale:4g}" for scale in of_torch])
print("hysteresis 2", *[f"{scale:4g}" for scale in by_counting(history)])

# %% [markdown]
# **Target:** every scale right over more than 170 steps with other rules, **those of torch** with `hysteresis=1`; and memory: what is kept from
# step to step is a dictionary of **at most 3 numbers**, which is saved and read again after every step. At first it is `{"scale": 1024.0}`.
#
# | | |
# | --- | --- |
# | `rules.hysteresis` | the overflow since the last growth from which on the scale is lowered; 1: from the first on |
# | `rules.growth_interval` | after so many good steps in a row the scale grows; the count begins anew after a growth and after *any* overflow |
# | `rules.growth_factor`, `rules.backoff_factor` | by which the scale is multiplied when it grows, and when it is lowered |
# | `rules.smallest`, `rules.largest` | limits of the scale; a growth that the limit stops still counts as one |


# %% tags=["answer:next_state"]
def next_state(state, overflowed, rules):
    """The state after a step: a dictionary with "scale", and what else must be remembered, from the one before."""
    ### BEGIN SOLUTION
    scale, in_a_row, overflows = state["scale"], state.get("in_a_row", 0), state.get("overflows", 0)
    if overflowed:
        in_a_row, overflows = 0, overflows + 1
        if overflows >= rules.hysteresis:
            scale = max(rules.smallest, scale * rules.backoff_factor)
    else:
        in_a_row += 1
        if in_a_row == rules.growth_interval:
            in_a_row, overflows = 0, 0
            scale = min(rules.largest, scale * rules.growth_factor)
    return {"scale": scale, "in_a_row": in_a_row, "overflows": overflows}
    ### END SOLUTION


# %% [markdown]
# Your scales beside those of torch. Which of the overflows are forgiven?


# %%
def show_scales(next_state):
    state, lines = {"scale": 1024.0}, {"torch": dict(enumerate(of_torch)), "hysteresis 2": {}}
    for t, letter in enumerate(script):
        state = next_state(state, letter == "x", history.rules)
        lines["hysteresis 2"][t] = state["scale"]
    labels = ("step", "loss scale", f"Steps {script}")
    show(draw_lines(lines, *labels, log_y=True), says=describe_lines(lines, *labels))


call(show_scales, next_state)

# %% tags=["check:next_state", "nbval-check-output"]
check("unit08.next_state", next_state)

# %% [markdown] tags=["solution"]
# **Why.** Two counts with two different ends: good steps in a row begin anew at every overflow and at every growth, overflows only at a
# growth. With hysteresis 1 the first overflow lowers already, which is torch's rule. All of it is in the state, so a training that goes on from a
# checkpoint has the scales of one that was never interrupted.
#
# **One wrong way:** to begin both counts anew at every good step. Then only overflows *in a row* count, and a scale that is too large for every
# second batch is never lowered: half of all steps are skipped, for ever. (The words in Megatron-LM's own
# [docstring](https://github.com/NVIDIA/Megatron-LM/blob/00caa53af30912914981c86f39db123961678bbd/megatron/core/optimizer/grad_scaler.py)
# say "in a row"; its code counts since the last growth.)


# %% tags=["solution", "nbval-check-output"]
def only_in_a_row(state, overflowed, rules):
    scale, good, bad = state["scale"], state.get("good", 0), state.get("bad", 0)
    good, bad = (0, bad + 1) if overflowed else (good + 1, 0)
    if overflowed and bad >= rules.hysteresis:
        scale = max(rules.smallest, scale * rules.backoff_factor)
    elif good == rules.growth_interval:
        good, scale = 0, min(rules.largest, scale * rules.growth_factor)
    return {"scale": scale, "good": good, "bad": bad}


check("unit08.next_state", only_in_a_row)

# %% [markdown]
# ## 3 · One decision, few messages
# The shared decision of lesson 08 let every rank tell every other one. Write it for $K$ ranks so that a rank sends no more than
# $\lceil \log_2 K \rceil$ numbers, **and** no more than $\lceil \log_2 K \rceil$ messages have to come one after another. The second number is the time
# the decision takes; a ring is cheap in neither.

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_08 import target

print("messages of the busiest rank / one after another")
for K in (3, 5, 8):
    goal = target(K)
    print(f"K={K}: everyone tells everyone {K - 1} / 1, once round the ring {K - 1} / {K - 1}, target {goal} / {goal}")

# %% [markdown]
# With three ranks two messages each will do, with 8 ranks three. $K$ may be any number, also 1.
#
# | | |
# | --- | --- |
# | `rank.rank`, `rank.world_size` | which rank this is, of how many |
# | `rank.gradients` | those of its own stage; `None` where a parameter has none. Some ranks have none at all |
# | `rank.begin_send(number, to)` | begins to send one number to another rank; returns a handle |
# | `rank.receive(source)` | waits for the next number of that rank, and returns it |
# | `rank.wait(handle)` | waits until a number has been sent, that is, until the other rank has received it |


# %% tags=["answer:skip_together"]
def skip_together(rank):
    """Whether all ranks must skip the step: True on all if any gradient of any rank is not finite, else False on all."""
    ### BEGIN SOLUTION
    known = not all(bool(gradient.isfinite().all()) for gradient in rank.gradients if gradient is not None)
    distance = 1
    while distance < rank.world_size:
        handle = rank.begin_send(known, (rank.rank + distance) % rank.world_size)
        heard = rank.receive((rank.rank - distance) % rank.world_size)
        rank.wait(handle)
        known = known or heard == 1
        distance *= 2
    return known
    ### END SOLUTION


# %% [markdown]
# Who sends to whom on five ranks, with a NaN on the last one:

# %%
from course_utils.checks.unit_08 import show_messages

call(show_messages, skip_together)

# %% tags=["check:skip_together", "nbval-check-output"]
check("unit08.skip_together", skip_together)

# %% [markdown] tags=["solution"]
# **Why.** Before the round with distance $d$ a rank knows of itself and the $d - 1$ ranks behind it; the rank at distance $d$ knows as much of
# the next $d$. So what is known doubles, and after $\lceil \log_2 K \rceil$ rounds it is everyone. If $K$ is no power of two some ranks
# are heard of twice, which an "any" does not mind. (A sum would count them twice.) The pattern is known as *dissemination* (Hensgen, Finkel
# and Manber, 1988); [NCCL](https://github.com/NVIDIA/nccl/blob/master/src/bootstrap.cc) uses it for a barrier of its own.
#
# **One wrong way:** `max` of the largest gradients as they are. Every comparison with a NaN is false, so Python's `max` may drop it:


# %% tags=["solution", "nbval-check-output"]
def by_maximum(rank):
    largest = max((gradient.abs().max().item() for gradient in rank.gradients if gradient is not None), default=0.0)
    distance = 1
    while distance < rank.world_size:
        handle = rank.begin_send(largest, (rank.rank + distance) % rank.world_size)
        largest = max(largest, rank.receive((rank.rank - distance) % rank.world_size))
        rank.wait(handle)
        distance *= 2
    return not torch.tensor(largest).isfinite().item()


print("max(1.0, nan) is", max(1.0, float("nan")), "and max(nan, 1.0) is", max(float("nan"), 1.0))
check("unit08.skip_together", by_maximum)

# %% [markdown]
# ## References
# Micikevicius et al., 2018, *Mixed Precision Training*, [arXiv 1710.03740](https://arxiv.org/abs/1710.03740), section 3.2 · Hensgen,
# Finkel and Manber, 1988, *Two Algorithms for Barrier Synchronization*, [doi 10.1007/BF01379320](https://doi.org/10.1007/BF01379320) ·
# [torchtitan#803](https://github.com/pytorch/torchtitan/issues/803), loss scaling with pipeline stages.
