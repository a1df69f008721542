"""The self-test of lesson 00 accepts its answers, and tells the usual wrong ones apart."""

import pytest

from tests.answers import said


def right_step(w, gradient, learning_rate):
    return w - learning_rate * gradient


def unwritten_step(w, gradient, learning_rate):
    """Not written."""
    ...


def changes_w(w, gradient, learning_rate):
    w -= learning_rate * gradient
    return w


def without_return(w, gradient, learning_rate):
    w - learning_rate * gradient  # noqa: B018


STEPS = {
    "right": right_step,
    "not written yet": unwritten_step,
    "changed the w": changes_w,
    "nothing came": without_return,
    "uphill": lambda w, gradient, learning_rate: w + learning_rate * gradient,
    "What is the learning rate for": lambda w, gradient, learning_rate: w - gradient,
    "expected the shape": lambda w, gradient, learning_rate: (w - learning_rate * gradient)[:2],
    "ZeroDivisionError": lambda w, gradient, learning_rate: w / 0 if learning_rate > 1 else 1 / 0,
    "off by": lambda w, gradient, learning_rate: w * (1 - learning_rate),
}


def unwritten_chain(x, f, df, dg): ...


CHAINS = {
    "right": lambda x, f, df, dg: dg(f(x)) * df(x),
    "not written yet": unwritten_chain,
    "dg was asked at x": lambda x, f, df, dg: dg(x) * df(x),
    "one of the two derivatives is missing": lambda x, f, df, dg: dg(f(x)),
    "the chain rule needs both": lambda x, f, df, dg: df(x),
    "you added": lambda x, f, df, dg: dg(f(x)) + df(x),
    "expected 45.5625, came 1": lambda x, f, df, dg: 1,
    "nothing came": lambda x, f, df, dg: {}.get(0),
    "expected a number": lambda x, f, df, dg: "many",
}


def right_sum(w, losses):
    w.grad = None
    for loss in losses:
        loss(w).backward()
    return w.grad


def unwritten_sum(w, losses): ...


def keeps_the_old(w, losses):
    for loss in losses:
        loss(w).backward()
    return w.grad


def only_the_last(w, losses):
    for loss in losses:
        w.grad = None
        loss(w).backward()
    return w.grad


def mean(w, losses):
    return right_sum(w, losses) / len(losses)


def twice(w, losses):
    w.grad = None
    for loss in losses:
        (loss(w) * 0.5 + loss(w) * 0.5).backward()
    return w.grad


def forgets_one(w, losses):
    return right_sum(w, losses[:2])


SUMS = {
    "right": right_sum,
    "not written yet": unwritten_sum,
    "An old gradient": keeps_the_old,
    "Only the last loss": only_the_last,
    "the mean over the losses": mean,
    "Each loss should be computed once": twice,
    "off by": forgets_one,
    "nothing came": lambda w, losses: [loss(w).backward() for loss in losses].clear(),
}

CASES = [
    *(("00.step", sentence, answer) for sentence, answer in STEPS.items()),
    *(("00.chain", sentence, answer) for sentence, answer in CHAINS.items()),
    *(("00.add_up", sentence, answer) for sentence, answer in SUMS.items()),
]


@pytest.mark.parametrize("name, sentence, answer", CASES, ids=[f"{name} {sentence}" for name, sentence, _ in CASES])
def test_an_answer_gets_its_sentence(name, sentence, answer, capsys):
    text = said(capsys, name, answer)
    assert sentence in text
    assert text.startswith(f"{name}: right.") == (sentence == "right")
