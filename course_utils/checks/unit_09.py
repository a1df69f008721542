"""Exercises of unit 09: clipping by the norm of all stages, that norm for any p, and a tied weight counted once."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from course_utils.checks.report import Wrong, is_unwritten
from course_utils.checks.tasks import Mistake, Named, Task, compare
from course_utils.optimization import LossScaler, clip_by_global_norm, gradient_norms
from course_utils.threads import Deadlock, run_in_threads
from course_utils.ties import Ties
from course_utils.transports import PeerLost, Worker

CLOSE = 1e-6  # relative: with or without the 1e-6 that torch adds to the norm, in float32 or float64

# --- What the ranks of all three tasks have in common -----------------------------------------------------------------


class NotOneNumber(TypeError):
    """Something else than one number was to be told."""


class NoOtherCopy(ValueError):
    """A rank wanted to swap what nobody else has."""


def share(worker: Worker, mine: Tensor, what: str) -> list[Tensor]:
    """What every rank has given, by rank."""
    transport, rank = worker.transport, worker.rank
    others = [other for other in range(worker.world_size) if other != rank]
    arrived = {other: torch.empty_like(mine) for other in others}
    operations = [transport.irecv(arrived[other], other, what, control=True) for other in others]
    operations += [transport.isend(mine, other, what, control=True) for other in others]
    for operation in operations:
        transport.wait(operation)
    return [mine.clone() if other == rank else arrived[other] for other in range(worker.world_size)]


class Tell:
    """Tells all stages one number of each; `count` is how often."""

    def __init__(self, worker: Worker):
        self._worker, self.count = worker, 0

    def __call__(self, number: Any) -> list[float]:
        """What all stages have told, by stage."""
        if isinstance(number, Tensor) and number.numel() == 1:
            number = number.item()
        if not isinstance(number, int | float):
            what = f"a tensor {tuple(number.shape)}" if isinstance(number, Tensor) else f"a {type(number).__name__}"
            raise NotOneNumber(f"tell takes one number, came {what}")
        self.count += 1
        told = share(self._worker, torch.tensor([float(number)], dtype=torch.float64), "a number")
        return [each.item() for each in told]


def number_of(came: Any) -> Any:
    """A number as it is, a tensor with one as that one, anything else as text."""
    if isinstance(came, Tensor):
        return float(came.item()) if came.numel() == 1 else f"a tensor {tuple(came.shape)}"
    return came if came is None or isinstance(came, int | float | str) else f"a {type(came).__name__}"


def not_more_than_one_exchange(case: Any, counts: Sequence[int], stuck: str, what: str) -> None:
    """Raises Named if ranks are stuck, or exchange more than once."""
    least, most = (counts.index(of(counts)) for of in (min, max))
    seen = f"stage {least} called {what} {times(counts[least])}, stage {most} {times(counts[most])}"
    if stuck and counts[least] == 0 < counts[most]:
        raise Named(
            "a stage that does not take part",
            f"With {case}: {seen}, and waits for ever. Every stage has its part in it, one without gradients too.",
        )
    if stuck and counts[least] < counts[most]:
        raise Named("not equally often", f"With {case}: {seen}, and waits for ever.")
    if stuck:
        raise Wrong(f"With {case}: the ranks got stuck. {stuck}.")
    if max(counts) > 1:
        raise Named(
            "more than one exchange",
            f"The numbers are right, but with {case} stage {most} called {what} {times(counts[most])}; once is enough, "
            "and each time costs a delay of the line.",
        )


def times(number: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")


def on_error(kind: str, message: str) -> Named | None:
    if kind == NotOneNumber.__name__:
        return Named("more than one number", f"{message[:1].upper()}{message[1:]}: one number per stage may travel.")
    if kind == NoOtherCopy.__name__:
        return Named("a swap with nobody", f"{message[:1].upper()}{message[1:]}.")
    return None


# --- clip_rank --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Gradients to be clipped. owners: the stage of each parameter of the model; missing: those without a gradient."""

    K: int
    owners: tuple[int, ...]
    max_norm: float
    loss_scale: float
    seed: int
    missing: tuple[int, ...] = ()
    spoilt: str = ""  # "nan" or "inf", in the last gradient of the model

    def __str__(self) -> str:
        own = [[place for place, owner in enumerate(self.owners) if owner == k] for k in range(self.K)]
        extra = f", none for {list(self.missing)}" * bool(self.missing) + f", a {self.spoilt}" * bool(self.spoilt)
        return (
            f"max_norm={self.max_norm:g}, loss_scale={self.loss_scale:g}, stages with the parameters "
            f"{' | '.join(map(str, own))}{extra} (seed {self.seed})"
        )


def gradients_of(step: Step) -> list[Tensor | None]:
    """The true ones, in model order: not multiplied by the loss scale."""
    generator = torch.Generator().manual_seed(step.seed)
    found: list[Tensor | None] = []
    for place in range(len(step.owners)):
        shape = (2 + place % 3, 3 + 2 * (place % 4))
        gradient = torch.randn(shape, generator=generator) * (0.5 + place % 5)
        found.append(None if place in step.missing else gradient)
    if step.spoilt and found[-1] is not None:
        found[-1][0, 0] = float(step.spoilt)
    return found


class ClipRank:
    """One rank with its parameters.

    parameters: pairs (place in the model, parameter). num_parameters: those of the whole model.
    """

    def __init__(self, worker: Worker, step: Step, none: Callable[[Tensor], Tensor | None]):
        self.num_parameters = len(step.owners)
        self.parameters: list[tuple[int, nn.Parameter]] = []
        for place, gradient in enumerate(gradients_of(step)):
            if step.owners[place] == worker.rank:
                parameter = nn.Parameter(torch.full((2 + place % 3, 3 + 2 * (place % 4)), 0.25))
                parameter.grad = none(parameter) if gradient is None else gradient * step.loss_scale
                self.parameters.append((place, parameter))
        self._worker, self.count = worker, 0

    def add_up(self, vector: Tensor) -> Tensor:
        """The sum of the vectors of all ranks; all must call it."""
        self.count += 1
        mine = vector.detach().clone()
        mine = mine if mine.is_floating_point() else mine.float()
        return torch.stack(share(self._worker, mine, "a vector")).sum(dim=0)


def draw_steps(draw: random.Random) -> list[Step]:
    steps = [
        Step(2, (0, 0, 0, 0, 1, 1, 1), 0.5, 1.0, 1),
        Step(3, (0, 0, 0, 1, 1, 1, 2, 2), 2.0, 1024.0, 2),
        Step(2, (0, 1, 0, 1, 0, 1), 500.0, 16.0, 3),
        Step(1, (0, 0, 0), 3.0, 256.0, 4),
        Step(3, (0, 0, 0, 2, 2), 1.5, 1.0, 5),
        Step(2, (0, 0, 0, 1, 1), 0.25, 2.0, 6, missing=(1, 3)),
        Step(2, (0, 0, 0, 1, 1), 0.5, 4.0, 7, missing=(0,), spoilt="nan"),
        Step(3, (0, 0, 1, 1, 2), 0.5, 1.0, 8, spoilt="inf"),
    ]
    for _ in range(5):
        K = draw.randint(2, 4)
        owners = tuple(sorted(draw.randrange(K) for _ in range(draw.randint(5, 9))))
        missing = tuple(place for place in range(len(owners)) if draw.random() < 0.1)[: len(owners) - 1]
        steps.append(
            Step(K, owners, draw.choice((0.1, 1.0, 4.0)), 2.0 ** draw.randint(0, 12), draw.randint(10, 9999), missing)
        )
    return steps


def attempt_step(answer: Callable, step: Step) -> dict[str, Any]:
    try:
        return clip_in_threads(answer, step, lambda parameter: None)
    except (AttributeError, TypeError) as error:
        if "None" not in str(error) or not step.missing:
            raise
        clip_in_threads(answer, step, torch.zeros_like)  # if this works, it was the gradient that is None
        return {"none": f"{type(error).__name__}: {error}"}


def clip_in_threads(answer: Callable, step: Step, none: Callable[[Tensor], Tensor | None]) -> dict[str, Any]:
    ranks: dict[int, ClipRank] = {}
    norms: dict[int, Any] = {}

    def one_rank(worker: Worker) -> None:
        ranks[worker.rank] = ClipRank(worker, step, none)
        norms[worker.rank] = number_of(answer(ranks[worker.rank], step.max_norm, step.loss_scale))

    stuck = ""
    try:
        run_in_threads(one_rank, step.K, limit=5)
    except (Deadlock, PeerLost) as error:
        stuck = str(error)
    own = [pair for k in range(step.K) for pair in ranks[k].parameters]
    gradients: dict[str, Any] = {f"of parameter {place}": p.grad for place, p in sorted(own, key=lambda pair: pair[0])}
    return {
        "norms": [norms.get(k) for k in range(step.K)],
        "gradients": {name: g if g is None else g.detach().clone() for name, g in gradients.items()},
        "weights": all(bool((p == 0.25).all()) for _, p in own),
        "counts": [ranks[k].count for k in range(step.K)],
        "stuck": stuck,
    }


def reference(step: Step) -> dict[str, Any]:
    """torch's clipping of the whole model on one device."""
    whole = []
    for gradient in gradients_of(step):
        whole.append(nn.Parameter(torch.zeros(() if gradient is None else gradient.shape)))
        whole[-1].grad = torch.zeros(()) if gradient is None else gradient
    norm = clip_grad_norm_(whole, step.max_norm).item()
    return {"norms": [norm] * step.K, "gradients": named(step, [p.grad for p in whole])}


def named(step: Step, gradients: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    return {f"of parameter {i}": None if i in step.missing else g for i, g in enumerate(gradients)}


def scaled_by(name: str, says: str, factors: Callable, norms: Callable | None = None) -> Mistake:
    """A mistake that multiplies gradients by other factors.

    factors: (norms of the gradients in model order, [norms of each stage's], step) -> a factor for each gradient.
    norms: the same arguments -> what each rank returns; the global norm if it is not given.
    """

    def gives(step: Step) -> dict[str, Any]:
        found = [torch.zeros(()) if g is None else g.double() for g in gradients_of(step)]
        each = torch.stack([g.norm() for g in found])
        owners = torch.tensor(step.owners)
        stages = [each[owners == k].norm().item() for k in range(step.K)]
        products = [(g * f).float() for g, f in zip(found, factors(each, stages, step), strict=True)]
        told = norms(each, stages, step) if norms else step.K * [each.norm().item()]
        return {"norms": told, "gradients": named(step, products)}

    return Mistake(name, says, gives)


def one(total: float, step: Step, bound: float | None = None) -> list[float]:
    """One factor for all."""
    return len(step.owners) * [min(1.0, (step.max_norm if bound is None else bound) / (total + 1e-12))]


OWN = "a stage clipped by its own norm"
OWN_SAYS = "Each stage was clipped by the norm of its own gradients. The bound is for all stages together."
UNSCALE_LAST = "clipped before it is unscaled"
UNSCALE_LAST_SAYS = "The bound was compared with gradients that were still multiplied by the loss scale."


def own_factors(each: Tensor, stages: list[float], step: Step) -> list[float]:
    return [min(1.0, step.max_norm / (stages[k] + 1e-12)) for k in step.owners]


CLIP_MISTAKES = (
    scaled_by(OWN, OWN_SAYS, own_factors, lambda each, stages, step: stages),
    scaled_by(OWN, OWN_SAYS, own_factors),
    scaled_by(
        UNSCALE_LAST,
        UNSCALE_LAST_SAYS,
        lambda each, stages, step: one(each.norm().item() * step.loss_scale, step),
        lambda each, stages, step: step.K * [each.norm().item() * step.loss_scale],
    ),
    scaled_by(
        UNSCALE_LAST,
        UNSCALE_LAST_SAYS,
        lambda each, stages, step: one(each.norm().item() * step.loss_scale, step),
    ),
    scaled_by(
        "never unscaled",
        "The gradients were never divided by the loss scale.",
        lambda each, stages, step: [f * step.loss_scale for f in one(each.norm().item() * step.loss_scale, step)],
        lambda each, stages, step: step.K * [each.norm().item() * step.loss_scale],
    ),
    scaled_by(
        "norms added up",
        "The norms were added up as they are. The norm of the whole is that of the vector of norms.",
        lambda each, stages, step: one(each.sum().item(), step),
        lambda each, stages, step: step.K * [each.sum().item()],
    ),
    scaled_by(
        "stages' norms added up",
        "The norms of the stages were added up as they are. Lengths at right angles do not add like that.",
        lambda each, stages, step: one(sum(stages), step),
        lambda each, stages, step: step.K * [sum(stages)],
    ),
    scaled_by(
        "no root",
        "That is the square of the global norm.",
        lambda each, stages, step: one(each.norm().item() ** 2, step),
        lambda each, stages, step: step.K * [each.norm().item() ** 2],
    ),
    scaled_by(
        "each gradient by its own norm",
        "Each gradient was clipped by its own norm. That turns the step; one factor is for all.",
        lambda each, stages, step: [min(1.0, step.max_norm / (n + 1e-12)) for n in each.tolist()],
    ),
    scaled_by(
        "small gradients made longer",
        "Gradients whose norm is below the bound were multiplied too. Clipping never makes a step longer.",
        lambda each, stages, step: len(step.owners) * [step.max_norm / each.norm().item()],
    ),
    scaled_by(
        "the norm after clipping",
        "The gradients are right. What was returned is the norm after clipping; asked for is the one before.",
        lambda each, stages, step: one(each.norm().item(), step),
        lambda each, stages, step: step.K * [min(each.norm().item(), step.max_norm)],
    ),
    scaled_by(
        "nothing clipped",
        "The gradients are as long as they were. Is something new made and dropped instead of changed in place?",
        lambda each, stages, step: len(step.owners) * [1.0],
    ),
    scaled_by(
        "clipped to 1",
        "The gradients were divided by the global norm. The bound is max_norm.",
        lambda each, stages, step: one(each.norm().item(), step, 1.0),
    ),
)


def judge_steps(steps: Sequence[Step], came: Sequence[Any]) -> str:
    for step, values in zip(steps, came, strict=True):
        if "none" in values:
            raise Named(
                "a gradient that is None",
                f"With {step}, it raised {values['none'].rstrip('.')}. With gradients of zeros in these places it "
                "runs: a parameter that took no part in the step has None for a gradient.",
            )
        if values["stuck"]:
            not_more_than_one_exchange(step, values["counts"], values["stuck"], "add_up")
    finite = [(step, values) for step, values in zip(steps, came, strict=True) if not step.spoilt]
    numbers = [{key: values[key] for key in ("norms", "gradients")} for _, values in finite]
    compare([step for step, _ in finite], numbers, reference, CLIP_MISTAKES, CLOSE)
    for step, values in zip(steps, came, strict=True):
        if step.spoilt:
            judge_spoilt(step, values)
        elif values["norms"] != (right := reference(step)["norms"]):
            raise Named(
                "not the bits of one device",
                f"With {step}: the norm is {values['norms'][0]!r}, and on one device {right[0]!r}. That is the same to "
                "six digits, not to the last bit: it was added up in another order, or in another precision.",
            )
        if not values["weights"]:
            raise Wrong(f"With {step}: the weights changed. Clipping is for gradients.")
        not_more_than_one_exchange(step, values["counts"], "", "add_up")
    return (
        f"{len(steps)} steps on 1 to {max(step.K for step in steps)} stages: every norm has the bits of "
        "clip_grad_norm_ on one device. Gradients that are None and norms that are not finite were among them."
    )


def judge_spoilt(step: Step, values: dict[str, Any]) -> None:
    """With a norm that is not finite no gradient may be clipped, and all ranks are told."""
    for name, before in named(step, gradients_of(step)).items():
        after = values["gradients"][name]
        if before is None or after is None:
            continue
        if not any(torch.allclose(before * f, after, CLOSE, equal_nan=True) for f in (1.0, step.loss_scale)):
            if (after.isnan() & ~before.isnan()).any():
                raise Named(
                    "a norm that is not finite spoils all",
                    f"With {step}: the gradient {name}, which was finite, has become NaN. A norm that is not finite "
                    "clips nothing.",
                )
            raise Wrong(f"With {step}: the gradient {name} was changed. A norm that is not finite clips nothing.")
    for rank, norm in enumerate(values["norms"]):
        if not isinstance(norm, float) or math.isfinite(norm):
            raise Wrong(
                f"With {step}: rank {rank} returned {norm!r}. The caller skips the step if the norm is not finite, so "
                "every rank must be told."
            )


def show_a_step(answer: Callable) -> None:
    """Print what an answer does to the gradients of two stages."""
    step = Step(2, (0, 0, 0, 0, 1, 1, 1), 0.5, 16.0, 1)
    if is_unwritten(answer):
        print(f"{answer.__name__} is not written yet.")
        return
    before, came = gradients_of(step), attempt_step(answer, step)
    after = list(came["gradients"].values())
    for k in range(step.K):
        norms = [
            torch.cat([g.flatten() for g, owner in zip(found, step.owners, strict=True) if owner == k]).norm()
            for found in (before, after)
        ]
        print(
            f"stage {k}: true norm {norms[0]:.3f}, after clipping {norms[1]:.3f}, returned {rounded(came['norms'][k])}"
        )
    print(f"all of it after clipping: {get_total_norm(after).item():.6f}, the bound is {step.max_norm}")


def rounded(came: Any) -> str:
    return f"{came:.6f}" if isinstance(came, float) else repr(came)


def clip_on_processes(answer: Callable) -> str:
    """A real step on two processes, clipped by the learner's function, against torch on one device."""
    from course_utils.processes import launch

    step = Step(2, (0, 0, 0, 0, 1, 1, 1), 0.5, 16.0, 1)
    came, right = launch(clip_one_rank, 2, answer, step), reference(step)["norms"]
    if came != right:
        return f"On two real processes it returned {came}; on one device the norm is {right[0]!r}."
    return f"On two real processes: {came[0]:.4f} on both, to the last bit the norm of one device."


def clip_one_rank(worker: Worker, answer: Callable, step: Step) -> Any:
    return number_of(answer(ClipRank(worker, step, lambda parameter: None), step.max_norm, step.loss_scale))


# --- norm_of_all ------------------------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """Gradients of all stages. sizes: for each stage those of its gradients, 0 for one that is None."""

    p: float
    sizes: tuple[tuple[int, ...], ...]
    dtype: str
    seed: int
    nan_on: int = -1  # a stage

    def __str__(self) -> str:
        stages = " | ".join(", ".join(str(n or None) for n in stage) or "nothing" for stage in self.sizes)
        nan = f", a NaN on stage {self.nan_on}" * (self.nan_on >= 0)
        return f"p={self.p:g}, stages with gradients of {stages} elements in {self.dtype}{nan} (seed {self.seed})"


def stages_of(whole: Whole) -> list[list[Tensor | None]]:
    """Gradients in their own precision; those in float16 are large, so that their squares do not fit into it."""
    generator = torch.Generator().manual_seed(whole.seed)
    dtype = getattr(torch, whole.dtype)
    scale = 150.0 if dtype == torch.float16 else 3.0
    found: list[list[Tensor | None]] = []
    for k, stage in enumerate(whole.sizes):
        own = [scale * torch.randn(n, generator=generator) - 0.5 * scale if n else None for n in stage]
        if k == whole.nan_on and own[0] is not None:
            own[0][-1] = math.nan
        found.append([None if g is None else g.to(dtype) for g in own])
    return found


def draw_wholes(draw: random.Random) -> list[Whole]:
    inf = math.inf
    wholes = [
        Whole(2.0, ((30, 7), (12,)), "float32", 1),
        Whole(1.0, ((5,), (9, 4), (20,)), "float32", 2),
        Whole(3.0, ((25, 3), (8,), (6, 6)), "float32", 3),
        Whole(inf, ((14,), (31, 2), (9,)), "float32", 4),
        Whole(2.0, ((40, 0, 11), (0,)), "float32", 5),
        Whole(inf, ((0,), (13, 0), ()), "float32", 6),
        Whole(3.0, ((21, 8),), "float32", 7),
        Whole(2.0, ((50, 20), (30,)), "float16", 8),
        Whole(3.0, ((50,), (40, 9)), "bfloat16", 9),
        Whole(inf, ((6, 3), (7,), (8,)), "float32", 10, nan_on=1),
        Whole(inf, ((6, 3), (7,), (8,)), "float32", 11, nan_on=0),
        Whole(2.0, ((6, 3), (7,)), "float32", 12, nan_on=1),
    ]
    for _ in range(8):
        sizes = tuple(tuple(draw.randint(0, 25) for _ in range(draw.randint(0, 3))) for _ in range(draw.randint(2, 4)))
        dtype = draw.choice(("float32", "float32", "float16", "bfloat16"))
        wholes.append(Whole(draw.choice((1.0, 1.5, 2.0, 3.0, inf)), ((10,), *sizes), dtype, draw.randint(20, 9999)))
    return wholes


def attempt_norm(answer: Callable, whole: Whole) -> dict[str, Any]:
    stages = stages_of(whole)
    tells: dict[int, Tell] = {}
    norms: dict[int, Any] = {}

    def one_stage(worker: Worker) -> None:
        tells[worker.rank] = Tell(worker)
        norms[worker.rank] = number_of(answer(stages[worker.rank], whole.p, tells[worker.rank]))

    stuck = ""
    try:
        run_in_threads(one_stage, len(stages), limit=5)
    except (Deadlock, PeerLost) as error:
        stuck = str(error)
    return {
        "norms": [norms.get(k) for k in range(len(stages))],
        "counts": [tells[k].count for k in range(len(stages))],
        "stuck": stuck,
    }


def flat(whole: Whole) -> list[Tensor]:
    """The gradients of each stage in one vector, in float64."""
    none = torch.zeros(0, dtype=torch.float64)
    return [torch.cat([none, *(g.double().flatten() for g in s if g is not None)]) for s in stages_of(whole)]


def p_norm(values: Tensor, p: float) -> float:
    """By its definition, in float64; of nothing it is 0."""
    if p == math.inf:
        return values.abs().max().item() if values.numel() else 0.0
    return values.abs().pow(p).sum().pow(1 / p).item()


def expected_norm(whole: Whole) -> list[float]:
    """torch's own, of the gradients of the whole model on one device."""
    gradients = [g.double() for stage in stages_of(whole) for g in stage if g is not None]
    return len(whole.sizes) * [get_total_norm(gradients, norm_type=whole.p).item()]


def from_norms(name: str, says: str, combine: Callable[[list[float], float], float]) -> Mistake:
    """A mistake that makes something else of the right numbers of the stages; combine: (numbers, p) -> norm."""

    def gives(whole: Whole) -> list[float]:
        numbers = [p_norm(values, whole.p) for values in flat(whole)]
        return len(numbers) * [combine(numbers, whole.p)]

    return Mistake(name, says, gives)


def vector_norm(numbers: list[float], p: float) -> float:
    return p_norm(torch.tensor(numbers, dtype=torch.float64), p)


def in_half_precision(whole: Whole) -> list[float]:
    numbers = []
    for stage in stages_of(whole):
        own = [torch.linalg.vector_norm(g, whole.p).item() for g in stage if g is not None]
        numbers.append(vector_norm(own, whole.p))
    return len(numbers) * [vector_norm(numbers, whole.p)]


def largest_signed(whole: Whole) -> list[float]:
    if whole.p != math.inf:
        return expected_norm(whole)
    return len(whole.sizes) * [torch.cat(flat(whole)).max().item()]


NORM_MISTAKES = (
    Mistake(
        "a stage's own norm",
        "Each stage returned the norm of its own gradients.",
        lambda whole: [p_norm(values, whole.p) for values in flat(whole)],
    ),
    from_norms("norms added up", "The norms of the stages were added up as they are.", lambda n, p: sum(n)),
    from_norms(
        "no root",
        "That is the sum of the powers; the root of it is missing.",
        lambda n, p: max_of(n) if p == math.inf else vector_norm(n, p) ** p,
    ),
    from_norms(
        "p=inf as a sum",
        "For p=inf the numbers of the stages were added up. No sum is in that norm.",
        lambda n, p: sum(n) if p == math.inf else vector_norm(n, p),
    ),
    from_norms(
        "a maximum for every p",
        "The largest number of a stage was taken for the whole. That is right for p=inf alone.",
        lambda n, p: max_of(n),
    ),
    from_norms(
        "2-norm of the stages' norms",
        "The numbers of the stages were put together as if p were 2.",
        lambda n, p: vector_norm(n, 2.0),
    ),
    from_norms(
        "2-norm of the stages' norms",
        "The numbers of the stages were put together as if p were 2.",
        lambda n, p: vector_norm(n, p if p == math.inf else 2.0),
    ),
    from_norms(
        "roots taken twice",
        "The stages' norms were added up, without their powers, and a root was taken of that.",
        lambda n, p: max_of(n) if p == math.inf else sum(n) ** (1 / p),
    ),
    from_norms(
        "a NaN lost in a maximum",
        "A NaN on one stage did not arrive in the norm of the whole. Python's max keeps a NaN or drops it, as the "
        "order has it, because no comparison with NaN is true.",
        lambda n, p: max(n) if p == math.inf else vector_norm(n, p),
    ),
    Mistake(
        "p is not used",
        "That is the 2-norm, whatever p is.",
        lambda whole: len(whole.sizes) * [p_norm(torch.cat(flat(whole)), 2.0)],
    ),
    Mistake(
        "largest instead of largest in size",
        "For p=inf that is the largest element with its sign. The norm is the largest absolute value.",
        largest_signed,
    ),
    Mistake(
        "computed in the gradients' precision",
        "Norms of gradients in float16 or bfloat16 were rounded to that precision, or did not fit into it.",
        in_half_precision,
    ),
)


def max_of(numbers: list[float]) -> float:
    return vector_norm(numbers, math.inf)


def judge_norms(wholes: Sequence[Whole], came: Sequence[Any]) -> str:
    for whole, values in zip(wholes, came, strict=True):
        if values["stuck"]:
            not_more_than_one_exchange(whole, values["counts"], values["stuck"], "tell")
    compare(wholes, [values["norms"] for values in came], expected_norm, NORM_MISTAKES, CLOSE, "the norm on stage")
    for whole, values in zip(wholes, came, strict=True):
        not_more_than_one_exchange(whole, values["counts"], "", "tell")
    return (
        f"{len(wholes)} models on 1 to {max(len(w.sizes) for w in wholes)} stages, p from 1 to infinity, gradients in "
        f"three precisions: one number per stage was enough for torch's norm of the whole, within 1e-6."
    )


def norms_by_p(answer: Callable, ps: Sequence[float]) -> dict[str, dict[float, float]] | None:
    """For a picture: the learner's norm and each stage's own, by p."""
    if is_unwritten(answer):
        print(f"{answer.__name__} is not written yet.")
        return None
    wholes = [Whole(p, ((30, 7), (12,)), "float32", 1) for p in ps]
    came = [attempt_norm(answer, whole)["norms"][0] for whole in wholes]
    if not all(isinstance(norm, float) for norm in came):
        print(f"came: {came}")
        return None
    lines = {"your norm of all": dict(zip(ps, came, strict=True))}
    for k in (0, 1):
        lines[f"stage {k} alone"] = {p: p_norm(flat(w)[k], p) for p, w in zip(ps, wholes, strict=True)}
    return lines


# --- clip_tied --------------------------------------------------------------------------------------------------------

TIED = "embedding"


class TiedModel(NamedTuple):
    """K stages; the embedding is on the first and on the last."""

    K: int
    max_norm: float
    seed: int
    embedding: float = 1.0  # the size of its gradients beside that of the others

    def __str__(self) -> str:
        larger = f", the embedding's gradients {self.embedding:g} times as large" if self.embedding != 1 else ""
        return f"K={self.K}, max_norm={self.max_norm:g}{larger} (seed {self.seed})"


def use_of(model: TiedModel, name: str, stage: int) -> Tensor:
    """The gradient that one stage's use of a parameter gives, in float32."""
    number = 1000 * model.seed + 10 * stage + (name == TIED)
    generator = torch.Generator().manual_seed(number)
    shape, scale = ((5, 4), 2.0 * model.embedding) if name == TIED else ((3 + stage, 7), 1.0 + 0.5 * stage)
    return scale * torch.randn(shape, generator=generator)


def own_gradients(model: TiedModel, stage: int) -> dict[str, Tensor]:
    """As they are after the last backward. One stage alone uses the embedding twice, and autograd adds by itself."""
    found = {}
    if stage in (0, model.K - 1):
        found[TIED] = use_of(model, TIED, stage)
        if model.K == 1:
            found[TIED] = found[TIED] + use_of(model, TIED, 1)
    found[f"weight {stage}"] = use_of(model, "weight", stage)
    return found


class TiedRank:
    """One stage and its gradients.

    rank, num_stages: which stage of how many. gradients: {name: tensor}; "embedding" is in it on the first stage and
    on the last.
    """

    def __init__(self, worker: Worker, model: TiedModel):
        self.rank, self.num_stages = worker.rank, model.K
        self.gradients = own_gradients(model, worker.rank)
        self._worker = worker
        self.tell = Tell(worker)
        self.swapped: list[int] = []

    def swap(self, tensor: Tensor) -> Tensor:
        """Give a tensor to the stage with the other copy; return the one that comes from there."""
        if self.rank not in (0, self.num_stages - 1):
            raise NoOtherCopy(f"stage {self.rank} of {self.num_stages} called swap, but has no copy of the embedding")
        if self.num_stages == 1:
            raise NoOtherCopy("with one stage there is no other copy of the embedding, and swap was called")
        self.swapped.append(tensor.numel())
        peer = self.num_stages - 1 - self.rank
        mine, theirs = tensor.detach().clone(), torch.empty_like(tensor)
        transport = self._worker.transport
        operations = [
            transport.irecv(theirs, peer, "the embedding's gradient", control=True),
            transport.isend(mine, peer, "the embedding's gradient", control=True),
        ]
        for operation in operations:
            transport.wait(operation)
        return theirs


def draw_tied(draw: random.Random) -> list[TiedModel]:
    models = [
        TiedModel(2, 1.0, 1),
        TiedModel(6, 0.5, 2),
        TiedModel(1, 2.0, 3),
        TiedModel(5, 900.0, 4),
        TiedModel(7, 0.7, 5, embedding=0.1),
        TiedModel(2, 3.0, 6, embedding=8.0),
        TiedModel(1, 700.0, 7),
    ]
    for _ in range(6):
        models.append(
            TiedModel(
                draw.randint(2, 6), draw.choice((0.25, 1.0, 5.0)), draw.randint(10, 9999), draw.choice((0.5, 1.0, 3.0))
            )
        )
    return models


def attempt_tied(answer: Callable, model: TiedModel) -> dict[str, Any]:
    ranks: dict[int, TiedRank] = {}
    norms: dict[int, Any] = {}

    def one_rank(worker: Worker) -> None:
        ranks[worker.rank] = TiedRank(worker, model)
        norms[worker.rank] = number_of(answer(ranks[worker.rank], model.max_norm))

    stuck = ""
    try:
        run_in_threads(one_rank, model.K, limit=5)
    except (Deadlock, PeerLost) as error:
        stuck = str(error)
    every = [ranks[k] for k in range(model.K)]
    return {
        "norms": [norms.get(k) for k in range(model.K)],
        "stages": [
            {name: g.detach().clone() if isinstance(g, Tensor) else number_of(g) for name, g in rank.gradients.items()}
            for rank in every
        ],
        "told": [rank.tell.count for rank in every],
        "swapped": [rank.swapped for rank in every],
        "stuck": stuck,
    }


def on_one_device(model: TiedModel) -> dict[str, Any]:
    """One shared parameter, used twice: autograd adds, and clip_grad_norm_ counts it once."""
    shapes = {name: g.shape for k in range(model.K) for name, g in own_gradients(model, k).items()}
    whole = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for k in range(model.K):
        loss = loss + (whole[f"weight {k}"] * use_of(model, "weight", k)).sum()
    for k in (0, max(1, model.K - 1)):
        loss = loss + (whole[TIED] * use_of(model, TIED, k)).sum()
    loss.backward()
    norm = clip_grad_norm_(whole.values(), model.max_norm).item()
    clipped = {name: p.grad.float() for name, p in whole.items() if p.grad is not None}
    return {
        "norms": model.K * [norm],
        "stages": [{name: clipped[name] for name in own_gradients(model, k)} for k in range(model.K)],
    }


class Parts(NamedTuple):
    """A tied model in float64: each copy's gradient (one stage has one), the sum, and the squares of the others."""

    copies: list[Tensor]
    total: Tensor
    others: list[float]  # of each stage

    @property
    def rest(self) -> float:
        return sum(self.others)

    def right(self) -> float:
        return math.sqrt(self.rest + square(self.total))


def square(tensor: Tensor) -> float:
    return tensor.pow(2).sum().item()


def parts_of(model: TiedModel) -> Parts:
    own = [{name: g.double() for name, g in own_gradients(model, k).items()} for k in range(model.K)]
    copies = [stage[TIED] for stage in own if TIED in stage]
    return Parts(copies, sum(copies, torch.zeros(())), [square(own[k][f"weight {k}"]) for k in range(model.K)])


def tied_mistake(
    name: str,
    says: str,
    norm: Callable[[Parts], float] = Parts.right,
    copies: Callable[[Parts], list[Tensor]] = lambda parts: len(parts.copies) * [parts.total],
    norm_of: Callable[[Parts, int], float] | None = None,
    factor: Callable[[float, float], float] = lambda bound, norm: min(1.0, bound / norm),
) -> Mistake:
    """norm: what is taken for the global norm; copies: the embedding's gradient on the first stage and on the last.

    norm_of: (parts, stage) -> the norm of a stage, if each has another one.
    """

    def gives(model: TiedModel) -> dict[str, Any]:
        parts = parts_of(model)
        norms = [norm_of(parts, k) if norm_of else norm(parts) for k in range(model.K)]
        ends, stages = copies(parts), []
        for k in range(model.K):
            by, stage = factor(model.max_norm, norms[k]), {}
            if k in (0, model.K - 1):
                stage[TIED] = (by * ends[0 if k == 0 else -1]).float()
            stage[f"weight {k}"] = (by * use_of(model, "weight", k).double()).float()
            stages.append(stage)
        return {"norms": norms, "stages": stages}

    return Mistake(name, says, gives)


def root(*squares: float) -> float:
    return math.sqrt(sum(squares))


NEVER_ADDED = "the copies' gradients are never added"
NEVER_ADDED_SAYS = "Each copy kept the gradient of its own stage, and the two become different weights."
BEFORE = "the norm before the copies are added"
BEFORE_SAYS = (
    "The norm was taken from gradients of the copies that were not added yet, and it is not that of their sum."
)

TIED_MISTAKES = (
    tied_mistake(
        "the tied weight counted twice",
        "Both copies went into the norm. They are one weight.",
        lambda parts: root(parts.rest, len(parts.copies) * square(parts.total)),
    ),
    tied_mistake(
        "the tied weight not counted",
        "The embedding is not in the norm at all.",
        lambda parts: root(parts.rest),
    ),
    tied_mistake(
        "one stage leaves it out",
        "With one stage the embedding is missing in the norm: first and last stage are the same there.",
        lambda parts: parts.right() if len(parts.copies) > 1 else root(parts.rest),
    ),
    tied_mistake(
        "tied gradients averaged",
        "The gradients of the two copies were averaged. On one device autograd adds them.",
        lambda parts: root(parts.rest, square(parts.total / len(parts.copies))),
        lambda parts: len(parts.copies) * [parts.total / len(parts.copies)],
    ),
    tied_mistake(
        NEVER_ADDED,
        NEVER_ADDED_SAYS,
        lambda parts: root(parts.rest, *map(square, parts.copies)),
        lambda parts: parts.copies,
    ),
    tied_mistake(
        NEVER_ADDED,
        NEVER_ADDED_SAYS,
        lambda parts: root(parts.rest, square(parts.copies[0])),
        lambda parts: parts.copies,
    ),
    tied_mistake(BEFORE, BEFORE_SAYS, lambda parts: root(parts.rest, *map(square, parts.copies))),
    tied_mistake(BEFORE, BEFORE_SAYS, lambda parts: root(parts.rest, square(parts.copies[0]))),
    tied_mistake(
        "only one copy gets the sum",
        "One copy has the sum of both gradients, the other has not.",
        copies=lambda parts: [parts.total, parts.copies[-1]],
    ),
    tied_mistake(
        "only one copy gets the sum",
        "One copy has the sum of both gradients, the other has not.",
        copies=lambda parts: [parts.copies[0], parts.total],
    ),
    tied_mistake(
        OWN,
        OWN_SAYS,
        norm_of=lambda parts, k: root(parts.others[k], square(parts.total) if k in (0, len(parts.others) - 1) else 0.0),
    ),
    tied_mistake(
        "norms added up",
        "The norms of the stages were added up as they are.",
        lambda parts: sum(
            math.sqrt(other + (square(parts.total) if k == 0 else 0.0)) for k, other in enumerate(parts.others)
        ),
    ),
    tied_mistake("no root", "That is the square of the global norm.", lambda parts: parts.right() ** 2),
    tied_mistake(
        "small gradients made longer",
        "Gradients whose norm is below the bound were multiplied too. Clipping never makes a step longer.",
        factor=lambda bound, norm: bound / norm,
    ),
    tied_mistake(
        "nothing clipped",
        "The gradients were added, and left as long as they are.",
        factor=lambda bound, norm: 1.0,
    ),
)


def judge_tied(models: Sequence[TiedModel], came: Sequence[Any]) -> str:
    for model, values in zip(models, came, strict=True):
        if values["stuck"]:
            ends = [len(values["swapped"][k]) for k in (0, -1)]
            what, counts = ("tell", values["told"]) if ends[0] == ends[1] else ("swap", ends)
            not_more_than_one_exchange(model, counts, values["stuck"], what)
    numbers = [{key: values[key] for key in ("norms", "stages")} for values in came]
    compare(models, numbers, on_one_device, TIED_MISTAKES, CLOSE)
    for model, values in zip(models, came, strict=True):
        first, last = (values["stages"][k][TIED] for k in (0, -1))
        if not torch.equal(first, last):
            raise Named(
                "copies that differ in their bits",
                f"With {model}: the two copies of the embedding are close, but not equal in every bit. From then on "
                "they are two weights. Do both stages compute the same numbers in the same order?",
            )
        if len(set(values["norms"])) > 1:
            raise Named(
                "norms that differ in their bits",
                f"With {model}: the stages returned {values['norms']}. Close to the bound one would clip and another "
                "would not. Do all add in the same order?",
            )
        swaps = [len(sizes) for sizes in values["swapped"]]
        if max(swaps) > 1 or any(size > first.numel() for sizes in values["swapped"] for size in sizes):
            raise Named(
                "more than one exchange",
                f"The numbers are right, but with {model} more was swapped than the embedding's gradient, once.",
            )
        not_more_than_one_exchange(model, values["told"], "", "tell")
    return (
        f"{len(models)} models on 1 to {max(model.K for model in models)} stages: the norm and every gradient are "
        "those of one device with one shared embedding, and the two copies are equal in every bit."
    )


def show_the_copies(answer: Callable) -> None:
    """Print what becomes of a tied weight on two stages."""
    if is_unwritten(answer):
        print(f"{answer.__name__} is not written yet.")
        return
    model = TiedModel(2, 1.0, 1)
    came, right = attempt_tied(answer, model), on_one_device(model)
    for k in range(model.K):
        print(f"stage {k} returned {rounded(came['norms'][k])}, its embedding begins {began(came['stages'][k][TIED])}")
    print(f"one device has {right['norms'][0]:.6f}, its embedding begins {began(right['stages'][0][TIED])}")


def began(tensor: Tensor) -> list[float]:
    return [round(x, 4) for x in tensor.flatten()[:3].tolist()]


TASKS = (
    Task(
        unit="09",
        name="clip_rank",
        kind="rebuild",
        minutes=15,
        points=3,
        difficulty=1,
        cases=draw_steps,
        attempt=attempt_step,
        judge=judge_steps,
        look_at=(
            "which norm the bound is compared with: of which gradients, before or after which other step?",
            "what one rank knows that the others must be told.",
        ),
        hints=(
            "Take two stages, one with a gradient (3, 0), the other with (4,). Which norm has the whole? What must "
            "each rank put into its vector so that the sum of both vectors leads to it?",
            "Loss scale first, then the norm, then the bound. One slot for each parameter of the model keeps the bits "
            "of one device: lesson 09, 'Write it first' (../../notebooks/09_gradient_clipping.ipynb).",
            "Divide each gradient that there is by the loss scale. Make a vector of zeros, one for each parameter of "
            "the model, and put the norm of each gradient at its place. Add it up over the ranks and take the norm of "
            "the sum. If that is finite and above the bound, multiply each gradient by the bound divided by it. Return "
            "the norm.",
        ),
        instead=(gradient_norms, clip_by_global_norm, LossScaler.unscale),
        on_processes=clip_on_processes,
    ),
    Task(
        unit="09",
        name="norm_of_all",
        kind="transfer",
        minutes=25,
        points=4,
        difficulty=2,
        cases=draw_wholes,
        attempt=attempt_norm,
        judge=judge_norms,
        look_at=(
            "what the norms of two stages make together, for p=1, p=2 and p=inf, on paper.",
            "what a stage tells that has no gradient at all, a NaN, or numbers too large, or with too few digits, for "
            "their precision.",
        ),
        hints=(
            "Two stages with the gradients (1, 2) and (3,): write down the norm of the whole for p=1, 2 and infinity. "
            "Which one number of the first stage do you need for each?",
            "The p-norm of a vector is the p-norm of the p-norms of its parts: the definition is at "
            "https://docs.pytorch.org/docs/stable/generated/torch.linalg.vector_norm.html, with what it does for "
            "infinity and in which precision it computes.",
            "On each stage take the norm of every gradient that there is, in a precision with enough digits. Make one "
            "number of them, the norm of these norms, or 0 if there are none. Tell it. Of what all have told take the "
            "same norm once more; a NaN must survive each of these steps.",
        ),
        instead=(gradient_norms, clip_by_global_norm),
        on_error=on_error,
    ),
    Task(
        unit="09",
        name="clip_tied",
        kind="transfer",
        minutes=35,
        points=5,
        difficulty=3,
        cases=draw_tied,
        attempt=attempt_tied,
        judge=judge_tied,
        look_at=(
            "what autograd does on one device with a weight that is used twice, and what the norm counts there.",
            "the smallest runs: one stage, and two stages without a middle.",
        ),
        hints=(
            "Say that the embedding is one number. Stage 0 has the gradient 3 for it, the last stage 1, and there is "
            "nothing else. What is the gradient on one device, and what is its norm? Now add stages in between.",
            "The order matters: the gradients of the copies become one first, the norm comes after, one of the copies "
            "stands for both in it. Megatron-LM does it like that (get_main_grads_for_grad_norm in "
            "https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/optimizer.py); a part of it that "
            "counted both is mended in https://github.com/NVIDIA/Megatron-LM/pull/7227.",
            "If there are several stages and this one has a copy: swap its gradient and add what comes. Then take the "
            "sum of squares of this stage's gradients, without the embedding if another stage counts it. Tell that "
            "number, add up what all have told by stage, take the root. If it is above the bound, multiply all "
            "gradients by the bound divided by it.",
        ),
        instead=(Ties.add_up, gradient_norms, clip_by_global_norm),
        on_error=on_error,
    ),
)
