"""Forwards computed a second time: not a bit changes, the stash shrinks as predicted, the wait is used."""

import statistics
import time
from dataclasses import replace
from typing import Any

import pytest

from course_utils.pipeline import Pipeline
from course_utils.precision import LOW_PRECISION
from course_utils.schedules import POLICIES, SCHEDULES, Schedule, gpipe, looped, naive, one_f_one_b, rematerialise
from course_utils.simulation import simulate
from course_utils.threads import run_in_threads
from course_utils.training import TrainingConfig, train, train_on_one_device
from course_utils.transfer import agree
from course_utils.transports import Worker
from tests.models import TINY, TINY_RUN, one_step
from tests.test_memory import EVEN, M, run_metered

DROPOUT = replace(TINY_RUN, micro_batches=4, held_out=0, model=replace(TINY, dropout=0.1))
MAKERS = SCHEDULES | {"looped": lambda ranks, micro_batches: looped(ranks, 2, micro_batches)}


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, str]:
    return {p: train_on_one_device(replace(DROPOUT, precision=p)).fingerprint for p in ("fp32", "bf16")}


@pytest.mark.parametrize("policy", ["always", "except_last"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_not_a_bit_changes(on_one_device, name, ranks, policy):
    """With dropout: the same masks are drawn when a micro-batch is computed again."""
    schedule = rematerialise(MAKERS[name](ranks, 4), policy)
    assert train(DROPOUT, schedule, run=run_in_threads).fingerprint == on_one_device["fp32"]


@pytest.mark.parametrize(
    ("name", "ranks", "policy"), [("gpipe", 3, "always"), ("1f1b", 3, "except_last"), ("looped", 2, "always")]
)
def test_not_a_bit_changes_in_bf16(on_one_device, name, ranks, policy):
    schedule = rematerialise(MAKERS[name](ranks, 4), policy)
    low = replace(DROPOUT, precision="bf16")
    assert train(low, schedule, run=run_in_threads).fingerprint == on_one_device["bf16"] != on_one_device["fp32"]


def test_the_policy_of_a_configuration_is_carried_out():
    config = replace(DROPOUT, stages=2, steps=1)
    for policy in POLICIES:
        result = train(replace(config, rematerialisation=policy), run=run_in_threads)
        assert result.schedule == rematerialise(gpipe(2, 4), policy)


class OtherMasks(Pipeline):
    """The mistake: a second computation draws dropout anew."""

    def recompute(self, action, arrived, micro_batch, num_tokens, dropout_key):
        seed, step, number = dropout_key
        return super().recompute(action, arrived, micro_batch, num_tokens, (seed, step + 1000, number))


def test_other_masks_are_another_training(on_one_device):
    schedule = rematerialise(gpipe(2, 4), "always")
    assert train(DROPOUT, schedule, run=run_in_threads, engine=OtherMasks).fingerprint != on_one_device["fp32"]


# --- What is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "policy", "graphs"),
    [
        (gpipe(3, M), "never", [M, M, M]),
        (gpipe(3, M), "always", [1, 1, 1]),
        (gpipe(3, M), "except_last", [2, 2, 2]),
        (one_f_one_b(3, M), "never", [3, 2, 1]),
        (one_f_one_b(3, M), "always", [1, 1, 1]),
        (one_f_one_b(3, M), "except_last", [2, 2, 1]),
        (naive(2, M), "always", [1, 1]),
        (looped(2, 2, M), "never", [2 * M, 2 * M]),
        (looped(2, 2, M), "always", [1, 1]),
        (looped(2, 2, M), "except_last", [3, 3]),  # the last micro-batch of either stage, and one more
    ],
)
def test_so_many_graphs_are_kept(schedule, policy, graphs):
    pipelines = run_metered(EVEN, rematerialise(schedule, policy))
    assert [pipeline.peak_stash for pipeline in pipelines] == graphs


def test_bytes_kept_by_gpipe():
    """M times (inputs and graph), against M times the inputs and one or two graphs."""
    by_policy = {policy: run_metered(EVEN, rematerialise(gpipe(3, M), policy)) for policy in POLICIES}
    for rank in range(3):
        inputs, graph = by_policy["never"][rank].kept[rank, 0]
        found = {policy: pipelines[rank].peaks["stash", None] for policy, pipelines in by_policy.items()}
        assert found == {
            "never": M * (inputs + graph),
            "always": M * inputs + graph,
            "except_last": M * inputs + 2 * graph,
        }
        print(f"stage {rank} of 3, M={M}: " + ", ".join(f"{policy} {size:,} bytes" for policy, size in found.items()))


# --- When it happens ------------------------------------------------------------------------------------------------


class SlowLastStage(Pipeline):
    """A last stage that takes its time for every backward: the others must wait for its gradients."""

    def backward(self, action, arrived):
        if self.stages[action.stage].is_last:
            time.sleep(0.05)
        return super().backward(action, arrived)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, naive])
def test_recomputation_uses_the_wait_for_a_slow_neighbour(make):
    """It stands directly before its backward, begins before the gradient is even computed, and is over by then."""
    schedule = rematerialise(make(2, 3), "always")
    config = replace(TINY_RUN, held_out=0, steps=2)
    result = train(config, schedule, run=run_in_threads, engine=SlowLastStage, record=[1])
    timeline = result.timelines[1]
    intervals = {(i.rank, i.kind, i.micro_batch): i for i in timeline if i.kind in "FBR"}
    of_rank_0 = [i for i in timeline if i.rank == 0 and i.kind == "w"]
    waits = {i.micro_batch: i for i in reversed(of_rank_0)}  # the first each: the last one has a second, at the end
    for number in range(3):
        again, computed = intervals[0, "R", number], intervals[1, "B", number]
        assert again.start < computed.end, "it began before the gradient existed"
        assert again.end <= waits[number].start <= waits[number].end <= intervals[0, "B", number].start
        computing = sorted((i for i in timeline if i.rank == 0 and i.kind in "FBR"), key=lambda i: i.start)
        place = computing.index(again)
        assert computing[place + 1] == intervals[0, "B", number]
    # Naive: nothing else happens meanwhile, so all of the neighbour's backward is there to recompute in.
    if make is naive:
        assert all(intervals[0, "R", m].end < intervals[1, "B", m].end for m in range(3))


def test_the_simulation_says_the_same():
    """A stage that waits for gradients anyway recomputes for nothing; GPipe's last stage always pays."""
    plain = simulate(naive(2, 3), forward=1.0, backward=2.0)
    again = simulate(rematerialise(naive(2, 3), "always"), forward=1.0, backward=2.0)
    assert again.makespan == plain.makespan + 3 * 1.0  # the last stage's own; the first one's hide behind it


# --- What it costs ---------------------------------------------------------------------------------------------------


def seconds_per_policy(worker: Worker, config: TrainingConfig, schedules: dict[str, Schedule], repetitions: int) -> Any:
    """{policy: [seconds of a step]}, the policies in turns."""
    pipelines, seconds = {}, {policy: [] for policy in schedules}
    micro_batches, num_tokens = one_step(config)
    for policy, schedule in schedules.items():
        stages = {s: config.cut.build(s, config.seed) for s in schedule.stages_of(worker.rank)}
        low_precision = LOW_PRECISION.get(config.precision)
        pipelines[policy] = Pipeline(
            stages, schedule, worker.transport, config.cut.carry_after, low_precision=low_precision
        )
    for _ in range(repetitions):
        for policy, pipeline in pipelines.items():
            plan = pipeline.plan(micro_batches)
            agree(worker.transport, plan)
            started = time.perf_counter()
            pipeline.step(micro_batches, plan, num_tokens, (0, 0))
            seconds[policy].append(time.perf_counter() - started)
    return seconds


@pytest.mark.timed
def test_the_price_is_part_of_a_step():
    """A forward more to a forward and a backward: about a third. The limits are those of a machine that is busy."""
    model = replace(TINY, d_model=128, heads=4, dropout=0.1)
    config = replace(EVEN, stages=1, batch_size=32, model=model)
    schedules = {policy: rematerialise(gpipe(1, M), policy) for policy in ("never", "always")}
    (seconds,) = run_in_threads(seconds_per_policy, 1, config, schedules, 6)
    ratios = [a / n for a, n in zip(seconds["always"][1:], seconds["never"][1:], strict=True)]
    print(f"a step with re-materialisation of everything takes {statistics.median(ratios):.2f} times as long")
    assert 1.0 < statistics.median(ratios) < 2.5


@pytest.mark.parametrize("policy", ["sometimes", "", None])
def test_a_policy_that_does_not_exist(policy):
    with pytest.raises(ValueError, match="there are never, always, except_last"):
        replace(TINY_RUN, rematerialisation=policy)
    with pytest.raises(ValueError, match="there are never, always, except_last"):
        rematerialise(gpipe(2, 3), policy)
