# %% [markdown] tags=["opening"]
# # 00 · Start here
#
# **You will be able to** say what pipeline parallelism is, when it pays and when it does not, read the notation of this
# course, and say what your machine can do in it.
#
# **You need** PyTorch's training loop, and what attention is. No GPU, and no experience with more than one process.
#
# **Minutes:** 25 to read, 1 to run. **New terms:** [stage](00_start_here.ipynb#stage),
# [micro-batch](00_start_here.ipynb#micro-batch), [bubble](00_start_here.ipynb#bubble),
# [data parallelism](00_start_here.ipynb#data-parallelism), [tensor parallelism](00_start_here.ipynb#tensor-parallelism),
# [rank](00_start_here.ipynb#rank).
#
# You will build pipeline parallelism yourself, from one model in one process to a Transformer that trains over several
# processes. At every step you check that it computes, to the last bit, what one device computes.

# %% tags=["where"]
from course_utils.course_map import where

where("00")

# %% [markdown]
# ## Why
# A model that trains needs room for each weight, for its gradient, and for the two numbers that Adam keeps of it. In 32 bits that is
# 4 times 4 bytes per parameter, and what the forward pass leaves for the backward pass comes on top. The next cell does the sum for two models:
# the capstone of this course, and the largest Transformer of the GPipe paper (83.9 billion parameters; Huang et al., 2019, table 1).

# %% tags=["claim:room", "nbval-check-output"]
import math

from course_utils.recipes import TrainingConfig

capstone = TrainingConfig()
shapes = [shape for builder in capstone.cut.builders for shape in builder.parameter_shapes().values()]
models = {"the capstone": sum(map(math.prod, shapes)), "GPipe's largest": 83_900_000_000}
for name, parameters in models.items():
    room = 4 * 4 * parameters
    print(f"{name}: {parameters:,} parameters, {room:,} bytes, devices of 80 GB: {math.ceil(room / 80e9)} or more")

# %% [markdown]
# The second one fits on no single device, whatever you do with the batch. It has to be cut, and
# [lesson 02](02_cut_it.ipynb) cuts the first one, because there you can see everything.

# %% [markdown]
# ## What
# A Transformer is a list of layers. Cut the list into $K$ pieces, give each piece, a *stage*, to a device of its own, and hand
# the result of one on to the next: an assembly line. A line with one car on it is no faster than one worker, so the
# mini-batch is cut too, into $M$ *micro-batches*, and the next one enters while the one before is still further down the line.
#
# Here are three stages and three micro-batches. `F0` is the forward, `B0` the backward pass of micro-batch 0, a
# dot is an idle worker, and time runs to the right. A *rank* is the number of a process; each process holds one stage. First one car at a time:

# %% tags=["nbval-check-output"]
from course_utils.schedules import gpipe, naive
from course_utils.simulation import simulate, staircase

print(staircase(naive(3, 3)))

# %% [markdown]
# At every moment one rank works and two wait. Now the next car enters as soon as the first station is free:

# %% tags=["nbval-check-output"]
print(staircase(gpipe(3, 3)))

# %% [markdown]
# The same 18 passes in 10 slots instead of 18. This is the schedule of GPipe: all forwards, then all backwards. The dots that
# remain are the *bubble*: the line has to fill and to drain.
#
# Now with four stages and eight micro-batches. One at a time takes 64 slots, since $4 \cdot 8 \cdot 2 = 64$ passes follow each other.
# How many slots does the assembly line need? Count along the staircase, and put your number in place of `None`.

# %%
from course_utils.predictions import predict

guess = predict("length of a step", K=4, M=8, unit="slots", value=None)

# %% tags=["claim:line", "nbval-check-output"]
one_at_a_time, line = simulate(naive(4, 8)), simulate(gpipe(4, 8))
K, M = 4, 8
guess.settle(measured=line.makespan, formula=2 * (M + K - 1))
print(f"one at a time {one_at_a_time.makespan:.0f} slots, the assembly line {line.makespan:.0f}")
assert line.makespan == 2 * (M + K - 1) and one_at_a_time.makespan == 2 * K * M

# %%
from dataclasses import replace

from course_utils.charts import describe_prediction
from course_utils.plots import describe_timeline, draw_timelines, show

ways = {"One micro-batch at a time": one_at_a_time, "The assembly line": line}
panels = [replace(timeline, label=f"{name}, {timeline.label}") for name, timeline in ways.items()]
sentences = [*(describe_timeline(panel, with_bubble=False) for panel in panels), describe_prediction(guess)]

# %%
show(draw_timelines(panels), says=" ".join(sentences))

# %% [markdown]
# The upper picture: one micro-batch at a time; the lower one: the assembly line. Both are simulated: every pass takes one slot and messages take none. Real stages are unequal, messages take time, and
# workers disturb each other. [Lesson 04](04_naive_model_parallelism.ipynb) measures the upper one on real processes,
# [lesson 06](06_the_gpipe_schedule.ipynb) the lower one, and [lesson 07](07_bubble_and_stash.ipynb) counts the bubble.

# %% [markdown]
# ## When, and where
# There are three ways to put one training run on several devices, and large runs combine them.
#
# | | each device holds | what crosses between devices | it is for |
# | --- | --- | --- | --- |
# | *data parallelism* | the whole model, a part of the batch | all gradients, once per step | a model that fits |
# | *tensor parallelism* | a part of every large matrix | activations, several times per layer | a layer that is too large or too slow, fast links |
# | pipeline parallelism | some of the layers | activations of a border and their gradients, per micro-batch | a model that does not fit, slower links |
#
# Megatron-LM's advice is tensor parallelism inside a server and pipeline parallelism between servers (Narayanan et al.,
# 2021, section 3.2): what crosses several times in every layer needs the faster links. The third column also compares a pipeline with
# data parallelism, and for the capstone you can count that: two stages hand over what the encoder
# understood, and get its gradient back; two data-parallel copies have to exchange the gradient of every weight.

# %% tags=["claim:border", "nbval-check-output"]
memory = capstone.cut.carry_after(0, geometry=(64, 6, 7))[1]  # 64 rows of six digits
at_the_border = 2 * 4 * math.prod(memory.shape)
of_all_gradients = 4 * models["the capstone"]
print(f"per step: {at_the_border:,} bytes over the border, {of_all_gradients:,} bytes of gradients")
assert at_the_border < of_all_gradients / 5

# %% [markdown]
# The first number grows with the rows of the batch, the second one with every layer that the model has.
#
# ## When not to
# **If it fits on one device, do not cut it.** With several devices copy it instead (data parallelism): there is no
# bubble and nothing to balance, and two copies can come close to twice the speed. A pipeline of two equal stages with eight micro-batches
# cannot, even if messages cost nothing:

# %% tags=["claim:limit", "nbval-check-output"]
gain = simulate(naive(2, 8)).makespan / simulate(gpipe(2, 8)).makespan
print(f"two equal stages, eight micro-batches: {gain:.2f} times as fast as one worker, at most")
print("two copies, half of the rows each: 2.00 times, at most")
assert gain == 2 * 8 / (8 + 2 - 1) < 2

# %% [markdown]
# And on this machine? The next cells train the capstone's model as two stages with one thread each, and in one process that takes the mini-batch
# in one piece. The one process may use two cores as well: it is measured with one and with two threads, and the faster one counts. The pipeline has a
# bubble, messages and unequal stages, and every micro-batch has its fixed costs. How does its time per step compare?

# %%
guess = predict("time in a pipeline over time in one process", d_model=128, unit="times", value=None)

# %%
import statistics
import time

import torch

from course_utils.machine import BUSY, beside_others, of_others
from course_utils.training import plain_loop, train


def in_a_pipeline(config):
    """Seconds per step of two stages on two processes."""
    ends = []
    train(config, on_step=lambda step: ends.append(time.perf_counter()))
    return (ends[-1] - ends[0]) / (len(ends) - 1)  # the first step of a fresh process is slower


def in_one_process(config, num_threads):
    """Seconds per step of one process that takes each mini-batch in one piece."""
    torch.set_num_threads(num_threads)
    return plain_loop(replace(config, stages=1, micro_batches=1)).seconds / config.steps


# %% [markdown]
# Three widths of the model, `d_model`, in up to three rounds; the ways take turns. The first round begins nothing new after 30 s, the others after 12 s.
# The fastest run of each way counts, because other programs can only make a run slower. How much those used meanwhile is measured too.

# %%
short = replace(capstone, steps=3, held_out=0, recorded_steps=0)
sizes = {d_model: replace(short, model=replace(short.model, d_model=d_model)) for d_model in (128, 64, 256)}
runs, threads, began = {}, torch.get_num_threads(), time.perf_counter()
for _ in range(3):
    for d_model, config in sizes.items():
        if time.perf_counter() - began < (12 if d_model in runs else 30):
            (one, share), (two, other_share) = (beside_others(in_one_process, config, number) for number in (1, 2))
            runs.setdefault(d_model, []).append((in_a_pipeline(config), one, two, (share + other_share) / 2))
torch.set_num_threads(threads)

# %%
ratios, others, collapsed = {}, {}, []
for d_model, rows in sorted(runs.items()):
    pipeline, one, two = (1000 * min(times) for times in list(zip(*rows, strict=True))[:3])
    print(f"d_model {d_model}: pipeline {pipeline:.0f} ms, one process {one:.0f} ms on 1 thread, {two:.0f} ms on 2")
    ratios[d_model] = pipeline / min(one, two)
    others[d_model] = statistics.median(row[3] for row in rows)
    collapsed += [d_model] if two > 1.25 * one else []

# %% [markdown]
# Two threads that are clearly slower than one are a sign: there is no second core for them. Then the cell draws no conclusion for that width, and
# neither where other programs used much of the processor.

# %%
undisturbed = [d_model for d_model in ratios if d_model not in collapsed and others[d_model] < BUSY]
faster = [d_model for d_model in undisturbed if ratios[d_model] < 0.95]
print(of_others(max(others.values())))
if collapsed:
    print(f"Two threads were slower than one at d_model {collapsed}: the machine is busy or has one core for this.")
if 128 in undisturbed:
    guess.settle(measured=ratios[128])
    print(f"A step of the capstone took {ratios[128]:.2f} times as long in a pipeline as in one process.")
if undisturbed:
    where_faster = f"at {faster}" if faster else "at none of them"
    print(f"Measured without much disturbance: d_model {undisturbed}. The pipeline was clearly faster {where_faster}.")
if disturbed := [d_model for d_model in ratios if d_model not in undisturbed]:
    print(f"No conclusion about d_model {disturbed}: measure again on a quiet machine with two cores.")

# %%
from course_utils.charts import describe_lines, draw_lines

lines = {"pipeline / one process": ratios, "equally fast": {d_model: 1.0 for d_model in ratios}}
if guess.value is not None:
    lines["your prediction"] = {128: guess.value}
state = f", d_model {disturbed} disturbed: no conclusion" if disturbed else ""
names = {"x": "d_model", "y": "time per step, ratio", "title": f"Measured: two stages against one process{state}"}

# %%
show(draw_lines(lines, **names), says=describe_lines(lines, **names))

# %% [markdown]
# Above 1 the pipeline loses, below 1 it wins. Both sides may use the same two cores. The one process has no bubble, and large pieces are computed
# more efficiently than small ones. A larger model makes those costs smaller against the work; whether that is enough to change this
# depends on how well two threads share the work of one process on your machine.
# What changes this for certain is the day on which the model does not fit: then the one process does not run at all.
# The models of this course are small because you can see through them, not because they need a pipeline.

# %% [markdown]
# ## Notation
# These letters mean the same in all lessons.
#
# - $w_{t+1} = w_t - \eta \nabla L(w_t)$: one step of gradient descent, with weights $w$, step $t$, learning rate $\eta$ and loss $L$.
# - $K$ stages, numbered from 0 to $K - 1$, and $M$ micro-batches, from 0 to $M - 1$.
# - $a_{i+1}^m = f_i(a_i^m, w_i)$: stage $i$ with its weights $w_i$ turns what it gets of micro-batch $m$ into what it hands on.
# - $\nabla L(w_i) = \sum_m \nabla L(w_i^m)$: the gradient of a stage's weights is the sum over the micro-batches.
#
# The last line is why micro-batches change nothing about what is learnt. [Lesson 05](05_micro_batches.ipynb) shows when it holds.

# %% [markdown]
# ## Your machine
# The lessons adapt to it. The next cell asks which cores, memory and GPUs there are, and lets two identical workers do the same
# work at the same time. Are they equally fast? On a processor with fast and slow cores equal stages are not equal.

# %%
from course_utils.machine import describe_machine, inspect_machine

guess = predict("speed of the faster of two identical workers over the slower", unit="times", value=None)

# %%
machine = inspect_machine()
guess.settle(measured=machine.unequal)
print(describe_machine(machine))

# %%
from course_utils.charts import draw_prediction

show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# No lesson depends on it: sentences about speed are made by the cell that measures it.

# %% [markdown]
# ## Exercises
# Lessons have exercises, then comes a [bug hunt](../exercises/12_bug_hunt/12_bug_hunt.ipynb). Done so far:

# %%
from course_utils.checks.overview import show_progress

show_progress()

# %% [markdown]
# ## A script that does not run
# This course began with a script of a kind that is still found on the web: it trains a Transformer for this task, numbers to words, with
# PyTorch's `Pipe`. It does not run today. Here are its first three failures, in short equivalents of its parts. The first line of work is an import:

# %% tags=["raises-exception", "nbval-check-output"]
from torch.distributed.pipeline.sync import Pipe

model = Pipe(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), chunks=2)

# %% [markdown]
# PyTorch removed that module. Its successor, [`torch.distributed.pipelining`](https://docs.pytorch.org/docs/stable/distributed.pipelining.html),
# wants to know what a stage and a schedule are, which is what you are about to learn. Next, the vocabulary: it holds words, and the input is digits.

# %% tags=["raises-exception", "nbval-check-output"]
vocabulary = {"<pad>": 0, "one": 1, "two": 2, "three": 3}
for token in "123":
    vocabulary[token]

# %% [markdown]
# Two languages need two vocabularies. With that mended the model is reached. The batch has 32 rows with 3 digits each and 4 words to write:

# %% tags=["raises-exception", "nbval-check-output"]
import warnings

from torch import nn

torch.manual_seed(0)
digits, words = torch.randn(32, 3, 16), torch.randn(32, 4, 16)  # (rows, length, d_model)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about a faster path that this model cannot take
    sequence_first = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0)
sequence_first(digits, words)

# %% [markdown]
# By default [`nn.Transformer`](https://docs.pytorch.org/docs/stable/generated/torch.nn.Transformer.html) wants the length first, and takes 32 for the length
# and 3 and 4 for the numbers of rows. Here it noticed. Now let both have four tokens, change something, and look at the first word of row 0. Which change should
# it notice: that of another row, or that of another word of its own?

# %% tags=["claim:rows-leak", "nbval-check-output"]
batch_first = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
four_digits = torch.randn(32, 4, 16)
changes = {"another row": words.clone(), "another word of its own": words.clone()}
changes["another row"][1] += 1.0
changes["another word of its own"][0, 1] += 1.0
noticed = []
for name, model in (("sequence first", sequence_first), ("batch first", batch_first)):
    before = model(four_digits, words)[0, 0]
    for change, other_words in changes.items():
        after = model(four_digits, other_words)[0, 0]
        noticed.append(not torch.allclose(before, after, atol=1e-4))
        print(f"{name}, {change} changed: the answer {'changed' if noticed[-1] else 'stayed'}")
assert noticed == [True, False, False, True]

# %% [markdown]
# No error, but a row's answer depends on its neighbours, and a row no longer sees its own words. Errors that raise nothing are the
# expensive ones, and they are why every lesson from 02 on contains a comparison of bits. [Lesson 01](01_one_device.ipynb) shows
# another mistake of this kind; the whole script is taken apart near the end of the course.

# %% [markdown] tags=["stub"]
# ## Write it first
# In every lesson you write its heart yourself, before you see it. Put your code in place of the `...`; the check answers at once. Here it is a self-test: if
# these three are easy, you know what this course builds on. First, one step of gradient descent, $w_{t+1} = w_t - \eta \nabla L(w_t)$.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def gradient_step(w, gradient, learning_rate):
    """Return the weights after one step of gradient descent; leave the given tensor w as it is."""
    ...  # your turn: one line


check("00.step", gradient_step)

# %% [markdown] tags=["stub"]
# A stage gets the gradient of what it handed on and passes on the gradient of what it got: that is the chain rule. `f` and `g` are functions of
# one number, `df` and `dg` their derivatives.


# %% tags=["stub", "nbval-check-output"]
def chained_gradient(x, f, df, dg):
    """Return the derivative of g(f(x)) at x."""
    ...  # your turn: one line


check("00.chain", chained_gradient)

# %% [markdown] tags=["stub"]
# `backward()` *adds* to what `.grad` holds. That is a trap in a training loop, and the tool that sums over micro-batches.


# %% tags=["stub", "nbval-check-output"]
def add_up(w, losses):
    """Call backward once for each loss, loss(w), and return the gradient of their sum. w.grad may hold an old gradient."""
    ...  # your turn: about four lines


check("00.add_up", add_up)

# %% [markdown]
# If one of them was hard, read PyTorch's
# [introduction to autograd](https://docs.pytorch.org/tutorials/beginner/basics/autogradqs_tutorial.html) first. Solutions are
# below, under Answers.

# %% [markdown] tags=["summary"]
# ## What you know now
# - A model needs at least 16 bytes per parameter while it trains in 32 bits with Adam; the largest fit on no device. <!-- shown: room -->
# - An assembly line of $K$ stages does $M$ micro-batches in $2(M + K - 1)$ slots instead of $2KM$. <!-- shown: line -->
# - For the capstone with 64 rows, what crosses the border is less than a fifth of the gradients of all weights. <!-- shown: border -->
# - Two equal stages with eight micro-batches gain at most 16/9; two data-parallel copies of a model that fits at most 2. <!-- shown: limit -->
# - A batch in the wrong order of dimensions mixes its rows, and hides a row's own words, without an error. <!-- shown: rows-leak -->
#
# **Kept for later:** `inspect_machine` and `describe_machine` in `course_utils/machine.py`.
#
# **Practise:** give the sweep above the width 512 as well, or `batch_size=256` in `short`, and its limit 120 s instead of 12. Does that change who is
# faster on your machine?
#
# All formulas on one page: the [cheat sheet](cheat_sheet.ipynb).
#
# **Next:** [01 · One device](01_one_device.ipynb).

# %% [markdown]
# ## Questions
# 1. Your model fits on one device and you have four. What do you do?
# 2. Why does an assembly line with one micro-batch gain nothing?
# 3. Data parallelism makes the batch of each device smaller. Why does that not help a model of 83.9 billion parameters?
# 4. Would the sequence-first mistake show in a falling loss?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. Data parallelism: a copy on each device and a part of the batch for each.
# 2. Every stage needs the result of the one before. With one micro-batch only one stage has something to do at a time.
# 3. A smaller batch leaves fewer activations, but every device still holds all weights, gradients and Adam's numbers.
# 4. You cannot count on it. Nothing keeps the loss from falling; what is wrong is that a row's answer depends on the other rows.
#
# The self-test:


# %% tags=["answers", "nbval-check-output"]
def gradient_step(w, gradient, learning_rate):
    """Return the weights after one step of gradient descent; leave the given tensor w as it is."""
    return w - learning_rate * gradient


check("00.step", gradient_step)


# %% tags=["answers", "nbval-check-output"]
def chained_gradient(x, f, df, dg):
    """Return the derivative of g(f(x)) at x."""
    return dg(f(x)) * df(x)


check("00.chain", chained_gradient)


# %% tags=["answers", "nbval-check-output"]
def add_up(w, losses):
    """Call backward once for each loss, loss(w), and return the gradient of their sum. w.grad may hold an old gradient."""
    w.grad = None
    for loss in losses:
        loss(w).backward()
    return w.grad


check("00.add_up", add_up)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), section 2.3 and table 1 · Narayanan et al., 2021, *Efficient Large-Scale
# Language Model Training on GPU Clusters Using Megatron-LM*, [arXiv 2104.04473](https://arxiv.org/abs/2104.04473), sections 2 and 3.2 · Kingma and Ba, 2015, *Adam*, [arXiv 1412.6980](https://arxiv.org/abs/1412.6980) ·
# PyTorch: [torch.distributed.pipelining](https://docs.pytorch.org/docs/stable/distributed.pipelining.html),
# [nn.Transformer](https://docs.pytorch.org/docs/stable/generated/torch.nn.Transformer.html).

# %% [markdown] tags=["glossary"]
# ## Glossary
#
# Each term with the lesson that introduces it.

# %% [markdown] tags=["glossary"]
# #### 1f1b
# One forward, one backward: a schedule in which a stage starts a micro-batch's backward as soon as it can. Its bubble
# is that of GPipe, but stage $k$ keeps at most $K - k$ micro-batches. [Lesson 07](07_bubble_and_stash.ipynb).
#
# #### action
# One entry of a schedule: one stage computes the forward or the backward pass of one micro-batch. In text `0F3`:
# stage 0, forward, micro-batch 3. [Lesson 06](06_the_gpipe_schedule.ipynb).
#
# #### activation
# A tensor that a layer computes in the forward pass. Autograd keeps many of them, because the backward pass needs
# them. [Lesson 01](01_one_device.ipynb).
#
# #### all-reduce
# A collective after which every rank holds the sum (or the maximum) of what all ranks held. In a ring it takes $2(K-1)$
# messages one after another. [Lesson 09](09_gradient_clipping.ipynb).
#
# #### asynchronous send
# A send that returns at once, while the message is still under way. The tensor must stay as it is, and the handle
# must be kept, until the send is known to be done. [Lesson 06](06_the_gpipe_schedule.ipynb).
#
# #### autocast
# A region of code in which PyTorch computes matrix products in 16 bits. It makes the 16-bit copy of a weight at its
# first use and keeps it until the region ends. [Lesson 08](08_mixed_precision.ipynb).
#
# #### backend
# The library that carries messages for `torch.distributed`: gloo or NCCL. [Lesson
# 03](03_two_processes_that_talk.ipynb).
#
# #### bandwidth
# How many bytes per second a connection carries once a message is under way. [Lesson
# 03](03_two_processes_that_talk.ipynb).
#
# #### bfloat16
# A number format of 16 bits, bf16 for short: sign and exponent of float32 and 7 bits of mantissa. It has the range of
# float32 and about 2 to 3 decimal digits. [Lesson 08](08_mixed_precision.ipynb).
#
# #### block
# The smallest unit into which this course cuts a model, an encoder layer for example: a module that turns a carry
# into a carry. [Lesson 01](01_one_device.ipynb).
#
# #### border
# The place between two neighbouring stages. Activations cross it forwards, their gradients backwards. [Lesson
# 02](02_cut_it.ipynb).

# %% [markdown] tags=["glossary"]
# #### bubble
# The time in which ranks stand idle during a step. As a share of the total time it is $(K-1)/(M+K-1)$ for GPipe with
# equal stages, as a share of the ideal time $(K-1)/M$: always say which one you mean. This lesson and [lesson
# 07](07_bubble_and_stash.ipynb).
#
# #### calibration
# How well what you expected agrees with what was measured, over many predictions. [Lesson 12](12_read_a_trace.ipynb).
#
# #### carry
# The pair (hidden, memory) that a block takes and hands on. It is all that ever crosses a border. [Lesson
# 01](01_one_device.ipynb).
#
# #### channel
# A directed pair of ranks, sender and receiver, with the messages that travel between them in order. [Lesson
# 06](06_the_gpipe_schedule.ipynb).
#
# #### checkpoint
# What a run needs to go on after it was ended: the weights, Adam's numbers, and the state of the learning rate and of
# the loss scale, saved by every stage. It counts only when all stages have written theirs. [Lesson
# 11](11_train_it_all.ipynb).
#
# #### collective
# An operation in which all ranks of a group must take part, such as a barrier or an all-reduce. If one rank does not
# call it, the others wait. [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### cut
# Where a model is divided into stages; to divide it there. [Lesson 02](02_cut_it.ipynb).
#
# #### data parallelism
# Every device holds the whole model and works on a part of the batch; gradients are exchanged once per step. It is
# for models that fit on one device. This lesson.
#
# #### deadlock
# Ranks wait for each other in a circle, so that none can ever go on. [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### efficiency
# The ideal time of a step over its makespan; 1 minus the bubble as a share of the total time. [Lesson
# 07](07_bubble_and_stash.ipynb).

# %% [markdown] tags=["glossary"]
# #### emulated
# The stages sleep instead of computing, and the messages are real. So a few cores can show the timing of many stages;
# pictures say it on their labels. [Lesson 04](04_naive_model_parallelism.ipynb).
#
# #### exact match
# The share of answers in which every word is right. An answer with one wrong word counts as wrong. [Lesson
# 11](11_train_it_all.ipynb).
#
# #### executor
# The loop that carries out a rank's actions in the order that the schedule says. [Lesson
# 06](06_the_gpipe_schedule.ipynb).
#
# #### filestore
# A file through which processes find each other at the start of a run. No port is opened for it. [Lesson
# 03](03_two_processes_that_talk.ipynb).
#
# #### fingerprint
# A short string computed from the bits of all losses and gradients (and weights, at the end of a run). Two
# computations with the same fingerprint agree in every bit. [Lesson 01](01_one_device.ipynb).
#
# #### global norm
# The norm of all gradients of the model taken together, over all stages. Clipping by a stage's own norm would change
# the direction of the step. [Lesson 09](09_gradient_clipping.ipynb).
#
# #### gloo
# The backend that PyTorch uses for messages between processors. A send of gloo moves only after its receive is
# posted. [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### gpipe
# The schedule of Huang et al. (2019): all forwards of a mini-batch, then all backwards. [Lesson
# 06](06_the_gpipe_schedule.ipynb).
#
# #### gradient accumulation
# Adding up the gradients of several micro-batches in `.grad` before the weights change once. [Lesson
# 05](05_micro_batches.ipynb).
#
# #### gradient clipping
# Scaling the gradient down to a bound wherever its norm is larger, so that no step is too long; its direction stays. In
# a pipeline the norm is the global norm. [Lesson 09](09_gradient_clipping.ipynb).

# %% [markdown] tags=["glossary"]
# #### head of line
# The first message of a queue. While it waits, everything behind it waits too, even what could move. [Lesson
# 06](06_the_gpipe_schedule.ipynb).
#
# #### held-out
# Numbers that are kept back from training, so that an exam asks for what was learnt and not for what was seen. [Lesson
# 11](11_train_it_all.ipynb).
#
# #### ideal time
# How long a step would take if no rank ever stood idle: the work of one rank. [Lesson 07](07_bubble_and_stash.ipynb).
#
# #### latency
# The time that a message takes however short it is. [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### launch
# Starting the processes of a run, each with its rank, and collecting what they return. [Lesson
# 03](03_two_processes_that_talk.ipynb).
#
# #### leaf
# A tensor that requires a gradient and that no recorded operation has made; `backward()` fills its `.grad`. What a
# stage receives becomes a leaf. [Lesson 02](02_cut_it.ipynb).
#
# #### learning-rate schedule
# A rule that says which learning rate each step has. If it depends on the number of the step alone, every stage can
# follow it without a message. [Lesson 10](10_noam_warm_up.ipynb).
#
# #### line delay
# The time that a message of any size is under way at least, in one direction. A message whose sender first has to hear
# that its receive is posted costs two. [Lesson 09](09_gradient_clipping.ipynb).
#
# #### loss scale
# A number by which the loss is multiplied so that small gradients do not vanish in float16; gradients are divided by
# it before they are used. [Lesson 08](08_mixed_precision.ipynb).
#
# #### makespan
# The time from the first start to the last end of a step, over all ranks. [Lesson 04](04_naive_model_parallelism.ipynb).
#
# #### mask
# A tensor of truth values that says which positions attention may look at: no padding, and in the decoder nothing
# that comes later. [Lesson 01](01_one_device.ipynb).
#
# #### master weights
# The weights in float32 that the optimizer changes, while products use rounded copies of them. In 16 bits small updates
# would be rounded away. [Lesson 08](08_mixed_precision.ipynb).

# %% [markdown] tags=["glossary"]
# #### mean of means
# The average of the micro-batches' mean losses. It is wrong as soon as they hold different numbers of tokens. [Lesson
# 05](05_micro_batches.ipynb).
#
# #### memory
# What the encoder has made of the source sequence. Every layer of the decoder looks at it. (Memory that is counted in
# bytes is called so.) [Lesson 01](01_one_device.ipynb).
#
# #### micro-batch
# A piece of a mini-batch that goes through the pipeline as one. A mini-batch is cut into $M$ of them. This lesson and
# [lesson 05](05_micro_batches.ipynb).
#
# #### mini-batch
# The rows after which the weights change once. [Lesson 05](05_micro_batches.ipynb).
#
# #### mixed precision
# Matrix products in numbers of 16 bits, weights and optimizer in 32. [Lesson 08](08_mixed_precision.ipynb).
#
# #### model flops utilisation
# The floating-point operations that the model needs for a step, over the time of the step times the peak of all
# devices. What is computed twice does not count. [Lesson 12](12_read_a_trace.ipynb).
#
# #### naive model parallelism
# The model is cut into stages, and one micro-batch at a time goes through all of them, forward and then backward. One
# rank works while the others wait. [Lesson 04](04_naive_model_parallelism.ipynb).
#
# #### nccl
# The backend for messages between GPUs of NVIDIA. [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### padding
# Filler at the end of short rows, so that a batch is a rectangle. Padding counts in no loss and is looked at by
# nobody. [Lesson 01](01_one_device.ipynb).

# %% [markdown] tags=["glossary"]
# #### partition
# For every stage the indices of its blocks. [Lesson 02](02_cut_it.ipynb).
#
# #### peak stash
# The most micro-batches, or bytes, that a rank keeps at once during a step. [Lesson 07](07_bubble_and_stash.ipynb).
#
# #### post-norm
# A Transformer layer that adds to the residual stream and then normalises the sum, as in Vaswani et al. (2017). [Lesson
# 10](10_noam_warm_up.ipynb).
#
# #### pre-norm
# A Transformer layer that normalises its input, computes, and adds the result to the residual stream, which itself
# stays as it is. [Lesson 10](10_noam_warm_up.ipynb).
#
# #### process
# A running program with memory of its own. Stages in different processes see nothing of each other but messages.
# [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### ragged
# Of unequal sizes: micro-batches whose rows or lengths differ. [Lesson 05](05_micro_batches.ipynb).
#
# #### rank
# The number of a process in a run, from 0 to world size minus 1. This lesson and [lesson
# 03](03_two_processes_that_talk.ipynb).
#
# #### re-materialisation
# Keeping only what a stage received and computing its forward once more just before the backward. It saves memory and
# costs time; the bits stay the same. [Lesson 07](07_bubble_and_stash.ipynb).
#
# #### rendezvous
# The meeting of two sides before anything moves: of processes at the start of a run, and of a send with its receive.
# [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### root
# A tensor from which `backward` starts, together with its gradient. A stage starts from all tensors that it handed
# on. [Lesson 02](02_cut_it.ipynb).

# %% [markdown] tags=["glossary"]
# #### schedule
# For every rank, its actions in order. It is data: it can be printed, drawn, validated and priced before anything
# runs. [Lesson 06](06_the_gpipe_schedule.ipynb).
#
# #### send and receive
# The two halves of a message between two ranks. Both must agree on shape and dtype. [Lesson
# 03](03_two_processes_that_talk.ipynb).
#
# #### simulated
# Computed from a schedule and costs, without running anything. [Lesson 06](06_the_gpipe_schedule.ipynb).
#
# #### stage
# A run of neighbouring blocks, held by one rank. This lesson and [lesson 02](02_cut_it.ipynb).
#
# #### staircase
# The picture of a pipeline's step: each rank begins one slot after the one before it. [Lesson
# 06](06_the_gpipe_schedule.ipynb).
#
# #### stash
# What a stage keeps of a micro-batch from its forward to its backward pass. [Lesson 02](02_cut_it.ipynb).
#
# #### teacher forcing
# In training the decoder gets the right words so far, the *target input*, and not those that it would have written
# itself. So all positions are trained at once. [Lesson 01](01_one_device.ipynb).
#
# #### tensor parallelism
# Every large matrix is divided among devices that compute each layer together. They exchange activations several
# times per layer. This lesson.

# %% [markdown] tags=["glossary"]
# #### throughput
# How much work is done per time: micro-batches, rows or tokens per second. [Lesson
# 04](04_naive_model_parallelism.ipynb).
#
# #### timeline
# For every rank, what it did from when to when; measured, emulated or simulated. [Lesson
# 04](04_naive_model_parallelism.ipynb).
#
# #### token-weighted loss
# The sum over all tokens of a mini-batch divided by their number, so that every token weighs the same however the
# batch is cut. [Lesson 05](05_micro_batches.ipynb).
#
# #### trace
# What a profiler has recorded of a program: events with a start, a length and a name, in a file that a viewer shows.
# [Lesson 12](12_read_a_trace.ipynb).
#
# #### underflow
# A number becomes 0 because it is too small for its format. A loss scale protects gradients in float16 from it. [Lesson
# 08](08_mixed_precision.ipynb).
#
# #### utilisation
# The share of a step's time in which a rank computes. [Lesson 04](04_naive_model_parallelism.ipynb).
#
# #### validator
# The function that says before a run whether a schedule can run, and why not. [Lesson
# 06](06_the_gpipe_schedule.ipynb).
#
# #### wait-for graph
# Who waits for whom. A circle in it is a deadlock. [Lesson 03](03_two_processes_that_talk.ipynb).
#
# #### warm-up
# The first steps of a run, in which the learning rate rises from almost 0 to its peak. [Lesson
# 10](10_noam_warm_up.ipynb).
#
# #### world size
# How many processes a run has. [Lesson 03](03_two_processes_that_talk.ipynb).
