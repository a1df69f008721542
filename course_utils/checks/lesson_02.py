"""Lesson 02: a step over two stages, the border by hand."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.report import Wrong, expect, expect_close
from course_utils.number_words import collate
from course_utils.pipeline import sum_over_tokens
from course_utils.stages import CutModel, Stage, one_thread
from course_utils.transformer import TransformerConfig

CONFIG = TransformerConfig(d_model=16, heads=2)
# The three kinds of borders: what crosses, and how many blocks the first stage has.
BORDERS = {"hidden alone": 3, "memory alone (hidden is None)": 4, "hidden and memory": 6}


def step_in_two_stages(answer: Callable) -> str:
    micro_batch = collate([7, 42, 90_210])
    num_tokens = micro_batch.num_tokens + 5  # of a mini-batch that has other micro-batches too
    with one_thread():
        (model,) = stages_of(8)
        logits, _ = model((None, None), micro_batch)
        loss = sum_over_tokens(logits, micro_batch, num_tokens)
        loss.backward()
        right = dict(model.named_parameters_globally())
        for what_crosses, blocks in BORDERS.items():
            first, second = stages_of(blocks)
            given: list[Any] = []
            second.register_forward_pre_hook(lambda module, arguments, given=given: given.append(arguments[0]))
            at = f"Where {what_crosses} can cross"
            came = tried(answer, at, given, first, second, micro_batch, num_tokens)
            look_at_border(at, given, first)
            look_at_gradients(at, first, second, right)
            if isinstance(came, Tensor):
                came = came.detach()
            expect(f"{at}, the loss", loss.detach(), came)
    return "Three kinds of borders, and every gradient has the bits of one device."


def stages_of(first_blocks: int) -> list[Stage]:
    """Fresh ones: the first has so many of the eight blocks, a second one the others."""
    return copy.deepcopy(built(first_blocks))  # faster than building them


@cache
def built(first_blocks: int) -> list[Stage]:
    cut = CutModel(CONFIG, tuple(blocks for blocks in (range(0, first_blocks), range(first_blocks, 8)) if blocks))
    return [cut.build(stage, seed=0) for stage in range(cut.num_stages)]


def tried(answer: Callable, at: str, given: list[Any], first: Stage, second: Stage, *arguments: Any) -> Any:
    """What the answer returns. If it raises, what it had given to the second stage may tell why."""
    try:
        return answer(first, second, *arguments)
    except (RuntimeError, AttributeError, TypeError) as error:
        if len(given) == 1 and isinstance(given[0], tuple | list):
            look_at_border(at, given, first)
        if "second time" in str(error):
            raise Wrong(
                f"{at}, a walk back went through a graph that another one had freed already. Two things to look at: "
                "does the backward of the second stage stop at the border, and does all that was sent enter one single "
                "walk?"
            ) from error
        if isinstance(error, AttributeError | TypeError) and "None" in str(error):
            raise Wrong(f"{at}, one of the two tensors of the carry may be None: {error}.") from error
        raise


def look_at_border(at: str, given: list[Any], first: Stage) -> None:
    """Raises Wrong unless the second stage got numbers without the first one's history, that collect gradients."""
    if len(given) != 1:
        raise Wrong(f"{at}, the second stage was called {len(given)} times; one step calls it once.")
    received = [tensor for tensor in given[0] if isinstance(tensor, Tensor)]
    if any(reaches(tensor, first.parameters()) for tensor in received):
        raise Wrong(
            f"{at}, what the second stage received still knows how the first one made it. Its backward then runs on "
            "into the first stage: what must be done with a tensor so that only its numbers cross?"
        )
    if not all(tensor.requires_grad for tensor in received):
        raise Wrong(
            f"{at}, what the second stage received collects no gradient, so there is nothing to go back with. After "
            "detach() a tensor has to be told that it shall."
        )


def reaches(tensor: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether a walk back from a tensor would come to one of the parameters."""
    wanted, seen, todo = {id(parameter) for parameter in parameters}, set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if id(getattr(node, "variable", None)) in wanted:
                return True
            todo += [following for following, _ in node.next_functions]
    return False


def look_at_gradients(at: str, first: Stage, second: Stage, right: Mapping[str, Tensor]) -> None:
    """Raises Wrong, naming the mistake if it is a known one, unless all gradients have the right bits."""
    for stage, name_of_stage in ((second, "second"), (first, "first")):
        for name, parameter in stage.named_parameters_globally():
            if parameter.grad is None:
                raise Wrong(
                    f"{at}, {name} of the {name_of_stage} stage has no gradient. Two things to look at: does a "
                    f"backward run through the {name_of_stage} stage, and does it begin at all that this stage sent?"
                )
            expected = gradient(right[name])
            if torch.equal(parameter.grad, expected):
                continue
            if torch.allclose(parameter.grad, 2 * expected, rtol=1e-4, atol=1e-7):
                raise Wrong(f"{at}, {name} has twice its gradient: the {name_of_stage} stage was walked through twice.")
            near = 1e-5 * max(1.0, expected.norm().item())
            if (parameter.grad - expected).norm() <= near:
                raise Wrong(
                    f"{at}, {name} is right but for its last bits. Walks of their own would do that: their gradients "
                    "are added at the end, in the parameters, and not where they meet on one device. Let everything "
                    "that was sent enter the same walk back."
                )
            if stage is first and what_is_lost(at):
                raise Wrong(
                    f"{at}, the second stage is right and {name} of the first is not. Two things to look at: do the "
                    "gradients of both tensors come back, and does each enter at the tensor that it belongs to?"
                )
            expect_close(f"{at}, the gradient of {name}", expected, parameter.grad, near)


def what_is_lost(at: str) -> bool:
    return "hidden and memory" in at


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # the model that is compared with has gone through its backward
    return parameter.grad
