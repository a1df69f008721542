# %% [markdown] tags=["opening"]
# # 12 · Read a trace, plan a run
#
# **You will be able to** say what is wrong with a run from what it leaves behind, read a trace of torch.profiler and compute its bubble, and
# plan a training on devices that you do not have.
#
# **You need** lessons [00](00_start_here.ipynb) to [11](11_train_it_all.ipynb). **Minutes:** 40 to read, 1 to run.
#
# **New terms:** [trace](00_start_here.ipynb#trace), [model FLOPs utilisation](00_start_here.ipynb#model-flops-utilisation),
# [calibration](00_start_here.ipynb#calibration).
#
# You have built every part and know what each costs. From here on the runs are other people's, or too large to try.

# %% tags=["where"]
from course_utils.course_map import where

where("12")

# %% [markdown]
# ## Five runs with something wrong
# The next cell makes five runs, live. Two are emulated; three are the engine of this course each with one bug put into a copy of it. Of each run you get what the person
# on call would get: a timeline; or losses, learning rates, gradient norms and a fingerprint beside those of a healthy run; or an error.

# %%
from course_utils.mystery import CAUSES, mysteries

runs = mysteries()
print(runs["B"])

# %% [markdown]
# Go through it in this order: the fingerprint says *whether* something is wrong. The first row below it in which the two columns differ says *what*,
# and the first value that differs says *when*. Run C ended with an error; run E came to its end:

# %%
print(runs["C"], runs["E"], sep="\n\n")

# %% [markdown]
# Of `A` and `D` only timelines are left.

# %%
from course_utils.plots import describe_timeline, draw_timeline, show

show(draw_timeline(runs["A"].timeline), says=describe_timeline(runs["A"].timeline))

# %% [markdown]
# That was run A; look where each rank stands idle, and how long. Here is run D:

# %%
show(draw_timeline(runs["D"].timeline), says=describe_timeline(runs["D"].timeline))

# %% [markdown]
# Dotted and grey time together is the time in which a rank does not compute. In which of the two would more micro-batches help? For the table of
# [lesson 07](07_bubble_and_stash.ipynb), in a cell of your own: `from course_utils.breakdown import describe`, then
# `print(describe(runs["A"].timeline, runs["A"].schedule))`.

# %% [markdown] tags=["stub"]
# ## Write it first
# Give each run its cause, one of those that the cell prints. For a wrong cause the check says what it would have shown; it does not name the right one.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check

print("; ".join(CAUSES))


def diagnose():
    """Return {"A": cause, "B": cause, ..., "E": cause}."""
    ...  # your turn: one dictionary


check("12.diagnose", diagnose)

# %% [markdown]
# The solutions, with each bug as users met it, are under Answers. In runs B and E the loss falls, so the loss alone
# would not have told. The next cell asserts what does:

# %% tags=["claim:evidence"]
healthy, border, late = runs["B"].healthy, runs["B"].seen, runs["E"]
factors = [right / wrong for right, wrong in zip(healthy.norms[0], border.norms[0], strict=True)]
print("run B, norms of the healthy run over those of this one, step 0:", [round(factor, 3) for factor in factors])
assert border.losses[-1] < border.losses[0] and border.fingerprint != healthy.fingerprint
assert [round(factor, 3) for factor in factors] == [16, 4, 1]
assert late.seen.skipped == late.healthy.skipped and late.seen.rates[3] > late.healthy.rates[3]
assert "deadlock" in runs["C"].seen.error
slow = [runs["D"].timeline.utilisation(rank) for rank in range(4)]
assert max(slow) == slow[2] and runs["A"].timeline.bubble_of_total > 3 / 5 - 0.02

# %% [markdown]
# ## A trace of somebody else's pipeline
# Our timelines come from our executor. A *trace* is what a profiler has recorded of any program. Here torch.profiler watches PyTorch's own
# engine, `torch.distributed.pipelining`, in two processes that train the Transformer of this course with GPipe. `TorchPipeline` is
# a thin wrapper around it. One step runs first and is not recorded.

# %%
import os
import tempfile
from pathlib import Path

from course_utils.number_words import batch
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig
from course_utils.schedules import gpipe
from course_utils.timeline import Timeline, from_profiler, merge
from course_utils.torch_engine import TorchPipeline
from course_utils.transfer import agree

config = TrainingConfig(stages=2, micro_batches=8, lowest=100_000, training_numbers=2_000, held_out=0)
whole = batch(range(100_000, 1_000_000), seed=0, step=0, size=64)
os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would announce each start and stop
folder = tempfile.TemporaryDirectory()


# %%
def profiled_step(worker, engine, folder):
    """A trace of one rank's step in the folder; what our executor records at the same time, if it is ours."""
    from torch.profiler import ProfilerActivity, profile

    stage = config.cut.build(worker.rank, config.seed)
    pipeline = engine({worker.rank: stage}, gpipe(2, 8), worker.transport, config.cut.carry_after)
    micro_batches = whole.split(8)
    agree(worker.transport, plan := pipeline.plan(micro_batches))
    pipeline.step(micro_batches, plan, whole.num_tokens)
    stage.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        agree(worker.transport, plan)
        if engine is Pipeline:
            pipeline.timeline = Timeline(2, "recorded by our executor", "seconds")
        losses = pipeline.step(micro_batches, plan, whole.num_tokens)
    profiler.export_chrome_trace(f"{folder}/{engine.__name__}.{worker.rank}.json")
    return step_summary(losses, stage.named_parameters_globally()), pipeline.timeline


# %% tags=["fingerprint", "claim:same-bits"]
from course_utils.fingerprints import fingerprint, step_summary

results = {engine: launch(profiled_step, 2, engine, folder.name) for engine in (TorchPipeline, Pipeline)}
strings = {engine.__name__: fingerprint([summary for summary, _ in both]) for engine, both in results.items()}
print(strings)
assert strings["TorchPipeline"] == strings["Pipeline"]

# %% [markdown]
# Two engines, one fingerprint: what follows compares two ways to run the same arithmetic. A trace is a JSON file of events (<https://ui.perfetto.dev> shows such files; these lie in `folder.name` until it is cleaned up below).
# Which marks has PyTorch's engine left in it, and what is inside one of them?

# %% tags=["nbval-check-output", "claim:marks"]
import json


def events_of(rank):
    trace = json.loads(Path(folder.name, f"TorchPipeline.{rank}.json").read_text())
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


marks = [event for event in events_of(1) if event["name"].startswith(("Forward", "Backward"))]
names = sorted({event["name"] for event in marks})
print(", ".join(names))
first = next(event for event in marks if event["name"] == "Forward 0")
end = first["ts"] + first["dur"]
inside = [event["name"] for event in events_of(1) if first["ts"] <= event["ts"] < end]
print("inside Forward 0 of rank 1, first:", next(name for name in inside if "c10d" in name))
assert len(names) == 16 and any(name.startswith("aten::") for name in inside)

# %% [markdown]
# `Forward 0` begins with the receive. The mark *contains the wait*.
#
# ## A mistake made on purpose: marks taken for work
# "How do I measure the bubble?" ([Megatron-LM#691](https://github.com/NVIDIA/Megatron-LM/issues/691)). The obvious answer adds up the marks, takes the rest of the
# step for idle time, and divides it by the time of all ranks. What will it give, against a count of the operators alone?

# %%
from course_utils.predictions import predict

bubble_guess = predict("bubble of torch's GPipe", K=2, M=8, unit="share of the total time", value=None)  # your guess


# %% tags=["mistake", "claim:marks-wait"]
def bubble_of_marks():
    spans = [[e for e in events_of(rank) if e["name"].startswith(("Forward", "Backward"))] for rank in (0, 1)]
    everything = [event for both in spans for event in both]
    length = max(e["ts"] + e["dur"] for e in everything) - min(e["ts"] for e in everything)
    return 1 - sum(event["dur"] for event in everything) / (2 * length)


traces = {engine: [f"{folder.name}/{engine.__name__}.{rank}.json" for rank in (0, 1)] for engine in results}
read = from_profiler(traces[TorchPipeline])
print(f"marks taken for work: {bubble_of_marks():.1%}; operators alone: {read.bubble_of_total:.1%} of the total time")
assert bubble_of_marks() < read.bubble_of_total
bubble_guess = bubble_guess.settle(measured=read.bubble_of_total, formula=(2 - 1) / (8 + 2 - 1))

# %% [markdown]
# `timeline.from_profiler(paths)` takes what operators computed and nothing else; the marks serve only to tell the micro-batch. It reads your
# traces too: one file per rank, from `export_chrome_trace`, with or without marks (without, autograd's arrows from forward to backward tell the two apart). For
# traces with kernels of a GPU it uses the documented keys, but that part has never been run. ([Holistic Trace Analysis](https://github.com/facebookresearch/HolisticTraceAnalysis) is
# the tool for those.)
#
# Beside it our own step: the upper two lanes from torch's engine, the lower two from ours, both read from traces.

# %%
from course_utils.plots import draw_timelines

ours = from_profiler(traces[Pipeline])
read.label, ours.label = "torch's engine, measured by torch.profiler", "our engine, measured by torch.profiler"
says = f"{describe_timeline(read)} {describe_timeline(ours)}"

# %%
show(draw_timelines([read, ours]), says=says)

# %% [markdown]
# Find the forwards, the backwards and the gaps. A profiler slows every operator down, so compare shares here, not seconds. Is the reading right? Our executor wrote its own timeline of the very
# step that the profiler watched:

# %% tags=["claim:reader"]
recorded = merge([timeline for _, timeline in results[Pipeline]])


def order(timeline, rank):
    rows = sorted((i for i in timeline if i.rank == rank and i.kind in "FB"), key=lambda interval: interval.start)
    return list(dict.fromkeys(f"{i.kind}{i.micro_batch}" for i in rows))


for rank in (0, 1):
    assert order(ours, rank) == order(recorded, rank) == order(read, rank)
print(f"bubble by the profiler {ours.bubble_of_total:.1%}, by our executor {recorded.bubble_of_total:.1%}")
folder.cleanup()

# %%
from course_utils.charts import describe_prediction, draw_prediction

show(draw_prediction(bubble_guess), says=describe_prediction(bubble_guess))

# %% [markdown]
# The formula knows equal stages and free messages; these stages are unequal, and two processes share this machine with all else that runs on it.
#
# ## How much of the machine?
# Throughput, in tokens per second, is what you pay for. To compare machines, divide by what they could do: *model FLOPs utilisation*
# is the FLOPs that the model needs, over time times peak (Chowdhery et al., 2022, appendix B). What is computed twice, as with re-materialisation, does not count.
# FLOPs are counted operator by operator; the peak is what a large product reaches here, on one thread as each stage has it.

# %%
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from course_utils.pipeline import sum_over_tokens
from course_utils.stages import one_thread


@one_thread()
def peak_of_a_core(size=768):
    matrix, times = torch.ones(size, size), []
    for _ in range(8):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def flops_of_a_step():
    model = replace(config, stages=1).cut.build(0, config.seed)
    with FlopCounterMode(display=False) as counter:
        sum_over_tokens(model((None, None), whole)[0], whole, whole.num_tokens).backward()
    return counter.get_total_flops()


# %%
used_guess = predict("model FLOPs utilisation of our step", K=2, unit="share of the peak", value=None)

# %% tags=["claim:utilisation"]
from course_utils.planning import model_flops_utilisation
from course_utils.training import train

flops, peak = flops_of_a_step(), peak_of_a_core()
run = train(replace(config, steps=12), record=[10])
seconds = run.timelines[10].makespan
used = model_flops_utilisation(flops, seconds, peak=2 * peak)
print(f"a step: {flops:,} FLOPs; a core reaches {peak / 1e9:.0f} billion a second")
print(f"{whole.num_tokens / seconds:,.0f} tokens a second; model FLOPs utilisation {used:.1%}")
assert 0 < used < 1
used_guess = used_guess.settle(measured=used)

# %% [markdown]
# Small products never reach the peak, and this model is tiny. Llama 3 reports 38 to 43 % on up to 16,384 GPUs (Llama Team, 2024, table 4).
#
# ## Plan what you cannot try
# Counting and simulating is all that is left when the devices are not there. Take a model of 32 layers and width 4096, devices of 80 GB with a peak of $312 \cdot 10^{12}$
# floating-point operations a second (an A100's data sheet, bf16), links of 25 GB/s, the schedule 1F1B, and half of the peak inside a layer. 64 devices
# can be 64 pipelines of one stage each, or 32 of two, and so on to two of 32: with 32 layers there can be no more stages. The mini-batch stays the same: 256 rows of 2,048 tokens. Which $K$ is the fastest that fits?

# %%
stages_guess = predict("stages of the fastest plan that fits", devices=64, unit="stages", value=None)

# %% tags=["nbval-check-output", "claim:plan"]
from course_utils.planning import LEFT_OUT, Cluster, Model, plan

model = Model(layers=32, d_model=4096, sequence=2048, vocabulary=32_000)


def plans(devices, rows=256):
    """{K: plan}, the rows shared by devices / K pipelines, one row per micro-batch."""
    cluster = Cluster(devices, flops_per_second=312e12, memory_bytes=80e9, latency=10e-6, bandwidth=25e9)
    ways = [K for K in (1, 2, 4, 8, 16, 32) if devices % K == 0 and rows >= devices // K]
    return {K: plan(model, cluster, K, micro_batches=rows // (devices // K)) for K in ways}


print(f"{model.parameters / 1e9:.1f} billion parameters")
for made in (found := plans(64)).values():
    print(made)
fitting = {K: made for K, made in found.items() if made.fits}
fastest = max(fitting, key=lambda K: fitting[K].tokens_per_second)
assert not found[1].fits and 1 < fastest < 32

# %% [markdown]
# One stage does not fit, and many stages wait for each other. In between lies the answer, and it moves with every number that you put in. Now 8, 64 and 1,024 devices, with 4 rows per device:

# %%
stages_guess = stages_guess.settle(measured=fastest)
scaled = {devices: plans(devices, rows=4 * devices) for devices in (8, 64, 1024)}
series = {
    f"{devices} devices": {K: 100 * made.model_flops_utilisation for K, made in ways.items() if made.fits}
    for devices, ways in scaled.items()
}

# %%
from course_utils.charts import describe_lines, draw_lines

axes = ("K, stages of a pipeline", "model FLOPs utilisation, %", "Plans that fit: simulated")
says = f"{describe_lines(series, *axes)} {describe_prediction(stages_guess)}"
show(draw_lines(series, *axes, log_x=True), says=says)

# %% [markdown]
# The three lines nearly meet: adding up the gradients of all replicas in a ring takes almost the same time for 1,024 as for 64, if latency is
# small. Why would nobody believe that for 1,024 devices? Read what it leaves out:

# %% tags=["nbval-check-output", "claim:left-out"]
assert found[8].left_out == LEFT_OUT and len(LEFT_OUT) >= 5
for sentence in LEFT_OUT:
    print("-", sentence)

# %% [markdown]
# A plan ranks choices and finds what cannot work. For anything more, measure a part of it: one layer on one device, one link, two stages.
#
# ## Your calibration
# Over the course you have written down what you expected before you saw it. *Calibration* is how well that agrees with what came:

# %%
from course_utils.charts import describe_calibration, draw_calibration, settled
from course_utils.predictions import read as read_predictions

pairs = settled(read_predictions())
print(describe_calibration(pairs))

# %%
show(draw_calibration(pairs), says=describe_calibration(pairs))

# %% [markdown]
# A point for each prediction that you have made. Above the diagonal you expected more than came. Come back to this cell whenever you have repeated a lesson.
#
# ## Where to go next
# - *1F1B* keeps fewer micro-batches (Narayanan et al., 2021, [arXiv 2006.09503](https://arxiv.org/abs/2006.09503), PipeDream-2BW and PipeDream-Flush);
#   *interleaved* stages divide the bubble by the number of chunks per rank (Megatron-LM, [arXiv 2104.04473](https://arxiv.org/abs/2104.04473)).
# - *Zero bubble* splits the backward and fills the gaps with weights' gradients (Qi et al., 2023, [arXiv 2401.10241](https://arxiv.org/abs/2401.10241)); DualPipe runs two
#   directions at once (DeepSeek-AI, 2024, [arXiv 2412.19437](https://arxiv.org/abs/2412.19437)).
# - Use them: [torch.distributed.pipelining](https://docs.pytorch.org/docs/stable/distributed.pipelining.html) has 1F1B, interleaved and zero-bubble schedules, and a variant of DualPipe, `ScheduleDualPipeV`;
#   [torchtitan](https://github.com/pytorch/torchtitan) shows them beside data and tensor parallelism; [Megatron-LM](https://github.com/NVIDIA/Megatron-LM) and
#   [DeepSpeed](https://github.com/deepspeedai/DeepSpeed) train the large models. On two cores that share one machine none of these schedules is visibly faster than another: do not try to see it here.
# - Take your fingerprint with you. The first run on a new framework is a tiny one, compared with one device.

# %% [markdown] tags=["summary"]
# ## What you know now
# - What a run leaves behind tells its cause: gradient norms, learning rates, an error that names who waits for whom, or a timeline. <!-- shown: evidence -->
# - PyTorch's engine and ours give the same bits for the same step. <!-- shown: same-bits -->
# - Its trace names forwards and backwards, and a mark begins with the receive. <!-- shown: marks -->
# - Marks taken for work hide the bubble. <!-- shown: marks-wait -->
# - `from_profiler` finds the order that our executor has recorded. <!-- shown: reader -->
# - Utilisation is a share of a peak that was measured. <!-- shown: utilisation -->
# - A plan with one stage may not fit, and one with the most stages is not the fastest. <!-- shown: plan -->
# - A plan says what it leaves out. <!-- shown: left-out -->
#
# **Kept for later:** `from_profiler` in `course_utils/timeline.py`; `plan` and `model_flops_utilisation` in `planning.py`; `draw_calibration` in `charts.py`;
# all on one page, the [cheat sheet](cheat_sheet.ipynb).
#
# **Practise:** record a step of your own program with torch.profiler and give it to `from_profiler`. Then change one number of the cluster, the link or the memory, and find the $K$ at which the
# best plan changes.
#
# **Next:** train something of your own. `check_blocks` in `course_utils/check_blocks.py` says what of your blocks a pipeline cannot carry.

# %% [markdown]
# ## Questions
# 1. A run's loss falls as in the healthy run, its fingerprint differs from step 0 on. Where do you look first?
# 2. Why can a trace of a run without marks still tell forwards from backwards?
# 3. Your plan says 45 % utilisation, the run reaches 30 %. Name three of the omissions that could explain it.

# %% [markdown] tags=["answers"]
# ## Answers
# 1. At the norms of each stage in step 0, beside those of one device: the first stage from the loss backwards that differs has the bug at its border.
# 2. Autograd runs every backward itself, and the profiler draws an arrow from each forward operator to its backward.
# 3. A stage that is slower than the others; small products that do not reach the assumed share of the peak; messages that share a link, or cost the device time.
#
# And the five runs:

# %% tags=["answers", "nbval-check-output"]
from course_utils.mystery import CASES, reveal


def diagnose():
    return {letter: case.cause for letter, case in CASES.items()}


check("12.diagnose", diagnose)
for letter in CASES:
    print(reveal(letter))

# %% [markdown]
# ## References
# Chowdhery et al., 2022, *PaLM*, [arXiv 2204.02311](https://arxiv.org/abs/2204.02311), appendix B · Llama Team, 2024, *The Llama 3 Herd of Models*,
# [arXiv 2407.21783](https://arxiv.org/abs/2407.21783) · Rajbhandari et al., 2020, *ZeRO*, [arXiv 1910.02054](https://arxiv.org/abs/1910.02054), section 3.1 · Korthikanti et al.,
# 2022, *Reducing Activation Recomputation*, [arXiv 2205.05198](https://arxiv.org/abs/2205.05198), section 4.1 · PyTorch: [torch.profiler](https://docs.pytorch.org/docs/stable/profiler.html).
