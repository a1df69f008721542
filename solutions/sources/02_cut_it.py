# %% [markdown] tags=["opening"]
# # Exercises 02 · Cut it in one process
#
# **You need** [lesson 02](../../notebooks/02_cut_it.ipynb). **Minutes:** 60. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
import torch

from course_utils.checks import call, check, hint, start
from course_utils.checks.unit_02 import Cut, Skips, build, build_skips, plan_of
from course_utils.checks.values import print_numbers

start("02")

# %% [markdown]
# ## 1 · A step over borders, from memory
# A model is cut into stages. Run one step, forward and backward, so that between two stages only numbers cross, and every parameter has
# its gradient at the end. **Target:** every bit of the loss and of all gradients as on one device, on 1 to 5 stages. Time: each stage is
# called once, and one walk back goes through it. Memory: the loss that you return keeps no graph.
#
# | | |
# | --- | --- |
# | `x` | a float tensor that needs no gradient, and goes into the first stage: its carry is `(x, None)` |
# | `stage(carry)` | returns the next carry. A carry is the pair (hidden, memory); one of the two may be `None` |
# | `stages[-1](carry)` | returns `(loss, None)`; the loss is a single number |


# %% tags=["answer:step_in_stages"]
def step_in_stages(stages, x):
    """Leave the gradients of one step in the parameters of all stages; return the loss."""
    ### BEGIN SOLUTION
    kept, carry = [], (x, None)
    for stage in stages:
        received = [None if tensor is None else tensor.detach().requires_grad_() for tensor in carry]
        carry = stage(received)
        kept.append((received, carry))
    loss, gradients = carry[0].detach(), [torch.tensor(1.0), None]
    for received, sent in reversed(kept):
        there = [i for i in range(2) if sent[i] is not None]
        torch.autograd.backward([sent[i] for i in there], [gradients[i] for i in there])
        gradients = [None if leaf is None else leaf.grad for leaf in received]
    return loss
    ### END SOLUTION


# %% [markdown]
# Seven blocks in three stages; at both borders memory crosses. Which stages have gradients after your step?

# %%
stages, x = build(Cut(sizes=(3, 2, 2), encoders=2, decoders=2, width=4, seed=0))
loss = call(step_in_stages, stages, x)
for k, stage in enumerate(stages):
    there = [parameter.grad is not None for parameter in stage.parameters()]
    print(f"stage {k}: {sum(there)} of {len(there)} parameters have a gradient")
if loss is not None:
    print_numbers("yours:", "loss {:.4f}", loss)

# %% tags=["check:step_in_stages", "nbval-check-output"]
check("unit02.step_in_stages", step_in_stages)

# %% [markdown] tags=["solution"]
# **Why.** `detach` cuts the history, so the walk back of a stage ends in its leaves; `requires_grad_` makes them collect a gradient. A
# stage keeps two things, its leaves and what it sent. What was sent enters one walk together: so gradients that come from behind and those of the
# stage's own uses are added where they meet on one device, in the memory.
#
# **One wrong way:** to give each tensor a `backward` of its own. The second one fails, because the first has freed the graph; with
# `retain_graph=True`, as the message advises, nothing fails any more:


# %% tags=["solution", "nbval-check-output"]
def one_after_the_other(stages, x):
    kept, carry = [], (x, None)
    for stage in stages:
        received = [None if tensor is None else tensor.detach().requires_grad_() for tensor in carry]
        carry = stage(received)
        kept.append((received, carry))
    loss, gradients = carry[0].detach(), [torch.tensor(1.0), None]
    for received, sent in reversed(kept):
        for tensor, gradient in zip(sent, gradients, strict=True):
            if tensor is not None:
                tensor.backward(gradient, retain_graph=True)
        gradients = [None if leaf is None else leaf.grad for leaf in received]
    return loss


check("unit02.step_in_stages", one_after_the_other)

# %% [markdown]
# ## 2 · Tensors that several stages use
# In the lesson, memory went through every stage on its way. Here a tensor goes **straight from the stage that makes it to each stage that uses
# it**, as the skip connections of a U-Net do. **Target:** every bit of the loss and of all gradients as on one device, with up to 6 stages and
# any number of uses. Time: one call and one walk back per stage. Memory: the loss that you return keeps no graph.
#
# | | |
# | --- | --- |
# | `stage.takes`, `stage.gives` | names of tensors. A stage takes only what is made before it |
# | `stage(taken)` | takes a dictionary from name to tensor, returns one |
# | `"x"` | the name of the data; `x` is the tensor. It needs no gradient |
# | `"loss"` | the only name that the last stage gives |
#
# A stage may give two tensors, and one of them may be used by nobody. For this model all of it matters:

# %% tags=["nbval-check-output"]
skips = Skips(plan=(("x", "ab"), ("a", "c"), ("bc", "de"), ("db", "f"), ("fcb", "")), width=4, seed=0)
stages, x = build_skips(skips)
print("\n".join(plan_of(stages)))

# %% [markdown]
# Between stages only numbers cross, as if each stage were in a process of its own, so every stage gets a leaf of its own, also of a tensor that others use. The gradients of all uses of a tensor have to be added up before
# the walk through the stage that made it. In which order, so that the bits are those of one device?


# %% tags=["answer:step_with_skips"]
def step_with_skips(stages, x):
    """Leave the gradients of one step in the parameters of all stages; return the loss."""
    ### BEGIN SOLUTION
    made, kept = {"x": x}, []
    for stage in stages:
        leaves = {name: made[name].detach().requires_grad_(name != "x") for name in stage.takes}
        given = stage(leaves)
        made.update(given)
        kept.append((leaves, given))
    gradients = {"loss": torch.tensor(1.0)}
    for leaves, given in reversed(kept):
        roots = [name for name in given if name in gradients]
        torch.autograd.backward([given[name] for name in roots], [gradients[name] for name in roots])
        for name, leaf in leaves.items():
            if name in gradients:
                gradients[name] = gradients[name] + leaf.grad
            elif name != "x":
                gradients[name] = leaf.grad
    return made["loss"].detach()
    ### END SOLUTION


# %% [markdown]
# Stage by stage, the norm of your gradient and how far it is from that of one device:

# %%
loss = call(step_with_skips, stages, x)
whole, x = build_skips(skips)
there = {"x": x}
for stage in whole:
    there |= stage({name: there[name] for name in stage.takes})
there["loss"].backward()
if loss is not None:
    for k, (mine, right) in enumerate(zip(stages, whole, strict=True)):
        pairs = [
            (a.grad, b.grad) for a, b in zip(mine.parameters(), right.parameters(), strict=True) if b.grad is not None
        ]
        norm = torch.cat([b.flatten() for _, b in pairs]).norm()
        off = max(float("inf") if a is None else (a - b).abs().max().item() for a, b in pairs)
        print(f"stage {k}: norm on one device {norm:.4f}, largest difference {off:.1g}")

# %% tags=["check:step_with_skips", "nbval-check-output"]
check("unit02.step_with_skips", step_with_skips)

# %% [markdown] tags=["solution"]
# **Why.** The chain rule adds one term for each use. Going through the stages backwards, all users of a tensor come before its maker, so when
# its walk begins all terms have arrived. The walk of one device comes to the last use first; whoever adds in this order gets its bits. And what
# nobody uses has no gradient, so it is no root.
#
# **One wrong way:** to note a gradient under the tensor's name without adding. The loss is right, all shapes fit, and one use of several
# counts:


# %% tags=["solution", "nbval-check-output"]
def overwrites(stages, x):
    made, kept = {"x": x}, []
    for stage in stages:
        leaves = {name: made[name].detach().requires_grad_() for name in stage.takes}
        given = stage(leaves)
        made.update(given)
        kept.append((leaves, given))
    gradients = {"loss": torch.tensor(1.0)}
    for leaves, given in reversed(kept):
        roots = [name for name in given if name in gradients]
        torch.autograd.backward([given[name] for name in roots], [gradients[name] for name in roots])
        gradients.update({name: leaf.grad for name, leaf in leaves.items()})
    return made["loss"].detach()


check("unit02.step_with_skips", overwrites)

# %% [markdown]
# ## References
# PyTorch: [torch.autograd.backward](https://docs.pytorch.org/docs/stable/generated/torch.autograd.backward.html) · A graph that comes along
# over the border: [pytorch#153485](https://github.com/pytorch/pytorch/issues/153485) · A model with two inputs that does not fit a sequence:
# [transformers#9765](https://github.com/huggingface/transformers/pull/9765) · Kim et al., 2020, *torchgpipe*,
# [arXiv 2004.09910](https://arxiv.org/abs/2004.09910), on skip connections between stages · Ronneberger et al., 2015, *U-Net*,
# [arXiv 1505.04597](https://arxiv.org/abs/1505.04597).
