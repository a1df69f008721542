"""Checks of lesson 08: a loss scale that finds its own size."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from course_utils.checks.report import Wrong, call_on_gradients, expect, is_unwritten
from course_utils.optimization import LossScaler

SCALE, INTERVAL = 1024.0, 3
# Whether each step is skipped. Good runs of every length up to twice the interval, and skips right after a growth.
SERIES = [step == "s" for step in "gg" + "s" + "ggg" + "s" + "gggggg" + "ss" + "g" + "s" + "gggg" + "s" + "gg" + "s"]
GRADIENTS = [[1024.0, -2048.0], [3.0, 0.0, 512.0]]


def loss_scaler(answer: Any) -> str:
    """A class with `scale`, `unscale(parameters)` and `update(skipped)`."""
    for name in ("unscale", "update"):
        if not callable(getattr(answer, name, None)):
            raise Wrong(f"There is no method {name}. The class needs unscale(parameters) and update(skipped).")
    if is_unwritten(answer.unscale):
        raise NotImplementedError("unscale")
    look_at_unscale(answer)  # also while update is not written yet
    if is_unwritten(answer.update):
        raise NotImplementedError("update")
    look_at_update(answer)
    return (
        f"Gradients come out divided by the scale, and over {len(SERIES)} steps, {sum(SERIES)} of them skipped, the "
        "scale is that of the package's LossScaler."
    )


def look_at_unscale(answer: Callable) -> None:
    scaler, parameters = answer(SCALE, INTERVAL), []
    for values in GRADIENTS:
        parameters.append(nn.Parameter(torch.ones(len(values))))
        parameters[-1].grad = torch.tensor(values)
    parameters.insert(1, nn.Parameter(torch.ones(1)))  # without a gradient
    call_on_gradients(scaler.unscale, iter(parameters))
    for parameter in parameters:
        if not torch.equal(parameter.detach(), torch.ones_like(parameter)):
            raise Wrong("unscale has changed a parameter. Only the gradients carry the scale.")
    if parameters[1].grad is not None:
        raise Wrong("unscale has given a gradient to a parameter that had none.")
    for parameter, values in zip(parameters[::2], GRADIENTS, strict=True):
        before = torch.tensor(values)
        if parameter.grad is None:
            raise Wrong("unscale has removed a gradient.")
        if torch.equal(parameter.grad, before):
            raise Wrong(
                f"unscale with the scale {SCALE:g} has left the gradient {values} as it was. "
                "Are the gradients themselves changed, or a copy of them?"
            )
        if torch.equal(parameter.grad, before * SCALE):
            raise Wrong("unscale multiplies by the scale. The gradients are the scale times too large already.")
        expect("A gradient after unscale", before / SCALE, parameter.grad)
    expect("The scale after unscale", SCALE, float(scaler.scale))


def look_at_update(answer: Callable) -> None:
    """Raises Wrong, naming the mistake if it is a known one, unless the scale moves as the package's does."""
    came = scales(answer(SCALE, INTERVAL))
    right = scales(LossScaler(SCALE, growth_interval=INTERVAL))
    if came == right:
        return
    step = next(i for i, (a, b) in enumerate(zip(right, came, strict=True)) if a != b)
    history = ", ".join("skipped" if skipped else "good" for skipped in SERIES[: step + 1])
    text = (
        f"update, beginning at {SCALE:g} with growth_interval={INTERVAL}: after the steps {history} the scale should "
        f"be {right[step]:g}; it is {came[step]:g}."
    )
    hints = [sentence for sentence, options in MISTAKES.items() if scales(Other(**options)) == came]
    raise Wrong(f"{text} {hints[0]}" if len(hints) == 1 else text)


def scales(scaler: Any) -> list[float]:
    """The scale after each step of the series."""
    found = []
    for skipped in SERIES:
        scaler.update(skipped)
        found.append(float(scaler.scale))
    return found


class Other:
    """A loss scale with some mistakes in it."""

    def __init__(
        self,
        backoff: float = 0.5,
        growth: float = 2.0,
        late: int = 0,
        reset_when_skipped: bool = True,
        reset_when_grown: bool = True,
        inverted: bool = False,
    ):
        self.scale, self.good_steps, self.backoff, self.growth = SCALE, 0, backoff, growth
        self.needed, self.inverted = INTERVAL + late, inverted
        self.reset_when_skipped, self.reset_when_grown = reset_when_skipped, reset_when_grown

    def update(self, skipped: bool) -> None:
        if skipped != self.inverted:
            self.scale *= self.backoff
            self.good_steps *= not self.reset_when_skipped
            return
        self.good_steps += 1
        if self.good_steps == self.needed or (not self.reset_when_grown and self.good_steps > self.needed):
            self.scale *= self.growth
            self.good_steps *= not self.reset_when_grown


MISTAKES: dict[str, dict[str, Any]] = {
    "It never changes. Does update set self.scale?": {"backoff": 1.0, "growth": 1.0},
    "A skipped step does not lower it.": {"backoff": 1.0},
    "It never grows again.": {"growth": 1.0},
    "A skipped step and a good one have changed places.": {"inverted": True},
    "A skipped step is to halve it, not to double it.": {"backoff": 2.0},
    "It grows one good step too late.": {"late": 1},
    "It grows one good step too early.": {"late": -1},
    "Good steps in a row are counted: does the count begin anew after a skipped step?": {"reset_when_skipped": False},
    "Does the count of good steps begin anew after the scale has grown?": {"reset_when_grown": False},
}
