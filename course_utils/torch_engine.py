"""torch.distributed.pipelining as a second opinion: the same stages, run by PyTorch's own engine.

It joins the comparison of fingerprints where it is defined: every micro-batch has the same shape, in every step; M >= K
for 1F1B; one stage per rank. Nothing in the course depends on this module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from course_utils.number_words import Batch
from course_utils.pipeline import Pipeline
from course_utils.schedules import gpipe, one_f_one_b
from course_utils.stages import Stage
from course_utils.transfer import StepPlan


class ContiguousGradient(torch.autograd.Function):
    """Gloo sends contiguous tensors only, and the gradient of the memory comes out of attention transposed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.contiguous()


class TensorsOnly(nn.Module):
    """A stage as torch's engine wants it: tensors in, tensors out, no None; what the blocks read comes by keyword."""

    def __init__(self, stage: Stage, receives: Sequence[bool], hands_on: Sequence[bool]):
        super().__init__()
        self.stage, self.receives, self.hands_on = stage, receives, hands_on
        self.dropout_key: tuple[int, int] | None = None

    def forward(self, *arrived: Tensor, source: Tensor, target_input: Tensor, number: Tensor) -> Any:
        carry: list[Tensor | None] = [None, None]
        if not self.stage.is_first:
            tensors = iter(arrived)
            carry = [ContiguousGradient.apply(next(tensors)) if present else None for present in self.receives]
        micro_batch = Batch(source, target_input, target_input)
        key = None if self.dropout_key is None else (*self.dropout_key, int(number[0]))
        result = self.stage((carry[0], carry[1]), micro_batch, key)
        if self.stage.is_last:
            return result[0]
        return tuple(t.contiguous() for t, sent in zip(result, self.hands_on, strict=True) if sent and t is not None)


class TorchPipeline(Pipeline):
    """Like `Pipeline`, but a step is run by torch's ScheduleGPipe or Schedule1F1B."""

    def expect(self, plan: StepPlan) -> None:
        """Torch's engine posts its receives itself, each when it needs it."""

    def step(
        self,
        micro_batches: Sequence[Batch],
        plan: StepPlan,
        num_tokens: int,
        dropout_key: tuple[int, int] | None = None,
        loss_scale: float = 1.0,
    ) -> dict[int, Tensor]:
        if loss_scale != 1.0 or self.low_precision or self.wire_dtype or self.recomputed or self.timeline is not None:
            raise ValueError("torch's engine is compared in fp32 without options: use the course's engine for those")
        if len(set(plan.geometries)) > 1:
            raise ValueError(f"torch's engine needs micro-batches of one shape, these have {set(plan.geometries)}")
        if not hasattr(self, "engine"):
            self.geometry = plan.geometries[0]
            self.engine = self.make_engine(plan)
        if plan.geometries[0] != self.geometry:
            raise ValueError(f"torch's engine needs one shape in all steps: {self.geometry}, now {plan.geometries[0]}")
        self.num_tokens, self.adapter.dropout_key = num_tokens, dropout_key
        rows = micro_batches[0].rows
        source, target_input, target_output = (
            torch.cat([getattr(m, name) for m in micro_batches]) for name in ("source", "target_input", "target_output")
        )
        number = torch.arange(len(micro_batches)).repeat_interleave(rows)
        arguments = (source,) if self.adapter.stage.is_first else ()
        losses: list[Tensor] = []
        target = target_output if self.adapter.stage.is_last else None
        self.engine.step(
            *arguments, target=target, losses=losses, source=source, target_input=target_input, number=number
        )
        return {m: loss.detach() for m, loss in enumerate(losses)}

    def make_engine(self, plan: StepPlan) -> Any:
        rank, num_stages = self.transport.rank, self.schedule.num_stages
        geometry, (stage,) = plan.geometries[0], self.stages.values()

        def present(border: int) -> list[bool]:
            return [spec is not None for spec in self.carry_after(border, geometry)]

        self.adapter = TensorsOnly(stage, present(rank - 1) if rank else [], present(rank))
        group = self.transport.data_group  # type: ignore[attr-defined]
        pipeline_stage = PipelineStage(self.adapter, rank, num_stages, torch.device(self.device), group=group)
        num_micro_batches = self.schedule.num_micro_batches
        if self.schedule == gpipe(num_stages, num_micro_batches):
            kind: Any = ScheduleGPipe
        elif self.schedule == one_f_one_b(num_stages, num_micro_batches):
            kind = Schedule1F1B
        else:
            raise ValueError("torch's engine is compared for GPipe and 1F1B only")

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return self.loss(logits, Batch(target, target, target), self.num_tokens)

        return kind(pipeline_stage, num_micro_batches, loss_fn=loss, scale_grads=False)
