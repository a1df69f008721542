"""What must be the same on every stage: the learning rate, the norm of all gradients, the decision to skip a step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Noam(LRScheduler):
    """Linear warm-up, then decay with the inverse square root of the step (Vaswani et al., 2017, section 5.3):

        lr = factor * d_model^-0.5 * min(step^-0.5, step * warm_up^-1.5)

    The step counts from 1, so the first update of the optimizer already has a learning rate above 0. Call `step()`
    after `optimizer.step()`, and only then. The optimizer's own learning rate is multiplied in: leave it at 1.0.

    Args:
        d_model: width of the model.
        warm_up: number of steps until the peak, which is factor / sqrt(d_model * warm_up).
        factor: scales the whole curve.

    Raises:
        ValueError: unless d_model and warm_up are at least 1 and factor is positive.
    """

    def __init__(self, optimizer: Optimizer, d_model: int, warm_up: int, factor: float = 1.0):
        for name, value in (("d_model", d_model), ("warm_up", warm_up)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not factor > 0:
            raise ValueError(f"factor is {factor}; it must be above 0")
        self.d_model, self.warm_up, self.factor = d_model, warm_up, factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch + 1
        scale = self.factor * self.d_model**-0.5 * min(step**-0.5, step * self.warm_up**-1.5)
        return [base * scale for base in self.base_lrs]


def gradient_norms(parameters: Iterable[tuple[int, Tensor]], num_norms: int) -> Tensor:
    """The norm of each gradient of this rank, at its parameter's place in the model.

    Args:
        parameters: pairs (place in the whole model, parameter); a parameter without a gradient counts as 0.
        num_norms: number of parameters of the whole model.

    Returns:
        (num_norms,) float32, zero for parameters of other ranks.
    """
    norms = torch.zeros(num_norms)
    for place, parameter in parameters:
        if parameter.grad is not None:
            norms[place] = torch.linalg.vector_norm(parameter.grad)
    return norms


def clip_by_global_norm(parameters: Iterable[Tensor], norms: Tensor, max_norm: float) -> float:
    """Scale the gradients of this rank so that the norm over *all* ranks is at most max_norm; return the norm before.

    The global norm is the norm of the vector of all parameters' norms in model order, as in torch's `clip_grad_norm_`
    on one device. Adding up the squares of each stage first would differ in the last bit in about half of all cases.

    Args:
        norms: (number of parameters of the model,) the norms of all ranks.
        max_norm: Pascanu et al., 2013, section 3.2; infinity clips nothing.

    Returns:
        The global norm. If it is not finite, no gradient is touched, and every rank must skip the step.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be above 0")
    total = torch.linalg.vector_norm(norms)
    if torch.isfinite(total):
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return total.item()


class LossScaler:
    """Multiplies the loss, so that small gradients do not vanish in float16 (Micikevicius et al., 2018, section 3.2).

    The scale is halved whenever a gradient was not finite, and that step is skipped; after `growth_interval` good steps
    in a row it is doubled. torch's GradScaler does the same for one process. Its decision knows that process's
    gradients only, so stages that used it would diverge; this one is told the decision of all stages, and every stage
    that starts from the same scale keeps it.

    Per step: backward with `scale`, `unscale`, clip by the global norm, skip or update the weights, `update`.

    Args:
        scale: to begin with; a power of two changes no bit of a gradient that stays finite and normal.
        enabled: if False the scale is 1 and stays so; bfloat16 and float32 need none.

    Raises:
        ValueError: for a scale that is not positive, factors on the wrong side of 1, an interval below 1.
    """

    def __init__(
        self,
        scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        if not is_usable(scale):
            raise ValueError(f"scale is {scale}; it must be positive, and it and 1 / scale finite in float32")
        if not growth_factor > 1:
            raise ValueError(f"growth_factor is {growth_factor}; it must be above 1")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor is {backoff_factor}; it must be between 0 and 1")
        if growth_interval < 1:
            raise ValueError(f"growth_interval is {growth_interval}; it must be at least 1")
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.enabled, self.good_steps = enabled, 0
        self.scale = torch.tensor(scale, dtype=torch.float32).item() if enabled else 1.0

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients of this rank by the scale; before they are clipped, or the norm would be scaled too."""
        if self.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / self.scale)

    def update(self, skipped: bool) -> None:
        """After each step. skipped: whether a gradient of *any* stage was not finite."""
        if not self.enabled:
            return
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.multiply(self.backoff_factor)
        elif self.good_steps == self.growth_interval:
            self.good_steps = 0
            self.multiply(self.growth_factor)

    def multiply(self, factor: float) -> None:
        """The scale is a float32, as in torch; it stays where it and its reciprocal are finite."""
        changed = torch.tensor(self.scale * factor, dtype=torch.float32).item()
        self.scale = changed if is_usable(changed) else self.scale

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


def is_usable(scale: float) -> bool:
    """Whether float32 can multiply and divide by it."""
    rounded = torch.tensor(scale, dtype=torch.float32)
    return bool(rounded > 0 and torch.isfinite(rounded) and torch.isfinite(1 / rounded))
