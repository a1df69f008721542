"""Tied parameters stay one parameter, whoever holds them."""

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from course_utils.checkpoint import CheckpointError, Checkpoints
from course_utils.number_words import Batch
from course_utils.pipeline import sum_over_tokens
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig, micro_batches_of, numbers_of
from course_utils.schedules import Schedule
from course_utils.stages import Stage, one_thread
from course_utils.threads import run_in_threads
from course_utils.ties import Ties
from course_utils.training import train, train_on_one_device
from course_utils.training_state import TrainingState
from course_utils.transfer import PlanMismatch
from course_utils.transports import Worker
from tests.models import TINY, TINY_RUN
from tests.schedule_strategies import rows_that_run

EMBEDDING, OUTPUT = PAIR = "04.target_embedding.embedding.tokens.weight", "07.head.linear.weight"
TIED = replace(TINY_RUN, steps=5, model=replace(TINY, dropout=0.1), tie=(PAIR,))
# Three that are one, and a second group of which two lie on neighbouring blocks.
NORMS = "03.encoder_norm.norm.weight", "07.head.norm.weight"
MANY = replace(TIED, tie=(PAIR, (NORMS[1], NORMS[0], "05.decoder_0.self_attention_norm.weight")))


def assert_tied(weights: dict[str, Tensor], config: TrainingConfig) -> None:
    for first, *others in config.tie:
        assert all(torch.equal(weights[first], weights[other]) for other in others)


# --- One fingerprint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "stages", "schedule"), [(TIED, 2, "gpipe"), (TIED, 4, "1f1b"), (MANY, 3, "1f1b"), (MANY, 8, "gpipe")]
)
def test_every_cut_gives_the_bits_of_one_device(config: TrainingConfig, stages: int, schedule: str) -> None:
    expected = train_on_one_device(config)
    result = train(replace(config, stages=stages, schedule=schedule), run=run_in_threads)
    assert result.fingerprint == expected.fingerprint
    assert result.steps == expected.steps
    assert_tied(result.weights, config)
    assert expected.fingerprint != train_on_one_device(replace(config, tie=())).fingerprint


@pytest.mark.parametrize("rank_of_stage", [(0, 1, 1, 0), (0, 1, 0, 1), (1, 0, 2, 1)], ids=str)
def test_owners_on_one_rank_and_in_any_placement(rank_of_stage: tuple[int, ...]) -> None:
    schedule = Schedule(3, rank_of_stage, tuple(map(tuple, rows_that_run(random.Random(0), list(rank_of_stage), 3))))
    result = train(MANY, schedule, run=run_in_threads)
    assert result.fingerprint == train_on_one_device(MANY).fingerprint


@pytest.mark.processes
def test_over_real_processes() -> None:
    config = replace(MANY, stages=3)
    result = train(config, run=launch)
    assert result.fingerprint == train_on_one_device(config).fingerprint
    assert_tied(result.weights, config)


def test_with_a_loss_scale_in_low_precision() -> None:
    config = replace(TIED, stages=3, loss_scale=2.0**20, precision="bf16")
    assert train(config, run=run_in_threads).fingerprint == train_on_one_device(config).fingerprint


def test_a_resume_with_another_number_of_stages(tmp_path) -> None:
    whole = train_on_one_device(replace(MANY, steps=6))
    train(replace(MANY, steps=3), run=run_in_threads, checkpoints=Checkpoints(tmp_path))
    config = replace(MANY, steps=6, stages=4)
    result = train(config, run=run_in_threads, checkpoints=Checkpoints(tmp_path), resume=True)
    assert result.fingerprint == whole.fingerprint
    with pytest.raises(CheckpointError, match="tie was .* and is "):
        train(replace(config, tie=()), run=run_in_threads, checkpoints=Checkpoints(tmp_path), resume=True)


# --- What it means: one tensor that is used several times ---------------------------------------------------------


def gradients_of_a_shared_tensor(config: TrainingConfig, micro_batches: Iterable[Batch]) -> dict[str, Tensor]:
    """As anyone writes it on one device: `head.weight = embedding.weight`."""
    model = config.cut.build(0, config.seed)
    blocks = dict(enumerate(model.blocks))
    blocks[7].linear.weight = blocks[4].embedding.tokens.weight
    num_tokens = sum(m.num_tokens for m in micro_batches)
    for m in micro_batches:
        sum_over_tokens(model((None, None), m, None)[0], m, num_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters_globally()}


def test_gradients_and_norm_are_those_of_one_shared_tensor() -> None:
    config = replace(TIED, stages=1, model=TINY)
    micro_batches = micro_batches_of(config, numbers_of(config).training, 0)
    with one_thread():
        shared = gradients_of_a_shared_tensor(config, micro_batches)
        total = torch.linalg.vector_norm(torch.stack([g.norm() for g in unique(shared.values())]))
        model = config.cut.build(0, config.seed)
        state = TrainingState(config, config.cut, [model])
        norms = one_step_of(state, model, micro_batches)
    assert torch.linalg.vector_norm(norms).item() == pytest.approx(total.item(), rel=1e-5)
    own = dict(state.named)
    assert torch.equal(own[EMBEDDING].grad, own[OUTPUT].grad)
    assert torch.dist(own[EMBEDDING].grad, shared[EMBEDDING]) <= 1e-5 * shared[EMBEDDING].norm()
    assert norms[state.place[OUTPUT]] == 0 < norms[state.place[EMBEDDING]]


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def one_step_of(state: TrainingState, model: Stage, micro_batches: list[Batch]) -> Tensor:
    num_tokens = sum(m.num_tokens for m in micro_batches)
    state.ties.open()
    for m in micro_batches:
        sum_over_tokens(model((None, None), m, None)[0], m, num_tokens).backward()
    return state.take_in({})


def test_they_begin_with_the_weights_of_the_first_owner() -> None:
    drawn = replace(TIED, stages=1).cut.build(0, 0)
    first = dict(drawn.named_parameters_globally())[EMBEDDING]
    for stages in (1, 2, 4):
        result = train(replace(TIED, stages=stages, steps=0), run=run_in_threads)
        assert torch.equal(result.weights[OUTPUT], first) and torch.equal(result.weights[EMBEDDING], first)


# --- What goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tie", "words"),
    [
        (((EMBEDDING,),), "a group has the names of two or more"),
        ((EMBEDDING, OUTPUT), "a group has the names of two or more"),
        (
            ((EMBEDDING, "09.head.linear.weight"),),
            "'09.head.linear.weight', which the model does not have; there are 00.",
        ),
        ((PAIR, (OUTPUT, NORMS[0])), "names 07.head.linear.weight twice"),
        (((EMBEDDING, EMBEDDING),), "twice"),
        (((EMBEDDING, NORMS[0]),), r"tokens.weight is \(13, 16\) and 03.encoder_norm.norm.weight is \(16,\)"),
    ],
)
def test_what_cannot_be_tied_is_named(tie: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY_RUN, tie=tie)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_owners_that_do_not_begin_equal(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ties, "make_equal", lambda *arguments: None)
    with pytest.raises(PlanMismatch, match=f"{EMBEDDING} on rank . and {OUTPUT} on rank {stages - 1} must be equal"):
        train(replace(TIED, stages=stages), run=run_in_threads)


def test_gradients_are_asked_for_before_they_are_added() -> None:
    def add(worker: Worker) -> None:
        state = TrainingState(TIED, TIED.cut, [TIED.cut.build(worker.rank, 0)], worker.transport, (0, 1))
        state.take_in({})

    with pytest.raises(RuntimeError, match="at the start of the step"):
        run_in_threads(add, 2)
