"""What the measurements of the capstone's step share: the step itself, and taking turns.

Machines are noisy, so two things are compared by turns in one run, and medians are taken of the ratios of the turns.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from course_utils.number_words import Batch
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.recipes import TrainingConfig, micro_batches_of, numbers_of
from course_utils.stages import Stage, one_thread
from course_utils.transfer import agree
from course_utils.transports import Worker


def beside_steps(cost: Callable[[list[Batch]], float], repetitions: int) -> list[tuple[float, float]]:
    """Pairs (what cost gives for the micro-batches of a step, seconds of that step), one for each repetition.

    The step: forward and backward of its micro-batches on one device and one thread, divided by the number of stages:
    the least that the capstone's stages can take.
    """
    config = TrainingConfig()
    model = replace(config, stages=1).cut.build(0, config.seed)
    numbers = numbers_of(config)
    pairs = []
    with one_thread():
        for step in range(1 + repetitions):
            micro_batches = micro_batches_of(config, numbers.training, step)
            own_cost = cost(micro_batches)
            pairs.append((own_cost, seconds_of(partial(run_step, model, micro_batches)) / config.stages))
    return pairs[1:]  # the first was to warm up


def run_step(model: Stage, micro_batches: list[Batch]) -> None:
    """Forward and backward of all micro-batches on one device."""
    model.zero_grad()
    num_tokens = sum(m.num_tokens for m in micro_batches)
    for micro_batch in micro_batches:
        logits, _ = model((None, None), micro_batch)
        assert logits is not None
        sum_over_tokens(logits, micro_batch, num_tokens).backward()


def seconds_of(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def by_turns(
    worker: Worker, pipelines: Mapping[str, Pipeline], config: TrainingConfig, repetitions: int
) -> dict[str, list[float]]:
    """{name: seconds of each repetition, as this rank sees them}, of the same step in every pipeline."""
    micro_batches = micro_batches_of(config, tuple(range(config.highest - 1000, config.highest)), 0)
    num_tokens = sum(m.num_tokens for m in micro_batches)
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for repetition in range(1 + repetitions):
        for name in pipelines if repetition % 2 else reversed(list(pipelines)):
            plan = pipelines[name].plan(micro_batches)
            agree(worker.transport, plan)  # and so all ranks begin together
            started = time.perf_counter()
            pipelines[name].step(micro_batches, plan, num_tokens, (config.seed, repetition))
            seconds[name].append(time.perf_counter() - started)
    return {name: column[1:] for name, column in seconds.items()}
