# %% [markdown] tags=["opening"]
# # 06 · The GPipe schedule
#
# **You will be able to** write a schedule down as data, draw it, find out whether it hangs and what it costs before anything runs, and
# write the loop that executes it: on threads, on processes, with the bits of one device.
#
# **You need** lessons [02](02_cut_it.ipynb) (the border between two stages), [03](03_two_processes_that_talk.ipynb) (messages, deadlocks)
# and [05](05_micro_batches.ipynb) (micro-batches). **Minutes:** 40 to read, 1 to run.
#
# **New terms:** [schedule](00_start_here.ipynb#schedule), [action](00_start_here.ipynb#action), [GPipe](00_start_here.ipynb#gpipe),
# [staircase](00_start_here.ipynb#staircase), [makespan](00_start_here.ipynb#makespan), [executor](00_start_here.ipynb#executor).
#
# In [lesson 04](04_naive_model_parallelism.ipynb) one stage always stood still. In lesson 05 the mini-batch came in pieces, still in one
# process. Now both meet: stage 1 begins with the first piece while stage 0 computes the second.

# %% tags=["where"]
from course_utils.course_map import where

where("06")

# %% [markdown]
# ## A schedule is data
# Two questions describe the work of a pipeline: what does each rank do, and in which order? Messages and memory follow from that,
# and with the cost of each action, time. So the answer is kept as a plain list. An *action* is one stage computing one micro-batch, forward (`F`) or backward (`B`).

# %% tags=["nbval-check-output"]
from course_utils.schedules import Action, one_stage_per_rank

rank_0 = [Action("F", 0, 0), Action("B", 0, 0)]  # kind, stage, micro-batch
rank_1 = [Action("F", 1, 0), Action("B", 1, 0)]
smallest = one_stage_per_rank(num_micro_batches=1, rows=[rank_0, rank_1])
print(smallest.to_text())

# %% [markdown]
# One line per rank. `1F0` reads: stage 1, forward, micro-batch 0. What a rank must receive before an action, and send after it, is not
# written down, because it follows:

# %% tags=["nbval-check-output", "claim:messages"]
for action in rank_0:
    print(action, "needs", smallest.received_by(action), "and sends", smallest.sent_by(action))

# %% [markdown] tags=["stub"]
# ## Write it first
# GPipe (Huang et al., 2019) runs the forwards of all micro-batches, then all backwards; every stage takes the micro-batches in ascending
# order. Write the function that makes this schedule for $K$ stages and $M$ micro-batches, with `Action` and `one_stage_per_rank`.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def gpipe(num_stages, num_micro_batches):
    """All forwards, then all backwards, on every stage."""
    ...  # your turn: about four lines


check("06.gpipe", gpipe)

# %% [markdown]
# From here on the package's function is used. Beside it stands *naive*, the order of lesson 04, which finishes a micro-batch on all stages
# before it begins the next.

# %% tags=["nbval-check-output"]
from course_utils.schedules import gpipe, naive

print(naive(2, 3).to_text(), gpipe(2, 3).to_text(), sep="\n\n")

# %% [markdown]
# ## Draw it
# The lists say the order on each rank, not the time. Give every action one slot of time and let each begin as soon as what it waits for is
# done: that is the *staircase*. Look for the moment at which all four stages work.

# %% tags=["nbval-check-output", "claim:staircase"]
from course_utils.simulation import simulate, staircase

print(staircase(gpipe(4, 4)))

# %% [markdown]
# Work enters at the top left and walks down, turns round at the last stage, and walks up again. All four stages work together
# only twice: while `F3` is on stage 0, and while `B3` is on stage 3. A backward takes longer than a forward, often up to twice as
# long; as a timeline:

# %%
from course_utils.plots import describe_timeline, draw_timeline, show

eight = simulate(gpipe(4, 8), forward=1, backward=2)
show(draw_timeline(eight), says=describe_timeline(eight, with_bubble=False))

# %% [markdown]
# The grey corners are idle time: [lesson 07](07_bubble_and_stash.ipynb) counts them.
#
# ## Validate it
# Ranks that follow lists of their own can wait for each other for ever. `validate` finds this before anything runs. Here a backward is missing
# on rank 1; in the second text, two actions of rank 0 are swapped.

# %% tags=["nbval-check-output", "claim:refused"]
from course_utils.schedules import ScheduleError, parse
from course_utils.validity import validate

for text in ("0F0,0F1,0B0,0B1\n1F0,1F1,1B0", "0B0,0F0\n1F0,1B0"):
    try:
        validate(parse(text))
    except ScheduleError as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# The next one has every action once, each forward before its backward. Rank 0 works as in *naive*, rank 1 as in *GPipe*. Can you
# see the circle before you run the cell?

# %% tags=["raises-exception", "nbval-check-output", "claim:cycle"]
mixed = parse("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1")
validate(mixed)

# %% [markdown]
# Read the last line from wait to wait. Rank 0 does not send micro-batch 1 before it has the gradients of micro-batch 0; rank 1 does not make these
# before it has micro-batch 1. Each rank is right on its own, and together they hang. (*Buffered* is the validator's word for: no message waits behind another.)
#
# ## Price it
# `simulate` turns the waits into times, so two schedules can be compared without a run. With two stages and eight micro-batches, how many
# times as fast is GPipe as naive?

# %%
from course_utils.predictions import predict

guess = predict("speed-up of GPipe over naive", K=2, M=8, unit="times", value=None)  # for example 1.5

# %% tags=["nbval-check-output", "claim:price"]
makespans = {f.__name__: simulate(f(2, 8), forward=1, backward=2).makespan for f in (naive, gpipe)}
expected = makespans["naive"] / makespans["gpipe"]
assert makespans == {"naive": 8 * 2 * 3, "gpipe": (8 + 2 - 1) * 3}
print(makespans, f"{expected:.2f} times")

# %% [markdown]
# Naive takes $MK$ forwards and backwards one after another, GPipe $M+K-1$. The *makespan* is the time from the first start to the last
# end. The simulation sends messages in no time, so this is a promise to be tested below.
#
# ## Execute it
# First the model, cut into encoder and decoder, and eight micro-batches. The *plan* knows the shape of every message beforehand, for the
# reason that [lesson 03](03_two_processes_that_talk.ipynb) gave: a receiver needs a buffer that fits.

# %%
from course_utils.number_words import batch
from course_utils.stages import CutModel, by_count
from course_utils.transfer import StepPlan
from course_utils.transformer import TransformerConfig

cut = CutModel(TransformerConfig(), by_count(8, 2))
whole = batch(range(100_000, 1_000_000), seed=0, step=0, size=64)
micro_batches, num_tokens = whole.split(8), whole.num_tokens
plan = StepPlan([m.geometry for m in micro_batches], cut.carry_after, num_stages=2)

# %% [markdown]
# Two helpers. What crosses the border is the tuple (hidden, memory); a place may be empty. `begin_send` waits for nobody, unlike the
# `send` of lesson 03. Keep what it returns: a message whose handle is dropped may be lost.

# %%
import torch


def receive(transport, message, plan):
    """Wait for the tensors of a message."""
    specs = (None, None) if message is None else plan.specs(message)
    buffers = [None if spec is None else torch.empty(spec.shape) for spec in specs]
    for buffer in buffers:
        if buffer is not None:
            transport.wait(transport.irecv(buffer, message.source, message))
    return buffers


def begin_send(transport, message, tensors):
    """Begin to send; return what must be waited for."""
    there = [t.contiguous() for t in tensors if t is not None and message is not None]
    return [transport.isend(tensor, message.destination, message) for tensor in there]


# %% [markdown]
# A forward and a backward are those of [lesson 02](02_cut_it.ipynb), for one stage. Look for the two things that a forward leaves for its
# backward.

# %%
from course_utils.pipeline import sum_over_tokens


def forward_action(stage, arrived, micro_batch, num_tokens):
    """What the stage received, as leaves of its own graph, and what it makes of them; the last stage makes the loss."""
    leaves = tuple(None if t is None else t.requires_grad_() for t in arrived)
    carry = stage(leaves, micro_batch)
    return leaves, (sum_over_tokens(carry[0], micro_batch, num_tokens),) if stage.is_last else carry


def backward_action(stage, leaves, carry, arrived):
    """The gradients of all that was handed on enter together; the gradients of the leaves come out."""
    gradients = [torch.tensor(1.0)] if stage.is_last else arrived
    pairs = [(t, g) for t, g in zip(carry, gradients, strict=True) if g is not None]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    return [None if leaf is None else leaf.grad for leaf in leaves]


# %% [markdown]
# And this is the *executor*. It takes in, computes, hands on; `stash` holds what a forward leaves. Nowhere does it say "GPipe".


# %%
def run_rank(transport, schedule, stage, micro_batches, plan, num_tokens, send=begin_send):
    stash, sending, losses = {}, [], {}
    for action in schedule.actions[transport.rank]:
        m = action.micro_batch
        arrived = receive(transport, schedule.received_by(action), plan)
        if action.kind == "F":
            stash[m] = forward_action(stage, arrived, micro_batches[m], num_tokens)
            result = [None if t is None else t.detach() for t in stash[m][1]]  # numbers without their graph
            if stage.is_last:
                losses[m] = result[0]
        else:
            result = backward_action(stage, *stash.pop(m), arrived)
        sending += send(transport, schedule.sent_by(action), result)
    for operation in sending:
        transport.wait(operation)
    return losses


# %% [markdown]
# Another schedule is another list, not another loop. One step with it, and what the step
# adds to the fingerprint:

# %%
from course_utils.fingerprints import fingerprint, step_summary
from course_utils.threads import Deadlock, run_in_threads


def one_step(worker, schedule, send=begin_send):
    stage = cut.build(worker.rank, seed=0)
    losses = run_rank(worker.transport, schedule, stage, micro_batches, plan, num_tokens, send)
    return step_summary(losses, stage.named_parameters_globally())


in_threads = {f.__name__: fingerprint(run_in_threads(one_step, 2, f(2, 8))) for f in (naive, gpipe)}
in_threads

# %% [markdown]
# Before comparing, the schedule that was refused. Our executor does not validate, but threads that can never go on are noticed at once. Does the run say what the validator said?

# %%
import re


def run_to_the_end(schedule, send=begin_send):
    """In threads; a deadlock is told without the seconds of each wait, which differ from run to run."""
    try:
        return fingerprint(run_in_threads(one_step, 2, schedule, send))
    except Deadlock as error:
        raise Deadlock(re.sub(r" \(for [0-9.]+ s\)", "", str(error))) from None


# %% tags=["raises-exception", "nbval-check-output", "claim:deadlock"]
run_to_the_end(mixed)

# %% [markdown]
# The same circle, now from the waits of a run. On real processes this is a silent hang until a time-out; so schedules
# are validated first.
#
# ## The same bits
# The plain loop of [lesson 05](05_micro_batches.ipynb) on one device, and the package's executor, `Pipeline`, for comparison.

# %%
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.stages import one_thread


def one_device():
    model, losses = CutModel(cut.config, by_count(8, 1)).build(0, seed=0), {}
    for m, micro_batch in enumerate(micro_batches):
        loss = sum_over_tokens(model((None, None), micro_batch)[0], micro_batch, num_tokens)
        loss.backward()
        losses[m] = loss.detach()
    return [step_summary(losses, model.named_parameters_globally())]


def package_step(worker, schedule):
    stage = cut.build(worker.rank, seed=0)
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after)
    losses = pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens)
    return step_summary(losses, stage.named_parameters_globally())


# %% tags=["fingerprint", "claim:same-bits"]
with one_thread():
    strings = {"one device": fingerprint(one_device())}
for name, schedule in {"naive": naive(2, 8), "gpipe": gpipe(2, 8)}.items():
    strings[f"{name}, our loop, two threads"] = in_threads[name]
    strings[f"{name}, our loop, two processes"] = fingerprint(launch(one_step, 2, schedule))
    strings[f"{name}, the package, two processes"] = fingerprint(launch(package_step, 2, schedule))
for name, string in strings.items():
    print(string, name)
assert len(set(strings.values())) == 1

# %% [markdown]
# One string. The reason is short: each stage adds up the gradients of micro-batch 0, 1, 2, ... and in no other order.
#
# ## What the package adds
# This is the loop in `course_utils/pipeline.py`. Look for what is yours: take in, compute, hand on.

# %%
import inspect
from textwrap import dedent

step = inspect.getsource(Pipeline.step)
print(dedent(re.search(r"^ +for number, action.*?hand_on[^\n]+", step, re.DOTALL | re.MULTILINE)[0]))

# %% [markdown]
# What it has besides, and where it is kept:
# - **Receives are posted early** (`exchange.begin_action`): over gloo a message moves only once its receive is there.
# - **The plan is compared** between ranks before data moves, and **tensors are checked** against it (`transfer.py`).
# - **An outbox** keeps sends only until the peer must have used them.
# - **Recording** (`note`): what follows next.
# - **Autocast** for low precision, and the input as a view of the leaf because of it: [lesson 08](08_mixed_precision.ipynb).
# - **Recomputation** (`R`), dropout keys, several stages per rank: [lesson 07](07_bubble_and_stash.ipynb) uses the first two.
#
# ## The staircase of a real run
# Two processes run GPipe a few times, and the last step is recorded. Below it, the simulation gets the mean times of these
# stages. What will the measured picture have that the simulated one has not?

# %%
from course_utils.breakdown import predict as simulate_like
from course_utils.timeline import Timeline, merge
from course_utils.transfer import agree


def recorded(worker, schedule, steps=4):
    pipeline = Pipeline({worker.rank: cut.build(worker.rank, seed=0)}, schedule, worker.transport, cut.carry_after)
    for _ in range(steps):
        agree(worker.transport, plan := pipeline.plan(micro_batches))
        pipeline.timeline = Timeline(worker.world_size, "measured", "seconds")
        pipeline.step(micro_batches, plan, num_tokens)
    return pipeline.timeline


measured = merge(launch(recorded, 2, gpipe(2, 8)))
simulated = simulate_like(measured, gpipe(2, 8))

# %%
from course_utils.plots import draw_timelines

both = " ".join(describe_timeline(step, with_bubble=False) for step in (measured, simulated))
show(draw_timelines([measured, simulated]), says=both)

# %% [markdown]
# The measured step has waits, actions that take longer one time than another, and sends. Nobody waits for the peer in a *send* bar: there a tensor is
# checked, copied and posted. The order is that of the list:

# %% tags=["claim:order"]
for rank, row in enumerate(gpipe(2, 8).actions):
    ran = [f"{i.stage}{i.kind}{i.micro_batch}" for i in measured if i.rank == rank and i.kind in "FB"]
    assert ran == [str(action) for action in row]
print("both ranks ran their row of the schedule, in order")

# %% [markdown]
# Four stages need four devices. `emulate` runs the real executor and real messages on four processes, with stages that
# sleep instead of computing (5 ms and 10 ms here); the picture says so.

# %%
from course_utils.emulation import emulate

four = emulate(gpipe(4, 4), forward=0.005, backward=0.010)
pair = [four, simulate_like(four, gpipe(4, 4))]

# %%
show(draw_timelines(pair), says=" ".join(describe_timeline(step, with_bubble=False) for step in pair))

# %% [markdown]
# ## Sends that wait
# In this lesson's loop a send returned at once. What if it returns only when the receiver takes the message, as in lesson 03? And was the
# price right? One launch times three ways in turns, with our own loop.

# %%
import time
from statistics import median


def send_and_wait(transport, message, tensors):
    for operation in begin_send(transport, message, tensors):
        transport.wait(operation)
    return []


def time_them(worker, ways, repetitions=7):
    stage, seconds = cut.build(worker.rank, seed=0), {name: [] for name in ways}
    for _ in range(repetitions):
        for name, (schedule, send) in ways.items():
            agree(worker.transport, plan)
            started = time.perf_counter()
            run_rank(worker.transport, schedule, stage, micro_batches, plan, num_tokens, send)
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in seconds.items()}


# %%
ways = {
    "naive": (naive(2, 8), begin_send),
    "GPipe": (gpipe(2, 8), begin_send),
    "blocking": (gpipe(2, 8), send_and_wait),
}
seconds = launch(time_them, 2, ways)[0]  # rank 0 begins and ends the step
speed_up, blocking = seconds["naive"] / seconds["GPipe"], seconds["blocking"] / seconds["GPipe"]
guess.settle(measured=speed_up, formula=expected)
print(f"GPipe is {speed_up:.2f} times as fast as naive here{': your cores were not free' * (speed_up < 1)}")
verdict = "about the same" if 0.9 < blocking < 1.1 else "slower" if blocking > 1 else "faster"
print(f"GPipe with blocking sends takes {blocking:.2f} times as long as with asynchronous ones here: {verdict}")

# %%
from course_utils.charts import describe_prediction, draw_prediction

show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# The formula needs equal stages, free messages and an idle core for each stage; what is missing of these is missing from the measured bar.
# If blocking sends cost GPipe little here, it is because who waits has the time: after its forwards rank 0 waits for `B0` in any case.
#
# ## Mistakes made on purpose
# **Both send first.** In GPipe all messages go down, then all go up. 1F1B, which [lesson 07](07_bubble_and_stash.ipynb)
# introduces, mixes both directions, and with blocking sends ([pytorch#172668](https://github.com/pytorch/pytorch/issues/172668) is a thread about it):

# %% tags=["mistake", "raises-exception", "nbval-check-output", "claim:blocking"]
from course_utils.schedules import one_f_one_b

run_to_the_end(one_f_one_b(2, 8), send_and_wait)

# %% [markdown]
# The schedule is valid; the sends are not what it was validated for. With sends that return at once it runs, and its string is that of one device:

# %% tags=["claim:mended"]
mended = run_to_the_end(one_f_one_b(2, 8), begin_send)
print(f"{mended} 1F1B\n{strings['one device']} one device")
assert mended == strings["one device"]

# %% [markdown]
# **One rank counts differently.** All ranks must hold the same list. The smallest hang if they do not: two stages, one micro-batch, and rank 0
# counts on two.

# %% tags=["mistake", "raises-exception", "nbval-check-output", "claim:miscounted"]
run_to_the_end(parse("0F0,0F1,0B0,0B1\n1F0,1B0"))

# %% [markdown]
# No circle this time: rank 1 is done, and rank 0 waits for it. GPipe itself has no trouble with $M < K$, if the lists agree:

# %% tags=["nbval-check-output", "claim:few"]
print(staircase(validate(gpipe(4, 2))))

# %% [markdown]
# **Backwards in descending order.** It seems natural to undo last what came first, and a stack does so. Two functions that measure how far
# off the gradients of the decoder are:


# %%
def decoder_gradient(worker, schedule, micro_batches, plan):
    stage = cut.build(worker.rank, seed=0)
    run_rank(worker.transport, schedule, stage, micro_batches, plan, num_tokens)
    return torch.cat([p.grad.flatten() for p in stage.parameters()])


def off(schedule, right, *work):
    """The distance between the gradients that two schedules give, relative to the norm of the second."""
    came, expected = (run_in_threads(decoder_gradient, 2, s, *work)[1] for s in (schedule, right))
    return ((came - expected).norm() / expected.norm()).item()


# %% tags=["mistake", "claim:descending"]
rows = [[Action("F", k, m) for m in range(8)] + [Action("B", k, m) for m in reversed(range(8))] for k in range(2)]
descending = one_stage_per_rank(8, rows)
other_bits = run_to_the_end(descending)
print(f"{other_bits} descending\n{strings['one device']} one device")
distance = off(descending, gpipe(2, 8), micro_batches, plan)
print(f"the gradients differ by {distance:.0e} of their norm")
assert other_bits != strings["one device"] and distance < 1e-5

# %% [markdown]
# Only the last bits differ: sums of floating-point numbers depend on their order. But then no comparison with one device is exact, and a
# true mistake of the same size would pass. So the validator refuses the order, and that is the mend:

# %% tags=["raises-exception", "nbval-check-output", "claim:ascending"]
validate(descending)

# %% [markdown]
# **Received in another order than sent.** Our messages carry no tag: sends and receives are paired in order. Here rank 1
# takes micro-batch 1 first. All micro-batches have one shape, so no check of shapes can help.

# %% tags=["mistake", "claim:swapped"]
pieces = whole.split(2, trim=False)
assert pieces[0].geometry == pieces[1].geometry
pieces_plan = StepPlan([m.geometry for m in pieces], cut.carry_after, num_stages=2)
swapped = parse("0F0,0F1,0B0,0B1\n1F1,1F0,1B0,1B1")
distance = off(swapped, gpipe(2, 2), pieces, pieces_plan)
print(f"no error, and the gradients differ by {distance:.0%} of their norm")
assert distance > 0.01

# %% [markdown]
# Stage 1 took the activations of micro-batch 0 for those of micro-batch 1, and compared them with the words of other numbers. This is no rounding.
#
# The package posts receives in the *sender's* order, whatever the receiver needs first, and the validator refuses this schedule too:

# %% tags=["nbval-check-output", "claim:swapped-refused"]
try:
    validate(swapped)
except ScheduleError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown] tags=["summary"]
# ## What you know now
# - Every message of a step follows from the lists of actions. <!-- shown: messages -->
# - A staircase shows when each action can run at the earliest. <!-- shown: staircase -->
# - A schedule that cannot run is refused before it runs, with the reason. <!-- shown: refused -->
# - Two ranks that are each right can wait in a circle, and the validator names it. <!-- shown: cycle -->
# - A run of that schedule ends in the same circle. <!-- shown: deadlock -->
# - With equal stages and free messages GPipe takes $M+K-1$ forwards and backwards, naive $MK$. <!-- shown: price -->
# - One loop runs any schedule, with the bits of one device, and so does the package. <!-- shown: same-bits -->
# - A real run keeps the order of the list on each rank. <!-- shown: order -->
# - With sends that wait, 1F1B deadlocks. <!-- shown: blocking -->
# - With sends that return at once it runs, and its bits are the same again. <!-- shown: mended -->
# - A rank that counts other micro-batches waits for ever. <!-- shown: miscounted -->
# - GPipe runs with $M < K$. <!-- shown: few -->
# - Backwards in descending order change the last bits, and no more. <!-- shown: descending -->
# - They are refused, so that every comparison can be exact. <!-- shown: ascending -->
# - Messages taken in another order are swapped without an error, and the gradients are far off. <!-- shown: swapped -->
# - Such a schedule is refused as well. <!-- shown: swapped-refused -->
#
# **Kept for later:** `Action`, `Schedule`, `naive`, `gpipe`, `parse` in `course_utils/schedules.py`; `validate` in `validity.py`;
# `simulate`, `staircase` in `simulation.py`; `Pipeline` in `pipeline.py`; `emulate` in `emulation.py`.
#
# **Practise:** write a schedule for `parse` with $K=3$, $M=4$ in which stage 2 runs each backward right after its forward. Draw its staircase.
# Then let stage 0 do the same: what does `validate` say?
# Exercises: [unit 06](../exercises/06_the_gpipe_schedule/06_the_gpipe_schedule.ipynb).
#
# **Next:** [07 · The bubble and the stash](07_bubble_and_stash.ipynb).

# %% [markdown]
# ## Questions
# 1. Why does a schedule not list sends and receives?
# 2. What must all ranks have in common for the executor to work?
# 3. Why did `mixed` hang although every forward comes before its backward?
# 4. Naive has the same number of messages as GPipe. Why is it slower?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. They follow: a forward needs the activations of the stage before, a backward the gradients of the stage after. What is
#    written twice can contradict itself.
# 2. The same schedule and the same plan: each rank derives from them what its neighbours send, and in which order.
# 3. Ranks wait for each other's actions as well. The order on one rank and the needs between ranks form one graph, and it had a circle.
# 4. In naive every action waits for the one before it, on whichever rank. In GPipe stage 1 computes micro-batch 0 while stage 0 computes
#    micro-batch 1.
#
# The function that you were asked to write:

# %% tags=["answers", "nbval-check-output"]
from course_utils.schedules import check_sizes


def gpipe(num_stages, num_micro_batches):
    """All forwards, then all backwards, on every stage."""
    check_sizes(num_stages, num_micro_batches)
    return one_stage_per_rank(
        num_micro_batches,
        [[Action(kind, k, m) for kind in "FB" for m in range(num_micro_batches)] for k in range(num_stages)],
    )


check("06.gpipe", gpipe)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), sections 2.2 and 2.3 · Narayanan et al., 2021, *Megatron-LM*,
# [arXiv 2104.04473](https://arxiv.org/abs/2104.04473), section 2.2 · PyTorch:
# [torch.distributed.pipelining](https://docs.pytorch.org/docs/stable/distributed.pipelining.html),
# [point-to-point communication](https://docs.pytorch.org/docs/stable/distributed.html#point-to-point-communication) ·
# [pytorch#144702](https://github.com/pytorch/pytorch/pull/144702): why PyTorch's `Schedule1F1B` refuses $M < K$, a
# guard against a hang of its own.
