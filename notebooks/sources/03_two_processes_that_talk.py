# %% [markdown] tags=["opening"]
# # 03 · Two processes that talk
#
# **You will be able to** start two processes from a cell and let them send tensors, say beforehand what a message
# costs, cause a deadlock, read who waits for whom, mend it, and ask the five questions that settle a hang.
#
# **You need** [lesson 02](02_cut_it.ipynb). **Minutes:** 25 to read, 1 to run.
#
# **New terms:** [rank](00_start_here.ipynb#rank), [world size](00_start_here.ipynb#world-size),
# [latency](00_start_here.ipynb#latency), [deadlock](00_start_here.ipynb#deadlock), [wait-for
# graph](00_start_here.ipynb#wait-for-graph), [collective](00_start_here.ipynb#collective).
#
# Lesson 02 cut the model in all possible ways and handed tensors over every border by hand, within one process. Now
# the two sides of a border become two processes. They share no memory, so what crosses must be sent and received.

# %% tags=["where"]
from course_utils.course_map import where

where("03")

# %% [markdown]
# ## Two processes, one function
# `launch` starts fresh processes and runs the *same* function on each. A process knows which one it is by its *rank*,
# a number from 0; how many there are is the *world size*. Both are in the first argument, `worker`, with all else that
# a rank has of a run. What differs between the two results, and what does not?

# %% tags=["nbval-check-output", "claim:ranks"]
import os

import torch.distributed as dist

from course_utils.processes import launch


def hello(worker):
    return worker.rank, worker.world_size, dist.get_backend(), os.getpid()


results = launch(hello, 2)
for rank, world_size, backend, _ in results:
    print(f"rank {rank} of {world_size}, messages over {backend}")
assert len({process for *_, process in results} | {os.getpid()}) == 3

# %% [markdown]
# With this notebook there are three processes. The function was defined in a cell, travelled there as bytes, and its
# results came back. *gloo* is the library below `torch.distributed` that carries messages between CPUs; what this lesson says of
# messages is said of gloo.
#
# ## How they find each other
# New processes know nothing of each other. They need one place that all know, to leave their addresses in. It may be a
# server, but a file will do: `FileStore` is a dictionary in a file, and `launch` makes one for each run.

# %% tags=["nbval-check-output"]
import tempfile

folder = tempfile.TemporaryDirectory()
of_rank_0, of_rank_1 = (dist.FileStore(f"{folder.name}/store", 2) for _ in range(2))
of_rank_0.set("address of rank 0", "here I am")
print(of_rank_1.get("address of rank 0").decode())
folder.cleanup()

# %% [markdown]
# A server would have to *listen* on a port, and a port is open to others too: torch's `TCPStore` listens on all
# interfaces of the machine ([pytorch#173909](https://github.com/pytorch/pytorch/issues/173909)). With a file nothing
# has to. To connect two ranks gloo itself must listen for a moment, on 127.0.0.1. Does a rank still listen when your
# function begins?

# %% tags=["claim:listens"]
import sys

import psutil


def listening_ports(worker):
    connections = psutil.Process().net_connections(kind="inet")
    return sum(connection.status == psutil.CONN_LISTEN for connection in connections)


ports = launch(listening_ports, 2)
print("ports on which rank 0 and rank 1 listen:", *ports)
assert ports == [0, 0] or sys.platform != "linux"

# %% [markdown]
# On Linux nothing listens any more: once all are connected `launch` closes those sockets. On other systems they stay
# open, on 127.0.0.1 only, as long as the run lives.
#
# ## One message
# A transport begins a message with `isend(tensor, peer, label)` or `irecv(buffer, peer, label)`. What they return goes
# to `wait`, which waits until the message is through and returns nothing. The receiver brings the buffer: it must know
# shape and type beforehand. The label goes nowhere; it explains a wait to whoever asks.


# %%
def send(worker, tensor, peer, label):
    worker.transport.wait(worker.transport.isend(tensor, peer, label))


def receive(worker, buffer, peer, label):
    worker.transport.wait(worker.transport.irecv(buffer, peer, label))
    return buffer


# %% [markdown]
# Rank 0 sends a single number, four bytes. Rank 1 first does something else for half a second. Four bytes surely fit
# into some buffer on the way. **Predict:** after how many seconds does rank 0's `send` return? A second run sends a
# million numbers.

# %%
from course_utils.predictions import predict

guess = predict("a send to one that is not ready", unit="s", bytes=4, not_ready_for=0.5, value=None)

# %%
import time

import torch


def send_to_a_busy_one(worker, count):
    dist.barrier()  # both begin together
    began = time.perf_counter()
    if worker.rank == 0:
        send(worker, torch.ones(count), 1, "numbers")
    else:
        time.sleep(0.5)
        receive(worker, torch.empty(count), 0, "numbers")
    return time.perf_counter() - began


# %% tags=["claim:rendezvous"]
seconds = {4 * count: launch(send_to_a_busy_one, 2, count)[0] for count in (1, 1_000_000)}
assert min(seconds.values()) > 0.2
guess.settle(measured=seconds[4], formula=0.5)
for size, took in seconds.items():
    print(f"{size:>9,} bytes: rank 0 could go on after {took:.2f} s")

# %%
from course_utils.charts import describe_prediction, draw_prediction
from course_utils.plots import show

show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# A gloo send is a *rendezvous*: it is over when the other side has begun to receive, for four bytes as for four
# million. Other libraries may keep small messages in a buffer, and then a program runs until its messages grow. An NCCL
# send, between GPUs, returns to Python at once; there the GPU's stream waits.

# %% [markdown] tags=["stub"]
# ## Write it first
# Both ranks hold a tensor and want the other's. Write the function that both call at the same time; it returns what
# the peer had. You have `worker.transport` with `isend(tensor, peer, label)`, `irecv(buffer, peer, label)` and `wait`,
# which takes one of what those two return and returns nothing.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def exchange(worker, mine, peer):
    """Give the peer `mine` and return the peer's tensor, of the same shape and dtype. Both ranks call this at once."""
    ...  # your turn: about five lines


check("03.exchange", exchange)

# %% [markdown]
# ## A mistake made on purpose
# This is what one writes first: send mine, then receive yours. A user who tried a patch to PyTorch's pipeline
# suspected it on two machines ([pytorch#172668](https://github.com/pytorch/pytorch/issues/172668)): both ranks wait
# until their send is over, so neither receives. Here the ranks are first two *threads* of this process. So the program
# knows every message, and knows at once when nobody can go on.

# %% tags=["mistake", "raises-exception", "nbval-check-output"]
from course_utils.threads import run_in_threads


def both_send_first(worker):
    mine, peer = torch.full((2, 3), float(worker.rank)), 1 - worker.rank
    send(worker, mine, peer, "its tensor")
    return receive(worker, torch.empty(2, 3), peer, "its tensor")


run_in_threads(both_send_first, 2)

# %% [markdown]
# The last line is the *wait-for graph* in words: an arrow from each rank that waits to the one it waits for. Rank 0
# waits for 1 and 1 for 0: a circle. That is a *deadlock*, and no patience ends it. (The sentences say
# *stage* for a rank: in a pipeline stage $k$ is on rank $k$.)
#
# Two real processes raise nothing. They just stand there. So `start`, which returns at once, instead of `launch`: a
# stuck run can be asked for its `status()`. That has the `states` of the ranks and a `verdict`, what holds them up.


# %%
def when(run, kind, limit=20):
    """Ask a run until it is in a certain state; return the answer."""
    give_up = time.monotonic() + limit
    while run.status().verdict.kind != kind and time.monotonic() < give_up:
        time.sleep(0.05)
    time.sleep(0.3)
    return run.status()


# %% tags=["nbval-check-output", "claim:deadlock"]
from course_utils.processes import start

with start(both_send_first, 2, wait_limit=30) as run:  # the end of the block stops it
    status = when(run, "deadlock")
print(status.verdict)
assert (status.verdict.kind, status.verdict.ranks) == ("deadlock", (0, 1))

# %% [markdown]
# The same sentence, now of two processes: each notes in a small file what it waits for, and the notebook reads both. To
# mend it, one rank could receive first: that is a rule which both must know. Or nobody is first: begin both messages,
# then wait for both.

# %%
from inspect import getsource

from course_utils.links import exchange

print(getsource(exchange).split('"""')[-1].strip("\n"))  # without its docstring


# %% tags=["nbval-check-output", "claim:mended"]
def swap(worker):
    return exchange(worker, torch.full((2, 3), float(worker.rank)), 1 - worker.rank)


for rank, tensor in enumerate(launch(swap, 2)):
    print(f"rank {rank} got {tensor.tolist()}")

# %% [markdown]
# ## What a message costs
# A message takes a *latency*, however small it is, and then so many seconds per byte: latency + bytes / bandwidth
# (Hockney, 1994). To measure it play ping-pong: there and back again, half of that, for many sizes. Only one clock is
# read.

# %%
import statistics


def ping_pong(worker, sizes, repetitions=50):
    balls = {size: torch.zeros(size, dtype=torch.uint8) for size in sizes}
    trips = []
    for _ in range(repetitions):
        for size, ball in balls.items():
            began = time.perf_counter()
            for server in (0, 1):
                hit = send if worker.rank == server else receive
                hit(worker, ball, 1 - worker.rank, "the ball")
            trips.append((size, (time.perf_counter() - began) / 2))
    return {size: statistics.median(seconds for other, seconds in trips if other == size) for size in sizes}


# %% [markdown]
# The line is fitted to the *relative* errors, so everything is divided by what was measured. Otherwise the largest
# messages would count for nearly all. A `Link` is the pair of latency and bandwidth; `seconds(bytes, num_messages)` is
# its line.

# %%
import numpy as np

from course_utils.links import Link


def fit_link(seconds):
    if len(seconds) < 2:
        raise ValueError(f"{len(seconds)} size was measured; a straight line needs at least 2")
    sizes, times = np.array(list(seconds)), np.array(list(seconds.values()))
    columns = np.stack([1 / times, sizes / times], axis=1)
    latency, per_byte = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    if per_byte <= 0:
        raise ValueError("the times do not grow with the size; measure larger messages, or more often")
    return Link(float(latency), float(1 / per_byte))


# %%
sizes = [4 * 10**n for n in range(7)]  # 4 bytes to 4 million
measured = launch(ping_pong, 2, sizes)[0]
link = fit_link(measured)
print(f"latency {link.latency * 1e6:.0f} µs, bandwidth {link.bandwidth / 1e9:.2f} GB/s")
print(f"a message of {link.latency * link.bandwidth:,.0f} bytes costs twice the latency")

# %%
from course_utils.charts import describe_lines, draw_lines

by_size = {
    "measured": {size: measured[size] * 1e6 for size in sizes},
    "latency + bytes/bandwidth": {size: link.seconds(size) * 1e6 for size in sizes},
}
labels = {"x": "bytes", "y": "µs one way", "title": "One message between two processes of this machine"}

# %%
show(draw_lines(by_size, **labels, log_x=True, log_y=True), says=describe_lines(by_size, **labels))

# %% [markdown]
# The dashed line is flat on the left, where the latency is all there is, and rises on the right, where bytes count. By
# this line two small messages, one after the other, cost two latencies. Does that hold for two that begin at once?
#
# ## Predict lesson 02's border
# Cut after block 4, the hidden state and the memory cross, two tensors for each micro-batch. Model and micro-batch
# are those of lesson 02. How large the two are is known before anything runs: from a micro-batch's `geometry`, its rows
# and lengths, `carry_after` gives the `specs`, shape and type of each tensor that a stage hands on.

# %% tags=["nbval-check-output", "claim:bytes"]
from course_utils.number_words import batch
from course_utils.stages import CutModel, by_count
from course_utils.transformer import TransformerConfig
from course_utils.transports import describe

cut = CutModel(TransformerConfig(d_model=64), (range(0, 5), range(5, 8)))
micro_batch = batch(range(100_000, 1_000_000), seed=0, step=0, size=16)
specs = cut.carry_after(0, micro_batch.geometry)
border = sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs)
print(" and ".join(map(describe, specs)), "make", border, "bytes")  # describe: a spec in words

# %%
guess = predict("the border, one way", unit="µs", bytes=border, messages=len(specs), value=None)

# %% [markdown]
# The function sends what a stage hands on, each tensor as a message of its own; `send_carry` begins all of them
# before it waits.

# %%
from course_utils.links import receive_carry, send_carry


def cross_the_border(worker, specs, repetitions=50):
    carry = [torch.zeros(spec.shape) for spec in specs]
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        if worker.rank == 0:
            send_carry(worker, carry, 1, "the carry")
        receive_carry(worker, specs, 1 - worker.rank, "the carry")
        if worker.rank == 1:
            send_carry(worker, carry, 0, "the carry")
        seconds.append((time.perf_counter() - began) / 2)
    return statistics.median(seconds)


# %%
came = launch(cross_the_border, 2, specs)[0] * 1e6
formula = link.seconds(border, num_messages=len(specs)) * 1e6
guess.settle(measured=came, formula=formula)
which = "other work took its part" if came > formula else "the two messages overlapped"
print(f"predicted {formula:.0f} µs, measured {came:.0f} µs, {came / formula:.1f} times the prediction: {which}")

# %%
show(draw_prediction(guess), says=describe_prediction(guess))

# %% [markdown]
# The formula lets the two messages go one after the other. If the measurement is lower, they overlapped. If it is
# higher, making tensors and other work on this machine, of which the formula knows nothing, took more than that saved.
# It gives the order of magnitude, to compare with what a stage computes meanwhile:
# [lesson 04](04_naive_model_parallelism.ipynb) has both on one picture.
#
# ## The border of lesson 02, over two processes
# Now with a model on either side. Each rank builds only its own stage. Activations cross, each received as a leaf, as
# in lesson 02; then gradients cross back. (The code is for borders where both cross.) Will the bits survive?

# %%
from course_utils.fingerprints import fingerprint, step_summary
from course_utils.pipeline import sum_over_tokens


def one_micro_batch(worker, cut, micro_batch):
    stage, specs = cut.build(worker.rank, seed=0), cut.carry_after(0, micro_batch.geometry)
    losses = {}
    if worker.rank == 0:
        carry = stage((None, None), micro_batch)
        send_carry(worker, carry, 1, "the activations")
        gradients = receive_carry(worker, specs, 1, "the gradients")
        torch.autograd.backward(carry, gradients)
    else:
        leaves = [tensor.requires_grad_() for tensor in receive_carry(worker, specs, 0, "the activations")]
        logits, _ = stage(leaves, micro_batch)
        losses[0] = sum_over_tokens(logits, micro_batch, micro_batch.num_tokens)
        losses[0].backward()
        send_carry(worker, [leaf.grad for leaf in leaves], 0, "the gradients")
    return step_summary(losses, stage.named_parameters_globally())


# %%
from course_utils.stages import one_thread

model = CutModel(cut.config, by_count(8, 1)).build(0, seed=0)
with one_thread():  # as each of the processes computes
    logits, _ = model((None, None), micro_batch)
    loss = sum_over_tokens(logits, micro_batch, micro_batch.num_tokens)
    loss.backward()
one_device = fingerprint([step_summary({0: loss}, model.named_parameters_globally())])

# %% tags=["fingerprint", "claim:same-bits"]
two_processes = fingerprint(launch(one_micro_batch, 2, cut, micro_batch))
print("one device:   ", one_device)
print("two processes:", two_processes)
assert two_processes == one_device

# %% [markdown]
# To the last bit. A message is a copy of bytes, and a copy rounds nothing.
#
# ## A message of the wrong shape
# That is also its danger: bytes do not say what they are. Rank 0 sends a tensor of 2x3, rank 1 has a buffer of 3x3,
# filled with -1 so that you see what was written. Which error will rank 1 raise?


# %% tags=["nbval-check-output", "claim:prefix"]
def wrong_shape(worker):
    if worker.rank == 0:
        return send(worker, torch.arange(6.0).reshape(2, 3), 1, "two rows")
    return receive(worker, torch.full((3, 3), -1.0), 0, "three rows").tolist()


print(launch(wrong_shape, 2)[1])

# %% [markdown]
# None. gloo fills the beginning of the buffer, and what stood behind it stays: if the last micro-batch has fewer rows
# than expected, a stage trains on leftovers. (A buffer that is too *small* ends the receiving process.) Afterwards it is
# too late to notice, so compare before. All ranks compute the same *plan* of a step, with
# the shape of every message, and exchange a short hash of it before the first tensor moves. Here rank 1 believes in
# one more row:

# %%
from course_utils.transfer import PlanMismatch, StepPlan, agree


def agree_about_rows(worker, cut, geometry):
    rows, source_length, target_length = geometry
    mine = (rows + worker.rank, source_length, target_length)
    try:
        agree(worker.transport, StepPlan([mine], cut.carry_after, num_stages=2))
    except PlanMismatch as error:
        return str(error)


# %% tags=["nbval-check-output", "claim:plan"]
raised = launch(agree_about_rows, 2, cut, micro_batch.geometry)
print("rank 0 raised:", raised[0])
print("rank 1 raised:", "the same" if raised[1] == raised[0] else raised[1])

# %% [markdown]
# Every rank raises the error, and no data has moved. The executor of [lesson 06](06_the_gpipe_schedule.ipynb) works with
# such plans only.
#
# ## A collective that only some ranks call
# In a *collective* all ranks take part: a barrier, a sum over all. If one rank skips it, the others wait: no circle
# this time, but a wait without end all the same. Every wait must therefore have a limit: `launch` sets `wait_limit=60`
# seconds, here it is one. Look at what torch's own error tells you.


# %%
def only_rank_0(worker):
    if worker.rank == 0:
        dist.barrier()


# %% tags=["claim:bounded"]
from course_utils.processes import StageError

try:
    launch(only_rank_0, 2, wait_limit=1)
except StageError as error:
    torch_says = error
print(str(torch_says).splitlines()[0])
assert torch_says.kind == "timeout"

# %% [markdown]
# It gave up in time, but cannot say for whom it waited. A collective over our transport can. `Gathering` sends one tensor
# of bytes from every rank to every other:

# %% tags=["nbval-check-output", "claim:named"]
from course_utils.transfer import Gathering


def share_norms(worker):
    if worker.rank == 0:
        Gathering(worker.transport, 4, "the gradient norms").share(torch.zeros(4, dtype=torch.uint8))


try:
    launch(share_norms, 2, wait_limit=1)
except StageError as error:
    we_say = error
print(str(we_say).splitlines()[0])
assert (we_say.kind, we_say.rank) == ("timeout", 1)

# %% [markdown]
# The run knew that stage 1 had ended, and waited the second all the same: such a wait ends at its limit. `status()`
# tells before, and `run_in_threads` ends at once.
#
# ## Five questions for a hang
# Who waits? For what? From whom? What did that one do last? Since when? Whatever tool you use later, ask it these. A
# run answers them while it goes on. Here rank 1 is merely slow:


# %%
def slow(worker):
    if worker.rank == 0:
        receive(worker, torch.empty(3), 1, "the gradients of micro-batch 5")
    worker.transport.computing("B of micro-batch 5")  # what it does from now on
    time.sleep(60)


# %% tags=["nbval-check-output", "claim:questions"]
with start(slow, 2) as run:
    status = when(run, "slow")
wait = status.states[0].wait
print("who waits?                  rank", wait.rank)
print("for what?                  ", wait.what)
print("from whom?                  rank", wait.peer)
print("what did that one do last? ", status.states[wait.peer].text)
print("since when?                ", f"{wait.seconds:.1f} s ago")
print(status.verdict)

# %% [markdown]
# No circle: the arrow ends at a rank that computes, so this is no deadlock. The verdict names that rank. The other one is
# healthy, although it stands still.

# %% [markdown] tags=["summary"]
# ## What you know now
# - Every rank runs the same function in its own process. <!-- shown: ranks -->
# - Ranks can meet through a file; on Linux nothing listens once they are connected. <!-- shown: listens -->
# - A gloo send, of four bytes or four million, waits until the other side receives. <!-- shown: rendezvous -->
# - Two ranks that both send first wait for each other for ever, and the run can say so. <!-- shown: deadlock -->
# - Begin both messages, then wait for both: nobody has to be first. <!-- shown: mended -->
# - The bytes of a border are known before anything runs. <!-- shown: bytes -->
# - One micro-batch over two processes has the bits of one device. <!-- shown: same-bits -->
# - A buffer that is too large is filled in part, without an error. <!-- shown: prefix -->
# - Plans that are compared first turn a wrong shape into an error on every rank. <!-- shown: plan -->
# - A collective that one rank skips ends at the limit of the wait. <!-- shown: bounded -->
# - The transport names the missing rank. <!-- shown: named -->
# - Five questions tell a slow rank from a deadlock. <!-- shown: questions -->
#
# **Kept for later:** `send`, `receive`, `exchange`, `send_carry`, `receive_carry`, `ping_pong` and `fit_link` in
# `course_utils/links.py`; `launch` and `start` in `course_utils/processes.py`; the sentences in
# `course_utils/waits.py`.
#
# **Practise:** let three ranks pass a tensor round a ring, each to the next one. Let all send first, and
# read the circle that `run_in_threads` names; mend it. Then give rank 1 in `wrong_shape` too small a
# buffer, `(1, 3)`, and read what the run says.
# Exercises: [unit 03](../exercises/03_two_processes_that_talk/03_two_processes_that_talk.ipynb).
#
# **Next:** [04 · Naive model parallelism](04_naive_model_parallelism.ipynb)

# %% [markdown]
# ## Questions
# 1. Why does half of a round trip need no second clock?
# 2. Why is a time-out alone a poor report of a deadlock?
# 3. Three ranks in a ring, each passes a tensor to the next one: does the rule "even ranks send first" avoid the
#    deadlock?
# 4. Both ranks agree on the shape, but one of them on float32 and the other on int32. What does gloo do?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. Start and end are both read on rank 0. The clock of rank 1 is never asked.
# 2. It names whoever gave up first and not the circle. Slow, dead and deadlocked ranks look alike in it.
# 3. Yes, although ranks 0 and 2 are neighbours and both send first: the chain of waits ends at rank 1, which
#    receives (the second cell). One rank that breaks the circle is enough, but the messages then go one after the
#    other. To begin all messages before the first wait needs no rule.
# 4. It takes the bytes as they are (the third cell). The hash of the plan has the type in it.
#
# The exchange: begin both messages, then wait for both.


# %% tags=["answers", "nbval-check-output"]
def exchange(worker, mine, peer):
    theirs = torch.empty_like(mine)
    leaving = worker.transport.isend(mine, peer, "its tensor")
    arriving = worker.transport.irecv(theirs, peer, "its tensor")
    worker.transport.wait(leaving)
    worker.transport.wait(arriving)
    return theirs


check("03.exchange", exchange)


# %% tags=["answers", "nbval-check-output"]
def ring(worker):
    mine, theirs = torch.tensor([float(worker.rank)]), torch.empty(1)
    if worker.rank % 2:
        receive(worker, theirs, (worker.rank - 1) % 3, "a number")
    send(worker, mine, (worker.rank + 1) % 3, "a number")
    if worker.rank % 2 == 0:
        receive(worker, theirs, (worker.rank - 1) % 3, "a number")
    return theirs.item()


print("ranks 0, 1 and 2 got", *run_in_threads(ring, 3))


# %% tags=["answers", "nbval-check-output"]
def other_type(worker):
    if worker.rank == 0:
        return send(worker, torch.tensor([1.0, 2.0]), 1, "two numbers")
    return receive(worker, torch.empty(2, dtype=torch.int32), 0, "two numbers").tolist()


print("1.0 and 2.0 arrive as", launch(other_type, 2)[1])

# %% [markdown]
# ## References
# Hockney, 1994, *The communication challenge for MPP: Intel Paragon and Meiko CS-2*, Parallel Computing 20(3) ·
# Knapp, 1987, *Deadlock detection in distributed databases*, ACM Computing Surveys 19(4), the one-resource model ·
# PyTorch: [torch.distributed](https://docs.pytorch.org/docs/stable/distributed.html), "Point-to-point communication"
# and "Distributed Key-Value Store".
