"""One rank is not like the others: other data, other weights, another checkpoint, values that are not finite.

Each is an error on all ranks that says which rank and what.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from course_utils import training
from course_utils.checkpoint import Checkpoints
from course_utils.number_words import Batch
from course_utils.pipeline import Pipeline
from course_utils.processes import StageError, launch
from course_utils.schedules import Action, gpipe, one_f_one_b, rematerialise
from course_utils.threads import run_in_threads
from course_utils.training import MOST_SKIPPED, train, train_rank
from course_utils.transfer import PlanMismatch, StepPlan
from course_utils.transports import Worker
from tests.models import TINY_RUN

RUN = replace(TINY_RUN, stages=3)
THREADS_AND_GLOO = [run_in_threads, pytest.param(launch, marks=pytest.mark.processes)]
ERRORS = (PlanMismatch, StageError)


def differences(error: BaseException) -> list[str]:
    """What each rank has that not all have."""
    text = str(error).partition("they differ in this:\n")[2]
    return [line.partition(": ")[2] for line in text.splitlines()[: RUN.stages]]


# --- Other data, other weights --------------------------------------------------------------------------------


class OtherData(Pipeline):
    """The last stage sees the micro-batches of step 1 in another order; their shapes are the same."""

    def plan(self, micro_batches: Sequence[Batch]) -> StepPlan:
        if self.transport.rank == 2:
            micro_batches = [Batch(*(t.flip(0) for t in vars(m).values())) for m in micro_batches]
        return super().plan(micro_batches)


@pytest.mark.parametrize("run", THREADS_AND_GLOO)
def test_other_data_on_one_stage(run: Any) -> None:
    with pytest.raises(ERRORS) as caught:
        train(RUN, engine=OtherData, run=run)
    first, second, third = differences(caught.value)
    assert first == second != third
    assert first.startswith("data ") and third.startswith("data ") and ";" not in first + third


@pytest.mark.parametrize("changed", [{"seed": 1}, {"warm_up": 9}, {"max_norm": 0.5}], ids=str)
def test_a_rank_that_was_started_in_another_way(changed: dict) -> None:
    def start(worker: Worker) -> dict:
        config = replace(RUN, **changed) if worker.rank == 1 else RUN
        return train_rank(worker, config, config.cut, gpipe(3, 3))

    with pytest.raises(PlanMismatch) as caught:
        run_in_threads(start, 3)
    (name, value), (first, second, third) = *changed.items(), differences(caught.value)
    assert first == third and f"{name} {getattr(RUN, name)}" in first
    assert f"{name} {value}" in second


def test_ranks_that_resume_from_different_checkpoints(tmp_path) -> None:
    """As on two machines that do not share a folder: one has the run's checkpoint, the other that of another run."""
    for name, max_norm in (("right", 1.0), ("wrong", 0.1)):
        config = replace(RUN, max_norm=max_norm)
        train(config, run=run_in_threads, checkpoints=Checkpoints(tmp_path / name))

    def resume(worker: Worker) -> dict:
        manifest = Checkpoints(tmp_path / ("wrong" if worker.rank == 2 else "right")).latest()
        return train_rank(worker, replace(RUN, steps=6), RUN.cut, gpipe(3, 3), manifest=manifest)

    with pytest.raises(PlanMismatch) as caught:
        run_in_threads(resume, 3)
    first, second, third = differences(caught.value)
    assert first == second != third
    assert all("weights of a checkpoint with " in text for text in (first, third))


def test_a_rank_that_has_no_checkpoint(tmp_path) -> None:
    train(RUN, run=run_in_threads, checkpoints=Checkpoints(tmp_path))

    def resume(worker: Worker) -> dict:
        manifest = None if worker.rank == 0 else Checkpoints(tmp_path).latest()
        return train_rank(worker, replace(RUN, steps=6), RUN.cut, gpipe(3, 3), manifest=manifest)

    with pytest.raises(PlanMismatch) as caught:
        run_in_threads(resume, 3)
    first, second, _ = differences(caught.value)
    assert "begins at step 0; weights drawn anew" in first and "begins at step 3; weights of a checkpoint" in second


def test_the_data_of_every_step_are_compared() -> None:
    class LaterOtherData(OtherData):
        """From the third plan on."""

        plans = 0

        def plan(self, micro_batches: Sequence[Batch]) -> StepPlan:
            self.plans += 1
            return (super() if self.plans > 2 else super(OtherData, self)).plan(micro_batches)

    steps: list = []
    with pytest.raises(PlanMismatch, match="they differ in this:\n  rank 0: data "):
        train(RUN, engine=LaterOtherData, run=run_in_threads, on_step=steps.append)
    assert len(steps) == 1


# --- Values that are not finite ---------------------------------------------------------------------------------


def spoil(tensors: tuple[Tensor | None, ...], value: float) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor * value for tensor in tensors)


def engine_with(kind: str, stage: int, micro_batch: int, value: float, steps: int = 10_000) -> type[Pipeline]:
    """An engine in which one action makes values that are not finite, in the first steps."""

    class Spoilt(Pipeline):
        done = 0

        def step(self, *arguments: Any) -> dict[int, Tensor]:
            self.done += 1
            return super().step(*arguments)

        def forward(self, action: Action, *others: Any) -> tuple[Tensor | None, ...]:
            result = super().forward(action, *others)
            return spoil(result, value) if self.is_place(action) else result

        def backward(self, action: Action, arrived: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            result = super().backward(action, arrived)
            if self.is_place(action):
                list(self.stages[stage].parameters())[-1].grad.fill_(value)
            return result

        def is_place(self, action: Action) -> bool:
            return self.done <= steps and (action.kind, action.stage, action.micro_batch) == (kind, stage, micro_batch)

    return Spoilt


SCHEDULES = {
    "gpipe": gpipe(3, 3),
    "1f1b": one_f_one_b(3, 3),
    "gpipe, recomputed": rematerialise(gpipe(3, 3), "always"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kind", "stage", "micro_batch", "value"),
    [("F", 0, 1, math.nan), ("F", 1, 2, math.inf), ("B", 0, 0, math.nan), ("B", 1, 1, math.inf), ("B", 2, 0, math.nan)],
)
def test_where_values_cease_to_be_finite_is_named(kind, stage, micro_batch, value, schedule, monkeypatch) -> None:
    """And nothing else, though they are soon everywhere."""
    monkeypatch.setattr(training, "MOST_SKIPPED", 2)
    with pytest.raises(FloatingPointError) as caught:
        engine = engine_with(kind, stage, micro_batch, value)
        train(replace(RUN, steps=5, held_out=0), SCHEDULES[schedule], engine=engine, run=run_in_threads)
    assert f"to be finite: {kind} of micro-batch {micro_batch} on stage {stage}. Look" in str(caught.value)


@pytest.mark.processes
def test_the_stage_where_it_begins_is_the_one_to_blame() -> None:
    with pytest.raises(StageError) as caught:
        train(replace(RUN, steps=99), engine=engine_with("F", 1, 2, math.nan))
    assert (caught.value.rank, caught.value.kind) == (1, "exception")
    assert "F of micro-batch 2 on stage 1. Look" in str(caught.value)


def test_a_few_bad_steps_are_skipped_on_all_stages_and_the_run_goes_on() -> None:
    bad = MOST_SKIPPED - 1
    config = replace(RUN, steps=bad + 3)
    result = train(config, engine=engine_with("B", 1, 0, math.nan, bad), run=run_in_threads)
    assert [step.skipped for step in result.steps] == bad * [True] + 3 * [False]
    assert len({step.learning_rate for step in result.steps[: bad + 1]}) == 1
    assert all(torch.isfinite(weight).all() for weight in result.weights.values())


def test_a_loss_scale_may_be_lowered_for_as_long_as_it_takes(monkeypatch) -> None:
    monkeypatch.setattr(training, "MOST_SKIPPED", 2)
    engine = engine_with("B", 1, 0, math.inf, steps=5)
    result = train(replace(RUN, steps=7, loss_scale=16.0), engine=engine, run=run_in_threads)
    assert [step.loss_scale for step in result.steps] == [16, 8, 4, 2, 1, 0.5, 0.5]
    assert [step.skipped for step in result.steps] == 5 * [True] + 2 * [False]
