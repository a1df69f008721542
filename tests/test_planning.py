"""Plans for clusters that are not there: against figures worked out by hand, and against what others have published."""

import math
from dataclasses import replace

import pytest

from course_utils.planning import (
    LEFT_OUT,
    Cluster,
    Model,
    all_reduce_seconds,
    model_flops_utilisation,
    plan,
)

# A head of one column costs nothing, so all stages are equal.
EVEN = Model(layers=8, d_model=64, sequence=16, vocabulary=1)
FREE = Cluster(devices=4, flops_per_second=1e9, memory_bytes=1e9, latency=0.0, bandwidth=math.inf)


def test_parameters_are_counted_as_published():
    """GPT-3: 175 billion (Brown et al., 2020, table 2.1). A model of 1 trillion: Narayanan et al., 2021, table 1."""
    gpt_3 = Model(layers=96, d_model=12288, sequence=2048, vocabulary=51200)
    assert gpt_3.parameters == pytest.approx(175e9, rel=0.005)
    trillion = Model(layers=128, d_model=25600, sequence=2048, vocabulary=51200)
    assert trillion.parameters == pytest.approx(1008e9, rel=0.005)


def test_operations_are_counted_as_published():
    """Narayanan et al., 2021, section 5.1: 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) with a forward computed once more.

    Forward, forward again and backward are four times a forward, what we count is three times, the head in both.
    """
    model, rows = Model(layers=24, d_model=2304, sequence=2048, vocabulary=51200), 3
    layers, width, sequence, vocabulary = model.layers, model.d_model, model.sequence, model.vocabulary
    published = 96 * rows * sequence * layers * width**2
    published *= 1 + sequence / (6 * width) + vocabulary / (16 * layers * width)
    head_once_more = rows * model.head_flops  # their count leaves it out of what is computed again
    assert model.step_flops(rows) * 4 / 3 == pytest.approx(published + head_once_more, rel=1e-9)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (4, 8), (4, 16)])
def test_with_equal_stages_and_a_free_line_the_formula_holds(schedule, stages, micro_batches):
    cluster = replace(FREE, devices=stages)
    made = plan(EVEN, cluster, stages, micro_batches, schedule=schedule, utilisation=0.4)
    bubble = (stages - 1) / (micro_batches + stages - 1)
    # The head of one column is 1 of some ten thousand operations.
    assert made.bubble_of_total == pytest.approx(bubble, abs=1e-3)
    assert made.model_flops_utilisation == pytest.approx(0.4 * (1 - bubble), rel=1e-3)
    assert made.tokens_per_second == pytest.approx(micro_batches * 16 / made.step_seconds)
    assert made.replicas == 1 and made.left_out == LEFT_OUT


def test_what_is_computed_once_more_takes_time_and_is_no_use():
    once, twice = (plan(EVEN, FREE, 4, 8, recompute=again) for again in (False, True))
    assert twice.step_seconds > 1.2 * once.step_seconds
    assert twice.model_flops_utilisation < once.model_flops_utilisation / 1.2
    assert max(twice.bytes_per_device) < max(once.bytes_per_device)


def test_bytes_are_those_of_weights_and_stash():
    hidden, per_stage, vocabulary = 2 * 16 * 64, 2 * 12 * 64**2, 32
    model = replace(EVEN, vocabulary=vocabulary)
    made = plan(model, FREE, 4, 8, rows_per_micro_batch=2)
    ends, logits = vocabulary * 64, 4 * 2 * 16 * vocabulary
    assert made.bytes_per_device == (
        16 * (per_stage + ends) + 4 * 34 * hidden * 2,  # 1F1B keeps 4, 3, 2, 1 micro-batches
        16 * per_stage + 3 * 34 * hidden * 2,
        16 * per_stage + 2 * 34 * hidden * 2,
        16 * (per_stage + ends) + 34 * hidden * 2 + logits,
    )
    everything = plan(model, FREE, 4, 8, rows_per_micro_batch=2, schedule="gpipe")
    assert everything.bytes_per_device[1] == 16 * per_stage + 8 * 34 * hidden * 2
    again = plan(model, FREE, 4, 8, rows_per_micro_batch=2, schedule="gpipe", recompute=True)
    # One whole graph, and of the seven others what came in.
    assert again.bytes_per_device[1] == 16 * per_stage + 34 * hidden * 2 + 7 * 2 * hidden


def test_it_says_whether_it_fits():
    most = max(plan(EVEN, FREE, 4, 8).bytes_per_device)
    assert plan(EVEN, replace(FREE, memory_bytes=most), 4, 8).fits
    small = plan(EVEN, replace(FREE, memory_bytes=most - 1), 4, 8)
    assert not small.fits
    assert "does not fit" in str(small) and "(simulated)" in str(small) and "4 devices as 1 x 4 stages" in str(small)


def test_replicas_add_up_their_gradients_after_the_step():
    line = replace(FREE, latency=1e-3, bandwidth=1e6)
    one, four = plan(EVEN, line, 4, 8), plan(EVEN, replace(line, devices=16), 4, 8)
    ends = 64  # a vocabulary of 1
    extra = all_reduce_seconds(2 * (2 * 12 * 64**2 + ends), 4, line)
    assert four.replicas == 4 and four.step_seconds == pytest.approx(one.step_seconds + extra)
    assert all_reduce_seconds(1e6, 1, line) == 0 and all_reduce_seconds(1e6, 2, line) == pytest.approx(2e-3 + 1)


def test_a_slow_line_makes_a_step_longer():
    slow = replace(FREE, latency=1e-3)
    assert plan(EVEN, slow, 4, 8).step_seconds > plan(EVEN, FREE, 4, 8).step_seconds + 5e-3
    assert (
        plan(EVEN, replace(slow, devices=1), 1, 8).step_seconds
        == plan(EVEN, replace(FREE, devices=1), 1, 8).step_seconds
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"stages": 3}, "3 stages do not divide 4 devices into pipelines"),
        ({"stages": 0}, "0 stages do not divide 4 devices"),
        ({"micro_batches": 0}, "micro_batches is 0; it must be at least 1"),
        ({"rows_per_micro_batch": 0}, "rows_per_micro_batch is 0"),
        ({"schedule": "zigzag"}, "unknown schedule 'zigzag'; there are "),
        ({"utilisation": 1.5}, "utilisation is 1.5; it must be above 0 and at most 1"),
        ({"model": replace(EVEN, layers=2)}, "2 layers cannot fill 4 stages"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"model": EVEN, "cluster": FREE, "stages": 4, "micro_batches": 8} | changed)


def test_models_and_clusters_refuse_what_is_not_positive():
    with pytest.raises(ValueError, match="layers is 0; it must be above 0"):
        Model(0, 64, 16, 10)
    with pytest.raises(ValueError, match="bandwidth is 0; it must be above 0"):
        replace(FREE, bandwidth=0)
    with pytest.raises(ValueError, match="latency is -1; it must be at least 0 seconds"):
        replace(FREE, latency=-1)


def test_utilisation():
    assert model_flops_utilisation(6e9, 2, 1e10) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="seconds is 0; it must be above 0"):
        model_flops_utilisation(1, 0, 1)
