"""Lesson 11: one step of training, all its parts in the right order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.report import Wrong
from course_utils.number_words import Batch
from course_utils.optimization import clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.recipes import TrainingConfig, micro_batches_of
from course_utils.schedules import gpipe
from course_utils.stages import one_thread
from course_utils.threads import run_in_threads
from course_utils.training_state import TrainingState
from course_utils.transfer import agree, tell_all
from course_utils.transformer import TransformerConfig
from course_utils.transports import TransferError, Worker

CONFIG = TrainingConfig(
    stages=2,
    micro_batches=3,
    batch_size=7,
    warm_up=3,
    learning_rate_factor=1.0,
    max_norm=0.5,
    loss_scale=1024.0,
    recorded_steps=0,
    model=TransformerConfig(d_model=16, heads=2, encoder_layers=1, decoder_layers=1),
)
NUMBERS = tuple(range(90, 120)) + tuple(range(99_990, 100_010))
STEPS, OVERFLOW = 5, 2  # in step 2 a gradient of stage 0, and of no other, is not finite


@dataclass
class After:
    """One rank after one step."""

    weights: dict[str, Tensor]
    learning_rate: float
    scale: float
    calls: list[str] = field(default_factory=list)  # what the answer used, in its order
    came: Any = None
    tokens: list[int] = field(default_factory=list)  # what each forward and backward divided by
    scales: list[float] = field(default_factory=list)  # and multiplied by


# --- What the answer is given ----------------------------------------------------------------------------------------


class Recorded:
    """Hands every call on to the part that it stands for, and writes it down."""

    def __init__(self, name: str, part: Any, calls: list[str]):
        self._name, self._part, self._calls = name, part, calls

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._part, attribute)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(f"{self._name}.{attribute}")
            return value(*args, **kwargs)

        return call


class Rank:
    """The parts of a training step on one rank."""

    def __init__(self, worker: Worker):
        self._worker, cut = worker, CONFIG.cut
        self._stage, self._carry_after = cut.build(worker.rank, CONFIG.seed), cut.carry_after
        self._state = TrainingState(CONFIG, cut, [self._stage])
        self._calls: list[str] = []
        self._tokens: list[int] = []
        self._scales: list[float] = []
        self._number = 0
        self.parameters = self._state.parameters
        self.optimizer = Recorded("optimizer", self._state.optimizer, self._calls)
        self.noam = Recorded("noam", self._state.noam, self._calls)
        self.scaler = Recorded("scaler", self._state.scaler, self._calls)

    def forward_backward(self, micro_batches: list[Batch], num_tokens: int, loss_scale: float) -> dict[int, Tensor]:
        """All forwards and backwards of this rank; gradients are added to `.grad`."""
        self._calls.append("forward_backward")
        self._tokens.append(int(num_tokens))
        self._scales.append(float(loss_scale))
        schedule = gpipe(self._worker.world_size, len(micro_batches))
        pipeline = Pipeline({self._worker.rank: self._stage}, schedule, self._worker.transport, self._carry_after)
        plan = pipeline.plan(micro_batches)
        agree(self._worker.transport, plan)
        losses = pipeline.step(micro_batches, plan, num_tokens, loss_scale=loss_scale)
        if self._number == OVERFLOW and self._worker.rank == 0:
            spoil(self.parameters)
        return losses

    def norms(self) -> Tensor:
        """Of the gradients of this rank; 0 at the places of other ranks' parameters."""
        self._calls.append("norms")
        place = self._state.place
        return gradient_norms(((place[name], parameter) for name, parameter in self._state.named), len(place))

    def share(self, norms: Tensor) -> Tensor:
        """The norms of all ranks."""
        self._calls.append("share")
        return torch.tensor(tell_all(self._worker.transport, norms.tolist(), "the gradient norms")).sum(dim=0)

    def clip(self, norms: Tensor) -> float:
        """Scale the gradients of this rank by the norm of all; return it. One that is not finite changes nothing."""
        self._calls.append("clip")
        return clip_by_global_norm(self.parameters, norms, CONFIG.max_norm)

    def after(self, came: Any) -> After:
        """What is seen after a step; the next one begins a new list of calls."""
        weights = {name: parameter.detach().clone() for name, parameter in self._state.named}
        rate, scale = rate_of(self._state), self._state.scaler.scale
        seen = After(weights, rate, scale, list(self._calls), came, list(self._tokens), list(self._scales))
        for kept in (self._calls, self._tokens, self._scales):
            kept.clear()
        self._number += 1
        return seen


def spoil(parameters: list[Tensor]) -> None:
    """As if a gradient had overflown."""
    if parameters[0].grad is not None:
        parameters[0].grad.view(-1)[0] = torch.inf


def rate_of(state: TrainingState) -> float:
    return float(state.optimizer.param_groups[0]["lr"])


# --- One device, for comparison --------------------------------------------------------------------------------------


@cache
def one_device() -> list[After]:
    """The course's own loop on the same micro-batches."""
    with one_thread():
        cut = CONFIG_ON_ONE.cut
        model = cut.build(0, CONFIG.seed)
        state = TrainingState(CONFIG_ON_ONE, cut, [model])
        seen = []
        for number in range(STEPS):
            micro_batches, losses = micro_batches_of(CONFIG, NUMBERS, number), {}
            num_tokens = sum(m.num_tokens for m in micro_batches)
            state.ties.open()
            state.optimizer.zero_grad()
            for m, micro_batch in enumerate(micro_batches):
                loss = sum_over_tokens(model((None, None), micro_batch)[0], micro_batch, num_tokens)
                loss.backward(torch.full_like(loss, state.scaler.scale))
                losses[m] = loss.detach()
            if number == OVERFLOW:
                spoil(state.parameters)
            state.update(state.take_in(losses), losses, num_tokens)
            weights = {name: parameter.detach().clone() for name, parameter in state.named}
            seen.append(After(weights, rate_of(state), state.scaler.scale, tokens=[num_tokens]))
    return seen


CONFIG_ON_ONE = replace(CONFIG, stages=1)


# --- The check -------------------------------------------------------------------------------------------------------


def training_step(answer: Callable) -> str:
    """A function of (rank, micro_batches) that makes one step of training on one of two ranks."""

    def run(worker: Worker) -> list[After]:
        rank = Rank(worker)
        return [rank.after(answer(rank, micro_batches_of(CONFIG, NUMBERS, number))) for number in range(STEPS)]

    try:
        ranks = run_in_threads(run, 2, limit=10.0, run_limit=15.0)
    except TransferError as error:
        raise Wrong(
            f"The ranks no longer do the same: {error}. Does each call forward_backward and share in every step?"
        ) from None
    for number, expected in enumerate(one_device()):
        steps = [rank[number] for rank in ranks]
        if all(is_right(step, expected) for step in steps):
            continue
        mistake = next((text for text in mistakes(ranks, number) if text), None)
        raise Wrong(mistake or plain_difference(number, steps, expected))
    check_returns(ranks)
    praise = (
        f"{STEPS} steps on two ranks; weights, learning rate and loss scale have one device's bits, also after "
        f"the step in which a gradient of stage 0 overflowed."
    )
    one_by_one = ranks[0][0].calls.count("forward_backward") > 1
    return praise + " (Your micro-batches run one at a time, so the stages take turns, as in lesson 04.)" * one_by_one


def is_right(step: After, expected: After) -> bool:
    same = all(bits(weight) == bits(expected.weights[name]) for name, weight in step.weights.items())
    return same and (step.learning_rate, step.scale) == (expected.learning_rate, expected.scale)


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def check_returns(ranks: list[list[After]]) -> None:
    expected = [number != OVERFLOW for number in range(STEPS)]
    for rank, steps in enumerate(ranks):
        came = [step.came for step in steps]
        if came == [None] * STEPS:
            raise Wrong("The steps are right. Whether the weights changed: nothing came. Is a `return` missing?")
        if came == [not changed for changed in expected]:
            raise Wrong("The steps are right. What came says whether a step was skipped; asked is the opposite.")
        if came != expected:
            raise Wrong(
                f"The steps are right. Whether the weights changed: expected {expected}, came {came} on rank {rank}."
            )


def plain_difference(number: int, steps: list[After], expected: After) -> str:
    for rank, step in enumerate(steps):
        for what in ("scale", "learning_rate"):
            came, right = getattr(step, what), getattr(expected, what)
            if came != right:
                text = f"Rank {rank}, after step {number}: the {what.replace('_', ' ')} is {came:.6g}"
                return f"{text}, on one device {right:.6g}."
        for name, weight in step.weights.items():
            if bits(weight) != bits(expected.weights[name]):
                away = (weight - expected.weights[name]).norm().item()
                return f"Rank {rank}, after step {number}: {name} is {away:.3g} away, in norm, from that of one device."
    return f"After step {number} something differs from one device."  # not reached: one of them is wrong


# --- Mistakes that are known -----------------------------------------------------------------------------------------

ONE_STEP = ("forward_backward", "scaler.unscale", "norms", "share", "clip", "optimizer.step", "noam.step")
MISSING = {
    "forward_backward": "forward_backward was not called, so there are no gradients.",
    "scaler.unscale": f"The gradients are still {CONFIG.loss_scale:g} times too large where the norm is taken and "
    "clipped: nothing divided them by the loss scale.",
    "norms": "Nobody asked for the norms of the gradients, so there is nothing to clip by.",
    "share": "Each rank clips by the norm of its own stage. The global norm is that of all of them.",
    "clip": "Nothing was clipped.",
    "optimizer.step": "The optimizer did not step, so no weight changed.",
    "noam.step": "The learning rate did not move.",
}


def mistakes(ranks: list[list[After]], number: int) -> Iterable[str | None]:
    """Known mistakes in steps that went wrong, the first one first; None where one does not apply.

    number: the first step after which something differs from one device.
    """
    first = ranks[0][0].calls
    for name in ONE_STEP:
        yield MISSING[name] if name not in first else None
    yield from mistakes_of_clearing(ranks[0], number)
    yield from mistakes_of_arguments(ranks[0])
    yield from mistakes_of_order(first)
    if number >= OVERFLOW:
        yield from mistakes_of_skipping(ranks)


def mistakes_of_clearing(steps: list[After], number: int) -> Iterable[str | None]:
    name = "optimizer.zero_grad"
    if not any(name in step.calls for step in steps):
        yield "The gradients of one step are still there in the next: what sets them to nothing?"
    if number > OVERFLOW and name not in steps[OVERFLOW].calls:
        yield (
            "After a skipped step its gradients are still there, and they are not finite: they have to be cleared "
            "whether or not the weights change."
        )
    places = [i for i, call in enumerate(steps[0].calls) if call == "forward_backward"]
    cleared = [i for i, call in enumerate(steps[0].calls) if call == name]
    if any(places[0] < i < places[-1] for i in cleared):
        yield "Gradients are cleared between micro-batches, so that only the last one counts."
    update = steps[0].calls.index("optimizer.step")
    if any(places[-1] < i < update for i in cleared):
        yield "The gradients are cleared after the backwards and before the update, which then has none."


def mistakes_of_arguments(steps: list[After]) -> Iterable[str | None]:
    right = one_device()[0].tokens[0]
    if any(tokens != right for tokens in steps[0].tokens):
        yield (
            f"forward_backward divided by {', '.join(map(str, steps[0].tokens))}; the whole mini-batch has "
            f"{right} tokens, and every micro-batch is divided by them."
        )
    if any(scale != CONFIG.loss_scale for scale in steps[0].scales):
        yield (
            f"The loss was multiplied by {steps[0].scales[0]:g}, and the gradients divided by "
            f"{CONFIG.loss_scale:g}: the scaler's scale belongs into the backward."
        )


def mistakes_of_order(calls: list[str]) -> Iterable[str | None]:
    place = {call: calls.index(call) for call in calls}
    if calls.count("scaler.unscale") > 1:
        yield "The gradients are divided by the loss scale more than once."
    if place.get("scaler.update", len(calls)) < place["scaler.unscale"]:
        yield "The scale is changed before the gradients are divided by it."
    if place["clip"] < place["scaler.unscale"] or place["norms"] < place["scaler.unscale"]:
        yield (
            f"The norm is taken while the gradients are still {CONFIG.loss_scale:g} times too large. What has to "
            "happen before it?"
        )
    if place["optimizer.step"] < place["clip"]:
        yield "The weights are updated before the gradients are clipped."
    if place["noam.step"] < place["optimizer.step"]:
        yield "The learning rate moves before the update that it belongs to."
    if calls.count("optimizer.step") > 1:
        yield "The optimizer steps more than once in a step: one update per mini-batch."


def mistakes_of_skipping(ranks: list[list[After]]) -> Iterable[str | None]:
    rank_0, rank_1 = (steps[OVERFLOW].calls for steps in ranks)
    stepped = ["optimizer.step" in calls for calls in (rank_0, rank_1)]
    if stepped == [False, True]:
        yield (
            f"In step {OVERFLOW} a gradient of stage 0 overflowed. Rank 0 skipped the step and rank 1 did not: from "
            "then on they are halves of two models. Which norm is it that both of them see?"
        )
    if any(stepped):
        yield (
            f"In step {OVERFLOW} a gradient of stage 0 overflowed, and the weights were updated all the same. "
            "What does the norm say then?"
        )
    if "noam.step" in rank_0:
        yield f"Step {OVERFLOW} was skipped, and the learning rate moved all the same."
    if not any("scaler.update" in step.calls for step in ranks[0]):
        yield "The loss scale was not told about the skipped step, so it stays too large."
    elif "scaler.update" not in rank_0:
        yield "The loss scale is told about good steps only; it is halved after a skipped one."
    elif ranks[0][OVERFLOW].scale == CONFIG.loss_scale:
        yield "The loss scale was told that the skipped step was a good one. What does scaler.update want to know?"
