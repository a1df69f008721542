# %% [markdown] tags=["opening"]
# # Exercises 12 · The bug hunt
#
# **You need** lessons [01](../../notebooks/01_one_device.ipynb) to [11](../../notebooks/11_train_it_all.ipynb). **Minutes:** 70. The finds
# do not depend on each other: take them in any order.

# %% tags=["setup"]
import math

import torch
from torch import nn
from torch.nn import functional as F

from course_utils.checks import call, check, hint, start
from course_utils.checks.bug_hunt import load_script, show_run, show_script, symptoms
from course_utils.checks.values import print_numbers

PAD = 0

start("12")

# %% [markdown]
# ## The script
# A training script: a small model on $K$ stages, GPipe with $M$ micro-batches, a loss scale, clipping, a warm-up, dropout, padding, a
# resume. It raises nothing, and its loss falls. **Eight of its functions have one bug each**, all of the kind that people find in their
# runs. Every docstring is right, and so are the functions that no task below asks for.

# %%
show_script()

# %% [markdown]
# The script runs on two stages. Nothing here looks alarming: the first steps are skipped because the loss scale begins too high, as it
# does with any gradient scaler.

# %%
script = load_script()
logs, saved = script.train(K=2, M=4, steps=60)
show_run(logs)

# %% [markdown]
# ## How to hunt
# Reading finds some of the bugs. Others show only in an experiment: call a function by itself, or change what must not matter (the number
# of stages, of micro-batches, the padding) and see whether it does.
#
# | | |
# | --- | --- |
# | `script.batch(0)` | any function of the script by itself |
# | `script.train(K, M, steps, saved)` | logs and checkpoints, both by rank; `logs[-1][0]` is the first line of the last rank |
# | `load_script(split=mine)` | the script with a function of yours in place of its own, or with another constant: `DROPOUT=0.0` |
# | `hint(1)` | a symptom; it is offered after three wrong answers or ten minutes. `hint(2)`: an experiment that shows it. `hint(3)`: what must hold in the end |
#
# **Target:** eight finds, a point each, and 0 of 8 symptoms left in the last cell. The checks know no line of the script: they compare
# what your function gives with one device, with torch or with a formula.

# %%
logs, _ = script.train(K=1, M=1, steps=1)  # your experiments go here
for name, value in logs[-1][0].items():
    print(f"{name:8} {value}")

# %% [markdown]
# ## 1 · Cut
# Write `split` so that its docstring is true. **Target:** 11 mini-batches, each right.


# %% tags=["answer:split"]
def split(rows, M):
    """A list of M micro-batches with the rows of a mini-batch (a tensor), in order; sizes differ by at most 1."""
    ### BEGIN SOLUTION
    return list(rows.tensor_split(M))
    ### END SOLUTION


# %%
mine = call(split, torch.arange(8), 4)
if mine is not None:
    print(mine)

# %% tags=["check:split", "nbval-check-output"]
check("unit12.split", split)

# %% [markdown] tags=["solution"]
# **Why.** `len(rows) // M` rounds down, so up to $M - 1$ rows are in no micro-batch: 2 of 10 here, in every step, and always the last ones.
# The loss lacks their shares and looks a little better than it is.
#
# **One wrong way:** `torch.chunk`. It rounds up, and may return fewer than $M$ pieces: the stage that waits for micro-batch 4 of 7 rows
# waits for ever.

# %% tags=["solution", "nbval-check-output"]
check("unit12.split", torch.chunk)

# %% [markdown]
# ## 2 · Look at each other
# Write `attend` so that padding changes nothing at a real place; what it gives at the padding, nobody reads. `PAD` is 0. **Target:**
# 5 batches of rows of 2 to 8 places, each row as if it had never been padded.


# %% tags=["answer:attend"]
def attend(hidden, ids):
    """Self-attention without weights: a place mixes the real places of its row. hidden: (rows, width, D)."""
    ### BEGIN SOLUTION
    real = ids.ne(PAD).unsqueeze(1)
    return F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=real)
    ### END SOLUTION


# %%
mine = call(attend, torch.randn(1, 5, 4), torch.tensor([[3, 7, 5, 0, 0]]))
if mine is not None:
    print(mine)

# %% tags=["check:attend", "nbval-check-output"]
check("unit12.attend", attend)

# %% [markdown] tags=["solution"]
# **Why.** In `scaled_dot_product_attention` True means *takes part*; in `nn.MultiheadAttention` True means *is left out*. The script's mask
# was made for the second and given to the first, so ids looked at the padding and never at each other. The model still learns what an id
# by itself tells, and the loss falls.
#
# **One wrong way:** to set the hidden states at the padding to zero. A score of 0 is not a weight of 0: $e^0 = 1$.


# %% tags=["solution", "nbval-check-output"]
def zeroed(hidden, ids):
    hidden = hidden * ids.ne(PAD).unsqueeze(2)
    return F.scaled_dot_product_attention(hidden, hidden, hidden)


check("unit12.attend", zeroed)

# %% [markdown]
# ## 3 · Drop out
# Write `run_layers` so that the dropout masks are the same for every cut of the model. Each layer has a `number`, and is called as
# `layer(hidden, ids, noise)` with a `torch.Generator`, from which it draws its mask. **Target:** up to 12 layers and 12 micro-batches, on 1,
# 2 and 3 stages, and no two masks alike.


# %% tags=["answer:run_layers"]
def run_layers(layers, hidden, ids, step, m):
    """Run micro-batch m of a step through the layers of a stage. No cut of the model changes what comes out."""
    ### BEGIN SOLUTION
    for layer in layers:
        key = 10000 * step + 100 * m + layer.number
        hidden = layer(hidden, ids, torch.Generator().manual_seed(key))
    return hidden
    ### END SOLUTION


# %% [markdown]
# The loss of the first step, with your function in the script:


# %%
def first_loss(K):
    return load_script(run_layers=run_layers).train(K, steps=1)[0][-1][0]["loss"]


if call(run_layers, [], torch.zeros(1), None, 0, 0) is not None:
    print("on one stage:", call(first_loss, 1), "on two:", call(first_loss, 2))

# %% tags=["check:run_layers", "nbval-check-output"]
check("unit12.run_layers", run_layers)

# %% [markdown] tags=["solution"]
# **Why.** The script makes one generator for each stage and micro-batch, from the same seed on every stage. So the first layer of stage 1
# draws the mask that the first layer of stage 0 has drawn, and which layer comes first depends on the cut. With a key made of step,
# micro-batch and the layer's number in the whole model, nothing else matters.
#
# **One wrong way:** a key whose parts overlap. It is right in a model of ten layers and wrong in a larger one.


# %% tags=["solution", "nbval-check-output"]
def overlapping_keys(layers, hidden, ids, step, m):
    for layer in layers:
        hidden = layer(hidden, ids, torch.Generator().manual_seed(1000 * step + 10 * m + layer.number))
    return hidden


check("unit12.run_layers", overlapping_keys)

# %% [markdown]
# ## 4 · Share the loss
# Write `loss_share` so that the shares of all micro-batches add up to the mean over all tokens, values and gradients. **Target:** 5
# mini-batches, one with 13 tokens in a micro-batch and 2 in the other, to a relative error of $10^{-5}$.


# %% tags=["answer:loss_share"]
def loss_share(logits, targets, all_targets):
    """What a micro-batch adds to the loss, the mean over all tokens of the mini-batch. PAD in targets is no token."""
    ### BEGIN SOLUTION
    total = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="sum")
    return total / all_targets.ne(PAD).sum()
    ### END SOLUTION


# %%
logits, targets = torch.zeros(2, 4, 3), torch.tensor([[1, 2, 1, 2], [2, 0, 0, 0]])


def show_shares(loss_share):
    mine = [loss_share(logits[i : i + 1], targets[i : i + 1], targets) for i in range(2)]
    print("shares:", [round(float(share), 3) for share in mine], "together:", round(float(sum(mine)), 3))


call(show_shares, loss_share)

# %% tags=["check:loss_share", "nbval-check-output"]
check("unit12.loss_share", loss_share)

# %% [markdown] tags=["solution"]
# **Why.** The mean over a micro-batch's tokens, weighted by its *rows*, is the right mean only if all rows have the same number of tokens.
# Otherwise a token counts the more the fewer there are beside it. Sum, then divide by one number for all.
#
# **One wrong way:** to divide by all places, padding included. Then the loss, and with it the step, shrinks as rows are padded more.


# %% tags=["solution", "nbval-check-output"]
def over_all_places(logits, targets, all_targets):
    total = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="sum")
    return total / all_targets.numel()


check("unit12.loss_share", over_all_places)

# %% [markdown]
# ## 5 · Backward
# Write `backward` for one micro-batch on one stage; the script calls it for micro-batch after micro-batch. **Target:** on 1, 2 and 3 stages,
# with 1 to 5 micro-batches, the gradients of one device and the whole mini-batch, to $10^{-5}$.


# %% tags=["answer:backward"]
def backward(parameters, leaf, out, gradient):
    """Add the gradients of one micro-batch to those of the stage's parameters; return that of the leaf.

    leaf: what the stage received, None on the first. out: what it made. gradient: of out, None for the scaled loss.
    """
    ### BEGIN SOLUTION
    out.backward(gradient)
    return leaf.grad if leaf is not None else None
    ### END SOLUTION


# %%
weight = torch.ones(1, requires_grad=True)
for number in (2.0, 5.0):
    call(backward, [weight], None, (number * weight).sum(), None)
print("the gradients of the two micro-batches are 2 and 5; in weight.grad is", weight.grad)

# %% tags=["check:backward", "nbval-check-output"]
check("unit12.backward", backward)

# %% [markdown] tags=["solution"]
# **Why.** `torch.autograd.grad` only returns gradients; the script put each in the place of the one before it. Of $M$ micro-batches the last
# one counted, and with $M = 1$ everything was right. `Tensor.backward` adds. (In
# [Automodel#3530](https://github.com/NVIDIA-NeMo/Automodel/pull/3530) only the last one counted too: the loss looked fine, the gradient's
# norm gave it away.)
#
# **One wrong way:** to apply the loss scale on every stage. It is in the loss already, and comes with the gradient that arrives. Stage 0
# of $K$ would have it $K$ times.


# %% tags=["solution", "nbval-check-output"]
def scaled_on_each_stage(parameters, leaf, out, gradient):
    out.backward(gradient)
    return None if leaf is None else 4 * leaf.grad


check("unit12.backward", scaled_on_each_stage)

# %% [markdown]
# ## 6 · Clip
# Write `clip`; every rank calls it with its own parameters. If a gradient of any rank is not finite, the norm that each rank returns is not
# finite either. **Target:** 7 sets of gradients on 1 to 3 ranks, as torch would clip them on one device.


# %% tags=["answer:clip"]
def clip(parameters, max_norm, tell):
    """Shorten the gradients so that their norm over all ranks is at most max_norm; return that norm before.

    parameters: of this rank. tell(number): the numbers of all ranks, a list.
    """
    ### BEGIN SOLUTION
    own = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    norm = math.hypot(*tell(own))
    for parameter in parameters:
        parameter.grad *= min(1.0, max_norm / (norm + 1e-6))
    return norm
    ### END SOLUTION


# %%
weight = torch.zeros(2, requires_grad=True)
weight.grad = torch.tensor([3.0, 0.0])
mine = call(clip, [weight], 2.5, lambda number: [float(number), 4.0])  # the other rank's norm is 4
if mine is not None:
    print_numbers(f"gradient {weight.grad.tolist()},", "norm {:.3f}", mine)

# %% tags=["check:clip", "nbval-check-output"]
check("unit12.clip", clip)

# %% [markdown] tags=["solution"]
# **Why.** The norm in the script's log was right, the one over all ranks. What it had clipped with was each stage's own, so a stage with a large
# gradient was held back, a stage with a small one was not, and the step pointed elsewhere. The order is: measure, tell, shorten.
#
# **One wrong way:** to add the norms up. Norms add like the sides of a right angle.


# %% tags=["solution", "nbval-check-output"]
def added_up(parameters, max_norm, tell):
    norm = sum(tell(nn.utils.get_total_norm([parameter.grad for parameter in parameters])))
    for parameter in parameters:
        parameter.grad *= min(1.0, max_norm / (norm + 1e-6))
    return norm


check("unit12.clip", added_up)

# %% [markdown]
# ## 7 · Count
# Write `after_step`. **Target:** 8 series of steps, skipped ones at the beginning, in the middle and at the end; all four numbers right
# after every step.


# %% tags=["answer:after_step"]
def after_step(state, skipped, growth):
    """Count a step in `state`, in place. skipped: its gradients were not finite, so the weights were not updated.

    step: mini-batches used. updates: of the weights. scale: of the loss; halved by a skipped step, doubled after
    `growth` good ones in a row. good: good steps since the scale last changed.
    """
    ### BEGIN SOLUTION
    state["step"] += 1
    if skipped:
        state["scale"] /= 2
        state["good"] = 0
        return
    state["updates"] += 1
    state["good"] += 1
    if state["good"] == growth:
        state["scale"] *= 2
        state["good"] = 0
    ### END SOLUTION


# %%
state = {"step": 0, "updates": 0, "scale": 1024.0, "good": 0}
for skipped in (True, True, False):
    call(after_step, state, skipped, 100)
print(state)

# %% tags=["check:after_step", "nbval-check-output"]
check("unit12.after_step", after_step)

# %% [markdown] tags=["solution"]
# **Why.** A skipped step has changed no weight, so the warm-up must not move. The script counted it: with three skipped steps the first
# update already had the learning rate of the fourth. The more the first loss scale was too high, the shorter the warm-up.
#
# **One wrong way:** to count nothing at all in a skipped step. Then the same mini-batch comes again.


# %% tags=["solution", "nbval-check-output"]
def same_batch_again(state, skipped, growth):
    if skipped:
        state["scale"] /= 2
        state["good"] = 0
    else:
        after_step(state, skipped, growth)


check("unit12.after_step", same_batch_again)

# %% [markdown]
# ## 8 · Resume
# Write `restore`. What it is given to fill belongs to the caller, who goes on with it. **Target:** 4 runs, saved and resumed after 1 to 12
# steps, go on with the same weights and the same state as one that never ended.


# %% tags=["answer:restore"]
def restore(saved, parameters, optimizer, state):
    """Put what `save` returned into parameters, optimizer and state, in place; the run goes on as if never ended."""
    ### BEGIN SOLUTION
    optimizer.load_state_dict(saved["optimizer"])
    state.update(saved["state"])
    for i, weight in enumerate(saved["weights"]):
        parameters[i].data.copy_(weight)
    ### END SOLUTION


# %%
state = {"step": 0, "updates": 0, "scale": 1024.0, "good": 0}
weight = torch.zeros(1, requires_grad=True)
adam = torch.optim.Adam([weight])
call(
    restore,
    script.save([weight + 1], adam, {"step": 9, "updates": 8, "scale": 512.0, "good": 7}),
    [weight],
    adam,
    state,
)
print(state, weight.item())

# %% tags=["check:restore", "nbval-check-output"]
check("unit12.restore", restore)

# %% [markdown] tags=["solution"]
# **Why.** `state = dict(...)` gives a new meaning to a name inside the function; the caller's dictionary stays as it was. Data, warm-up and
# loss scale began anew, while weights and moments were restored, so the loss went on as low as before. A linter names this line: a
# variable that is assigned and never used.
#
# **One wrong way:** to restore all but the optimizer. Adam's moments begin at zero, so the first steps after the resume are others.


# %% tags=["solution", "nbval-check-output"]
def without_moments(saved, parameters, optimizer, state):
    state.update(saved["state"])
    for parameter, weight in zip(parameters, saved["weights"], strict=True):
        parameter.data.copy_(weight)


check("unit12.restore", without_moments)

# %% [markdown]
# ## The whole script
# Your functions in place of the script's own, those that are not written yet left out. Each line is an experiment with the whole script.

# %%
symptoms(split, attend, run_layers, loss_share, backward, clip, after_step, restore)

# %% [markdown] tags=["solution"]
# And the script as it was given:

# %% tags=["solution"]
symptoms()

# %% [markdown]
# ## References
# Bugs of this kind in other people's runs: layers lost by rounding down, [torchtitan#963](https://github.com/pytorch/torchtitan/pull/963) ·
# dropout that depends on the number of stages, [pytorch#55036](https://github.com/pytorch/pytorch/issues/55036) · micro-batches added up
# undivided, [DeepSpeed#7773](https://github.com/deepspeedai/DeepSpeed/issues/7773) · only the last micro-batch counts,
# [Automodel#3530](https://github.com/NVIDIA-NeMo/Automodel/pull/3530) · scaled on every stage,
# [DeepSpeed#8152](https://github.com/deepspeedai/DeepSpeed/issues/8152) · averaged with what was there before,
# [torchtitan#1733](https://github.com/pytorch/torchtitan/issues/1733) · clipping by a stage's own norm,
# [torchtitan#596](https://github.com/pytorch/torchtitan/issues/596), [Modalities#313](https://github.com/Modalities/modalities/issues/313)
# · a schedule that moves on skipped steps, [Lightning#18828](https://github.com/Lightning-AI/pytorch-lightning/issues/18828) · a resume
# that restores too little, [the_well#77](https://github.com/PolymathicAI/the_well/issues/77). What True means in a mask:
# [scaled_dot_product_attention](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html),
# [MultiheadAttention](https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html).
