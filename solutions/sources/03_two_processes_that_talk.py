# %% [markdown] tags=["opening"]
# # Exercises 03 · Two processes that talk
#
# **You need** [lesson 03](../../notebooks/03_two_processes_that_talk.ipynb). **Minutes:** 60. Each task stands on its own: one
# that is not solved costs nothing in the next.

# %% tags=["setup"]
import torch

from course_utils.checks import call, check, hint, start
from course_utils.links import fit_link

start("03")

# %% [markdown]
# ## 1 · An exchange, from memory
# Two ranks call `exchange` at the same time; each gives the other its tensor and returns what the other had. **Target:** 1 message from
# each rank, both over after **1 message time** (not one after the other), 1 new tensor on each rank, and `mine` stays as it is.
#
# | | |
# | --- | --- |
# | `worker.transport.isend(tensor, peer, label)` | begins to send; returns a handle |
# | `worker.transport.irecv(buffer, peer, label)` | begins to receive into a buffer of the same shape and dtype; returns a handle |
# | `worker.transport.wait(handle)` | waits until that message is through, and returns nothing |
#
# A message is over one *message time* after both its sides have begun. Messages that are on their way at once take one together.


# %% tags=["answer:exchange"]
def exchange(worker, mine, peer):
    """The peer's tensor, which has the shape and dtype of `mine`."""
    ### BEGIN SOLUTION
    theirs = torch.empty_like(mine)
    leaving = worker.transport.isend(mine, peer, "its tensor")
    arriving = worker.transport.irecv(theirs, peer, "its tensor")
    worker.transport.wait(leaving)
    worker.transport.wait(arriving)
    return theirs
    ### END SOLUTION


# %% [markdown]
# What your function does on two ranks, line by line, with the message time at which each wait ends:

# %%
from course_utils.checks.unit_03 import log_of_a_swap

call(log_of_a_swap, exchange)

# %% tags=["check:exchange", "nbval-check-output"]
check("unit03.exchange", exchange)

# %% [markdown] tags=["solution"]
# **Why.** A send is over only when the other side receives. If no rank waits before it has begun both messages, no wait depends on
# what a rank does only after a wait, so no circle can close. Each handle is kept and waited for: over gloo a message whose handle is
# dropped may be lost.
#
# **One wrong way:** a rule who is first. It cannot deadlock, but the two messages go one after the other:


# %% tags=["solution", "nbval-check-output"]
def lower_rank_first(worker, mine, peer):
    theirs = torch.empty_like(mine)
    if worker.rank < peer:
        worker.transport.wait(worker.transport.isend(mine, peer, "its tensor"))
    worker.transport.wait(worker.transport.irecv(theirs, peer, "its tensor"))
    if worker.rank > peer:
        worker.transport.wait(worker.transport.isend(mine, peer, "its tensor"))
    return theirs


check("unit03.exchange", lower_rank_first)

# %% [markdown]
# ## 2 · Round the ring
# $K$ ranks stand in a ring: each sends only to the next one, the last to rank 0, and receives only from the one before. Every rank has a
# tensor of the same shape and dtype, and all ranks call `ring_gather` at once; each returns the list of all $K$ tensors, **in the order of
# the ranks**, for any $K \ge 1$.
#
# **Target:** $K - 1$ messages from each rank, each of **one** tensor, all over after $K - 1$ message times; `mine` stays as it is. With three
# ranks each of them sends 2 tensors:
#
# | | rank 0 gets | rank 1 gets | rank 2 gets |
# | --- | --- | --- | --- |
# | hop 1 | tensor 2 | tensor 0 | tensor 1 |
# | hop 2 | tensor 1 | tensor 2 | tensor 0 |
#
# `worker.rank`, `worker.world_size` and the transport of task 1 are all you need.


# %% tags=["answer:ring_gather"]
def ring_gather(worker, mine):
    """The tensors of all ranks, a list in the order of the ranks."""
    ### BEGIN SOLUTION
    rank, world_size, transport = worker.rank, worker.world_size, worker.transport
    tensors = [mine] * world_size
    for hop in range(1, world_size):
        held, arrived = (rank - hop + 1) % world_size, (rank - hop) % world_size
        tensors[arrived] = torch.empty_like(mine)
        leaving = transport.isend(tensors[held], (rank + 1) % world_size, f"the tensor of rank {held}")
        arriving = transport.irecv(tensors[arrived], (rank - 1) % world_size, f"the tensor of rank {arrived}")
        transport.wait(leaving)
        transport.wait(arriving)
    return tensors
    ### END SOLUTION


# %% [markdown]
# What your function does on rank 0 of 3. Count the messages, and compare with the table:

# %%
from course_utils.checks.unit_03 import log_of_a_ring

call(log_of_a_ring, ring_gather)

# %% tags=["check:ring_gather", "nbval-check-output"]
check("unit03.ring_gather", ring_gather)

# %% [markdown] tags=["solution"]
# **Why.** What came in one hop leaves in the next, so after $K - 1$ hops each tensor has been everywhere. In hop $h$ the tensor that
# arrives started $h$ ranks before; that tells its place. In each hop all ranks do the exchange of task 1, only with two different
# neighbours. A new buffer for every hop is needed for the result anyway, so nothing is ever received into what is still leaving.
#
# **One wrong way:** one tensor that moves round, received into while it is being sent. On real processes that goes well as long as the send
# is faster, and fails when it is not:


# %% tags=["solution", "nbval-check-output"]
def one_moving_tensor(worker, mine):
    rank, world_size, transport = worker.rank, worker.world_size, worker.transport
    tensors, moving = [mine] * world_size, mine.clone()
    for hop in range(1, world_size):
        leaving = transport.isend(moving, (rank + 1) % world_size, "the tensor")
        arriving = transport.irecv(moving, (rank - 1) % world_size, "the tensor")
        transport.wait(leaving)
        transport.wait(arriving)
        tensors[(rank - hop) % world_size] = moving.clone()
    return tensors


check("unit03.ring_gather", one_moving_tensor)

# %% [markdown]
# ## 3 · A link behind the noise
# A run has noted bytes and seconds of some 200 messages, all of different sizes, small and large ones mixed. About a quarter of them met
# other work and took 2 to 20 times as long, most others a little longer than the link needs; **nothing makes a message faster**. Write
# `recover_link`. **Target:** latency and bandwidth each at most **5 %** off, for 8 links that you have not seen.
#
# `samples` is a list of `(bytes, seconds)`. You may use the lesson's `fit_link({bytes: seconds, ...})`; the `Link` that it returns has
# `latency`, `bandwidth` and `seconds(bytes)`. On all messages, it gives this line:

# %% tags=["nbval-check-output"]
from course_utils.checks.unit_03 import example_of_a_log, show_line

samples = example_of_a_log()
show_line(samples, fit_link(dict(samples)))


# %% tags=["answer:recover_link"]
def recover_link(samples):
    """(latency in seconds, bandwidth in bytes per second) from a list of (bytes, seconds)."""
    ### BEGIN SOLUTION
    kept = dict(samples)
    while len(kept) > 5:
        link = fit_link(kept)
        kept = {size: seconds for size, seconds in kept.items() if seconds <= link.seconds(size)}
    return link
    ### END SOLUTION


# %% [markdown]
# Where does your line lie?

# %%
mine = call(recover_link, samples)
if mine is not None:
    call(show_line, samples, mine)

# %% tags=["check:recover_link", "nbval-check-output"]
check("unit03.recover_link", recover_link)

# %% [markdown] tags=["solution"]
# **Why.** Noise that only adds has no zero mean, so more messages do not help a mean, and a median is as far off as the typical delay. The
# true line is the one on which the lowest messages lie. Each round keeps what lies below the line, so the line sinks until it
# is the lower edge of the cloud. (For one size measured many times, the minimum does the same.)
#
# **One wrong way:** to drop only the outliers. What remains is still late, and a fit goes through its middle:


# %% tags=["solution", "nbval-check-output"]
def drops_outliers(samples):
    link = fit_link(dict(samples))
    return fit_link({size: seconds for size, seconds in samples if seconds < 1.5 * link.seconds(size)})


check("unit03.recover_link", drops_outliers)

# %% [markdown]
# ## References
# Patarasuk and Yuan, 2009, *Bandwidth optimal all-reduce algorithms for clusters of workstations*, Journal of Parallel and Distributed
# Computing 69(2), [doi 10.1016/j.jpdc.2008.09.002](https://doi.org/10.1016/j.jpdc.2008.09.002) · Hockney, 1994, *The communication
# challenge for MPP: Intel Paragon and Meiko CS-2*, Parallel Computing 20(3) · a hang in which two sends were suspected:
# [pytorch#172668](https://github.com/pytorch/pytorch/issues/172668).
