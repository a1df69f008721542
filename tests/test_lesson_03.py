"""What the check of lesson 03 says to right and wrong answers."""

import pytest
import torch

from course_utils import links
from tests.answers import said


def lower_rank_first(worker, mine, peer):
    theirs = torch.empty_like(mine)
    if worker.rank < peer:
        links.send(worker, mine, peer, "mine")
        links.receive(worker, theirs, peer, "theirs")
    else:
        links.receive(worker, theirs, peer, "theirs")
        links.send(worker, mine, peer, "mine")
    return theirs


def unwritten(worker, mine, peer):
    """Give the peer `mine` and return the peer's tensor."""
    ...  # your turn


def both_send_first(worker, mine, peer):
    links.send(worker, mine, peer, "mine")
    return links.receive(worker, torch.empty_like(mine), peer, "theirs")


def both_receive_first(worker, mine, peer):
    theirs = links.receive(worker, torch.empty_like(mine), peer, "theirs")
    links.send(worker, mine, peer, "mine")
    return theirs


def even_ranks_first(worker, mine, peer):
    return (both_send_first if worker.rank % 2 == 0 else both_receive_first)(worker, mine, peer)


def two_ranks_only(worker, mine, peer):
    return links.exchange(worker, mine, 1 - worker.rank)


def into_its_own(worker, mine, peer):
    leaving = worker.transport.isend(mine.clone(), peer, "mine")
    worker.transport.wait(worker.transport.irecv(mine, peer, "theirs"))
    worker.transport.wait(leaving)
    return mine.clone()


def always_float(worker, mine, peer):
    leaving = worker.transport.isend(mine, peer, "mine")
    theirs = links.receive(worker, torch.empty(mine.shape), peer, "theirs")
    worker.transport.wait(leaving)
    return theirs


def send_dropped(worker, mine, peer):
    worker.transport.isend(mine, peer, "mine")
    return links.receive(worker, torch.empty_like(mine), peer, "theirs")


def receive_dropped(worker, mine, peer):
    theirs = torch.empty_like(mine)
    worker.transport.irecv(theirs, peer, "theirs")
    links.send(worker, mine, peer, "mine")
    return theirs


def only_lower_sends(worker, mine, peer):
    if worker.rank < peer:
        links.send(worker, mine, peer, "mine")
    return links.receive(worker, torch.empty_like(mine), peer, "theirs")


def keeps_its_own(worker, mine, peer):
    links.exchange(worker, mine, peer)
    return mine


def returns_nothing(worker, mine, peer):
    links.exchange(worker, mine, peer)


def returns_the_wait(worker, mine, peer):
    leaving = worker.transport.isend(mine, peer, "mine")
    arriving = worker.transport.irecv(torch.empty_like(mine), peer, "theirs")
    worker.transport.wait(leaving)
    return worker.transport.wait(arriving)


def misspelt(worker, mine, peer):
    return worker.transport.send(mine, peer)


@pytest.mark.parametrize("answer", [links.exchange, lower_rank_first])
def test_an_answer_is_accepted(capsys, answer):
    assert said(capsys, "03.exchange", answer).startswith("03.exchange: right. Two ranks swapped tensors")


WRONG = {
    unwritten: "not written yet",
    both_send_first: "Both send and wait until the other takes it",
    both_receive_first: "Both wait for a message that neither of them has begun to send",
    even_ranks_first: "With ranks 0 and 2, 2x3 int64: stage 0 waits for stage 2 to take mine",
    two_ranks_only: "With ranks 0 and 2, 2x3 int64",
    into_its_own: "Rank 0's own tensor was overwritten",
    always_float: "Look at the shape and the dtype of the buffer",
    send_dropped: "never waited for what `isend` returned",
    receive_dropped: "never waited for what `irecv` returned",
    only_lower_sends: "One rank waits for a message of which the other never did its part",
    keeps_its_own: "what rank 0 got (ranks 0 and 1, 2x3 float32): at [0, 0]: expected 10, came 0",
    returns_nothing: "What rank 0 got (ranks 0 and 1, 2x3 float32): nothing came. Two things to look at: is a `return`",
    returns_the_wait: "It returns nothing; what arrived is in the buffer",
    misspelt: "It raised AttributeError",
}


@pytest.mark.parametrize("answer", WRONG, ids=lambda answer: answer.__name__)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, answer):
    text = said(capsys, "03.exchange", answer)
    assert WRONG[answer] in text
    assert ": right." not in text
