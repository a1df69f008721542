"""Guards: each watches over one property of the engine, in milliseconds, and says in a figure by how much it is broken.

`tests/museum` holds the bugs that they catch. Every guard is blind to all but its own property, so that a bug is named
by the one guard that fails: where a sum over micro-batches is not what a guard asks about, only the loss of the last
one counts; where it is not asked whether a gradient arrives at all, a stage without one is passed over. References are
written out here, on one device, or taken from torch.
"""

import contextlib
import math
import pickle
import random
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_utils.checkpoint import Checkpoints, Manifest, load, sha256
from course_utils.decoding import greedy_decode
from course_utils.number_words import END, PAD, START, Batch, batch, collate
from course_utils.optimization import LossScaler, Noam, clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline, sum_over_tokens
from course_utils.recipes import numbers_of
from course_utils.schedules import Action, Schedule, forward_only, gpipe, one_f_one_b, parse, rematerialise
from course_utils.simulation import simulate
from course_utils.stages import CutModel, Stage, by_count
from course_utils.threads import run_in_threads
from course_utils.timeline import Timeline
from course_utils.training import train
from course_utils.training_state import TrainingState
from course_utils.transfer import PlanMismatch, StepAgreement, agree
from course_utils.transformer import Embedding, TransformerConfig, block_builders
from course_utils.transports import TransferError, Worker
from course_utils.validity import Cycle, validate
from tests.models import TINY, TINY_RUN

SEED, STEP = 0, 5
IT_HUNG = 20.0  # seconds for one wait between threads, which takes milliseconds
SMALL = replace(TINY, encoder_layers=1)  # 7 blocks: 0 to 2 are the encoder, 3 to 6 the decoder
DROPOUT = replace(SMALL, dropout=0.5)

Loss = Callable[[Tensor, Batch, int], Tensor]
Gradients = dict[str, Tensor]


# --- What the guards are made of --------------------------------------------------------------------------------------


def cut_at(*starts: int, model: TransformerConfig = SMALL) -> CutModel:
    """The model, cut before these blocks."""
    bounds = [0, *starts, len(block_builders(model))]
    return CutModel(model, tuple(range(start, end) for start, end in zip(bounds, bounds[1:], strict=False)))


@cache
def built(cut: CutModel, stage: int) -> Stage:
    return cut.build(stage, SEED)


def stage_of(cut: CutModel, stage: int = 0) -> Stage:
    """A stage without gradients. To build one takes longer than to run it, so all guards share it: change no weight."""
    shared = built(cut, stage)
    shared.zero_grad()
    return shared


def rows_of(digits: int, rows: int = 2, salt: int = 0) -> Batch:
    """Numbers of one length: nothing is padded, and all such micro-batches have the same shapes."""
    generator = random.Random(f"{digits} {salt}")
    return collate(["".join(generator.choice("0123456789") for _ in range(digits)) for _ in range(rows)])


def alike(count: int) -> list[Batch]:
    return [rows_of(4, salt=m) for m in range(count)]


def sum_of_losses(logits: Tensor, micro_batch: Batch) -> Tensor:
    """Over the tokens of a micro-batch, in float32, written out."""
    chosen = logits.float().log_softmax(-1).gather(-1, micro_batch.target_output[..., None])[..., 0]
    return -(chosen * (micro_batch.target_output != PAD)).sum()


def tokens_of(micro_batches: Sequence[Batch]) -> int:
    return sum(int((m.target_output != PAD).sum()) for m in micro_batches)


def loss_of(micro_batches: Sequence[Batch], counted: Batch | None = None) -> Loss:
    """A loss for the engine that counts the tokens itself. `counted`: the only micro-batch that is worth anything."""
    num_tokens = tokens_of(micro_batches)

    def loss(logits: Tensor, micro_batch: Batch, told: int) -> Tensor:
        return sum_of_losses(logits, micro_batch) / num_tokens * float(counted is None or micro_batch is counted)

    return loss


def step(
    cut: CutModel, schedule: Schedule, micro_batches: Sequence[Batch], key: Any = None, wrap: Any = None, **options: Any
) -> tuple[dict[int, Tensor], Gradients]:
    """One step of the engine over threads: its losses and the gradients of the whole model.

    wrap: given a rank's transport, returns what the rank is to use instead.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    num_tokens = tokens_of(micro_batches)

    def on_rank(worker: Worker) -> tuple[dict[int, Tensor], Gradients]:
        transport = wrap(worker.transport) if wrap else worker.transport
        stages = {s: stage_of(cut, s) for s in schedule.stages_of(worker.rank)}
        pipeline = Pipeline(stages, schedule, transport, cut.carry_after, **options)
        losses = pipeline.step(micro_batches, pipeline.plan(micro_batches), num_tokens, key)
        named = [pair for stage in stages.values() for pair in stage.named_parameters_globally()]
        return losses, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}

    ranks = run_in_threads(on_rank, schedule.num_ranks, limit=IT_HUNG)
    losses = {m: loss for rank in ranks for m, loss in rank[0].items()}
    return losses, {name: gradient for rank in ranks for name, gradient in rank[1].items()}


def one_device(
    micro_batches: Sequence[Batch],
    counted: Batch | None = None,
    key: tuple[int, int] | None = None,
    model: TransformerConfig = SMALL,
    low_precision: torch.dtype | None = None,
) -> Gradients:
    """The gradients of a plain loop over the micro-batches, on one device and one thread."""
    torch.set_num_threads(1)
    whole = stage_of(cut_at(model=model))
    loss = loss_of(micro_batches, counted)
    with torch.autocast("cpu", low_precision or torch.bfloat16, enabled=low_precision is not None):
        for m, micro_batch in enumerate(micro_batches):
            logits, _ = whole((None, None), micro_batch, None if key is None else (*key, m))
            share = loss(logits, micro_batch, 0)
            with torch.autocast("cpu", enabled=False):
                share.backward()
    return {name: p.grad for name, p in whole.named_parameters_globally() if p.grad is not None}


def part(gradients: Gradients, blocks: range) -> Gradients:
    """The gradients of some blocks: a name begins with the index of its block."""
    return {name: gradient for name, gradient in gradients.items() if int(name[:2]) in blocks}


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def times(ours: Gradients, reference: Gradients) -> float:
    """The norm of our gradients, in norms of the reference's."""
    return float(flat(ours).norm() / flat(reference).norm())


def angle(ours: Gradients, reference: Gradients) -> float:
    """Degrees between two gradients; 0 if there is none, or if all is well."""
    one, other = flat(ours), flat(reference)
    if one.norm() == 0:
        return 0.0
    return math.degrees(math.acos(min(1.0, float(one @ other / (one.norm() * other.norm())))))


def off_by_a_little(ours: Gradients, reference: Gradients, at_most: float) -> list[str]:
    """Parameters whose gradients are not equal to the last bit, and yet within a fraction of the reference's norm.

    What is further off is not the kind of error that the caller is looking for.
    """

    def distance(name: str) -> float:
        return float((ours[name] - reference[name]).norm() / (reference[name].norm() + 1e-30))

    return [name for name in reference if not torch.equal(ours[name], reference[name]) and distance(name) <= at_most]


class Sent:
    """The handle that a `Watched` transport gives for a send."""

    def __init__(self, operation: Any):
        self.operation = operation


class Watched:
    """A rank's transport that notes what gloo would not forgive."""

    def __init__(self, transport: Any, ranks: "list[Watched] | None" = None):
        self.transport, self.sent, self.not_contiguous, self.dropped = transport, 0, 0, 0
        if ranks is not None:
            ranks.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def isend(self, tensor: Tensor, peer: int, label: object, control: bool = False) -> Sent:
        handle = Sent(self.transport.isend(tensor, peer, label, control))
        self.sent += 1
        self.not_contiguous += not tensor.is_contiguous()
        weakref.finalize(handle, self.forget, handle.__dict__)
        return handle

    def forget(self, handle: dict[str, Any]) -> None:
        """The engine has let go of a handle: if it has not waited for it, gloo never delivers the message."""
        self.dropped += "operation" in handle

    def wait(self, operation: Any) -> None:
        self.transport.wait(operation.__dict__.pop("operation") if isinstance(operation, Sent) else operation)


# --- The loss, and what it does to gradients --------------------------------------------------------------------------


def test_every_token_weighs_the_same():
    """Also where micro-batches have different numbers of them."""
    micro_batches = [rows_of(2), rows_of(4), rows_of(6)]
    losses, _ = step(cut_at(), gpipe(1, 3), micro_batches)
    model = stage_of(cut_at())
    weights = [
        float(losses[m]) / sum_of_losses(model((None, None), micro_batch)[0], micro_batch).item()
        for m, micro_batch in enumerate(micro_batches)
    ]
    ratio = max(weights) / min(weights)
    assert ratio < 1.01, f"a token of one micro-batch weighs {ratio:.2f} times as much as one of another"


def test_the_loss_is_the_mean_over_all_tokens():
    micro_batches = alike(3)
    losses, _ = step(cut_at(), gpipe(1, 3), micro_batches)
    model = stage_of(cut_at())
    mean = sum(sum_of_losses(model((None, None), m)[0], m).item() for m in micro_batches) / 30
    ratio = float(sum(losses.values())) / mean
    assert abs(ratio - 1) < 0.01, f"the loss is {ratio:.2f} times the mean over all tokens"


def test_gradients_are_those_of_the_loss_that_is_told():
    micro_batches = alike(1)
    _, gradients = step(cut_at(), gpipe(1, 1), micro_batches)
    ratio = times(gradients, one_device(micro_batches))
    assert abs(ratio - 1) < 0.01, f"the gradient norm is {ratio:.2f} times that of one device"


def test_gradients_are_scaled_alike_on_every_stage():
    """M micro-batches of which one counts: whoever divides by M once too often is 1/M off, on the stages that do it."""
    micro_batches = alike(4)
    loss = loss_of(micro_batches, micro_batches[-1])
    _, gradients = step(cut_at(3), gpipe(2, 4), micro_batches, loss=loss)
    reference = one_device(micro_batches, micro_batches[-1])
    ratios = [times(part(gradients, blocks), part(reference, blocks)) for blocks in (range(3), range(3, 7))]
    told = ", ".join(f"stage {stage}: {ratio:.2f} times" for stage, ratio in enumerate(ratios))
    assert all(abs(ratio - 1) < 0.01 for ratio in ratios if ratio > 0), f"gradient norms against one device: {told}"


def test_every_micro_batch_trains():
    """Each has digits of its own, whose embeddings nobody else can train."""
    digits = ("12", "34", "56")
    micro_batches = [collate([pair, pair[::-1]]) for pair in digits]
    _, gradients = step(cut_at(), gpipe(1, 3), micro_batches, loss=loss_of(micro_batches))
    trained = gradients[FIRST].abs().sum(1) > 0
    lost = [str(m) for m, micro_batch in enumerate(micro_batches) if not trained[micro_batch.source].any()]
    assert not lost, f"{len(lost)} of 3 micro-batches left no gradient: {', '.join(lost)}"


def test_padding_is_not_counted():
    tokens = collate([7, 4096]).num_tokens
    assert tokens == 2 + 5, f"{tokens} tokens are counted in two rows of 2 and 5: padding is among them"


def test_padding_is_not_trained():
    micro_batch = collate([7, 4096])
    logits = torch.linspace(-1, 1, 2 * 5 * 13).reshape(2, 5, 13).requires_grad_()
    sum_over_tokens(logits, micro_batch, 7).backward()
    trained = int((logits.grad.abs().sum(-1) > 0)[micro_batch.target_output == PAD].sum())
    assert trained == 0, f"the loss pulls at {trained} of 3 places that are padding"


def test_the_loss_is_added_up_in_float32():
    micro_batch = rows_of(6, rows=8)
    logits = torch.linspace(-2, 2, 8 * 7 * 13).reshape(8, 7, 13).bfloat16()
    exact = sum_of_losses(logits, micro_batch) / 56
    loss = sum_over_tokens(logits, micro_batch, 56)
    assert abs(float(loss / exact) - 1) < 1e-5, f"the loss is {loss.item():.6f} in {loss.dtype}, exactly {exact:.6f}"


def test_losses_that_are_told_keep_no_graph():
    losses, _ = step(cut_at(), gpipe(1, 3), alike(3))
    keeping = sum(loss.requires_grad for loss in losses.values())
    assert keeping == 0, f"{keeping} of 3 losses keep the graph that made them, for as long as somebody keeps the loss"


def test_a_step_begins_without_gradients():
    """Two steps in which the weights hardly move: the second gradient must not hold the first once more."""
    config = replace(TINY_RUN, model=SMALL, stages=1, micro_batches=1, steps=2, learning_rate_factor=1e-9, held_out=0)
    told = [step.gradient_norm for step in train(replace(config, max_norm=1e6), run=run_in_threads).steps]
    numbers = numbers_of(config).training
    own = [float(flat(one_device([batch(numbers, config.seed, n, config.batch_size)])).norm()) for n in range(2)]
    ratio = told[1] / told[0] / (own[1] / own[0])
    assert abs(ratio - 1) < 0.1, f"the gradient norm of the second step is {ratio:.1f} times what its batch gives"


# --- What crosses a border --------------------------------------------------------------------------------------------


def test_gradients_are_added_in_ascending_order():
    """As on one device, to the last bit."""
    micro_batches = alike(5)
    _, gradients = step(cut_at(3), gpipe(2, 5), micro_batches, loss=loss_of(micro_batches))
    different = off_by_a_little(gradients, one_device(micro_batches), at_most=1e-4)
    assert not different, f"{len(different)} of {len(gradients)} gradients differ from one device's in the last bits"


def test_a_gradient_meets_the_graph_of_its_own_micro_batch():
    micro_batches = alike(3)
    loss = loss_of(micro_batches, micro_batches[-1])
    _, gradients = step(cut_at(3), one_f_one_b(2, 3), micro_batches, loss=loss)
    degrees = angle(part(gradients, range(3)), part(one_device(micro_batches, micro_batches[-1]), range(3)))
    assert degrees < 1, f"stage 0's gradient points {degrees:.0f} degrees away from one device's"


def test_the_first_stage_learns():
    micro_batches = alike(1)
    _, gradients = step(cut_at(3), gpipe(2, 1), micro_batches, loss=loss_of(micro_batches))
    norm = float(flat(part(gradients, range(3))).norm())
    assert norm > 0, f"the gradient norm of stage 0 is {norm}"


def test_the_encoder_hears_from_every_reader_of_its_memory():
    """Decoder layers on two stages read it: the first of them hands it on, and has to hand back both gradients."""
    micro_batches = alike(1)
    _, gradients = step(cut_at(3, 5), gpipe(3, 1), micro_batches, loss=loss_of(micro_batches))
    degrees = angle(part(gradients, range(3)), part(one_device(micro_batches), range(3)))
    assert degrees < 1, f"the encoder's gradient points {degrees:.0f} degrees away from one device's"


def test_the_memory_s_gradient_is_added_where_one_device_adds_it():
    micro_batches = alike(1)
    _, gradients = step(cut_at(3, 5), gpipe(3, 1), micro_batches, loss=loss_of(micro_batches))
    encoder, reference = (part(g, range(3)) for g in (gradients, one_device(micro_batches)))
    different = off_by_a_little(encoder, reference, at_most=1e-4)
    assert not different, f"{len(different)} of {len(encoder)} gradients of the encoder differ in the last bits"


def test_what_arrives_is_not_added_up_in_low_precision():
    """Two decoder layers read the memory that arrived: autocast must not keep one cast of it for both."""
    micro_batches = alike(1)
    low = torch.bfloat16
    _, gradients = step(cut_at(3), gpipe(2, 1), micro_batches, loss=loss_of(micro_batches), low_precision=low)
    encoder, reference = (part(g, range(3)) for g in (gradients, one_device(micro_batches, low_precision=low)))
    different = off_by_a_little(encoder, reference, at_most=0.05)
    assert not different, f"{len(different)} of {len(encoder)} gradients of the encoder depend on the cut in bfloat16"


def test_a_weight_has_one_copy_in_low_precision():
    """Over all micro-batches whose graphs are kept."""
    weight = "06.head.linear.weight"
    cast = dict(stage_of(cut_at()).named_parameters_globally())[weight].detach().bfloat16()
    copies: set[int] = set()
    kept = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.numel() == cast.numel():
            whole = tensor if tensor.shape == cast.shape else tensor.t()
            if whole.shape == cast.shape and torch.equal(whole, cast):
                kept.append(tensor)
                copies.add(tensor.untyped_storage().data_ptr())
        return tensor

    def watch(transport: Any) -> Any:  # called in the thread of the rank, where the hooks hold from then on
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor).__enter__()
        return transport

    micro_batches = alike(4)
    step(cut_at(), gpipe(1, 4), micro_batches, wrap=watch, loss=loss_of(micro_batches), low_precision=torch.bfloat16)
    assert copies and len(copies) == 1, f"{len(copies)} copies of a weight in bfloat16 are kept for 4 micro-batches"


# --- Dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_does_not_depend_on_the_cut():
    def logits(cut: CutModel) -> Tensor:
        carry = (None, None)
        for stage in range(cut.num_stages):
            carry = stage_of(cut, stage)(carry, rows_of(4), (SEED, STEP, 0))
        return carry[0]

    one, two = logits(cut_at(model=DROPOUT)), logits(cut_at(1, 4, model=DROPOUT))
    share = float((~torch.isclose(one, two, rtol=1e-4, atol=1e-5)).float().mean())
    assert share == 0, f"{share:.0%} of the logits are others with 3 stages than with one"


def test_dropout_is_the_same_when_recomputed():
    micro_batches = alike(1)
    schedule = rematerialise(gpipe(1, 1), "always")
    _, gradients = step(cut_at(model=DROPOUT), schedule, micro_batches, (SEED, STEP), loss=loss_of(micro_batches))
    degrees = angle(gradients, one_device(micro_batches, key=(SEED, STEP), model=DROPOUT))
    assert degrees < 1, f"with recomputed forwards the gradient points {degrees:.0f} degrees away"


def test_dropout_differs_between_micro_batches():
    micro_batches = 3 * alike(1)
    losses, _ = step(cut_at(model=DROPOUT), gpipe(1, 3), micro_batches, (SEED, STEP), loss=loss_of(micro_batches))
    masks = len({loss.item() for loss in losses.values()})
    assert masks == 3, f"3 equal micro-batches have {masks} different losses: they drop the same elements"


# --- What must be global ----------------------------------------------------------------------------------------------


def state_of(stage: int, fill: float = 1.0, **changes: Any) -> TrainingState:
    """The state of one of two ranks between backward and update: its gradients are `fill` times a fixed pattern.

    Rank 0 has the first embedding alone and rank 1 the head alone, so that a state is made in no time.
    """
    cut = CutModel(SMALL, (range(1), range(6, 7)))
    state = TrainingState(replace(TINY_RUN, model=SMALL, **changes), cut, [cut.build(stage, SEED)])
    state.ties.open()
    for parameter in state.parameters:
        parameter.grad = fill * torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    return state


def norm_of(parameters: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in parameters))


def test_the_loss_scale_is_taken_out_before_gradients_are_clipped():
    state = state_of(0, 1024.0, loss_scale=1024.0)
    own = norm_of(state.parameters) / 1024.0
    ratio = state.update(state.take_in({}), {}, 1).gradient_norm / own
    assert abs(ratio - 1) < 0.01, f"the norm by which gradients are clipped is {ratio:.2f} times theirs"


def test_all_stages_skip_a_step_or_none():
    states = [state_of(stage) for stage in range(2)]
    states[1].parameters[0].grad.view(-1)[0] = math.nan
    norms = sum(state.take_in({}) for state in states)
    skipped = [state.update(norms, {}, 1).skipped for state in states]
    told = ", ".join(f"stage {stage} {'skips' if skips else 'steps'}" for stage, skips in enumerate(skipped))
    assert skipped == [True, True], f"one gradient of stage 1 is not finite: {told}"


def test_the_norm_comes_from_all_ranks():
    def share(worker: Worker) -> float:
        cut = cut_at(3)
        plan = Pipeline({worker.rank: stage_of(cut, worker.rank)}, gpipe(2, 1), worker.transport, cut.carry_after).plan
        agreement = StepAgreement(worker.transport, 2)
        agreement.open()
        own = torch.tensor([3.0, 0.0]) if worker.rank == 0 else torch.tensor([0.0, 4.0])
        return float(agreement.share(own, plan(alike(1))).norm())

    norms = run_in_threads(share, 2, limit=IT_HUNG)
    assert norms == [5.0, 5.0], f"the ranks clip by {norms[0]} and {norms[1]}; the norm of both together is 5.0"


def test_a_stage_is_clipped_as_torch_clips_the_whole_model():
    stages = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for parameter, gradient in zip(stages, ((3.0, 0.0), (0.0, 4.0)), strict=True):
        parameter.grad = torch.tensor(gradient)
    reference = [parameter.detach().clone().requires_grad_() for parameter in stages]
    for parameter, other in zip(reference, stages, strict=True):
        parameter.grad = other.grad.clone()
    torch.nn.utils.clip_grad_norm_(reference, 1.0)
    clip_by_global_norm(stages[:1], torch.tensor([3.0, 4.0]), 1.0)
    ratio = float(stages[0].grad.norm() / reference[0].grad.norm())
    assert abs(ratio - 1) < 0.01, f"a clipped stage's gradient is {ratio:.2f} times as large as in the whole model"


def test_small_gradients_are_not_clipped():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.06, 0.08])
    clip_by_global_norm([parameter], torch.tensor([0.1]), 1.0)
    factor = float(parameter.grad.norm()) / 0.1
    assert abs(factor - 1) < 0.01, f"a gradient of norm 0.1 was multiplied by {factor:.1f}, though 1.0 is allowed"


def test_the_norm_is_torch_s_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    different = 0
    for _ in range(100):
        parameters = [torch.nn.Parameter(torch.zeros(7)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.randn(7, generator=generator)
        numbered = list(enumerate(parameters))
        norms = gradient_norms(numbered[:4], 8) + gradient_norms(numbered[4:], 8)
        expected = torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        different += clip_by_global_norm([], norms, 1.0) != expected.item()
    assert different == 0, f"{different} of 100 norms differ from torch's in the last bits"


def test_the_loss_scale_moves_as_torch_s():
    reference = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScaler(1024.0, growth_interval=3)
    scales: list[tuple[float, float]] = []
    for bad in (0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0):
        reference.scale(parameter.sum()).backward()
        if bad:
            parameter.grad.fill_(math.inf)
        reference.step(optimizer)
        reference.update()
        optimizer.zero_grad()
        ours.update(bool(bad))
        scales.append((ours.scale, reference.get_scale()))
    wrong = [f"after {i} steps {a:g}, torch's {b:g}" for i, (a, b) in enumerate(scales, start=1) if a != b]
    assert not wrong, f"the loss scale is {wrong[0]}"


def test_a_skipped_step_does_not_move_the_learning_rate():
    state = state_of(0)
    before = state.noam.get_last_lr()[0]
    state.update(torch.tensor([math.inf]), {}, 1)
    ratio = state.noam.get_last_lr()[0] / before
    assert ratio == 1, f"a step that changed no weight made the learning rate {ratio:.2f} times as large"


def test_the_first_update_has_a_learning_rate():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    Noam(optimizer, d_model=16, warm_up=4)
    rate = optimizer.param_groups[0]["lr"]
    assert abs(rate - 0.25 / 8) < 1e-9, f"the first learning rate is {rate:.5f}, by the formula {0.25 / 8:.5f}"


def tied() -> tuple[TrainingState, list[Tensor], Tensor]:
    """A rank that holds both owners of a tied weight, after its backwards: it, the copies, and all their norms."""
    names = ("03.target_embedding.embedding.tokens.weight", "06.head.linear.weight")
    cut = CutModel(SMALL, (range(3, 4), range(6, 7)))
    config = replace(TINY_RUN, model=SMALL, tie=(names,))
    state = TrainingState(config, cut, [cut.build(stage, SEED) for stage in range(2)])
    state.ties.open()
    for fill, parameter in enumerate(state.parameters, start=1):
        parameter.grad = torch.full_like(parameter, fill)
    norms = state.take_in({})
    copies = [parameter for name, parameter in state.named if name in names]
    return state, copies, norms


def test_owners_of_a_tied_weight_get_the_same_gradient():
    _, (one, other), _ = tied()
    ratio = float(other.grad.norm() / one.grad.norm())
    assert ratio == 1, f"of two copies of a tied weight one gets a gradient {ratio:.2f} times that of the other"


def test_a_tied_weight_counts_once_in_the_norm():
    state, copies, norms = tied()
    others = sum(float(p.grad.pow(2).sum()) for p in state.parameters if all(p is not copy for copy in copies))
    times_counted = (float(norms.double().pow(2).sum()) - others) / float(copies[0].grad.pow(2).sum())
    assert abs(times_counted - 1) < 0.01, f"a tied weight's gradient is {times_counted:.2f} times in the global norm"


# --- Data -------------------------------------------------------------------------------------------------------------


def test_there_are_as_many_micro_batches_as_asked_for():
    count = len(collate(range(7)).split(5))
    assert count == 5, f"7 rows asked into 5 micro-batches gave {count}"


def test_every_step_has_a_batch_of_its_own():
    numbers = tuple(range(100, 400))
    same = torch.equal(batch(numbers, 0, 0, 8).source, batch(numbers, 0, 1, 8).source)
    assert not same, "step 1 trains on the same 8 numbers as step 0"


# --- The model --------------------------------------------------------------------------------------------------------


def logits_of(source: Tensor, target: Tensor) -> Tensor:
    model = stage_of(cut_at())
    with torch.no_grad():
        return model((None, None), Batch(source, target, target))[0]


def test_no_word_sees_those_behind_it():
    given = rows_of(4, rows=1)
    other = given.target_input.clone()
    other[0, -1] = 3 if other[0, -1] != 3 else 4
    one, two = logits_of(given.source, given.target_input), logits_of(given.source, other)
    seeing = int(((one - two).abs().amax(-1)[0, :-1] > 1e-6).sum())
    assert seeing == 0, f"{seeing} of 4 words see the last one, which is behind them"


def test_nobody_looks_at_padding():
    given = rows_of(4, rows=1)
    padded = F.pad(given.source, (0, 3), value=PAD)
    one, two = logits_of(given.source, given.target_input), logits_of(padded, given.target_input)
    changed = int(((one - two).abs().amax(-1) > 1e-5).sum())
    assert changed == 0, f"3 tokens of padding behind the digits change {changed} of 5 words"


def test_tokens_do_not_drown_their_positions():
    config = replace(TINY, d_model=128)
    block = block_builders(config)[0].build(SEED)
    embedding = next(module for module in block.modules() if isinstance(module, Embedding))
    tokens = embedding.tokens.weight.detach() * embedding.scale
    ratio = float(tokens.pow(2).mean().sqrt() / embedding.positions[:8].pow(2).mean().sqrt())
    assert ratio < 3, f"tokens are {ratio:.0f} times as large as the positions that are added to them"


def test_layers_start_with_weights_of_their_own():
    first, second = (cut_at(model=TINY).builders[index].build(SEED) for index in (1, 2))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    twins = sum(torch.equal(one, two) for one, two in pairs if one.dim() == 2)
    assert twins == 0, f"{twins} of 6 matrices of the second encoder layer are those of the first"


def test_a_cut_loses_no_block():
    cut = by_count(30, 4)
    held = [block for stage in cut for block in stage]
    assert held == list(range(30)), f"30 blocks in 4 stages: {len(held)} are held"


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_contiguous():
    """Also if a block gives a view with its dimensions exchanged, as attention often does."""
    cut, ranks = cut_at(3), list[Watched]()

    def exchanged(module: Any, inputs: Any, carry: tuple[None, Tensor]) -> tuple[None, Tensor]:
        return None, carry[1].transpose(0, 1).contiguous().transpose(0, 1)

    hook = stage_of(cut).blocks[-1].register_forward_hook(exchanged)
    try:
        step(cut, gpipe(2, 2), alike(2), wrap=lambda transport: Watched(transport, ranks))
    finally:
        hook.remove()
    bad, sent = sum(rank.not_contiguous for rank in ranks), sum(rank.sent for rank in ranks)
    assert bad == 0, f"{bad} of {sent} tensors are sent that are not contiguous; gloo refuses them"


def test_a_send_is_kept_until_it_is_done():
    ranks: list[Watched] = []
    step(cut_at(3), gpipe(2, 2), alike(2), wrap=lambda transport: Watched(transport, ranks))
    dropped, sent = sum(rank.dropped for rank in ranks), sum(rank.sent for rank in ranks)
    assert dropped == 0, f"{dropped} of {sent} sends were dropped before anybody waited; gloo delivers none of those"


def test_a_step_has_the_shapes_of_its_own_batch():
    def two_steps(worker: Worker) -> None:
        cut = cut_at(3)
        schedule = forward_only(gpipe(2, 1))
        pipeline = Pipeline({worker.rank: stage_of(cut, worker.rank)}, schedule, worker.transport, cut.carry_after)
        for digits in (4, 6):
            micro_batches = [rows_of(digits)]
            pipeline.step(micro_batches, pipeline.plan(micro_batches), 1)

    try:
        run_in_threads(two_steps, 2, limit=IT_HUNG)
    except TransferError as error:
        raise AssertionError(f"a step of longer rows than the one before it: {error}") from error


def ranks_that_begin(micro_batches: Sequence[Sequence[Batch]]) -> list[int]:
    """The ranks, of two with these micro-batches, that find their plans to be the same."""
    begun = []

    def begin(worker: Worker) -> None:
        cut = cut_at(3)
        pipeline = Pipeline({worker.rank: stage_of(cut, worker.rank)}, gpipe(2, 1), worker.transport, cut.carry_after)
        with contextlib.suppress(PlanMismatch):
            agree(worker.transport, pipeline.plan(micro_batches[worker.rank]))
            begun.append(worker.rank)

    run_in_threads(begin, 2, limit=IT_HUNG)
    return begun


def test_ranks_that_disagree_do_not_begin():
    begun = ranks_that_begin([[rows_of(4)], [rows_of(5)]])
    assert not begun, f"{len(begun)} of 2 ranks begin a step for which they expect messages of different shapes"


def test_ranks_with_different_data_do_not_begin():
    """Of the same shapes, so that nothing else would stop them."""
    begun = ranks_that_begin([alike(2)[:1], alike(2)[1:]])
    assert not begun, f"{len(begun)} of 2 ranks begin a step, each with data of its own"


def test_messages_are_sent_in_the_format_that_is_expected():
    try:
        step(cut_at(3), gpipe(2, 1), alike(1), wire_dtype=torch.bfloat16)
    except TransferError as error:
        raise AssertionError(f"messages rounded to bfloat16: {error}") from error


OUT_OF_STEP = """
0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
1F0,3F0,1F1,3F1,3B0,3B1,1B0,1B1
"""


def test_receives_are_posted_in_the_order_of_the_sender():
    """Rank 0 sends both micro-batches over the first border before one over the third; rank 1 needs them in turns."""
    micro_batches = alike(2)
    loss = loss_of(micro_batches, micro_batches[-1])
    schedule = validate(parse(OUT_OF_STEP))
    _, gradients = step(cut_at(1, 2, 3), schedule, micro_batches, loss=loss)
    reference = one_device(micro_batches, micro_batches[-1])
    stages = (range(1), range(1, 2), range(2, 3), range(3, 7))
    degrees = max(angle(part(gradients, blocks), part(reference, blocks)) for blocks in stages)
    assert degrees < 1, f"with 2 borders on a channel a stage's gradient points {degrees:.0f} degrees away from its own"


def test_a_stage_may_be_on_any_rank():
    straight = gpipe(3, 1)
    rank_of_stage = (0, 2, 1)
    rows = [straight.actions[rank_of_stage.index(rank)] for rank in range(3)]
    micro_batches = alike(1)
    _, gradients = step(cut_at(3, 5), forward_only(Schedule(1, rank_of_stage, tuple(rows))), micro_batches)
    assert not any(gradient.any() for gradient in gradients.values()), "an evaluation has left gradients"


# --- Schedules and their price ----------------------------------------------------------------------------------------


def test_1f1b_has_every_action_once():
    """Also with fewer micro-batches than stages."""
    for num_stages, micro_batches in ((4, 8), (4, 4), (4, 2), (3, 1)):
        for stage, row in enumerate(one_f_one_b(num_stages, micro_batches).actions):
            needed = [Action(kind, stage, m) for kind in "BF" for m in range(micro_batches)]
            extra = [str(action) for action in row if action not in needed]
            where = f"K={num_stages}, M={micro_batches}: stage {stage}"
            assert not extra, f"{where} is to run {', '.join(extra)}, which nobody sends"
            assert sorted(row) == sorted(needed), f"{where} runs {len(row)} actions instead of {len(needed)}"


def test_1f1b_keeps_as_few_as_it_promises():
    most = []
    for row in one_f_one_b(4, 8).actions:
        kept = [sum(1 if action.kind == "F" else -1 for action in row[: i + 1]) for i in range(len(row))]
        most.append(max(kept))
    assert most == [4, 3, 2, 1], f"the stages keep {most} micro-batches at most instead of [4, 3, 2, 1]"


def refuses(schedule: Schedule, queues: str = "buffered") -> bool:
    try:
        validate(schedule, queues)
    except Cycle:
        return True
    return False


def test_a_schedule_that_hangs_is_refused():
    hanging = parse("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1")
    missed = [model for model in ("buffered", "directed pair") if not refuses(hanging, model)]
    assert not missed, f"0B0 waits for 1B0, 1F1 for 0F1: accepted under {len(missed)} of 2 models"


def test_one_queue_for_both_directions_is_not_two():
    assert refuses(one_f_one_b(2, 3), "pair"), "1F1B is accepted with one queue per pair, where both ranks send first"


def test_the_bubble_is_a_share_of_the_whole_step():
    bubble = simulate(gpipe(4, 16)).bubble_of_total
    assert abs(bubble - 3 / 19) < 1e-9, f"the bubble of K=4, M=16 is {bubble:.2%} of the total, by GPipe {3 / 19:.2%}"


def test_to_wait_is_not_to_work():
    timeline = Timeline(1, "measured", "seconds")
    for kind, start in (("F", 0.0), ("w", 1.0), ("B", 3.0)):
        timeline.add(0, kind, 0, 0, start, start + (2.0 if kind == "w" else 1.0))
    share = timeline.utilisation(0)
    assert share == 0.5, f"a rank that waits for half of the step is said to compute {share:.0%} of it"


# --- Checkpoints ------------------------------------------------------------------------------------------------------

FIRST = "00.source_embedding.embedding.tokens.weight"


@cache
def saved_and_resumed() -> tuple[TrainingState, TrainingState]:
    """A state after two steps, of which the second was skipped and halved the loss scale; and the one resumed of it."""
    before, after = (state_of(0, loss_scale=1024.0) for _ in range(2))
    norms = before.take_in({})
    before.update(norms, {}, 1)
    before.update(norms * math.inf, {}, 1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        run_in_threads(lambda worker: checkpoints.save(worker.transport, before.to_save()), 1, limit=IT_HUNG)
        manifest = checkpoints.latest()
        assert manifest is not None, "nothing was saved"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after.resume(manifest)
    return before, after


def test_a_resume_brings_back_the_optimizer_s_memory():
    before, after = saved_and_resumed()
    lost = sum("exp_avg" not in after.optimizer.state.get(parameter, {}) for parameter in after.parameters)
    assert lost == 0, f"Adam has lost its averages of {lost} of {len(before.parameters)} parameters"


def test_a_resume_brings_back_the_learning_rate():
    before, after = saved_and_resumed()
    ratio = after.optimizer.param_groups[0]["lr"] / before.optimizer.param_groups[0]["lr"]
    assert abs(ratio - 1) < 1e-9, f"the first update after a resume has {ratio:.2f} times the learning rate"


def test_a_resume_goes_on_with_the_data():
    done, resumed = (state.steps_done for state in saved_and_resumed())
    assert resumed == done, f"after {done} steps the run goes on with the data of step {resumed}"


def test_a_resume_brings_back_the_loss_scale():
    before, after = (state.scaler.scale for state in saved_and_resumed())
    assert after == before, f"the loss scale was {before:g} and is {after:g} after the resume"


def refused(put_there: Callable[[Path, Manifest], Manifest]) -> str:
    """What `load` says of a checkpoint whose file has been replaced; empty if it takes it."""
    state = state_of(0)
    named = dict(state.named)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        run_in_threads(lambda worker: checkpoints.save(worker.transport, state.to_save()), 1, limit=IT_HUNG)
        manifest = checkpoints.latest()
        assert manifest is not None, "nothing was saved"
        manifest = put_there(manifest.folder / "stage_0.pt", manifest)
        try:
            load(manifest, named)
        except ValueError as error:
            return str(error)
    return ""


def test_a_file_of_another_checkpoint_is_refused():
    def older(path: Path, manifest: Manifest) -> Manifest:
        """The same file with one weight changed: as long as before, and just as readable."""
        content = torch.load(path, weights_only=True)
        content[FIRST]["value"] += 1
        size = path.stat().st_size
        torch.save(content, path)
        assert path.stat().st_size <= size + 4096, "the file was to stay about as long"
        file = replace(manifest.stages[0], size=path.stat().st_size)
        return replace(manifest, stages=[file])

    assert refused(older), "a stage's file with other weights than those that were saved was loaded without a word"


RAN: list[str] = []


def run_by_a_checkpoint() -> None:
    RAN.append("code")


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return run_by_a_checkpoint, ()


def test_a_checkpoint_runs_no_code():
    RAN.clear()

    def hostile(path: Path, manifest: Manifest) -> Manifest:
        torch.save({FIRST: {"value": Code()}}, path, pickle_module=pickle)
        data = path.read_bytes()
        return replace(manifest, stages=[replace(manifest.stages[0], size=len(data), sha256=sha256(data))])

    refused(hostile)
    assert not RAN, f"{len(RAN)} function was called by a file that was to hold tensors"


# --- Decoding ---------------------------------------------------------------------------------------------------------


def decode(script: Sequence[Sequence[int]], max_length: int = 6) -> tuple[list[list[int]], int]:
    """Decode with a model that says what the script has: a row of tokens each. Also: how often the encoder ran."""
    encoded = []

    def on_rank(worker: Worker) -> Tensor:
        cut = cut_at()
        stage = cut.build(0, SEED)

        def say(module: Any, inputs: Any, output: Any) -> tuple[Tensor, None]:
            at = inputs[1].target_input.shape[1] - 1
            logits = torch.zeros_like(output[0])
            for row, words in enumerate(script):
                logits[row, -1, words[at]] = 1.0
            return logits, None

        stage.blocks[6].register_forward_hook(say)
        stage.blocks[0].register_forward_hook(lambda *_: encoded.append(1))
        pipeline = Pipeline({0: stage}, forward_only(gpipe(1, 1)), worker.transport, cut.carry_after)
        return greedy_decode(pipeline, cut, rows_of(4, rows=len(script)).source, max_length)

    assert START not in sum(map(list, script), []), "no answer holds the start token"
    return run_in_threads(on_rank, 1, limit=IT_HUNG)[0].tolist(), len(encoded)


SHORT, LONG = [5, END, 9, 9, 9, 9], [6, 7, 8, 9, END, 9]


def test_decoding_goes_on_until_every_row_has_ended():
    rows, _ = decode([SHORT, LONG])
    words = rows[1].index(END) if END in rows[1] else len(rows[1])
    assert rows[1][:5] == LONG[:5], f"a row of 4 words is cut off after {words}, when another row had ended"


def test_nothing_follows_the_end_of_a_row():
    rows, _ = decode([SHORT, LONG])
    behind = sum(token != PAD for token in rows[0][2:])
    assert behind == 0, f"{behind} words follow the end of a row"


def test_decoding_runs_the_encoder_once():
    _, encoded = decode([LONG])
    assert encoded == 1, f"the encoder ran {encoded} times for one sentence"
