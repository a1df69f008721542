"""Before a run: what in a list of blocks a pipeline cannot carry, or carries otherwise than one device would."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from course_utils.number_words import Batch
from course_utils.transformer import Carry


@dataclass(frozen=True)
class Finding:
    """Something about one block.

    Attributes:
        block: its index in the model.
        name: its class.
        is_problem: whether the pipeline would fail or compute something else than one device; otherwise it is allowed,
            and worth knowing.
        text: what was found, and the remedy.
    """

    block: int
    name: str
    is_problem: bool
    text: str

    def __str__(self) -> str:
        return f"block {self.block} ({self.name}): {'' if self.is_problem else 'allowed: '}{self.text}"


def check_blocks(blocks: Sequence[nn.Module], micro_batch: Batch) -> list[Finding]:
    """Run the blocks one after another as if there were a border before each, and look at what they do.

    Every cut is checked at once, because every place between two blocks is taken for a border. The blocks are run in
    training, without dropout, and their gradients and buffers are left as they were.

    Args:
        blocks: the model, in order; each is called as block(carry, micro_batch, None) and returns a carry.
        micro_batch: any one that the model can take.

    Returns:
        What was found, block by block; what a later block would say is missing if an earlier one gives no carry.
    """
    findings: list[Finding] = []
    carry: Carry = (None, None)
    for index, block in enumerate(blocks):
        found, given = check_block(block, carry, micro_batch)
        findings += [Finding(index, type(block).__name__, *each) for each in found]
        if given is None:
            break
        carry = given
    return findings


def check_block(block: nn.Module, carry: Carry, micro_batch: Batch) -> tuple[list[tuple[bool, str]], Carry | None]:
    """What is to be said about one block, as (is_problem, text), and the carry that it gives, if it gives one."""
    found = what_it_is_made_of(block)
    received = tuple(None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in carry)
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    try:
        # As the executor does it: the blocks see a view of the leaf that a message has become.
        views = tuple(None if leaf is None else leaf.view_as(leaf) for leaf in received)
        before = [None if view is None else view._version for view in views]
        given = block(views, micro_batch, None)
        changed = any(
            view is not None and view._version != version for view, version in zip(views, before, strict=True)
        )
    except RuntimeError as error:
        if "in-place" not in str(error) and "inplace" not in str(error):
            raise
        changed, given = (
            True,
            block(tuple(None if leaf is None else leaf.clone() for leaf in received), micro_batch, None),
        )
    finally:
        for name, buffer in block.named_buffers():
            buffer.copy_(buffers[name])
    if changed:
        text = "changes in place what it receives, which at a border is a leaf"
        found.append((True, f"{text}; use an operation that makes a new tensor, `x + 1` for `x += 1`"))
    if not is_carry(given):
        found.append(
            (True, f"returns {told(given)}, and not a carry; return (hidden, memory), with None for what is not there")
        )
        return found, None
    return found + what_it_hands_on(block, received, given), given


def what_it_is_made_of(block: nn.Module) -> list[tuple[bool, str]]:
    found: list[tuple[bool, str]] = []
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            text = f"{type(module).__name__} computes its statistics per micro-batch, one device does so over more rows"
            found.append((True, f"{text}; use LayerNorm or GroupNorm, or freeze it with eval()"))
    if not any(parameter.requires_grad for parameter in block.parameters()):
        found.append((False, "it has nothing to train; a stage of such blocks takes part in every step all the same"))
    return found


def what_it_hands_on(block: nn.Module, received: Sequence[Tensor | None], given: Carry) -> list[tuple[bool, str]]:
    found: list[tuple[bool, str]] = []
    learns = any(p.requires_grad for p in block.parameters()) or any(
        t is not None and t.requires_grad for t in received
    )
    for name, tensor in zip(("hidden", "memory"), given, strict=True):
        if tensor is None:
            continue
        if learns and not tensor.is_floating_point():
            text = f"{name} is {tensor.dtype}, through which no gradient flows to what comes before"
            found.append((True, f"{text}; hand on floating-point numbers, and keep whole ones in the micro-batch"))
        elif learns and not tensor.requires_grad:
            found.append((True, f"{name} has no history, so no gradient flows back; remove the detach() or no_grad()"))
        elif any(is_part_of(tensor, leaf) for leaf in received):
            text = f"{name} is a view of what it received, so changing one in place would change the other"
            found.append((False, f"{text}; hand on a clone() if anybody does that"))
    return found


def is_carry(given: object) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(t is None or isinstance(t, Tensor) for t in given)


def told(given: object) -> str:
    """`a tuple of 3`, `a Tensor`"""
    return f"a tuple of {len(given)}" if isinstance(given, tuple) and len(given) != 2 else f"a {type(given).__name__}"


def is_part_of(tensor: Tensor, leaf: Tensor | None) -> bool:
    """Whether a tensor shares memory with a leaf and is not simply the whole of it, handed on."""
    shares = leaf is not None and tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    return shares and (tensor.shape != leaf.shape or tensor.stride() != leaf.stride())  # type: ignore[union-attr]
