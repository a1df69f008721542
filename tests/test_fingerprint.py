"""The promise of the course: one fingerprint for every way of running the same micro-batches."""

from dataclasses import replace

import pytest
import torch

from course_utils import recipes
from course_utils.fingerprints import StageRecord, fingerprint
from course_utils.reference import COLUMNS, EVEN, STEPS, column
from course_utils.schedules import Action, Schedule, gpipe
from course_utils.threads import run_in_threads
from course_utils.training import train, train_on_one_device
from tests.models import TINY_RUN


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("steps", [4, pytest.param(STEPS, marks=pytest.mark.weekly)])
@pytest.mark.parametrize("name", COLUMNS)
def test_every_way_of_running_gives_one_fingerprint(name, steps):
    found = column(name, steps)
    assert len(set(found.values())) == 1, found
    assert len(found) >= 20
    if name in EVEN:
        assert sum(row.startswith("torch's engine") for row in found) >= 2


def descending(schedule: Schedule) -> Schedule:
    """GPipe with its backwards in descending order: valid for the messages, another order of addition."""
    rows = []
    for row in schedule.actions:
        forwards = [action for action in row if action.kind == "F"]
        backwards = [action for action in row if action.kind == "B"]
        rows.append((*forwards, *reversed(backwards)))
    return Schedule(schedule.num_micro_batches, schedule.rank_of_stage, tuple(rows))


def test_one_planted_change_of_order_changes_it(monkeypatch):
    monkeypatch.setattr(recipes, "validate", lambda schedule: schedule)  # which would refuse it
    schedule = descending(gpipe(2, 3))
    assert schedule.actions[0][3] == Action("B", 0, 2)
    wrong = train(TINY_RUN, schedule, run=run_in_threads)
    right = train_on_one_device(TINY_RUN)
    assert wrong.fingerprint != right.fingerprint
    for step, expected in zip(wrong.steps, right.steps, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-5)  # a falling curve shows nothing of it


def test_it_depends_on_every_bit():
    def record(loss: float = 1.0, gradient: float = 2.0, name: str = "w") -> str:
        stage = StageRecord()
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.full((3,), gradient)
        stage.add_losses({0: torch.tensor(loss)})
        stage.add_gradients([(name, parameter)])
        return fingerprint([stage.summary()])

    next_up = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0)).item()
    assert record() == record()
    assert len({record(), record(loss=1.5), record(gradient=next_up), record(name="v")}) == 4


def test_it_does_not_depend_on_how_the_model_is_cut():
    first, second = StageRecord(), StageRecord()
    first.add("a", torch.ones(2))
    second.add("b", torch.zeros(2))
    whole = StageRecord()
    whole.add("b", torch.zeros(2))
    whole.add("a", torch.ones(2))
    assert fingerprint([first.summary(), second.summary()]) == fingerprint([whole.summary()])


def test_a_parameter_on_two_ranks_is_an_error():
    first, second = StageRecord(), StageRecord()
    for stage in (first, second):
        stage.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="two ranks recorded a"):
        fingerprint([first.summary(), second.summary()])


def test_different_seeds_have_different_fingerprints():
    assert train_on_one_device(TINY_RUN).fingerprint != train_on_one_device(replace(TINY_RUN, seed=1)).fingerprint
