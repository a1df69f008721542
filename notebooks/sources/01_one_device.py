# %% [markdown] tags=["opening"]
# # 01 · One device
#
# **You will be able to** say what goes into an encoder-decoder Transformer and what comes out, write its masks, train it on one device, say block by block
# where time and memory go, and recognise a mistake that no error message reveals.
#
# **You need** [lesson 00](00_start_here.ipynb). **Minutes:** 25 to read, 1 to run.
#
# **New terms:** [teacher forcing](00_start_here.ipynb#teacher-forcing), [mask](00_start_here.ipynb#mask),
# [block](00_start_here.ipynb#block), [carry](00_start_here.ipynb#carry), [activation](00_start_here.ipynb#activation),
# [fingerprint](00_start_here.ipynb#fingerprint).
#
# Lesson 00 ended with a script whose mistakes were found one error at a time. Here is the same task done right on one device, and a string
# for its bits. Another model or batch has another string; what has to stay in all later lessons is equality with one device on the same batch and model.

# %% tags=["where"]
from course_utils.course_map import where

where("01")

# %% [markdown]
# ## The data
# Digits go in, words come out. A batch holds three tensors of token ids. Look at what the decoder gets and what it
# shall say: how do the two differ?

# %% tags=["nbval-check-output"]
from course_utils.number_words import SOURCE, TARGET, collate

rows = collate([7, 42, 905])
for row in range(3):
    print("source       ", *SOURCE.decode(rows.source[row]))
    print("target input ", *TARGET.decode(rows.target_input[row]))
    print("target output", *TARGET.decode(rows.target_output[row]), "\n")

# %% [markdown]
# The input of the decoder is its output, shifted by one. It is given the *right* words so far, not its own: *teacher forcing*. So all
# positions of a row are trained at once, and the only thing that keeps a position from reading off its answer is a mask.
# Short rows are filled with `<pad>`. How many places are there, and how many of them count?

# %% tags=["nbval-check-output"]
print("shape", tuple(rows.target_output.shape), "- places", rows.target_output.numel(), "- tokens", rows.num_tokens)

# %% [markdown]
# This lesson uses the numbers below 1000, because they are learnt in seconds. 100 of them are held out for an exam.

# %% tags=["nbval-check-output", "claim:held-out"]
from course_utils.number_words import split_numbers

numbers = split_numbers(0, 999, training=None, held_out=100)
print(len(numbers.training), "to learn from,", len(numbers.held_out), "for the exam")
assert not set(numbers.training) & set(numbers.held_out)

# %% [markdown]
# ## Masks
# Attention lets every position look at every other one. Two rules forbid some of it. Nobody looks at padding, and in the
# decoder nobody looks ahead. A mask is a tensor of truth values: True where a *query* (a row of the mask) may look at a *key* (a column).

# %%
import torch

from course_utils.number_words import PAD


def padding_mask(ids):
    """Nobody looks at padding. (rows, length) ids -> (rows, 1, 1, length): the same for all heads and queries."""
    return (ids != PAD)[:, None, None, :]


def causal_mask(length, device="cpu"):
    """A token sees itself and those before it (section 3.2.3). -> (length, length), True on and below the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


# %% [markdown]
# The two dimensions of size 1 are for the heads and for the queries: the same mask serves all of them.

# %% [markdown] tags=["stub"]
# ## Write it first
# Write the mask of the decoder: causal, and no padding. It has one matrix per row of the batch, and a dimension of size 1
# for the heads.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def target_mask(ids):
    """Causal, and no padding. (rows, length) ids -> (rows, 1, length, length)."""
    ...  # your turn: one line


check("01.target_mask", target_mask)

# %% [markdown]
# The row of 42 is `<start> four two <pad>`. Its mask has 16 places. How many of them are True?

# %%
from course_utils.predictions import predict

guess = predict("places of the mask that are True", number=42, length=4, unit="of 16", value=None)

# %% tags=["claim:mask", "nbval-check-output"]
from course_utils.transformer import target_mask

mask = target_mask(rows.target_input)
print("shape", tuple(mask.shape))
print("True for 42:", int(mask[1].sum()), "of", mask[1].numel())
assert mask[1].sum() == 9
guess = guess.settle(measured=mask[1].sum())

# %%
from course_utils.plots import new_figure, show


def draw_masks(panels, tokens):
    """One matrix per name; filled where a query may look at a key."""
    figure, axes = new_figure(2.7)
    axes.remove()
    for axes, (name, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel, cmap="Blues", vmin=0, vmax=1.5)
        axes.set(title=name, xlabel="looked at (key)", ylabel="looks (query)")
        axes.set_xticks(range(len(tokens)), tokens, rotation=45)
        axes.set_yticks(range(len(tokens)), tokens)
    return figure


# %%
from course_utils.charts import describe_prediction

ids = rows.target_input[1:2]
panels = {"padding": padding_mask(ids)[0, 0].expand(4, 4), "causal": causal_mask(4), "both": target_mask(ids)[0, 0]}
counts = ", ".join(f"{name} {int(panel.sum())}" for name, panel in panels.items())
sentence = f"Masks of the row of 42, places of 16 that are True: {counts}. {describe_prediction(guess)}"

# %%
show(draw_masks(panels, TARGET.decode(ids[0])), says=sentence)

# %% [markdown]
# Dark is allowed. The last row belongs to the padding itself: it may look at the tokens before it, which does no harm, because the loss does not
# ask what comes out there. A row without a single True would give a softmax over nothing.
#
# "causal" and "both" differ in that row only: padding stands at the end, so the causal mask alone already hides it from every real token.
# The padding half matters where nothing is causal, in the encoder and where the decoder looks at the source, and where padding stands in front.

# %% [markdown]
# ## A flat list of blocks
# `nn.Transformer` is a tree: its forward runs an encoder, then a decoder that takes two inputs, the words and the encoder's result
# (its [memory](00_start_here.ipynb#memory)). Such a thing does not fit in `nn.Sequential`, which hands on one, and it cannot be
# cut in the middle without rewriting it: for T5 that "proved to be a study in hacking"
# ([transformers#9765](https://github.com/huggingface/transformers/pull/9765)). Here the model is a flat list of *blocks*. Each
# takes a pair, (hidden, memory), and returns one: the *carry*. Watch which half is empty where:

# %% tags=["nbval-check-output"]
from course_utils.transformer import TransformerConfig, block_builders, carry_after

small = TransformerConfig(d_model=64)
builders = block_builders(small)
for i, builder in enumerate(builders):
    hidden, memory = (spec and spec.shape for spec in carry_after(builders, i, rows.geometry, small))
    print(f"{i}  {builder.name:17} hidden {str(hidden):12} memory {memory}")

# %% [markdown]
# After the encoder there is only memory, after the memory's last reader only hidden, and the head hands on nothing: its logits go into the loss. The mask is no part of the carry: every block makes
# it from the token ids, which are small and which everybody has. Now the whole forward pass is one loop, shown here twice: in one go, and with a stop after
# block 3. Will the results be close, or equal?

# %% tags=["claim:cut-anywhere", "nbval-check-output"]
blocks = [builder.build(seed=0) for builder in builders]


def run(blocks, carry):
    for block in blocks:
        carry = block(carry, rows)
    return carry


whole, _ = run(blocks, (None, None))
at_the_stop = run(blocks[:4], (None, None))  # whoever has these two tensors can go on
in_two_parts, _ = run(blocks[4:], at_the_stop)
assert torch.equal(whole, in_two_parts)
print("logits", tuple(whole.shape), "equal:", torch.equal(whole, in_two_parts))

# %% [markdown]
# Equal: nothing but the carry connects the two halves. That is all that [lesson 02](02_cut_it.ipynb) needs. A stage is a run of neighbouring
# blocks; one device is the special case of a single stage, and its module runs the same loop:

# %% tags=["claim:one-stage", "nbval-check-output"]
from course_utils.stages import CutModel, by_count

cut = CutModel(small, by_count(len(builders), 1))
model = cut.build(0, seed=0)
logits, _ = model((None, None), rows)
assert torch.equal(logits, whole)
print(len(model.blocks), "blocks in one stage")

# %% [markdown]
# ## The loss
# The sum over the tokens of a mini-batch, divided by their number. Padding counts neither above nor below the line. The number of tokens is an
# argument, because a piece of a mini-batch has to be divided by the tokens of the *whole*; here there is one piece.


# %%
def sum_over_tokens(logits, micro_batch, num_tokens):
    """A micro-batch's share of the loss: the sum over its tokens, divided by the tokens of the whole mini-batch."""
    targets = micro_batch.target_output.reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets, ignore_index=0, reduction="sum"
    )
    return losses / num_tokens


# %% tags=["claim:padding-counts-not", "nbval-check-output"]
loss = sum_over_tokens(logits, rows, rows.num_tokens)
padding = rows.target_output == PAD
changed = logits.detach().clone()
changed[padding] += torch.arange(13.0)  # other answers where there is padding
same = torch.equal(loss, sum_over_tokens(changed, rows, rows.num_tokens))
assert same and padding.sum() == 3
print(f"answers at {int(padding.sum())} places of padding changed, same loss: {same}")

# %% [markdown]
# ## Train
# The loop of one device, in full. Adam and the learning rate are those of Vaswani et al. (2017, section 5.3), with a shorter
# warm-up: `Noam` raises the rate in a line, then lowers it with the inverse square root of the step. The loop ends after some steps or some seconds, whatever comes first.

# %%
import time

from torch.nn.utils import clip_grad_norm_

from course_utils.number_words import batch
from course_utils.optimization import Noam
from course_utils.stages import one_thread


def learn(model, steps, seconds):
    """Train until so many steps are done or seconds are over; return the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    noam = Noam(optimizer, d_model=64, warm_up=1000)
    losses, began = [], time.perf_counter()
    while len(losses) < steps and time.perf_counter() - began < seconds:
        mini_batch = batch(numbers.training, seed=0, step=len(losses), size=32)
        optimizer.zero_grad()
        logits, _ = model((None, None), mini_batch)
        loss = sum_over_tokens(logits, mini_batch, mini_batch.num_tokens)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        noam.step()
        losses.append(loss.item())
    return losses


# %% [markdown]
# The exam asks for the held-out numbers; an answer counts if every word is right. `answer` has the model write its words one by one, each time the likeliest
# after its own words so far; `recipe` tells it which model that is, and how long an answer can be. How many per cent will it be after at most 200 steps?

# %%
guess = predict("right answers in the exam", steps=200, unit="per cent", value=None)

# %%
from course_utils.number_words import to_words
from course_utils.recipes import TrainingConfig
from course_utils.training import answer

recipe = TrainingConfig(model=small, stages=1, highest=999, training_numbers=None, held_out=100, batch_size=32)


def exam(model):
    """The share of held-out numbers that are read without a mistake, in per cent."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters_globally()}
    answers = answer(recipe, weights, numbers.held_out)
    right = sum(words == to_words(number) for words, number in zip(answers, numbers.held_out, strict=True))
    return 100 * right / len(numbers.held_out)


# %%
with one_thread():
    losses = learn(model, steps=200, seconds=10)
    right = exam(model)
guess.settle(measured=right)
print(f"{len(losses)} steps, loss {losses[0]:.2f} at first and {losses[-1]:.2f} at last, {right:.0f} per cent right")

# %%
from course_utils.charts import draw_prediction

show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# A falling loss and an exam: most programs stop here. This course does not, because both look healthy in a run that is wrong in a
# small way. More of that below.

# %% [markdown]
# ## Where the time goes
# A pipeline is as fast as its slowest stage, so it matters what each block costs. From here on the model is the capstone's, twice
# as wide, with numbers of up to six digits. First count the weights:

# %% tags=["claim:weights", "nbval-check-output"]
import math
from dataclasses import replace

capstone = TrainingConfig()
builders = capstone.cut.builders
weights = {b.name: sum(math.prod(shape) for shape in b.parameter_shapes().values()) for b in builders}
for name, number in weights.items():
    print(f"{name:17} {number:>8,} parameters")
assert weights["decoder_0"] > 1.3 * weights["encoder_0"] > 100 * weights["encoder_norm"]

# %% [markdown]
# An encoder layer multiplies each digit with about $12\,d^2$ weights ($4\,d^2$ in attention, $8\,d^2$ in the feed-forward part). A decoder
# layer multiplies each word with $14\,d^2$ and each digit of the memory with $2\,d^2$. Six digits make seven words, counting
# the end. How much more time does a decoder layer take than an encoder layer?

# %%
guess = predict("time of a decoder layer over an encoder layer", digits=6, unit="times", value=None)

# %%
from course_utils.stages import measure_costs

mini_batch = batch(range(100_000, 1_000_000), seed=0, step=0, size=64)
seconds = dict(zip(weights, measure_costs(builders, mini_batch, seed=0), strict=True))
digits, words = mini_batch.source_length, mini_batch.target_length
by_weights = (14 * words + 2 * digits) / (12 * digits)
guess.settle(measured=seconds["decoder_0"] / seconds["encoder_0"], formula=by_weights)
milliseconds = {name: 1000 * value for name, value in seconds.items()}

# %%
from course_utils.charts import describe_bars, draw_bars

chart = {"unit": "ms", "title": "Measured: forward and backward of each block, one thread"}
show(draw_bars(milliseconds, **chart), says=describe_bars(milliseconds, **chart))

# %% [markdown]
# The four layers are what has to be shared out among stages; the other blocks are small. And decoder against encoder:

# %%
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# Counting multiplications gives the formula's figure. The measured one can lie on either side of it: the formula leaves out norms, the softmax, the residual sums and
# the fixed cost of every operation, and takes all multiplications as equally fast, be the matrix small or large. That is why the course measures costs before it cuts.

# %% [markdown]
# ## Where the memory goes
# Weights are one part. The other part are *activations*: what autograd keeps from the forward to the backward pass.
# [`saved_tensors_hooks`](https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.saved_tensors_hooks) shows each tensor that it keeps. Several may share one storage, so each storage is
# counted once, for the block that kept it first, and weights not at all.

# %%
from torch.autograd.graph import saved_tensors_hooks


def bytes_kept(blocks, mini_batch):
    """For each block the bytes that its forward leaves for the backward."""
    counted = {parameter.untyped_storage().data_ptr() for block in blocks for parameter in block.parameters()}
    kept, carry = [], (None, None)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            kept[-1] += storage.nbytes()
        return tensor

    for block in blocks:
        kept.append(0)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            carry = block(carry, mini_batch)
    return kept


# %% [markdown]
# Which is more for the capstone with a mini-batch of 64 rows, and how many times: 4 bytes per weight, or what is kept?

# %%
guess = predict("bytes of activations over bytes of weights", rows=64, unit="times", value=None)

# %% tags=["claim:activations"]
blocks = [builder.build(seed=0) for builder in builders]
activations = dict(zip(weights, bytes_kept(blocks, mini_batch), strict=True))
half = dict(zip(weights, bytes_kept(blocks, mini_batch.split(2)[0]), strict=True))
of_weights, of_activations, of_half = 4 * sum(weights.values()), sum(activations.values()), sum(half.values())
print(f"weights {of_weights:,} bytes, activations {of_activations:,} bytes, of half the rows {of_half:,} bytes")
assert activations["decoder_0"] > activations["encoder_0"] > activations["encoder_norm"]
assert 0.45 < of_half / of_activations < 0.55

# %%
guess.settle(measured=of_activations / of_weights)
kilobytes = {name: value / 1000 for name, value in activations.items()}
chart = {"unit": "kB", "title": "Kept for the backward pass by each block, 64 rows"}
sentence = f"{describe_bars(kilobytes, **chart)} {describe_prediction(guess)}"

# %%
show(draw_bars(kilobytes, **chart), says=sentence)

# %% [markdown]
# Again the four layers dominate. An embedding keeps no more than its token ids. All of it together, against the weights:

# %%
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# Activations grow with the rows, weights do not. In a pipeline a stage keeps the activations of every micro-batch
# that is under way, and [lesson 07](07_bubble_and_stash.ipynb) is about how many that are.

# %% [markdown]
# ## A mistake that raises nothing
# Attention does not know where a token stands: a position's vector is added to the token's. The paper multiplies embeddings by $\sqrt{d}$ (Vaswani et al., 2017,
# section 3.4), and PyTorch's `nn.Embedding` draws them with variance 1. Each is reasonable alone. Together tokens become
# $\sqrt{d}$ large while positions stay below 1; and Adam, whose steps have about the same length whatever it trains, changes large embeddings by a smaller share. This course draws them with variance $1/d$. The cell measures both:


# %% tags=["claim:drowned"]
def drown(model):
    """Embeddings as nn.Embedding draws them, with variance 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return model


def tokens_over_positions(model):
    """How large a token's vector is against that of its position (root of the mean square)."""
    part = model.blocks[0].embedding
    return (part.tokens.weight.detach() * part.scale).square().mean().sqrt() / part.positions.square().mean().sqrt()


healthy, drowned = cut.build(0, seed=0), drown(cut.build(0, seed=0))
print(f"tokens over positions: {tokens_over_positions(healthy):.1f} here, {tokens_over_positions(drowned):.1f} drowned")
assert tokens_over_positions(healthy) < 3 and tokens_over_positions(drowned) > 6

# %% [markdown]
# Same data, same steps, same learning rate. Your guess: how many right answers will the second model give?

# %%
guess = predict("right answers in the exam, positions drowned", steps=200, unit="per cent", value=None)

# %%
with one_thread():
    losses_drowned = learn(drowned, steps=len(losses), seconds=20)
    right_drowned = exam(drowned)
guess.settle(measured=right_drowned)
same, level = len(losses_drowned), sum(losses_drowned[-10:])
reached = next((step for step in range(10, same) if sum(losses[step - 10 : step]) <= level), same)
print(f"after {same} steps: loss {losses[same - 1]:.2f}, drowned {losses_drowned[-1]:.2f}")
print(f"in the exam {right:.0f} per cent right, drowned {right_drowned:.0f}")
if right_drowned < right and reached < same:
    print(f"The first model came that far, on the mean of ten steps, in {reached}: {same / reached:.1f} times as fast.")
else:
    print("This run did not tell the two apart: give both more steps or more seconds.")

# %%
from course_utils.charts import describe_lines, draw_lines

lines = {"as here": dict(enumerate(losses[::10])), "drowned": dict(enumerate(losses_drowned[::10]))}
lines = {name: {10 * step: loss for step, loss in line.items()} for name, line in lines.items()}
names = {"x": "step", "y": "loss", "title": "The same training, embeddings drawn in two ways"}
sentence = f"{describe_lines(lines, **names)} {describe_prediction(guess)}"

# %%
show(draw_lines(lines, **names), says=sentence)

# %% [markdown]
# No error and no warning: the second model learns, only more slowly. Give it many more steps (try 1000) and most of its answers are right too. A recipe
# with fewer steps, or a longer warm-up, ends before that. Seen alone, without the first one beside it, nobody
# would know from its curve that something is wrong. A curve is a weak witness. A strong one compares bits.

# %% [markdown]
# ## The baseline
# The *fingerprint* hashes the loss and every gradient of a step. If one bit differs it is another string. Look at three strings: one step, the same step
# in a model built anew, and a step after one weight moved by the smallest amount that a float can. Which are equal?

# %%
from course_utils.fingerprints import fingerprint, step_summary


def one_step(model, mini_batch):
    """Forward and backward of a mini-batch in one piece; the fingerprint of its loss and gradients."""
    logits, _ = model((None, None), mini_batch)
    loss = sum_over_tokens(logits, mini_batch, mini_batch.num_tokens)
    loss.backward()
    return fingerprint([step_summary({0: loss.detach()}, model.named_parameters_globally())])


# %% tags=["fingerprint", "claim:baseline"]
whole_model = replace(capstone, stages=1).cut
with one_thread():
    first = one_step(whole_model.build(0, seed=0), mini_batch)
    second = one_step(whole_model.build(0, seed=0), mini_batch)
    moved = whole_model.build(0, seed=0)
    weight = next(moved.parameters()).data[3:4, 0]
    weight.copy_(torch.nextafter(weight, torch.tensor([9.0])))
    third = one_step(moved, mini_batch)
print("one device:      ", first)
print("once more:       ", second)
print("one weight moved:", third)
assert first == second != third

# %% [markdown]
# The first two agree in every bit of the loss and of all gradients; a change that no curve would ever show makes another
# string. This is the baseline. From now on every way of computing a step (cut, sent, scheduled, recomputed) is held against one device. On your machine the string may be
# another one than here: [lesson 00](00_start_here.ipynb) said why.

# %% [markdown] tags=["summary"]
# ## What you know now
# - The exam asks only for numbers that no training batch contained. <!-- shown: held-out -->
# - The decoder's mask lets a token look at itself and at the tokens before it, and at no padding. <!-- shown: mask -->
# - The model is a flat list of blocks, and nothing but the carry connects two halves of it. <!-- shown: cut-anywhere -->
# - One device is one stage that holds all blocks. <!-- shown: one-stage -->
# - What the model says at padding does not change the loss. <!-- shown: padding-counts-not -->
# - A decoder layer has more than 1.3 times the weights of an encoder layer. <!-- shown: weights -->
# - Half the rows leave about half the activations; weights do not depend on rows. <!-- shown: activations -->
# - PyTorch's default embeddings times $\sqrt{d}$ are more than six times as large as positions, and no error says so. <!-- shown: drowned -->
# - The same step gives the same fingerprint, and one bit in one weight gives another. <!-- shown: baseline -->
#
# **Kept for later:** the masks and blocks in `course_utils/transformer.py`; `sum_over_tokens` in `course_utils/pipeline.py`; `CutModel` and `measure_costs`
# in `course_utils/stages.py`; `fingerprint` and `step_summary` in `course_utils/fingerprints.py`.
#
# **Practise:** let the decoder look ahead. In a new cell `import course_utils.transformer`, set `course_utils.transformer.target_mask = padding_mask`, train a new
# `model = cut.build(0, seed=0)` with `learn`, and ask `exam(model)`. Which of the two tells you that something is wrong, the loss or the exam? Restart
# the kernel afterwards.
# Exercises: [unit 01](../exercises/01_one_device/01_one_device.ipynb).
#
# **Next:** [02 · Cut it in one process](02_cut_it.ipynb).

# %% [markdown]
# ## Questions
# 1. Why may the last row of the mask, that of `<pad>`, look at anything at all?
# 2. Which tensors have to cross if the model is cut after block 5, `decoder_0`?
# 3. Two stages of four blocks each: which one is the slower?
# 4. Why is a run with two threads allowed to give another fingerprint than one with one thread?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. A softmax over nothing has no value. What comes out there is computed and thrown away.
# 2. Hidden, and the memory, because `decoder_1` still reads it. Backwards the gradients of both.
# 3. The second one, which has the decoder: its layers have more weights, and see one token more per row.
# 4. With two threads sums are computed in other pieces, and floating-point addition depends on the order.
#
# The mask:


# %% tags=["answers", "nbval-check-output"]
def target_mask(ids):
    """Causal, and no padding. (rows, length) ids -> (rows, 1, length, length)."""
    return causal_mask(ids.shape[1], ids.device) & padding_mask(ids)


check("01.target_mask", target_mask)

# %% [markdown]
# ## References
# Vaswani et al., 2017, *Attention Is All You Need*, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762), sections 3.1 to 3.5 and 5.3 · Xiong et al., 2020, *On Layer Normalization
# in the Transformer Architecture*, [arXiv 2002.04745](https://arxiv.org/abs/2002.04745) · Pascanu et al., 2013, [arXiv 1211.5063](https://arxiv.org/abs/1211.5063), section 3.2 (clipping) · PyTorch:
# [scaled_dot_product_attention](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html),
# [saved_tensors_hooks](https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.saved_tensors_hooks).
