# %% [markdown] tags=["opening"]
# # 09 · Gradient clipping
#
# **You will be able to** clip by the norm of a whole model whose gradients lie on several ranks, with the bits of one device, and say what
# that costs over a line with a long delay.
#
# **You need** lessons [03](03_two_processes_that_talk.ipynb) (messages), [06](06_the_gpipe_schedule.ipynb) (the executor) and
# [08](08_mixed_precision.ipynb) (the loss scale). **Minutes:** 35 to read, 1 to run.
#
# **New terms:** [gradient clipping](00_start_here.ipynb#gradient-clipping), [global norm](00_start_here.ipynb#global-norm),
# [all-reduce](00_start_here.ipynb#all-reduce), [line delay](00_start_here.ipynb#line-delay).
#
# So far each stage was updated from what it had itself: its weights, its gradients. The norm of the gradient belongs to no stage alone.

# %% tags=["where"]
from course_utils.course_map import where

where("09")

# %% [markdown]
# ## Explode a run, and save it
# A gradient says which way is downhill at $w_t$. A long step ends where that may no longer be true. So its length is limited, by a bound $c$:
#
# $$g = \nabla L(w_t) \cdot \min\left(1, \frac{c}{\lVert \nabla L(w_t) \rVert}\right) \qquad w_{t+1} = w_t - \eta\, g$$
#
# This is *gradient clipping* (Pascanu et al., 2013, section 3.2). A small model on one device will need it: in step 20, and only there, the loss is not
# divided by the number of tokens ([lesson 05](05_micro_batches.ipynb)). Look for `shorten`: what it does to the gradients is all that differs
# between the two runs.

# %%
import torch

from course_utils.number_words import batch
from course_utils.pipeline import sum_over_tokens
from course_utils.stages import CutModel, by_count, one_thread
from course_utils.transformer import TransformerConfig

config = TransformerConfig(d_model=32, heads=4, encoder_layers=1, decoder_layers=1)
whole, halves = (CutModel(config, by_count(6, K)) for K in (1, 2))


# %%
def descend(parameters, learning_rate=1.0):
    with torch.no_grad():
        for parameter in parameters:
            parameter -= learning_rate * parameter.grad


@one_thread()
def run(shorten, loss_scale=1.0):
    """The loss per token of each of 40 steps."""
    model, losses = whole.build(0, seed=0), []
    for t in range(40):
        mini_batch = batch(range(1000), seed=0, step=t, size=32)
        total = sum_over_tokens(model((None, None), mini_batch)[0], mini_batch, 1)
        model.zero_grad()
        (loss_scale * total / (1 if t == 20 else mini_batch.num_tokens)).backward()
        shorten(list(model.parameters()))
        descend(model.parameters())
        losses.append(total.item() / mini_batch.num_tokens)
    return losses


# %% tags=["claim:saved"]
from torch.nn.utils import clip_grad_norm_

runs = {
    "no clipping": run(lambda parameters: None),
    "clipped to norm 1": run(lambda parameters: clip_grad_norm_(parameters, 1.0)),
}
for name, losses in runs.items():
    print(f"{name}: loss of step 20 {losses[20]:.2f}, then {', '.join(f'{loss:.3g}' for loss in losses[21:26])}, ...")
assert not max(runs["no clipping"][21:24]) < 10
assert max(runs["clipped to norm 1"]) < 5 and runs["clipped to norm 1"][-1] < runs["clipped to norm 1"][0]

# %%
import math

from course_utils.charts import describe_lines, draw_lines
from course_utils.plots import show

axes = ("step", "loss per token", "One bad step")


def drawable(runs):
    return {name: {t: loss for t, loss in enumerate(run) if loss < 10_000} for name, run in runs.items()}


# %%
show(draw_lines(drawable(runs), *axes, log_y=True), says=describe_lines(drawable(runs), *axes))

# %% [markdown]
# The line without clipping ends where the loss exceeds 10,000: the weights are lost. Clipping does not know that the gradient of step 20 was
# wrong; it only keeps the step short.
#
# ## A mistake made on purpose: each stage clips its own
# $\lVert \nabla L \rVert$ is the root of the sum of the squares of *all* gradients, the *global norm*. `clip_grad_norm_` sees those of one process. Users
# of torchtitan and Modalities noticed ([torchtitan#596](https://github.com/pytorch/torchtitan/issues/596),
# [Modalities#313](https://github.com/Modalities/modalities/issues/313)); the schedules of PyTorch leave it to you
# ([pytorch#162638](https://github.com/pytorch/pytorch/issues/162638)). Here is the gradient of one step, and the parts of it that two stages hold:

# %%
model, mini_batch = whole.build(0, seed=0), batch(range(1000), seed=0, step=0, size=32)
sum_over_tokens(model((None, None), mini_batch)[0], mini_batch, mini_batch.num_tokens).backward()
gradients = {name: p.grad.double().flatten() for name, p in model.named_parameters_globally()}


def parts_of(cut):
    """The gradients of each stage in one vector."""
    own = [[g for name, g in gradients.items() if cut.stage_of(name) == k] for k in range(cut.num_stages)]
    return [torch.cat(stage) for stage in own]


parts = parts_of(halves)
norms = [part.norm().item() for part in parts]
print(f"norm of stage 0 {norms[0]:.3f}, of stage 1 {norms[1]:.3f}, of both {math.hypot(*norms):.3f}")

# %% [markdown]
# Each stage now clips its part to $c = 0.1$. Is the result only shorter than the gradient, or does it point elsewhere? By how many degrees?

# %%
from course_utils.predictions import predict

turned = predict("angle between gradient and step", K=2, c=0.1, unit="degrees", value=None)  # put your guess here


# %%
def clip(vector, max_norm):
    return vector * min(1.0, max_norm / vector.norm().item())


def angle(one, other):
    return math.degrees(math.acos(min(1.0, (one @ other / one.norm() / other.norm()).item())))


def angle_of_own(cut):
    """Between the gradient and what is left of it if every stage clips its own."""
    parts = parts_of(cut)
    return angle(torch.cat(parts), torch.cat([clip(part, 0.1) for part in parts]))


# %% tags=["mistake", "claim:direction"]
measured = {f"each of {K} stages its own": angle_of_own(CutModel(config, by_count(6, K))) for K in (2, 3, 4)}
measured["by the global norm"] = angle(torch.cat(parts), clip(torch.cat(parts), 0.1))
for name, degrees in measured.items():
    print(f"{name}: {degrees:.1f} degrees off")
assert measured["each of 2 stages its own"] > 20 and measured["by the global norm"] < 1e-3
assert len({round(degrees, 2) for degrees in measured.values()}) == 4
turned = turned.settle(measured=measured["each of 2 stages its own"], formula=45 - math.degrees(math.atan2(*norms)))

# %%
from course_utils.charts import LINES, describe_prediction
from course_utils.plots import new_figure

ends = {
    "by the global norm: the gradient's direction": [norm * 0.1 / math.hypot(*norms) for norm in norms],
    "each stage by its own norm": [min(norm, 0.1) for norm in norms],
}


def draw_ends():
    figure, axes = new_figure(3.2)
    for (name, end), (colour, dashes, marker) in zip(ends.items(), LINES, strict=False):
        axes.plot([0, end[0]], [0, end[1]], dashes, color=colour, marker=marker, label=name)
    quarter = torch.linspace(0, math.pi / 2, 50)
    axes.plot(0.1 * quarter.cos(), 0.1 * quarter.sin(), ":", color="#404040", label="all steps of length 0.1")
    axes.set(xlabel="norm of stage 0's part", ylabel="norm of stage 1's part", aspect="equal")
    axes.set_title("After clipping to 0.1")
    axes.legend(loc="center left", bbox_to_anchor=(1.05, 0.5), frameon=False)
    return figure


# %%
lengths = ", ".join(f"{name}: length {math.hypot(*end):.3f}" for name, end in ends.items())
show(draw_ends(), says=f"After clipping to 0.1, {lengths}. {describe_prediction(turned)}")

# %% [markdown]
# Clipping multiplies a stage's part by one number, so two axes are enough for this picture. Two stages whose norms are both above $c$ end with equal norms, on the
# diagonal, wherever they came from; the step is also $\sqrt 2$ times too long. Each number of stages turns it by another
# angle, and no error is raised.

# %% [markdown] tags=["stub"]
# ## Write it first
# So every rank needs the norms of all. They agree on one vector with a slot for every parameter of the whole model, in model order. A rank fills
# in its own slots; once the vector is complete on all ranks, each takes the norm of *that vector*. Write both halves. If the norm is not finite, return it as it is and leave
# the gradients alone.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


def gradient_norms(parameters, num_norms):
    """(num_norms,) zeros; for each pair (place, parameter) that has a gradient, its norm at that place."""
    ...  # your turn: about five lines


check("09.gradient_norms", gradient_norms)


# %% tags=["stub", "nbval-check-output"]
def clip_by_global_norm(parameters, norms, max_norm):
    """parameters: this rank's. norms: those of all ranks. Clip in place; return the global norm before, a float."""
    ...  # your turn: about six lines


check("09.clip_by_global_norm", clip_by_global_norm)

# %% [markdown]
# The package's versions, in two processes that each run one step of GPipe. Look at how many slots each rank can fill:

# %%
from course_utils.optimization import clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.schedules import gpipe
from course_utils.transfer import agree

place = {name: i for i, name in enumerate(whole.parameter_names)}


def slots_of(stage):
    return gradient_norms([(place[name], p) for name, p in stage.named_parameters_globally()], len(place))


def own_slots(worker):
    stage, pieces = halves.build(worker.rank, seed=0), mini_batch.split(4)
    pipeline = Pipeline({worker.rank: stage}, gpipe(2, 4), worker.transport, halves.carry_after)
    agree(worker.transport, plan := pipeline.plan(pieces))
    pipeline.step(pieces, plan, mini_batch.num_tokens)
    return slots_of(stage)


# %% tags=["nbval-check-output"]
for rank, slots in enumerate(launch(own_slots, 2)):
    own = [i for name, i in place.items() if halves.stage_of(name) == rank]
    print(f"rank {rank} fills {len(own)} of {len(slots)} slots, {own[0]} to {own[-1]}")
    assert not slots[[i for i in place.values() if i not in own]].any()

# %% [markdown]
# ## Tell everyone: an all-reduce
# An *all-reduce* gives every rank the sum (or the maximum, ...) of what all ranks hold. In a slot all ranks but one have 0, and $x + 0$ is exactly $x$: the order of the sum, which is
# the library's own, cannot change a bit.

# %% tags=["claim:all-reduce"]
import torch.distributed as dist

from course_utils.threads import run_in_threads


def all_reduced(worker):
    slots = own_slots(worker)
    dist.all_reduce(slots)
    return slots


both, apart = launch(all_reduced, 2), run_in_threads(own_slots, 2)
assert torch.equal(both[0], both[1]) and torch.equal(both[0], apart[0] + apart[1])
print(f"global norm on both ranks: {both[0].norm():.6f}")

# %% [markdown]
# How does such a *collective* (an operation of all ranks) work? One way is a ring. Each rank cuts its vector into $K$ chunks, hands one to the next rank and adds the one that comes; after $K-1$ turns every
# chunk is complete somewhere, and $K-1$ more turns spread it. So each rank sends $2(K-1)$ messages, *each of which waits for the one before*:


# %%
def ring_all_reduce(worker, vector):
    """The sum of all ranks' vectors."""
    K, rank, transport = worker.world_size, worker.rank, worker.transport
    chunks = vector.clone().tensor_split(K)
    for turn in range(2 * (K - 1)):
        mine, theirs = chunks[(rank - turn) % K], chunks[(rank - turn - 1) % K]
        arrived = torch.empty_like(theirs)
        operations = [
            transport.isend(mine, (rank + 1) % K, "a chunk", control=True),
            transport.irecv(arrived, (rank - 1) % K, "a chunk", control=True),
        ]
        for operation in operations:
            transport.wait(operation)
        theirs.copy_(theirs + arrived if turn < K - 1 else arrived)
    return torch.cat(chunks)


def ring_of_slots(worker):
    return ring_all_reduce(worker, own_slots(worker))


# %% tags=["claim:ring"]
for vector in launch(ring_of_slots, 2):
    assert torch.equal(vector, both[0])
for K in (3, 4):
    for vector in run_in_threads(lambda worker: ring_all_reduce(worker, 2.0**worker.rank * torch.ones(47)), K):
        assert torch.equal(vector, torch.full((47,), 2.0**K - 1))
print("the ring gives the bits of dist.all_reduce; it is right for three and four ranks too")

# %% [markdown]
# ## The same over a long line
# Within one machine a message takes so little time that nobody counts it. Over a long line even the smallest takes as long as light needs, the *line delay*. `SlowLine` adds such a delay to
# real messages: each carries the time at which it was sent, and a wait for it ends later. It keeps gloo's rule from lesson 06: a message leaves only when the sender
# has heard that its receive is posted. Look for the two delays in `arrival`.

# %%
import time


class SlowLine:
    posts_early, wire_device = True, "cpu"  # what Pipeline asks a transport

    def __init__(self, transport, delay=0.020):
        self.transport, self.delay = transport, delay
        self.rank, self.world_size, self.computing = transport.rank, transport.world_size, transport.computing

    def isend(self, tensor, peer, label, control=False):
        sent = torch.tensor([time.perf_counter()], dtype=torch.float64)
        return [self.transport.isend(each, peer, label, control) for each in (sent, tensor)], None

    def irecv(self, buffer, peer, label, control=False):
        times = torch.empty(1, dtype=torch.float64), time.perf_counter()
        return [self.transport.irecv(each, peer, label, control) for each in (times[0], buffer)], times

    def wait(self, operation):
        for each in operation[0]:
            self.transport.wait(each)
        if operation[1] is not None:
            sent, posted = operation[1]
            arrival = max(sent.item(), posted + self.delay) + self.delay
            time.sleep(max(0.0, arrival - time.perf_counter()))


# %% [markdown]
# With $K=2$ and an all-reduce by our ring, how many line delays pass from the moment at which the last rank begins until all have the sum?

# %%
delays = predict("line delays of an all-reduce in a ring", K=2, unit="line delays", value=None)  # put your guess here

# %% [markdown]
# The alternative: every rank sends its slots directly to every other rank (`Gathering`, in `course_utils/transfer.py`). The receives are posted together with the sends, or
# earlier, at the start of the step.

# %%
from dataclasses import replace

from course_utils.transfer import Gathering


def ways_over_the_line(worker, slots, repetitions=3):
    """For each way, when it began and ended on this rank."""
    worker, times = replace(worker, transport=SlowLine(worker.transport)), {}
    for _ in range(repetitions):
        for name in ("ring", "direct", "direct, posted early"):
            early = Gathering(worker.transport, 4 * len(slots), "norms") if "early" in name else None
            time.sleep(0.060)  # the step
            began = time.perf_counter()
            if name == "ring":
                ring_all_reduce(worker, slots)
            else:
                late = early or Gathering(worker.transport, 4 * len(slots), "norms")
                late.share(slots.view(torch.uint8))
            times.setdefault(name, []).append((began, time.perf_counter()))
    return times


# %%
def count_delays(K, name="ring"):
    """From when the last rank began to when the last ended, in line delays; the shortest of three."""
    ranks = launched[K]
    rounds = zip(*(rank[name] for rank in ranks), strict=True)
    return min((max(end for _, end in r) - max(began for began, _ in r)) / 0.020 for r in rounds)


# %% tags=["claim:delays"]
launched = {K: launch(ways_over_the_line, K, both[0]) for K in (2, 3, 4)}
counted = {f"ring, K={K}": count_delays(K) for K in launched}
counted |= {f"{name}, K=2": count_delays(2, name) for name in ("direct", "direct, posted early")}
for K in launched:
    assert counted[f"ring, K={K}"] > 4 * (K - 1) - 0.1
assert counted["ring, K=2"] > counted["direct, K=2"] > counted["direct, posted early, K=2"] > 0.9
delays = delays.settle(measured=counted["ring, K=2"], formula=4)

# %%
from course_utils.charts import describe_bars, draw_bars

title = "Norms to every rank: emulated line of 20 ms, real messages"

# %%
says = f"{describe_bars(counted, 'line delays', title)} {describe_prediction(delays)}"
show(draw_bars(counted, "line delays", title), says=says)

# %% [markdown]
# A ring has $2(K-1)$ messages after one another, and each costs two delays: one for the notice that its receive is posted, one for the message. Sent directly,
# no message waits for another. With receives posted early the notices have arrived long before, and one delay is left.
#
# ## In a run, next to none
# Here are runs with sleeping stages over the emulated line: without any exchange, with our all-reduce after each step, and with the direct exchange,
# its receives posted early. Which of the last two takes no longer than the first?

# %%
from course_utils.emulation import SleepingStage
from course_utils.number_words import collate
from course_utils.timeline import Timeline, merge
from course_utils.transformer import CarrySpec

shape = (8, 16, 32)  # of a message between the stages
specs = (CarrySpec(shape, torch.float32, True), None)


# %%
def emulated_steps(worker, way, num_slots=47, steps=5):
    """A rank's timeline of a run whose stages only sleep; the exchange is recorded as a wait."""
    transport, rank = SlowLine(worker.transport), worker.rank
    slots, pieces = torch.zeros(num_slots), 4 * [collate([1])]
    stage = SleepingStage(rank, 2, shape, forward=0.005, backward=0.010, recompute=0.005)
    pipeline = Pipeline({rank: stage}, gpipe(2, 4), transport, lambda *_: specs, loss=lambda hidden, *_: hidden.sum())
    pipeline.timeline = Timeline(2, f"{way}: emulated compute, emulated line of 20 ms, real messages", "seconds")
    agree(transport, plan := pipeline.plan(pieces))
    for t in range(steps):
        early = Gathering(transport, 4 * num_slots, "norms") if way == "exchange" else None
        pipeline.step(pieces, plan, 1, dropout_key=(0, t))
        if t + 1 < steps:
            pipeline.expect(plan)  # posts the first receives of the next step
        began = time.perf_counter()
        if way == "all-reduce":
            ring_all_reduce(replace(worker, transport=transport), slots)
        elif early:
            early.share(slots.view(torch.uint8))
        pipeline.timeline.add(rank, "w", rank, 3, began, time.perf_counter())
    return pipeline.timeline


# %% [markdown]
# Other work of this machine would spoil a comparison, so the three take turns, and the shortest step of each counts, the first ones left out:


# %%
def in_turns(worker, rounds=2):
    ways = ("no exchange", "all-reduce", "exchange")
    return [{way: emulated_steps(worker, way) for way in ways} for _ in range(rounds)]


def starts(timeline):
    """When rank 0 began its steps."""
    return sorted(i.start for i in timeline if (i.rank, i.kind, i.micro_batch) == (0, "F", 0))


def shortest_step(timeline):
    return min(later - earlier for earlier, later in pairwise(starts(timeline)[1:]))


# %% tags=["claim:none"]
from itertools import pairwise

rank_0, rank_1 = launch(in_turns, 2)
rounds = [{way: merge([one[way], other[way]]) for way in one} for one, other in zip(rank_0, rank_1, strict=True)]
periods = {way: min(shortest_step(round[way]) for round in rounds) for way in rounds[0]}
cost = {way: (period - periods["no exchange"]) / 0.020 for way, period in periods.items()}
for way in ("all-reduce", "exchange"):
    print(f"{way}: a step takes {round(cost[way], 1) + 0.0:.1f} line delays longer than without any exchange")
assert cost["all-reduce"] - cost["exchange"] > 2 and cost["exchange"] < 1

# %%
from course_utils.plots import describe_timeline, draw_timelines


def steps_of(timeline, first, last):
    """Some of the steps of a timeline of several, for a picture."""
    began, shown = starts(timeline), Timeline(timeline.num_ranks, timeline.label, timeline.unit)
    for i in timeline:
        if began[first] <= i.start and i.end <= began[last]:
            shown.add(*i)
    return shown


two_steps = [steps_of(timeline, 2, 4) for timeline in rounds[-1].values()]

# %%
show(draw_timelines(two_steps), says=" ".join(describe_timeline(t, with_bubble=False) for t in two_steps))

# %% [markdown]
# Look at the gaps between the steps of rank 0. With the all-reduce it stands still for four delays. With the exchange rank 0, which ends its step last, finds the norms of rank 1 there already:
# they left right after the last gradient, and came while rank 0 computed. Rank 1 does wait for the norms of rank 0, but the next activations could not
# come sooner: they travel over the same line, later. (Root on Linux can time steps over a line that really is slow: `python -m tests.benchmarks.delay_line`.)
#
# The package's exchange is `StepAgreement`. It opens at the step's start, and its message has 32 bytes more, a digest of the next
# step's plan, so that ranks whose plans differ find out before data moves:

# %%
import inspect

from course_utils.transfer import StepAgreement

print(inspect.getsource(StepAgreement.share).rpartition('"""')[2])

# %% [markdown]
# ## A run that clips
# Now the training loop of one rank, each step clipped to 0.5. `spoil` and `shared` are for mistakes, later; the record, from which fingerprints are made, contains the losses and the
# *clipped* gradients.

# %%
from course_utils.fingerprints import StageRecord, fingerprint


def pieces_of(t):
    return batch(range(1000), seed=0, step=t, size=32).split(4)


# %%
@one_thread()
def on_one_device(steps=6, max_norm=0.5):
    """The reference: torch's own clipping of the whole model."""
    model, record, norms = whole.build(0, seed=0), StageRecord(), []
    for t in range(steps):
        model.zero_grad()
        num_tokens, losses = sum(piece.num_tokens for piece in pieces_of(t)), {}
        for m, piece in enumerate(pieces_of(t)):
            losses[m] = sum_over_tokens(model((None, None), piece)[0], piece, num_tokens)
            losses[m].backward()
        norms.append(clip_grad_norm_(model.parameters(), max_norm).item())
        record.add_losses(losses)
        record.add_gradients(model.named_parameters_globally())
        descend(model.parameters())
    return record.summary(), norms


# %%
def train_a_rank(worker, cut, steps=6, max_norm=0.5, spoil=None, shared=True):
    K, stage, record, log = worker.world_size, cut.build(worker.rank, seed=0), StageRecord(), []
    named = list(stage.named_parameters_globally())
    pipeline = Pipeline({worker.rank: stage}, gpipe(K, 4), worker.transport, cut.carry_after)
    agreement = StepAgreement(worker.transport, len(place))
    agree(worker.transport, plan := pipeline.plan(pieces_of(0)))
    for t in range(steps):
        began = time.perf_counter()
        agreement.open()
        stage.zero_grad()
        losses = pipeline.step(pieces_of(t), plan, sum(piece.num_tokens for piece in pieces_of(t)))
        if spoil:
            spoil(worker.rank, t, named)
        plan = pipeline.plan(pieces_of(t + 1))
        times = [began, time.perf_counter()]
        own = slots_of(stage)
        times.append(time.perf_counter())
        norms = agreement.share(own, plan)
        times.append(time.perf_counter())
        norm = clip_by_global_norm(stage.parameters(), norms if shared else own, max_norm)
        log.append({"own": own.norm().item(), "norm": norm, "times": [*times, time.perf_counter()]})
        record.add_losses(losses)
        record.add_gradients(named)
        if math.isfinite(norm):
            descend(stage.parameters())
    return record.summary(), log


# %% tags=["fingerprint", "claim:same-bits"]
summary, reference = on_one_device()
strings = {"one device, torch's clip_grad_norm_": fingerprint([summary])}
for K in (2, 3):
    ranks = launch(train_a_rank, K, CutModel(config, by_count(6, K)))
    strings[f"{K} processes"] = fingerprint([summary for summary, _ in ranks])
    assert all([step["norm"] for step in log] == reference for _, log in ranks)
for name, string in strings.items():
    print(string, name)
assert len(set(strings.values())) == 1 and min(reference) > 0.5  # each step was clipped

# %% [markdown]
# The same bits, and the same norms on every rank in every step. With the mistake from above, each stage by its own norm:

# %% tags=["mistake", "claim:other-models"]
others = {}
for K in (2, 3):
    ranks = launch(train_a_rank, K, CutModel(config, by_count(6, K)), 6, 0.5, None, False)
    others[K] = fingerprint([summary for summary, _ in ranks])
    print(f"{others[K]} {K} processes, each stage clipped by its own norm")
assert len({*others.values(), *strings.values()}) == 3

# %% [markdown]
# Three strings, with the right one: three models. What does clipping cost where messages are fast, on this machine? From the log of rank 0, which
# ends its backwards last:

# %%
times = torch.tensor([step["times"] for step in launch(train_a_rank, 2, halves)[0][1]][1:], dtype=torch.float64)
shares = (times.diff(dim=1).sum(dim=0) / times.diff(dim=1).sum()).tolist()
parts_of_a_step = dict(
    zip(("the pipeline and the next plan", "own norms", "exchange", "clipping"), shares, strict=True)
)
for name, part in parts_of_a_step.items():
    print(f"{part:6.1%} of a step: {name}")
largest = max(list(parts_of_a_step)[1:], key=parts_of_a_step.get)
print(f"Of what clipping adds, the largest part is {largest} here, for a model with {len(place)} small parameters.")

# %% [markdown]
# ## A norm that is not finite
# Suppose that stage 1 gets a NaN in step 2. Stage 0 has none. Which of them should update its weights?


# %%
def plant_nan(rank, t, named):
    if rank == 1 and t == 2:
        named[0][1].grad.view(-1)[0] = math.nan


# %% tags=["nbval-check-output", "claim:skip"]
logs = [log for _, log in launch(train_a_rank, 2, halves, 4, 0.5, plant_nan)]
for rank, log in enumerate(logs):
    for whose in ("own", "norm"):
        decisions = ["update" if math.isfinite(step[whose]) else "skip" for step in log]
        print(f"rank {rank}, by {'its own' if whose == 'own' else 'the global'} norm: {', '.join(decisions)}")
assert [str(step["norm"]) for step in logs[0]] == [str(step["norm"]) for step in logs[1]]
assert math.isnan(logs[0][2]["norm"]) and math.isfinite(logs[0][2]["own"])

# %% [markdown]
# By the global norm both skip, and in the same step: every rank sees all slots, and a NaN makes any sum NaN. By its own norm
# stage 0 would have updated, and the two would belong to different models from then on ([lesson 08](08_mixed_precision.ipynb)). And `clip_grad_norm_`, on one device?

# %% tags=["mistake", "claim:nan-spreads"]
first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
first.grad, second.grad = torch.tensor([math.nan, 1, 1]), torch.ones(3)
clip_grad_norm_([first, second], 1.0)
print("after clip_grad_norm_, a gradient that was finite:", second.grad.tolist())
assert second.grad.isnan().all()

# %% [markdown]
# Clipping by a norm of NaN has made every gradient NaN. `error_if_nonfinite=True` raises an error instead; `clip_by_global_norm` touches nothing and
# returns the norm, so that the caller can skip.
#
# ## A mistake made on purpose: clip, then unscale
# With a loss scale $S$ gradients are $S$ times too large, and so is their norm. One line in the wrong place, as in
# [pytorch/examples#1196](https://github.com/pytorch/examples/issues/1196), and the bound is compared with $S \lVert \nabla L \rVert$. With
# $S = 65536$ and $c = 1$: what is the norm of a step?

# %%
unscaled = predict("norm of a step clipped before it is unscaled", S=65536, c=1, value=None)  # put your guess here

# %%
from torch.nn.utils import get_total_norm

from course_utils.optimization import LossScaler

scaler, seen = LossScaler(65536.0), {"clip, then unscale": [], "unscale, then clip": []}


def clip_then_unscale(parameters):
    clip_grad_norm_(parameters, 1.0)
    scaler.unscale(parameters)
    seen["clip, then unscale"].append(get_total_norm([p.grad for p in parameters]).item())


def unscale_then_clip(parameters):
    scaler.unscale(parameters)
    clip_grad_norm_(parameters, 1.0)
    seen["unscale, then clip"].append(get_total_norm([p.grad for p in parameters]).item())


# %% tags=["mistake", "claim:unscale"]
scaled = {"unscale, then clip": run(unscale_then_clip, 65536.0), "clip, then unscale": run(clip_then_unscale, 65536.0)}
untrained = run(lambda parameters: [p.grad.zero_() for p in parameters])
for name, losses in scaled.items():
    print(f"{name}: norms of steps up to {max(seen[name]):.3g}, last loss {losses[-1]:.2f}")
print(f"without any update: last loss {untrained[-1]:.2f}")
unscaled = unscaled.settle(measured=max(seen["clip, then unscale"]), formula=1 / 65536)
assert abs(max(seen["clip, then unscale"]) * 65536 - 1) < 1e-3
assert scaled["unscale, then clip"] == runs["clipped to norm 1"]
assert abs(scaled["clip, then unscale"][-1] - untrained[-1]) < 0.01

# %%
axes = ("step", "loss per token", "Loss scale 65536, clipped to norm 1")
says = f"{describe_lines(drawable(scaled), *axes)} {describe_prediction(unscaled)}"
show(draw_lines(drawable(scaled), *axes), says=says)

# %% [markdown]
# Every step is clipped, to $c/S$, and nothing is learnt. In the right order the run is the one without a loss scale, bit for bit: $S$ is a power of two. (Adam divides by the size of the
# gradients, which hides this mistake.)
#
# ## The last bit
# Instead of a slot per parameter, each rank could send one number: the sum of its squares. That is shorter, and common. Does it give the same norm? Out
# of 200 random gradients on two stages, in how many does the last bit differ from torch's norm on one device?

# %%
bits = predict("norms that differ when squares are summed per stage", cases=200, unit="of 200", value=None)


# %%
def random_stages(seed):
    """Two stages, each a list of pairs (place, parameter)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1, 7, 64, 300, 1000, 64, 7, 300)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (seed % 3 - 1)
    pairs = list(enumerate(parameters))
    return pairs[:5], pairs[5:]


# %%
def three_norms(stages):
    one_device = get_total_norm([p.grad for stage in stages for _, p in stage])
    slots = [gradient_norms(stage, 8) for stage in stages]
    squares = [own.norm() ** 2 for own in slots]
    return one_device.item(), (slots[0] + slots[1]).norm().item(), (squares[0] + squares[1]).sqrt().item()


# %% tags=["claim:last-bit"]
cases = [three_norms(random_stages(seed)) for seed in range(200)]
by_slots = sum(slots != right for right, slots, _ in cases)
by_squares = sum(squares != right for right, _, squares in cases)
furthest = max(abs(squares / right - 1) for right, _, squares in cases)
print(f"one slot per parameter: {by_slots} of 200 differ")
print(f"squares summed per stage: {by_squares} of 200 differ, by at most {furthest:.0e}")
bits = bits.settle(measured=by_squares)
assert by_slots == 0 and by_squares > 20 and furthest < 1e-6

# %%
differ = {"one slot per parameter": by_slots, "squares summed per stage": by_squares}
if bits.value is not None:
    differ["your prediction"] = bits.value
title = "Norms whose last bit is not that of one device"

# %%
says = f"{describe_bars(differ, 'of 200', title)} {describe_prediction(bits)}"
show(draw_bars(differ, "of 200", title), says=says)

# %% [markdown]
# Is one bit worth the longer message? The norm goes into every gradient:

# %% tags=["claim:all-elements"]
seed = next(seed for seed, (right, _, squares) in enumerate(cases) if squares != right)
right, _, squares = cases[seed]
gradient = torch.cat([p.grad for stage in random_stages(seed) for _, p in stage])
changed = int((gradient * (1 / torch.tensor(right)) != gradient * (1 / torch.tensor(squares))).sum())
print(f"case {seed}: after clipping, {changed} of {len(gradient)} elements have other bits")
print(f"the slots of the model of this lesson: {4 * len(place)} bytes")
assert changed > 0

# %% [markdown]
# From then on the weights cannot be compared with one device bit by bit, and a true mistake passes for rounding. A user of torchtitan traced a run that
# left its reference at step 15 to just this sum ([torchtitan#4312](https://github.com/pytorch/torchtitan/pull/4312)). And ranks must
# *decide* alike: to skip, to clip, to stop. The same vector, reduced in the same order by everyone, gives the same number on all ranks.

# %% [markdown] tags=["summary"]
# ## What you know now
# - One bad gradient can destroy a run; clipping keeps its step short. <!-- shown: saved -->
# - Clipping by each stage's own norm turns the step, by another angle for every number of stages. <!-- shown: direction -->
# - An all-reduce of one slot per parameter adds zeros: every rank gets the same bits. <!-- shown: all-reduce -->
# - A ring of messages does it for any number of ranks. <!-- shown: ring -->
# - The ring costs at least $4(K-1)$ line delays where gloo's rule holds; norms sent directly, with receives posted early, cost one. <!-- shown: delays -->
# - In a run the exchange costs less than one line delay per step, the all-reduce several. <!-- shown: none -->
# - Clipped runs on two and three ranks have the bits of torch's clipping on one device. <!-- shown: same-bits -->
# - With each stage's own norm, every number of stages trains another model. <!-- shown: other-models -->
# - A NaN on one stage makes all ranks skip alike. <!-- shown: skip -->
# - `clip_grad_norm_` spreads a NaN to every gradient. <!-- shown: nan-spreads -->
# - Gradients are unscaled first; else every step has norm $c/S$. <!-- shown: unscale -->
# - Squares summed per stage often miss the last bit, slots never do. <!-- shown: last-bit -->
# - One bit of the norm is carried into the gradients. <!-- shown: all-elements -->
#
# **Kept for later:** `gradient_norms`, `clip_by_global_norm`, `LossScaler` in `course_utils/optimization.py`; `Gathering`, `StepAgreement` in
# `transfer.py`; the loop in `train_rank`, `training.py`.
#
# **Practise:** take `pipeline.expect` out of `emulated_steps`. How many line delays does the exchange cost then, and why?
# Exercises: [unit 09](../exercises/09_gradient_clipping/09_gradient_clipping.ipynb).
#
# **Next:** [10 · The Noam warm-up](10_noam_warm_up.ipynb).

# %% [markdown]
# ## Questions
# 1. A stage has no parameters at all. May it leave out the exchange?
# 2. For slots the order in which an all-reduce adds does not matter. For gradients, as in data parallelism, it does. Why?
# 3. When is the ring better than sending directly?
# 4. Three ranks add up the squares of all stages, each its own first. What can go wrong?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. No: the others wait for its message, which also carries the digest of its plan. It fills no slot.
# 2. In a slot one term at most is not zero, so nothing is rounded. Gradients of replicas are all nonzero, and a sum of three rounds differently in another order.
# 3. When the vector is large. In a ring each rank sends $2(K-1)/K$ of it in all, directly $K-1$ times the whole of it; then bandwidth counts, not latency (lesson 03).
# 4. $a + b + c$ in another order may differ in the last bit. Two ranks may then scale by different numbers, and close to the bound one may clip and the other not.
#
# To practise: nearly two. Rank 1 now posts the receives of the next step only when it has the norms of rank 0, and its notice has to travel to rank 0 before
# the first activations may leave.
#
# The functions that you were asked to write:


# %% tags=["answers", "nbval-check-output"]
def gradient_norms(parameters, num_norms):
    """(num_norms,) zeros; for each pair (place, parameter) that has a gradient, its norm at that place."""
    norms = torch.zeros(num_norms)
    for place, parameter in parameters:
        if parameter.grad is not None:
            norms[place] = torch.linalg.vector_norm(parameter.grad)
    return norms


check("09.gradient_norms", gradient_norms)


# %% tags=["answers", "nbval-check-output"]
def clip_by_global_norm(parameters, norms, max_norm):
    """parameters: this rank's. norms: those of all ranks. Clip in place; return the global norm before, a float."""
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be above 0")
    total = torch.linalg.vector_norm(norms)
    if torch.isfinite(total):
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return total.item()


check("09.clip_by_global_norm", clip_by_global_norm)

# %% [markdown]
# ## References
# Pascanu, Mikolov and Bengio, 2013, *On the difficulty of training recurrent neural networks*, [arXiv 1211.5063](https://arxiv.org/abs/1211.5063), section 3.2 ·
# Micikevicius et al., 2018, *Mixed Precision Training*, [arXiv 1710.03740](https://arxiv.org/abs/1710.03740), section 3.2 · PyTorch:
# [clip_grad_norm_](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html),
# [get_total_norm](https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.get_total_norm.html),
# [all_reduce](https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.all_reduce),
# [unscale before clipping](https://docs.pytorch.org/docs/stable/notes/amp_examples.html#gradient-clipping).
