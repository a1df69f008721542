"""The executor of one rank: it holds some stages and runs its part of any valid schedule."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from course_utils.number_words import Batch
from course_utils.precision import autocast
from course_utils.schedules import Action, Schedule
from course_utils.stages import Stage
from course_utils.timeline import Timeline
from course_utils.transfer import Exchange, Geometry, PlanMismatch, Specs, StepPlan
from course_utils.transports import Transport
from course_utils.validity import posting_plan

Tensors = tuple[Tensor | None, ...]
DropoutKey = tuple[int, int, int] | None  # seed, step, micro-batch
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


def digest_of(micro_batches: Sequence[Batch]) -> str:
    """12 hexadecimal digits that differ as soon as any token differs: all ranks must read the same data."""
    data = hashlib.sha256()
    for m in micro_batches:
        for tokens in (m.source, m.target_input, m.target_output):
            data.update(tokens.numpy(force=True).tobytes())
    return data.hexdigest()[:12]


def are_finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)


class Pipeline:
    """Forward and backward of a mini-batch, in the order that a schedule says.

    Args:
        stages: the stages of this rank by their number.
        schedule: the same on every rank; `validity.validate` accepts it.
        transport: this rank's messages.
        carry_after: gives for (stage, geometry) what that stage hands on.
        loss: computed by the last stage, for each micro-batch.
        low_precision: what matrix products compute with, for example torch.bfloat16; None: as the weights are.
        wire_dtype: see `transfer.StepPlan`.

    Attributes:
        timeline: what `step` records into, if it is not None: see `timeline.KINDS`; in seconds of time.perf_counter().
        peak_stash: the most micro-batches whose graphs were kept at once in the last step.
        watches_values: whether `step` looks for where values cease to be finite, which takes time.
        not_finite: what it has found, in words: the first action of this rank that made such values from finite ones.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        schedule: Schedule,
        transport: Transport,
        carry_after: Callable[[int, Geometry], Specs],
        loss: Loss = sum_over_tokens,
        low_precision: torch.dtype | None = None,
        wire_dtype: torch.dtype | None = None,
        device: str = "cpu",
    ):
        expected = schedule.stages_of(transport.rank)
        if sorted(stages) != expected:
            raise ValueError(f"rank {transport.rank} was given stages {sorted(stages)}; the schedule says {expected}")
        self.stages, self.schedule, self.transport = stages, schedule, transport
        self.carry_after, self.loss, self.device = carry_after, loss, device
        self.low_precision, self.wire_dtype = low_precision, wire_dtype
        self.actions = schedule.actions[transport.rank]
        self.posting = posting_plan(schedule, transport.rank)
        self.also = f"products in {low_precision}; schedule {schedule.rank_of_stage}: {schedule.to_text()}"
        self.trains = any(action.kind == "B" for row in schedule.actions for action in row)
        which = " of stage {0.stage}" if len(stages) > 1 else ""
        text = "{0.kind} of micro-batch {0.micro_batch}" + which
        self.doing = [text.format(action) for action in self.actions]  # for whoever asks meanwhile
        self.recomputed = {(a.stage, a.micro_batch) for a in self.actions if a.kind == "R"}
        # What is kept from a forward to its backward: what arrived, and the graph of what became of it.
        self.inputs: dict[tuple[int, int], Tensors] = {}
        self.stash: dict[tuple[int, int], Tensors] = {}
        self.expected: Exchange | None = None  # of the next step, if `expect` has begun it
        self.timeline: Timeline | None = None
        self.watches_values, self.not_finite = False, ""

    def plan(self, micro_batches: Sequence[Batch]) -> StepPlan:
        """What a step of these micro-batches sends: the same on every rank."""
        if len(micro_batches) != self.schedule.num_micro_batches:
            raise ValueError(
                f"{len(micro_batches)} micro-batches were given; the schedule has {self.schedule.num_micro_batches}"
            )
        geometries, also = [m.geometry for m in micro_batches], f"{self.also}; data {digest_of(micro_batches)}"
        return StepPlan(geometries, self.carry_after, self.schedule.num_stages, also, self.wire_dtype)

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
        loss_scale: float = 1.0,
    ) -> dict[int, Tensor]:
        """Run the schedule once; gradients are added to the parameters' `.grad`.

        A schedule without backwards (`schedules.forward_only`) evaluates: it keeps nothing and changes nothing.

        Args:
            micro_batches: M of them, the same on every rank.
            plan: `self.plan(micro_batches)`, which the ranks have compared (`transfer.agree`).
            num_tokens: what the loss is divided by.
            dropout_key: (seed, step); None: no dropout.
            loss_scale: what all gradients are multiplied by; the losses that are returned are not.

        Returns:
            {micro-batch: its share of the loss}, empty on ranks without the last stage.
        """
        if self.expected is not None and self.expected.plan.digest != plan.digest:  # its receives stay posted: no retry
            raise PlanMismatch(f"expect() was told {self.expected.plan}; this step has {plan}. Give it the same plan.")
        if self.device != "cpu":
            micro_batches = [m.to(self.device) for m in micro_batches]
        self.inputs, self.stash, self.peak_stash, self.loss_scale = {}, {}, 0, loss_scale
        self.handed_over: dict[Action, Tensors] = {}  # between two stages of this rank
        self.losses: dict[int, Tensor] = {}
        self.not_finite, self.spoilt = "", set[tuple[int, int | None]]()
        self.exchange = self.expected or Exchange(self.transport, self.schedule, plan, self.posting, self.device)
        self.expected = None
        # One region of autocast round all forwards: it keeps the weights' copies of low precision until it ends. One
        # region per micro-batch would make, and keep until the backward, as many copies as there are micro-batches.
        with torch.set_grad_enabled(self.trains), autocast(self.low_precision, self.device):
            for number, action in enumerate(self.actions, start=1):
                self.transport.computing(self.doing[number - 1])
                arrived = self.take_in(action)
                self.exchange.begin_action(number)
                began = time.perf_counter()
                if action.kind == "B":
                    result = self.backward(action, arrived)
                else:
                    key = None if dropout_key is None else (*dropout_key, action.micro_batch)
                    compute = self.forward if action.kind == "F" else self.recompute
                    result = compute(action, arrived, micro_batches[action.micro_batch], num_tokens, key)
                self.note(action.kind, action, began)
                if self.watches_values and not self.not_finite:
                    self.look_at_values(action, arrived, result)
                self.hand_on(action, result)
            began = time.perf_counter()
            self.exchange.finish()
            if self.actions:
                self.note("w", self.actions[-1], began)  # until the neighbours have taken all that was sent
        self.transport.computing("")
        left = (self.inputs, self.stash, self.handed_over)
        assert not any(left), "a schedule that validate() accepts leaves nothing behind"
        return self.losses

    def note(self, kind: str, action: Action, began: float) -> None:
        """Record what the rank has done since `began`."""
        if self.timeline is not None:
            if self.device != "cpu":
                torch.cuda.synchronize(self.device)  # a GPU works on what it was given some time ago
            stage, micro_batch = action.stage, action.micro_batch
            self.timeline.add(self.transport.rank, kind, stage, micro_batch, began, time.perf_counter())

    def look_at_values(self, action: Action, arrived: Tensors, result: Tensors) -> None:
        """Whether this action made values that are not finite from ones that are. Its neighbours only hand them on."""
        is_backward, stage, place = action.kind == "B", action.stage, (action.stage, action.micro_batch)
        gradients = [p.grad for p in self.stages[stage].parameters()] if is_backward else []
        if are_finite([*result, *gradients]):
            return
        known = place in self.spoilt or (is_backward and (stage, None) in self.spoilt)
        self.spoilt |= {place, (stage, None)} if is_backward else {place}  # None: its gradients, for all that follow
        if are_finite(arrived) and not known:
            self.not_finite = f"{action.kind} of micro-batch {action.micro_batch} on stage {stage}"

    def take_in(self, action: Action) -> Tensors:
        """What the neighbour stage has made for this action: a message, or a hand-over on the same rank."""
        message = self.schedule.received_by(action)
        if message is None:
            return self.handed_over.pop(action, (None, None))
        began = time.perf_counter()
        arrived = self.exchange.receive(message)
        self.note("w", action, began)
        return tuple(arrived)

    def hand_on(self, action: Action, tensors: Tensors) -> None:
        message = self.schedule.sent_by(action)
        target = self.schedule.target_of(action)
        if message is not None:
            began = time.perf_counter()
            self.exchange.send(message, tensors)
            self.note("s", action, began)
        elif target is not None:
            self.handed_over[target] = tensors

    def forward(
        self, action: Action, arrived: Tensors, micro_batch: Batch, num_tokens: int, dropout_key: DropoutKey
    ) -> Tensors:
        """One stage, one micro-batch. What arrived becomes the leaves of this stage's own graph."""
        place = action.stage, action.micro_batch
        leaves = tuple(None if tensor is None else tensor.requires_grad_(self.trains) for tensor in arrived)
        carry = self.compute(action, leaves, micro_batch, num_tokens, dropout_key)
        if self.stages[action.stage].is_last and carry[0] is not None:
            self.losses[action.micro_batch] = carry[0].detach()
        if self.trains:
            self.inputs[place] = leaves
            if place not in self.recomputed:
                self.keep(place, carry)
        return tuple(None if tensor is None else tensor.detach() for tensor in carry)

    def recompute(
        self, action: Action, arrived: Tensors, micro_batch: Batch, num_tokens: int, dropout_key: DropoutKey
    ) -> Tensors:
        """The forward once more, from what was kept of it, just before its backward. The same key: the same dropout."""
        place = action.stage, action.micro_batch
        self.keep(place, self.compute(action, self.inputs[place], micro_batch, num_tokens, dropout_key))
        return ()

    def compute(
        self, action: Action, leaves: Tensors, micro_batch: Batch, num_tokens: int, dropout_key: DropoutKey
    ) -> Tensors:
        """What a stage makes of its input; the last stage makes the loss of it."""
        stage = self.stages[action.stage]
        # The blocks get a view: autocast keeps the cast of every leaf and would add up its gradients in low precision.
        hidden, memory = (None if leaf is None else leaf.view_as(leaf) for leaf in leaves)
        carry = stage((hidden, memory), micro_batch, dropout_key)
        return (self.loss(carry[0], micro_batch, num_tokens),) if stage.is_last else carry

    def keep(self, place: tuple[int, int], carry: Tensors) -> None:
        """Until the backward."""
        self.stash[place] = carry
        self.peak_stash = max(self.peak_stash, len(self.stash))

    def backward(self, action: Action, arrived: Tensors) -> Tensors:
        """Gradients of all that this stage handed on enter together, as roots; those of its leaves come out."""
        place = action.stage, action.micro_batch
        leaves, carry = self.inputs.pop(place), self.stash.pop(place)
        if self.stages[action.stage].is_last:
            arrived = (torch.tensor(self.loss_scale, device=self.device),)  # the gradient of the scaled loss
        pairs = [(t, g) for t, g in zip(carry, arrived, strict=True) if t is not None and g is not None]
        roots = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]  # not if all is frozen
        with autocast(self.low_precision, self.device, enabled=False):
            torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
        return tuple(None if leaf is None else leaf.grad for leaf in leaves)
