"""How many bytes each rank holds in a step, and what for: counted, not guessed.

A tensor is a view of a *storage*, the memory itself; many tensors may share one. So storages are counted, each once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.number_words import Batch
from course_utils.pipeline import Pipeline, Tensors
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig, micro_batches_of, numbers_of, settle
from course_utils.schedules import Action, Schedule
from course_utils.stages import CutModel, Stage
from course_utils.training_state import build_rank
from course_utils.transfer import agree
from course_utils.transports import Worker

# --- What is reported -----------------------------------------------------------------------------------------


class MicroBatchBytes(NamedTuple):
    """What a stage keeps of one micro-batch from its forward to its backward."""

    inputs: int  # what arrived from the stage before; re-materialisation keeps these alone
    graph: int  # what autograd saved besides


@dataclass(frozen=True)
class StageMemory:
    """The bytes of one stage, the most at any moment of a step.

    Attributes:
        parameters, gradients, optimizer_state: buffers, such as tables of positions, are not among them.
        stash: inputs and graphs of all micro-batches that are kept at once.
        low_precision: copies of weights that autocast makes; they are not part of the stash.
        micro_batches: what is kept of each of them.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer_state: int
    stash: int
    low_precision: int
    micro_batches: tuple[MicroBatchBytes, ...]


@dataclass(frozen=True)
class RankMemory:
    """The bytes of one rank, the most at any moment of a step.

    Attributes:
        stages: those of this rank; there may be none.
        stash: of all its stages together; less than their sum if they do not have most at the same moment.
        messages: buffers of posted receives, what has just arrived or waits to be sent, unless it is in the stash.
        peak: of all that is counted here together. What an operation needs only while it computes is not.
    """

    rank: int
    stages: tuple[StageMemory, ...]
    stash: int
    messages: int
    peak: int


# --- The count ------------------------------------------------------------------------------------------------


class Purpose(NamedTuple):
    """What a storage is held for: "inputs", "graph", "copy", or "anyway", which is not counted."""

    kind: str
    stage: int = -1
    micro_batch: int = -1


def storages(tensors: Iterable[Tensor | None]) -> dict[StorageWeakRef, int]:
    """{storage: its bytes}, each once.

    The references are weak: they keep no memory alive, and as long as one exists, its storage's identity is not given
    to another storage. An address would not do: memory that is freed is soon used again.
    """
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {StorageWeakRef(storage): storage.nbytes() for storage in found}


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """The memory behind some tensors; what they share counts once."""
    return sum(storages(tensors).values())


class Ledger:
    """What each storage is held for; the first purpose that is noted for it counts."""

    def __init__(self) -> None:
        self.notes: dict[StorageWeakRef, tuple[Purpose, int]] = {}

    def note(self, purpose: Purpose, tensors: Iterable[Tensor | None]) -> None:
        for storage, size in storages(tensors).items():
            self.notes.setdefault(storage, (purpose, size))

    def forget(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """These are no longer held for a purpose of that kind."""
        for storage in storages(tensors):
            if storage in self.notes and self.notes[storage][0].kind == kind:
                del self.notes[storage]

    def alive(self) -> Counter[Purpose]:
        """{purpose: bytes} of what has not been freed."""
        self.notes = {storage: note for storage, note in self.notes.items() if not storage.expired()}
        counted: Counter[Purpose] = Counter()
        for purpose, size in self.notes.values():
            counted[purpose] += size
        return counted


class CastWatcher(TorchDispatchMode):
    """Notes the copies of parameters in other formats, which autocast makes without anybody asking for them."""

    def __init__(self, ledger: Ledger, stage: Stage):
        super().__init__()
        self.ledger, self.purpose = ledger, Purpose("copy", stage.index)
        self.parameters = storages(stage.parameters())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_cast = function is torch.ops.aten._to_copy.default
        if is_cast and StorageWeakRef(args[0].untyped_storage()) in self.parameters:
            self.ledger.note(self.purpose, [result])
        return result


class MeteredPipeline(Pipeline):
    """A pipeline that counts what it keeps. It computes the same, more slowly.

    Attributes:
        held_besides: bytes that the rank holds all the time: weights and optimizer. To be set before a step.
        peaks: the most bytes at any moment of the last step: under (name, stage), and under (name, None) of the rank.
        kept: {(stage, micro-batch): what was kept of it in the last step}.
    """

    held_besides = 0

    def step(self, micro_batches: Sequence[Batch], *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        self.ledger = Ledger()
        self.peaks: Counter[tuple[str, int | None]] = Counter()
        self.kept: dict[tuple[int, int], MicroBatchBytes] = {}
        for stage in self.stages.values():
            self.ledger.note(Purpose("anyway"), [*stage.parameters(), *stage.buffers()])
        for batch in micro_batches:
            self.ledger.note(Purpose("anyway"), [batch.source, batch.target_input, batch.target_output])
        return super().step(micro_batches, *args, **kwargs)

    def compute(self, action: Action, leaves: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        inputs, graph = (Purpose(kind, action.stage, action.micro_batch) for kind in ("inputs", "graph"))
        self.ledger.note(inputs, leaves)

        def pack(tensor: Tensor) -> Tensor:
            self.ledger.note(graph, [tensor])
            return tensor.detach()  # as it is, it would know the node that saves it: a circle, never freed unless used

        watcher = CastWatcher(self.ledger, self.stages[action.stage])
        with saved_tensors_hooks(pack, lambda tensor: tensor), watcher:
            carry = super().compute(action, leaves, *args, **kwargs)
        alive = self.look(carry)
        self.kept[action.stage, action.micro_batch] = MicroBatchBytes(alive[inputs], alive[graph])
        return carry

    def forward(self, action: Action, *args: Any, **kwargs: Any) -> Tensors:
        result = super().forward(action, *args, **kwargs)
        if action[1:] in self.recomputed:
            self.ledger.forget("graph", result)  # the graph is gone, but its result is still to be sent: a message
        return result

    def backward(self, action: Action, arrived: Tensors) -> Tensors:
        self.look(arrived)
        result = super().backward(action, arrived)
        self.look(result)
        return result

    def look(self, in_hand: Tensors) -> Counter[Purpose]:
        """Count what is held now. in_hand: what has just arrived, or has been computed and is not yet sent."""
        alive = self.ledger.alive()
        now: Counter[tuple[str, int | None]] = Counter()
        for purpose, size in alive.items():
            if purpose.kind != "anyway":
                name = "low_precision" if purpose.kind == "copy" else "stash"
                now[name, purpose.stage] += size
                now[name, None] += size
        now["gradients", None] = sum(num_bytes(p.grad for p in stage.parameters()) for stage in self.stages.values())
        messages = storages([*in_hand, *self.messages()])
        now["messages", None] = sum(size for storage, size in messages.items() if storage not in self.ledger.notes)
        now["peak", None] = self.held_besides + sum(size for (_, stage), size in now.items() if stage is None)
        self.peaks |= now  # the greater of each
        return alive

    def messages(self) -> list[Tensor | None]:
        """Posted receives, sends that are not known to be over, and what one stage of this rank hands to another."""
        posted = [buffer for buffers, _ in self.exchange.inbox.values() for buffer in buffers]
        sent = [operation.tensor for operations in self.exchange.outbox.values() for operation in operations]
        return posted + sent + [tensor for tensors in self.handed_over.values() for tensor in tensors]


# --- A measurement --------------------------------------------------------------------------------------------


def measure_memory(
    config: TrainingConfig,
    schedule: Schedule | None = None,
    run: Callable[..., list] = launch,
    engine: type[MeteredPipeline] = MeteredPipeline,
) -> list[RankMemory]:
    """The memory of each rank in the second step of a training: Adam makes its state in the first.

    Args:
        schedule, run: as in `training.train`.
    """
    config, schedule = settle(config, schedule)
    return run(measure_rank, schedule.num_ranks, config, config.cut, schedule, engine)


def measure_rank(
    worker: Worker, config: TrainingConfig, cut: CutModel, schedule: Schedule, engine: type[MeteredPipeline]
) -> RankMemory:
    """What `measure_memory` runs in every process: two steps of one batch; the figures of the second remain."""
    pipeline, state = build_rank(worker.transport, config, cut, schedule, engine)
    numbers = numbers_of(config)
    micro_batches = micro_batches_of(config, numbers.training, 0)
    plan, num_tokens = pipeline.plan(micro_batches), sum(m.num_tokens for m in micro_batches)
    for _ in range(2):
        agree(worker.transport, plan)
        state.optimizer.zero_grad()
        pipeline.held_besides = num_bytes(state.parameters) + bytes_of_optimizer(state.optimizer, state.parameters)
        pipeline.step(micro_batches, plan, num_tokens, state.dropout_key(), state.scaler.scale)
        state.optimizer.step()

    peaks = pipeline.peaks
    reports = tuple(
        StageMemory(
            number,
            num_bytes(stage.parameters()),
            num_bytes(parameter.grad for parameter in stage.parameters()),
            bytes_of_optimizer(state.optimizer, stage.parameters()),
            peaks["stash", number],
            peaks["low_precision", number],
            tuple(pipeline.kept[number, m] for m in range(config.micro_batches)),
        )
        for number, stage in pipeline.stages.items()
    )
    return RankMemory(worker.rank, reports, peaks["stash", None], peaks["messages", None], peaks["peak", None])


def bytes_of_optimizer(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> int:
    """What an optimizer keeps about these parameters: for Adam two numbers for each weight, and its counters."""
    kept = [value for parameter in parameters for value in optimizer.state.get(parameter, {}).values()]
    return num_bytes(value for value in kept if isinstance(value, Tensor))


# --- What the schedule predicts -------------------------------------------------------------------------------


def predict_stash(schedule: Schedule, micro_batches: Mapping[int, Sequence[MicroBatchBytes]]) -> list[int]:
    """The most bytes of stash on each rank, from nothing but the order of its actions.

    For one size of micro-batch and one stage per rank: M times that size in GPipe, min(M, K - k) times on rank k in
    1F1B. A forward whose results are not kept still makes them, and they are freed when it is done.

    Args:
        micro_batches: for each stage what it keeps of each micro-batch.
    """
    peaks = []
    for row in schedule.actions:
        recomputed = {action[1:] for action in row if action.kind == "R"}
        kept = peak = 0
        for action in row:
            inputs, graph = micro_batches[action.stage][action.micro_batch]
            if action.kind == "B":
                kept -= inputs + graph
                continue
            kept += inputs if action.kind == "F" else 0
            peak = max(peak, kept + graph)
            kept += 0 if action.kind == "F" and action[1:] in recomputed else graph
        peaks.append(peak)
    return peaks


# --- In words -------------------------------------------------------------------------------------------------


def memory_table(ranks: Sequence[RankMemory]) -> str:
    """A row per stage, in bytes; what belongs to a whole rank stands in the row of its last stage."""
    rows = [["rank", "stage", "parameters", "gradients", "optimizer", "stash", "low precision", "messages", "peak"]]
    for rank in ranks:
        for s in rank.stages:
            figures = [s.parameters, s.gradients, s.optimizer_state, s.stash, s.low_precision]
            figures += [rank.messages, rank.peak] if s is rank.stages[-1] else []
            rows.append([str(rank.rank), str(s.stage), *(f"{figure:,}" for figure in figures)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.rjust(width) for c, width in zip(row, widths, strict=False)) for row in rows)


def describe_memory(ranks: Sequence[RankMemory], schedule: Schedule) -> str:
    """One sentence per rank: what it keeps, and whether the schedule predicted it."""
    predicted = predict_stash(schedule, {s.stage: s.micro_batches for rank in ranks for s in rank.stages})
    sentences = []
    for rank, expected in zip(ranks, predicted, strict=True):
        largest = max((sum(size) for s in rank.stages for size in s.micro_batches), default=0)
        verdict = "as the schedule predicts" if rank.stash == expected else f"the schedule predicts {expected:,}"
        sentences.append(
            f"Rank {rank.rank} keeps up to {rank.stash:,} bytes for its backwards ({verdict}), which is "
            f"{rank.stash / max(1, largest):.1f} times its largest micro-batch; its peak is {rank.peak:,} bytes."
        )
    return "\n".join(sentences)
