# %% [markdown] tags=["opening"]
# # Exercises 10 · The Noam warm-up
#
# **You need** [lesson 10](../../notebooks/10_noam_warm_up.ipynb). **Minutes:** 53. Each task stands on its own: one that is not solved
# costs nothing in the next.

# %% tags=["setup"]
import math

from course_utils.charts import describe_lines, draw_lines
from course_utils.checks import call, check, hint, start
from course_utils.plots import show

start("10")

# %% [markdown]
# ## 1 · The Noam rate, from memory
# Write the learning rate of a step, counted from 1. **Target**, for the base model of Vaswani et al. (2017) with `d_model` 512, a warm-up
# of 4000 steps and a factor of 1, to six digits:

# %% tags=["nbval-check-output"]
peak = 1 / math.sqrt(512 * 4000)
for step, rate in [(1, peak / 4000), (2000, peak / 2), (4000, peak), (16_000, peak / 2)]:
    print(f"step {step:6}: {rate:.5e}")


# %% tags=["answer:noam_rate"]
def noam_rate(step, d_model, warm_up, factor):
    """The learning rate of update `step` = 1, 2, 3, ...; it rises up to step `warm_up`, then it falls."""
    ### BEGIN SOLUTION
    return factor * d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)
    ### END SOLUTION


# %%
from course_utils.checks.unit_10 import rates_of

curves = {f"warm-up {w}": call(rates_of, noam_rate, range(500, 20_001, 500), 512, w, 1.0) for w in (4000, 8000)}
if all(curves.values()):
    axes = ("step", "learning rate", "Your Noam rate, d_model 512")
    show(draw_lines(curves, *axes), says=describe_lines(curves, *axes))

# %% tags=["check:noam_rate", "nbval-check-output"]
check("unit10.noam_rate", noam_rate)

# %% [markdown] tags=["solution"]
# **Why.** The rise is a straight line and must meet the fall, $n^{-1/2}$, at $n = \mathit{warm\_up}$. A line through 0 that has the height
# $\mathit{warm\_up}^{-1/2}$ there has the slope $\mathit{warm\_up}^{-3/2}$: so there is no need to remember the power.
#
# **One wrong way:** to count from 0, as a loop does, and to guard the fall against it. Nothing fails, and the whole first batch is computed
# for an update of size 0 ([verl#3674](https://github.com/verl-project/verl/issues/3674)):


# %% tags=["solution", "nbval-check-output"]
def counts_from_zero(step, d_model, warm_up, factor):
    n = step - 1
    return factor * d_model**-0.5 * min(max(n, 1) ** -0.5, n * warm_up**-1.5)


check("unit10.noam_rate", counts_from_zero)

# %% [markdown]
# ## 2 · A cosine with a warm-up
# Many runs use another schedule: a straight rise from 0 to `peak` at step `warm_up`, then half a period of a cosine down to `final` at step
# `total`. After that the rate stays at `final`. **Target** for a warm-up of 10 steps in a run of 100, from 0.001 to 0.00001, to six digits;
# and any step of a run of 100,000,000 at once, without a loop or a list over its steps:
#
# | step | rate |
# | --- | --- |
# | 5 | 0.0005, half of the peak |
# | 10 | 0.001, the peak |
# | 55 | 0.000505, half-way between the two rates |
# | 100, and every later one | 0.00001, the final rate |
#
# `warm_up` is smaller than `total`. It may be 0: then the fall begins as if step 0 had the peak.


# %% tags=["answer:cosine_rate"]
def cosine_rate(step, warm_up, total, peak, final):
    """The learning rate of update `step` = 1, 2, 3, ...: 0 to `peak` to `final`, and `final` from `total` on."""
    ### BEGIN SOLUTION
    if step < warm_up:
        return peak * step / warm_up
    share = min(1.0, (step - warm_up) / (total - warm_up))
    return final + (peak - final) * (1 + math.cos(math.pi * share)) / 2
    ### END SOLUTION


# %%
curve = call(rates_of, cosine_rate, range(1, 131, 3), 10, 100, 1e-3, 1e-5)
if curve:
    axes = ("step", "learning rate", "Your cosine, warm-up 10 of 100 steps")
    show(draw_lines({"your rate": curve}, *axes), says=describe_lines({"your rate": curve}, *axes))

# %% tags=["check:cosine_rate", "nbval-check-output"]
check("unit10.cosine_rate", cosine_rate)

# %% [markdown] tags=["solution"]
# **Why.** Everything hangs on one number, the share of the fall that is done: 0 at the peak, 1 at the end, and never more. `warm_up` is
# taken from both sides of the fraction. The cosine of $\pi$ times the share goes from 1 to -1, so half of 1 plus it goes from 1 to 0.
#
# The same from torch's own schedulers, put one after the other (Loshchilov and Hutter, 2017, equation 5). Its step counter is 0 in the
# first step:

# %% tags=["solution", "nbval-check-output"]
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
rise = LinearLR(optimizer, start_factor=1 / 10, total_iters=9)
fall = CosineAnnealingLR(optimizer, T_max=90, eta_min=1e-5)
scheduler = SequentialLR(optimizer, [rise, fall], milestones=[9])
of_torch = []
for _ in range(150):
    of_torch.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    scheduler.step()
mine = [cosine_rate(n, 10, 100, 1e-3, 1e-5) for n in range(1, 151)]
same = [math.isclose(a, b, rel_tol=1e-9) for a, b in zip(of_torch, mine, strict=True)]
print(f"the same rate in steps 1 to {same.index(False)}, and in none after that:", not any(same[same.index(False) :]))
print(f"step 145: torch {of_torch[144]:.6f}, mine {mine[144]:.6f}")

# %% [markdown] tags=["solution"]
# **One wrong way:** torch's, for a run that goes on longer than planned. A cosine does not stop at its lowest point, and so the rate of
# `CosineAnnealingLR` rises again, to half-way up in step 145. An answer without the `min`:


# %% tags=["solution", "nbval-check-output"]
def goes_on(step, warm_up, total, peak, final):
    if step < warm_up:
        return peak * step / warm_up
    share = (step - warm_up) / (total - warm_up)
    return final + (peak - final) * (1 + math.cos(math.pi * share)) / 2


check("unit10.cosine_rate", goes_on)

# %% [markdown]
# ## 3 · Stopped and resumed
# Write a schedule that can be stopped and goes on in a fresh process, also when updates were skipped because of an overflow. **Target:** 12
# attempts, two of them skipped, a stop after five: all rates are those of a run that was never stopped, from the first attempt after the
# stop on, and the state has **at most 400 characters** of JSON, however long the run.
#
# | given | |
# | --- | --- |
# | `optimizer` | an optimizer of torch; `lr` of each parameter group, as it was built, is the group's base rate |
# | `rate_of(n)` | for update $n = 1, 2, 3, \ldots$: the rate of a group is its base rate times this |
#
# | you return | |
# | --- | --- |
# | `step(skipped)` | is called after each attempt; `skipped` says that the optimizer did not update |
# | `save()` | returns the state, which `json.dumps` takes, and which stays what it is while the run goes on |
# | `load(state)` | is called right after your functions were made anew; then the optimizer has its rates at once |
#
# The optimizer's own state may be loaded before your functions are made, after `load`, or not at all. All three must work.


# %% tags=["answer:resumable"]
def resumable(optimizer, rate_of):
    """Return three functions, (step, save, load), and set the rates of the first update."""
    ### BEGIN SOLUTION
    updates = 0
    bases = [group["lr"] for group in optimizer.param_groups]

    def set_rates():
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * rate_of(updates + 1)

    def step(skipped):
        nonlocal updates
        if not skipped:
            updates += 1
            set_rates()

    def save():
        return {"updates": updates, "bases": bases}

    def load(state):
        nonlocal updates, bases
        updates, bases = state["updates"], state["bases"]
        set_rates()

    set_rates()
    return step, save, load
    ### END SOLUTION


# %% [markdown]
# Your run with a stop, and the one without. Attempts 3 and 7 are skipped, so their rates come twice; this `rate_of` is no curve, only
# different numbers, so that no update is taken for another:

# %%
from course_utils.checks.unit_10 import rates_of_a_stopped_run

curves = call(rates_of_a_stopped_run, resumable)
if curves:
    axes = ("attempt", "learning rate", "Two lines, or one?")
    show(draw_lines(curves, *axes), says=describe_lines(curves, *axes))

# %% tags=["check:resumable", "nbval-check-output"]
check("unit10.resumable", resumable)

# %% [markdown] tags=["solution"]
# **Why.** The rate is a function of two things: how many updates there were, and the base rates. Both are the state. The base rates look as
# if they could be read from the optimizer at any time, but an optimizer that has been loaded holds rates, not base rates. (torch's
# schedulers put a copy beside them in each group, `initial_lr`.) `optimizer.param_groups` is asked for anew each time,
# because `load_state_dict` puts new groups in the place of the old ones.
#
# **One wrong way:** to save the counter alone. It is right as long as the optimizer is loaded after the schedule was made, and it
# multiplies twice if it is loaded before ([nanotron#256](https://github.com/huggingface/nanotron/pull/256)):


# %% tags=["solution", "nbval-check-output"]
def only_the_counter(optimizer, rate_of):
    bases, done = [group["lr"] for group in optimizer.param_groups], [0]

    def set_rates():
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * rate_of(done[0] + 1)

    def step(skipped):
        done[0] += not skipped
        set_rates()

    def load(state):
        done[0] = state
        set_rates()

    set_rates()
    return step, lambda: done[0], load


check("unit10.resumable", only_the_counter)

# %% [markdown]
# ## References
# Vaswani et al., 2017, *Attention Is All You Need*, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762), section 5.3 ·
# Loshchilov and Hutter, 2017, *SGDR*, [arXiv 1608.03983](https://arxiv.org/abs/1608.03983), equation 5 · PyTorch:
# [how to adjust the learning rate](https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate) · Threads:
# [verl#3674](https://github.com/verl-project/verl/issues/3674), [pytorch#65342](https://github.com/pytorch/pytorch/issues/65342),
# [nanotron#256](https://github.com/huggingface/nanotron/pull/256).
