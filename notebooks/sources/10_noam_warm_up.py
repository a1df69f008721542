# %% [markdown] tags=["opening"]
# # 10 · The Noam warm-up
#
# **You will be able to** write the learning-rate schedule of the Transformer, keep it equal on all stages without a message, and say when a
# warm-up is needed and when it only costs steps.
#
# **You need** lessons [06](06_the_gpipe_schedule.ipynb) (the executor) and [09](09_gradient_clipping.ipynb) (the step that all ranks skip).
# **Minutes:** 30 to read, 1 to run.
#
# **New terms:** [learning-rate schedule](00_start_here.ipynb#learning-rate-schedule), [warm-up](00_start_here.ipynb#warm-up),
# [pre-norm](00_start_here.ipynb#pre-norm), [post-norm](00_start_here.ipynb#post-norm).
#
# In $w_{t+1} = w_t - \eta \nabla L(w_t)$ the learning rate $\eta$ was a constant so far. From now on it depends on the step.

# %% tags=["where"]
from course_utils.course_map import where

where("10")

# %% [markdown]
# ## Two halves and a peak
# Vaswani et al. (2017, section 5.3) trained the Transformer with this *learning-rate schedule*, often called Noam after one of the authors:
#
# $$\eta_n = \mathit{factor} \cdot d_\mathrm{model}^{-1/2} \cdot \min\left(n^{-1/2},\; n \cdot \mathit{warm\_up}^{-3/2}\right) \qquad n = 1, 2, 3, \ldots$$
#
# One term rises with the step $n$, the other falls. The smaller one counts: first the rise, the *warm-up*, then the fall. In the next cell look at
# the step at which the two are equal.

# %%
import math

d_model, warm_up, factor = 128, 150, 0.2  # the default recipe of the course


def rise(n):
    return factor * d_model**-0.5 * n * warm_up**-1.5


def fall(n):
    return factor * d_model**-0.5 * n**-0.5


# %% tags=["claim:peak"]
peak = factor / math.sqrt(d_model * warm_up)
print(f"step {warm_up}: rise {rise(warm_up):.6f}, fall {fall(warm_up):.6f}, peak {peak:.6f}")
assert math.isclose(rise(warm_up), fall(warm_up)) and math.isclose(rise(warm_up), peak)
assert max(range(1, 2000), key=lambda n: min(rise(n), fall(n))) == warm_up

# %% [markdown]
# They meet at $n = \mathit{warm\_up}$, where both are $\mathit{factor} / \sqrt{d_\mathrm{model} \cdot \mathit{warm\_up}}$. A longer
# warm-up has a lower peak. If it is four times as long, how high is the new peak, as a share of the old one?

# %%
from course_utils.predictions import predict

lower = predict("peak if the warm-up is four times as long", unit="of the old peak", value=None)  # put your guess here

# %%
from course_utils.charts import describe_lines, describe_prediction, draw_lines
from course_utils.plots import show

steps = range(30, 601, 30)
curves = {
    "the rise": {n: rise(n) for n in steps if n <= 200},
    "the fall": {n: fall(n) for n in steps if n >= 80},
    "the schedule": {n: min(rise(n), fall(n)) for n in steps},
    "warm-up of 600": {n: factor * d_model**-0.5 * n * 600**-1.5 for n in steps},
}

# %%
lower = lower.settle(measured=curves["warm-up of 600"][600] / peak, formula=0.5)
axes = ("step", "learning rate", "Two halves and a peak")

# %%
show(draw_lines(curves, *axes), says=f"{describe_lines(curves, *axes)} {describe_prediction(lower)}")

# %% [markdown]
# The schedule is the lower one of two lines. With a warm-up four times as long the peak is half as high. All warm-ups share the
# fall, and differ only in where they join it.

# %% [markdown] tags=["stub"]
# ## Write it first
# A scheduler in PyTorch is a subclass of `LRScheduler`. It has a counter, `last_epoch`, which is 0 before the first step and goes up by one in each `step()`; and the rates that
# the optimizer was built with, `base_lrs`, one per parameter group. The class asks `get_lr` for the rates, already when it is built, and writes them into
# the optimizer. `state_dict()` saves the counter. Write `get_lr`: the rates of the *coming* update, each base rate times the formula.

# %% tags=["stub", "nbval-check-output"]
from torch.optim.lr_scheduler import LRScheduler

from course_utils.checks import check


class Noam(LRScheduler):
    def __init__(self, optimizer, d_model, warm_up, factor=1.0):
        self.d_model, self.warm_up, self.factor = d_model, warm_up, factor
        super().__init__(optimizer)  # asks get_lr for the first time

    def get_lr(self):
        """A list with the rate of each parameter group."""
        ...  # your turn: about three lines


check("10.noam", Noam)

# %% [markdown]
# The package's version, with a base rate of 1.0, so that the formula alone decides. The counter starts at 0 and the formula at 1:

# %%
import torch

from course_utils.optimization import Noam


def small_run(scheduler=Noam, learning_rate=1.0, warm_up=3):
    """A weight, its optimizer and its scheduler."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([weight], lr=learning_rate, betas=(0.9, 0.98), eps=1e-9)
    return weight, optimizer, scheduler(optimizer, 128, warm_up)


# %%
def six_steps(weight, optimizer, scheduler):
    """The rate of each update, and the weight before and after each."""
    rates, weights = [], [weight.item()]
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        weights.append(weight.item())
    return rates, weights


# %% tags=["claim:first"]
used, weights = six_steps(*small_run())
print("rates of steps 1 to 6:", *(f"{rate:.4f}" for rate in used))
assert used[0] > 0 and max(used) == used[2] and weights[1] != weights[0]

# %% [markdown]
# ## A mistake made on purpose: count from 0
# Programmers count from 0. Then the fall has to be computed at 0, too ([yoyodyne#300](https://github.com/CUNY-CL/yoyodyne/pull/300)):


# %%
class CountsFromZero(Noam):
    def get_lr(self):
        n = self.last_epoch
        scale = self.factor * self.d_model**-0.5 * min((1 / n) ** 0.5, n * self.warm_up**-1.5)
        return [base * scale for base in self.base_lrs]


# %% tags=["mistake", "raises-exception", "nbval-check-output"]
small_run(CountsFromZero)

# %% [markdown]
# The error beats a wrong rate that nobody notices. It comes when the scheduler is built, since that asks for the first rate.
#
# ## A mistake made on purpose: the scheduler comes too late
# The article that this course started from builds Adam with learning rate 0 and lets its scheduler, which is no `LRScheduler`, set the rate *after* the update. So the rate of
# step 1 is not there when step 1 needs it. Look at what the first update changes:


# %%
class SetsAfterwards:
    """Counts from 1, by the right formula, and sets nothing when it is built."""

    def __init__(self, optimizer, d_model, warm_up):
        self.optimizer, self.d_model, self.warm_up, self.n = optimizer, d_model, warm_up, 0

    def step(self):
        self.n += 1
        rate = self.d_model**-0.5 * min(self.n**-0.5, self.n * self.warm_up**-1.5)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


# %% tags=["mistake", "nbval-check-output", "claim:order"]
weight, optimizer, late = small_run(SetsAfterwards, learning_rate=0.0)
used_late, weights = six_steps(weight, optimizer, late)
print("rate of the first update:", used_late[0])
print("updates that moved the weight:", [n for n in range(1, 7) if weights[n] != weights[n - 1]])
print("updates that Adam has counted:", int(optimizer.state[weight]["step"]))
assert used_late[0] == 0 and weights[0] == weights[1]
assert all(
    math.isclose(rate, of_the_step_before) for rate, of_the_step_before in zip(used_late[1:], used[:-1], strict=True)
)

# %% [markdown]
# A whole batch was computed for nothing, and everything after comes one step late. Nothing fails and the loss falls. Users reported a first update with rate 0 in
# [verl#3674](https://github.com/verl-project/verl/issues/3674) and [transformers#34754](https://github.com/huggingface/transformers/issues/34754). A constructor
# that sets the first rate, as `LRScheduler` has, and a formula that counts from 1 mend it. With such a scheduler the opposite order is wrong: if it steps *before* the
# optimizer, the first rate is lost, and torch says so:

# %% tags=["mistake", "nbval-check-output", "claim:too-early"]
import warnings

weight, optimizer, noam = small_run()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    noam.step()
print("the first update has the rate of step", 1 + used.index(optimizer.param_groups[0]["lr"]))
print("torch warns of the order:", "before `optimizer.step()`" in str(said[0].message))

# %% [markdown]
# ## The same on every stage, without a message
# The global norm of lesson 09 needed a message from every rank. What does the schedule need?
#
# Every rank builds its own scheduler, from the same three numbers, and counts the same steps. Here is lesson 09's loop of a rank, with Adam. Look at the `if` in `update`: optimizer and scheduler
# step together or not at all.

# %%
from course_utils.recipes import TrainingConfig, micro_batches_of, numbers_of
from course_utils.transformer import TransformerConfig

config = TrainingConfig(
    stages=2,
    micro_batches=4,
    steps=6,
    batch_size=16,
    warm_up=3,
    model=TransformerConfig(d_model=32, heads=4, encoder_layers=1, decoder_layers=1),
    highest=999,
    training_numbers=None,
    held_out=0,
)
numbers = numbers_of(config).training


# %%
def adam_and_noam(parameters, config):
    optimizer = torch.optim.Adam(list(parameters), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    return optimizer, Noam(optimizer, config.model.d_model, config.warm_up, config.learning_rate_factor)


# %%
from course_utils.fingerprints import StageRecord, fingerprint
from course_utils.optimization import clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline
from course_utils.schedules import gpipe
from course_utils.transfer import StepAgreement, agree


def update(stage, optimizer, noam, norms):
    """Clip by the norms of all ranks and update; or, if they are not finite, do nothing."""
    norm = clip_by_global_norm(stage.parameters(), norms, config.max_norm)
    if math.isfinite(norm):
        optimizer.step()
        noam.step()


# %%
def train_a_rank(worker, config, spoil=lambda rank, t, stage: None, update=update):
    cut, pieces = config.cut, micro_batches_of(config, numbers, 0)
    stage, schedule, record, log = cut.build(worker.rank, config.seed), gpipe(cut.num_stages, 4), StageRecord(), []
    optimizer, noam = adam_and_noam(stage.parameters(), config)
    place = {name: i for i, name in enumerate(cut.parameter_names)}
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after)
    agreement = StepAgreement(worker.transport, len(place))
    agree(worker.transport, plan := pipeline.plan(pieces))
    for t in range(config.steps):
        agreement.open()
        stage.zero_grad()
        record.add_losses(pipeline.step(pieces, plan, sum(piece.num_tokens for piece in pieces)))
        spoil(worker.rank, t, stage)
        named = list(stage.named_parameters_globally())
        record.add_gradients(named)
        pieces = micro_batches_of(config, numbers, t + 1)
        plan = pipeline.plan(pieces)
        norms = agreement.share(gradient_norms([(place[name], p) for name, p in named], len(place)), plan)
        rate, before = optimizer.param_groups[0]["lr"], snapshot(stage, optimizer, noam)
        update(stage, optimizer, noam, norms)
        log.append((rate, moved(before, snapshot(stage, optimizer, noam))))
    record.add_weights(named)
    return record.summary(), log


# %% [markdown]
# `snapshot` copies what an update may change, and `moved` says what of it did:


# %%
def snapshot(stage, optimizer, noam):
    adam = [tensor for of_one in optimizer.state.values() for tensor in of_one.values()]
    copies = {"weights": stage.parameters(), "Adam's state": adam, "rate": [torch.tensor(noam.get_last_lr())]}
    return {what: [tensor.detach().clone() for tensor in tensors] for what, tensors in copies.items()}


# %%
def moved(before, after):
    return [
        what
        for what in before
        if len(before[what]) != len(after[what])
        or not all(torch.equal(a, b) for a, b in zip(before[what], after[what], strict=True))
    ]


# %%
def rates_from(noam, steps):
    """The rates of the coming steps of a scheduler that no rank has."""
    rates = []
    for _ in range(steps):
        rates.append(noam.optimizer.param_groups[0]["lr"])
        noam.optimizer.step()
        noam.step()
    return rates


# %%
from dataclasses import replace

from course_utils.processes import launch
from course_utils.training import train_on_one_device

alone = rates_from(adam_and_noam([weight], config)[1], config.steps)

# %% tags=["fingerprint", "claim:same-bits"]
strings = {"one device": train_on_one_device(config).fingerprint}
for K in (2, 3):
    ranks = launch(train_a_rank, K, replace(config, stages=K))
    strings[f"{K} processes"] = fingerprint([summary for summary, _ in ranks])
    for _, log in ranks:
        assert [rate for rate, _ in log] == alone
for name, string in strings.items():
    print(string, name)
print("rates of every rank, and of a scheduler that knows of no other:", *(f"{rate:.5f}" for rate in alone))
assert len(set(strings.values())) == 1

# %% [markdown]
# Equal in every bit, although no rate was ever sent. It rests on one condition: all ranks count the same steps.
#
# ## A skipped step moves nothing
# One stage has a gradient that is not finite in step 2 (of 0, 1, 2, ...). Lesson 09 made all ranks skip. What else must stand still?


# %%
def plant_nan(rank, t, stage):
    if rank == 1 and t == 2:
        next(stage.parameters()).grad.view(-1)[0] = math.nan


# %% tags=["nbval-check-output", "claim:skip"]
logs = [log for _, log in launch(train_a_rank, 2, replace(config, steps=5), plant_nan)]
for rank, log in enumerate(logs):
    for t, (_, what) in enumerate(log):
        print(f"rank {rank}, step {t} moved: {', '.join(what) or 'nothing'}")
    rates = [rate for rate, _ in log]
    assert rates == [*alone[:3], *alone[2:4]]
    assert [what == [] for _, what in log] == [False, False, True, False, False]

# %% [markdown]
# Neither weights nor Adam's state nor rate, on either rank. The step after has the rate that the skipped one did not use. Now the same with ranks that decide
# by their own norms, lesson 09's mistake. Look at the rates:


# %%
def update_alone(stage, optimizer, noam, norms):
    own = torch.stack([parameter.grad.norm() for parameter in stage.parameters()])
    update(stage, optimizer, noam, own)


# %% tags=["mistake", "claim:alone"]
for rank, (_, log) in enumerate(launch(train_a_rank, 2, replace(config, steps=5), plant_nan, update_alone)):
    print(f"rank {rank}:", *(f"{rate:.5f}" for rate, _ in log))
    assert [rate for rate, _ in log] == (alone[:5] if rank == 0 else [*alone[:3], *alone[2:4]])

# %% [markdown]
# From the skip on the two ranks have different rates, for good. No message carries the rate, so nothing notices.
#
# A framework that lets the scheduler
# step all the same ([Lightning#18828](https://github.com/Lightning-AI/pytorch-lightning/issues/18828)) shortens the warm-up: a loss scale that starts
# too high skips just in the first steps. After ten of them, with which rate comes the first true update?

# %%
jump = predict("first true rate after ten counted skips", unit="times the rate of step 1", value=None)  # your guess

# %% tags=["mistake", "claim:skipped-warm-up"]
_, optimizer, counts_all = small_run(warm_up=150)
first_rate = counts_all.get_last_lr()[0]
for _ in range(10):
    optimizer.step()  # without gradients: it changes nothing
    counts_all.step()
jump = jump.settle(measured=counts_all.get_last_lr()[0] / first_rate, formula=11)
print(describe_prediction(jump))
assert math.isclose(jump.measured, 11)

# %% [markdown]
# ## Resume
# The counter is state, as weights are. A run of six steps is stopped after four. It goes on once with the scheduler's state, once without:

# %%
_, _, first = small_run()
rates_from(first, 4)
saved = {"optimizer": first.optimizer.state_dict(), "noam": first.state_dict()}
_, _, without = small_run()
without.optimizer.load_state_dict(saved["optimizer"])
_, _, resumed = small_run()
resumed.load_state_dict(saved["noam"])
resumed.optimizer.load_state_dict(saved["optimizer"])

# %% tags=["claim:resume"]
results = {"with its state": rates_from(resumed, 2), "without": rates_from(without, 2)}
for name, rates in {"never stopped": used[4:], **results}.items():
    print(f"{name:>15}: rates of steps 5 and 6", *(f"{rate:.4f}" for rate in rates))
assert results["with its state"] == used[4:] and results["without"] == [used[4], used[1]]

# %% [markdown]
# Without its state the second update of the new process has the rate of step 2: the warm-up starts again, on weights that are
# long past it. (The first one has the right rate, because Adam's state holds a copy of it; a scheduler that is loaded writes nothing into the optimizer until its next step. So
# load both.)
#
# ## Why a warm-up at all: pre-norm and post-norm
# Our layers are *pre-norm*: $x + f(\mathrm{norm}(x))$. Those of Vaswani et al. are *post-norm*: $\mathrm{norm}(x + f(x))$. Here they are, without dropout:

# %%
from course_utils.stages import Stage, one_thread
from course_utils.transformer import (
    DecoderLayer,
    EncoderLayer,
    LastDecoderLayer,
    block_builders,
    padding_mask,
    target_mask,
)


# %%
class PostNormEncoderLayer(EncoderLayer):
    def forward(self, carry, micro_batch, generator=None):
        x = carry[0]
        x = self.attention_norm(x + self.attention(x, x, padding_mask(micro_batch.source)))
        return self.feedforward_norm(x + self.feedforward(x)), None


# %%
class PostNormDecoderLayer(DecoderLayer):
    def forward(self, carry, micro_batch, generator=None):
        x, memory = carry
        x = self.self_attention_norm(x + self.self_attention(x, x, target_mask(micro_batch.target_input)))
        x = self.cross_attention_norm(x + self.cross_attention(x, memory, padding_mask(micro_batch.source)))
        return self.feedforward_norm(x + self.feedforward(x)), memory


# %%
class LastPostNormDecoderLayer(PostNormDecoderLayer):
    def forward(self, carry, micro_batch, generator=None):
        return super().forward(carry, micro_batch, generator)[0], None


# %%
POST_NORM = {
    EncoderLayer: PostNormEncoderLayer,
    DecoderLayer: PostNormDecoderLayer,
    LastDecoderLayer: LastPostNormDecoderLayer,
}


# %%
def build(kind, layers, seed):
    """The whole model; both kinds start from the same weights."""
    builders = block_builders(TransformerConfig(32, 4, encoder_layers=layers, decoder_layers=layers))
    if kind == "post-norm":
        builders = [replace(builder, kind=POST_NORM.get(builder.kind, builder.kind)) for builder in builders]
    return Stage(0, 1, builders, seed)


# %% [markdown]
# Xiong et al. (2020, section 3) computed the gradients of both before the first step. In post-norm those near the output are large, however
# deep the model is; in pre-norm they shrink with its depth. That can be measured, in the feed-forward of the last layer:

# %%
from course_utils.number_words import batch
from course_utils.pipeline import sum_over_tokens


def loss_of(model, seed, t):
    mini_batch = batch(range(1000), seed=seed, step=t, size=16)
    return sum_over_tokens(model((None, None), mini_batch)[0], mini_batch, mini_batch.num_tokens)


# %%
@one_thread()
def last_gradient(kind, layers, seed):
    model = build(kind, layers, seed)
    loss_of(model, seed, 0).backward()
    return model.blocks[-2].feedforward.contract.weight.grad.norm().item()


# %% tags=["claim:depth"]
depths = {
    kind: {L: sum(last_gradient(kind, L, seed) for seed in range(3)) / 3 for L in (1, 2, 4, 8, 16)}
    for kind in ("pre-norm", "post-norm")
}
ratios = {L: depths["post-norm"][L] / depths["pre-norm"][L] for L in (1, 16)}
for L, ratio in ratios.items():
    print(f"{L} + {L} layers: the gradient of post-norm is {ratio:.2f} times that of pre-norm")
assert ratios[16] > 1.3 * ratios[1] and depths["pre-norm"][16] < depths["pre-norm"][1]

# %%
axes = ("layers", "norm of the gradient", "The last feed-forward, untrained; layers of encoder and decoder each")
show(draw_lines(depths, *axes, log_x=True), says=describe_lines(depths, *axes))

# %% [markdown]
# The gap grows with depth; theory bounds the gradient in pre-norm by $1/\sqrt{\mathrm{layers}}$ times a constant, that of post-norm by a constant. And a high rate meets an
# Adam that knows nothing yet: it divides each gradient by the size of the earlier ones, of which there are none. How far does a weight move in the first update?

# %%
first_move = predict("least move of 95 % of the weights in Adam's first update", unit="rates", value=None)  # your guess

# %%
model = build("post-norm", 4, seed=0)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-9)
loss_of(model, 0, 0).backward()
gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
old = torch.cat([p.detach().flatten() for p in model.parameters()])
optimizer.step()
new = torch.cat([p.detach().flatten() for p in model.parameters()])

# %% tags=["claim:first-update"]
moves = ((new - old).abs() / 0.01)[gradient != 0]
low, high = (gradient[gradient != 0].abs().quantile(share).item() for share in (0.05, 0.95))
first_move = first_move.settle(measured=moves.quantile(0.05).item(), formula=1)
print(f"gradients that are not 0, from 5 % to 95 % of them: {low:.1e} to {high:.1e}")
print(describe_prediction(first_move))
assert first_move.measured > 0.99 and moves.max() < 1.01 and high > 20 * low

# %% [markdown]
# By the whole rate, in the direction of the sign that a single batch gave: large gradients and tiny ones alike. A warm-up makes just these steps short.
#
# ## Two by two
# Four runs with a peak rate of 0.01, each with three seeds: pre-norm and post-norm, with the warm-up and without. `NoWarmUp` has the
# same fall, and before it the peak's rate from the first step on. Post-norm without a warm-up: its loss in the last ten steps is how many times that with one?


# %%
class NoWarmUp(Noam):
    def get_lr(self):
        n = max(self.last_epoch + 1, self.warm_up)
        return [base * self.factor * (self.d_model * n) ** -0.5 for base in self.base_lrs]


# %%
def train(kind, scheduler, seed, peak=0.01, steps=100, warm_up=50):
    """The loss of each step of a small model of four layers and four layers."""
    model, losses = build(kind, 4, seed), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    schedule = scheduler(optimizer, 32, warm_up, factor=peak * math.sqrt(32 * warm_up))
    for t in range(steps):
        loss = loss_of(model, seed, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# %%
worse = predict("loss without warm-up over loss with it, post-norm", unit="times", value=None)  # put your guess here

# %%
KINDS, SCHEDULERS = ("pre-norm", "post-norm"), {"warm-up": Noam, "no warm-up": NoWarmUp}


def runs_of(worker):
    """No pipeline: each process trains whole models of one kind, so that two cores have something to do."""
    kind = KINDS[worker.rank]
    return {f"{kind}, {name}": [train(kind, s, seed) for seed in range(3)] for name, s in SCHEDULERS.items()}


pre_norm, post_norm = launch(runs_of, 2)
cases = {**pre_norm, **post_norm}

# %% tags=["claim:two-by-two"]
last = {case: [sum(losses[-10:]) / 10 for losses in runs] for case, runs in cases.items()}
for case, values in last.items():
    print(f"{case:>21}: loss of the last ten steps {', '.join(f'{value:.2f}' for value in values)}")
for seed in range(3):
    worst = last["post-norm, no warm-up"][seed]
    assert worst > 1.4 * last["post-norm, warm-up"][seed] and worst == max(values[seed] for values in last.values())

# %% tags=["claim:pre-norm"]
mean = {case: sum(values) / 3 for case, values in last.items()}
times = {kind: mean[f"{kind}, no warm-up"] / mean[f"{kind}, warm-up"] for kind in KINDS}
for kind, ratio in times.items():
    print(f"{kind}: without the warm-up {ratio:.1f} times the loss")
worse = worse.settle(measured=times["post-norm"])
assert times["pre-norm"] < times["post-norm"]

# %%
averaged = {
    case: {t + 5: sum(sum(run[t : t + 5]) for run in runs) / 15 for t in range(0, 100, 5)}
    for case, runs in cases.items()
}
axes = ("step", "loss per token", "Mean of three seeds, peak rate 0.01")

# %%
show(draw_lines(averaged, *axes), says=f"{describe_lines(averaged, *axes)} {describe_prediction(worse)}")

# %% [markdown]
# Each point is the mean of five steps. From step 50 on all four have the same rates, and still the first steps decide: post-norm without a warm-up stays behind in every
# seed. Pre-norm suffers less. But this is one peak rate, of a small model in a short run. With a fifth of it:

# %% tags=["claim:low-rate"]
with one_thread():
    low = {name: train("post-norm", scheduler, 0, peak=0.002) for name, scheduler in SCHEDULERS.items()}
ends = {name: sum(losses[-10:]) / 10 for name, losses in low.items()}
for name, loss in ends.items():
    print(f"post-norm, peak rate 0.002, {name}: loss of the last ten steps {loss:.2f}")
assert ends["no warm-up"] < ends["warm-up"] < 1

# %% [markdown]
# Here the warm-up only costs steps. It is what makes a *high* rate possible, and post-norm needs it sooner.
#
# ## A recipe that never leaves its warm-up
# The article trains for 290 steps and warms up for 4000. The default recipe of the course reaches its peak in step 150. At step 290, the article's last,
# which share of the default's peak has its rate come to?

# %%
share = predict("article's last rate over the default's peak", step=290, value=None)  # put your guess here

# %%
from course_utils.recipes import RECIPES

article = RECIPES["article"]
both = {
    name: rates_from(adam_and_noam([weight], RECIPES[name])[1], RECIPES[name].steps) for name in ("default", "article")
}

# %% tags=["claim:article"]
share = share.settle(measured=both["article"][-1] / max(both["default"]))
print(
    f"article, step {article.steps}: {both['article'][-1]:.2e}, its highest; default, peak: {max(both['default']):.2e}"
)
print(f"the default of torch's Adam: {torch.optim.Adam([weight]).defaults['lr']:.2e}")
print(f"the article's whole warm-up would end at {(article.model.d_model * article.warm_up) ** -0.5:.2e}")
assert max(both["article"]) == both["article"][-1] and share.measured < 0.1

# %%
drawn = {name: {n + 1: rates[n] for n in range(9, len(rates), 20)} for name, rates in both.items()}
axes = ("step", "learning rate", "The two recipes")
show(draw_lines(drawn, *axes, log_y=True), says=f"{describe_lines(drawn, *axes)} {describe_prediction(share)}")

# %% [markdown]
# Less than a tenth, and only at the end. Does it learn at all? Run it, and look at how far its weights come:

# %%
result = train_on_one_device(replace(article, micro_batches=1))  # one device need not divide its batches
before = dict(replace(article, stages=1).cut.build(0, article.seed).named_parameters_globally())

# %% tags=["claim:works"]
distances = torch.cat([(result.weights[name] - w.detach()).abs().flatten() for name, w in before.items()])
sizes = torch.cat([w.detach().abs().flatten() for w in before.values()])
print(f"right answers to numbers it has not seen: {result.exact_match:.0%}")
print(f"the sum of all its rates: {sum(both['article']):.4f}")
print(f"half of the weights moved by less than {distances.median():.4f}, none by more than {distances.max():.4f}")
print(f"half of them were smaller than {sizes.median():.4f} before")
assert result.exact_match > 0.8
assert distances.max() < 2 * sum(both["article"]) and distances.median() < sizes.median() / 4

# %% [markdown]
# Adam moves a weight by about the rate, so in 290 steps by about the sum of all rates at most; most moved by much less, and by a small part of
# what they were. For numbers below a thousand that is enough, from weights that start at a good size (`initialise` in `course_utils/transformer.py` says what larger ones
# would need). And its last steps have a tenth of what torch's Adam takes by default, which is nothing unusual. So it works as a run with a low rate; its long warm-up is a slow way to get there.

# %% [markdown] tags=["summary"]
# ## What you know now
# - The two halves meet at step $\mathit{warm\_up}$, at $\mathit{factor}/\sqrt{d_\mathrm{model} \cdot \mathit{warm\_up}}$. <!-- shown: peak -->
# - The formula counts from 1, so the first update has a rate above 0. <!-- shown: first -->
# - A scheduler that sets its rate only after the update loses the first one and is late by a step. <!-- shown: order -->
# - An `LRScheduler` that steps before the optimizer loses the first rate. <!-- shown: too-early -->
# - Each stage counts for itself; rates and fingerprint are those of one device. <!-- shown: same-bits -->
# - A skipped step moves neither weights nor Adam's state nor rate, on any rank. <!-- shown: skip -->
# - Ranks that skip on their own have different rates from then on. <!-- shown: alone -->
# - A scheduler that counts skipped steps shortens the warm-up. <!-- shown: skipped-warm-up -->
# - A resumed run goes on at the same rate only if the scheduler's state was saved. <!-- shown: resume -->
# - Before the first step, post-norm's gradients near the output do not shrink with depth as pre-norm's do. <!-- shown: depth -->
# - Adam's first update moves a weight by the whole rate, whatever the size of its gradient. <!-- shown: first-update -->
# - At a high rate post-norm without a warm-up is the worst of the four, in every seed. <!-- shown: two-by-two -->
# - Pre-norm suffers less from a missing warm-up. <!-- shown: pre-norm -->
# - At a low rate the warm-up only costs steps. <!-- shown: low-rate -->
# - The article's rate rises to its last step and stays below a tenth of the default's peak. <!-- shown: article -->
# - It learns all the same, with small moves of its weights. <!-- shown: works -->
#
# **Kept for later:** `Noam` in `course_utils/optimization.py`; `TrainingState` in `training_state.py`; `RECIPES` in `recipes.py`.
#
# **Practise:** write the schedule with a straight fall to 0 at a last step, and resume it with another number of steps. What happens to the rate?
# Exercises: [unit 10](../exercises/10_noam_warm_up/10_noam_warm_up.ipynb).
#
# **Next:** [11 · Train it all](11_train_it_all.ipynb).

# %% [markdown]
# ## Questions
# 1. You double $d_\mathrm{model}$ and want the same peak at the same step. What do you change?
# 2. Ranks share no rate. Which mistakes could give them different ones all the same?
# 3. The number of micro-batches doubles, with the same mini-batch. Does the schedule change?
# 4. A run at a high rate with post-norm fails, with a warm-up of 50 steps. Name two things to try.

# %% [markdown] tags=["answers"]
# ## Answers
# 1. The factor: times $\sqrt 2$.
# 2. Another configuration on one rank; a rank that skips alone, or counts a skipped step; one that resumes from another checkpoint. The package compares configuration and checkpoint before the first step,
#    and decides skips by the norms of all.
# 3. No. It counts updates, and a mini-batch is one update, in however many pieces.
# 4. A longer warm-up, which also lowers the peak; a lower factor; pre-norm.
#
# The function that you were asked to write, in the whole class, which also refuses what makes no sense:


# %% tags=["answers", "nbval-check-output"]
class Noam(LRScheduler):
    def __init__(self, optimizer, d_model, warm_up, factor=1.0):
        for name, value in (("d_model", d_model), ("warm_up", warm_up)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not factor > 0:
            raise ValueError(f"factor is {factor}; it must be above 0")
        self.d_model, self.warm_up, self.factor = d_model, warm_up, factor
        super().__init__(optimizer)

    def get_lr(self):
        step = self.last_epoch + 1
        scale = self.factor * self.d_model**-0.5 * min(step**-0.5, step * self.warm_up**-1.5)
        return [base * scale for base in self.base_lrs]


check("10.noam", Noam)

# %% [markdown]
# ## References
# Vaswani et al., 2017, *Attention Is All You Need*, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762), section 5.3 ·
# Xiong et al., 2020, *On Layer Normalization in the Transformer Architecture*, [arXiv 2002.04745](https://arxiv.org/abs/2002.04745), section 3 ·
# Kingma and Ba, 2015, *Adam*, [arXiv 1412.6980](https://arxiv.org/abs/1412.6980), section 2.1 · PyTorch:
# [how to adjust the learning rate](https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate),
# [LRScheduler](https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LRScheduler.html).
