"""What lesson 04 asks for: one step of naive model parallelism, on any rank."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.report import Wrong, are_close, expect
from course_utils.number_words import collate
from course_utils.pipeline import sum_over_tokens
from course_utils.stages import CutModel, by_count, one_thread
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transformer import TransformerConfig
from course_utils.transports import TransferError, Worker

CONFIG = TransformerConfig(d_model=8, heads=2)
NUM_STAGES = 3  # a first, a last, and one that receives and sends in both directions
MICRO_BATCHES = collate([7, 42, 123, 90210]).split(2)  # of different lengths
NUM_TOKENS = sum(micro_batch.num_tokens for micro_batch in MICRO_BATCHES)

Gradients = dict[str, Tensor | None]


def naive_step(answer: Callable) -> str:
    """answer(worker, stage, cut, micro_batches, num_tokens) -> {micro-batch: loss}, with losses on the last rank."""
    cut = CutModel(CONFIG, by_count(8, NUM_STAGES))

    def step(worker: Worker) -> tuple[Any, Gradients]:
        stage = cut.build(worker.rank, seed=0)
        try:
            losses = answer(worker, stage, cut, MICRO_BATCHES, NUM_TOKENS)
        except ValueError as error:
            if "the carry has None there" not in str(error):
                raise
            raise Wrong(
                f"Stage {worker.rank} computes without what its blocks need: {error}. Has it received the activations, "
                "and do the buffers have the specs of the border that they cross?"
            ) from None
        return losses, {name: weight.grad for name, weight in stage.named_parameters_globally()}

    try:
        results = run_in_threads(step, NUM_STAGES, limit=5)
    except Deadlock as stuck:
        raise Wrong(
            f"The ranks got stuck: {stuck}. Every message needs both sides: whoever gets activations owes a gradient, "
            "and a tensor that asked for none has none to send."
        ) from None
    except TransferError as error:
        raise Wrong(
            f"A message went wrong: {error}. Look at the border whose specs the buffers have, and at the order."
        ) from None
    losses, _ = results[-1]
    expected_losses, expected = one_device()
    check_losses(losses, expected_losses)
    for rank, (_, gradients) in enumerate(results):
        check_gradients(rank, gradients, expected)
    return f"{NUM_STAGES} stages, {len(MICRO_BATCHES)} micro-batches: the bits of one device."


def one_device(micro_batches: Mapping[int, Any] | None = None) -> tuple[dict[int, Tensor], Gradients]:
    """Losses and gradients of the same micro-batches, or of some of them, without any border."""
    model = CutModel(CONFIG, by_count(8, 1)).build(0, seed=0)
    losses = {}
    with one_thread():
        for m, micro_batch in (micro_batches or dict(enumerate(MICRO_BATCHES))).items():
            logits, _ = model((None, None), micro_batch)
            losses[m] = sum_over_tokens(logits, micro_batch, NUM_TOKENS)
            losses[m].backward()
    return losses, {name: weight.grad for name, weight in model.named_parameters_globally()}


def check_losses(losses: Any, expected: dict[int, Tensor]) -> None:
    if not isinstance(losses, dict) or sorted(losses) != sorted(expected):
        raise Wrong(f"What the last rank returns: expected the losses of micro-batches 0 and 1, came {losses!r}.")
    for m in losses:
        loss = torch.as_tensor(losses[m]).detach()
        own_mean = expected[m].item() * NUM_TOKENS / MICRO_BATCHES[m].num_tokens
        if abs(loss.sum().item() - own_mean) < 1e-4:
            raise Wrong(f"The loss of micro-batch {m} is a mean over its own tokens; divide by those of all of them.")
        expect(f"the loss of micro-batch {m}", expected[m].detach(), loss)


def check_gradients(rank: int, gradients: Gradients, expected: Gradients) -> None:
    if all(gradient is None for gradient in gradients.values()):
        raise Wrong(
            f"Stage {rank} has no gradients at all. Nothing crashes, and a loss would fall even so: the other stages "
            "learn. What does it have to wait for before its backward?"
        )
    last = len(MICRO_BATCHES) - 1
    _, of_last = one_device({last: MICRO_BATCHES[last]})
    name = next(name for name, gradient in gradients.items() if gradient is not None)
    if torch.equal(gradients[name], of_last[name]):  # type: ignore[arg-type]
        raise Wrong(f"Stage {rank} has the gradients of the last micro-batch alone; those of all must add up.")
    if differ_in_their_last_bits(gradients, expected):
        raise Wrong(
            f"The gradients of stage {rank} are right but for their last bits. Let all tensors that a stage "
            "has handed on enter one walk back (lesson 02)."
        )
    for name, gradient in gradients.items():
        expect(f"stage {rank}, the gradient of {name}", expected[name], gradient)


def differ_in_their_last_bits(gradients: Gradients, expected: Gradients) -> bool:
    """Whether they are not equal, but so close that only a sum in another order can be the cause."""
    own = {name: expected[name] for name in gradients}
    if any(e is None or g is None or e.shape != g.shape for e, g in zip(own.values(), gradients.values(), strict=True)):
        return False
    equal = all(torch.equal(own[name], gradient) for name, gradient in gradients.items())  # type: ignore[arg-type]
    return not equal and are_close(own, gradients)  # type: ignore[arg-type]
