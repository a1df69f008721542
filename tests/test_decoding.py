"""Greedy decoding through any number of stages gives the tokens of one device."""

from dataclasses import replace

import pytest
import torch

from course_utils.decoding import as_words, greedy_decode
from course_utils.number_words import END, PAD, START, Batch, collate
from course_utils.pipeline import Pipeline
from course_utils.schedules import Schedule, gpipe, looped
from course_utils.threads import run_in_threads
from course_utils.transfer import PlanMismatch
from course_utils.transports import Worker
from tests.models import TINY_RUN, one_step

NUMBERS = (7, 123, 4096, 55, 90210)


def decode_on_rank(worker: Worker, schedule: Schedule, seed: int, rows_of_rank: tuple[int, ...] = ()) -> torch.Tensor:
    cut = replace(TINY_RUN, stages=schedule.num_stages).cut
    stages = {s: cut.build(s, seed) for s in schedule.stages_of(worker.rank)}
    pipeline = Pipeline(stages, schedule, worker.transport, cut.carry_after)
    numbers = NUMBERS[: rows_of_rank[worker.rank]] if rows_of_rank else NUMBERS
    return greedy_decode(pipeline, cut, collate(numbers).source, max_length=6)


def decode(schedule: Schedule, seed: int = 3) -> torch.Tensor:
    ranks = run_in_threads(decode_on_rank, schedule.num_ranks, schedule, seed)
    assert all(torch.equal(tokens, ranks[0]) for tokens in ranks)
    return ranks[0]


@pytest.mark.parametrize("schedule", [gpipe(k, 1) for k in range(2, 9)] + [looped(2, 2, 1), looped(3, 2, 1)])
def test_tokens_are_those_of_one_device(schedule):
    assert torch.equal(decode(schedule), decode(gpipe(1, 1)))


def test_tokens_are_the_likeliest_of_the_uncut_model():
    """Decoded step by step, they are also what one forward pass over the finished prefix says."""
    model = replace(TINY_RUN, stages=1).cut.build(0, 3)
    tokens = decode(gpipe(2, 1))
    prefix = torch.cat([torch.full((len(NUMBERS), 1), START), tokens], dim=1)[:, :-1]
    with torch.no_grad():
        logits, _ = model((None, None), Batch(collate(NUMBERS).source, prefix, prefix))
    likeliest = logits.argmax(dim=-1)
    assert tokens.shape == (5, 6)
    for row in range(len(NUMBERS)):
        length = tokens[row].tolist().index(END) + 1 if END in tokens[row] else 6
        assert torch.equal(tokens[row, :length], likeliest[row, :length])
        assert (tokens[row, length:] == PAD).all()


def test_it_stops_when_every_row_has_ended():
    def one_row(worker: Worker) -> torch.Tensor:
        cut = replace(TINY_RUN, stages=1).cut
        stage = cut.build(0, 0)
        with torch.no_grad():
            dict(stage.named_parameters_globally())["07.head.linear.bias"][END] = 1e9
        pipeline = Pipeline({0: stage}, gpipe(1, 1), worker.transport, cut.carry_after)
        return greedy_decode(pipeline, cut, collate(NUMBERS).source, max_length=6)

    assert run_in_threads(one_row, 1)[0].tolist() == [[END]] * 5


def test_different_sources_are_an_error_on_all_ranks():
    caught = []

    def wrong(worker: Worker) -> None:
        try:
            decode_on_rank(worker, gpipe(3, 1), 3, (5, 5, 4))
        except PlanMismatch as error:
            caught.append(str(error))

    run_in_threads(wrong, 3)
    assert len(caught) == 3
    assert all("rank 2: 1 micro-batches over 3 stages: 4 rows" in text for text in caught)


def test_not_in_the_middle_of_a_step():
    def wrong(worker: Worker) -> None:
        cut = replace(TINY_RUN, stages=1).cut
        pipeline = Pipeline({0: cut.build(0, 0)}, gpipe(1, 1), worker.transport, cut.carry_after)
        pipeline.stash[0, 0] = (None, None)
        greedy_decode(pipeline, cut, collate(NUMBERS).source, max_length=6)

    with pytest.raises(RuntimeError, match="1 micro-batches wait for their backward"):
        run_in_threads(wrong, 1)


def test_not_between_expect_and_its_step():
    """The decode's messages would land in the buffers of the step."""

    def decode(worker: Worker) -> None:
        cut = TINY_RUN.cut
        pipeline = Pipeline({worker.rank: cut.build(worker.rank, 0)}, gpipe(2, 3), worker.transport, cut.carry_after)
        pipeline.expect(pipeline.plan(one_step()[0]))
        greedy_decode(pipeline, cut, collate(NUMBERS).source, max_length=6)

    with pytest.raises(RuntimeError, match="run that step, then decode"):
        run_in_threads(decode, 2)


def test_as_words():
    assert as_words(torch.tensor([[4, 5, END, PAD], [3, END, 7, 7], [12, 12, 12, 12]])) == [
        "one two",
        "zero",
        "nine nine nine nine",
    ]
