"""Exercises of unit 03: an exchange that cannot deadlock, a gather round a ring, a link from noisy times."""

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from course_utils import links
from course_utils.charts import in_figures
from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare
from course_utils.plots import new_figure, show
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transports import PeerLost, Transport, Worker

# --- What ranks do with their messages --------------------------------------------------------------------------------


class NoSuchRank(ValueError):
    """A message to or from a rank that the run does not have."""


class MessageClock:
    """When each message is over, in message times: one after both sides have begun it, and after the one before it.

    So ranks that wait for one message after another need as many message times as they have messages in a row,
    whatever this machine takes for them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[tuple[int, int], dict[str, list[int]]] = {}

    def begin(self, kind: str, channel: tuple[int, int], now: int) -> int:
        """Note when one side of a message begins; return the number of the message on its channel."""
        with self._lock:
            times = self._begun.setdefault(channel, {"send": [], "recv": []})[kind]
            times.append(now)
            return len(times) - 1

    def end(self, channel: tuple[int, int], number: int) -> int:
        """When a message is over that both sides have begun."""
        with self._lock:
            sides, end = self._begun[channel], 0
            for sent, received in list(zip(sides["send"], sides["recv"], strict=False))[: number + 1]:
                end = max(end, sent, received) + 1
            return end


@dataclass
class Label:
    """What a message is in words; without stages, so that whoever explains a wait speaks of ranks."""

    text: object
    source: None = None
    destination: None = None

    def __str__(self) -> str:
        return str(self.text)


@dataclass(eq=False)
class Begun:
    """One side of a message that a rank has begun; `wire` is what really travels."""

    kind: str
    peer: int
    tensor: Tensor
    wire: Tensor
    operation: Any
    number: int
    waited: bool = False

    def __str__(self) -> str:
        return f"the {'send to' if self.kind == 'send' else 'receive from'} rank {self.peer}"


@dataclass
class Watched:
    """A rank's transport that shows what goes wrong only sometimes on a real one, and notes all that is done with it.

    A buffer holds nonsense until its receive has been waited for, and a tensor must not change before its send has.
    """

    transport: Transport
    clock: MessageClock
    mine: Tensor
    now: int = 0
    begun: list[Begun] = field(default_factory=list)
    faults: list[list[str]] = field(default_factory=list)  # [mistake, what happened]
    log: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["transport"], name)

    def isend(self, tensor: Tensor, peer: int, label: object, control: bool = False) -> Begun:
        self._look_at(tensor, peer)
        if any(overlap(tensor, other.tensor) for other in self._open("recv")):
            self._fault("sent on before it had arrived", "sent a buffer before it had waited for what arrives in it")
        wire = tensor.detach().clone()
        return self._begin("send", peer, tensor, wire, label, control)

    def irecv(self, buffer: Tensor, peer: int, label: object, control: bool = False) -> Begun:
        self._look_at(buffer, peer)
        if overlap(buffer, self.mine):
            self._fault("received into its own tensor", "received into its own tensor, which was to stay as it is")
        if any(overlap(buffer, other.tensor) for other in self._open("send")):
            self._fault(
                "overwritten while it is sent",
                "began to receive into a buffer whose send it had not waited for: what arrives overwrites what leaves",
            )
        if any(overlap(buffer, other.tensor) for other in self._open("recv")):
            self._fault("one buffer for two receives", "began two receives into one buffer")
        wire = torch.empty_like(buffer)
        buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)
        return self._begin("recv", peer, buffer, wire, label, control)

    def wait(self, begun: Any) -> None:
        if not isinstance(begun, Begun):
            raise TypeError(f"wait takes what isend or irecv has returned, it was given {begun!r}")
        self.transport.wait(begun.operation)
        if begun.kind == "send" and not begun.waited and not same_bits(begun.tensor, begun.wire):
            self._fault("overwritten while it is sent", "changed a tensor whose send it had not waited for")
        if begun.kind == "recv" and not begun.waited:
            begun.tensor.copy_(begun.wire)
        begun.waited = True
        self.now = max(self.now, self.clock.end(self._channel(begun.kind, begun.peer), begun.number))
        self.log.append(f"wait for {begun}: over at {self.now}")

    def _begin(self, kind: str, peer: int, tensor: Tensor, wire: Tensor, label: object, control: bool) -> Begun:
        number = self.clock.begin(kind, self._channel(kind, peer), self.now)
        start = self.transport.isend if kind == "send" else self.transport.irecv
        begun = Begun(kind, peer, tensor, wire, start(wire, peer, Label(label), control), number)
        self.begun.append(begun)
        self.log.append(f"begin {begun}")
        return begun

    def _open(self, kind: str) -> list[Begun]:
        return [begun for begun in self.begun if begun.kind == kind and not begun.waited]

    def _channel(self, kind: str, peer: int) -> tuple[int, int]:
        return (self.transport.rank, peer) if kind == "send" else (peer, self.transport.rank)

    def _look_at(self, tensor: Tensor, peer: int) -> None:
        if not 0 <= peer < self.transport.world_size:
            self._fault("no such rank", f"began a message with rank {peer}")
            raise NoSuchRank(f"there is no rank {peer}")
        if not tensor.is_contiguous():
            raise ValueError("the tensor of a message must be contiguous")

    def _fault(self, mistake: str, what: str) -> None:
        self.faults.append([mistake, what])

    def report(self) -> dict[str, Any]:
        """All of it in plain values."""
        return {
            "sends": [[begun.peer, begun.tensor.numel()] for begun in self.begun if begun.kind == "send"],
            "receives": [[begun.peer, begun.tensor.numel()] for begun in self.begun if begun.kind == "recv"],
            "unwaited": [[begun.kind, str(begun)] for begun in self.begun if not begun.waited],
            "faults": self.faults,
            "log": self.log,
            "end": self.now,
        }


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors share a byte."""
    (a, b), (c, d) = ((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (one, other))
    return a < d and c < b


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def plain(value: Any) -> Any:
    """What an answer returned, in values that can leave its process."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if value is None else f"a {type(value).__name__}"


def run_watched(call: Callable[[Worker, Tensor], Any], tensors: dict[int, Tensor], world_size: int) -> dict[str, Any]:
    """Call call(worker, its tensor) on each rank that has a tensor; return the reports of these ranks and their end."""
    clock, watched = MessageClock(), dict[int, Watched]()
    kept = {rank: tensor.clone() for rank, tensor in tensors.items()}

    def one_rank(worker: Worker) -> Any:
        if worker.rank not in tensors:
            return None
        mine = tensors[worker.rank]
        watched[worker.rank] = Watched(worker.transport, clock, mine)
        return plain(call(replace(worker, transport=watched[worker.rank]), mine))

    stuck, results = "", [None] * world_size
    try:
        results = run_in_threads(one_rank, world_size, limit=5)
    except (Deadlock, PeerLost, NoSuchRank) as error:
        stuck = str(error)
    ranks = sorted(tensors)
    return {
        "came": {f"rank {rank}": results[rank] for rank in ranks},
        "ranks": [watched[rank].report() if rank in watched else {} for rank in ranks],
        "changed": [rank for rank in ranks if not same_bits(tensors[rank], kept[rank])],
        "stuck": stuck,
    }


def a_tensor(rank: int, seed: int, shape: Sequence[int], dtype: str) -> Tensor:
    """The tensor that a rank begins with."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype == "float32":
        return torch.randn(tuple(shape), generator=generator)
    return torch.randint(-1000, 1000, tuple(shape), generator=generator, dtype=getattr(torch, dtype))


def in_words(shape: Sequence[int], dtype: str) -> str:
    return f"{'x'.join(map(str, shape)) or 'a scalar,'} {dtype}"


def judge_handling(at: str, rank: int, report: dict[str, Any]) -> None:
    """Raises for what a rank does wrong with its messages, whatever they are."""
    if report["unwaited"]:
        kind, what = report["unwaited"][0]
        name = "send" if kind == "send" else "receive"
        raise Named(
            f"a {name} that nobody waits for",
            f"{at}: rank {rank} never waited for {what}. On real processes a message whose handle is dropped may be "
            "lost, and a buffer may be read before it is filled.",
        )
    if report["faults"]:
        mistake, what = report["faults"][0]
        raise Named(mistake, f"{at}: rank {rank} {what}.")


def first_waits(ranks: Sequence[dict[str, Any]], kind: str) -> bool:
    """Whether all that each rank ever did was to begin one message of a kind, and to wait for it."""
    side, other = ("sends", "receives") if kind == "send" else ("receives", "sends")
    return all(report and len(report[side]) == 1 and not report[other] for report in ranks)


# --- exchange ---------------------------------------------------------------------------------------------------------


class Swap(NamedTuple):
    """Pairs of ranks that swap tensors at the same time; all other ranks do nothing."""

    world_size: int
    pairs: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    dtype: str
    seed: int

    def __str__(self) -> str:
        who = " and with ".join(f"ranks {a} and {b}" for a, b in self.pairs)
        return f"{who} of {self.world_size}, {in_words(self.shape, self.dtype)}, seed {self.seed}"

    @property
    def peer_of(self) -> dict[int, int]:
        return {a: b for pair in self.pairs for a, b in (pair, pair[::-1])}


def draw_swaps(draw: random.Random) -> list[Swap]:
    seeds = [draw.randrange(1000) for _ in range(4)]
    four = draw.sample(range(5), 4)
    return [
        Swap(2, ((0, 1),), (2, 3), "float32", seeds[0]),
        Swap(3, ((0, 2),), (5,), "int64", seeds[1]),
        Swap(2, ((1, 0),), (), "float32", seeds[2]),
        Swap(5, ((four[0], four[1]), (four[2], four[3])), (3, draw.randint(1, 4)), "float32", seeds[3]),
    ]


def attempt_swap(answer: Callable, case: Swap) -> dict[str, Any]:
    tensors = {rank: a_tensor(rank, case.seed, case.shape, case.dtype) for rank in case.peer_of}
    return run_watched(lambda worker, mine: answer(worker, mine, case.peer_of[worker.rank]), tensors, case.world_size)


def judge_swaps(cases: Sequence[Swap], came: Sequence[Any]) -> str:
    for case, value in zip(cases, came, strict=True):
        judge_swap(case, value)
    compare(cases, [value["came"] for value in came], swapped, OF_A_SWAP, what="on")
    for case, value in zip(cases, came, strict=True):
        if value["changed"]:
            raise Wrong(f"With {case}: the own tensor of rank {value['changed'][0]} was changed.")
        judge_time(case, value["ranks"], 1)
    return (
        f"{len(cases)} exchanges, two of them at the same time: each rank sent one message and received one, both "
        "were waited for, and after 1 message time both were over."
    )


def judge_swap(case: Swap, value: dict[str, Any]) -> None:
    at, ranks = f"With {case}", sorted(case.peer_of)
    for rank, report in zip(ranks, value["ranks"], strict=True):
        for peer, _ in [*report.get("sends", []), *report.get("receives", [])]:
            if peer != case.peer_of[rank]:
                raise Named(
                    "another peer than the one given",
                    f"{at}: rank {rank} began a message with rank {peer}; its peer is rank {case.peer_of[rank]}.",
                )
    if value["stuck"]:
        if first_waits(value["ranks"], "send"):
            raise Named("both send first", f"{at}: both send and wait until the other takes it. {value['stuck']}.")
        if first_waits(value["ranks"], "recv"):
            raise Named("both receive first", f"{at}: both wait for what nobody has begun to send. {value['stuck']}.")
        raise Wrong(f"{at}: the ranks got stuck. {value['stuck']}.")
    for rank, report in zip(ranks, value["ranks"], strict=True):
        judge_handling(at, rank, report)
        for side in ("sends", "receives"):
            if len(report[side]) != 1:
                raise Wrong(f"{at}: rank {rank} has {len(report[side])} {side}; 1 is enough.")


def swapped(case: Swap) -> dict[str, Tensor]:
    return {f"rank {rank}": a_tensor(peer, case.seed, case.shape, case.dtype) for rank, peer in case.peer_of.items()}


OF_A_SWAP = (
    Mistake(
        "returns its own tensor",
        "Each rank returned the tensor that it had before.",
        lambda case: {f"rank {r}": a_tensor(r, case.seed, case.shape, case.dtype) for r in case.peer_of},
    ),
)


def judge_time(case: Any, ranks: Sequence[dict[str, Any]], best: int) -> None:
    """Raises unless all messages are over after so many message times."""
    end = max(report["end"] for report in ranks)
    if end > best:
        raise Named(
            "one message after the other",
            f"With {case}: it takes {end} message times, {best} would do. A rank waited for one message before it "
            "began another that could have been on its way meanwhile.",
        )


def log_of_a_swap(answer: Callable) -> None:
    """Print what two ranks do that exchange their tensors."""
    tell_log(attempt_swap(answer, Swap(2, ((0, 1),), (2, 3), "float32", 0)), (0, 1))


def tell_log(came: dict[str, Any], ranks: Sequence[int]) -> None:
    for rank in ranks:
        print("\n".join(f"rank {rank}: {line}" for line in came["ranks"][rank].get("log") or ["no message"]))
    if came["stuck"]:
        print(came["stuck"])


# --- ring_gather ------------------------------------------------------------------------------------------------------


class Ring(NamedTuple):
    """World size, and the shape and dtype of each rank's tensor."""

    world_size: int
    shape: tuple[int, ...]
    dtype: str
    seed: int

    def __str__(self) -> str:
        return f"K={self.world_size}, tensors of {in_words(self.shape, self.dtype)}, seed {self.seed}"


def draw_rings(draw: random.Random) -> list[Ring]:
    sizes = [3, 1, 2, 4, 5, draw.randint(4, 7)]
    shapes = [(2, 3), (4,), (3,), (), (2, 1, 2), (draw.randint(1, 5),)]
    return [
        Ring(size, shape, "int64" if number == 3 else "float32", draw.randrange(1000))
        for number, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
    ]


def tensors_of(case: Ring) -> list[Tensor]:
    return [a_tensor(rank, case.seed, case.shape, case.dtype) for rank in range(case.world_size)]


def attempt_ring(answer: Callable, case: Ring) -> dict[str, Any]:
    return run_watched(answer, dict(enumerate(tensors_of(case))), case.world_size)


def judge_rings(cases: Sequence[Ring], came: Sequence[Any]) -> str:
    judge_direction(cases, came)
    for case, value in zip(cases, came, strict=True):
        judge_neighbours(case, value)
        if value["stuck"]:
            judge_stuck_ring(case, value)
        for rank, report in enumerate(value["ranks"]):
            judge_handling(f"With {case}", rank, report)
    judge_number_of_messages(cases, came)
    for case, value in zip(cases, came, strict=True):
        judge_lists(case, value["came"])
    lists = [{f"the list of {rank}": found for rank, found in value["came"].items()} for value in came]
    compare(cases, lists, everywhere, OF_A_RING, what="in")
    for case, value in zip(cases, came, strict=True):
        if value["changed"]:
            raise Wrong(f"With {case}: the own tensor of rank {value['changed'][0]} was changed.")
        judge_time(case, value["ranks"], case.world_size - 1)
    return (
        f"{len(cases)} rings of 1 to {max(case.world_size for case in cases)} ranks: every list is in the order of "
        "the ranks, with K - 1 messages of one tensor from each rank, over after K - 1 message times."
    )


def judge_direction(rings: Sequence[Ring], came: Sequence[Any]) -> None:
    """Raises if all ranks of all rings that have two different neighbours take them the same wrong way."""
    seen = set()
    for ring, value in zip(rings, came, strict=True):
        for rank, report in enumerate(value["ranks"] if ring.world_size >= 3 else []):
            for side in ("sends", "receives"):
                steps = {(peer - rank) % ring.world_size for peer, _ in report.get(side, [])}
                where = {1: "next", ring.world_size - 1: "before"}
                seen.add((side, where.get(min(steps)) if len(steps) == 1 else None))
    if seen == {("sends", "before"), ("receives", "next")}:
        raise Named(
            "round the other way",
            f"With {rings[0]}: every rank sends to the one before and receives from the next one. The ring goes from "
            "each rank to the next one.",
        )
    for end in ("next", "before"):
        if seen == {("sends", end), ("receives", end)}:
            raise Named(
                "one neighbour for both",
                f"With {rings[0]}: every rank sends to one neighbour and receives from the same one. In a ring one "
                "neighbour is before a rank and the other one behind it.",
            )


def judge_neighbours(case: Ring, value: dict[str, Any]) -> None:
    """Raises unless every rank sends to the next one and receives from the one before."""
    at, size = f"With {case}", case.world_size
    beyond, elsewhere = [], []
    for rank, report in enumerate(value["ranks"]):
        following, before = (rank + 1) % size, (rank - 1) % size
        for mistake, what in report.get("faults", []):
            if mistake == "no such rank":
                ends = {0: "began a message with rank -1", size - 1: f"began a message with rank {size}"}
                beyond.append((f"{at}: rank {rank} {what}; there are ranks 0 to {size - 1}.", what == ends.get(rank)))
        for side, due, words in (("sends", following, "sends to"), ("receives", before, "receives from")):
            elsewhere += [
                f"{at}: rank {rank} {words} rank {peer}; round the ring it {words} rank {due} only."
                for peer, _ in report.get(side, [])
                if peer != due
            ]
    if beyond:
        text, _ = beyond[0]
        if not elsewhere and all(is_end for _, is_end in beyond):
            raise Named("no wrap-around", text)
        raise Wrong(text)
    if elsewhere:
        raise Wrong(elsewhere[0])


def judge_stuck_ring(case: Ring, value: dict[str, Any]) -> None:
    at = f"With {case}"
    if first_waits(value["ranks"], "send"):
        raise Named(
            "all send first", f"{at}: every rank sends and waits until the next one takes it. {value['stuck']}."
        )
    if first_waits(value["ranks"], "recv"):
        raise Named("all receive first", f"{at}: all wait for what nobody has begun to send. {value['stuck']}.")
    raise Wrong(f"{at}: the ranks got stuck. {value['stuck']}.")


def judge_number_of_messages(cases: Sequence[Ring], came: Sequence[Any]) -> None:
    """Raises unless every rank sends K - 1 messages of one tensor each, and receives as many."""
    counts = [
        (case, rank, len(report["sends"]), len(report["receives"]))
        for case, value in zip(cases, came, strict=True)
        for rank, report in enumerate(value["ranks"])
    ]
    for name, number in (("one hop too many", 0), ("one hop too few", -2)):
        if all(sent == received == max(0, case.world_size + number) for case, _, sent, received in counts):
            case, rank, sent, _ = next(c for c in counts if c[2] != c[0].world_size - 1)
            raise Named(
                name,
                f"With {case}: every rank sends {sent} message{'s' * (sent != 1)}; {case.world_size - 1} are needed "
                "for every tensor to come to every rank.",
            )
    for case, rank, sent, received in counts:
        if sent != case.world_size - 1 or received != case.world_size - 1:
            raise Wrong(
                f"With {case}: rank {rank} sends {sent} messages and receives {received}; expected "
                f"{case.world_size - 1} of each."
            )
    for case, value in zip(cases, came, strict=True):
        one = math.prod(case.shape)
        for rank, report in enumerate(value["ranks"]):
            for hop, (_, numbers) in enumerate(report["sends"]):
                if numbers != one:
                    raise Named(
                        "several tensors in a message",
                        f"With {case}: message {hop} of rank {rank} has {numbers} numbers; one tensor has {one}.",
                    )


def judge_lists(case: Ring, came: dict[str, Any]) -> None:
    for rank, found in came.items():
        if found is None:
            raise Wrong(f"With {case}: expected a list of tensors from {rank}, nothing came. Is a `return` missing?")
        if not isinstance(found, list):
            what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else found
            raise Wrong(f"With {case}: expected a list of {case.world_size} tensors from {rank}, came {what}.")
        if len(found) != case.world_size:
            raise Wrong(
                f"With {case}: expected a list of {case.world_size} tensors from {rank}, one of every rank; it "
                f"has {len(found)}."
            )
        for place, item in enumerate(found):
            if not isinstance(item, Tensor):
                raise Wrong(f"With {case}: place {place} of {rank}'s list holds no tensor but {item}.")


def everywhere(case: Ring) -> dict[str, list[Tensor]]:
    return {f"the list of rank {rank}": tensors_of(case) for rank in range(case.world_size)}


def arranged(case: Ring, source: Callable[[int, int], int]) -> dict[str, list[Tensor]]:
    """For each rank and place the tensor of the rank that `source` gives."""
    tensors, size = tensors_of(case), case.world_size
    return {f"the list of rank {r}": [tensors[source(r, place) % size] for place in range(size)] for r in range(size)}


OF_A_RING = (
    Mistake(
        "in the order of arrival",
        "Each rank's list is in the order in which the tensors came to it, its own one first.",
        lambda case: arranged(case, lambda rank, place: rank - place),
    ),
    Mistake(
        "counts the wrong way round",
        "What arrived in hop h stands in place rank + h, counted round the ring; it started on another rank.",
        lambda case: arranged(case, lambda rank, place: 2 * rank - place),
    ),
    Mistake(
        "one buffer for all",
        "All places but the own one show the tensor that came last: they are the same buffer.",
        lambda case: arranged(case, lambda rank, place: rank if place == rank else rank + 1),
    ),
    Mistake(
        "sends its own each time",
        "All that came to a rank is the tensor of the rank before it: each rank sent its own again and again.",
        lambda case: arranged(case, lambda rank, place: rank if place == rank else rank - 1),
    ),
)


def log_of_a_ring(answer: Callable) -> None:
    """Print what rank 0 of 3 does in a ring."""
    tell_log(attempt_ring(answer, Ring(3, (2, 3), "float32", 0)), (0,))


def ring_on_processes(answer: Callable) -> str:
    """The learner's ring, once on three real processes."""
    from course_utils.processes import StageError, launch

    try:
        came = launch(real_ring, 3, answer, wait_limit=10)
    except StageError as error:
        return f"On three real processes it did not get to its end: {str(error).splitlines()[0]}"
    if came != [[0.0, 1.0, 2.0]] * 3:
        return f"On three real processes the ranks got {came}."
    return "On three real processes, over gloo: every rank got [0.0, 1.0, 2.0]."


def real_ring(worker: Worker, answer: Callable) -> list[float]:
    return [tensor.item() for tensor in answer(worker, torch.tensor(float(worker.rank)))]


# --- recover_link -----------------------------------------------------------------------------------------------------

ALLOWED = 0.05  # by how much latency and bandwidth may be off


class Log(NamedTuple):
    """Times of many messages over one link. `half` is the size whose bytes take as long as the latency."""

    num_messages: int
    latency: float
    half: int
    seed: int

    def __str__(self) -> str:
        sizes = [size for size, _ in samples_of(self)]
        return f"{self.num_messages} messages of {min(sizes):,} to {max(sizes):,} bytes, seed {self.seed}"

    @property
    def bandwidth(self) -> float:
        return self.half / self.latency


def samples_of(log: Log) -> list[tuple[int, float]]:
    """(bytes, seconds) of each message in the order in which they were sent; no two have the same size.

    A quarter of them met other work and took 2 to 20 times as long; all others took a little longer than the link
    needs. No message is faster than that.
    """
    draw, sizes = random.Random(log.seed), dict[int, None]()  # a dictionary keeps its order
    while len(sizes) < log.num_messages:
        sizes[round(log.half / 300 * 3000 ** draw.random())] = None
    samples = []
    for size in sizes:
        needed = log.latency + size / log.bandwidth
        slower = draw.uniform(2, 20) if draw.random() < 0.25 else 1 + draw.expovariate(10)
        samples.append((size, needed * slower))
    return samples


def example_of_a_log() -> list[tuple[int, float]]:
    """200 messages of a link whose latency and bandwidth nobody tells you."""
    return samples_of(Log(200, 52e-6, 70_000, 31))


def draw_logs(draw: random.Random) -> list[Log]:
    return [
        Log(
            draw.randint(180, 260),
            10e-6 * 20 ** draw.random(),
            round(20e3 * 20 ** draw.random()),
            draw.randrange(10**6),
        )
        for _ in range(8)
    ]


def attempt_log(answer: Callable, log: Log) -> list[float] | str:
    came = answer(samples_of(log))
    try:
        latency, bandwidth = came
        return [float(latency), float(bandwidth)]
    except (TypeError, ValueError):
        return "nothing" if came is None else f"a {type(came).__name__}, {str(came)[:100]}"


def is_near(expected: float, came: float, allowed: float = ALLOWED) -> bool:
    return abs(came - expected) <= allowed * abs(expected)


def judge_logs(logs: Sequence[Log], came: Sequence[Any]) -> str:
    off = []
    for log, value in zip(logs, came, strict=True):
        if isinstance(value, str):
            forgotten = " Is a `return` missing?" if value == "nothing" else ""
            raise Wrong(f"With {log}: expected (latency, bandwidth), came {value}.{forgotten}")
        expected = (log.latency, log.bandwidth)
        for name, right, number in zip(("latency", "bandwidth"), expected, value, strict=True):
            if not is_near(right, number):
                raise wrong_link(
                    logs, came, f"With {log}: {link_in_words(*value)}. {off_in_words(name, right, number)}"
                )
            off.append(abs(number / right - 1))
    return (
        f"{len(logs)} links, latencies from {min(log.latency for log in logs) * 1e6:.0f} to "
        f"{max(log.latency for log in logs) * 1e6:.0f} µs: latency and bandwidth are at most {max(off):.1%} off."
    )


def link_in_words(latency: float, bandwidth: float) -> str:
    return f"your latency is {latency:.4g} s, your bandwidth {bandwidth:.4g} bytes per second"


def off_in_words(name: str, right: float, number: float) -> str:
    if not (math.isfinite(number) and number > 0 and 0.1 < number / right < 10):
        return f"Expected a {name} of {right:.4g}."
    more = "large" if number > right else "small"
    return f"The {name} is {abs(number / right - 1):.0%} too {more}, {ALLOWED:.0%} are allowed: {right:.4g} is right."


def wrong_link(logs: Sequence[Log], came: Sequence[Any], shown: str) -> Wrong:
    """What is said of wrong links: with a name, if one mistake alone explains all of them."""
    found = [
        (name, says)
        for name, says, explains in OF_A_LINK
        if all(not isinstance(value, str) and explains(log, *value) for log, value in zip(logs, came, strict=True))
    ]
    return Named(found[0][0], f"{found[0][1]} {shown}") if len(found) == 1 else Wrong(shown)


def scaled(of_latency: float, of_bandwidth: float) -> Callable[[Log, float, float], bool]:
    """Whether a link is right but for such factors."""
    return lambda log, latency, bandwidth: (
        is_near(log.latency * of_latency, latency) and is_near(log.bandwidth * of_bandwidth, bandwidth)
    )


def is_fit_of_all(log: Log, latency: float, bandwidth: float) -> bool:
    """By least squares, of the relative errors or of the absolute ones."""
    samples = samples_of(log)
    sizes, times = (torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True))
    columns = torch.stack([torch.ones_like(sizes), sizes], dim=1)
    for weights in (1 / times, torch.ones_like(times)):
        found = torch.linalg.lstsq(columns * weights[:, None], (times * weights)[:, None]).solution[:, 0].tolist()
        if is_near(found[0], latency, 1e-5) and is_near(1 / found[1], bandwidth, 1e-5):
            return True
    return False


def is_bytes_over_time(log: Log, latency: float, bandwidth: float) -> bool:
    """Whether the bandwidth is just bytes / seconds of one of the messages, and is wrong."""
    return not is_near(log.bandwidth, bandwidth) and any(
        is_near(size / seconds, bandwidth, 1e-9) for size, seconds in samples_of(log)
    )


OF_A_LINK: tuple[tuple[str, str, Callable[[Log, float, float], bool]], ...] = (
    (
        "all messages in the fit",
        "That is the least-squares line through all messages: those that were held up pull it up.",
        is_fit_of_all,
    ),
    (
        "latency left in the bandwidth",
        "The bandwidth is the bytes of one message over its whole time, and a part of that time is latency.",
        is_bytes_over_time,
    ),
    ("bits for bytes", "The bandwidth is 8 times too large: bits per second.", scaled(1, 8)),
    ("an eighth", "The bandwidth is 8 times too small: the sizes are bytes already.", scaled(1, 1 / 8)),
    (
        "seconds per byte",
        "The second number is the seconds of a byte, not the bytes of a second.",
        lambda log, latency, bandwidth: is_near(log.latency, latency) and is_near(1 / log.bandwidth, bandwidth),
    ),
    ("microseconds", "The latency is in microseconds, and seconds were asked for.", scaled(1e6, 1)),
    ("milliseconds", "The latency is in milliseconds, and seconds were asked for.", scaled(1e3, 1)),
    (
        "the other order",
        "The two numbers are there, but the latency comes first.",
        lambda log, latency, bandwidth: is_near(log.bandwidth, latency) and is_near(log.latency, bandwidth),
    ),
)


def draw_messages(samples: Sequence[tuple[int, float]], link: Any) -> Figure:
    """Every message as a dot, and the line of a (latency, bandwidth)."""
    figure, axes = new_figure(3.6)
    sizes = sorted(size for size, _ in samples)
    micro = [(size, 1e6 * seconds) for size, seconds in samples]
    axes.plot(*zip(*micro, strict=True), ".", color="#606060", markersize=4, label="messages")
    latency, bandwidth = link
    axes.plot(sizes, [1e6 * (latency + size / bandwidth) for size in sizes], color="#d55e00", label="line")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes",
        ylabel="µs",
        title="Messages, and the line of a latency and a bandwidth",
    )
    axes.legend(loc="upper left")
    return figure


def show_line(samples: Sequence[tuple[int, float]], link: Any) -> None:
    """The picture of messages and of a (latency, bandwidth)."""
    show(draw_messages(samples, link), says=describe_messages(samples, link))


def describe_messages(samples: Sequence[tuple[int, float]], link: Any) -> str:
    """How many messages lie below the line, near it, and far above it."""
    latency, bandwidth = link
    ratios = [seconds / (latency + size / bandwidth) for size, seconds in samples]
    below, near = sum(ratio < 0.99 for ratio in ratios), sum(0.99 <= ratio <= 1.25 for ratio in ratios)
    return (
        f"The line: latency {in_figures(latency * 1e6)} µs, bandwidth {in_figures(bandwidth / 1e6)} MB/s. Of "
        f"{len(samples)} messages {below} lie more than 1 % below it, {near} up to 25 % above it, "
        f"{len(samples) - below - near} higher."
    )


TASKS = (
    Task(
        unit="03",
        name="exchange",
        kind="rebuild",
        minutes=10,
        points=2,
        difficulty=1,
        cases=draw_swaps,
        attempt=attempt_swap,
        judge=judge_swaps,
        look_at=(
            "what a rank waits for at the moment when the other one waits for it.",
            "what has been begun, and into which tensor, when the function returns.",
        ),
        hints=(
            "Write down what rank 0 and what rank 1 do, line by line, beside each other. At which line can one go on "
            "only if the other is already further down?",
            "A send is over only when the peer has begun to receive, so nobody may wait before both messages have "
            "begun: lesson 03, 'A mistake made on purpose' (../../notebooks/03_two_processes_that_talk.ipynb).",
            "Make an empty tensor like your own. Begin to send yours, begin to receive into the new one, and keep what "
            "both calls return. Then wait for the one and for the other. Return the new tensor.",
        ),
        instead=(links.exchange,),
    ),
    Task(
        unit="03",
        name="ring_gather",
        kind="transfer",
        minutes=25,
        points=4,
        difficulty=2,
        cases=draw_rings,
        attempt=attempt_ring,
        judge=judge_rings,
        look_at=(
            "which rank's tensor is on its way to you in each hop; write it down for K=3.",
            "which tensors are still being sent when you receive into one.",
        ),
        hints=(
            "Take K=3 and rank 0. Whose tensor comes first, whose comes second? Which of them does rank 0 have to hand "
            "on, and when?",
            "In every hop each rank sends what came to it in the hop before: the second half of a ring all-reduce "
            "(Patarasuk and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). In each hop nobody may wait "
            "before both of its messages have begun.",
            "Make a list with a place for every rank and put your own tensor into your place. As often as there are "
            "other ranks: make a new empty buffer, begin to send what you got last (at first your own) to the next "
            "rank, begin to receive from the rank before, wait for both. What came in hop h started h ranks before "
            "you, counted round the ring: put it there, and send it on in the next hop.",
        ),
        on_processes=ring_on_processes,
    ),
    Task(
        unit="03",
        name="recover_link",
        kind="transfer",
        minutes=25,
        points=4,
        difficulty=2,
        cases=draw_logs,
        attempt=attempt_log,
        judge=judge_logs,
        look_at=(
            "the picture: does your line lie where the lowest messages lie, for small sizes and for large ones?",
            "the units: seconds, and bytes per second.",
        ),
        hints=(
            "Look at the picture with two logarithmic axes. Nothing makes a message faster than the link allows. So "
            "where, among the dots, does the true line lie?",
            "The lowest messages tell the truth, but no size was measured twice, so there is no lowest one of each "
            "size. A line can tell which ones are low: fit one, look at what lies below it, and fit again. An estimate "
            "that leaves some samples out on purpose is a trimmed one: https://en.wikipedia.org/wiki/Trimmed_estimator.",
            "Fit a line to all messages, by relative errors as in the lesson. Keep those messages that lie on it or "
            "below. Fit again to these, and go on until only a handful is left. The last line is the answer.",
        ),
    ),
)
