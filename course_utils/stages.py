"""Cut the model into stages: which blocks belong together, and the module that holds only them.

A stage is a run of neighbouring blocks. A pipeline is as fast as its slowest stage, so where to cut matters: by the
number of blocks if they cost about the same, by measured cost if they do not.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from course_utils.number_words import Batch, Geometry, even_sizes
from course_utils.transformer import (
    BlockBuilder,
    Carry,
    CarrySpec,
    TransformerConfig,
    block_builders,
    carry_after,
    generator_for,
)

Partition = tuple[range, ...]  # per stage, the indices of its blocks

BYTES_PER_PARAMETER = 4  # float32


# --- Where to cut ---------------------------------------------------------------------------------------------


def by_count(num_blocks: int, num_stages: int) -> Partition:
    """Stages whose numbers of blocks differ by at most one, larger ones first: 8 blocks in 3 -> 3, 3, 2."""
    _check_num_stages(num_blocks, num_stages)
    ends, end = [], 0
    for size in even_sizes(num_blocks, num_stages):
        end += size
        ends.append(end)
    return _ranges(ends)


def by_cost(costs: Sequence[float], num_stages: int) -> Partition:
    """The cut whose slowest stage is as fast as any cut can make it, exactly. costs[i] is the time of block i.

    Usually many cuts share the fastest possible slowest stage. Of those, take one whose fastest stage is as slow as
    possible (the smallest spread), then the one whose first stage is shortest. The same costs always give the same cut.
    """
    costs = tuple(costs)
    num_blocks = len(costs)
    _check_num_stages(num_blocks, num_stages)
    for index, block_cost in enumerate(costs):
        if not (math.isfinite(block_cost) and block_cost >= 0):
            raise ValueError(f"the cost of block {index} must be a finite number of at least 0, got {block_cost!r}")

    @cache
    def cost(start: int, end: int) -> float:
        return math.fsum(costs[start:end])

    def first_ends(start: int, stages: int) -> range:
        """Where the first of `stages` stages that begin at `start` may end: every stage gets at least one block."""
        return range(start + 1, num_blocks - stages + 2)

    @cache
    def least_slowest(start: int, stages: int) -> float:
        """The slowest stage of the best cut of the blocks from `start` on into `stages` stages."""
        if stages == 1:
            return cost(start, num_blocks)
        return min(max(cost(start, end), least_slowest(end, stages - 1)) for end in first_ends(start, stages))

    limit = least_slowest(0, num_stages)

    @cache
    def most_even(start: int, stages: int) -> tuple[float, tuple[int, ...]] | None:
        """(minus the fastest stage, the ends of the stages) of the most even cut with no stage above the limit."""
        if stages == 1:
            return (-cost(start, num_blocks), (num_blocks,)) if cost(start, num_blocks) <= limit else None
        cuts = []
        for end in first_ends(start, stages):
            others = most_even(end, stages - 1) if cost(start, end) <= limit else None
            if others is not None:
                cuts.append((max(-cost(start, end), others[0]), (end, *others[1])))
        return min(cuts, default=None)  # equal spread: the earliest end

    best = most_even(0, num_stages)
    assert best is not None  # the cut that attains the limit is among those tried
    return _ranges(best[1])


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as every stage does: with more, sums are cut into other pieces; their last bits differ."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def measure_costs(builders: Sequence[BlockBuilder], batch: Batch, seed: int, repetitions: int = 5) -> list[float]:
    """Seconds of forward + backward per block on this batch: the median of `repetitions`, on one thread.

    One block exists at a time, so a model that is too large for this process can be measured in it.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    with one_thread():
        costs = []
        carry: Carry = (None, None)
        for builder in builders:
            block = builder.build(seed)
            received = carry
            seconds = []
            for _ in range(1 + repetitions):
                started = time.perf_counter()
                leaves = _detached(received)
                carry = block(leaves, batch, generator_for(seed, 0, 0, builder.index))
                sent = [tensor for tensor in carry if tensor is not None and tensor.requires_grad]
                torch.autograd.backward(sent, [torch.ones_like(tensor) for tensor in sent])
                seconds.append(time.perf_counter() - started)
            costs.append(statistics.median(seconds[1:]))
            carry = _detached(carry)
        return costs


def _detached(carry: Carry) -> Carry:
    """What a stage receives: the same numbers, without the history that made them, ready to collect a gradient."""
    hidden, memory = (None if tensor is None else tensor.detach().requires_grad_() for tensor in carry)
    return hidden, memory


def _ranges(ends: Sequence[int]) -> Partition:
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _check_num_stages(num_blocks: int, num_stages: int) -> None:
    if not isinstance(num_stages, int) or isinstance(num_stages, bool) or not 1 <= num_stages <= num_blocks:
        raise ValueError(
            f"cannot cut {num_blocks} blocks into {num_stages!r} stages: every stage needs at least one block, "
            f"so choose 1 to {num_blocks} stages (or a model with more layers)"
        )


# --- What a stage is ------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """The blocks of one stage, and nothing of the other stages.

    Each block is built as in the uncut model, so its weights do not depend on where the model is cut. The stage never
    holds more than its own blocks, not even while it is built.
    """

    def __init__(
        self,
        index: int,
        num_stages: int,
        builders: Sequence[BlockBuilder],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`builders`: those of this stage only, neighbours in the model's order."""
        super().__init__()
        if not 0 <= index < num_stages:
            raise ValueError(f"there is no stage {index} of {num_stages}: stages are numbered 0 to {num_stages - 1}")
        indices = [builder.index for builder in builders]
        if not indices or indices != list(range(indices[0], indices[0] + len(indices))):
            raise ValueError(f"stage {index} must hold one or more neighbouring blocks in order, got blocks {indices}")
        self.index = index
        self.num_stages = num_stages
        self.builders = tuple(builders)
        self.blocks = nn.ModuleList(builder.build(seed, device) for builder in builders)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def forward(self, carry: Carry, micro_batch: Batch, dropout_key: tuple[int, int, int] | None = None) -> Carry:
        """Run the blocks in order. dropout_key = (seed, step, micro-batch); None: no dropout.

        Every block draws its masks from a generator seeded by the key and the block's place in the whole model. So the
        masks are the same for every cut, in every process, and when a micro-batch is computed a second time.
        """
        for builder, block in zip(self.builders, self.blocks, strict=True):
            generator = None
            if dropout_key is not None and builder.config.dropout > 0:
                generator = generator_for(*dropout_key, builder.index)
            carry = block(carry, micro_batch, generator)
        return carry

    def named_parameters_globally(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by a name that is the same for every cut, such as "01.encoder_0.attention.query.weight"."""
        for builder, block in zip(self.builders, self.blocks, strict=True):
            for name, parameter in block.named_parameters():
                yield _global_name(builder, name), parameter


def global_parameter_names(builders: Sequence[BlockBuilder]) -> list[str]:
    """The names of all parameters in model order, as named_parameters_globally() gives them; nothing is allocated."""
    return [_global_name(builder, name) for builder in builders for name in builder.parameter_shapes()]


def _global_name(builder: BlockBuilder, parameter_name: str) -> str:
    return f"{builder.index:02d}.{builder.name}.{parameter_name}"


def stage_table(builders: Sequence[BlockBuilder], partition: Partition) -> str:
    """A table of what each stage holds and what it weighs in float32; nothing is allocated."""
    if [index for blocks in partition for index in blocks] != list(range(len(builders))):
        raise ValueError(f"the partition {partition} does not hold each of the {len(builders)} blocks once, in order")
    rows = [("stage", "parameters", "bytes", "blocks")]
    total = 0
    for stage, blocks in enumerate(partition):
        own = [builders[index] for index in blocks]
        parameters = sum(shape.numel() for builder in own for shape in builder.parameter_shapes().values())
        total += parameters
        rows.append(_table_row(str(stage), parameters, ", ".join(builder.name for builder in own)))
    rows.append(_table_row("all", total, f"{len(builders)} blocks"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _table_row(stage: str, parameters: int, blocks: str) -> tuple[str, str, str, str]:
    return stage, f"{parameters:,}", f"{parameters * BYTES_PER_PARAMETER:,}", blocks


@dataclass(frozen=True)
class CutModel:
    """A model and where it is cut: all that is known of its stages before any of them is built."""

    config: TransformerConfig
    partition: Partition

    @cached_property
    def builders(self) -> list[BlockBuilder]:
        return block_builders(self.config)

    @property
    def num_stages(self) -> int:
        return len(self.partition)

    @cached_property
    def parameter_names(self) -> list[str]:
        """The names of the whole model's parameters, in model order."""
        return global_parameter_names(self.builders)

    @cached_property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        """{name: shape} of the whole model's parameters; nothing is allocated."""
        pairs = ((builder, *item) for builder in self.builders for item in builder.parameter_shapes().items())
        return {_global_name(builder, name): shape for builder, name, shape in pairs}

    def stage_of(self, parameter_name: str) -> int:
        """The stage that holds a parameter of the whole model."""
        block = int(parameter_name.partition(".")[0])
        return next(stage for stage, blocks in enumerate(self.partition) if block in blocks)

    def draw_parameter(self, parameter_name: str, seed: int) -> torch.Tensor:
        """The first weights of one parameter, as the stage that holds it draws them; its block exists for a moment."""
        index, _, rest = parameter_name.split(".", 2)
        return self.builders[int(index)].build(seed).get_parameter(rest).detach()

    def build(self, stage: int, seed: int, device: torch.device | str = "cpu") -> Stage:
        """One stage with its weights."""
        own = [self.builders[index] for index in self.partition[stage]]
        return Stage(stage, self.num_stages, own, seed, device)

    def carry_after(self, stage: int, geometry: Geometry) -> tuple[CarrySpec | None, CarrySpec | None]:
        """What a stage hands on to the next one for a micro-batch of that geometry."""
        return carry_after(self.builders, self.partition[stage][-1], geometry, self.config)
