"""What the checks of a step cost, measured alone, as a share of a step of the capstone on two stages.

    python -m tests.benchmarks.checks_cost

The checks of a rank: the plan of the step and its digest, a look at every tensor that it sends, and the comparison of
the digests of all ranks. (That the digests travel costs no message: they ride on the gradient norms.) The step: forward
and backward of the same micro-batches on one device and one thread, halved: the least that two stages can take.
"""

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.number_words import Batch
from course_utils.recipes import TrainingConfig
from course_utils.schedules import Message
from course_utils.stages import CutModel
from course_utils.transfer import Specs, StepPlan, check_digests, check_tensor
from tests.benchmarks.capstone_step import beside_steps, seconds_of

NO_TRANSPORT: Any = None  # equal digests are compared without a message


def measure(repetitions: int = 50) -> dict[str, float]:
    """{"checks": milliseconds, "step": milliseconds, "share": checks/step}: medians; the two take turns."""
    cut = TrainingConfig().cut

    def seconds_of_checks(micro_batches: list[Batch]) -> float:
        carries = [tensors_like(cut.carry_after(0, m.geometry)) for m in micro_batches]
        return seconds_of(partial(run_checks, cut, micro_batches, carries))

    pairs = beside_steps(seconds_of_checks, repetitions)
    return {
        "checks": 1e3 * statistics.median(checks for checks, _ in pairs),
        "step": 1e3 * statistics.median(step for _, step in pairs),
        "share": statistics.median(checks / step for checks, step in pairs),
    }


def tensors_like(specs: Specs) -> list[Tensor | None]:
    return [None if spec is None else torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]


def run_checks(cut: CutModel, micro_batches: list[Batch], carries: list[list[Tensor | None]]) -> None:
    """All that rank 0 checks in a step in which it sends these carries."""
    plan = StepPlan([m.geometry for m in micro_batches], cut.carry_after, cut.num_stages)
    for number, carry in enumerate(carries):
        message = Message(0, 1, number)
        for tensor, spec in zip(carry, plan.specs(message), strict=True):
            if spec is not None:
                check_tensor(f"{message} (stage {message.source} to {message.destination})", tensor, spec)
    check_digests(NO_TRANSPORT, plan, cut.num_stages * [plan.digest])


def main() -> None:
    figures = measure()
    print(
        f"the checks of a step: {figures['checks']:.3f} ms; the step: {figures['step']:.1f} ms on each of two stages; "
        f"share {figures['share']:.3%}"
    )


if __name__ == "__main__":
    main()
