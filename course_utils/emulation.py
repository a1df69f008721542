"""The pipeline with stages that only take time: what a schedule gives on devices that this machine does not have.

On a laptop K processes share a few cores, so more stages make nothing faster there. A stage that sleeps instead of
computing needs no core. All the rest is real: the executor, its receives and sends, the processes, the waiting. What is
measured is the schedule with its messages, on K devices of a speed that you choose.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.number_words import Geometry, collate
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.schedules import Schedule
from course_utils.simulation import Costs, check_runs, costs_per_stage
from course_utils.timeline import Timeline, merge
from course_utils.transfer import Specs, agree
from course_utils.transformer import Carry, CarrySpec
from course_utils.transports import Worker

LABEL = "emulated compute, real messages"


def emulate(
    schedule: Schedule,
    forward: Costs,
    backward: Costs,
    recompute: Costs | None = None,
    message_shape: Sequence[int] = (8, 16, 128),
    steps: int = 2,
    run: Callable[..., list] = launch,
) -> Timeline:
    """Run a schedule with sleeping stages; return the timeline of its last step.

    It is compared with `simulation.simulate` of the same costs: what it takes longer is the price of the messages and
    of the executor. A sleep ends late, on Linux by about 0.1 ms, so use stages of several milliseconds.

    Args:
        schedule: a whole step, or one without backwards.
        forward, backward: seconds that one micro-batch takes in a stage: one number, or one per stage.
        recompute: seconds of a forward that is computed once more; None: as many as `forward`.
        message_shape: of the activations, and so of the gradients, of one micro-batch, in float32.
        steps: at least 1; only the last one is measured, so that what happens once (connections, memory) is left out.
        run: `processes.launch`, or `threads.run_in_threads`.

    Raises:
        ScheduleError: the schedule cannot run.
        ValueError: a cost is no positive number, or there is not one per stage; there is no step.
    """
    check_runs(schedule)
    if steps < 1:
        raise ValueError(f"the number of steps is {steps}; there must be at least 1, the last one is measured")
    costs = {"forward": forward, "backward": backward, "recompute": forward if recompute is None else recompute}
    seconds = {name: costs_per_stage(name, cost, schedule.num_stages) for name, cost in costs.items()}
    return merge(run(emulate_rank, schedule.num_ranks, schedule, seconds, tuple(message_shape), steps))


def emulate_rank(
    worker: Worker, schedule: Schedule, seconds: dict[str, list[float]], message_shape: tuple[int, ...], steps: int
) -> Timeline:
    """What one rank does in the last step."""
    stages: dict[int, Any] = {}
    for stage in schedule.stages_of(worker.rank):
        own = {name: per_stage[stage] for name, per_stage in seconds.items()}
        stages[stage] = SleepingStage(stage, schedule.num_stages, message_shape, **own)

    def carry_after(stage: int, geometry: Geometry) -> Specs:
        return CarrySpec(message_shape, torch.float32, True), None

    pipeline = Pipeline(stages, schedule, worker.transport, carry_after, loss=lambda hidden, *_: hidden.sum())
    micro_batches = [collate([1])] * schedule.num_micro_batches  # their numbers do not matter
    plan = pipeline.plan(micro_batches)
    timeline = Timeline(schedule.num_ranks, LABEL, unit="seconds")
    for step in range(steps):
        pipeline.timeline = timeline if step == steps - 1 else None
        agree(worker.transport, plan)  # so that all ranks begin the step together
        pipeline.step(micro_batches, plan, num_tokens=1, dropout_key=(0, step))
    return timeline


class SleepingStage(nn.Module):
    """In the place of a `stages.Stage`: it hands on what it gets, late."""

    def __init__(
        self,
        index: int,
        num_stages: int,
        message_shape: tuple[int, ...],
        forward: float,
        backward: float,
        recompute: float,
    ):
        super().__init__()
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.message_shape = message_shape
        self.seconds = {"forward": forward, "backward": backward, "recompute": recompute}
        self.computed: set[tuple[int, int, int]] = set()

    def forward(self, carry: Carry, micro_batch: object, dropout_key: tuple[int, int, int]) -> Carry:
        """dropout_key: (seed, step, micro-batch); the second time that it comes the forward is recomputed."""
        name = "recompute" if dropout_key in self.computed else "forward"
        self.computed.add(dropout_key)
        hidden = torch.zeros(self.message_shape, requires_grad=torch.is_grad_enabled()) if self.is_first else carry[0]
        return Sleep.apply(hidden, self.seconds[name], self.seconds["backward"]), None


class Sleep(torch.autograd.Function):
    """Sleeps in the forward and in the backward pass, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, None, None
