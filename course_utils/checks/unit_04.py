"""Exercises of unit 04: a step of naive model parallelism from memory, and the fastest cut under a limit of memory."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare
from course_utils.stages import by_cost, by_count
from course_utils.threads import run_in_threads
from course_utils.transports import TransferError, Worker

# --- naive_step -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A step with K stages; rows[m] is the number of rows of micro-batch m. Weights and data come from the seed."""

    K: int
    rows: tuple[int, ...]
    seed: int

    def __str__(self) -> str:
        return f"K={self.K}, micro-batches of {', '.join(map(str, self.rows))} rows, seed {self.seed}"


def width(border: int) -> int:
    """Numbers per row at the entrance of stage `border`: another one at each border."""
    return border + 2


def draw_data(step: Step) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights by stage; inputs and targets by micro-batch. All of it from the seed, in float64."""
    generator = torch.Generator().manual_seed(step.seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [numbers(width(k), width(k + 1)) for k in range(step.K)]
    inputs = [numbers(rows, width(0)) for rows in step.rows]
    targets = [numbers(rows, width(step.K)) for rows in step.rows]
    return weights, inputs, targets


def compute(x: Tensor, weight: Tensor) -> Tensor:
    """What a stage computes."""
    return torch.tanh(x @ weight)


def loss_of_rows(y: Tensor, target: Tensor) -> Tensor:
    """The loss of each row."""
    return (y - target).pow(2).sum(dim=1)


class NoGradient(ValueError):
    """A gradient was to be sent for activations that never asked for one."""


class Rank:
    """One rank of a step, with one stage.

    index, num_stages: which stage, and of how many. num_micro_batches, num_rows: of the whole mini-batch.
    `log` notes what was done, and so does `order`, which all ranks of a run share; nobody who uses a Rank needs them.
    """

    def __init__(self, worker: Worker, step: Step, order: list[str] | None = None):
        self._worker, self._step = worker, step
        self.index, self.num_stages = worker.rank, step.K
        self.num_micro_batches, self.num_rows = len(step.rows), sum(step.rows)
        weights, self._inputs, self._targets = draw_data(step)
        self._weight = weights[self.index].requires_grad_()
        self.log: list[str] = []
        self._order = [] if order is None else order
        self._times: dict[str, int] = {}
        self._received: list[Tensor] = []

    def inputs(self, m: int) -> Tensor:
        """Micro-batch m as it enters the model. Raises a ValueError on all ranks but the first."""
        if self.index > 0:
            raise ValueError(f"rank {self.index} has no inputs of the model; it computes with what rank before it made")
        return self._inputs[m]

    def receive(self, peer: int) -> Tensor:
        """Wait for the next tensor from a neighbour: activations from the rank before, or a gradient from the next."""
        self._check_neighbour(peer)
        what = "activations" if peer < self.index else "gradient"
        m = self._count(f"receive {what}")
        border = max(self.index, peer)
        rows = self._step.rows[m] if m < len(self._step.rows) else 1
        buffer = torch.empty(rows, width(border), dtype=torch.float64)
        transport = self._worker.transport
        transport.wait(transport.irecv(buffer, peer, f"{what} {m}"))
        self._note(f"receive {what} {m}")
        if what == "activations":
            self._received.append(buffer)
        return buffer

    def send(self, tensor: Tensor, peer: int) -> None:
        """Send a tensor to a neighbour, and wait until it is there."""
        self._check_neighbour(peer)
        what = "activations" if peer > self.index else "gradient"
        if not isinstance(tensor, Tensor):
            if tensor is None and what == "gradient" and self._received and not self._received[-1].requires_grad:
                raise NoGradient(f"rank {self.index} was to send None as a gradient to rank {peer}")
            raise TypeError(f"rank {self.index} was to send {type(tensor).__name__} to rank {peer}; send a tensor")
        m = self._count(f"send {what}")
        self._note(f"send {what} {m}")
        transport = self._worker.transport
        transport.wait(transport.isend(tensor.detach().contiguous(), peer, f"{what} {m}"))

    def stage(self, x: Tensor) -> Tensor:
        """The forward of this rank's stage: activations from what it is given. Gradients add up in the weights."""
        m = self._count("F")
        self._note(f"F{m}")
        activations = compute(x, self._weight)
        activations.register_hook(lambda gradient: self._note(f"B{m}"))  # when the walk back comes by
        return activations

    def loss(self, activations: Tensor, m: int) -> Tensor:
        """The losses of all rows of micro-batch m, added up. Raises a ValueError on all ranks but the last."""
        if self.index < self.num_stages - 1:
            raise ValueError(f"rank {self.index} makes no loss; the last rank does")
        return loss_of_rows(activations, self._targets[m]).sum()

    def _check_neighbour(self, peer: int) -> None:
        if not (0 <= peer < self.num_stages) or abs(peer - self.index) != 1:
            raise ValueError(f"rank {self.index} of {self.num_stages} has no neighbour {peer}")

    def _count(self, what: str) -> int:
        self._times[what] = self._times.get(what, -1) + 1
        return self._times[what]

    def _note(self, what: str) -> None:
        self.log.append(what)
        self._order.append(f"{self.index} {what}")

    def _gradient(self) -> Tensor:
        return torch.zeros_like(self._weight) if self._weight.grad is None else self._weight.grad


def draw_steps(draw: random.Random) -> list[Step]:
    sizes = [(2, (2, 1, 3)), (1, (2, 3)), (3, (1,)), (4, tuple(draw.randint(1, 4) for _ in range(3)))]
    sizes.append((3, (2, draw.choice((1, 3)), 4, 2)))
    return [Step(K, rows, draw.randrange(10_000)) for K, rows in sizes]


def attempt_step(answer: Callable, step: Step) -> dict[str, Any]:
    order: list[str] = []
    ranks: dict[int, Rank] = {}
    came: dict[int, Any] = {}

    def one_rank(worker: Worker) -> None:
        ranks[worker.rank] = Rank(worker, step, order)
        came[worker.rank] = answer(ranks[worker.rank])

    stuck = ""
    try:
        run_in_threads(one_rank, step.K, limit=5)
    except TransferError as error:  # also a Deadlock
        stuck = str(error)
    loss = came.get(step.K - 1)
    return {
        "loss": loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss,
        "gradients": [ranks[k]._gradient() for k in range(step.K)],
        "logs": [ranks[k].log for k in range(step.K)],
        "order": order,
        "stuck": stuck,
    }


def one_device(step: Step) -> dict[str, Any]:
    """The whole mini-batch at once, all stages on one device."""
    return step_with(step, lambda losses: torch.cat(losses).mean())


def step_with(step: Step, total: Callable[[list[Tensor]], Tensor]) -> dict[str, Any]:
    """One device's loss and gradients. total: from the losses of all rows, micro-batch by micro-batch, to the loss."""
    weights, inputs, targets = draw_data(step)
    losses = []
    for weight in weights:
        weight.requires_grad_()
    for x, target in zip(inputs, targets, strict=True):
        for weight in weights:
            x = compute(x, weight)
        losses.append(loss_of_rows(x, target))
    loss = total(losses)
    return {"loss": loss.item(), "gradients": list(torch.autograd.grad(loss, weights))}


def divided_on_each_stage(step: Step) -> dict[str, Any]:
    right = one_device(step)
    powers = range(step.K - 1, -1, -1)
    gradients = [g / sum(step.rows) ** n for g, n in zip(right["gradients"], powers, strict=True)]
    return {"loss": right["loss"], "gradients": gradients}


def of_ones(step: Step) -> dict[str, Any]:
    """Every stage but the last walks back from the sum of its own activations."""
    right, (weights, inputs, _) = one_device(step), draw_data(step)
    x = torch.cat(inputs)
    gradients: list[Tensor] = []
    for weight in weights[:-1]:
        y = compute(x, weight.requires_grad_())
        gradients += torch.autograd.grad(y.sum(), [weight])
        x = y.detach()
    return {"loss": right["loss"], "gradients": [*gradients, right["gradients"][-1]]}


def loss_of_last(step: Step) -> dict[str, Any]:
    share = step_with(step, lambda losses: losses[-1].sum() / sum(step.rows))
    return {**one_device(step), "loss": share["loss"]}


STEP_MISTAKES = (
    Mistake(
        "mean of means",
        "Each micro-batch was divided by its own rows. They have different numbers of rows, so each row no longer "
        "counts alike.",
        lambda step: step_with(step, lambda losses: torch.stack([part.mean() for part in losses]).sum()),
    ),
    Mistake(
        "mean of means",
        "The means of the micro-batches were averaged. They have different numbers of rows, so each row no longer "
        "counts alike.",
        lambda step: step_with(step, lambda losses: torch.stack([part.mean() for part in losses]).mean()),
    ),
    Mistake(
        "not divided",
        "The losses were added up and never divided: everything is as many times too large as there are rows.",
        lambda step: step_with(step, lambda losses: torch.cat(losses).sum()),
    ),
    Mistake(
        "divided by M",
        "The losses were divided by the number of micro-batches; the loss is a mean over rows.",
        lambda step: step_with(step, lambda losses: torch.cat(losses).sum() / len(losses)),
    ),
    Mistake(
        "divided on each stage",
        "Every stage divided by the number of rows. The gradient that arrives is that of the loss, which has been "
        "divided already.",
        divided_on_each_stage,
    ),
    Mistake(
        "not the gradient that arrived",
        "A stage walked back from its own activations, as if they were the loss, and the gradient that had arrived was "
        "not used.",
        of_ones,
    ),
    Mistake(
        "loss of the last micro-batch",
        "The gradients are right. The loss that came is the share of the last micro-batch alone.",
        loss_of_last,
    ),
)


def judge_steps(steps: Sequence[Step], came: Sequence[Any]) -> str:
    for step, value in zip(steps, came, strict=True):
        for rank, log in enumerate(value["logs"]):
            judge_log(step, rank, log, value["stuck"])
        if value["stuck"]:
            raise Wrong(f"With {step}: a message went wrong. {value['stuck']}.")
    kept = [{name: value[name] for name in ("loss", "gradients")} for value in came]
    compare(steps, kept, one_device, STEP_MISTAKES, tolerance=1e-9)
    return (
        f"{len(steps)} steps with 1 to {max(step.K for step in steps)} stages: loss and gradients are those of one "
        "device to 1e-9, and no rank had more than one graph at a time"
    ) + "."


def judge_log(step: Step, rank: int, log: list[str], stuck: str) -> None:
    """What the order alone proves. In a run that got stuck, only what a rank left out before it went on."""
    at = f"With {step}, rank {rank}"
    for what, after, peer in (("activations", "F", rank + 1), ("gradient", "B", rank - 1)):
        if not 0 <= peer < step.K:
            continue
        done = [line[1:] for line in log if line.startswith(after)]
        sent = [line.split()[-1] for line in log if line.startswith(f"send {what}")]
        if done and not sent and (stuck or len(done) == len(step.rows)):
            raise Named(
                f"no {what} sent",
                f"{at} never sent the {what} of micro-batch {done[0]} to rank {peer}. Every message has its answer: "
                "activations go on, a gradient comes back.",
            )
    forwards, backwards = ([line for line in log if line[0] == kind] for kind in "FB")
    if len(set(backwards)) < len(backwards):
        twice = next(line for line in backwards if backwards.count(line) > 1)
        raise Named(
            "backward twice",
            f"{at} walked back through micro-batch {twice[1:]} {backwards.count(twice)} times, and each time its "
            "gradients were added. One backward per micro-batch; no graph has to be retained for that.",
        )
    open_now = list(accumulate({"F": 1, "B": -1}.get(line[0], 0) for line in log))
    if max(open_now, default=0) > 1:
        kinds = "".join(line[0] for line in log if line[0] in "FB")
        says = f"{at} had {max(open_now)} graphs at a time, 1 is allowed: "
        if len(step.rows) > 1 and kinds == "F" * len(step.rows) + "B" * len(step.rows):
            raise Named(
                "all forwards first", says + "it computed all forwards before the first backward, which is GPipe."
            )
        if not stuck and len(backwards) == len(forwards):
            raise Wrong(says + "a micro-batch ends with its backward, and only then does the next one begin.")
    if stuck:
        return
    if len(forwards) < len(step.rows):
        raise Wrong(f"{at} computed {len(forwards)} forwards; there are {len(step.rows)} micro-batches.")
    if missing := sorted({line[1:] for line in forwards} - {line[1:] for line in backwards}):
        raise Named(
            "no backward",
            f"{at} never walked back through micro-batch {missing[0]}, so its weights miss that gradient.",
        )


def of_error(kind: str, message: str) -> Named | None:
    if kind == NoGradient.__name__:
        return Named(
            "activations without requires_grad",
            f"{message.capitalize()}: there is none, because the activations that it had received never "
            "asked for one. They come out of a buffer, which no graph leads to.",
        )
    if kind == "ValueError" and "has no neighbour" in message:
        return Named(
            "a neighbour that is not there",
            f"{message.capitalize()}. The first rank has nobody before it, the last nobody behind it.",
        )
    return None


def order_of_a_step(answer: Callable) -> None:
    """Print in which order three stages compute two micro-batches: one line per rank, one column per action."""
    came = attempt_step(answer, Step(3, (2, 1), 0))
    actions = [(int(line[0]), line[2:]) for line in came["order"] if line[2] in "FB"]
    for rank in range(3):
        print(f"rank {rank}  {' '.join(what if k == rank else '. ' for k, what in actions)}".rstrip())
    if came["stuck"]:
        print(came["stuck"])


def step_on_processes(answer: Callable) -> str:
    """The same on three processes."""
    from course_utils.processes import launch

    step = Step(3, (2, 1, 3), 1)
    gradients = launch(one_process, step.K, answer, step)
    away = max((a - b).norm().item() for a, b in zip(gradients, one_device(step)["gradients"], strict=True))
    return f"On three real processes the gradients are {'those' if away < 1e-9 else 'NOT those'} of one device."


def one_process(worker: Worker, answer: Callable, step: Step) -> Tensor:
    rank = Rank(worker, step)
    answer(rank)
    return rank._gradient()


# --- balance ----------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks in order, to be cut into K stages; no stage may need more memory than `limit`. best: 0 if unknown."""

    times: tuple[int, ...]
    memory: tuple[int, ...]
    K: int
    limit: int
    best: int = 0

    def __str__(self) -> str:
        if len(self.times) > 12:
            return f"{len(self.times)} blocks, K={self.K}, limit={self.limit}"
        return f"times={list(self.times)}, memory={list(self.memory)}, K={self.K}, limit={self.limit}"


def slowest(blocks: Blocks) -> int | None:
    """The time of the slowest stage of the best cut, or None if no cut fits.

    All cuts are tried. Where they are too many, the blocks have been drawn so that the best is known.
    """
    if blocks.best:
        return blocks.best
    fitting = [
        max(sums(blocks.times, cut)) for cut in all_cuts(blocks) if max(sums(blocks.memory, cut)) <= blocks.limit
    ]
    return min(fitting, default=None)


def all_cuts(blocks: Blocks) -> Iterator[tuple[int, ...]]:
    """Each as the places where stages begin and end, from 0 to the number of blocks."""
    n = len(blocks.times)
    return ((0, *inner, n) for inner in combinations(range(1, n), blocks.K - 1))


def sums(numbers: Sequence[int], cut: Sequence[int]) -> list[int]:
    return [sum(numbers[begin:end]) for begin, end in pairwise(cut)]


def draw_blocks(draw: random.Random) -> list[Blocks]:
    cases = [
        Blocks((4, 1, 1, 1, 1, 4), (1, 2, 2, 2, 2, 1), 3, 6),
        Blocks((1, 1, 1, 1, 6, 6), (6, 5, 4, 1, 1, 1), 3, 11),
        Blocks((2, 3, 4), (1, 1, 1), 1, 3),
        Blocks((2, 3, 4), (1, 1, 1), 1, 2),
        Blocks((5, 1, 1), (3, 4, 5), 3, 5),
        Blocks((1, 1, 9, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1), 3, 7),
        Blocks((3, 3), (1, 1), 3, 9),
        Blocks((9, 7, 4, 3, 9, 8), (2, 3, 1, 1, 3, 1), 3, 7),
        Blocks((1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1), 3, 13),
    ]
    while len(cases) < 19:
        n, K = draw.randint(4, 10), draw.randint(2, 4)
        times, memory = (tuple(draw.randint(1, 12) for _ in range(n)) for _ in range(2))
        some = Blocks(times, memory, K, 0)
        needs = sorted({max(sums(memory, cut)) for cut in all_cuts(some)})
        fewest = needs[0]  # with less than that no cut fits
        limit = fewest - 1 if len(cases) % 5 == 0 else draw.choice(needs[: max(1, len(needs) // 2)])
        cases.append(Blocks(times, memory, K, limit))
    return [*cases, draw_many(draw)]


def draw_many(draw: random.Random) -> Blocks:
    """60 blocks that can be cut into 8 stages of the same time: no cut can be better than that."""
    times: list[int] = []
    memory: list[int] = []
    sizes = [7, 8, 7, 8, 7, 8, 7, 8]
    draw.shuffle(sizes)
    for size in sizes:
        ends = sorted(draw.sample(range(1, 100), size - 1))
        times += [end - begin for begin, end in pairwise([0, *ends, 100])]
        ends = sorted(draw.sample(range(1, 90), size - 1))
        memory += [end - begin for begin, end in pairwise([0, *ends, 90])]
    return Blocks(tuple(times), tuple(memory), len(sizes), 90, best=100)


def attempt_blocks(answer: Callable, blocks: Blocks) -> dict[str, Any]:
    try:
        came = answer(list(blocks.times), list(blocks.memory), blocks.K, blocks.limit)
    except ValueError as error:
        return {"error": str(error)}
    try:
        return {"cut": [[int(index) for index in stage] for stage in came]}
    except (TypeError, ValueError):
        return {"came": repr(came)[:200]}


def judge_blocks(cases: Sequence[Blocks], came: Sequence[Any]) -> str:
    best = [slowest(blocks) for blocks in cases]
    cuts = [value.get("cut") for value in came]
    wrong = [why for why in map(what_is_wrong, cases, came, best) if why is not None]
    if not wrong:
        return (
            f"{len(cases)} lists of blocks, one of them with {len(cases[-1].times)} blocks: no stage needed more than "
            f"the limit, no slowest stage can be faster, and {best.count(None)} times you said that nothing fits."
        )
    for name, says, gives in (
        ("by count", "That is the cut by the number of blocks, whatever they cost.", count_cut),
        (
            "filled up to the average",
            "Each stage was filled until it had the average time; others can do more.",
            filled,
        ),
        ("leftovers on the last stage", "Every stage has as many blocks, and the last one all the rest.", rest_last),
    ):
        cut_up = [(blocks, cut) for blocks, cut in zip(cases, cuts, strict=True) if cut is not None and blocks.K > 1]
        if len(cut_up) >= 3 and all(not_empty(cut) == not_empty(gives(blocks)) for blocks, cut in cut_up):
            raise Named(name, f"{says} {wrong[0]}")
    for name, says, changed in (
        (
            "memory ignored",
            "Every cut is the fastest that there is without a limit: the limit does not count.",
            lambda blocks: blocks._replace(limit=sum(blocks.memory)),
        ),
        (
            "less than the limit",
            "A stage may need as much as the limit; here each one needs less.",
            lambda blocks: blocks._replace(limit=blocks.limit - 1),
        ),
        (
            "balances memory",
            "The cuts make the largest memory as small as possible; what has to be small is the largest time.",
            lambda blocks: blocks._replace(times=blocks.memory),
        ),
    ):
        if all(is_best_of(changed(blocks), value) for blocks, value in zip(cases, came, strict=True)):
            raise Named(name, f"{says} {wrong[0]}")
    first = {why.mistake: why for why in reversed(wrong) if isinstance(why, Named)}
    raise first.get("lost blocks") or first.get("an empty stage") or wrong[0]


def is_best_of(blocks: Blocks, value: dict[str, Any]) -> bool:
    """Whether that is a fastest cut of these blocks, or an error where none fits. True if nobody can know."""
    if blocks.best:
        return True
    fastest = slowest(blocks)
    if fastest is None:
        return "error" in value
    cut = value.get("cut", [])
    in_order = [index for stage in cut for index in stage] == list(range(len(blocks.times)))
    return (
        in_order
        and len(cut) == blocks.K
        and all(cut)
        and max(sum(blocks.times[i] for i in stage) for stage in cut) == fastest
        and max(sum(blocks.memory[i] for i in stage) for stage in cut) <= blocks.limit
    )


def what_is_wrong(blocks: Blocks, value: dict[str, Any], best: int | None) -> Wrong | None:
    at = f"With {blocks}"
    if "error" in value:
        if best is not None:
            return Named("an error though a cut fits", f"{at}: came a ValueError, {value['error']!r}, but a cut fits.")
        if str(blocks.limit) not in value["error"]:
            return Wrong(f"{at}: no cut fits. The ValueError must name the limit; came {value['error']!r}.")
        return None
    if "came" in value:
        forgotten = " Is a `return` missing?" if value["came"] == "None" else ""
        return Wrong(f"{at}: expected a list of {blocks.K} lists of block numbers, came {value['came']}.{forgotten}")
    cut, n = value["cut"], len(blocks.times)
    if best is None and all(cut):
        return Named("no error", f"{at}: no cut fits, and a ValueError has to say so; came {cut}.")
    if len(cut) != blocks.K:
        return Wrong(f"{at}: expected {blocks.K} stages, came {len(cut)}: {cut}.")
    if lost := sorted(set(range(n)) - {index for stage in cut for index in stage}):
        return Named("lost blocks", f"{at}: in no stage is block {lost[0]} of 0 to {n - 1}. Came {cut}.")
    if not all(cut):
        return Named("an empty stage", f"{at}: stage {cut.index([])} has no block. Came {cut}.")
    if [index for stage in cut for index in stage] != list(range(n)):
        return Wrong(f"{at}: the stages, one after another, must be the blocks 0 to {n - 1} in order. Came {cut}.")
    times, needs = ([sum(numbers[i] for i in stage) for stage in cut] for numbers in (blocks.times, blocks.memory))
    if max(needs) > blocks.limit:
        k = next(k for k, need in enumerate(needs) if need > blocks.limit)
        return Wrong(f"{at}: stage {k}, blocks {cut[k]}, needs {needs[k]}; {blocks.limit} is the limit.")
    if best is not None and max(times) > best:
        k = times.index(max(times))
        return Wrong(f"{at}: the slowest stage, {k} with blocks {cut[k]}, takes {times[k]}; {best} is possible.")
    return None


def not_empty(cut: Sequence[list[int]] | None) -> list[list[int]]:
    return [stage for stage in cut or () if stage]


def count_cut(blocks: Blocks) -> list[list[int]] | None:
    return [list(stage) for stage in by_count(len(blocks.times), blocks.K)] if len(blocks.times) >= blocks.K else None


def rest_last(blocks: Blocks) -> list[list[int]] | None:
    n, size = len(blocks.times), len(blocks.times) // blocks.K
    ends = [k * size for k in range(blocks.K)]
    return [list(range(begin, end)) for begin, end in pairwise([*ends, n])]


def filled(blocks: Blocks) -> list[list[int]]:
    """A stage ends as soon as it has reached the average time."""
    stages: list[list[int]] = [[]]
    for index in range(len(blocks.times)):
        stages[-1].append(index)
        full = sum(blocks.times[i] for i in stages[-1]) * blocks.K >= sum(blocks.times)
        if full and len(stages) < blocks.K:
            stages.append([])
    return stages + [[]] * (blocks.K - len(stages))


def stage_sums(numbers: Sequence[int], cut: Sequence[Sequence[int]]) -> dict[str, float]:
    """{"stage 0": the sum of its blocks' numbers, ...}, for a chart."""
    return {f"stage {k}": float(sum(numbers[i] for i in stage)) for k, stage in enumerate(cut)}


TASKS = (
    Task(
        unit="04",
        name="naive_step",
        kind="rebuild",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_steps,
        attempt=attempt_step,
        judge=judge_steps,
        look_at=(
            "which rows the loss is a mean over, and who divides by their number.",
            "what a stage walks back from, and which tensor's gradient the stage before is waiting for.",
        ),
        hints=(
            "Take three stages and one micro-batch, and follow it by hand as rank 1: which two things does it receive, "
            "which two does it send, and in which order?",
            "A tensor that comes out of a buffer is the start of a new graph, so it must ask for its gradient. Lesson "
            "04 has the step under 'The step, with a stopwatch' (../../notebooks/04_naive_model_parallelism.ipynb).",
            "For each micro-batch: take the inputs, or receive activations and let them ask for a gradient. Compute "
            "the stage. On the last rank make the loss, divide it by the rows of the whole mini-batch, walk back from "
            "it and add its number up. On any other rank send the activations, receive their gradient and walk back "
            "from the activations with it. Whoever has a rank before it sends the gradient of what it received.",
        ),
        on_error=of_error,
        on_processes=step_on_processes,
    ),
    Task(
        unit="04",
        name="balance",
        kind="transfer",
        minutes=40,
        points=5,
        difficulty=3,
        cases=draw_blocks,
        attempt=attempt_blocks,
        judge=judge_blocks,
        look_at=(
            "what decides how good a cut is: the slowest of its stages, among the cuts whose every stage fits.",
            "what must hold of every cut: each block once, in order, and no stage without a block.",
        ),
        hints=(
            "Take times 1, 1, 4 and K of 2, without a limit. Write down both cuts with their slowest stage. Then cut "
            "memory 3, 1, 1 at the same places: which limit changes the choice?",
            "The best cut of a list is its first stage and the best cut of the rest into one stage less. The same "
            "rests come up again and again: https://en.wikipedia.org/wiki/Dynamic_programming.",
            "Write a helper that answers, for the blocks from a given one to the end and a number of stages, how fast "
            "the slowest stage can be and where the first stage ends. One stage: all of it, if it fits. Otherwise try "
            "each end of the first stage that fits and leaves a block for each other stage; the slower of first stage "
            "and rest counts. Remember what was found (functools.cache). If nothing fits, say so with the limit.",
        ),
        instead=(slowest, by_cost),
    ),
)
