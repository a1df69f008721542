"""Mixed precision: the loss scale against torch's own, one decision on all stages, one copy of the weights per step."""

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from course_utils import training_state
from course_utils.memory import MeteredPipeline
from course_utils.optimization import LossScaler, Noam, clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.precision import LOW_PRECISION, autocast, resolve
from course_utils.recipes import TrainingConfig, numbers_of
from course_utils.schedules import SCHEDULES, Message, Schedule, gpipe, looped, one_f_one_b, rematerialise
from course_utils.stages import CutModel, Stage
from course_utils.threads import run_in_threads
from course_utils.training import TrainingResult, TrainingState, micro_batches_of, train, train_on_one_device
from course_utils.transfer import agree
from course_utils.transformer import Block, EncoderNorm
from course_utils.transports import Worker
from tests.models import TINY, TINY_RUN, gradients_on_one_device, one_step, refusal_of_an_odd_rank
from tests.test_memory import EVEN, M, run_metered

DROPOUT = replace(TINY, dropout=0.1)
SHORT = replace(TINY_RUN, held_out=0, model=DROPOUT)

# --- The loss scale, against torch.amp.GradScaler on one device ----------------------------------------------------


def small_model() -> tuple[list[nn.Parameter], torch.optim.Adam]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=generator)) for size in (3, 40, 1)]
    return parameters, torch.optim.Adam(parameters, lr=0.1)


def small_loss(parameters: list[nn.Parameter], step: int, overflows: bool) -> Tensor:
    loss = sum((parameter * (step + 1)).sin().sum() for parameter in parameters)
    # An infinite factor gives infinite and, where it meets a zero, undefined gradients.
    return loss + (parameters[1][7] * math.inf if overflows else 0.0)


def our_steps(overflows: list[bool], **options: float) -> list[tuple]:
    parameters, optimizer = small_model()
    scaler = LossScaler(**options)
    seen = []
    for step, overflow in enumerate(overflows):
        optimizer.zero_grad()
        small_loss(parameters, step, overflow).backward(torch.tensor(scaler.scale))
        scaler.unscale(parameters)
        norm = clip_by_global_norm(parameters, gradient_norms(enumerate(parameters), 3), max_norm=1.0)
        skipped = not math.isfinite(norm)
        if not skipped:
            optimizer.step()
        scaler.update(skipped)
        seen.append((scaler.scale, scaler.good_steps, skipped, [p.detach().clone() for p in parameters], norm))
    return seen


def torch_steps(overflows: list[bool], scale: float, growth_interval: int) -> list[tuple]:
    parameters, optimizer = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    seen, applied = [], 0
    optimizer.register_step_post_hook(lambda *_: count.append(1))
    count: list[int] = []
    for step, overflow in enumerate(overflows):
        optimizer.zero_grad()
        scaler.scale(small_loss(parameters, step, overflow)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm=1.0).item()
        scaler.step(optimizer)
        scaler.update()
        skipped, applied = len(count) == applied, len(count)
        tracker = scaler.state_dict()["_growth_tracker"]
        seen.append((scaler.get_scale(), tracker, skipped, [p.detach().clone() for p in parameters], norm))
    return seen


def assert_same(ours: list[tuple], theirs: list[tuple]) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a[:3] == b[:3], step
        assert all(torch.equal(x, y) for x, y in zip(a[3], b[3], strict=True)), step
        assert a[4] == b[4] or not math.isfinite(a[4]) and not math.isfinite(b[4])


@pytest.mark.parametrize("scale", [1.0, 3.0, 1000.0, 65536.0, 1e-3, 2.0**-100, 3e38])
def test_the_loss_scale_is_torch_s_bit_for_bit(scale):
    """Over a sequence with overflows: planted ones, and for the greatest scale real ones."""
    overflows = [step in (2, 3, 9) for step in range(20)]
    ours = our_steps(overflows, scale=scale, growth_interval=3)
    assert_same(ours, torch_steps(overflows, scale, 3))
    assert all(ours[step][2] for step in (2, 3, 9))
    assert (sum(seen[2] for seen in ours) > 3) == (scale == 3e38)


def test_the_scale_stays_a_finite_float32():
    scaler, theirs = LossScaler(2.0**126, growth_interval=1), torch.amp.GradScaler("cpu", 2.0**126, growth_interval=1)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for expected in (2.0**127, 2.0**127, 2.0**127):
        theirs.scale((parameter * 2.0**-30).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        scaler.update(False)
        assert scaler.scale == theirs.get_scale() == expected


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=1, max_size=25),
    st.sampled_from([1.0, 7.0, 65536.0, 2.0**125]),
    st.integers(1, 4),
)
def test_every_pattern_of_overflows_moves_the_scale_as_torch_does(overflows, scale, growth_interval):
    ours = our_steps(overflows, scale=scale, growth_interval=growth_interval)
    assert_same(ours, torch_steps(overflows, scale, growth_interval))


@given(st.lists(st.booleans(), max_size=12), st.lists(st.booleans(), max_size=12), st.integers(1, 4))
def test_a_resumed_scale_goes_on_where_it_was(before, after, growth_interval):
    scaler = LossScaler(1024.0, growth_interval=growth_interval)
    for skipped in before:
        scaler.update(skipped)
    resumed = LossScaler(1.0, growth_interval=growth_interval)
    resumed.load_state_dict(copy.deepcopy(scaler.state_dict()))
    for skipped in after:
        scaler.update(skipped)
        resumed.update(skipped)
        assert (scaler.scale, scaler.good_steps) == (resumed.scale, resumed.good_steps)


def test_a_scale_that_is_switched_off_stays_1():
    scaler = LossScaler(4.0, enabled=False)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), math.inf)
    scaler.unscale([parameter])
    scaler.update(True)
    assert scaler.scale == 1.0 and parameter.grad.item() == math.inf


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"scale": math.nan}, "scale is nan"),
        ({"growth_factor": 1.0}, "growth_factor is 1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor is 1.0"),
        ({"backoff_factor": 0.0}, "backoff_factor is 0.0"),
        ({"growth_interval": 0}, "growth_interval is 0"),
    ],
)
def test_what_is_no_scale_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        LossScaler(**options)


def test_parameters_without_a_gradient_are_left_alone():
    LossScaler(4.0).unscale([nn.Parameter(torch.zeros(1))])


# --- A training: all stages skip the same steps ---------------------------------------------------------------------


def tamper(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[int, Tensor], Tensor]) -> None:
    """Every model that is built from now on changes one parameter's gradient: change(number of the backward, it)."""
    build = CutModel.build

    def tampered(self: CutModel, *arguments: Any) -> Stage:
        stage, backwards = build(self, *arguments), itertools.count()
        for global_name, parameter in stage.named_parameters_globally():
            if global_name == name:
                parameter.register_hook(lambda gradient: change(next(backwards), gradient))
        return stage

    monkeypatch.setattr(CutModel, "build", tampered)


def watch_updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each update of each rank found and left."""
    seen: list[dict[str, Any]] = []
    take_in, update = TrainingState.take_in, TrainingState.update

    def everything(state: TrainingState) -> list[bytes]:
        """The bits of weights, Adam's state and the learning rate."""
        adam = [value for parameter in state.parameters for value in state.optimizer.state[parameter].values()]
        tensors = [tensor.detach().numpy().tobytes() for tensor in state.parameters + adam]
        return [*tensors, repr((state.optimizer.param_groups, state.noam.state_dict())).encode()[-500:]]

    def watched_take_in(self, losses):
        norms = take_in(self, losses)
        self.overflowed = not torch.isfinite(norms).all().item()
        return norms

    def watched(self, *arguments):
        before, scale = everything(self), self.scaler.scale
        step = update(self, *arguments)
        first = self.named[0][0] if self.named else ""
        after = everything(self)
        seen.append(
            {"first": first, "step": step.number, "skipped": step.skipped, "overflowed": self.overflowed}
            | {"changed": before != after, "scale": scale, "next_scale": self.scaler.scale}
        )
        assert not torch.is_autocast_enabled("cpu")
        return step

    monkeypatch.setattr(TrainingState, "take_in", watched_take_in)
    monkeypatch.setattr(TrainingState, "update", watched)
    return seen


ONE_OF_EACH_STAGE = ["01.encoder_0.feedforward.expand.bias", "05.decoder_0.cross_attention.query.weight"]
ONE_OF_EACH_STAGE += ["07.head.linear.weight"]


def too_large(config: TrainingConfig, name: str) -> Callable[[int, Tensor], Tensor]:
    """Makes a gradient overflow while the loss scale is above about 2**120, and only this one.

    What flows on to other parameters stays as it is.
    """
    usual = gradients_on_one_device(config, one_step(config)[0])[name].abs().max().item()
    factor = 2.0 ** round(math.log2(256 / usual))
    return lambda number, gradient: gradient * factor


def poisoned(number: int, gradient: Tensor) -> Tensor:
    """Not a number in the second step's second micro-batch."""
    return gradient * (math.nan if number == TINY_RUN.micro_batches + 1 else 1.0)


@pytest.mark.parametrize(
    ("change", "loss_scale", "precision"),
    [(too_large, 2.0**122, "bf16"), (poisoned, 2.0**20, "fp32"), (poisoned, None, "bf16")],
    ids=["scale", "nan", "no scale"],
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_overflow_on_one_stage_skips_the_step_on_all(monkeypatch, stage, change, loss_scale, precision):
    config = replace(SHORT, stages=3, steps=6 if change is too_large else 3, loss_scale=loss_scale, precision=precision)
    name = ONE_OF_EACH_STAGE[stage]
    assert name in dict(config.cut.build(stage, 0).named_parameters_globally())
    tamper(monkeypatch, name, change(config, name) if change is too_large else change)
    reference = train_on_one_device(config)
    seen = watch_updates(monkeypatch)
    result = train(config, run=run_in_threads)

    assert result.fingerprint == reference.fingerprint
    assert [s.skipped for s in result.steps] == [s.skipped for s in reference.steps]
    assert [s.loss_scale for s in result.steps] == [s.loss_scale for s in reference.steps]
    skipped = [s.number for s in result.steps if s.skipped]
    assert 1 <= len(skipped) < config.steps
    assert len(seen) == 3 * config.steps
    firsts = {first: k for k in range(3) for first in [next(config.cut.build(k, 0).named_parameters_globally())[0]]}
    for update in seen:
        assert update["skipped"] == (update["step"] in skipped)
        assert update["changed"] != update["skipped"]
        assert update["overflowed"] == (update["skipped"] and firsts[update["first"]] == stage)
        factor = 0.5 if update["skipped"] and loss_scale else 1.0
        assert update["next_scale"] == factor * update["scale"]
    for step in result.steps:
        assert {update["scale"] for update in seen if update["step"] == step.number} == {step.loss_scale}
    rates = [s.learning_rate for s in result.steps]
    assert all(rates[number] == rates[number + 1] for number in skipped if number + 1 < config.steps)


def by_torch(config: TrainingConfig, growth_interval: int) -> tuple[dict[str, Tensor], list[float], list[bool]]:
    """The same training on one device, with torch's scaler and clipping: weights, scales, skipped steps."""
    torch.set_num_threads(1)
    model = replace(config, stages=1).cut.build(0, config.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    noam = Noam(optimizer, config.model.d_model, config.warm_up, config.learning_rate_factor)
    scaler = torch.amp.GradScaler("cpu", init_scale=config.loss_scale, growth_interval=growth_interval)
    numbers = numbers_of(config)
    scales, skipped = [], []
    for step in range(config.steps):
        scales.append(scaler.get_scale())
        micro_batches = micro_batches_of(config, numbers.training, step)
        num_tokens = sum(m.num_tokens for m in micro_batches)
        optimizer.zero_grad()
        for number, micro_batch in enumerate(micro_batches):
            with autocast(LOW_PRECISION.get(config.precision)):
                logits, _ = model((None, None), micro_batch, (config.seed, step, number))
                loss = sum_over_tokens(logits, micro_batch, num_tokens)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, config.max_norm)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scales[-1])
        if not skipped[-1]:
            noam.step()
    return dict(model.named_parameters_globally()), scales, skipped


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [(gpipe(1, 3), "fp32"), (gpipe(3, 3), "fp32"), (gpipe(3, 3), "bf16"), (looped(2, 2, 3), "bf16")],
    ids=["one stage", "three stages", "three stages in bf16", "looped in bf16"],
)
def test_a_training_with_overflows_ends_with_the_weights_of_torch_s_scaler(monkeypatch, schedule, precision):
    config = replace(SHORT, steps=9, loss_scale=3.0 * 2.0**120, precision=precision)
    tamper(monkeypatch, ONE_OF_EACH_STAGE[1], too_large(config, ONE_OF_EACH_STAGE[1]))
    monkeypatch.setattr(training_state, "LossScaler", partial(LossScaler, growth_interval=3))
    result = train(config, schedule, run=run_in_threads)
    weights, scales, skipped = by_torch(config, growth_interval=3)
    assert [step.loss_scale for step in result.steps] == scales
    assert [step.skipped for step in result.steps] == skipped
    assert 2 <= sum(skipped) < 8 and any(b > a for a, b in zip(scales, scales[1:], strict=False))
    assert any(step.gradient_norm > config.max_norm for step in result.steps)  # something was clipped
    assert [name for name, weight in weights.items() if not torch.equal(weight, result.weights[name])] == []


def overflow_everywhere(number: int, gradient: Tensor) -> Tensor:
    return gradient * (math.inf if number < TINY_RUN.micro_batches else 1.0)


def without_rows(schedule: Schedule, place: int) -> Schedule:
    """The schedule with one more rank, which does nothing."""
    rows = (*schedule.actions[:place], (), *schedule.actions[place:])
    ranks = tuple(rank + (rank >= place) for rank in schedule.rank_of_stage)
    return Schedule(schedule.num_micro_batches, ranks, rows)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_ranks_without_stages_skip_with_the_others(monkeypatch, place):
    tamper(monkeypatch, ONE_OF_EACH_STAGE[0], overflow_everywhere)
    config = replace(SHORT, precision="bf16", loss_scale=2.0**16)
    reference = train_on_one_device(config)
    seen = watch_updates(monkeypatch)
    result = train(config, without_rows(gpipe(2, 3), place), run=run_in_threads)
    assert result.fingerprint == reference.fingerprint
    assert [step.skipped for step in result.steps] == [True, False, False]
    idle = [update for update in seen if not update["first"]]
    assert [update["skipped"] for update in idle] == [True, False, False]
    assert [update["next_scale"] for update in idle] == 3 * [2.0**15]


def test_a_stage_without_parameters_skips_with_the_others(monkeypatch):
    monkeypatch.setattr(EncoderNorm, "__init__", Block.__init__)
    monkeypatch.setattr(EncoderNorm, "forward", lambda self, carry, *_: (None, torch.tanh(carry[0])))
    tamper(monkeypatch, ONE_OF_EACH_STAGE[0], overflow_everywhere)
    config = replace(SHORT, stages=8, loss_scale=2.0**16, precision="bf16")
    reference = train_on_one_device(config)
    seen = watch_updates(monkeypatch)
    result = train(config, run=run_in_threads)
    assert result.fingerprint == reference.fingerprint
    assert [update["skipped"] for update in seen if not update["first"]] == [True, False, False]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_whose_weights_are_frozen_skips_with_the_others(monkeypatch, stage):
    """It has parameters and no gradients."""
    build = CutModel.build
    frozen = SHORT.model, replace(SHORT, stages=3).cut.partition[stage]

    def partly_frozen(self: CutModel, *arguments: Any) -> Stage:
        built = build(self, *arguments)
        for builder, block in zip(built.builders, built.blocks, strict=True):
            block.requires_grad_(builder.index not in frozen[1])
        return built

    monkeypatch.setattr(CutModel, "build", partly_frozen)
    config = replace(SHORT, stages=3, loss_scale=2.0**16, precision="bf16")
    name = ONE_OF_EACH_STAGE[0]
    tamper(monkeypatch, name, overflow_everywhere)
    reference = train_on_one_device(config)
    result = train(config, run=run_in_threads)
    assert result.fingerprint == reference.fingerprint
    assert [step.skipped for step in result.steps] == [True, False, False]
    start = build(config.cut, stage, config.seed)
    assert all(torch.equal(p, result.weights[name]) for name, p in start.named_parameters_globally())


@pytest.mark.parametrize("loss_scale", [2.0**-20, 2.0**60])
def test_a_power_of_two_changes_no_bit(loss_scale):
    plain = train_on_one_device(SHORT).fingerprint
    scaled = replace(SHORT, loss_scale=loss_scale)
    assert train(scaled, one_f_one_b(2, 3), run=run_in_threads).fingerprint == plain
    assert train_on_one_device(replace(SHORT, loss_scale=3.0)).fingerprint != plain  # any other rounds


# --- bfloat16: one fingerprint, one copy of the weights, fewer bytes -------------------------------------------------

BF16 = replace(SHORT, precision="bf16", model=replace(DROPOUT, decoder_layers=3))


@pytest.fixture(scope="module")
def on_one_device() -> TrainingResult:
    return train_on_one_device(BF16)


@pytest.mark.parametrize(("name", "stages"), [*itertools.product(SCHEDULES, (1, 2, 3)), ("gpipe", 9)])
def test_one_fingerprint_in_bf16(on_one_device, name, stages):
    """Nine stages are one block each: there the memory crosses many borders and is read twice behind each."""
    result = train(replace(BF16, stages=stages, schedule=name), run=run_in_threads)
    assert result.fingerprint == on_one_device.fingerprint


def test_bf16_is_another_fingerprint_and_much_the_same_loss(on_one_device):
    full = train_on_one_device(replace(BF16, precision="fp32"))
    assert full.fingerprint != on_one_device.fingerprint
    for low, high in zip(on_one_device.steps, full.steps, strict=True):
        assert low.loss == pytest.approx(high.loss, rel=0.02)


def linears_of(pipeline: Pipeline) -> list[nn.Linear]:
    return [m for stage in pipeline.stages.values() for m in stage.modules() if isinstance(m, nn.Linear)]


def bytes_of_copies(pipeline: Pipeline) -> tuple[int, int]:
    """What one copy of each matrix, and of each bias, weighs in 16 bits."""
    linears = linears_of(pipeline)
    return (
        sum(2 * linear.weight.numel() for linear in linears),
        sum(2 * linear.bias.numel() for linear in linears if linear.bias is not None),
    )


class RegionPerMicroBatch(MeteredPipeline):
    """The mistake: autocast is entered for each micro-batch anew."""

    def step(self, *arguments, **options):
        self.dtype, self.low_precision = self.low_precision, None
        return super().step(*arguments, **options)

    def compute(self, *arguments):
        with autocast(self.dtype):
            return super().compute(*arguments)


@pytest.mark.parametrize("schedule", [gpipe(2, M), one_f_one_b(2, M), gpipe(1, M)], ids=["gpipe", "1f1b", "one"])
def test_one_copy_of_the_weights_per_step_and_fewer_bytes_saved(schedule):
    full = run_metered(EVEN, schedule)
    low = run_metered(replace(EVEN, precision="bf16"), schedule)
    for pipeline, in_full in zip(low, full, strict=True):
        assert pipeline.peaks["low_precision", None] == sum(bytes_of_copies(pipeline))
        assert in_full.peaks["low_precision", None] == 0
        for place, size in pipeline.kept.items():
            assert size.graph < in_full.kept[place].graph
            assert size.inputs == in_full.kept[place].inputs  # what crosses a border stays float32


def test_a_region_per_micro_batch_keeps_a_copy_for_each():
    (right,) = run_metered(replace(EVEN, precision="bf16"), gpipe(1, M))
    (wrong,) = run_metered(replace(EVEN, precision="bf16"), gpipe(1, M), RegionPerMicroBatch)
    matrices, biases = bytes_of_copies(wrong)
    # Biases are copied too, but not saved: at the end of a region only the matrices' copies remain.
    assert wrong.peaks["low_precision", None] == M * matrices + biases
    assert wrong.peaks["stash", None] == right.peaks["stash", None]
    together = [p.peaks["stash", None] + p.peaks["low_precision", None] for p in (wrong, right)]
    print(f"stash and copies of one stage, M={M}: {together[1]:,} bytes, with a region per micro-batch {together[0]:,}")
    assert together[0] > together[1]


def test_backwards_run_outside_of_autocast(monkeypatch):
    enabled = []

    def look(number: int, gradient: Tensor) -> Tensor:
        enabled.append(torch.is_autocast_enabled("cpu"))
        assert gradient.dtype == torch.float32
        return gradient

    tamper(monkeypatch, ONE_OF_EACH_STAGE[1], look)
    train(replace(SHORT, stages=3, steps=1, precision="bf16"), run=run_in_threads)
    assert enabled == 3 * [False]
    train_on_one_device(replace(SHORT, steps=1, precision="bf16"))
    assert enabled == 6 * [False]


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_what_crosses_a_border_stays_float32(make):
    sent = []

    def step(worker: Worker) -> None:
        cut = replace(SHORT, stages=3).cut
        isend = worker.transport.isend

        def watched(tensor: Tensor, peer: int, label: object, control: bool = False) -> Any:
            if not control:
                sent.append((label, tensor.clone()))
            return isend(tensor, peer, label, control)

        worker.transport.isend = watched  # type: ignore[method-assign]
        stages = {worker.rank: cut.build(worker.rank, 0)}
        pipeline = Pipeline(stages, make(3, 3), worker.transport, cut.carry_after, low_precision=torch.bfloat16)
        micro_batches, num_tokens = one_step(SHORT)
        plan = pipeline.plan(micro_batches)
        agree(worker.transport, plan)
        pipeline.step(micro_batches, plan, num_tokens)

    run_in_threads(step, 3)
    messages = [label for label, _ in sent if isinstance(label, Message)]
    assert {label.kind for label in messages} == {"activations", "gradients"}
    assert len(sent) == len(messages) >= 2 * 2 * 3
    for label, tensor in sent:
        assert tensor.dtype == torch.float32, label
        assert not torch.equal(tensor, tensor.bfloat16().float()), label  # more digits than bfloat16 has


def test_ranks_with_different_precision_are_told_before_anything_moves():
    text = refusal_of_an_odd_rank(SHORT, low_precision=torch.bfloat16)
    assert "products in torch.bfloat16" in text and "products in None" in text


def test_bf16_with_recomputation_keeps_one_copy_too():
    """On one rank: the backward's nested region does not end the step's, so the copies of the forward serve again."""
    schedule = rematerialise(gpipe(1, M), "always")
    (pipeline,) = run_metered(replace(EVEN, precision="bf16"), schedule)
    assert pipeline.peaks["low_precision", None] == sum(bytes_of_copies(pipeline))


# --- Which precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuse", [partial(TrainingConfig, precision="fp16"), partial(resolve, "fp16")])
def test_fp16_on_a_cpu_is_refused_with_the_reason(refuse):
    with pytest.raises(ValueError, match="fp16 on a CPU: .*times slower.*Use bf16, fp32, or auto"):
        refuse()


def test_fp16_is_scaled_and_may_run_on_a_gpu():
    assert resolve("fp16", "cuda") == "fp16"
    assert LOW_PRECISION["fp16"] == torch.float16 and LOW_PRECISION["bf16"] == torch.bfloat16


AUTO = """
import torch
from course_utils.precision import resolve
from course_utils.recipes import TrainingConfig
from course_utils.training import with_precision
config = TrainingConfig(precision="auto")
print(torch.backends.cpu.get_cpu_capability(), resolve("auto"), with_precision(config).precision)
"""


@pytest.mark.slow
def test_auto_is_fp32_where_bfloat16_is_emulated():
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    folder = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", AUTO]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    capability, of_product, of_layer = done.stdout.split()
    if capability != "AVX2":
        pytest.skip(f"this CPU cannot be made to behave as one with AVX2 only; it says {capability}")
    assert (of_product, of_layer) == ("fp32", "fp32")
