# %% [markdown] tags=["opening"]
# # 08 · Mixed precision
#
# **You will be able to** train with matrix products in 16 bits over any number of stages: scale the loss, skip a step on all stages or on
# none, keep one copy of the weights, and say what each format can lose.
#
# **You need** lessons [05](05_micro_batches.ipynb) (the loss of a micro-batch), [06](06_the_gpipe_schedule.ipynb) (the executor) and
# [07](07_bubble_and_stash.ipynb) (the stash). **Minutes:** 35 to read, 1 to run.
#
# **New terms:** [mixed precision](00_start_here.ipynb#mixed-precision), [bfloat16](00_start_here.ipynb#bfloat16),
# [underflow](00_start_here.ipynb#underflow), [loss scale](00_start_here.ipynb#loss-scale),
# [master weights](00_start_here.ipynb#master-weights), [autocast](00_start_here.ipynb#autocast).
#
# Lesson 07 paid for a small bubble with memory. A number of 16 bits takes half the memory of a float32. Two of the mistakes that come with it exist in
# pipelines only.

# %% tags=["where"]
from course_utils.course_map import where

where("08")

# %% [markdown]
# ## Three formats, bit by bit
# A floating-point number is a sign, an exponent and a mantissa: $\pm 1.\text{mantissa} \cdot 2^{\text{exponent}}$. Here is 0.1 three times. Compare
# the lengths of the exponents first, then those of the mantissas. (Exponents are stored with a constant added, another one in fp16.)

# %% tags=["nbval-check-output"]
import torch

FORMATS = {"fp32": (torch.float32, 8), "bf16": (torch.bfloat16, 8), "fp16": (torch.float16, 5)}  # dtype, exponent bits


def fields(number, dtype, exponent_bits):
    """Sign, exponent and mantissa, as strings of bits."""
    size = 8 * dtype.itemsize
    integer = torch.tensor(number, dtype=dtype).view(torch.int32 if size == 32 else torch.int16).item()
    bits = f"{integer % 2**size:0{size}b}"
    return bits[0], bits[1 : 1 + exponent_bits], bits[1 + exponent_bits :]


for name, (dtype, exponent_bits) in FORMATS.items():
    print(name, *fields(0.1, dtype, exponent_bits), "=", torch.tensor(0.1, dtype=dtype).double().item())


# %%
def draw_bits():
    figure, axes = new_figure(2.2)
    colours = {"sign": "#f0e442", "exponent": "#56b4e9", "mantissa": "#eeeeee"}
    for row, spec in enumerate(FORMATS.values()):
        parts = zip(colours, fields(0.1, *spec), strict=True)
        bits = [(part, bit) for part, string in parts for bit in string]
        for place, (part, bit) in enumerate(bits):
            axes.barh(row, 1, left=place, height=0.7, color=colours[part], edgecolor="#404040")
            axes.text(place + 0.5, row, bit, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(3), list(FORMATS))
    axes.set(xlim=(-0.5, 32.5), xlabel="bit", title="0.1: sign (yellow), exponent (blue), mantissa (grey)")
    axes.invert_yaxis()
    return figure


# %%
from course_utils.plots import new_figure, show

lengths = {name: [len(part) for part in fields(0.1, *spec)] for name, spec in FORMATS.items()}
show(draw_bits(), says=f"Bits of sign, exponent and mantissa: {lengths}.")

# %% [markdown]
# *bfloat16* is float32 with the last 16 bits cut off, and rounded: the same exponents, so the same range, and a short mantissa. float16 has three more
# bits of mantissa than bfloat16, and three fewer of exponent. What that means in numbers:

# %% tags=["nbval-check-output", "claim:formats"]
for name, (dtype, _) in FORMATS.items():
    info = torch.finfo(dtype)
    print(
        f"{name}: largest {info.max:.3g}, smallest normal {info.smallest_normal:.3g}, from 1 to the next {info.eps:g}"
    )
assert torch.finfo(torch.float16).max < 1e5 < 1e38 < torch.finfo(torch.bfloat16).max
assert torch.finfo(torch.bfloat16).eps == 8 * torch.finfo(torch.float16).eps

# %% [markdown]
# So bf16 is coarse, and fp16 is narrow. (Below the smallest *normal* number the mantissa loses one bit after the other, until only 0 is left.) Mixed precision (Micikevicius et al., 2018) lives with both: it computes matrix products in 16 bits
# and keeps weights, gradients and the optimizer's state in 32.
#
# ## Small gradients vanish
# A micro-batch's loss is divided by the tokens of the whole mini-batch, *before* its backward (lesson 05). Suppose these 32 rows belong to a mini-batch of
# $2^{20}$ tokens. Here they are computed in float32, then converted. Of those that are not 0, which share becomes 0 in fp16?
# (A number that becomes 0 because it is too small has *underflowed*.)

# %%
from course_utils.predictions import predict

vanish = predict("gradients that vanish in fp16", N="2**20", unit="% of those that are not 0", value=None)  # your guess

# %%
from course_utils.number_words import batch
from course_utils.pipeline import sum_over_tokens
from course_utils.stages import CutModel, by_count
from course_utils.transformer import TransformerConfig

torch.set_num_threads(1)  # as every stage has it
small = TransformerConfig(d_model=32, heads=4, encoder_layers=1, decoder_layers=1)
whole, rows = CutModel(small, by_count(6, 1)), batch(range(1000), seed=0, step=0, size=32)


def gradients(loss_scale, num_tokens=2**20):
    """All gradients of the loss times `loss_scale`, in one vector."""
    model = whole.build(0, seed=0)
    loss = sum_over_tokens(model((None, None), rows)[0], rows, num_tokens)
    (loss * loss_scale).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# %% tags=["claim:underflow"]
def vanished(gradient, dtype):
    nonzero = gradient[gradient != 0]
    return 100 * (nonzero.to(dtype) == 0).float().mean().item()


plain, scaled = gradients(1.0), gradients(2.0**16)
shares = {"fp16": vanished(plain, torch.float16), "bf16": vanished(plain, torch.bfloat16)}
shares["fp16, loss times 65536"] = vanished(scaled, torch.float16)
print({name: f"{share:.2f} %" for name, share in shares.items()})
assert shares["fp16"] > 10 and shares["bf16"] == 0 and shares["fp16, loss times 65536"] < 0.1
vanish = vanish.settle(measured=shares["fp16"])

# %%
from course_utils.charts import describe_prediction


def draw_sizes():
    figure, axes = new_figure(2.8)
    for gradient, label, colour in ((plain, "as they are", "#0072b2"), (scaled, "loss times 65536", "#d55e00")):
        sizes = gradient[gradient != 0].abs().log2().numpy()
        axes.hist(sizes, bins=range(-50, 20), histtype="step", color=colour, label=label, linewidth=1.5)
    axes.axvspan(-50, -25, color="#dddddd", label="0 in fp16")
    axes.axvspan(16, 20, facecolor="#ffffff", edgecolor="#808080", hatch="///", label="infinite in fp16")
    axes.set(xlabel="size of a gradient, power of 2", ylabel="number", title="Gradients and the range of fp16")
    axes.legend(loc="upper center", bbox_to_anchor=(0.8, 1.0))
    return figure


# %%
show(draw_sizes(), says=f"Two equal hills, 16 powers of two apart. {describe_prediction(vanish)}")

# %% [markdown]
# The hill has room to the right. A *loss scale* $S$ moves it there, because a gradient is linear in the loss: $\nabla(L \cdot S) = S \cdot \nabla L$. Multiply the
# loss before its backward, divide the gradients after it. A power of two changes exponents only, so no mantissa is rounded; other factors round:

# %% tags=["nbval-check-output", "claim:linear"]
for S in (2.0**16, 1000.0):
    same = torch.equal(gradients(S, rows.num_tokens), S * gradients(1.0, rows.num_tokens))
    print(f"S = {S:g}: gradients of S L are S times those of L, {'to the last bit' if same else 'but for rounding'}")
    assert same == (S == 2.0**16)

# %% [markdown]
# ## Master weights
# Why not keep the weights in 16 bits too? In bf16 the next number above 1 is $2^{-7}$ away, and the one below $2^{-8}$. An update of less than half that
# distance is rounded away, every time, and a step of Adam is about as large as the learning rate. With a learning rate of 0.0001, which share of the weights has not
# moved after 40 steps? (Only the stored weights are rounded here; the products stay in float32.)

# %%
stuck = predict("weights in bf16 that never moved", steps=40, learning_rate=0.0001, unit="%", value=None)


# %%
def round_to(dtype, tensors):
    """What is left of numbers that were stored in another format. (They go on as float32.)"""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(tensor.to(dtype))


def train_weights(stored_as):
    """The model's weights before and after 40 steps."""
    model = whole.build(0, seed=0)
    round_to(torch.bfloat16, model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for t in range(40):
        mini_batch = batch(range(1000), seed=0, step=t, size=32)
        optimizer.zero_grad()
        sum_over_tokens(model((None, None), mini_batch)[0], mini_batch, mini_batch.num_tokens).backward()
        optimizer.step()
        round_to(stored_as, model.parameters())
    return before, list(model.parameters())


# %% tags=["mistake", "claim:master"]
still = {}
for name in ("fp32", "bf16"):
    pairs = list(zip(*train_weights(FORMATS[name][0]), strict=True))
    norms = [(old, new) for old, new in pairs if (old == 1).all()]  # the scales of layer norms begin at 1
    for kind, group in {"weights": pairs, "scales of norms": norms}.items():
        same, total = sum((a == b).sum().item() for a, b in group), sum(a.numel() for a, _ in group)
        still[name, kind] = same / total
        print(f"stored as {name}: {same:,} of {total:,} {kind} have not moved")
assert still["bf16", "scales of norms"] == 1 and still["bf16", "weights"] > 0.3 > 0.01 > still["fp32", "weights"]
print(describe_prediction(stuck.settle(measured=100 * still["bf16", "weights"])))

# %% [markdown]
# No scale of any norm has learnt anything, and no message said so. (What does not move in float32 either are embeddings without a gradient: of padding, and of the end, which is only ever predicted.) A project found all its norms exactly at 1 after whole trainings
# ([speculators#765](https://github.com/vllm-project/speculators/pull/765)). The cure is the paper's: the optimizer works on float32 *master weights*, and products use rounded copies.

# %% [markdown] tags=["stub"]
# ## Write it first
# Which $S$? As large as possible, and nobody knows beforehand how large that is. So try: a step whose gradients are not all finite is skipped, and the scale halved;
# after `growth_interval` good steps in a row it is doubled, and the count begins anew.

# %% tags=["stub", "nbval-check-output"]
from course_utils.checks import check


class LossScaler:
    def __init__(self, scale=65536.0, growth_interval=2000):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    def unscale(self, parameters):
        """Divide the gradients by the scale. A parameter may have none."""
        ...  # your turn: about three lines

    def update(self, skipped):
        """After every step: choose the scale of the next one."""
        ...  # your turn: about seven lines


check("08.loss_scaler", LossScaler)

# %% [markdown]
# The package's `LossScaler` beside `torch.amp.GradScaler`, on one device. The script makes steps 1, 2 and 6 overflow; a good step takes 1 from the weight.

# %%
import math

from course_utils.optimization import LossScaler

script = [t in (1, 2, 6) for t in range(9)]


def ours(weight, optimizer):
    scaler = LossScaler(1024.0, growth_interval=3)
    for overflows in script:
        weight.grad = None
        (weight * (math.inf if overflows else 1)).backward(torch.tensor(scaler.scale))  # the gradient of S L
        scaler.unscale([weight])
        if not (skipped := not weight.grad.isfinite()):
            optimizer.step()
        scaler.update(skipped)
        yield int(scaler.scale), int(weight)


# %%
def theirs(weight, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for overflows in script:
        weight.grad = None
        scaler.scale(weight * (math.inf if overflows else 1)).backward()
        scaler.step(optimizer)  # unscales, looks for values that are not finite, and may skip
        scaler.update()
        yield int(scaler.get_scale()), int(weight)


# %% tags=["nbval-check-output", "claim:as-torch"]
rows_of = {}
for run in (ours, theirs):
    weight = torch.nn.Parameter(torch.tensor(100.0))
    rows_of[run] = list(run(weight, torch.optim.SGD([weight], lr=1.0)))
    print(f"{run.__name__:7} scale, weight:", *rows_of[run])
assert rows_of[ours] == rows_of[theirs]

# %% [markdown]
# ## A mistake made on purpose: each stage decides for itself
# "Is there currently a good way to do gradient scaling with Pipeline Parallelism?" ([torchtitan#803](https://github.com/pytorch/torchtitan/issues/803)). The first attempt, a
# GradScaler per stage, stops at once on any stage but the last, the only one that has a loss to scale:

# %% tags=["mistake", "raises-exception", "nbval-check-output"]
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.amp.GradScaler("cpu").unscale_(torch.optim.SGD([weight]))

# %% [markdown]
# The second attempt runs. Each stage has its own `LossScaler` and looks for values that are not finite in its own gradients only. The two stages run in threads, and $S$ begins at $2^{19}$.
# fp16 is emulated: gradients are rounded to it, products stay in float32.


# %%
from course_utils.fingerprints import StageRecord, fingerprint
from course_utils.pipeline import Pipeline, are_finite
from course_utils.schedules import gpipe
from course_utils.threads import run_in_threads
from course_utils.transfer import tell_all

halves, STEPS = CutModel(small, by_count(6, 2)), 9


def pieces_of(t):
    mini_batch = batch(range(1000), seed=0, step=t, size=32)
    return mini_batch.split(4), mini_batch.num_tokens


# %% [markdown]
# Look for `shared`: it is the only difference between the mistake and its cure.


# %%
def train_a_rank(worker, shared):
    stage, log, record = halves.build(worker.rank, seed=0), [], StageRecord()
    named, optimizer = list(stage.named_parameters_globally()), torch.optim.Adam(stage.parameters(), lr=0.002)
    scaler = LossScaler(2.0**19, growth_interval=3)
    pipeline = Pipeline({worker.rank: stage}, gpipe(2, 4), worker.transport, halves.carry_after)
    for t in range(STEPS):
        pieces, num_tokens = pieces_of(t)
        optimizer.zero_grad()
        record.add_losses(pipeline.step(pieces, pipeline.plan(pieces), num_tokens, loss_scale=scaler.scale))
        round_to(torch.float16, [p.grad for _, p in named])
        overflow = not are_finite(p.grad for _, p in named)
        skipped = any(tell_all(worker.transport, overflow, "overflow")) if shared else overflow
        log.append((scaler.scale, skipped))
        scaler.unscale(stage.parameters())
        if not skipped:
            optimizer.step()
        scaler.update(skipped)
    record.add_weights(named)
    return record.summary(), log


# %% tags=["mistake", "claim:diverge"]
apart = run_in_threads(train_a_rank, 2, False)
scales = {}
for rank, (_, log) in enumerate(apart):
    print(f"stage {rank}:", ", ".join("skip" if skipped else "update" for _, skipped in log))
    scales[f"scale on stage {rank}"] = {t: scale for t, (scale, _) in enumerate(log)}
first, last = (list(row.values()) for row in scales.values())
assert not apart[0][1][0][1] and apart[1][1][0][1]  # step 0
assert max(a / b for a, b in zip(first, last, strict=True)) >= 4
print("gradients of stage 0, times the right ones:", [b / a for a, b in zip(first, last, strict=True)])

# %%
from course_utils.charts import describe_lines, draw_lines

axes = ("step", "loss scale", "Two stages in threads, two decisions (fp16 emulated: gradients are rounded)")
show(draw_lines(scales, *axes, log_y=True), says=describe_lines(scales, *axes))

# %% [markdown]
# Stage 1 overflows in the first step, skips and halves. Stage 0 has finite gradients and updates: from now on the stages hold weights of different steps. And the scales
# drift apart. The last stage multiplies the loss by *its* scale, stage 0 divides by its own, which is larger, so its gradients are too small by the ratio. Adam divides by
# the size of the gradients, so the size of its steps does not tell. A framework had this fault, with scales of 4 and 8
# ([Megatron-Bridge#5591](https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5591)).
#
# The cure: every rank hears whether *any* rank has overflowed (`tell_all`). Same answer, same scale, same step. The reference is one device with torch's scaler:


# %%
def train_with_torch():
    """The same training on one device."""
    model, record = whole.build(0, seed=0), StageRecord()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=3)
    for t in range(STEPS):
        (pieces, num_tokens), losses = pieces_of(t), {}
        optimizer.zero_grad()
        for m, piece in enumerate(pieces):
            losses[m] = sum_over_tokens(model((None, None), piece)[0], piece, num_tokens)
            scaler.scale(losses[m]).backward()
        round_to(torch.float16, [p.grad for p in model.parameters()])
        record.add_losses(losses)
        scaler.step(optimizer)
        scaler.update()
    record.add_weights(model.named_parameters_globally())
    return fingerprint([record.summary()])


# %% tags=["fingerprint", "claim:shared"]
together = run_in_threads(train_a_rank, 2, True)
strings = {"one device, torch.amp.GradScaler": train_with_torch()}
strings["two stages, one decision"] = fingerprint([summary for summary, _ in together])
strings["two stages, two decisions"] = fingerprint([summary for summary, _ in apart])
for name, string in strings.items():
    print(string, name)
one_device, shared, separate = strings.values()
assert one_device == shared != separate
assert together[0][1] == together[1][1] and any(skipped for _, skipped in together[0][1])

# %% [markdown]
# The package needs no extra message for this. The ranks exchange the norms of their gradients anyway ([lesson 09](09_gradient_clipping.ipynb)), and a norm
# that is not finite tells everyone. bf16 has the range of float32 and needs no loss scale, but it needs the shared decision too.
#
# ## One region, one copy
# *autocast* is a region in which PyTorch computes matrix products in 16 bits. It makes the 16-bit copy of a weight at its first use and keeps it until the region
# ends. Most examples enter it around each forward. In GPipe there are $M$ forwards before the first backward. How many bytes are then kept for the backwards, in per cent of those that float32 needs?

# %%
kept_guess = predict("bytes kept, a region per micro-batch", M=8, unit="% of those of float32", value=None)

# %%
from torch.autograd.graph import saved_tensors_hooks

from course_utils.memory import storages
from course_utils.precision import autocast

medium = TransformerConfig(d_model=64, heads=4)
model = CutModel(medium, by_count(8, 1)).build(0, seed=0)
pieces = batch(range(100_000, 1_000_000), seed=0, step=0, size=32).split(8)


# %%
def kept_bytes(around_all=None, around_each=None):
    """What autograd keeps after all forwards, each storage once; the weights themselves are there anyway."""
    given, kept, losses = storages(model.parameters()), {}, []

    def note(tensor):
        kept.update(storages([tensor]))
        return tensor.detach()

    with autocast(around_all), saved_tensors_hooks(note, lambda tensor: tensor):
        for piece in pieces:
            with autocast(around_each):
                logits, _ = model((None, None), piece)
                losses.append(sum_over_tokens(logits, piece, 1))
    return sum(size for storage, size in kept.items() if storage not in given)


# %% tags=["mistake", "claim:one-region"]
bf16 = torch.bfloat16
kept = {"float32": kept_bytes(), "bf16, a region per micro-batch": kept_bytes(around_each=bf16)}
kept["bf16, one region around all"] = kept_bytes(around_all=bf16)
full, each, one = kept.values()
assert each > 1.3 * full > full > one
kept_guess = kept_guess.settle(measured=100 * each / full)

# %%
from course_utils.charts import describe_bars, draw_bars

changes = {name: "" if size == full else f" ({size / full - 1:+.0%})" for name, size in kept.items()}
mebibytes = {name + changes[name]: size / 2**20 for name, size in kept.items()}
title = "Kept for the backwards of 8 micro-batches, 4 rows each"

# %%
show(
    draw_bars(mebibytes, "MiB", title),
    says=f"{describe_bars(mebibytes, 'MiB', title)} {describe_prediction(kept_guess)}",
)

# %% [markdown]
# Half the bits, and more bytes: each region converts all weights anew, and the graphs keep these copies, one set per micro-batch. Copies that are not
# shared have made trainings run out of memory ([pytorch-lightning#21611](https://github.com/Lightning-AI/pytorch-lightning/issues/21611)). The package's executor opens one region around all forwards and backwards of a step (autocast is off during
# the backwards). It ends before the optimizer changes the weights, or the copies would be out of date.
#
# ## The quiet one: an activation taken for a weight
# How does autocast recognise a weight? It keeps the copy of every float32 *leaf* that requires a gradient. What a stage receives is such a leaf
# too ([lesson 02](02_cut_it.ipynb)). The memory (the encoder's output) is read by both decoder layers. With one copy for all of them, its gradients are added up in bf16 and only then
# converted. Without the cut there is no leaf, each use has a copy of its own, and they are added up in float32. `hand_over` says what the second stage works on:


# %%
def cut_gradients(hand_over, K=2):
    """All gradients of one micro-batch in bf16; cut behind the encoder if K is 2."""
    stages = [CutModel(medium, by_count(8, K)).build(k, seed=0) for k in range(K)]
    with autocast(bf16):
        hidden, memory = stages[0]((None, None), pieces[0])
        leaf = memory.detach().requires_grad_() if K == 2 else None
        logits = hidden if K == 1 else stages[1]((None, hand_over(leaf)), pieces[0])[0]
        loss = sum_over_tokens(logits, pieces[0], pieces[0].num_tokens)
    loss.backward()
    if K == 2:
        memory.backward(leaf.grad)
    return {name: p.grad for stage in stages for name, p in stage.named_parameters_globally()}


# %% tags=["mistake", "claim:view"]
uncut = cut_gradients(None, K=1)
ways = {"the leaf": lambda leaf: leaf, "a view of it": lambda leaf: leaf.view_as(leaf)}
differ = {}
for name, hand_over in ways.items():
    found = cut_gradients(hand_over)
    off = {n: ((found[n] - g).norm() / g.norm()).item() for n, g in uncut.items() if not torch.equal(found[n], g)}
    differ[name] = len(off)
    print(
        f"the blocks get {name}: {len(off)} of {len(uncut)} gradients differ, by up to {max(off.values(), default=0):.2%}"
    )
assert differ["the leaf"] > 10 and differ["a view of it"] == 0

# %% [markdown]
# A view is no leaf, so autocast converts it at every use, as it does without a cut. One `view_as` in the executor, and all cuts have one fingerprint again.
# So small an error shows in no loss curve. With the package, in bf16, on two, three and six stages:

# %% tags=["fingerprint", "claim:same-bits"]
from dataclasses import replace

from course_utils.recipes import TrainingConfig
from course_utils.training import train, train_on_one_device

tiny = TrainingConfig(
    model=small, steps=3, batch_size=16, micro_batches=4, training_numbers=200, held_out=0, precision="bf16"
)
strings = {f"{K} stages": train(replace(tiny, stages=K), run=run_in_threads).fingerprint for K in (2, 3, 6)}
strings["one device"] = train_on_one_device(tiny).fingerprint
for name, string in strings.items():
    print(string, name)
assert len(set(strings.values())) == 1
assert train_on_one_device(replace(tiny, precision="fp32")).fingerprint != strings["one device"]

# %% [markdown]
# ## What crosses the border
# Products are in bf16. Are messages half as long, then? We record every call of `isend`:


# %%
def watched_step(worker, cut, low_precision, wire_dtype, micro_batches):
    """What this rank sent, (dtype, bytes) per tensor, and its gradients."""
    sent, isend, stage = [], worker.transport.isend, cut.build(worker.rank, seed=0)

    def watch(tensor, *args, **options):
        sent.append((tensor.dtype, tensor.nbytes))
        return isend(tensor, *args, **options)

    worker.transport.isend = watch
    options = {"low_precision": low_precision, "wire_dtype": wire_dtype}
    schedule = gpipe(cut.num_stages, len(micro_batches))
    pipeline = Pipeline({worker.rank: stage}, schedule, worker.transport, cut.carry_after, **options)
    pipeline.step(micro_batches, pipeline.plan(micro_batches), sum(m.num_tokens for m in micro_batches))
    return sent, torch.cat([parameter.grad.flatten() for parameter in stage.parameters()])


# %%
def run(K, low_precision=None, wire_dtype=None, step=0):
    """What all ranks sent, and all gradients in one vector."""
    micro_batches = batch(range(1000, 10_000), seed=0, step=step, size=64).split(2)
    cut = CutModel(medium, by_count(8, K))
    ranks = run_in_threads(watched_step, K, cut, low_precision, wire_dtype, micro_batches)
    return [message for sent, _ in ranks for message in sent], torch.cat([gradients for _, gradients in ranks])


# %% tags=["nbval-check-output", "claim:border"]
for products in (None, bf16):
    sent, _ = run(2, low_precision=products)
    print(f"products in {products or 'float32'}: {sum(b for _, b in sent):,} bytes sent as", *{d for d, _ in sent})
    assert {dtype for dtype, _ in sent} == {torch.float32}

# %% [markdown]
# Nothing is saved. What crosses a border is the sum of a layer's input and its output, or a norm of it, and autocast leaves both in float32. Halving the bytes is a choice of its own, the
# package's `wire_dtype="bf16"`: activations and gradients are rounded before they are sent, and converted back on arrival. How many times as large is the error of the gradient with seven borders as with one?

# %%
wire_guess = predict("error of bf16 on the wire, K=8 over K=2", unit="times", value=None)

# %% tags=["claim:wire"]
from statistics import median


def wire_error(K, dtype, step):
    """How far the gradient is off, in per cent of its norm."""
    (full, right), (half, rounded) = run(K, step=step), run(K, wire_dtype=dtype, step=step)
    assert 2 * sum(size for _, size in half) == sum(size for _, size in full)
    return 100 * ((rounded - right).norm() / right.norm()).item()


errors = {
    name: {K: median(wire_error(K, FORMATS[name][0], step) for step in range(3)) for K in (2, 4, 8)}
    for name in ("bf16", "fp16")
}
assert errors["bf16"][2] < errors["bf16"][4] < errors["bf16"][8] < 2
assert all(errors["fp16"][K] < error for K, error in errors["bf16"].items())
wire_guess = wire_guess.settle(measured=errors["bf16"][8] / errors["bf16"][2])

# %%
axes = ("K", "error of the gradient, % of its norm", "16 bits on the wire (stages in threads)")
show(draw_lines(errors, *axes), says=f"{describe_lines(errors, *axes)} {describe_prediction(wire_guess)}")

# %% [markdown]
# Half the bytes, at the price of an error that grows with $K$ and of equal fingerprints: another cut rounds at other places. So it is off unless you ask for it.
#
# ## bf16 against fp16
# What this lesson has measured of the two:

# %%
infinite = {name: gradients(2.0**19, rows.num_tokens).to(FORMATS[name][0]).isinf().float().mean() for name in errors}
table = {
    "bits of exponent": {name: FORMATS[name][1] for name in errors},
    "bits of mantissa": {name: lengths[name][2] for name in errors},
    "gradients that vanish without a scale, %": shares,
    "gradients of 2^19 L that are infinite, %": {name: 100 * share.item() for name, share in infinite.items()},
    "error on the wire, K=8, % of the norm": {name: by_k[8] for name, by_k in errors.items()},
}
print(" " * 44, *(f"{name:>7}" for name in errors))
for what, values in table.items():
    print(f"{what:44}", *(f"{values[name]:7.2g}" for name in errors))

# %% [markdown]
# fp16 is finer and needs a loss scale; bf16 is coarser and needs none. Both need master weights and one decision for all stages.
#
# ## Is it faster here?
# A CPU without instructions for bf16 emulates it. We time one encoder layer, forward and backward, on 4 rows, a small micro-batch, and on 64. How long do the 64 take in bf16 on
# *this* machine, against float32?

# %%
time_guess = predict("time of a layer in bf16", rows=64, unit="times that in float32", value=None)

# %%
import time

from course_utils.transformer import EncoderLayer, block_builders

layer = next(b for b in block_builders(TransformerConfig(d_model=128)) if b.kind is EncoderLayer).build(seed=0)


def time_ratio(num_rows):
    """Time in bf16 over that in float32; medians of turns."""
    mini_batch, seconds = batch(range(100_000, 1_000_000), seed=0, step=0, size=num_rows), {None: [], bf16: []}
    hidden = torch.ones(num_rows, mini_batch.source_length, 128)
    for _ in range(8):
        for dtype, taken in seconds.items():
            started = time.perf_counter()
            with autocast(dtype):
                result, _ = layer((hidden, None), mini_batch)
            result.sum().backward()
            taken.append(time.perf_counter() - started)
    return median(seconds[bf16][1:]) / median(seconds[None][1:])


# %%
from course_utils.recipes import with_precision

ratios = {num_rows: time_ratio(num_rows) for num_rows in (4, 64)}
time_guess = time_guess.settle(measured=ratios[64])
for num_rows, ratio in ratios.items():
    verdict = "bf16 is faster" if ratio < 1 else "float32 is faster"
    print(f"{num_rows} rows: {ratio:.2f} times as long in bf16. {verdict} for a layer of this size on this machine.")
print(
    "precision='auto', for the model of lesson 11, chooses", with_precision(TrainingConfig(precision="auto")).precision
)

# %%
from course_utils.charts import draw_prediction

show(draw_prediction(time_guess), says=describe_prediction(time_guess))

# %% [markdown]
# Never take this ratio from another machine or another size: every operand is converted first, which costs small products more than they gain. `auto` measures a layer of your model on a micro-batch of your
# size.
#
# ## The names of today
# Older articles, also the one that this course started from, import both tools from `torch.cuda.amp`. What PyTorch says to that:

# %%
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    old = torch.cuda.amp.GradScaler(), torch.cuda.amp.autocast()
for warning in caught:
    print(warning.message)
assert any("deprecated" in str(warning.message) for warning in caught)

# %% tags=["claim:modern"]
with warnings.catch_warnings():
    warnings.simplefilter("error")
    scaler, region = torch.amp.GradScaler("cpu"), torch.autocast("cpu", torch.bfloat16)
print("enabled on this machine: old", old[0].is_enabled(), "· new", scaler.is_enabled())
assert scaler.is_enabled() and old[0].is_enabled() == torch.cuda.is_available()

# %% [markdown] tags=["summary"]
# ## What you know now
# - bf16 has the range of float32 and steps eight times as coarse as those of fp16; fp16 ends below $10^5$. <!-- shown: formats -->
# - Small gradients vanish in fp16; a loss scale saves them. <!-- shown: underflow -->
# - $\nabla(L \cdot S) = S \cdot \nabla L$, to the last bit if $S$ is a power of two. <!-- shown: linear -->
# - Without float32 master weights, small updates are lost. <!-- shown: master -->
# - Our `LossScaler` does on one device what torch's does. <!-- shown: as-torch -->
# - Stages that decide for themselves drift apart after the first overflow. <!-- shown: diverge -->
# - With one decision for all, they have the bits of one device with torch's scaler. <!-- shown: shared -->
# - autocast per micro-batch keeps a copy of the weights for each; one region keeps one. <!-- shown: one-region -->
# - autocast takes a received activation for a weight; a view of it prevents that. <!-- shown: view -->
# - With that view, bf16 has one fingerprint on one device and on two, three and six stages. <!-- shown: same-bits -->
# - With products in bf16, what crosses a border is still float32. <!-- shown: border -->
# - 16 bits on the wire halve the bytes, with an error that grows with $K$. <!-- shown: wire -->
# - `torch.amp` replaces `torch.cuda.amp`, which switches itself off without CUDA. <!-- shown: modern -->
#
# **Kept for later:** `autocast`, `resolve` in `course_utils/precision.py`; `LossScaler` in `optimization.py`; the region and the view in
# `Pipeline.step` and `Pipeline.compute`, `pipeline.py`; `precision`, `loss_scale` and `wire_dtype` of `TrainingConfig`, `recipes.py`.
#
# **Practise:** from which largest power of two does `run_in_threads(train_a_rank, 2, True)` start without a skipped step? Set `growth_interval` to 100, so that the scale does not grow, and look at the log.
# Exercises: [unit 08](../exercises/08_mixed_precision/08_mixed_precision.ipynb).
#
# **Next:** [09 · Gradient clipping](09_gradient_clipping.ipynb).

# %% [markdown]
# ## Questions
# 1. Why must the region of autocast end before the optimizer's step?
# 2. A step is skipped on all stages. What else must not move?
# 3. With bf16 and no loss scale, why may one stage still not decide for itself?
# 4. A cut inside the encoder gives the right bits even without the view. Why?

# %% [markdown] tags=["answers"]
# ## Answers
# 1. The copy of a weight is kept until the region ends. After the update it would be a copy of the old weight.
# 2. All that counts steps: Adam's state, the learning-rate schedule. Only the scale changes, on all stages alike.
# 3. A NaN, from data or from a bad weight, can appear on one stage only. The others would update.
# 4. Only `hidden` crosses it. What reads it is a norm and a sum, in float32, and no product, so autocast makes no copy. The memory is an operand of products, those for
#    keys and values.
#
# To practise: $2^{17}$, where stage 1 in the picture has come to rest as well.
#
# The class that you were asked to write:


# %% tags=["answers", "nbval-check-output"]
class LossScaler:
    def __init__(self, scale=65536.0, growth_interval=2000):
        self.scale, self.growth_interval, self.good_steps = scale, growth_interval, 0

    def unscale(self, parameters):
        """Divide the gradients by the scale. A parameter may have none."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.scale)

    def update(self, skipped):
        """After every step: choose the scale of the next one."""
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.scale *= 0.5
        elif self.good_steps == self.growth_interval:
            self.good_steps = 0
            self.scale *= 2.0


check("08.loss_scaler", LossScaler)

# %% [markdown]
# In the package's class the scale also stays a finite float32, can be saved, and can be switched off.
#
# ## References
# Micikevicius et al., 2018, *Mixed Precision Training*, [arXiv 1710.03740](https://arxiv.org/abs/1710.03740), sections 3.1 to 3.3 · Kalamkar et al., 2019,
# *A Study of BFLOAT16 for Deep Learning Training*, [arXiv 1905.12322](https://arxiv.org/abs/1905.12322) · PyTorch:
# [torch.amp](https://docs.pytorch.org/docs/stable/amp.html),
# [examples of mixed precision](https://docs.pytorch.org/docs/stable/notes/amp_examples.html).
