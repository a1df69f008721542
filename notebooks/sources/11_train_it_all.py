# %% [markdown]
# # 11 · Train it all
#
# **You will be able to** train an encoder-decoder Transformer over two stages with the GPipe schedule, say how much of
# the time each stage stands idle and why, and show that the pipeline computes, to the last bit, what one device computes.
#
# **You need** PyTorch's training loop, and what attention and an encoder's memory are. One *stage* is one process here,
# and a process has a *rank*: stage 0 is on rank 0. **Minutes:** 15 to read, 2 to run.
#
# This is where the course leads. A Transformer reads a number digit by digit and writes it in words; one process holds the
# encoder, another the decoder, and while they train neither sees the other's weights. No GPU is needed: the two stages are two
# processes on this machine, and the messages between them are real.

# %% [markdown]
# ## The task
# Digits go in, words come out. Small enough to be learnt in a minute or two, and it has all that makes sequences awkward:
# two vocabularies, lengths that differ, padding, and an output that is written word by word.

# %% tags=["nbval-check-output"]
from course_utils.number_words import batch, to_words

to_words(123)

# %% [markdown]
# A batch is a pure function of a seed and a step. Both processes make the same batch for themselves, so no data has to be
# sent. Digit d has the id d + 1, so the last row, 10 1 3 2 1, is 90210. The zeros are padding: they are no tokens, and the
# loss is a mean over tokens.

# %% tags=["nbval-check-output"]
small = batch(numbers=[7, 42, 123, 90210], seed=0, step=0, size=3)
print(small.source)
print("tokens to predict:", small.num_tokens, "in", small.target_output.numel(), "places")

# %% [markdown]
# ## The model, cut in two
# The Transformer is a flat list of eight blocks. A stage is a run of neighbouring blocks, and each process builds only its
# own. Before you run the next cell: which of the two stages will be the heavier one?

# %% tags=["nbval-check-output"]
from course_utils.stages import stage_table
from course_utils.training import TrainingConfig

config = TrainingConfig(stages=2, micro_batches=8, schedule="gpipe")
print(stage_table(config.cut.builders, config.cut.partition))

# %% [markdown]
# The decoder is heavier: its layers look at their own words *and* at the encoder's memory, which takes a second attention.
# A pipeline is as fast as its slowest stage. How unequal the two are in time is measured below.

# %% [markdown]
# ## The schedule
# A mini-batch of 64 rows is cut into $M = 8$ micro-batches. Stage 0 hands over each one as soon as it is done, so that
# stage 1 can start early. `F3` is the forward, `B3` the backward pass of micro-batch 3; time runs to the right.

# %% tags=["nbval-check-output"]
from course_utils.schedules import gpipe
from course_utils.simulation import simulate, staircase

schedule = gpipe(num_stages=2, num_micro_batches=8)
print(staircase(schedule))

# %% [markdown]
# Each stage stands idle for one forward and one backward. The idle share of the whole time is the *bubble*.
# **Predict it:** with $K$ stages and $M$ micro-batches of equal cost, which share of the time is idle here? Put your guess
# in; without one the cell runs all the same.

# %%
my_guess = None  # for example 0.25

# %% tags=["nbval-check-output", "claim:bubble"]
K, M = 2, 8
predicted = simulate(schedule, forward=1, backward=2)
assert abs(predicted.bubble_of_total - (K - 1) / (M + K - 1)) < 1e-12
print(f"idle share of the total time: {predicted.bubble_of_total:.3f}")
print(f"idle time over the ideal time: {predicted.bubble_of_ideal:.3f}")
if my_guess is not None:
    print(f"your guess: {my_guess:.3f}")

# %% [markdown]
# The first line is GPipe's way to count, $(K-1)/(M+K-1)$; the second, $(K-1)/M$, is that of Megatron-LM and Llama 3
# (arXiv 1811.06965, 2104.04473, 2407.21783). They are the same bubble: always say which one you mean. In the picture a
# backward takes twice as long as a forward, as it roughly does; both stages are still taken to be equal.

# %%
from course_utils.plots import describe_curve, describe_timeline, draw_curve, draw_timeline, show

show(draw_timeline(predicted), says=describe_timeline(predicted))

# %% [markdown]
# ### And with the stages as they are
# Now the time of each block is measured here, on one thread, forward and backward together, and the schedule is priced with
# what each stage needs. It is still a simulation, and says so, but with your machine's costs. Which stage will wait more?

# %%
from course_utils.stages import measure_costs
from course_utils.training import micro_batches_of

example = micro_batches_of(config, numbers=tuple(range(100_000, 101_000)), step=0)[0]
costs = measure_costs(config.cut.builders, example, seed=0)
per_stage = [1000 * sum(costs[i] for i in blocks) for blocks in config.cut.partition]
print("milliseconds per micro-batch and stage:", [round(cost, 1) for cost in per_stage])

# %%
one_third, two_thirds = [c / 3 for c in per_stage], [2 * c / 3 for c in per_stage]
priced = simulate(schedule, forward=one_third, backward=two_thirds)
priced.label = "simulated with the measured costs of each stage, backward = 2 x forward"
priced.unit = "milliseconds"
show(draw_timeline(priced), says=describe_timeline(priced))

# %% [markdown]
# The lighter stage pays twice: for the bubble of the schedule, and for its slower neighbour.

# %% [markdown]
# ## First the bits
# A pipeline that is wrong in a small way still learns: the loss falls, only a little worse. So before the long run a short
# one is compared with a plain loop on one device. The *fingerprint* is a hash over the loss of every micro-batch, the
# gradients of the first 20 steps and the final weights. Will it be the same string? Remember that floating-point sums depend on
# their order.

# %%
from dataclasses import replace

from course_utils.training import train, train_on_one_device

short = replace(config, steps=20, held_out=0)
one_device = train_on_one_device(short)
two_stages = train(short)

# %% tags=["claim:same-bits"]
print("one device:", one_device.fingerprint)
print("two stages:", two_stages.fingerprint)
assert two_stages.fingerprint == one_device.fingerprint

# %% [markdown]
# The same, because the order is the same: both add up the gradients of micro-batch 0, 1, 2, ... and in no other order. Cut
# the batch into other pieces and the last bits change:

# %% tags=["claim:pieces"]
other_pieces = train(replace(short, micro_batches=4))
print("two stages, four micro-batches:", other_pieces.fingerprint)
assert other_pieces.fingerprint != one_device.fingerprint

# %% [markdown]
# ## Then the speed
# Two processes share the work, and each of them stands idle for a part of the time. How much faster is it?

# %%
ratio = one_device.seconds / two_stages.seconds
print(f"one device {one_device.seconds:.1f} s, two stages {two_stages.seconds:.1f} s: {ratio:.2f} times as fast")

# %% [markdown]
# Do not expect 2, and do not be surprised by less than 1. The model is tiny: every micro-batch costs a fixed time in Python
# and in messages, the stages are unequal, and one device has neither trouble. A pipeline is for the model that does not
# *fit* on one device; here it is cut so that you can see how. On that day the bits must be right.
#
# What is asked for and cannot be done is refused before anything starts. Eight blocks cannot fill nine stages:

# %% tags=["nbval-check-output"]
try:
    replace(config, stages=9)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The run
# 1200 steps of 64 numbers below a million, drawn from 20,000: each length alike, as far as there are so many, and only
# nine with a single digit. On the way: the global norm of the gradients is clipped to 1, and the learning
# rate warms up over 400 steps and decays after (Vaswani et al., 2017, section 5.3, times 0.35). Both must be the
# same on both stages, although each stage sees only its own gradients. While it runs, the line below shows loss, learning rate and norm.
# You may stop it with the square button: no process is left, and the cell can be run again.

# %%
import sys

from tqdm import tqdm

with tqdm(total=config.steps, file=sys.stdout, leave=False, mininterval=0.5) as bar:

    def show_step(step):
        bar.set_postfix_str(f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, norm {step.gradient_norm:.2f}")
        bar.update()

    result = train(config, on_step=show_step)
print(f"{len(result.steps)} steps in {result.seconds:.0f} s over {config.stages} stages")

# %% [markdown]
# The loss is the mean over all tokens of a mini-batch, on a logarithmic axis:

# %%
losses = [step.loss for step in result.steps]
show(draw_curve(losses, "loss", log=True), says=describe_curve(losses, "loss"))

# %% [markdown]
# And the learning rate that every stage used at every step: a straight line up, then one over the square root of the step.

# %%
rates = [step.learning_rate for step in result.steps]
show(draw_curve(rates, "learning rate"), says=describe_curve(rates, "learning rate"))

# %% [markdown]
# ## The exam
# 500 numbers were held out: no training batch contained them. An answer counts only if every word is right. The model
# writes its answers through the pipeline too: the encoder runs once on stage 0, the decoder once per word on stage 1.

# %% tags=["claim:exam"]
print(f"{result.exact_match:.1%} of {len(result.answers)} held-out numbers are exactly right")
assert len(result.answers) == 500
assert result.exact_match >= 0.97

# %% [markdown]
# Where it was wrong, if it was. Look at the lengths: how many examples of a number that short were there to learn from?

# %%
wrong = [(number, words) for number, words in result.answers.items() if words != to_words(number)]
for number, words in wrong[:5]:
    print(f"{number}: {words}")
print(f"{len(wrong)} wrong of {len(result.answers)}")

# %% [markdown]
# ## Your own numbers
# Change the list and run the cell again. For this the two halves are put together for the first time, in this process.
# The last number has seven digits. The model has never seen so many: what will it do?

# %%
from course_utils.training import answer

my_numbers = [123, 2026, 45, 808_080, 1_234_567]
for number, words in zip(my_numbers, answer(config, result.weights, my_numbers), strict=True):
    print(f"{number:>7}  {words}")

# %% [markdown] tags=["summary"]
# ## What you know now
# - The same micro-batches give the same bits, on one device and on two stages. <!-- shown: same-bits -->
# - Other micro-batches give other bits: floating-point sums depend on how they are cut. <!-- shown: pieces -->
# - With equal stages GPipe's bubble is $(K-1)/(M+K-1)$ of the total time. <!-- shown: bubble -->
# - A model whose halves were apart while it learnt and was examined reads at least 97 % right. <!-- shown: exam -->
#
# **Kept for later:** `train`, `train_on_one_device` and `answer` in `course_utils/training.py`; the executor in
# `course_utils/pipeline.py`; schedules in `course_utils/schedules.py`.

# %% [markdown]
# ## Questions
# 1. Why is the loss of a micro-batch divided by the tokens of the *whole* mini-batch, and not by its own?
# 2. Stage 1 is the heavier one. What does that do to the bubble of stage 0?
# 3. Would twice as many micro-batches make the run twice as fast?
#
# ### Answers
# 1. A mean of means would weigh a token in a short micro-batch more than one in a long micro-batch, and the gradient would
#    depend on how the batch was cut.
# 2. It grows: stage 0 is idle whenever stage 1 needs longer than stage 0 for the same micro-batch.
# 3. No, and with a model this small it may well get slower. The bubble of equal stages shrinks from 1/9 to 1/17 of the
#    time, but every micro-batch has its fixed costs. Try it: `train(replace(short, micro_batches=16)).seconds`.
#
# ## References
# Huang et al., 2019, *GPipe*, arXiv 1811.06965, sections 2.2 and 2.3 · Narayanan et al., 2021, *Efficient Large-Scale
# Language Model Training on GPU Clusters Using Megatron-LM*, arXiv 2104.04473, section 2.2 · Llama Team, 2024, *The Llama 3
# Herd of Models*, arXiv 2407.21783 · Vaswani et al., 2017, *Attention Is All You Need*, arXiv 1706.03762, sections 3 and
# 5.3 · PyTorch: `torch.distributed`, `torch.distributed.pipelining`.
