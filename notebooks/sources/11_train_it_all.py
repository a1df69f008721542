# %% [markdown] tags=["opening"]
# # 11 · Train it all
#
# **You will be able to** put all parts of the course into one training run, prove that it computes what one device computes, resume it after a
# kill, say which bytes more stages save, and find fifteen mistakes in a script.
#
# **You need** lessons [00](00_start_here.ipynb) to [10](10_noam_warm_up.ipynb). **Minutes:** 40 to read, 3 to run.
#
# **New terms:** [held-out](00_start_here.ipynb#held-out), [exact match](00_start_here.ipynb#exact-match),
# [checkpoint](00_start_here.ipynb#checkpoint).
#
# One process holds the encoder, another the decoder. While they learn, neither sees the other's weights.

# %% tags=["where"]
from course_utils.course_map import where

where("11")

# %% [markdown]
# ## All parts, one configuration
# A number in digits goes in, its words come out. Everything that you have built is in this run:

# %% tags=["nbval-check-output"]
from course_utils.recipes import RECIPES, TrainingConfig, with_precision
from course_utils.stages import stage_table

config = TrainingConfig(stages=2, micro_batches=8, schedule="gpipe", precision="auto", max_norm=1.0, warm_up=150)
print(stage_table(config.cut.builders, config.cut.partition))

# %% [markdown]
# Stages: lessons [02](02_cut_it.ipynb) to [04](04_naive_model_parallelism.ipynb). Micro-batches and GPipe: [05](05_micro_batches.ipynb) to
# [07](07_bubble_and_stash.ipynb). Precision: [08](08_mixed_precision.ipynb). Clipping: [09](09_gradient_clipping.ipynb). Warm-up:
# [10](10_noam_warm_up.ipynb). `auto` measures a layer on this machine, and the answer holds for all runs below:

# %%
config = with_precision(config)
print("matrix products in", config.precision)

# %% [markdown] tags=["stub"]
# ## Write it first
# Each part was a lesson; their *order* is this one. Write the step of one rank. The check runs it on two ranks for five steps, makes a
# gradient of stage 0 overflow in one of them, and compares every bit with one device.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def training_step(rank, micro_batches):
    """One step of training on one rank; return whether the weights changed. The parts, in no order:

    rank.forward_backward(micro_batches, num_tokens, loss_scale)  runs this rank's row of the schedule
    rank.optimizer.zero_grad(), rank.optimizer.step()
    rank.noam.step()                                              moves the learning rate
    rank.scaler.scale, .unscale(rank.parameters), .update(skipped)
    rank.norms()                                                  of this rank's gradients
    rank.share(norms)                                             gives the norms of all ranks
    rank.clip(norms)       scales this rank's gradients and returns the global norm; if it is not finite, only returns it
    """
    ...  # your turn: about eleven lines


check("11.training_step", training_step)

# %% [markdown]
# The package has cut this step in two where the ranks exchange their norms: `take_in` before it, `update` after it. Compare `update` with
# yours: no rank asks another whether to skip. All of them see the norms of all, so they decide alike.

# %%
import inspect
from textwrap import dedent

from course_utils.training_state import TrainingState

print(dedent(inspect.getsource(TrainingState.update)))

# %% [markdown]
# ## First the bits
# A pipeline that is wrong in a small way still learns. So before the long run, fifty steps are compared with a plain loop on one device. All
# fifty steps' gradients enter the fingerprint, beside the losses and the final weights.

# %%
from dataclasses import replace

from course_utils.training import train, train_on_one_device

first_steps = replace(config, steps=50, recorded_steps=50, held_out=0)
one_device = train_on_one_device(first_steps)
two_stages = train(first_steps, record=[40])

# %% tags=["fingerprint", "claim:same-bits"]
print("one device:", one_device.fingerprint)
print("two stages:", two_stages.fingerprint)
assert two_stages.fingerprint == one_device.fingerprint
ratio = one_device.seconds / two_stages.seconds
print(f"one device {one_device.seconds:.1f} s, two stages {two_stages.seconds:.1f} s: {ratio:.2f} times as fast")

# %% [markdown]
# Do not expect 2; less than 1 is no surprise. The bubble, unequal stages and messages weigh much for so tiny a model. A pipeline is for
# the model that does not *fit*.
#
# ## Read a real step
# Step 40 was recorded. Below it stands a simulation with the mean times of these stages and messages that take no time.

# %%
from course_utils.breakdown import describe
from course_utils.breakdown import predict as simulate_like
from course_utils.plots import describe_timeline, draw_timelines, show
from course_utils.schedules import gpipe

measured = two_stages.timelines[40]
simulated = simulate_like(measured, gpipe(2, 8))
says = f"{describe_timeline(measured)} {describe_timeline(simulated)}"

# %%
show(draw_timelines([measured, simulated]), says=says)

# %% [markdown]
# What only the upper picture has is messages, the executor and other work of this machine. `describe` puts figures on it:

# %% tags=["claim:adds-up"]
from course_utils.breakdown import breakdown

print(describe(measured, gpipe(2, 8)))
parts = breakdown(measured, gpipe(2, 8))
assert all(abs(rank.total / measured.makespan - 1) < 1e-9 for rank in parts.ranks)

# %% [markdown]
# Line by line. *The step took*: its length, the useful share, and one bubble in two conventions. *The slowest stage*: what all others wait for.
# Each row adds up to one rank's whole time. *Schedule*: what even equal stages would lose. *Slow neighbour*: what unequal ones lose besides;
# another cut mends it. *Sending*: copying and posting. *Rest*: messages under way, varying times, other programs. The largest of the four is
# what to mend first.
#
# ## The run
# 800 steps of 64 numbers below a million; 500 numbers are *held out*: no training batch contains them. An answer counts only if every word is
# right, *exact match*. How many per cent will be right?

# %%
from course_utils.predictions import predict

guess = predict("exact match on held-out numbers", steps=800, unit="%", value=None)  # put your guess here

# %% [markdown]
# Start the next cell and read on; the square button stops it, and no process is left. Each report has one loss, one rate and one norm, although each stage saw only
# its own gradients.

# %%
import sys

from tqdm import tqdm

with tqdm(total=config.steps, file=sys.stdout, leave=False, mininterval=0.5) as bar:

    def show_step(step):
        bar.set_postfix_str(f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, norm {step.gradient_norm:.2f}")
        bar.update()

    result = train(config, on_step=show_step)
clipped = sum(step.gradient_norm > config.max_norm for step in result.steps)
skipped = sum(step.skipped for step in result.steps)
print(f"{len(result.steps)} steps in {result.seconds:.0f} s: {clipped} clipped, {skipped} skipped")

# %%
from course_utils.plots import describe_curve, draw_curve

losses = [step.loss for step in result.steps]
show(draw_curve(losses, "loss", log=True, first_step=0), says=describe_curve(losses, "loss", first_step=0))

# %% [markdown]
# The loss per token, on a logarithmic axis. And the exam, written through the pipeline too: the encoder runs once on stage 0, the decoder once per word on
# stage 1.

# %% tags=["claim:exam"]
print(f"{result.exact_match:.1%} of {len(result.answers)} held-out numbers are exactly right")
assert len(result.answers) == 500 and result.exact_match >= 0.97
guess = guess.settle(measured=100 * result.exact_match)

# %%
from course_utils.charts import describe_prediction, draw_prediction

show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# Where was it wrong, if it was? Do digits repeat?

# %%
from course_utils.number_words import to_words

wrong = {number: words for number, words in result.answers.items() if words != to_words(number)}
print(f"{len(wrong)} wrong:", dict(list(wrong.items())[:5]))

# %% [markdown]
# **Your own numbers.** Put yours into the list and run the cell again. The last one has seven digits, more than the model has ever seen. What does it do?

# %%
from course_utils.training import answer

my_numbers = [123, 2026, 45, 808_080, 1_234_567]
for number, words in zip(my_numbers, answer(config, result.weights, my_numbers), strict=True):
    print(f"{number:>7}  {words}")

# %% [markdown]
# ## Killed, and resumed
# Long runs get killed. So every few steps each stage saves its weights, Adam's numbers, the rate's and the scaler's state; a *checkpoint* counts only when all stages have
# written theirs. (A run that restores less goes another way: [the_well#77](https://github.com/PolymathicAI/the_well/issues/77) forgot rate and scaler.) Here
# stage 1 is killed at step 60, as the system does when memory runs out.

# %%
import tempfile

from course_utils.checkpoint import Checkpoints
from course_utils.processes import StageError, start

seventy = replace(config, steps=70, held_out=0)
folder = tempfile.TemporaryDirectory()
checkpoints = Checkpoints(folder.name)


def run_until_killed(function, num_ranks, *arguments, on_event):
    def watch(rank, event):  # called for every step that the ranks report
        on_event(rank, event)
        if getattr(event, "number", None) == 60:
            run.kill(1)

    run = start(function, num_ranks, *arguments, on_event=watch)
    return run.result()


# %%
try:
    train(seventy, run=run_until_killed, checkpoints=checkpoints, save_every=20)
except StageError as error:
    print(str(error).split(";")[0])

# %% [markdown]
# It goes on with *three* stages, and the comparison is a run on two that nobody killed.

# %% tags=["fingerprint", "claim:resumed"]
resumed = train(replace(seventy, stages=3), checkpoints=checkpoints, save_every=20, resume=True)
folder.cleanup()
undisturbed = train(seventy)
print("first step after the resume:", resumed.steps[0].number)
print("killed, three stages:  ", resumed.fingerprint)
print("undisturbed, two stages:", undisturbed.fingerprint)
assert resumed.steps[0].number == 60 and resumed.fingerprint == undisturbed.fingerprint

# %% [markdown]
# ## The article's recipe
# This course began with an article's script. Its recipe, mended: numbers below 1,000, batches of 32, 290 steps, a warm-up
# of 4,000. It is stopped at step 200 for a look, then it goes on.

# %%
article = replace(RECIPES["article"], stages=1)
folder = tempfile.TemporaryDirectory()
early = train(replace(article, steps=200), checkpoints=Checkpoints(folder.name))
late = train(article, checkpoints=Checkpoints(folder.name), resume=True)
folder.cleanup()
print(f"exactly right at step 200: {early.exact_match:.0%}, at step 290: {late.exact_match:.0%}")

# %% [markdown]
# **A mistake made on purpose.** Who takes an exam with the right answers in hand? A validation that feeds the model the right words so far
# does ([yoyodyne#70](https://github.com/CUNY-CL/yoyodyne/issues/70)). How many per cent of the words are right then, at step 200?

# %%
forced_guess = predict("words right, each after right ones", step=200, unit="%", value=None)

# %% tags=["mistake", "claim:by-heart"]
import torch

from course_utils.number_words import PAD, collate

exam = collate(list(early.answers))
model = article.cut.build(0, article.seed)
model.load_state_dict({name: early.weights[full] for name, full in zip(model.state_dict(), early.weights, strict=True)})
with torch.no_grad():
    words = model((None, None), exam)[0].argmax(dim=-1)
tokens = exam.target_output != PAD
forced = (words == exam.target_output)[tokens].float().mean().item()
print(f"words right, each after the right ones: {forced:.0%}; numbers right, written alone: {early.exact_match:.0%}")
assert forced > early.exact_match + 0.1
forced_guess = forced_guess.settle(measured=100 * forced)

# %%
show(draw_prediction(forced_guess), says=describe_prediction(forced_guess))

# %% [markdown]
# Two things flatter the first figure. It counts words, and a number is right only if all its words are. And no error leads to the next, because the next word follows a right one. An
# exam asks for what the model will have to do alone. The two recipes beside each other:

# %% tags=["claim:recipes"]
for name, run in {"article": late, "default": result}.items():
    c, rates = run.config, [step.learning_rate for step in run.steps]
    right = f"{run.exact_match:.1%} of {len(run.answers)}"
    print(f"{name}: numbers up to {c.highest:,}, {c.steps} steps of {c.batch_size}, right: {right}")
    print(f"  last rate {rates[-1]:.1e}, highest rate {max(rates):.1e}, warm-up {c.warm_up} steps")
assert late.exact_match >= 0.9
assert late.steps[-1].learning_rate == max(step.learning_rate for step in late.steps)

# %% [markdown]
# The article's run ends inside its warm-up, at its highest rate: [lesson 10](10_noam_warm_up.ipynb) shows why that works.
#
# ## The article's chart, measured
# The article has a chart: memory per device over the size of the model, less of it with more stages. Which bytes fall? Three sizes, on 1, 2 and 4 stages,
# counted tensor by tensor as in [lesson 07](07_bubble_and_stash.ipynb), each of the stage that holds most of it:

# %%
from course_utils.memory import measure_memory
from course_utils.threads import run_in_threads

full = replace(config, precision="fp32")


def fullest(config):
    """{purpose: bytes}, each of the stage that holds most of it; stages run in threads, which changes no byte."""
    ranks = measure_memory(config, run=run_in_threads)
    names = {"parameters": "parameters", "gradients": "gradients", "optimizer_state": "Adam", "stash": "stash"}
    kept = {name: max(getattr(rank.stages[0], field) for rank in ranks) for field, name in names.items()}
    return kept | {"peak": max(rank.peak for rank in ranks)}


# %%
memory, sizes = {}, {}
for d_model in (64, 128, 256):
    model_config = replace(full.model, d_model=d_model)
    sizes[d_model] = sum(shape.numel() for shape in replace(full, model=model_config).cut.parameter_shapes.values())
    for K in (1, 2, 4):
        memory[K, d_model] = fullest(replace(full, stages=K, model=model_config))
        kept = "  ".join(f"{name} {count / 1e6:5.2f}" for name, count in memory[K, d_model].items())
        print(f"{sizes[d_model]:9,} parameters, K={K}: {kept}  MB")

# %%
from course_utils.charts import describe_lines, draw_lines

lines = {f"K={K}": {sizes[d]: memory[K, d]["peak"] for d in sizes} for K in (1, 2, 4)}
names = {"x": "parameters of the model", "y": "bytes", "title": "Peak of the fullest stage, counted"}
show(draw_lines(lines, **names, log_x=True, log_y=True), says=describe_lines(lines, **names))

# %% [markdown]
# Each line is lower than the one above it, by less than half. The mini-batch is the same 64 rows everywhere here. But more stages need more micro-batches ($M \ge 4K$, below). Keep 8 rows in each: by which factor
# does the stash of the fullest stage change from one stage to four?

# %%
stash_guess = predict("stash of the fullest of 4 stages over that of 1", M="4K", unit="times", value=None)

# %% tags=["claim:stash-stays"]
growing = {K: fullest(replace(full, stages=K, micro_batches=4 * K, batch_size=32 * K)) for K in (1, 2, 4)}
fixed = {K: memory[K, 128] for K in (1, 2, 4)}
kinds = {
    "parameters, gradients, Adam": {
        K: found["parameters"] + found["gradients"] + found["Adam"] for K, found in fixed.items()
    },
    "stash, 64 rows": {K: found["stash"] for K, found in fixed.items()},
    "stash, 8 rows x M = 4K": {K: found["stash"] for K, found in growing.items()},
}
shares = {name: {K: kept / found[1] for K, kept in found.items()} for name, found in kinds.items()}
stash_guess = stash_guess.settle(measured=shares["stash, 8 rows x M = 4K"][4])
assert shares["parameters, gradients, Adam"][4] < 0.4 and shares["stash, 8 rows x M = 4K"][4] > 0.9

# %%
names = {"x": "K, stages", "y": "bytes over those of K=1", "title": "Fullest stage, counted: what shrinks"}
says = f"{describe_lines(shares, **names)} {describe_prediction(stash_guess)}"
show(draw_lines(shares, **names, log_x=True), says=says)

# %% [markdown]
# Parameters, gradients and Adam's numbers shrink with $K$, not quite to $1/K$ because the decoder's stages are fuller. The stash shrinks only for a fixed mini-batch. With
# $M$ growing as $K$ does, each stage keeps $K$ times as many micro-batches of $1/K$ of the layers, and nothing is won; the fullest stage, in the decoder, keeps even more than
# one device did. [Re-materialisation](07_bubble_and_stash.ipynb) is for that part. Not counted: what every process takes for itself, Python and PyTorch, which
# does not shrink either.
#
# ## 24 layers on four stages
# 12 encoder and 12 decoder layers, six on each stage. **Built**, at width 32, run for one step, and **counted**:

# %% tags=["fingerprint", "claim:deep"]
layers = replace(config.model, d_model=32, encoder_layers=12, decoder_layers=12)
deep = replace(full, model=layers, stages=4, micro_batches=16, steps=1, held_out=0)
print(stage_table(deep.cut.builders, deep.cut.partition))
four = train(deep, run=run_in_threads)
print("four stages:", four.fingerprint)
assert four.fingerprint == train_on_one_device(deep).fingerprint
names = [[deep.cut.builders[i].name for i in blocks] for blocks in deep.cut.partition]
assert [sum(name[-1].isdigit() for name in stage) for stage in names] == [6, 6, 6, 6]

# %%
from course_utils.memory import memory_table

print(memory_table(measure_memory(deep, run=run_in_threads)))

# %% [markdown]
# **Priced**: the cost of each block is measured here, one block at a time; the step on four devices is *simulated* from these costs. How many
# times as fast as one device is it, cut by count?

# %%
speed_guess = predict("speed-up of 24 layers, simulated", K=4, M=16, unit="times as fast", value=None)

# %%
from course_utils.number_words import batch
from course_utils.simulation import simulate
from course_utils.stages import by_cost, by_count, measure_costs

costs = measure_costs(deep.cut.builders, batch(range(100_000, 1_000_000), seed=0, step=0, size=4), seed=0)
speed = {}
for name, cut in {"by count": by_count(28, 4), "by cost": by_cost(costs, 4)}.items():
    stages = [sum(costs[i] for i in blocks) for blocks in cut]
    step = simulate(gpipe(4, 16), forward=[s / 3 for s in stages], backward=[2 * s / 3 for s in stages])
    speed[name] = 16 * sum(costs) / step.makespan
    print(f"{name}: {[len(blocks) for blocks in cut]} blocks, simulated {speed[name]:.2f} times as fast as one device")
speed_guess = speed_guess.settle(measured=speed["by count"], formula=4 * 16 / (16 + 3))
bars = {"your prediction": speed_guess.value, "formula, equal stages": speed_guess.formula}
bars = {name: value for name, value in bars.items() if value is not None}
bars |= {f"simulated, {name}": value for name, value in speed.items()}

# %%
from course_utils.charts import describe_bars, draw_bars

names = {
    "unit": "times as fast as one device",
    "title": "24 layers, K=4, M=16: simulated from measured costs of blocks",
}
show(draw_bars(bars, **names), says=describe_bars(bars, **names))

# %% [markdown]
# No four devices were there, and messages cost nothing in it. The formula takes stages to be equal; a decoder layer has two attentions, an encoder layer one. A cut by cost need
# not keep six per stage.
#
# ## Three tips, with figures
# All simulated: a layer's forward costs 1, its backward 2. First the length of a step for three ways to cut 24 layers, then the bubble over $M$, then the gain of more stages.


# %% tags=["nbval-check-output", "claim:tips"]
def span(layers, M, transfer=0.0):
    return simulate(gpipe(len(layers), M), forward=layers, backward=[2 * n for n in layers], transfer=transfer).makespan


steps = {str(layers): span(layers, 16) for layers in ([6, 6, 6, 6], [5, 7, 5, 7], [9, 5, 5, 5])}
print("simulated length of a step, M=16:", steps)
bubbles = {f"M={M}": simulate(gpipe(4, M)).bubble_of_total for M in (4, 8, 16, 32)}
print("simulated bubble, K=4:", {M: f"{bubble:.0%}" for M, bubble in bubbles.items()})
print("simulated gain over one device, and its share of K; M=16, a message costs half a layer:")
gain = {K: 24 * 3 * 16 / span([24 // K] * K, 16, transfer=0.5) for K in (2, 4, 8, 12, 24)}
print({f"K={K}": f"{times:.1f}, {times / K:.0%}" for K, times in gain.items()})
assert steps["[9, 5, 5, 5]"] > 1.35 * steps["[6, 6, 6, 6]"] and bubbles["M=16"] < 0.16 and gain[24] < 12

# %% [markdown]
# **Balance**: one stage with half as many layers again makes the whole step more than a third longer. **$M \ge 4K$**: then less than a fifth of the time is bubble; twice as
# many micro-batches save less than any doubling before, and cost stash. **Stop adding stages** where devices no longer earn their place: on 24 stages each gives about a third of
# what it could, because the bubble grows with $K$ and every border adds its message. The exception is a model that fits on no fewer.
#
# ## The code review
# The article's script, in a short equivalent. It compiles, and it looks like much that is on the web. Read it before you go on: how many mistakes do you count?

# %% tags=["nbval-check-output"]
script = """
from torch.distributed.pipeline.sync import Pipe
words = ["<pad>", "<start>", "<end>", "one", "two", "three", "four", "five"]
ids = {word: i for i, word in enumerate(words)}
pairs = [([ids[digit] for digit in str(n)], [2 + int(digit) for digit in str(n)]) for n in range(1000)]

def worker(rank, world_size):
    embed, head = nn.Embedding(len(words), 128), nn.Linear(128, len(words))  # later: * sqrt(128), + positions
    parts = nn.Transformer(128, 4, 2, 2)
    stages = [embed.to(rank), parts.encoder.to(rank), parts.decoder.to(rank + 1), head.to(rank + 1)]
    model = Pipe(nn.Sequential(*stages), chunks=world_size)
    optimizer = Adam(model.parameters(), lr=0)
    scheduler, scaler = Noam(optimizer, 128, 4000), GradScaler()  # its step() sets the rate
    for source, target in DataLoader(pairs, batch_size=32):
        with autocast():
            loss = cross_entropy(model(source).transpose(1, 2), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad(), scheduler.step()

spawn(worker, args=(2,), nprocs=2)
"""
compile(script, "article.py", "exec")
print(len(script.strip().splitlines()), "lines that compile")

# %%
count_guess = predict("mistakes in the script", unit="mistakes", value=None)

# %% [markdown]
# Now find them with tools. `note` keeps a table: the symptom, the tool that shows it, the lesson that mends it.


# %%
from textwrap import shorten


def note(symptom, tool, lesson):
    review[symptom] = tool, lesson
    print(f"{list(review).index(symptom) + 1:2}  {symptom}")


def raises(action):
    try:
        action()
    except Exception as error:
        return shorten(f"{type(error).__name__}: {error}", 66, placeholder=" ...")


review = {}

# %% tags=["nbval-check-output", "claim:loud"]
import importlib

from torch import nn

words = ["<pad>", "<start>", "<end>", "one", "two", "three", "four", "five"]
ids = {word: i for i, word in enumerate(words)}
rows = [torch.tensor([1, 7]), torch.tensor([4])]
note(raises(lambda: importlib.import_module("torch.distributed.pipeline.sync")), "a dry run", "06")
note(raises(lambda: [ids[digit] for digit in "17"]), "a dry run", "01")
note(raises(lambda: nn.Embedding(len(words), 128)(torch.tensor([2 + 7]))), "a dry run", "01")
note(raises(lambda: torch.utils.data.default_collate(rows)), "numbers of two lengths", "01")
assert [text.split(":")[0] for text in review][:4] == ["ModuleNotFoundError", "KeyError", "IndexError", "RuntimeError"]

# %% [markdown]
# These were loud, like the next three: a decoder in a chain of one input, length first, and a process that drives its neighbour's stage.

# %% tags=["nbval-check-output", "claim:loud"]
import warnings
from types import SimpleNamespace

from course_utils.pipeline import Pipeline

digits, written = torch.randn(32, 3, 16), torch.randn(32, 4, 16)
layer = nn.TransformerDecoderLayer(16, 2, 32)
note(raises(lambda: nn.Sequential(nn.TransformerDecoder(layer, 1))(written)), "a dry run", "02")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about a faster path that these models cannot take
    sequence_first = nn.Transformer(16, 2, 1, 1, 32)
note(raises(lambda: sequence_first(digits, written)), "a dry run, another row", "00")
both = {stage: config.cut.build(stage, 0) for stage in (0, 1)}
note(raises(lambda: Pipeline(both, gpipe(2, 8), SimpleNamespace(rank=0), None)), "the executor's check", "04")
assert [text.split(":")[0] for text in review][4:7] == ["TypeError", "RuntimeError", "ValueError"]

# %% [markdown]
# The rest raises nothing. Change something, and look whether the first answer changes: a swap of digits should, a later word and padding should not.

# %% tags=["nbval-check-output", "claim:silent"]
torch.manual_seed(0)
plain = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
later = written.clone()
later[:, 1] += 1.0
padded = torch.cat([digits, torch.zeros(32, 2, 16)], dim=1)
changes = {"digits swapped": (digits.flip(1), written), "a later word": (digits, later), "padding": (padded, written)}
before = plain(digits, written)[:, 0]
for name, inputs in changes.items():
    changed = not torch.allclose(before, plain(*inputs)[:, 0], atol=1e-4)
    note(f"{name}: the answer {'changes' if changed else 'stays'}", "the mask check", "01")
assert [text.split()[-1] for text in review][7:10] == ["stays", "changes", "changes"]

# %% [markdown]
# No positions, no causal mask, no padding mask. ([Lesson 01](01_one_device.ipynb) has the masks.) And once positions are added, the usual embedding drowns them; `chunks` is $M$, not $K$:

# %% tags=["nbval-check-output", "claim:silent"]
from course_utils.transformer import sinusoidal_positions

drowned = nn.Embedding(1000, 128).weight.norm(dim=1).mean() * 128**0.5 / sinusoidal_positions(1, 128).norm()
note(f"embeddings {drowned:.0f} times as large as positions", "two norms", "01")
chunks = {M: simulate(gpipe(2, M)).bubble_of_total for M in (2, 8)}
note(f"chunks=2: {chunks[2]:.0%} bubble; M=8: {chunks[8]:.0%}", "the simulation", "07")

# %% [markdown]
# A learning rate of 0 until the scheduler's first step, which comes after the optimizer's: the first update does nothing, in this script as in
# [verl#3674](https://github.com/verl-project/verl/issues/3674).

# %% tags=["mistake", "nbval-check-output", "claim:silent"]
weight = nn.Parameter(torch.ones(3))
late_start = torch.optim.Adam([weight], lr=0)
weight.sum().backward()
late_start.step()
note(f"first update moves the weights by {(weight - 1).norm():.1f}", "the rate of step 0", "10")
print("here the first rate is above 0:", result.steps[0].learning_rate > 0)
assert torch.equal(weight, torch.ones(3))

# %% [markdown]
# Last, two tools that see one process: clipping ([torchtitan#596](https://github.com/pytorch/torchtitan/issues/596)) and the scaler
# ([torchtitan#803](https://github.com/pytorch/torchtitan/issues/803)). Here both stages stand in this process, and
# every gradient is 1, until one on stage 0 overflows.

# %% tags=["nbval-check-output", "claim:silent"]
for stage in both.values():
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)
norms = [torch.stack([p.grad.norm() for p in stage.parameters()]).norm() for stage in both.values()]
shares = [(norm / torch.stack(norms).norm()).item() for norm in norms]
note(f"own norms: {shares[0]:.0%} and {shares[1]:.0%} of the global one", "the global norm", "09")
assert max(shares) < 0.9
next(both[0].parameters()).grad.fill_(torch.inf)
finite = [all(p.grad.isfinite().all() for p in stage.parameters()) for stage in both.values()]
note(f"skip on stage 0: {not finite[0]}, on stage 1: {not finite[1]}", "the fingerprint", "08")
assert finite == [False, True]

# %% tags=["nbval-check-output", "claim:review"]
for number, (symptom, (tool, lesson)) in enumerate(review.items(), start=1):
    print(f"{number:2}  {symptom:67} {tool:23} lesson {lesson}")
assert len(review) == 15

# %%
count_guess = count_guess.settle(measured=len(review))
show(draw_prediction(count_guess), says=describe_prediction(count_guess))

# %% [markdown]
# Seven of fifteen raise an error, and an error says where to look. The other eight train on, worse or slower than they could. They show beside something right: an answer that
# should not change, a rate above 0, the global norm, the bits of one device. That is why every lesson had a fingerprint.

# %% [markdown] tags=["summary"]
# ## What you know now
# - With all parts in it, two stages have one device's bits for fifty steps. <!-- shown: same-bits -->
# - A step's time divides into parts that add up, for every rank. <!-- shown: adds-up -->
# - Trained and examined in halves, the model reads at least 97 % of 500 held-out numbers without a mistake. <!-- shown: exam -->
# - Killed at step 60 and resumed on three stages, a run ends with the same bits. <!-- shown: resumed -->
# - An exam with the right answers in hand flatters the model. <!-- shown: by-heart -->
# - The article's recipe, mended, learns too, and ends inside its warm-up. <!-- shown: recipes -->
# - Weights, gradients and Adam's numbers shrink with $K$; the stash does not if $M$ grows with $K$. <!-- shown: stash-stays -->
# - 24 layers on four stages of six have one device's bits. <!-- shown: deep -->
# - In the simulation one fuller stage slows all, $M = 4K$ leaves less than a fifth of bubble, and 24 stages give a third of their number. <!-- shown: tips -->
# - Seven of the script's fifteen mistakes raise an error. <!-- shown: loud -->
# - Eight raise nothing, and show only beside something right. <!-- shown: silent -->
# - Each has a tool that shows it, and a lesson that mends it. <!-- shown: review -->
#
# **Kept for later:** `train` and `answer` in `course_utils/training.py`; `TrainingState` in `training_state.py`; `Checkpoints` in `checkpoint.py`.
#
# **Practise:** train with `steps=600`. Which numbers are wrong now, and of which length?
# Exercises: [unit 11](../exercises/11_train_it_all/11_train_it_all.ipynb). After it, a script with eight bugs to find: the
# [bug hunt](../exercises/12_bug_hunt/12_bug_hunt.ipynb).
#
# **Next:** [12 · Read a trace, plan a run](12_read_a_trace.ipynb).

# %% [markdown]
# ## Questions
# 1. Why may a run be resumed on another number of stages, but not with another number of micro-batches?
# 2. Which of the fifteen mistakes would show in a loss that falls?
# 3. Your stash no longer fits on 8 stages with $M = 32$. Name two remedies and their prices.
# 4. Why is the step skipped on *all* ranks if one gradient of one stage is not finite?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. Gradients are added micro-batch by micro-batch, ascending, on every cut. Other micro-batches are other sums with other last bits.
# 2. You cannot count on any of the silent ones. Without a causal mask the answer is in the input, so the loss falls all the better.
# 3. Re-materialisation: a second forward. Smaller micro-batches: the fixed costs of each. (1F1B keeps less for the same bubble.)
# 4. A rank that steps alone has weights of step $t+1$ beside weights of step $t$: halves of two models.
#
# And the step:


# %% tags=["answers", "nbval-check-output"]
import math


def training_step(rank, micro_batches):
    """One step of training on one rank; return whether the weights changed."""
    rank.optimizer.zero_grad()
    num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
    rank.forward_backward(micro_batches, num_tokens, rank.scaler.scale)
    rank.scaler.unscale(rank.parameters)
    norm = rank.clip(rank.share(rank.norms()))
    skipped = not math.isfinite(norm)
    if not skipped:
        rank.optimizer.step()
        rank.noam.step()
    rank.scaler.update(skipped)
    return not skipped


check("11.training_step", training_step)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), sections 2.2 and 2.3 · Vaswani et al., 2017, *Attention Is All You
# Need*, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762), sections 3 and 5.3 · Micikevicius et al., 2018, *Mixed Precision Training*,
# [arXiv 1710.03740](https://arxiv.org/abs/1710.03740) · PyTorch: [torch.distributed.pipelining](https://docs.pytorch.org/docs/stable/distributed.pipelining.html),
# [nn.Transformer](https://docs.pytorch.org/docs/stable/generated/torch.nn.Transformer.html).
