# %% [markdown] tags=["opening"]
# # Exercises 07 · The bubble and the stash
#
# **You need** [lesson 07](../../notebooks/07_bubble_and_stash.ipynb). **Minutes:** 75. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
from course_utils.checks import call, check, hint, start
from course_utils.plots import describe_timeline, draw_timeline, show
from course_utils.schedules import gpipe, one_f_one_b
from course_utils.simulation import simulate

start("07")

# %% [markdown]
# ## 1 · The stash in bytes, from memory
# A forward leaves a graph, its backward frees it. Write the function that says how many bytes each rank of a schedule keeps at its fullest.
# **Target:** to the byte, for GPipe, naive, 1F1B, and two stages per rank.
#
# | | |
# | --- | --- |
# | `schedule.actions` | one row of actions per rank |
# | `action.kind`, `.stage`, `.micro_batch` | kind is `"F"` or `"B"` |
# | `sizes[stage][micro_batch]` | the bytes of that graph; no two need be equal |


# %% tags=["answer:peak_bytes"]
def peak_bytes(schedule, sizes):
    """For each row of schedule.actions the most bytes of graphs that are kept at a time, a list."""
    ### BEGIN SOLUTION
    peaks = []
    for row in schedule.actions:
        kept = peak = 0
        for action in row:
            size = sizes[action.stage][action.micro_batch]
            kept += size if action.kind == "F" else -size
            peak = max(peak, kept)
        peaks.append(peak)
    return peaks
    ### END SOLUTION


# %% [markdown]
# Two stages, four micro-batches, and graphs of 10, 20, 30 and 40 bytes on both:

# %%
for name, schedule in {"GPipe": gpipe(2, 4), "1F1B": one_f_one_b(2, 4)}.items():
    mine = call(peak_bytes, schedule, [[10, 20, 30, 40]] * 2)
    if mine is not None:
        print(f"{name}: {mine}")

# %% tags=["check:peak_bytes", "nbval-check-output"]
check("unit07.peak_bytes", peak_bytes)

# %% [markdown] tags=["solution"]
# **Why.** The order of a row's actions decides its memory, and nothing else does: no times are needed. The sizes must be looked up for each
# action, because a backward frees the graph of *its* micro-batch, and in 1F1B that is the oldest one.
#
# **One wrong way:** a stack, on which each backward frees what was put there last. The numbers of graphs are right, the bytes are not.


# %% tags=["solution", "nbval-check-output"]
def as_a_stack(schedule, sizes):
    peaks = []
    for row in schedule.actions:
        graphs, peak = [], 0
        for action in row:
            if action.kind == "F":
                graphs.append(sizes[action.stage][action.micro_batch])
            else:
                graphs.pop()
            peak = max(peak, sum(graphs))
        peaks.append(peak)
    return peaks


check("unit07.peak_bytes", as_a_stack)

# %% [markdown]
# ## 2 · One slow stage
# Stages are never equal, and messages are never free. Give the time of a GPipe step and its bubble, **of the total time** of all ranks, without
# simulating it. **Target:** both as `simulate` has them, within $10^{-9}$ of their size, for $M < K$ as well as for a **billion** micro-batches.
#
# | | |
# | --- | --- |
# | `forward`, `backward` | what one micro-batch takes in each stage, two lists |
# | `transfer` | how long each message is under way; messages do not delay each other |
#
# Here is a step with a stage that is slow forward and another that is slow backward:

# %% tags=["nbval-check-output"]
forward, backward, transfer = [1, 3, 1], [2, 1, 4], 1
timeline = simulate(gpipe(3, 4), forward, backward, transfer)
show(draw_timeline(timeline), says=describe_timeline(timeline))


# %% tags=["answer:time_and_bubble"]
def time_and_bubble(forward, backward, transfer, num_micro_batches):
    """(time, bubble) of a GPipe step: in the unit of the costs, and as a share of all ranks' time from 0 to 1."""
    ### BEGIN SOLUTION
    stages = len(forward)
    time = 2 * (stages - 1) * transfer
    for costs in (forward, backward):
        time += sum(costs) + (num_micro_batches - 1) * max(costs)
    work = num_micro_batches * (sum(forward) + sum(backward))
    return time, 1 - work / (stages * time)
    ### END SOLUTION


# %% [markdown]
# Yours, for the step above, and for more micro-batches. What does the bubble approach?

# %%
from course_utils.checks.values import print_numbers

print(f"simulated, M=4: time {timeline.makespan:g}, bubble {timeline.bubble_of_total:.4f}")
if call(time_and_bubble, forward, backward, transfer, 4) is not None:
    for M in (4, 16, 64, 1_000_000):
        mine = call(time_and_bubble, forward, backward, transfer, M)
        if mine is not None:
            call(print_numbers, f"yours, M={M:,}:", "time {:,.10g}, bubble {:.4f}", mine)

# %% tags=["check:time_and_bubble", "nbval-check-output"]
check("unit07.time_and_bubble", time_and_bubble)

# %% [markdown] tags=["solution"]
# **Why.** The first micro-batch passes every stage and every border. Each further one leaves the last stage as much later as the *slowest*
# stage takes, wherever that stage stands: before it micro-batches queue up, after it they never wait. When the last stage has done its last
# forward, all other stages are done with theirs, so the backwards begin as a second line, in the other direction, with a slowest stage of
# its own. For equal stages and free messages this is $(M+K-1)(F+B)$. With unequal ones more micro-batches bring the bubble down to what the slowest
# stages cost, and no further.
#
# **One wrong way:** to look for *the* slowest stage, that with the largest sum of forward and backward. It is right only if the same stage is the
# slowest in both directions.


# %% tags=["solution", "nbval-check-output"]
def one_slowest(forward, backward, transfer, num_micro_batches):
    stages, both = len(forward), [f + b for f, b in zip(forward, backward, strict=True)]
    time = 2 * (stages - 1) * transfer + sum(both) + (num_micro_batches - 1) * max(both)
    return time, 1 - num_micro_batches * sum(both) / (stages * time)


check("unit07.time_and_bubble", one_slowest)

# %% [markdown]
# ## 3 · The bubble from a trace
# A profiler gives events, not bubbles. Compute the bubble, **of the total time**: the share of all ranks' time, from the first start to the
# last end of any event on any rank, in which a rank does not compute. **Target:** within **0.1 percentage points**, whatever nests, overlaps or waits.
#
# | an event's name begins with | it is |
# | --- | --- |
# | `aten::`, `autograd::` | work; one operator calls others, which nest in it, and those of two threads overlap |
# | `gloo:` | a message under way; no work, but the rank may compute meanwhile |
# | `Forward`, `Backward` | a mark round an action, *with* the wait for its message |
#
# `events` is a list of `(rank, name, start, end)` in microseconds of one clock, in no order. What rank 0 of two did in a small one:

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_07 import Trace, make_trace, picture, span, summed

events = make_trace(Trace(num_ranks=2, M=1, seed=5))
print(picture(events, rank=0))


# %% tags=["answer:bubble_of_trace"]
def bubble_of_trace(events, num_ranks):
    """The share of the ranks' time in which they do not compute, from 0 to 1; a rank may have no event at all."""
    ### BEGIN SOLUTION
    busy = 0
    for rank in range(num_ranks):
        work = [e[2:] for e in events if e[0] == rank and e[1].startswith(("aten::", "autograd::"))]
        until = float("-inf")
        for begin, end in sorted(work):
            if end > until:
                busy += end - max(begin, until)
                until = end
    length = max(e[3] for e in events) - min(e[2] for e in events)
    return 1 - busy / (num_ranks * length)
    ### END SOLUTION


# %% [markdown]
# The bubble of the trace above, and the durations of all its operators for comparison:

# %%
print(f"all operators' durations: {summed(events)} µs; both ranks' time: {2 * span(events)} µs")
mine = call(bubble_of_trace, events, 2)
if mine is not None:
    call(print_numbers, "yours:", "bubble {:.1%} of the total time", mine)

# %% tags=["check:bubble_of_trace", "nbval-check-output"]
check("unit07.bubble_of_trace", bubble_of_trace)

# %% [markdown] tags=["solution"]
# **Why.** A rank computes while *at least one* of its operators runs, so the length of their union counts. Sorted by start, one number is enough
# to know what is covered already. All ranks are measured against one length, that of the step: a rank that begins late was idle before.
#
# **One wrong way:** to count the marks as well, because they carry the names of the schedule. Each contains its own wait, so the more a rank
# waits, the busier it looks.


# %% tags=["solution", "nbval-check-output"]
def from_the_marks(events, num_ranks):
    names = ("aten::", "autograd::", "Forward", "Backward")
    busy = 0
    for rank in range(num_ranks):
        until = float("-inf")
        for begin, end in sorted(e[2:] for e in events if e[0] == rank and e[1].startswith(names)):
            busy += max(0, end - max(begin, until))
            until = max(until, end)
    return 1 - busy / (num_ranks * (max(e[3] for e in events) - min(e[2] for e in events)))


check("unit07.bubble_of_trace", from_the_marks)

# %% [markdown]
# ## References
# Huang et al., 2019, *GPipe*, [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), section 2.3 · Narayanan et al., 2021, *Megatron-LM*,
# [arXiv 2104.04473](https://arxiv.org/abs/2104.04473), section 2.2 · [Megatron-LM#691](https://github.com/NVIDIA/Megatron-LM/issues/691),
# [zero-bubble#18](https://github.com/sail-sg/zero-bubble-pipeline-parallelism/issues/18): how to measure a bubble · PyTorch:
# [torch.profiler](https://docs.pytorch.org/docs/stable/profiler.html).
