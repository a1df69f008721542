"""The training loop: what it reports, what it refuses, that it learns."""

from dataclasses import replace

import pytest
import torch

from course_utils import precision
from course_utils.checkpoint import CheckpointError, Checkpoints
from course_utils.number_words import END
from course_utils.optimization import Noam
from course_utils.processes import StageError
from course_utils.schedules import Schedule, gpipe, looped, one_f_one_b, rematerialise
from course_utils.stages import CutModel
from course_utils.threads import run_in_threads
from course_utils.timeline import COMPUTE, Timeline
from course_utils.training import TrainingConfig, answer, train, train_on_one_device
from course_utils.validity import NotAscending
from tests.models import TINY_RUN
from tests.test_fingerprint import descending


def test_every_step_is_reported_as_soon_as_it_is_done():
    seen = []
    result = train(TINY_RUN, run=run_in_threads, on_step=seen.append)
    assert [step.number for step in seen] == [0, 1, 2]
    assert seen == result.steps
    reference = train_on_one_device(TINY_RUN)
    assert [step.loss for step in seen] == [step.loss for step in reference.steps]
    assert [step.gradient_norm for step in seen] == [step.gradient_norm for step in reference.steps]


def test_the_learning_rate_is_noam_s_and_not_zero_at_first():
    result = train(TINY_RUN, run=run_in_threads)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    noam = Noam(optimizer, TINY_RUN.model.d_model, TINY_RUN.warm_up, TINY_RUN.learning_rate_factor)
    for step in result.steps:
        assert step.learning_rate == noam.get_last_lr()[0] > 0
        optimizer.step()
        noam.step()


def test_weights_of_all_stages_come_back_in_model_order():
    result = train(TINY_RUN, looped(2, 2, 3), run=run_in_threads)
    reference = train_on_one_device(TINY_RUN)
    assert list(result.weights) == list(reference.weights)
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in reference.weights.items())
    assert result.answers == reference.answers
    assert answer(result.config, result.weights, list(result.answers)) == list(result.answers.values())


ROWS = gpipe(2, 3).actions
IDLE = [
    Schedule(3, (0, 2), (ROWS[0], (), ROWS[1])),
    Schedule(3, (1, 2), ((), *ROWS)),
    Schedule(3, (0, 1), (*ROWS, ())),
]


@pytest.mark.parametrize("schedule", IDLE, ids=lambda schedule: str(schedule.rank_of_stage))
def test_a_rank_without_stages_joins_in(schedule):
    result, reference = train(TINY_RUN, schedule, run=run_in_threads), train_on_one_device(TINY_RUN)
    assert (result.fingerprint, result.answers) == (reference.fingerprint, reference.answers)
    assert result.schedule == schedule


def poison(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, at_call: int, stage: int) -> None:
    """Make the gradients of one stage not finite in one step."""
    from course_utils import training_state

    original, calls = training_state.gradient_norms, []

    def poisoned(parameters, num_norms):
        parameters = list(parameters)
        calls.append(parameters[0][0])
        if parameters[0][0] == stage_start and calls.count(stage_start) == at_call:
            parameters[0][1].grad[:] = float("nan")
        return original(parameters, num_norms)

    first_names = [name for name, _ in config.cut.build(stage, 0).named_parameters_globally()]
    stage_start = config.cut.parameter_names.index(first_names[0])
    monkeypatch.setattr(training_state, "gradient_norms", poisoned)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_on_one_stage_skips_the_step_everywhere(monkeypatch, stage):
    config = replace(TINY_RUN, stages=3, steps=4)
    poison(config, monkeypatch, at_call=2, stage=stage)
    result = train(config, run=run_in_threads)
    assert [step.skipped for step in result.steps] == [False, True, False, False]
    rates = [step.learning_rate for step in result.steps]
    assert rates[1] == rates[2]  # the skipped step did not move it
    assert all(torch.isfinite(tensor).all() for tensor in result.weights.values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stages": 0}, "0 stages"),
        ({"stages": 99}, "8 blocks into 99"),
        ({"micro_batches": 0}, "micro-batches is 0"),
        ({"micro_batches": 1000}, "micro-batches is 1000"),
        ({"schedule": "magic"}, "'magic'.*naive, gpipe, 1f1b"),
        ({"steps": -1}, "steps is -1"),
        ({"held_out": 10**7}, "10000000"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"max_norm": 0}, "max_norm is 0"),
        ({"warm_up": 0}, "warm_up is 0"),
        ({"learning_rate_factor": -1}, "factor is -1"),
        ({"precision": "fp8"}, "'fp8'; there are fp32, bf16, fp16, auto"),
        ({"precision": "fp16"}, "fp16 on a CPU.*many times slower.*Use bf16, fp32, or auto"),
        ({"loss_scale": 0}, "scale is 0"),
        ({"loss_scale": 1e39}, "scale is 1e\\+39.*finite in float32"),
        ({"loss_scale": 1e-46}, "scale is 1e-46"),
        ({"loss_scale": 1e-40}, "scale is 1e-40"),
        ({"rematerialisation": "often"}, "'often'; there are never, always, except_last"),
        ({"wire_dtype": "int8"}, "'int8'; there are None, bf16, fp16"),
        ({"batch_size": 201}, "batch_size is 201, more than the 200 numbers"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(TINY_RUN, **changes)


def test_an_invalid_schedule_is_refused_before_anything_starts():
    with pytest.raises(NotAscending, match="0B1 comes before 0B0"):
        train(TINY_RUN, descending(gpipe(2, 3)))


def test_longer_numbers_than_it_was_trained_on_are_not_cut_short():
    result = train_on_one_device(TINY_RUN)
    result.weights["07.head.linear.bias"][END] = -1e9  # a model that never ends by itself
    (words,) = answer(result.config, result.weights, [123456789])
    assert len(words.split()) == 10


def test_no_steps_and_nothing_held_out():
    result = train(replace(TINY_RUN, steps=0, held_out=0), run=run_in_threads)
    assert (result.steps, result.answers, result.exact_match) == ([], {}, 0)


@pytest.mark.processes
def test_real_processes_give_the_same_run():
    result = train(replace(TINY_RUN, stages=3))
    reference = train_on_one_device(TINY_RUN)
    assert result.fingerprint == reference.fingerprint
    assert result.answers == reference.answers


@pytest.mark.processes
def test_a_stage_that_fails_is_named():
    broken = replace(TINY_RUN, model=replace(TINY_RUN.model, max_length=3))
    with pytest.raises(StageError, match="max_length=3"):
        train(broken)


@pytest.mark.parametrize("schedule", [gpipe(3, 3), looped(2, 2, 3), rematerialise(gpipe(3, 3), "always")])
def test_a_first_stage_whose_weights_are_frozen(monkeypatch, schedule):
    build = CutModel.build

    def frozen(self, *arguments):
        stage = build(self, *arguments)
        for builder, block in zip(stage.builders, stage.blocks, strict=True):
            block.requires_grad_(builder.index > 2)
        return stage

    monkeypatch.setattr(CutModel, "build", frozen)
    config = replace(TINY_RUN, held_out=0)
    assert train(config, schedule, run=run_in_threads).fingerprint == train_on_one_device(config).fingerprint


# --- Timelines, precision, re-materialisation -------------------------------------------------------------------------


def order_of(timeline: Timeline, rank: int) -> list[str]:
    return [f"{i.stage}{i.kind}{i.micro_batch}" for i in timeline if i.rank == rank and i.kind in COMPUTE]


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_the_steps_asked_for_are_recorded(make, policy):
    schedule = rematerialise(make(3, 4), policy)
    result = train(replace(TINY_RUN, steps=4), schedule, run=run_in_threads, record=(1, 3))
    assert list(result.timelines) == [1, 3]
    timeline = result.timelines[3]
    assert (timeline.num_ranks, timeline.label, timeline.unit) == (3, "measured", "seconds")
    for rank in range(3):
        assert order_of(timeline, rank) == [str(action) for action in schedule.actions[rank]]
    messages = [m for channel in schedule.channels.values() for m in channel]
    assert sum(interval.kind == "s" for interval in timeline) == len(messages) == 2 * 2 * 4
    assert sum(interval.kind == "w" for interval in timeline) == len(messages) + 3  # until all is taken, at the end
    assert result.fingerprint == train_on_one_device(replace(TINY_RUN, steps=4, micro_batches=4)).fingerprint


def test_what_is_computed_twice_is_computed_twice_on_the_timeline():
    """Recomputation does not wait for the gradient: it begins when the action before it has ended."""
    schedule = rematerialise(gpipe(2, 3), "always")
    timeline = train(TINY_RUN, schedule, run=run_in_threads, record=[0]).timelines[0]
    first = {i.kind: i for i in reversed(list(timeline)) if (i.rank, i.micro_batch) == (0, 0)}
    assert first["F"].end < first["R"].start < first["R"].end <= first["w"].start <= first["w"].end <= first["B"].start


def test_nothing_is_recorded_unasked():
    assert train(TINY_RUN, run=run_in_threads).timelines == {}


def test_auto_is_decided_before_anything_starts(monkeypatch):
    for answer_of_the_measurement, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "low_precision_pays", lambda work, device, pays=answer_of_the_measurement: pays)
        result = train(replace(TINY_RUN, precision="auto"), run=run_in_threads)
        assert result.config.precision == expected
        assert result.fingerprint == train_on_one_device(replace(TINY_RUN, precision=expected)).fingerprint


def test_the_loss_scale_is_reported_and_changes_no_bit():
    config = replace(TINY_RUN, loss_scale=256.0)
    result = train(config, run=run_in_threads)
    assert [step.loss_scale for step in result.steps] == [256.0] * 3
    assert result.fingerprint == train_on_one_device(TINY_RUN).fingerprint
    assert [step.gradient_norm for step in result.steps] == [s.gradient_norm for s in train_on_one_device(config).steps]


# --- Checkpoints: a run that is broken off and resumed ----------------------------------------------------------------


def interrupted_at(step_number: int):
    """A way to run ranks that ends with an error in the middle of the training."""

    def run(function, world_size, *arguments, on_event):
        def watch(rank, event):
            on_event(rank, event)
            if getattr(event, "number", None) == step_number:
                raise InterruptedError("broken off")

        return run_in_threads(function, world_size, *arguments, on_event=watch)

    return run


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"loss_scale": 4.0}, {"recorded_steps": 3}])
def test_a_run_broken_off_and_resumed_over_other_stages_has_the_same_fingerprint(tmp_path, changes):
    config = replace(TINY_RUN, steps=8, model=replace(TINY_RUN.model, dropout=0.1), **changes)
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(InterruptedError):
        train(config, run=interrupted_at(4), checkpoints=checkpoints, save_every=2)
    with pytest.raises(InterruptedError):
        three = replace(config, stages=3, schedule="1f1b", rematerialisation="always")
        train(three, run=interrupted_at(6), checkpoints=checkpoints, save_every=3, resume=True)
    result = train(replace(config, stages=1), run=run_in_threads, checkpoints=checkpoints, save_every=5, resume=True)
    whole = train_on_one_device(config)
    assert [step.number for step in result.steps] == [6, 7]
    assert result.steps == whole.steps[6:]
    assert (result.fingerprint, result.answers) == (whole.fingerprint, whole.answers)
    assert [(report.step, report.saved) for report in result.saves] == [(8, True)]


def test_a_resumed_run_without_dropout_of_state_would_differ(tmp_path):
    """What the test above would miss if a checkpoint held the weights alone: Adam's moments and the learning rate."""
    config = replace(TINY_RUN, steps=4)
    checkpoints = Checkpoints(tmp_path)
    train(replace(config, steps=2), run=run_in_threads, checkpoints=checkpoints)
    resumed = train(config, run=run_in_threads, checkpoints=checkpoints, resume=True)
    whole = train_on_one_device(config)
    assert resumed.fingerprint == whole.fingerprint
    assert [s.learning_rate for s in resumed.steps] == [s.learning_rate for s in whole.steps[2:]]
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_a_finished_run_resumed_does_nothing_and_answers(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = train(TINY_RUN, run=run_in_threads, checkpoints=checkpoints)
    again = train(replace(TINY_RUN, stages=3), run=run_in_threads, checkpoints=checkpoints, resume=True)
    assert again.steps == [] and again.answers == first.answers


def test_resume_where_nothing_was_saved_begins_at_the_beginning(tmp_path):
    result = train(TINY_RUN, run=run_in_threads, checkpoints=Checkpoints(tmp_path / "new"), resume=True)
    assert [step.number for step in result.steps] == [0, 1, 2]


def test_what_cannot_be_resumed_is_refused_before_anything_starts(tmp_path):
    checkpoints = Checkpoints(tmp_path)

    def refused(config, match, **options):
        with pytest.raises(ValueError, match=match):
            train(config, run=None, **options)  # a run would be a TypeError

    train(TINY_RUN, run=run_in_threads, checkpoints=checkpoints)
    refused(TINY_RUN, "is a checkpoint of step 3: resume from it, or name another folder", checkpoints=checkpoints)
    refused(replace(TINY_RUN, seed=1), "seed was 0 and is 1 now", checkpoints=checkpoints, resume=True)
    refused(replace(TINY_RUN, steps=2), "has done 3 steps, more than the 2", checkpoints=checkpoints, resume=True)
    other = replace(TINY_RUN, micro_batches=2)
    refused(other, "micro_batches was 3 and is 2 now", checkpoints=checkpoints, resume=True)
    refused(TINY_RUN, "resume needs checkpoints", resume=True)
    rounded, in_rounded = replace(TINY_RUN, wire_dtype="bf16"), Checkpoints(tmp_path / "rounded")
    train(rounded, run=run_in_threads, checkpoints=in_rounded)
    refused(replace(rounded, stages=3), "stages was 2 and is 3 now", checkpoints=in_rounded, resume=True)
    refused(TINY_RUN, "save_every is 0", checkpoints=checkpoints, save_every=0)


def test_a_save_that_fails_is_told_and_the_run_goes_on_by_choice(tmp_path):
    (tmp_path / "in the way").write_text("a file")
    nowhere = Checkpoints(tmp_path / "in the way" / "folder", on_failure="continue")
    with pytest.warns(UserWarning, match="no checkpoint of step 3 was saved: .*could not be made"):
        result = train(TINY_RUN, run=run_in_threads, checkpoints=nowhere)
    assert len(result.steps) == 3 and [report.saved for report in result.saves] == [False]
    with pytest.raises(CheckpointError, match="could not be made"):
        train(TINY_RUN, run=run_in_threads, checkpoints=Checkpoints(nowhere.folder))
