# %% [markdown] tags=["opening"]
# # 02 · Cut it in one process
#
# **You will be able to** cut a model between any two of its blocks, carry the gradient over the border by hand, show that
# no bit changes, and choose where to cut.
#
# **You need** [lesson 01](01_one_device.ipynb) and `loss.backward()`.
#
# **Minutes:** 30 to read, 1 to run. **New terms:** [border](00_start_here.ipynb#border), [leaf](00_start_here.ipynb#leaf),
# [root](00_start_here.ipynb#root), [stash](00_start_here.ipynb#stash), [partition](00_start_here.ipynb#partition).
#
# Lesson 01 ended with a string, the fingerprint of a step on one device, and its pictures showed what each block costs. Now the
# list of blocks is cut. Here the model is half as wide and the batch smaller, so the string is another one; what has to stay is equality
# with one device. There is no second process yet: if one process cannot do it, two cannot either.

# %% tags=["where"]
from course_utils.course_map import where

where("02")

# %% [markdown]
# ## The border, on the smallest model there is
# Two linear layers. When you call `loss.backward()`, autograd walks from the loss back to the first layer, because every
# tensor knows what made it: its `grad_fn`. To another process only *numbers* can be sent, without that history. `detach()`
# gives the same numbers without history, so it does in one process what a message will do. Look at what each side knows:

# %% tags=["nbval-check-output"]
import torch
from torch import nn

torch.set_num_threads(1)  # as every stage will have it; with more, sums are cut into other pieces
torch.manual_seed(0)
first, second = nn.Linear(4, 3), nn.Linear(3, 2)
sent = first(torch.ones(5, 4))
received = sent.detach().requires_grad_()
print("sent was made by", type(sent.grad_fn).__name__)
print("received was made by", received.grad_fn, "and is a leaf:", received.is_leaf)

# %% [markdown]
# `received` is a *leaf*: history begins here. `requires_grad_()` asks autograd to collect a gradient in it. So the
# backward pass of the second half stops at the border, and leaves there what the first half needs: how the loss changes
# with every number that was sent. `sent.backward(gradient)` goes on from there. Are two short walks the same as a long one?

# %% tags=["claim:border"]
second(received).sum().backward()  # stops at the border
sent.backward(received.grad)  # goes on from there

loss = second(first(torch.ones(5, 4))).sum()
for parameter, at_once in zip(first.parameters(), torch.autograd.grad(loss, list(first.parameters())), strict=True):
    assert torch.equal(parameter.grad, at_once)
print("the gradients of the first layer: the same bits")

# %% [markdown]
# The same bits. That is the chain rule, and autograd multiplies in this order anyway: cutting adds no arithmetic.

# %% [markdown]
# ## What crosses
# In [lesson 01](01_one_device.ipynb) you saw that nothing but the carry, the pair (hidden, memory), connects two halves of the model. So that is what a border
# has to let through, and the gradient of each of its tensors has to come back. At how many of the seven borders are there two?
#
# (As in lesson 01, `CutModel` is a model and where it is cut; `by_count(8, 1)` puts all eight blocks into one stage, and `build(0, seed=0)`
# builds stage 0.)

# %%
from course_utils.number_words import batch
from course_utils.stages import CutModel, by_count
from course_utils.transformer import TransformerConfig

config = TransformerConfig(d_model=64)
micro_batch = batch(range(100_000, 1_000_000), seed=0, step=0, size=16)
model = CutModel(config, by_count(8, 1)).build(0, seed=0)

# %% tags=["nbval-check-output", "claim:carry"]
carry, crossing = (None, None), []
for builder, block in zip(model.builders[:7], model.blocks, strict=False):
    carry = block(carry, micro_batch)
    sizes = {name: t.nbytes for name, t in zip(("hidden", "memory"), carry, strict=True) if t is not None}
    crossing.append(len(sizes))
    print(f"after {builder.index} {builder.name:16}  {sum(sizes.values()):>6,} bytes each way: {' and '.join(sizes)}")
assert crossing == [1, 1, 1, 1, 2, 2, 1]

# %% [markdown]
# There are three kinds of borders: hidden alone (after 0, 1, 2 and 6), memory alone (after 3), and both (after 4 and 5). A border that
# works has to work for all three.

# %% [markdown] tags=["stub"]
# ## Write it first
# One step over two stages: forward through `first`, over the border, through `second` to the loss, and all the way back, so that
# every parameter of both has its gradient. `first((None, None), micro_batch)` gives a carry,
# `second(carry, micro_batch)` gives `(logits, None)`, and `sum_over_tokens(logits, micro_batch, num_tokens)` the loss. You
# will need `torch.autograd.backward(tensors, gradients)`: several tensors enter one walk back together.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check
from course_utils.pipeline import sum_over_tokens


def step_in_two_stages(first, second, micro_batch, num_tokens):
    """Leave the gradients of one step in the parameters of both stages; return the loss."""
    ...  # your turn: about eight lines


check("02.step_in_two_stages", step_in_two_stages)

# %% [markdown]
# ## Any number of stages
# Two functions, for any list of stages. The forward pass cuts at every border, and keeps two things of each stage: what it
# received, to read the gradient from, and what it sent, on which its whole graph hangs. What the last
# stage sends is the loss.


# %%
def receive(carry):
    """The same numbers, without the history that made them, ready to collect a gradient."""
    return tuple(None if tensor is None else tensor.detach().requires_grad_() for tensor in carry)


def forward(stages, micro_batch, num_tokens):
    """The loss, and per stage what its backward needs: (what it received, what it sent)."""
    kept, carry = [], (None, None)
    for stage in stages:
        received = receive(carry)
        carry = stage(received, micro_batch)
        kept.append((received, carry))
    loss = sum_over_tokens(carry[0], micro_batch, num_tokens)
    kept[-1] = (received, (loss,))
    return loss.detach(), kept


# %% [markdown]
# The backward pass takes the stages in reverse. The gradients of *all* that a stage has sent enter together, as *roots* of one walk; out of
# its leaves come the gradients for the stage before.


# %%
def backward(kept):
    """Leave in every parameter its gradient."""
    gradients = (torch.tensor(1.0),)  # of the loss with respect to itself
    for received, sent in reversed(kept):
        pairs = [(tensor, g) for tensor, g in zip(sent, gradients, strict=True) if tensor is not None]
        torch.autograd.backward([tensor for tensor, _ in pairs], [g for _, g in pairs])
        gradients = tuple(None if leaf is None else leaf.grad for leaf in received)


# %% [markdown]
# What lies between the two, for a model cut in three? Watch what the middle stage keeps:


# %% tags=["nbval-check-output", "claim:kept"]
def stages_of(partition, config=config):
    cut = CutModel(config, tuple(partition))
    return [cut.build(stage, seed=0) for stage in range(cut.num_stages)]


num_tokens = micro_batch.num_tokens
loss, kept = forward(stages_of([range(0, 3), range(3, 6), range(6, 8)]), micro_batch, num_tokens)
for stage, carries in enumerate(kept):
    received, sent = (["-" if t is None else "x".join(map(str, t.shape)) or "loss" for t in c] for c in carries)
    print(f"stage {stage} received {', '.join(received):18}  sent {', '.join(sent)}")

# %% [markdown]
# Until its backward no stage can let go of any of it, and with it of all the activations inside the graph. This is the
# *stash*, and [lesson 07](07_bubble_and_stash.ipynb) counts its bytes.
#
# ## The same bits, wherever you cut
# Eight blocks have seven borders, and each may be cut or not: 128 ways, from one stage to eight. In how many of them will
# a loss or a gradient differ from that of one device, in even the last bit of one number?

# %%
from course_utils.predictions import predict

guess = predict("cuts with other bits", blocks=8, unit="of 128", value=None)  # put your number in place of None

# %%
from itertools import combinations

from course_utils.fingerprints import fingerprint, step_summary


def all_cuts(num_blocks, num_stages):
    for borders in combinations(range(1, num_blocks), num_stages - 1):
        ends = [0, *borders, num_blocks]
        yield tuple(range(start, end) for start, end in zip(ends, ends[1:], strict=False))


def fingerprint_of(stages, loss):
    losses = [{}] * (len(stages) - 1) + [{0: loss}]  # the last stage has it
    pairs = zip(stages, losses, strict=True)
    return fingerprint([step_summary(own, stage.named_parameters_globally()) for stage, own in pairs])


# %% [markdown]
# `named_parameters_globally` calls each parameter as the whole model does, and `step_summary` is a stage's part of the fingerprint: its
# losses, if it has them, and its gradients. One device first, with nothing but `loss.backward()`. Then every cut there is:

# %% tags=["fingerprint", "claim:every-cut"]
logits, _ = model((None, None), micro_batch)
loss = sum_over_tokens(logits, micro_batch, num_tokens)
loss.backward()
one_device, right_loss = fingerprint_of([model], loss), loss.detach()

found = []
for num_stages in range(1, 9):
    for cut in all_cuts(8, num_stages):
        stages = stages_of(cut)
        loss, kept = forward(stages, micro_batch, num_tokens)
        backward(kept)
        found.append(fingerprint_of(stages, loss))
print(f"one device {one_device}; {len(found)} cuts: {', '.join(sorted(set(found)))}")
assert len(found) == 128 and set(found) == {one_device}

# %%
from course_utils.charts import describe_prediction, draw_prediction
from course_utils.plots import show

guess.settle(measured=sum(other != one_device for other in found), formula=0)
print(describe_prediction(guess))

# %% [markdown]
# In none of them: where you cut decides nothing but who computes what.
#
# ## What the package adds
# The course's executor runs the same two functions over several ranks. Here its ranks are threads of this process, and its
# schedule, `naive` with one micro-batch, means: all forwards, then all backwards. Of `step_on_rank` read only the first line and the
# last; lessons 03 to 06 explain what is between them.

# %% tags=["claim:package"]
from course_utils.pipeline import Pipeline
from course_utils.schedules import naive
from course_utils.threads import run_in_threads


def step_on_rank(worker, cut):
    stage = cut.build(worker.rank, seed=0)
    pipeline = Pipeline({worker.rank: stage}, naive(cut.num_stages, 1), worker.transport, cut.carry_after)
    losses = pipeline.step([micro_batch], pipeline.plan([micro_batch]), num_tokens)
    return step_summary(losses, stage.named_parameters_globally())


in_threads = fingerprint(run_in_threads(step_on_rank, 3, CutModel(config, by_count(8, 3))))
print("the package, three stages in threads:", in_threads)
assert in_threads == one_device

# %% [markdown]
# Its backward, for comparison with yours:

# %%
from inspect import getsource

print(getsource(Pipeline.backward))

# %% [markdown]
# The middle is the same. Added are: `inputs` and `stash` by stage *and* micro-batch ([lesson 05](05_micro_batches.ipynb)); gradients that
# arrive as messages ([lesson 03](03_two_processes_that_talk.ipynb)); roots only where something is to be learnt; a factor on the loss and a switched-off `autocast`, both for
# 16-bit numbers. And in the forward the blocks get a *view* of each leaf, again for 16-bit numbers: autocast caches the cast of a
# leaf.

# %% [markdown]
# ## Three mistakes made on purpose
# **Detach forgotten.** `received` is `sent` itself. Its `.grad` stays empty, so someone adds `retain_grad()`, and then:

# %% tags=["mistake", "raises-exception", "nbval-check-output"]
first, second = stages_of([range(0, 3), range(3, 8)])
sent, _ = first((None, None), micro_batch)
received = sent  # the mistake
received.retain_grad()
logits, _ = second((received, None), micro_batch)
sum_over_tokens(logits, micro_batch, num_tokens).backward()
sent.backward(received.grad)

# %% [markdown]
# The first backward did not stop at the border. It went through both stages, freed the graph behind it, and the second one
# found nothing. Users of PyTorch's pipeline meet this when what they feed into it has a history
# ([pytorch#153485](https://github.com/pytorch/pytorch/issues/153485)). The message advises `retain_graph=True`. Follow it:


# %%
def gradients_of(stages):
    return {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters_globally()}


right = gradients_of([model])  # of one device

# %% tags=["mistake", "claim:detach"]
first, second = stages_of([range(0, 3), range(3, 8)])
sent, _ = first((None, None), micro_batch)
sent.retain_grad()
logits, _ = second((sent, None), micro_batch)
sum_over_tokens(logits, micro_batch, num_tokens).backward(retain_graph=True)
sent.backward(sent.grad)
assert all(torch.equal(gradient, 2 * right[name]) for name, gradient in gradients_of([first]).items())
print("every gradient of the first stage is exactly twice what it should be")

# %% [markdown]
# No error any more, and the first stage now learns from twice its gradient. The cure is not the advice; it is `receive` above.
#
# **The gradient of one use lost.** Cut after block 5: the first stage sends hidden *and* memory. Someone sends back the gradient of hidden only, as
# in a plain sequence of layers, which an encoder-decoder is not. (T5 was made one for PyTorch's `Pipe`: "a study in hacking", says
# [transformers#9765](https://github.com/huggingface/transformers/pull/9765), because `Pipe` let only tensors or tuples of tensors pass.)
# The memory still gets a gradient, through `decoder_0`. By how much is the gradient of the encoder off?

# %%
guess = predict("encoder gradient without one use of the memory", unit="relative error", value=None)


# %%
def relative_error(stages, part):
    pairs = [(g, right[name]) for name, g in gradients_of(stages).items() if part in name]
    wrong, expected = (torch.cat([gradient.flatten() for gradient in side]) for side in zip(*pairs, strict=True))
    return ((wrong - expected).norm() / expected.norm()).item()


# %% tags=["mistake", "claim:lost-use"]
stages = stages_of([range(0, 6), range(6, 8)])
loss, kept = forward(stages, micro_batch, num_tokens)
(received, (output,)), (hidden, memory) = kept[1], kept[0][1]
output.backward()
hidden.backward(received[0].grad)  # and received[1].grad, that of the memory, is forgotten
parts = ("source_embedding", "encoder", "target_embedding", "decoder", "head")
errors = {part: relative_error(stages, part) for part in parts}
for part, error in errors.items():
    print(f"{part:16}  relative error {error:.2f}")
assert min(errors["source_embedding"], errors["encoder"]) > 0.05 and torch.equal(loss, right_loss)
assert errors["target_embedding"] == errors["decoder"] == errors["head"] == 0

# %%
guess.settle(measured=errors["encoder"])
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# The loss of this step is right, and so is every gradient of the decoder, the head and the target's embedding. Nothing crashes. Wrong is
# all that made the memory: the encoder, and the embedding of the source before it.
#
# **Added afterwards.** Now the memory's gradient is remembered, but it takes a walk of its own. (Without `retain_graph` the second walk
# fails; the message is the one you know.)

# %% tags=["mistake", "claim:roots"]
stages = stages_of([range(0, 6), range(6, 8)])
loss, kept = forward(stages, micro_batch, num_tokens)
(received, (output,)), (hidden, memory) = kept[1], kept[0][1]
output.backward()
hidden.backward(received[0].grad, retain_graph=True)
memory.backward(received[1].grad)
error = relative_error(stages, "encoder")
print(f"relative error of the encoder: {error:.0e}")
assert 0 < error < 1e-5
assert fingerprint_of(stages, loss) != one_device

# %% [markdown]
# Mathematically right, and other bits. Each of the two gradients was carried through the encoder alone: they were added after that walk, in
# each parameter, instead of before it, in the memory. It is also twice the work. As
# roots of one walk they meet where they would have met on one device. That is why `backward` above is written as it is: if
# right code may differ in its last bits, equality can no longer tell it from wrong code.

# %% [markdown]
# ## Where to cut
# All cuts compute the same, so speed may decide. Later the stages work at the same time, and the slowest one sets the pace: if block $j$
# costs $c_j$, one stage needs $\sum_j c_j$ for each micro-batch, and a pipeline that is full delivers one whenever its slowest stage is done. So for
# very many micro-batches and free messages the best possible speed-up is $\sum_j c_j$ over the cost of the slowest stage.
#
# Here is a deeper model. `measure_costs` times forward and backward of each block alone, behind a border of its own, and keeps the
# median of five. If three stages are made of four blocks each, how many times as fast as one stage can they be at best?

# %%
guess = predict("speed-up at best", blocks=12, stages=3, unit="times as fast as one stage", value=None)

# %%
from math import fsum

from course_utils.stages import measure_costs
from course_utils.transformer import block_builders

deep = block_builders(TransformerConfig(encoder_layers=4, decoder_layers=4))
costs = measure_costs(deep, batch(range(100_000, 1_000_000), seed=0, step=0, size=32), seed=0)


def slowest(cut):
    return max(fsum(costs[index] for index in stage) for stage in cut)


# %% [markdown]
# `by_count` deals out the blocks as evenly as possible. The best cut is found by trying all of them, or, for long lists, by the
# package's `by_cost`, which solves each tail of the list once and remembers it. Both must find the same slowest stage:

# %% tags=["claim:balance"]
from course_utils.stages import by_cost

best = min(slowest(cut) for cut in all_cuts(12, 3))
cuts = {"by count": by_count(12, 3), "by cost": by_cost(costs, 3)}
assert slowest(cuts["by cost"]) == best <= slowest(cuts["by count"])
for name, cut in cuts.items():
    print(f"{name}: {[len(stage) for stage in cut]} blocks, at best {sum(costs) / slowest(cut):.2f} times as fast")

# %%
from course_utils.charts import describe_bars, draw_bars

guess.settle(measured=sum(costs) / slowest(cuts["by count"]), formula=3)
print(describe_prediction(guess))

# %%
bars = {}
for name, cut in cuts.items():
    for stage, blocks in enumerate(cut):
        first, last = deep[blocks[0]].name, deep[blocks[-1]].name
        bars[f"{name}, stage {stage}: {first} to {last}"] = 1000 * fsum(costs[index] for index in blocks)

# %%
title = "forward and backward of each stage"
show(draw_bars(bars, "ms", title), says=describe_bars(bars, "ms", title))

# %% [markdown]
# Equal numbers of blocks are not equal work: a decoder layer has a second attention, an embedding only looks up rows of a
# table. Nor is perfect balance to be had by cost: a block is the smallest thing that can be moved. Large models have the same trouble at their ends: Llama 3 gives its first and its last stage one layer
# fewer (arXiv 2407.21783), and users ask how to do it ([Megatron-LM#1303](https://github.com/NVIDIA/Megatron-LM/issues/1303)).
#
# And count them. `num_blocks // num_stages` per stage is quickly written. With 8 blocks and 3 stages it loses two of them; torchtitan's
# experimental DeepSeek model lost layers so, and gave "weird generations" ([torchtitan#963](https://github.com/pytorch/torchtitan/pull/963)). The package refuses:

# %% tags=["mistake", "raises-exception", "nbval-check-output"]
from course_utils.stages import stage_table

per_stage = 8 // 3
lost = tuple(range(k * per_stage, (k + 1) * per_stage) for k in range(3))
stage_table(model.builders, lost)

# %% [markdown]
# With sizes that differ by at most one no block is lost. Only time was balanced here; memory is another matter, the stash and the weights.
# What the weights of each stage take:

# %% tags=["nbval-check-output", "claim:table"]
print(stage_table(model.builders, by_count(8, 3)))

# %% [markdown] tags=["summary"]
# ## What you know now
# - A backward pass can be cut at a border: the gradient of what was received continues in what was sent. <!-- shown: border -->
# - One tensor crosses at five of the seven borders, two at the others. <!-- shown: carry -->
# - Each stage keeps what it received and what it sent, until its backward. <!-- shown: kept -->
# - All 128 cuts give the bits of one device. <!-- shown: every-cut -->
# - The package's executor, three ranks in threads, gives them too. <!-- shown: package -->
# - Without `detach` the first stage gets its gradient twice. <!-- shown: detach -->
# - A use of the memory that is forgotten spoils all that made the memory; loss and decoder look right. <!-- shown: lost-use -->
# - Gradients that enter one after the other give other bits than roots of one walk. <!-- shown: roots -->
# - The slowest stage sets the pace; the best cut by cost is never slower than the one by count. <!-- shown: balance -->
# - A partition holds every block once. <!-- shown: table -->
#
# **Kept for later:** `Stage`, `CutModel`, `by_count`, `by_cost`, `measure_costs` and `stage_table` in `course_utils/stages.py`;
# `forward` and `backward` as methods of `Pipeline` in `course_utils/pipeline.py`.
#
# **Practise:** give `by_cost` the costs of the deep model and 2 to 12 stages. From which number on does another stage gain nothing,
# and which kind of block sets the limit?
# Exercises: [unit 02](../exercises/02_cut_it/02_cut_it.ipynb).
#
# **Next:** [03 · Two processes that talk](03_two_processes_that_talk.ipynb)

# %% [markdown]
# ## Questions
# 1. In two real processes, can you forget `detach`? Can you forget `requires_grad_`?
# 2. Which border is the cheapest to send over: after block 2, 3 or 5?
# 3. Why does stage 1 have to run its backward before stage 0, although stage 0 ran its forward first?
# 4. The whole encoder is on the first of four stages, and each stage has one decoder layer, so the memory crosses three borders. Who adds up its
#    gradients?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. Not `detach`: a message has no history. But `requires_grad_`, yes: then no gradient is collected, and the first stage learns nothing.
# 2. After 2 and after 3 one tensor of the source's length crosses. After 5 two cross, and the gradient of both comes back.
# 3. The gradient of what stage 0 sent is made by stage 1's backward. The loss is at the far end.
# 4. Each stage in turn. What arrives from behind enters its walk as a root, meets the gradient of the stage's own use, and
#    leaves through its leaf to the stage before; on the first it goes on into the encoder.
#
# The exercise: the slowest stage takes at least the time of the most expensive block. Once it is that block alone, another stage gains nothing.
# With eight encoder and decoder layers and little else that is to be expected from about eight stages on, and of a decoder layer:

# %% tags=["answers"]
for num_stages in range(2, 13):
    cut = by_cost(costs, num_stages)
    longest = max(cut, key=lambda stage: fsum(costs[index] for index in stage))
    names = " to ".join(deep[index].name for index in sorted({longest[0], longest[-1]}))
    print(f"{num_stages:2} stages: at best {sum(costs) / slowest(cut):.2f} times as fast; the slowest: {names}")

# %% [markdown]
# And the step over two stages:


# %% tags=["answers", "nbval-check-output"]
def step_in_two_stages(first, second, micro_batch, num_tokens):
    """Leave the gradients of one step in the parameters of both stages; return the loss."""
    sent = first((None, None), micro_batch)
    received = tuple(None if tensor is None else tensor.detach().requires_grad_() for tensor in sent)
    logits, _ = second(received, micro_batch)
    loss = sum_over_tokens(logits, micro_batch, num_tokens)
    loss.backward()
    pairs = [(tensor, leaf.grad) for tensor, leaf in zip(sent, received, strict=True) if tensor is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
    return loss.detach()


check("02.step_in_two_stages", step_in_two_stages)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, arXiv 1811.06965, sections 2.1 and 2.2 · Llama Team, 2024, *The Llama 3 Herd of Models*, arXiv
# 2407.21783, section 3.3.2 · PyTorch: [autograd mechanics](https://docs.pytorch.org/docs/stable/notes/autograd.html),
# [torch.autograd.backward](https://docs.pytorch.org/docs/stable/generated/torch.autograd.backward.html),
# [Tensor.detach](https://docs.pytorch.org/docs/stable/generated/torch.Tensor.detach.html).
