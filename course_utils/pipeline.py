"""The executor of one rank: it holds some stages and runs its part of any valid schedule."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from course_utils.number_words import Batch
from course_utils.schedules import Action, Schedule
from course_utils.stages import Stage
from course_utils.transfer import Exchange, Geometry, PlanMismatch, Specs, StepPlan
from course_utils.transports import Transport
from course_utils.validity import posting_plan

Tensors = tuple[Tensor | None, ...]
Loss = Callable[[Tensor, Batch, int], Tensor]


def sum_over_tokens(logits: Tensor, micro_batch: Batch, num_tokens: int) -> Tensor:
    """A micro-batch's share of the loss: the sum over its tokens, divided by the tokens of the whole mini-batch.

    The shares add up to the mean over all tokens. A mean of means would weigh micro-batches with few tokens too much.

    Args:
        logits: (rows, target_length, vocabulary).
        num_tokens: tokens of the whole mini-batch, padding left out.
    """
    targets = micro_batch.target_output.reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets, ignore_index=0, reduction="sum"
    )
    return losses / num_tokens


class Pipeline:
    """Forward and backward of a mini-batch, in the order that a schedule says.

    Args:
        stages: the stages of this rank by their number.
        schedule: the same on every rank; `validity.validate` accepts it.
        transport: this rank's messages.
        carry_after: gives for (stage, geometry) what that stage hands on.
        loss: computed by the last stage, for each micro-batch.
        compute_context: entered once round the whole step.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        schedule: Schedule,
        transport: Transport,
        carry_after: Callable[[int, Geometry], Specs],
        loss: Loss = sum_over_tokens,
        compute_context: Callable[[], AbstractContextManager] = nullcontext,
        device: str = "cpu",
    ):
        expected = schedule.stages_of(transport.rank)
        if sorted(stages) != expected:
            raise ValueError(f"rank {transport.rank} was given stages {sorted(stages)}; the schedule says {expected}")
        self.stages, self.schedule, self.transport = stages, schedule, transport
        self.carry_after, self.loss, self.compute_context, self.device = carry_after, loss, compute_context, device
        self.posting = posting_plan(schedule, transport.rank)
        self.schedule_text = f"schedule {schedule.rank_of_stage}: {schedule.to_text()}"
        self.trains = any(action.kind == "B" for row in schedule.actions for action in row)
        self.stash: dict[tuple[int, int], tuple[Tensors, Tensors]] = {}  # kept from a forward to its backward
        self.expected: Exchange | None = None  # of the next step, if `expect` has begun it

    def plan(self, micro_batches: Sequence[Batch]) -> StepPlan:
        """What a step of these micro-batches sends: the same on every rank."""
        if len(micro_batches) != self.schedule.num_micro_batches:
            raise ValueError(
                f"{len(micro_batches)} micro-batches were given; the schedule has {self.schedule.num_micro_batches}"
            )
        geometries = [m.geometry for m in micro_batches]
        return StepPlan(geometries, self.carry_after, self.schedule.num_stages, self.schedule_text)

    def expect(self, plan: StepPlan) -> None:
        """Post the receives with which the next step begins, before the ranks have compared its plan.

        Over a long line the next step begins two delays earlier: a rank that has compared can send at once. Receives
        of a wrong size do no harm as long as nobody sends, and a rank that sees different plans never does.

        Only for a step that comes next: whatever is sent next on the same channels arrives in these buffers.
        """
        if self.expected is not None:
            raise RuntimeError("expect() was called twice; run the step that it announced first")
        self.expected = Exchange(self.transport, self.schedule, plan, self.posting, self.device)

    def step(
        self,
        micro_batches: Sequence[Batch],
        plan: StepPlan,
        num_tokens: int,
        dropout_key: tuple[int, int] | None = None,
    ) -> dict[int, Tensor]:
        """Run the schedule once; gradients are added to the parameters' `.grad`.

        A schedule without backwards (`schedules.forward_only`) evaluates: it keeps nothing and changes nothing.

        Args:
            micro_batches: M of them, the same on every rank.
            plan: `self.plan(micro_batches)`, which the ranks have compared (`transfer.agree`).
            num_tokens: what the loss is divided by.
            dropout_key: (seed, step); None: no dropout.

        Returns:
            {micro-batch: its share of the loss}, empty on ranks without the last stage.
        """
        if self.expected is not None and self.expected.plan.digest != plan.digest:  # its receives stay posted: no retry
            raise PlanMismatch(f"expect() was told {self.expected.plan}; this step has {plan}. Give it the same plan.")
        self.stash = {}
        self.handed_over: dict[Action, Tensors] = {}  # between two stages of this rank
        self.losses: dict[int, Tensor] = {}
        self.peak_stash = 0
        self.exchange = self.expected or Exchange(self.transport, self.schedule, plan, self.posting, self.device)
        self.expected = None
        with torch.set_grad_enabled(self.trains), self.compute_context():
            for number, action in enumerate(self.schedule.actions[self.transport.rank], start=1):
                arrived = self.take_in(action)
                self.exchange.begin_action(number)
                if action.kind == "F":
                    key = None if dropout_key is None else (*dropout_key, action.micro_batch)
                    result = self.forward(action, arrived, micro_batches[action.micro_batch], num_tokens, key)
                else:
                    result = self.backward(action, arrived)
                self.hand_on(action, result)
            self.exchange.finish()
        assert not self.stash and not self.handed_over, "a schedule that validate() accepts leaves nothing behind"
        return self.losses

    def take_in(self, action: Action) -> Tensors:
        """What the neighbour stage has made for this action: a message, or a hand-over on the same rank."""
        message = self.schedule.received_by(action)
        if message is not None:
            return tuple(self.exchange.receive(message))
        return self.handed_over.pop(action, (None, None))

    def hand_on(self, action: Action, tensors: Tensors) -> None:
        message = self.schedule.sent_by(action)
        target = self.schedule.target_of(action)
        if message is not None:
            self.exchange.send(message, tensors)
        elif target is not None:
            self.handed_over[target] = tensors

    def forward(
        self,
        action: Action,
        arrived: Tensors,
        micro_batch: Batch,
        num_tokens: int,
        dropout_key: tuple[int, int, int] | None,
    ) -> Tensors:
        """One stage, one micro-batch. What arrived becomes the leaves of this stage's own graph."""
        stage = self.stages[action.stage]
        leaves = tuple(None if tensor is None else tensor.requires_grad_(self.trains) for tensor in arrived)
        # The blocks get a view: autocast keeps the cast of every leaf and would add up its gradients in low precision.
        hidden, memory = (None if leaf is None else leaf.view_as(leaf) for leaf in leaves)
        carry = stage((hidden, memory), micro_batch, dropout_key)
        if stage.is_last:
            loss = self.loss(carry[0], micro_batch, num_tokens)
            self.losses[action.micro_batch] = loss.detach()
            carry = (loss,)
        if self.trains:
            self.stash[action.stage, action.micro_batch] = leaves, carry
        self.peak_stash = max(self.peak_stash, len(self.stash))
        return tuple(None if tensor is None else tensor.detach() for tensor in carry)

    def backward(self, action: Action, arrived: Tensors) -> Tensors:
        """Gradients of all that this stage handed on enter together, as roots; those of its leaves come out."""
        leaves, carry = self.stash.pop((action.stage, action.micro_batch))
        if self.stages[action.stage].is_last:
            arrived = (None,)  # the loss is a scalar and needs no gradient from outside
        roots = [
            (tensor, gradient)
            for tensor, gradient in zip(carry, arrived, strict=True)
            if tensor is not None and (gradient is not None or tensor.dim() == 0)
        ]
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
        return tuple(None if leaf is None else leaf.grad for leaf in leaves)
