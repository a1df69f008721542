# %% [markdown] tags=["opening"]
# # Exercises 06 · The GPipe schedule
#
# **You need** [lesson 06](../../notebooks/06_the_gpipe_schedule.ipynb). **Minutes:** 65. Each task stands on its own: one that is
# not solved costs nothing in the next.

# %% tags=["setup"]
from course_utils.checks import call, check, hint, start
from course_utils.schedules import Action, gpipe, one_stage_per_rank
from course_utils.simulation import peak_stash, simulate

start("06")

# %% [markdown]
# ## 1 · The executor, from memory
# `rank` is one rank of a run; write the loop that carries out its list of actions. **Target:** each action in its place, every send waited
# for, and never more graphs kept than the schedule needs, on up to 3 stages, for GPipe, naive and 1F1B alike.
#
# | | |
# | --- | --- |
# | `rank.actions` | the list, of `Action(kind, stage, micro_batch)` |
# | `rank.receive(action)` | waits for what an action needs from another rank, and returns it; `None` if it needs nothing |
# | `rank.forward(micro_batch, arrived)` | returns the graph and the activations |
# | `rank.backward(graph, arrived)` | returns the gradients; `graph` is that of the same micro-batch's forward |
# | `rank.begin_send(action, result)` | begins to send what the action has made, and returns a handle; `None` if nobody needs it |
# | `rank.wait(handle)` | waits until it is sent; `wait(None)` does nothing |


# %% tags=["answer:run_rank"]
def run_rank(rank):
    """Carry out the actions of one rank; return nothing."""
    ### BEGIN SOLUTION
    graphs, handles = {}, []
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
        else:
            result = rank.backward(graphs.pop(action.micro_batch), arrived)
        handles.append(rank.begin_send(action, result))
    for handle in handles:
        rank.wait(handle)
    ### END SOLUTION


# %% [markdown]
# What your loop did on stage 1 of 2, line by line:

# %%
from course_utils.checks.unit_06 import log_of_a_run

call(log_of_a_run, run_rank)

# %% tags=["check:run_rank", "nbval-check-output"]
check("unit06.run_rank", run_rank)

# %% [markdown] tags=["solution"]
# **Why.** The loop knows nothing of GPipe: what an action needs, and who gets its result, follows from the schedule. `pop` gives the graph
# to the backward and forgets it; with `graphs[m]` all of them would live until the end of the step. The waits come last because a send is
# over only when the receiver has come to it.
#
# **One wrong way:** to wait for each send at once. With GPipe that works, because all messages go down and then all go up. In 1F1B two
# neighbours send to each other:


# %% tags=["solution"]
def waits_at_once(rank):
    graphs = {}
    for action in rank.actions:
        arrived = rank.receive(action)
        if action.kind == "F":
            graphs[action.micro_batch], result = rank.forward(action.micro_batch, arrived)
        else:
            result = rank.backward(graphs.pop(action.micro_batch), arrived)
        rank.wait(rank.begin_send(action, result))


check("unit06.run_rank", waits_at_once)

# %% [markdown]
# ## 2 · As fast as the memory allows
# GPipe keeps $M$ graphs on every stage. Write a schedule for $K$ stages in which **no stage ever keeps more than `cap` graphs**, and
# which is **as fast as it can be** under that limit: a forward takes 1 slot, a backward 2, messages take none.
# A graph is kept from the start of its forward to the end of its backward. Numbers to reach:

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_06 import target

for K, M, cap in [(2, 4, 2), (4, 8, 4), (4, 8, 2)]:
    print(f"K={K}, M={M}: at most {cap} graphs on any stage, at most {target(K, M, cap)} slots")
print(f"K=4, M=8, GPipe: {peak_stash(gpipe(4, 8))[0]} graphs, {simulate(gpipe(4, 8), 1, 2).makespan:g} slots")

# %% [markdown]
# So with a cap of 4 four stages lose no time at all. Begin with two stages, pencil and paper. `Action(kind, stage, micro_batch)` and
# `one_stage_per_rank(num_micro_batches, rows)` make the schedule; micro-batches ascend on every stage.


# %% tags=["answer:at_most"]
def at_most(num_stages, num_micro_batches, cap):
    """The fastest Schedule in which no stage keeps more than `cap` graphs."""
    ### BEGIN SOLUTION
    last, never = num_stages - 1, float("inf")
    rows = [[] for _ in range(num_stages)]
    ends = {}  # {action: the slot in which it has ended}
    slot = 0
    while any(len(row) < 2 * num_micro_batches for row in rows):
        for k, row in enumerate(rows):
            if row and ends[row[-1]] > slot:
                continue
            f = sum(action.kind == "F" for action in row)
            b = len(row) - f
            activations = ends.get(Action("F", k - 1, f), never) if k > 0 else 0
            gradient = ends.get(Action("B", k + 1, b) if k < last else Action("F", k, b), never)
            if b < f and gradient <= slot:
                action, slots = Action("B", k, b), 2
            elif f < num_micro_batches and f - b < cap and activations <= slot:
                action, slots = Action("F", k, f), 1
            else:
                continue
            row.append(action)
            ends[action] = slot + slots
        slot += 1
    return one_stage_per_rank(num_micro_batches, rows)
    ### END SOLUTION


# %% [markdown]
# Your schedules for four stages and eight micro-batches, with a cap of 4 and of 2. Does the first pattern look familiar? Where do the
# stages stand still in the second?

# %%
from course_utils.checks.unit_06 import show_schedules

call(show_schedules, at_most)

# %% tags=["check:at_most", "nbval-check-output"]
check("unit06.at_most", at_most)

# %% [markdown] tags=["solution"]
# **Why.** No formula for the order is needed: every stage takes, at each moment, what it can, a backward first because only a backward
# frees memory. With `cap = K` the pattern that comes out has a name, **1F1B** (Narayanan et al., 2021): a warm-up, then one forward, one
# backward. Stage $k$ needs no more than $K - k$ graphs then. With a smaller cap the round trip of a micro-batch, $K$ forwards and $K$
# backwards, is what limits: only `cap` of them can be on the way.
#
# **One wrong way:** a fixed warm-up for every stage, as long as the cap allows. It keeps the limit, and with `cap = K` it looks
# right on stage 0; but the last stage now does forwards that nobody waits for, while stage 0 waits for its gradient.


# %% tags=["solution", "nbval-check-output"]
def same_warm_up(num_stages, num_micro_batches, cap):
    rows = []
    for k in range(num_stages):
        row = [Action("F", k, m) for m in range(min(cap, num_micro_batches))]
        for m in range(num_micro_batches):
            row += [Action("B", k, m)] + [Action("F", k, m + cap)] * (m + cap < num_micro_batches)
        rows.append(row)
    return one_stage_per_rank(num_micro_batches, rows)


check("unit06.at_most", same_warm_up)

# %% [markdown]
# ## References
# Narayanan et al., 2021, *Megatron-LM*, [arXiv 2104.04473](https://arxiv.org/abs/2104.04473), section 2.2 · Huang et al., 2019, *GPipe*,
# [arXiv 1811.06965](https://arxiv.org/abs/1811.06965), section 2.3.
