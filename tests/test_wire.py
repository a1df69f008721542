"""Messages in 16 bits: half the bytes, and an error that grows with the number of borders; off, nothing changes."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from course_utils.pipeline import Pipeline
from course_utils.recipes import numbers_of
from course_utils.schedules import Message, Schedule, gpipe, looped, naive, one_f_one_b, rematerialise
from course_utils.threads import run_in_threads
from course_utils.training import TrainingConfig, micro_batches_of, train
from course_utils.transfer import agree
from course_utils.transports import Worker
from tests.models import TINY, TINY_RUN, gradients_of, gradients_on_one_device, refusal_of_an_odd_rank

SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def step_on_rank(
    worker: Worker, config: TrainingConfig, schedule: Schedule, wire_dtype: torch.dtype | None, step: int = 0
) -> dict[str, Any]:
    """One step without an optimizer; what the rank really gave to its transport, and what came of it."""
    cut = replace(config, stages=schedule.num_stages).cut
    sent: list[tuple[Message, Tensor]] = []
    isend = worker.transport.isend

    def watched(tensor: Tensor, peer: int, label: Any, control: bool = False) -> Any:
        if not control:
            sent.append((label, tensor.clone()))
        return isend(tensor, peer, label, control)

    worker.transport.isend = watched  # type: ignore[method-assign]
    stages = {s: cut.build(s, config.seed) for s in schedule.stages_of(worker.rank)}
    pipeline = Pipeline(stages, schedule, worker.transport, cut.carry_after, wire_dtype=wire_dtype)
    numbers = numbers_of(config)
    micro_batches = micro_batches_of(config, numbers.training, step)
    plan = pipeline.plan(micro_batches)
    agree(worker.transport, plan)
    losses = pipeline.step(micro_batches, plan, sum(m.num_tokens for m in micro_batches))
    return {
        "sent": sent,
        "planned": {message: plan.num_bytes(message) for channel in schedule.channels.values() for message in channel},
        "loss": sum(loss.item() for loss in losses.values()),
        "gradients": {n: p.grad for stage in stages.values() for n, p in stage.named_parameters_globally()},
    }


def run_step(config: TrainingConfig, schedule: Schedule, wire: str | None, step: int = 0) -> list[dict[str, Any]]:
    config = replace(config, micro_batches=schedule.num_micro_batches)
    return run_in_threads(step_on_rank, schedule.num_ranks, config, schedule, SIXTEEN_BITS.get(wire or ""), step)


def bytes_sent(ranks: list[dict[str, Any]]) -> dict[Message, int]:
    """{message: the bytes of all its tensors}."""
    found: dict[Message, int] = {}
    for label, tensor in [pair for rank in ranks for pair in rank["sent"]]:
        found[label] = found.get(label, 0) + tensor.numel() * tensor.element_size()
    return found


def carry_bytes(config: TrainingConfig, schedule: Schedule, message: Message) -> int:
    """The bytes of a border's tensors in float32, written out: hidden behind it, and the memory while it is read."""
    micro_batch = one_micro_batch_of(config, schedule, message.micro_batch)
    rows, source_length, target_length = micro_batch.geometry
    cut = replace(config, stages=schedule.num_stages).cut
    last = cut.builders[cut.partition[min(message.source, message.destination)][-1]]
    lengths = {"decoder": [target_length, source_length], "encoder": [source_length]}[last.part]
    if last.name == f"decoder_{config.model.decoder_layers - 1}":
        lengths = [target_length]  # nobody reads the memory again
    return sum(rows * length * config.model.d_model * 4 for length in lengths)


def one_micro_batch_of(config: TrainingConfig, schedule: Schedule, number: int) -> Any:
    numbers = numbers_of(config)
    return micro_batches_of(replace(config, micro_batches=schedule.num_micro_batches), numbers.training, 0)[number]


SCHEDULES = [gpipe(2, 3), one_f_one_b(3, 4), gpipe(8, 2), looped(2, 2, 3), rematerialise(one_f_one_b(2, 3), "always")]


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.num_stages} stages")
def test_every_message_has_half_the_bytes(schedule, wire):
    full, half = run_step(TINY_RUN, schedule, None), run_step(TINY_RUN, schedule, wire)
    expected = {m: carry_bytes(TINY_RUN, schedule, m) for channel in schedule.channels.values() for m in channel}
    assert bytes_sent(full) == full[0]["planned"] == expected
    assert bytes_sent(half) == half[0]["planned"] == {message: size // 2 for message, size in expected.items()}
    assert all(tensor.dtype == SIXTEEN_BITS[wire] for rank in half for _, tensor in rank["sent"])
    assert all(tensor.is_contiguous() for rank in half for _, tensor in rank["sent"])


def test_off_every_bit_is_that_of_one_device():
    micro_batches = [one_micro_batch_of(TINY_RUN, gpipe(3, 3), number) for number in range(3)]
    expected = gradients_on_one_device(TINY_RUN, micro_batches)
    ranks = run_step(TINY_RUN, gpipe(3, 3), None)
    found = gradients_of(ranks)
    assert sorted(found) == sorted(expected)
    assert [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)] == []
    assert all(tensor.dtype == torch.float32 for rank in ranks for _, tensor in rank["sent"])


def test_a_hand_over_on_one_rank_is_not_rounded():
    """All stages on one rank send nothing, so the wire's format changes no bit; one border more, and it does."""
    schedule = looped(1, 4, 3)
    plain, wired = run_step(TINY_RUN, schedule, None), run_step(TINY_RUN, schedule, "bf16")
    assert wired[0]["sent"] == []
    assert all(torch.equal(gradients_of(plain)[name], g) for name, g in gradients_of(wired).items())
    crossing = gradients_of(run_step(TINY_RUN, looped(2, 2, 3), "bf16"))
    assert not all(torch.equal(crossing[name], g) for name, g in gradients_of(plain).items())


def test_what_arrives_is_the_rounded_number_in_float32():
    """Three stages on two ranks: a message between ranks 0 and 1, and stages 1 and 2 hand over on rank 1."""
    rows = gpipe(3, 2).actions
    joined = [*rows[1][:2], *rows[2][:2], *rows[2][2:], *rows[1][2:]]
    schedule = Schedule(2, (0, 1, 1), (rows[0], tuple(joined)))
    wired, plain = run_step(TINY_RUN, schedule, "bf16"), run_step(TINY_RUN, schedule, None)
    for (label, rounded), (other, exact) in zip(wired[0]["sent"], plain[0]["sent"], strict=True):
        assert label == other and torch.equal(rounded, exact.bfloat16())
    assert len(wired[0]["sent"]) == 2 and all(label.source == 0 for label, _ in wired[0]["sent"])
    assert all(g.dtype == torch.float32 for g in gradients_of(wired).values())


def test_all_schedules_round_alike():
    """The order of messages does not matter to what is in them: one fingerprint per cut and format."""
    config = replace(TINY_RUN, stages=3, wire_dtype="bf16", held_out=0, model=replace(TINY, dropout=0.1))
    schedules = [gpipe(3, 3), one_f_one_b(3, 3), naive(3, 3), rematerialise(gpipe(3, 3), "except_last")]
    found = {train(config, schedule, run=run_in_threads).fingerprint for schedule in schedules}
    assert len(found) == 1
    assert found != {train(replace(config, wire_dtype=None), run=run_in_threads).fingerprint}


def errors(config: TrainingConfig, num_stages: int, step: int) -> tuple[float, float]:
    """How far bf16 on the wire is off in one step: the gradient, relative to the global norm; the loss, relative."""
    schedule = gpipe(num_stages, 2)
    exact, rounded = (run_step(config, schedule, wire, step) for wire in (None, "bf16"))
    reference, found = gradients_of(exact), gradients_of(rounded)
    off = math.sqrt(sum((found[name] - g).norm().item() ** 2 for name, g in reference.items()))
    norm = math.sqrt(sum(g.norm().item() ** 2 for g in reference.values()))
    return off / norm, abs(rounded[-1]["loss"] / exact[-1]["loss"] - 1)


def test_the_error_grows_with_the_number_of_borders():
    """Medians over seeds and batches: two stages have one border to round at, eight have seven.

    In a model much smaller than this one the median depends on a few ReLUs that rounding switches on or off.
    """
    config = replace(TINY_RUN, batch_size=64, training_numbers=500, model=replace(TINY, d_model=64, heads=4))
    gradients, losses = [], []
    for num_stages in (2, 4, 8):
        drawn = [errors(replace(config, seed=seed), num_stages, step) for seed in range(2) for step in range(2)]
        gradient, loss = (statistics.median(column) for column in zip(*drawn, strict=True))
        gradients.append(gradient)
        losses.append(loss)
        print(f"bf16 on the wire, K={num_stages}: gradient off by {gradient:.2%} of its norm, loss by {loss:.4%}")
    assert 1e-4 < gradients[0] < gradients[1] < gradients[2] < 0.02  # one rounding to 8 bits is off by at most 0.4 %
    assert max(losses) < 0.001 and losses[0] < losses[2]


def test_ranks_with_different_formats_are_told_before_anything_moves():
    lines = refusal_of_an_odd_rank(TINY_RUN, wire_dtype=torch.bfloat16).splitlines()
    assert "sent as bfloat16" not in lines[1] and "sent as bfloat16" in lines[2]


@pytest.mark.processes
def test_real_processes_round_as_threads_do():
    config = replace(TINY_RUN, stages=2, wire_dtype="bf16", held_out=0)
    assert train(config).fingerprint == train(config, run=run_in_threads).fingerprint
