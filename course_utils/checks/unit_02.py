"""Exercises of unit 02: a step over borders from memory, and tensors that several later stages use."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_utils.checks.lesson_02 import reaches
from course_utils.checks.report import Wrong
from course_utils.checks.tasks import Mistake, Named, Task, compare, same
from course_utils.pipeline import Pipeline
from course_utils.stages import one_thread

ROWS = 3
Carry = tuple[Tensor | None, Tensor | None]


# --- What both tasks share: stages that note what is done with them ---------------------------------------------------


class NotedStage(nn.Module):
    """A stage that notes each call, and how often a walk back has come to its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[list[Tensor]] = []

    def note(self, tensors: Sequence[Tensor | None]) -> None:
        self.received.append([tensor for tensor in tensors if tensor is not None])


def random_weights(generator: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) * shape[0] ** -0.5)


def tried(answer: Callable, stages: Sequence[NotedStage], *arguments: Any) -> dict[str, Any]:
    """What an answer did with stages, as plain values."""
    walks = [0] * len(stages)
    for k, stage in enumerate(stages):
        count_walks(stage, k, walks)
    stuck, loss = "", None
    try:
        with one_thread():
            loss = answer(list(stages), *arguments)
    except RuntimeError as error:
        stuck = str(error)
        leaves_nothing = any(not t.requires_grad for stage in stages[1:] for call in stage.received for t in call)
        if "second time" not in stuck and not ("grad" in stuck and leaves_nothing):
            raise
    parameters = {k: list(stage.parameters()) for k, stage in enumerate(stages)}
    return {
        "loss": loss.detach() if isinstance(loss, Tensor) else loss,
        "keeps its graph": isinstance(loss, Tensor) and loss.grad_fn is not None,
        "calls": [len(stage.received) for stage in stages],
        "history": [
            any(reaches(t, (p for j in range(k) for p in parameters[j])) for call in stage.received for t in call)
            for k, stage in enumerate(stages)
        ],
        "collects": [[t.requires_grad for call in stage.received for t in call] for stage in stages],
        "shared": shared_leaf(stages),
        "walks": walks,
        "gradients": gradients_of(stages),
        "stuck": stuck,
    }


def shared_leaf(stages: Sequence[NotedStage]) -> list[int]:
    """[stage, stage] that were given one and the same leaf; empty if there are none."""
    owner: dict[int, int] = {}
    for k, stage in enumerate(stages):
        for tensor in (t for call in stage.received for t in call if t.requires_grad):
            if owner.setdefault(id(tensor), k) != k:
                return [owner[id(tensor)], k]
    return []


def count_walks(stage: NotedStage, k: int, walks: list[int]) -> None:
    """Keep in `walks[k]` the greatest number of walks that have come to one parameter of a stage."""
    for parameter in stage.parameters():
        own = [0]

        def count(gradient: Tensor, own: list[int] = own) -> None:
            own[0] += 1
            walks[k] = max(walks[k], own[0])

        parameter.register_hook(count)


def gradients_of(stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    """By stage and name. None counts as zeros: the gradient of what nobody uses."""
    return {
        f"stage {k}, {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for k, stage in enumerate(stages)
        for name, p in stage.named_parameters()
    }


def judge_borders(case: Any, came: Mapping[str, Any], needs_gradient: Sequence[Sequence[bool]]) -> None:
    """Raises for what can be seen before any value is compared.

    Args:
        needs_gradient: per stage, for each tensor that it receives, whether a gradient has to come back for it.
    """
    at = f"With {case}"
    for k, calls in enumerate(came["calls"]):
        if calls > 1:
            raise Named("a stage called again", f"{at}: stage {k} was called {calls} times; one step calls it once.")
    for k, history in enumerate(came["history"]):
        if history:
            raise Named(
                "detach forgotten",
                f"{at}: what stage {k} received still knows how an earlier stage made it, so the backward of stage {k} "
                "runs on over the border. To another process only numbers can be sent.",
            )
    for k, (collects, needs) in enumerate(zip(came["collects"], needs_gradient, strict=True)):
        if collects and any(need and not does for need, does in zip(needs, collects, strict=True)):
            raise Named(
                "requires_grad forgotten",
                f"{at}: what stage {k} received collects no gradient, so there is nothing to hand back.",
            )
    if came["shared"]:
        one, other = came["shared"]
        raise Named(
            "one leaf for several stages",
            f"{at}: stages {one} and {other} were given the same leaf, so that its gradients add up by themselves. "
            "Stages in processes of their own have no tensor in common.",
        )
    if "second time" in came["stuck"] or max(came["walks"]) > 1:
        k = came["walks"].index(max(came["walks"]))
        raise Named(
            "two walks through a stage",
            f"{at}: more than one walk back went through a stage (most through stage {k}). A second one finds the "
            "graph freed; with retain_graph it does the work again, and its gradients are added in the parameters "
            "and not where they meet on one device.",
        )
    if came["stuck"]:
        raise Wrong(f"{at}: a backward raised: {came['stuck']}.")
    for k, calls in enumerate(came["calls"]):
        if calls == 0:
            raise Wrong(f"{at}: stage {k} was never called.")


def judge_values(
    cases: Sequence[Any], came: Sequence[Any], one_device: Callable[[Any], Any], mistakes: Sequence[Mistake]
) -> None:
    """Raises unless all losses and gradients have the bits of one device, and nothing is kept."""
    for case, one in zip(cases, came, strict=True):
        if isinstance(one["loss"], Tensor) and one["loss"].dim():
            raise Wrong(f"With {case}: the loss must be a single number, came a tensor {tuple(one['loss'].shape)}.")
    if all(max(one["walks"]) == 0 for one in came):
        raise Named("no backward", f"With {cases[0]}: no parameter of any stage has a gradient.")
    stopped = [one["walks"][-1] == 1 and max(one["walks"][:-1], default=0) == 0 for one in came]
    if all(stopped):
        case = next(case for case, one in zip(cases, came, strict=True) if len(one["walks"]) > 1)
        raise Named(
            "stops at the border", f"With {case}: the last stage has its gradients, no stage before it has any."
        )
    values = [{"gradients": one["gradients"], "loss": as_tensor(one["loss"])} for one in came]
    with one_thread():
        right = [one_device(case) for case in cases]
    if not all(map(same, right, values)) and all(same(a, b, 1e-5) for a, b in zip(right, values, strict=True)):
        case, a, b = next((c, a, b) for c, a, b in zip(cases, right, values, strict=True) if not same(a, b))
        name = next((n for n, g in a["gradients"].items() if not torch.equal(g, b["gradients"][n])), "the loss")
        raise Named(
            "other bits",
            f"With {case}: {name} is right but for its last bits. Sums of floating-point numbers depend on their "
            "order; one device adds in the order in which its walk back comes to the uses.",
        )
    with one_thread():
        compare(cases, values, one_device, mistakes)
    for case, one in zip(cases, came, strict=True):
        if one["keeps its graph"]:
            raise Named(
                "the loss keeps its graph",
                f"With {case}: the loss that was returned still has its history, so the last stage's graph stays in "
                "memory as long as somebody keeps the loss.",
            )


def as_tensor(loss: Any) -> Any:
    return torch.tensor(loss) if isinstance(loss, float) else loss


# --- step_in_stages ---------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A model of blocks in a list, and how many of them each stage has."""

    sizes: tuple[int, ...]
    encoders: int
    decoders: int
    width: int
    seed: int

    @property
    def kinds(self) -> list[str]:
        return ["encode"] * self.encoders + ["turn", "begin"] + ["decode"] * (self.decoders - 1) + ["last", "loss"]

    def __str__(self) -> str:
        return (
            f"{self.encoders} encoder and {self.decoders} decoder blocks, stages of {list(self.sizes)} blocks, "
            f"width {self.width}, seed {self.seed}"
        )


class Part(nn.Module):
    """One block: carry -> carry, as in the lessons, but small. The block "loss" gives (loss, None)."""

    def __init__(self, kind: str, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kind = kind
        self.weight, self.bias = random_weights(generator, width, width), random_weights(generator, width)
        if kind in ("decode", "last"):
            self.of_memory = random_weights(generator, width, width)
            self.of_squares = random_weights(generator, width, width)
        if kind == "begin":
            self.words = random_weights(generator, ROWS, width)

    def forward(self, carry: Carry) -> Carry:
        hidden, memory = carry
        if self.kind == "begin":
            return self.words @ self.weight + self.bias, memory
        if hidden is None:
            raise ValueError(f"the block {self.kind!r} needs hidden, and it is None in the carry")
        result = hidden @ self.weight + self.bias
        if self.kind == "encode":
            return hidden + result.tanh(), None
        if self.kind == "turn":
            return None, result
        if self.kind == "loss":
            return result.square().mean(), None
        if memory is None:
            raise ValueError(f"the block {self.kind!r} needs the memory, and it is None in the carry")
        result = hidden + (result + memory @ self.of_memory + memory.square() @ self.of_squares).tanh()
        return result, memory if self.kind == "decode" else None


class BlockStage(NotedStage):
    """Consecutive blocks: stage(carry) -> carry."""

    def __init__(self, blocks: Sequence[Part]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, carry: Carry) -> Carry:
        self.note(carry)
        for block in self.blocks:
            carry = block(carry)
        return carry


def build(case: Cut) -> tuple[list[BlockStage], Tensor]:
    """(stages, x) of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    blocks = [Part(kind, case.width, generator) for kind in case.kinds]
    assert sum(case.sizes) == len(blocks)
    ends = [sum(case.sizes[:k]) for k in range(len(case.sizes) + 1)]
    x = torch.randn(ROWS, case.width, generator=generator)
    return [BlockStage(blocks[a:b]) for a, b in zip(ends, ends[1:], strict=False)], x


def draw_cuts(draw: random.Random) -> list[Cut]:
    cuts = [Cut((1, 6), 2, 2, 4, 1), Cut((3, 4), 2, 2, 5, 2), Cut((5, 2), 2, 2, 4, 3), Cut((7,), 2, 2, 3, 4)]
    cuts.append(Cut((2, 1, 1, 1, 3), 2, 3, 4, 5))
    for _ in range(5):
        encoders, decoders, num_stages = draw.randint(1, 3), draw.randint(2, 4), draw.randint(2, 5)
        borders = sorted(draw.sample(range(1, encoders + decoders + 3), num_stages - 1))
        ends = [0, *borders, encoders + decoders + 3]
        sizes = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
        cuts.append(Cut(sizes, encoders, decoders, draw.randint(3, 6), draw.randrange(1000)))
    return cuts


def attempt_cut(answer: Callable, case: Cut) -> dict[str, Any]:
    stages, x = build(case)
    return tried(answer, stages, x)


def one_device(
    case: Cut, at_border: Callable[[Carry], Carry] = lambda carry: carry, factor: float = 1.0
) -> dict[str, Any]:
    """Loss and gradients by one single backward through all stages; `at_border` may lose a part of what crosses."""
    stages, x = build(case)
    carry: Carry = (x, None)
    for k, stage in enumerate(stages):
        carry = stage(at_border(carry) if k else carry)
    loss = carry[0]
    assert loss is not None
    (loss * factor).backward()
    return {"gradients": gradients_of(stages), "loss": loss.detach()}


def lose(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


CUT_MISTAKES = (
    Mistake(
        "gradient of memory dropped",
        "Where hidden and memory cross, only the gradient of hidden came back.",
        lambda case: one_device(case, lambda carry: (carry[0], lose(carry[1]) if carry[0] is not None else carry[1])),
    ),
    Mistake(
        "gradient of memory dropped",
        "The gradient of the memory never came back over a border.",
        lambda case: one_device(case, lambda carry: (carry[0], lose(carry[1]))),
    ),
    Mistake(
        "gradient of hidden dropped",
        "Where hidden and memory cross, only the gradient of the memory came back.",
        lambda case: one_device(case, lambda carry: (lose(carry[0]) if carry[1] is not None else carry[0], carry[1])),
    ),
    Mistake(
        "divided by the number of stages",
        "All gradients are divided by the number of stages; the stages do not share the loss.",
        lambda case: one_device(case, factor=1 / len(case.sizes)),
    ),
)


def judge_cuts(cases: Sequence[Cut], came: Sequence[Any]) -> str:
    for case, one in zip(cases, came, strict=True):
        received = [k > 0 for k in range(len(case.sizes))]
        needs = [[k] * len(collects) for k, collects in zip(received, one["collects"], strict=True)]
        judge_borders(case, one, needs)
    judge_values(cases, came, one_device, CUT_MISTAKES)
    return (
        f"{len(cases)} cuts into 1 to {max(len(case.sizes) for case in cases)} stages: one call and one walk back per "
        "stage, and every bit of the loss and of all gradients is that of one device."
    )


# --- step_with_skips --------------------------------------------------------------------------------------------------


class Skips(NamedTuple):
    """Per stage the names of what it takes and of what it gives, each a letter; x is given, the last gives the loss."""

    plan: tuple[tuple[str, str], ...]
    width: int
    seed: int

    def __str__(self) -> str:
        stages = [f"{' '.join(takes)} -> {' '.join(gives) or 'loss'}" for takes, gives in self.plan]
        return f"the stages {' | '.join(stages)}, width {self.width}, seed {self.seed}"


class SkipStage(NotedStage):
    """A stage that takes tensors by name: stage(taken) -> given, two dictionaries from name to tensor.

    Attributes:
        takes: the names that must be in `taken`.
        gives: the names that are in what it returns; those of the last stage are ("loss",).
    """

    def __init__(self, takes: Sequence[str], gives: Sequence[str], width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.takes, self.gives = tuple(takes), tuple(gives)
        self.weights = nn.ParameterDict({name: random_weights(generator, width, width) for name in takes})
        self.biases = nn.ParameterDict({name: random_weights(generator, width) for name in gives})

    def forward(self, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.note([taken[name] for name in self.takes])
        # Each tensor is used once, so a stage has one gradient for it, and one device adds up one term per stage.
        mixed = torch.stack([taken[name] @ self.weights[name] for name in self.takes]).sum(0)
        given = {name: (mixed + bias).tanh() for name, bias in self.biases.items()}
        return {"loss": given["loss"].square().mean()} if "loss" in given else given


def build_skips(case: Skips) -> tuple[list[SkipStage], Tensor]:
    """(stages, x) of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    stages = [SkipStage(takes, gives or ("loss",), case.width, generator) for takes, gives in case.plan]
    return stages, torch.randn(ROWS, case.width, generator=generator)


def draw_skips(draw: random.Random) -> list[Skips]:
    plans = [
        (("x", "a"), ("a", "")),
        (("x", ""),),
        (("x", "m"), ("xm", "h"), ("hm", "i"), ("im", "j"), ("mj", "")),
        (("x", "ab"), ("a", "c"), ("bc", "de"), ("d", "")),
        (("x", "ab"), ("ba", "c"), ("cba", "d"), ("ad", "")),
    ]
    drawn = [draw_plan(draw, num_stages) for num_stages in (4, 5, 6)]
    return [Skips(plan, draw.randint(3, 6), draw.randrange(1000)) for plan in (*plans, *drawn)]


def draw_plan(draw: random.Random, num_stages: int) -> tuple[tuple[str, str], ...]:
    """Stages of which each takes what the one before gives first, and some of what is older."""
    letters = iter("abcdefghijklmnop")
    plan, there = [("x", next(letters))], ["x", "a"]
    for k in range(1, num_stages):
        takes = [plan[-1][1][0]]
        takes += draw.sample([name for name in there if name != takes[0]], draw.randint(1, len(there) - 1))
        gives = "" if k == num_stages - 1 else "".join(next(letters) for _ in range(draw.randint(1, 2)))
        plan.append(("".join(takes), gives))
        there += gives
    return tuple(plan)


def attempt_skips(answer: Callable, case: Skips) -> dict[str, Any]:
    stages, x = build_skips(case)
    return tried(answer, stages, x)


def one_device_with_skips(
    case: Skips, is_lost: Callable[[Skips, int, str], bool] = lambda case, k, name: False
) -> dict[str, Any]:
    """Loss and gradients by a single backward; of a use that is lost, (case, stage, name), no gradient comes back."""
    stages, x = build_skips(case)
    there = {"x": x}
    for k, stage in enumerate(stages):
        taken = {name: there[name].detach() if is_lost(case, k, name) else there[name] for name in stage.takes}
        there |= stage(taken)
    there["loss"].backward()
    return {"gradients": gradients_of(stages), "loss": there["loss"].detach()}


def users(case: Skips, name: str) -> list[int]:
    return [k for k, (takes, _) in enumerate(case.plan) if name in takes]


def maker(case: Skips, name: str) -> int:
    return next(k for k, (_, gives) in enumerate(case.plan) if name in gives)


SKIP_MISTAKES = (
    Mistake(
        "only one use counted",
        "Of a tensor that several stages use, only the gradient of the first of them came back.",
        lambda case: one_device_with_skips(case, lambda c, k, name: k != users(c, name)[0]),
    ),
    Mistake(
        "only one use counted",
        "Of a tensor that several stages use, only the gradient of the last of them came back.",
        lambda case: one_device_with_skips(case, lambda c, k, name: k != users(c, name)[-1]),
    ),
    Mistake(
        "only the neighbour's gradient",
        "A gradient came back only from the stage right behind, and not from later ones.",
        lambda case: one_device_with_skips(case, lambda c, k, name: name != "x" and k != maker(c, name) + 1),
    ),
    Mistake(
        "only the first output",
        "Of a stage that gives two tensors only the gradient of the first entered its walk back.",
        lambda case: one_device_with_skips(
            case, lambda c, k, name: name != "x" and name != c.plan[maker(c, name)][1][0]
        ),
    ),
)


def judge_skips(cases: Sequence[Skips], came: Sequence[Any]) -> str:
    for case, one in zip(cases, came, strict=True):
        judge_borders(case, one, [[name != "x" for name in takes] for takes, _ in case.plan])
    judge_values(cases, came, one_device_with_skips, SKIP_MISTAKES)
    most = max(len(users(case, name)) for case in cases for _, gives in case.plan for name in gives)
    return (
        f"{len(cases)} models, with tensors that up to {most} stages use: one call and one walk back per stage, and "
        "every bit of the loss and of all gradients is that of one device."
    )


def plan_of(stages: Sequence[SkipStage]) -> Iterator[str]:
    """A line about each stage: what it takes and gives."""
    for k, stage in enumerate(stages):
        yield f"stage {k} takes {', '.join(stage.takes):8} gives {', '.join(stage.gives)}"


TASKS = (
    Task(
        unit="02",
        name="step_in_stages",
        kind="rebuild",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_cuts,
        attempt=attempt_cut,
        judge=judge_cuts,
        look_at=(
            "what each stage has to remember until its backward: there are two things.",
            "which gradient belongs to which tensor where two cross, and where one of them is None.",
        ),
        hints=(
            "Take two stages. After the backward of the second one, in which tensor is the gradient that the first one "
            "needs, and with which tensor does the first one go on?",
            "A border is a leaf, and all that a stage has sent enters one walk back together: 'Any number of stages' "
            "in lesson 02 (../../notebooks/02_cut_it.ipynb).",
            "Forward: at each stage make a leaf of each tensor of the carry that is there, call the stage with the "
            "leaves, and note the leaves and what came out. Backward, last stage first: give what came out and its "
            "gradients to one backward, leaving out what is None; then the gradients of the leaves are those for the "
            "stage before. The first gradient is that of the loss with respect to itself.",
        ),
        instead=(Pipeline.forward, Pipeline.backward),
    ),
    Task(
        unit="02",
        name="step_with_skips",
        kind="transfer",
        minutes=40,
        points=5,
        difficulty=3,
        cases=draw_skips,
        attempt=attempt_skips,
        judge=judge_skips,
        look_at=(
            "a tensor that three stages use: how many gradients come back for it, and when are they all there?",
            "a stage that gives two tensors, and a tensor that nobody uses.",
        ),
        hints=(
            "Take x -> m | m -> h | h m -> loss and go back by hand. Which stages send a gradient for m? When may "
            "the walk through stage 0 begin?",
            "The chain rule adds up the gradients of all uses, and torch.autograd.backward takes several roots at once "
            "(https://docs.pytorch.org/docs/stable/generated/torch.autograd.backward.html). All users of a tensor come "
            "after its maker, so going through the stages backwards everything has arrived in time.",
            "Forward: keep all tensors by name; a stage gets leaves of those that it takes, and you note the leaves "
            "and what it gives. Backward, last stage first: collect what it gives and has a gradient, and let it "
            "enter one walk together. Then add the gradient of each of its leaves to what has come for that name "
            "from later stages. In that order the sums have the bits of one device.",
        ),
        instead=(Pipeline.forward, Pipeline.backward),
    ),
)
