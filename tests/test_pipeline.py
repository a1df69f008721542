"""The executor: any valid schedule, any cut, the same gradients as one device."""

from dataclasses import replace

import pytest
import torch

from course_utils.pipeline import Pipeline
from course_utils.schedules import SCHEDULES, Schedule, forward_only, gpipe, looped, naive, one_f_one_b
from course_utils.threads import run_in_threads
from course_utils.training import TrainingConfig
from course_utils.transfer import PlanMismatch, agree
from course_utils.transports import Worker
from tests.models import TINY, TINY_RUN, gradients_of, gradients_on_one_device, one_step


def step_on_rank(worker: Worker, config: TrainingConfig, schedule: Schedule) -> dict:
    """One step without an optimizer; what the rank saw."""
    cut = replace(config, stages=schedule.num_stages).cut
    stages = {s: cut.build(s, config.seed) for s in schedule.stages_of(worker.rank)}
    pipeline = Pipeline(stages, schedule, worker.transport, cut.carry_after)
    micro_batches, num_tokens = one_step(config)
    plan = pipeline.plan(micro_batches)
    agree(worker.transport, plan)
    losses = pipeline.step(micro_batches, plan, num_tokens)
    return {
        "losses": losses,
        "gradients": {n: p.grad for stage in stages.values() for n, p in stage.named_parameters_globally()},
        "peak_stash": pipeline.peak_stash,
        "peak_posted": pipeline.exchange.peak_posted,
    }


def run_step(config: TrainingConfig, schedule: Schedule) -> list[dict]:
    return run_in_threads(step_on_rank, schedule.num_ranks, config, schedule)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("micro_batches", [1, 3, 7])
def test_gradients_are_those_of_one_device_to_the_last_bit(name, stages, micro_batches):
    config = replace(TINY_RUN, micro_batches=micro_batches)
    expected = gradients_on_one_device(config, one_step(config)[0])
    found = gradients_of(run_step(config, SCHEDULES[name](stages, micro_batches)))
    assert list(sorted(found)) == list(sorted(expected))
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("layers", [1, 3])
def test_other_depths_of_encoder_and_decoder(layers):
    config = replace(TINY_RUN, model=replace(TINY, encoder_layers=layers, decoder_layers=4 - layers))
    expected = gradients_on_one_device(config, one_step(config)[0])
    found = gradients_of(run_step(config, gpipe(4, 3)))
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_several_stages_on_a_rank():
    for schedule in (looped(2, 2, 3), looped(1, 4, 3), looped(3, 2, 3)):
        expected = gradients_on_one_device(TINY_RUN, one_step(TINY_RUN)[0])
        found = gradients_of(run_step(TINY_RUN, schedule))
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_pieces_and_the_whole_batch_are_close():
    """Sums of other pieces differ in their last bits; what is truly zero is compared with the global norm."""
    pieces = gradients_on_one_device(TINY_RUN, one_step(TINY_RUN)[0])
    whole = gradients_on_one_device(TINY_RUN, one_step(replace(TINY_RUN, micro_batches=1))[0])
    global_norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in whole.values()]))
    assert any(not torch.equal(pieces[name], whole[name]) for name in whole)
    for name, gradient in whole.items():
        assert (pieces[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * global_norm), name


def test_the_losses_of_the_micro_batches_add_up_to_the_mean_over_tokens():
    shares = run_step(TINY_RUN, gpipe(3, 3))[2]["losses"]
    whole = run_step(replace(TINY_RUN, micro_batches=1), gpipe(1, 1))[0]["losses"]
    assert sum(shares.values()).item() == pytest.approx(whole[0].item(), rel=1e-5)


@pytest.mark.parametrize(("make", "expected"), [(gpipe, [7, 7, 7]), (one_f_one_b, [3, 2, 1]), (naive, [1, 1, 1])])
def test_the_stash_is_what_the_schedule_predicts(make, expected):
    ranks = run_step(replace(TINY_RUN, micro_batches=7), make(3, 7))
    assert [rank["peak_stash"] for rank in ranks] == expected


def test_posted_receives_keep_the_memory_that_1f1b_saves():
    ranks = run_step(replace(TINY_RUN, micro_batches=7), one_f_one_b(3, 7))
    for k, rank in enumerate(ranks):
        assert rank["peak_posted"]["activations"] <= min(7, 3 - k + 1)
        assert rank["peak_posted"]["gradients"] <= min(7, 3 - k)


@pytest.mark.parametrize("make", [gpipe(3, 3), looped(2, 2, 3)])
def test_a_schedule_without_backwards_evaluates(make):
    """The losses of training, and nothing kept or changed."""
    ranks, trained = run_step(TINY_RUN, forward_only(make)), run_step(TINY_RUN, make)
    assert [rank["losses"] for rank in ranks] == [rank["losses"] for rank in trained]
    assert [rank["peak_stash"] for rank in ranks] == [0] * len(ranks)
    assert all(gradient is None for gradient in gradients_of(ranks).values())


def test_more_micro_batches_than_rows():
    with pytest.raises(ValueError, match="8"):
        one_step(replace(TINY_RUN, batch_size=8, micro_batches=8))[0][0].split(8)
    with pytest.raises(ValueError, match="micro-batches is 8"):
        replace(TINY_RUN, micro_batches=8)


def test_a_rank_with_the_wrong_stages_is_refused():
    def wrong(worker: Worker) -> None:
        stage = TINY_RUN.cut.build(0, 0)
        Pipeline({0: stage}, gpipe(2, 3), worker.transport, TINY_RUN.cut.carry_after)

    with pytest.raises(ValueError, match=r"rank 1 was given stages \[0\]; the schedule says \[1\]"):
        run_in_threads(wrong, 2)


def test_another_number_of_micro_batches_than_the_schedule_has():
    def wrong(worker: Worker) -> None:
        pipeline = Pipeline({0: replace(TINY_RUN, stages=1).cut.build(0, 0)}, gpipe(1, 4), worker.transport, None)
        pipeline.plan(one_step()[0])

    with pytest.raises(ValueError, match="3 micro-batches were given; the schedule has 4"):
        run_in_threads(wrong, 1)


def test_a_stage_that_gives_another_shape_than_planned_is_named():
    def wrong(worker: Worker) -> None:
        cut = TINY_RUN.cut
        stage = cut.build(worker.rank, 0)
        if worker.rank == 0:
            stage.register_forward_hook(lambda module, given, carry: (None, carry[1][:, :-1]))
        pipeline = Pipeline({worker.rank: stage}, gpipe(2, 3), worker.transport, cut.carry_after)
        micro_batches, num_tokens = one_step()
        pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens)

    with pytest.raises(PlanMismatch, match=r"activations of micro-batch 0 \(stage 0 to 1\): the plan says"):
        run_in_threads(wrong, 2)
