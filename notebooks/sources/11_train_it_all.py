# %% [markdown]
# # 11 · Train it all
#
# **You will be able to** train an encoder-decoder Transformer over two stages with the GPipe schedule, say how much of
# the time each stage stands idle and why, count the memory that it needs, kill the run and resume it, and show that all
# this computes, to the last bit, what one device computes.
#
# **You need** PyTorch's training loop, and what attention and an encoder's memory are. One *stage* is one process here,
# and a process has a *rank*: stage 0 is on rank 0. **Minutes:** 20 to read, 3 to run.
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
from course_utils.recipes import TrainingConfig, with_precision

config = TrainingConfig(stages=2, micro_batches=8, schedule="gpipe", precision="auto")
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
# ## Which numbers
# Matrix products may be computed with numbers of 16 bits instead of 32, *bfloat16*, while weights, gradients and the
# optimizer stay as they are. Whether that is faster depends on the machine, and on the size of the products: every operand
# has to be converted first. `precision="auto"` lets a measurement decide: one layer of this model, on one micro-batch. It is
# made once, so that all runs below compute with the same numbers.

# %%
config = with_precision(config)
print("matrix products in", config.precision)

# %% [markdown]
# ## First the bits
# A pipeline that is wrong in a small way still learns: the loss falls, only a little worse. So before the long run a short
# one is compared with a plain loop on one device, which takes the same eight micro-batches one by one. The *fingerprint* is a hash over the loss of every micro-batch, the
# gradients of the first 20 steps and the final weights. Will it be the same string? Remember that floating-point sums depend on
# their order.

# %%
from dataclasses import replace

from course_utils.training import train, train_on_one_device

short = replace(config, steps=20, held_out=0)
one_device = train_on_one_device(short)
two_stages = train(short, record=[10])

# %% tags=["claim:same-bits"]
print("one device:", one_device.fingerprint)
print("two stages:", two_stages.fingerprint)
assert two_stages.fingerprint == one_device.fingerprint

# %% [markdown]
# The same two strings; on your machine they may be others than here. The order of addition is the same: both add up the gradients of micro-batch 0, 1, 2, ... and in no other order. Cut
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
# Do not expect 2, and do not be surprised by less than 1. Two processes can use two cores; against that stand the bubble,
# the unequal stages, and messages, which weigh much for a model so tiny. One device has none of these. A pipeline is for the model that does not
# *fit* on one device; here it is cut so that you can see how. On that day the bits must be right.

# %% [markdown]
# ## Where the time went
# Steps are numbered from 0. Number 10 of the run above was recorded: when each stage computed, waited for a message, sent one. Below it stands a simulation
# of the same schedule with the mean times of these stages, in which messages take no time. Before you look: which of the two
# stages waits more, and for what?

# %%
from course_utils.breakdown import describe, predict
from course_utils.plots import draw_timelines

measured = two_stages.timelines[10]
simulated = predict(measured, schedule)
both = f"{describe_timeline(measured)} {describe_timeline(simulated)}"
show(draw_timelines([measured, simulated]), says=both)

# %% [markdown]
# The measured step has what the simulation leaves out: messages under way, other work of this machine, actions that take
# longer one time than another. The table divides the time of every rank into parts that add up. All but *compute* and *recompute* is bubble,
# and only the column *schedule*, estimated for equal stages, is the bubble that you predicted above; *slow neighbour* is what unequal
# stages cost on top of it.

# %%
print(describe(measured, schedule))

# %% [markdown]
# ## What each stage keeps
# Memory can be counted as exactly as time. The *stash* is what a stage keeps of every micro-batch from its forward to its
# backward; Adam keeps two numbers for each weight, and a counter for each tensor. Each column is the highest that it ever
# was, at moments of its own, so they add up to more than the peak. GPipe runs all forwards first. How many micro-batches does each stage
# keep at once, and how many would it be with 1F1B (one forward, one backward), which begins the backwards as soon as it can?

# %%
from course_utils.memory import describe_memory, measure_memory, memory_table

memory = measure_memory(config)
print(memory_table(memory))
print(describe_memory(memory, schedule))

# %% tags=["claim:stash"]
from course_utils.schedules import one_f_one_b

early_backwards = measure_memory(config, one_f_one_b(num_stages=2, num_micro_batches=8))
for gpipe_rank, rank in zip(memory, early_backwards, strict=True):
    print(f"rank {rank.rank}: {gpipe_rank.stash:,} bytes of stash with GPipe, {rank.stash:,} with 1F1B")
    assert rank.stash < gpipe_rank.stash / 2
bubbles = [simulate(s, forward=1, backward=2).bubble_of_total for s in (schedule, one_f_one_b(2, 8))]
print(f"simulated bubble: {bubbles[0]:.3f} with GPipe, {bubbles[1]:.3f} with 1F1B")
assert bubbles[0] == bubbles[1]

# %% [markdown]
# With 1F1B stage 0 keeps two micro-batches and stage 1 keeps one, and with equal stages it costs no time.
#
# What is asked for and cannot be done is refused before anything starts. Eight blocks cannot fill nine stages:

# %% tags=["nbval-check-output"]
try:
    replace(config, stages=9)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The run
# 1200 steps of 64 numbers below a million, drawn from 20,000: each length alike, as far as there are so many, and rare
# lengths repeated up to ten times. On the way: the global norm of the gradients is clipped to 1, and the learning
# rate warms up over `config.warm_up` steps and decays after (Vaswani et al., 2017, section 5.3, times
# `config.learning_rate_factor`; both are printed). Both must be the same on both stages, although each stage sees only its own gradients. While it runs, the line below shows loss, learning rate and norm.
# You may stop it with the square button: no process is left, and the cell can be run again.

# %%
import sys

from tqdm import tqdm

with tqdm(total=config.steps, file=sys.stdout, leave=False, mininterval=0.5) as bar:

    def show_step(step):
        bar.set_postfix_str(f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, norm {step.gradient_norm:.2f}")
        bar.update()

    result = train(config, on_step=show_step)
print(f"warm-up over {config.warm_up} steps, factor {config.learning_rate_factor}")
print(f"{len(result.steps)} steps in {result.seconds:.0f} s over {config.stages} stages")

# %% [markdown]
# The loss is the mean over all tokens of a mini-batch, on a logarithmic axis:

# %%
losses = [step.loss for step in result.steps]
show(draw_curve(losses, "loss", log=True, first_step=0), says=describe_curve(losses, "loss", first_step=0))

# %% [markdown]
# And the learning rate that every stage used at every step: a straight line up, then one over the square root of the step.

# %%
rates = [step.learning_rate for step in result.steps]
show(draw_curve(rates, "learning rate", first_step=0), says=describe_curve(rates, "learning rate", first_step=0))

# %% [markdown]
# ## The exam
# 500 numbers were held out: no training batch contained them. An answer counts only if every word is right. The model
# writes its answers through the pipeline too: the encoder runs once on stage 0, the decoder once per word on stage 1.

# %% tags=["claim:exam"]
print(f"{result.exact_match:.1%} of {len(result.answers)} held-out numbers are exactly right")
assert len(result.answers) == 500
assert result.exact_match >= 0.97

# %% [markdown]
# Where it was wrong, if it was. Is it a rare length, or do digits repeat?

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

# %% [markdown]
# ## Killed, and resumed
# Long runs get killed. So every few steps each stage saves its weights, Adam's numbers and its part of the fingerprint; a
# checkpoint counts only when all stages have written theirs. Here the process of stage 1 is killed when step 12 is reported,
# as the system does when memory runs out. The last checkpoint holds ten finished steps, so the next one is number 10. Which string will a run have that is resumed from
# it, on *one* stage?

# %%
import tempfile

from course_utils.checkpoint import Checkpoints
from course_utils.processes import StageError, start

folder = tempfile.TemporaryDirectory()
checkpoints = Checkpoints(folder.name)


def run_until_killed(function, num_ranks, *arguments, on_event):
    def watch(rank, event):  # called for every step that the ranks report
        on_event(rank, event)
        if getattr(event, "number", None) == 12:
            run.kill(1)

    run = start(function, num_ranks, *arguments, on_event=watch)
    return run.result()


try:
    train(short, run=run_until_killed, checkpoints=checkpoints, save_every=10)
except StageError as error:
    print(str(error).splitlines()[0])

# %% tags=["claim:resumed"]
resumed = train(replace(short, stages=1), checkpoints=checkpoints, save_every=10, resume=True)
folder.cleanup()
print("first step after the resume:", resumed.steps[0].number)
print("resumed on one stage:", resumed.fingerprint)
assert resumed.fingerprint == two_stages.fingerprint

# %% [markdown]
# The string of the run that nobody killed. (What stage 1 was doing when the signal came differs from run to run.)

# %% [markdown] tags=["summary"]
# ## What you know now
# - The same micro-batches give the same bits, on one device and on two stages. <!-- shown: same-bits -->
# - Other micro-batches give other bits: floating-point sums depend on how they are cut. <!-- shown: pieces -->
# - With equal stages GPipe's bubble is $(K-1)/(M+K-1)$ of the total time. <!-- shown: bubble -->
# - 1F1B keeps less than half of what GPipe keeps here. <!-- shown: stash -->
# - A run that is killed and resumed with another number of stages ends with the same bits. <!-- shown: resumed -->
# - A model whose halves were apart while it learnt and was examined reads at least 97 % right. <!-- shown: exam -->
#
# **Kept for later:** `train`, `train_on_one_device` and `answer` in `course_utils/training.py`; the executor in
# `course_utils/pipeline.py`; schedules in `course_utils/schedules.py`; where time and memory went in
# `course_utils/breakdown.py` and `memory.py`; `Checkpoints` in `course_utils/checkpoint.py`.

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
