"""Small configurations that the tests share."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from course_utils.number_words import Batch
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.recipes import TrainingConfig, micro_batches_of
from course_utils.schedules import gpipe
from course_utils.threads import run_in_threads
from course_utils.transfer import PlanMismatch, agree
from course_utils.transformer import TransformerConfig
from course_utils.transports import Worker

TINY = TransformerConfig(d_model=16, heads=2)
TINY_RUN = TrainingConfig(
    stages=2,
    micro_batches=3,
    steps=3,
    batch_size=7,
    warm_up=4,
    model=TINY,
    highest=9999,
    training_numbers=200,
    held_out=5,
)


def one_step(config: TrainingConfig = TINY_RUN) -> tuple[list[Batch], int]:
    """The micro-batches of a first step, and the number of their tokens."""
    micro_batches = micro_batches_of(config, tuple(range(1, 3000, 7)), 0)
    return micro_batches, sum(m.num_tokens for m in micro_batches)


def gradients_on_one_device(config: TrainingConfig, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """{parameter: its gradient} of a plain loop over the micro-batches, on one thread."""
    torch.set_num_threads(1)
    model = replace(config, stages=1).cut.build(0, config.seed)
    num_tokens = sum(m.num_tokens for m in micro_batches)
    for micro_batch in micro_batches:
        logits, _ = model((None, None), micro_batch, None)
        sum_over_tokens(logits, micro_batch, num_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters_globally()}


def gradients_of(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """{parameter: its gradient} from what ranks report, each with its "gradients"."""
    return {name: gradient for rank in ranks for name, gradient in rank["gradients"].items()}


def refusal_of_an_odd_rank(config: TrainingConfig, **odd: Any) -> str:
    """What two ranks say that compare their plans, if the second one's pipeline has another option."""

    def compare(worker: Worker) -> None:
        cut = replace(config, stages=2).cut
        stages = {worker.rank: cut.build(worker.rank, 0)}
        options = odd if worker.rank else {}
        pipeline = Pipeline(stages, gpipe(2, 3), worker.transport, cut.carry_after, **options)
        agree(worker.transport, pipeline.plan(one_step(config)[0]))

    with pytest.raises(PlanMismatch) as caught:
        run_in_threads(compare, 2)
    return str(caught.value)
