"""Greedy decoding through the pipeline: the encoder runs once, the decoder once per word.

A step of decoding is a single small micro-batch that walks through the stages, so a pipeline is no faster here than one
device. What it gives is the model itself: nobody has to gather it in one place to use it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from course_utils.number_words import END, PAD, START, TARGET, Batch
from course_utils.pipeline import Pipeline
from course_utils.stages import CutModel, Stage
from course_utils.transfer import Specs, StepPlan, agree, check_tensor
from course_utils.transformer import Carry


@torch.no_grad()
def greedy_decode(pipeline: Pipeline, cut: CutModel, source: Tensor, max_length: int) -> Tensor:
    """The likeliest word, again and again, until every row has ended or has max_length tokens.

    All ranks call this together and get the same result.

    Args:
        source: (rows, source_length) ids, the same on every rank.
        max_length: at most so many tokens, the end token counted.

    Returns:
        (rows, length) ids without the start token; padding behind the end token.

    Raises:
        PlanMismatch: if the ranks were given sources of different shapes.
        RuntimeError: in the middle of a training step, whose messages are still under way, or after `expect`.
    """
    if pipeline.stash:
        raise RuntimeError(f"{len(pipeline.stash)} micro-batches wait for their backward; finish the step, then decode")
    if pipeline.expected is not None:
        raise RuntimeError("expect() has posted the receives of a step; run that step, then decode")
    rows, source_length = source.shape
    one_plan = StepPlan([(rows, source_length, max_length)], cut.carry_after, cut.num_stages)
    agree(pipeline.transport, one_plan)
    source = source.to(pipeline.device)
    prefix = torch.full((rows, 1), START, device=source.device)
    memories = walk(pipeline, cut, "encoder", Batch(source, prefix, prefix), {})
    while prefix.shape[1] <= max_length and not ended(prefix).all():
        logits = walk(pipeline, cut, "decoder", Batch(source, prefix, prefix), memories).get(cut.num_stages)
        prefix = torch.cat([prefix, next_tokens(pipeline, prefix, logits)], dim=1)
    return prefix[:, 1:]


def ended(prefix: Tensor) -> Tensor:
    """(rows,) whether a row holds its end token."""
    return (prefix == END).any(dim=1)


def walk(pipeline: Pipeline, cut: CutModel, part: str, batch: Batch, memories: dict[int, Tensor]) -> dict[int, Tensor]:
    """Run the blocks of one part ("encoder" or "decoder") of all stages, one stage after another.

    Returns:
        For "encoder": {stage: memory} for stages of this rank whose decoder blocks need it. For "decoder": {number of
        stages: logits} on the rank of the last stage.
    """
    me, rank_of_stage = pipeline.transport.rank, pipeline.schedule.rank_of_stage
    carry: Carry = (None, None)
    kept: dict[int, Tensor] = {}
    for index in range(cut.num_stages):
        if rank_of_stage[index] != me:
            continue
        if index > 0 and rank_of_stage[index - 1] != me:
            carry = receive(pipeline, specs_after(cut, part, index - 1, batch), rank_of_stage[index - 1])
        if part == "decoder":
            carry = (carry[0], memories.get(index))
        carry = run_part(pipeline.stages[index], part, carry, batch)
        if part == "encoder" and carry[1] is not None:
            kept[index] = carry[1]
        if index + 1 < cut.num_stages and rank_of_stage[index + 1] != me:
            send(pipeline, specs_after(cut, part, index, batch), carry, rank_of_stage[index + 1])
        elif index + 1 == cut.num_stages and part == "decoder" and carry[0] is not None:
            kept[cut.num_stages] = carry[0]
    return kept


def receive(pipeline: Pipeline, specs: Specs, source: int) -> Carry:
    """The tensors that specs name, from another rank; None for the others."""
    device = pipeline.transport.wire_device
    hidden, memory = (
        None if spec is None else torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs
    )
    for buffer in (hidden, memory):
        if buffer is not None:
            pipeline.transport.wait(pipeline.transport.irecv(buffer, source, "hidden states of a decode"))
    hidden, memory = (None if tensor is None else tensor.to(pipeline.device) for tensor in (hidden, memory))
    return hidden, memory


def send(pipeline: Pipeline, specs: Specs, carry: Carry, destination: int) -> None:
    """Send the tensors that specs name."""
    for tensor, spec in zip(carry, specs, strict=True):
        if spec is not None:
            checked = check_tensor("hidden states of a decode", tensor, spec)
            outgoing = checked.to(pipeline.transport.wire_device).contiguous()
            operation = pipeline.transport.isend(outgoing, destination, "hidden states of a decode")
            pipeline.transport.wait(operation)


def run_part(stage: Stage, part: str, carry: Carry, batch: Batch) -> Carry:
    """The blocks of a stage that belong to a part."""
    for builder, block in zip(stage.builders, stage.blocks, strict=True):
        if builder.part == part:
            carry = block(carry, batch, None)
    return carry


def specs_after(cut: CutModel, part: str, stage: int, batch: Batch) -> Specs:
    """What a stage hands on: in the encoder's part the memory too, in the decoder's part hidden states alone."""
    hidden, memory = cut.carry_after(stage, batch.geometry)
    ends_in = cut.builders[cut.partition[stage][-1]].part
    if part == "encoder":
        return (hidden if ends_in == "encoder" else None, memory)
    return (hidden if ends_in == "decoder" else None, None)


def next_tokens(pipeline: Pipeline, prefix: Tensor, logits: Tensor | None) -> Tensor:
    """(rows, 1): the last stage chooses the next token of each row and tells all other ranks."""
    transport, last = pipeline.transport, pipeline.schedule.rank_of_stage[-1]
    if logits is not None:
        tokens = logits[:, -1].argmax(dim=-1).masked_fill(ended(prefix), PAD).cpu()
        others = [rank for rank in range(transport.world_size) if rank != last]
        for operation in [transport.isend(tokens, rank, "the next tokens", control=True) for rank in others]:
            transport.wait(operation)
    else:
        tokens = torch.empty(len(prefix), dtype=torch.int64)
        transport.wait(transport.irecv(tokens, last, "the next tokens", control=True))
    return tokens.to(prefix.device)[:, None]


def as_words(tokens: Tensor) -> list[str]:
    """(rows, length) ids -> one line of words per row, up to its end token."""
    lines = []
    for row in tokens.tolist():
        ids: Sequence[int] = row[: row.index(END)] if END in row else row
        lines.append(" ".join(TARGET.decode(token for token in ids if token != PAD)))
    return lines
