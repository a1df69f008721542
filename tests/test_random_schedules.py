"""Whatever `validate` accepts trains to the bits of one device: random valid schedules, in threads and over gloo."""

import random
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings

from course_utils.processes import launch
from course_utils.schedules import Message, Schedule
from course_utils.threads import run_in_threads
from course_utils.training import TrainingConfig, TrainingResult, train, train_on_one_device
from course_utils.validity import validate
from tests.models import TINY, TINY_RUN
from tests.schedule_strategies import any_valid_schedule, random_schedule, rows_that_run

# Nine blocks for the nine stages of the largest schedule; 17 rows, which no M from 2 to 16 divides.
MODEL = replace(TINY, encoder_layers=3, dropout=0.1)
CONFIG = replace(TINY_RUN, model=MODEL, steps=2, batch_size=17, held_out=3)

# Ranks that hold neighbouring stages, ranks in another order than their stages, three stages on a rank, eight in all.
PLACEMENTS = [(0, 0, 1, 1), (0, 1, 1, 0), (1, 0), (2, 1, 0), (0, 1, 0, 1, 0, 1), (1, 1, 0, 0, 0, 2, 2, 1)]


def placed(rank_of_stage: tuple[int, ...], num_micro_batches: int, seed: int) -> Schedule:
    """A random schedule that runs, for stages on these ranks."""
    rows = rows_that_run(random.Random(seed), list(rank_of_stage), num_micro_batches)
    return Schedule(num_micro_batches, rank_of_stage, tuple(map(tuple, rows)))


@cache
def on_one_device(config: TrainingConfig) -> TrainingResult:
    return train_on_one_device(config)


def differences(result: TrainingResult) -> list[str]:
    """In what a run differs from the run of one device on the same micro-batches."""
    reference = on_one_device(replace(result.config, stages=1, schedule="gpipe"))
    names = ("fingerprint", "answers", "steps")
    return [name for name in names if getattr(result, name) != getattr(reference, name)]


@settings(max_examples=12)
@given(any_valid_schedule())
def test_any_valid_schedule_trains_in_threads_as_one_device(schedule: Schedule) -> None:
    validate(schedule)
    assert differences(train(CONFIG, schedule, run=run_in_threads)) == []


@pytest.mark.parametrize("rank_of_stage", PLACEMENTS, ids=str)
@pytest.mark.parametrize("num_micro_batches", [1, 17])
def test_any_placement_of_the_stages_trains_in_threads_as_one_device(rank_of_stage, num_micro_batches) -> None:
    schedule = placed(rank_of_stage, num_micro_batches, seed=num_micro_batches)
    assert differences(train(CONFIG, schedule, run=run_in_threads)) == []


def crosses(schedule: Schedule) -> bool:
    """Whether some rank needs the messages of a channel in another order than they are sent."""
    needed: dict[tuple[int, int], list[Message]] = {}
    for row in schedule.actions:
        for action in row:
            if (message := schedule.received_by(action)) is not None:
                needed.setdefault(schedule.channel(message), []).append(message)
    return any(tuple(messages) != schedule.channels[channel] for channel, messages in needed.items())


def schedules_for_gloo() -> list[Schedule]:
    """Ten: random ones in which messages would be swapped if receives were posted as needed, others, placements."""
    rng = random.Random(1)
    drawn = [random_schedule(rng, may_hang=False) for _ in range(200)]
    few_ranks = [schedule for schedule in drawn if schedule.num_ranks < 4]
    crossing = [schedule for schedule in few_ranks if crosses(schedule)]
    others = [schedule for schedule in few_ranks if schedule.num_micro_batches > 1 and not crosses(schedule)]
    return crossing[:4] + others[:3] + [placed(ranks, 5, seed=0) for ranks in PLACEMENTS[:3]]


@pytest.mark.processes
@pytest.mark.parametrize("schedule", schedules_for_gloo(), ids=lambda schedule: str(schedule.rank_of_stage))
def test_what_runs_in_threads_gives_the_same_fingerprint_over_gloo(schedule: Schedule) -> None:
    in_threads = train(CONFIG, schedule, run=run_in_threads)
    over_gloo = train(CONFIG, schedule, run=launch)
    assert over_gloo.fingerprint == in_threads.fingerprint
    assert differences(over_gloo) == []
