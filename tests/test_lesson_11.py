"""The check of lesson 11 accepts the step and names what is wrong with others."""

import math

import pytest

from tests.answers import said


def tokens(micro_batches):
    return sum(micro_batch.num_tokens for micro_batch in micro_batches)


def right(rank, micro_batches):
    rank.optimizer.zero_grad()
    rank.forward_backward(micro_batches, tokens(micro_batches), rank.scaler.scale)
    rank.scaler.unscale(rank.parameters)
    norm = rank.clip(rank.share(rank.norms()))
    finite = math.isfinite(norm)
    if finite:
        rank.optimizer.step()
        rank.noam.step()
    rank.scaler.update(not finite)
    return finite


def make(
    before=lambda rank: rank.optimizer.zero_grad(),
    run=lambda rank, pieces: rank.forward_backward(pieces, tokens(pieces), rank.scaler.scale),
    unscale=lambda rank: rank.scaler.unscale(rank.parameters),
    norms=lambda rank: rank.share(rank.norms()),
    clip=lambda rank, norms: rank.clip(norms),
    skips=lambda norm: not math.isfinite(norm),
    update=lambda rank: (rank.optimizer.step(), rank.noam.step()),
    always=lambda rank: None,
    scaler=lambda rank, skipped: rank.scaler.update(skipped),
    result=lambda skipped: not skipped,
):
    """An answer, some part of it exchanged."""

    def training_step(rank, micro_batches):
        before(rank)
        run(rank, micro_batches)
        unscale(rank)
        skipped = skips(clip(rank, norms(rank)))
        if not skipped:
            update(rank)
        always(rank)
        scaler(rank, skipped)
        return result(skipped)

    return training_step


def one_at_a_time(clear):
    def run(rank, pieces):
        for piece in pieces:
            if clear:
                rank.optimizer.zero_grad()
            rank.forward_backward([piece], tokens(pieces), rank.scaler.scale)

    return run


def own_tokens(rank, pieces):
    for piece in pieces:
        rank.forward_backward([piece], piece.num_tokens, rank.scaler.scale)


def cleared_at_the_end(rank, micro_batches):
    changed = make(before=lambda rank: None)(rank, micro_batches)
    rank.optimizer.zero_grad()
    return changed


def cleared_if_updated(rank):
    rank.optimizer.step()
    rank.noam.step()
    rank.optimizer.zero_grad()


def clipped_first(rank, micro_batches):
    rank.optimizer.zero_grad()
    rank.forward_backward(micro_batches, tokens(micro_batches), rank.scaler.scale)
    norm = rank.clip(rank.share(rank.norms()))
    rank.scaler.unscale(rank.parameters)
    if math.isfinite(norm):
        rank.optimizer.step()
        rank.noam.step()
    rank.scaler.update(not math.isfinite(norm))
    return math.isfinite(norm)


def shares_only_what_is_finite(rank, micro_batches):
    rank.optimizer.zero_grad()
    rank.forward_backward(micro_batches, tokens(micro_batches), rank.scaler.scale)
    rank.scaler.unscale(rank.parameters)
    norms = rank.norms()
    if not math.isfinite(norms.norm()):
        return False
    rank.clip(rank.share(norms))
    rank.optimizer.step()
    rank.noam.step()
    rank.scaler.update(False)
    return True


def unwritten(rank, micro_batches):
    """One step."""
    ...


GOOD = {"in one piece": right, "of parts": make(), "cleared at the end": cleared_at_the_end}
WRONG = {
    "not written": (unwritten, "not written yet"),
    "nothing": (lambda rank, micro_batches: False, "forward_backward was not called"),
    "never cleared": (make(before=lambda rank: None), "still there in the next"),
    "cleared if updated": (make(before=lambda rank: None, update=cleared_if_updated), "After a skipped step"),
    "cleared per micro-batch": (make(run=one_at_a_time(clear=True)), "only the last one counts"),
    "cleared too late": (make(unscale=lambda rank: (rank.scaler.unscale(rank.parameters), rank.optimizer.zero_grad())),
                         "before the update, which then has none"),
    "own tokens": (make(run=own_tokens), "every micro-batch is divided by them"),
    "not scaled": (make(run=lambda rank, pieces: rank.forward_backward(pieces, tokens(pieces), 1.0)),
                   "belongs into the backward"),
    "not unscaled": (make(unscale=lambda rank: None), "nothing divided them by the loss scale"),
    "unscaled twice": (make(unscale=lambda rank: [rank.scaler.unscale(rank.parameters) for _ in range(2)]),
                       "more than once"),
    "clipped first": (clipped_first, "still 1024 times too large. What has to happen"),
    "own norm": (make(norms=lambda rank: rank.norms()), "clips by the norm of its own stage"),
    "not clipped": (make(clip=lambda rank, norms: norms.norm().item()), "Nothing was clipped"),
    "never skips": (make(skips=lambda norm: False), "updated all the same"),
    "rate moves": (make(update=lambda rank: rank.optimizer.step(), always=lambda rank: rank.noam.step()),
                   "Step 2 was skipped, and the learning rate moved"),
    "rate first": (make(update=lambda rank: (rank.noam.step(), rank.optimizer.step())), "before the update that it"),
    "no rate": (make(update=lambda rank: rank.optimizer.step()), "The learning rate did not move"),
    "no update": (make(update=lambda rank: rank.noam.step()), "The optimizer did not step"),
    "scaler not told": (make(scaler=lambda rank, skipped: None), "was not told about the skipped step"),
    "scaler told good": (make(scaler=lambda rank, skipped: rank.scaler.update(False)), "was a good one"),
    "scaler told the norm": (make(scaler=lambda rank, skipped: rank.scaler.update(not skipped)), "the scale is 512"),
    "one rank shares": (shares_only_what_is_finite, "The ranks no longer do the same"),
    "no return": (make(result=lambda skipped: None), "Is a `return` missing"),
    "the opposite": (make(result=lambda skipped: skipped), "asked is the opposite"),
    "another return": (make(result=lambda skipped: 1.5), "came [1.5, 1.5"),
    "raises": (lambda rank, micro_batches: rank.zero_grad(), "It raised AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_the_answer_is_accepted(capsys, name):
    text = said(capsys, "11.training_step", GOOD[name])
    assert text.startswith("11.training_step: right. 5 steps on two ranks;") and "lesson 04" not in text


def test_micro_batches_one_at_a_time_are_accepted_and_mentioned(capsys):
    text = said(capsys, "11.training_step", make(run=one_at_a_time(clear=False)))
    assert text.startswith("11.training_step: right. ") and "as in lesson 04" in text


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # what torch says to two of them
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(capsys, name):
    answer, sentence = WRONG[name]
    text = said(capsys, "11.training_step", answer)
    assert sentence in text
    assert ": right." not in text
