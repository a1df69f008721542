"""On one machine the course's engine needs no more time for a step than PyTorch's.

The limit is that of a ratio: both engines run in the same processes, in turns. If it is missed the measurement is made
once more with more repetitions, and that result counts: another program may have had the cores.
"""

import pytest

from tests.benchmarks import checks_cost, recording_cost, step_time

LIMIT = 0.9  # a step of ours over a step of torch's, geometric mean over M = 2, 4, 8, 16


@pytest.mark.timed
@pytest.mark.processes
@pytest.mark.slow
def test_a_step_over_loopback_against_torchs_engine():
    """The gradients of both are compared inside the measurement, bit for bit.

    For GPipe. In 1F1B with two stages each rank waits for the other one after every micro-batch, so the time of a
    step is that of the operating system waking them up, with any engine: `python -m tests.benchmarks.step_time` shows
    both.
    """
    rows = step_time.measure(repetitions=8, names=("GPipe",))["GPipe"]
    if step_time.mean_ratio(rows) > LIMIT:
        rows = step_time.measure(repetitions=30, names=("GPipe",))["GPipe"]
    assert step_time.mean_ratio(rows) <= LIMIT, rows


@pytest.mark.timed
def test_the_checks_of_a_step_cost_next_to_nothing():
    """2 % of a step is the limit and 0.3 % is usual, so no second try is needed."""
    assert checks_cost.measure(repetitions=8)["share"] <= 0.02


@pytest.mark.timed
def test_recording_a_step_costs_next_to_nothing():
    """1 % of a step is the limit and 0.1 % is usual."""
    assert recording_cost.measure(repetitions=8)["share"] <= 0.01
