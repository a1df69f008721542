"""Exercises of unit 08: the end of a step from memory, a loss scale that forgives, one decision in few messages."""

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_utils.checks.report import Wrong, is_unwritten
from course_utils.checks.tasks import Mistake, Named, Task, compare
from course_utils.optimization import LossScaler
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transfer import tell_all
from course_utils.transports import PeerLost, Worker

BAD = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# --- end_step ---------------------------------------------------------------------------------------------------------

FIRST_SCALE, MAX_NORM, LEARNING_RATE, MOMENTUM = 1024.0, 1.0, 0.1, 0.9


class Steps(NamedTuple):
    """Steps of a pipeline of K stages; in each all gradients are good, or one on one stage is not finite."""

    K: int
    growth_interval: int
    script: tuple[str, ...]  # "good" or "nan on stage 1"
    seed: int

    def __str__(self) -> str:
        return f"K={self.K}, growth_interval={self.growth_interval}, steps: {', '.join(self.script)}"


def everyones(worker: Worker, number: float, label: str) -> Tensor:
    """What every rank gave, (world size,) float64."""
    numbers = torch.full((worker.world_size, 1), number, dtype=torch.float64)
    others = [k for k in range(worker.world_size) if k != worker.rank]
    under_way = [worker.transport.irecv(numbers[k], k, label, control=True) for k in others]
    under_way += [worker.transport.isend(numbers[worker.rank].clone(), k, label, control=True) for k in others]
    for operation in under_way:
        worker.transport.wait(operation)
    return numbers.flatten()


class SGD:
    """With momentum, and all that a GradScaler needs. Importing an optimizer of torch.optim would take seconds."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.param_groups = [{"params": list(parameters)}]
        self._momentum = [torch.zeros_like(parameter) for parameter in parameters]

    def step(self) -> None:
        for parameter, momentum in zip(self.param_groups[0]["params"], self._momentum, strict=True):
            if parameter.grad is not None:
                momentum.mul_(MOMENTUM).add_(parameter.grad)
                parameter.data.sub_(LEARNING_RATE * momentum)


class Stage:
    """One stage when all backwards of a step are over: its gradients are those of the loss times `scale`.

    parameters: some have no gradient. scale, good_steps: to be changed, good_steps is 0 at first.
    """

    def __init__(self, run: Steps, number: int):
        self._worker: Worker | None = None
        self._number, self._draw = number, torch.Generator().manual_seed(100 * run.seed + number)
        self.parameters = [nn.Parameter(torch.randn(size, generator=self._draw)) for size in (3, 2, 2)]
        self.scale, self.good_steps, self.growth_interval = FIRST_SCALE, 0, run.growth_interval
        self._optimizer = SGD(self.parameters)
        self._calls: list[str] = []

    def _put_gradients(self, step: int, what: str, scale: float) -> None:
        """The gradients of one step times a scale. The norm of all is below 1 in every other step."""
        for parameter in self.parameters[:1] + self.parameters[2:]:  # the one between has none
            size = 3.0 if step % 2 else 0.1
            parameter.grad = size * scale * torch.randn(parameter.shape, generator=self._draw)
        kind, _, place = what.partition(" on stage ")
        if place == str(self._number):
            gradient = self.parameters[2].grad
            assert gradient is not None
            gradient[1] = BAD[kind]

    @property
    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @property
    def _at_work(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("a stage can ask others only while all stages run")
        return self._worker

    def any_stage(self, mine: bool) -> bool:
        """Whether any stage says yes. All stages must call it; it waits for them."""
        self._calls.append("any_stage")
        return bool(everyones(self._at_work, float(bool(mine)), "word of overflow").any())

    def clip(self) -> float:
        """Clip by the norm of the gradients of all stages, to at most 1. All stages must call it. The norm before."""
        self._calls.append("clip")
        squares = sum(float(gradient.double().square().sum()) for gradient in self._gradients)
        return clip_to(self, everyones(self._at_work, squares, "norm").sum().sqrt())

    def update_weights(self) -> None:
        """One step of SGD with momentum."""
        self._optimizer.step()


def clip_to(stage: Stage, norm: Tensor) -> float:
    for gradient in stage._gradients:
        gradient.mul_(torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0).float())
    return norm.item()


def draw_steps(draw: random.Random) -> list[Steps]:
    def bad(num_stages: int, kind: str = "") -> str:
        return f"{kind or draw.choice(list(BAD))} on stage {draw.randrange(num_stages)}"

    good, three = ("good",), draw.randrange(3)
    fixed = [
        Steps(2, 2, ("good", "inf on stage 1", "good", "nan on stage 0", "good", "good", "good", "good", "good"), 1),
        Steps(1, 1, (*good, "-inf on stage 0", *good, *good), 2),
        Steps(
            3, 3, (*good, *good, f"nan on stage {three}", *good, *good, f"inf on stage {(three + 1) % 3}", *4 * good), 3
        ),
    ]
    for k in (2, 3):
        script = [*good, bad(k, "-inf"), *good * draw.randint(1, 3), bad(k), bad(k, "nan"), *good * draw.randint(2, 5)]
        fixed.append(Steps(k, draw.randint(1, 3), tuple(script), draw.randrange(1000)))
    return fixed


def attempt_steps(answer: Callable, run: Steps) -> dict[str, Any]:
    stages = [Stage(run, k) for k in range(run.K)]
    found: dict[str, Any] = {}

    def end(worker: Worker) -> None:
        stage = stages[worker.rank]
        stage._worker = worker
        answer(stage)
        stage._calls.append("end")

    for step, what in enumerate(run.script):
        put_gradients(stages, step, what)
        for stage in stages:
            stage._calls.clear()
        stuck = ""
        try:
            run_in_threads(end, run.K, limit=5)
        except (Deadlock, PeerLost) as error:
            stuck = str(error)
        calls = [list(stage._calls) for stage in stages]
        if stuck or calls != [calls[0]] * run.K:
            return {"stuck": stuck, "step": step, "calls": calls}
        note(found, step, stages)
    return found


def put_gradients(stages: Sequence[Stage], step: int, what: str) -> None:
    """Every stage's gradients of a step: the last stage has multiplied the loss by its scale."""
    scale = float(stages[-1].scale)
    for stage in stages:
        stage._put_gradients(step, what, scale)


def note(found: dict[str, Any], step: int, stages: Sequence[Stage]) -> None:
    for k, stage in enumerate(stages):
        found[weights_name(step, k)] = stage_weights(stage)
    for k, stage in enumerate(stages):
        found[scale_name(step, k)] = float(stage.scale)


def stage_weights(stage: Stage) -> list[float]:
    return [weight for parameter in stage.parameters for weight in parameter.tolist()]


def weights_name(step: int, stage: int) -> str:
    return f"after step {step}, on stage {stage} weight"


def scale_name(step: int, stage: int) -> str:
    return f"after step {step}, the loss scale of stage {stage}"


def one_device(run: Steps) -> dict[str, Any]:
    """The same with torch's own scaler and clipping, over the parameters of all stages together."""
    stages, found = [Stage(run, k) for k in range(run.K)], dict[str, Any]()
    parameters = [parameter for stage in stages for parameter in stage.parameters]
    optimizer: Any = SGD(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=run.growth_interval)
    scaler.scale(torch.zeros(1))  # it makes its scale at the first call
    for step, what in enumerate(run.script):
        put_gradients(stages, step, what)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        for stage in stages:
            stage.scale = scaler.get_scale()
        note(found, step, stages)
    return found


ALWAYS_UPDATES = ("zeroed in place of skipped", "bad values set to zero", "updated all the same")


def with_mistake(run: Steps, mistake: str) -> dict[str, Any]:
    """What comes of one of STEP_MISTAKES; the stages one after another, in one process."""
    stages, found = [Stage(run, k) for k in range(run.K)], dict[str, Any]()
    looked_for = {"NaN is missed": Tensor.isinf, "only NaN is looked for": Tensor.isnan}
    is_bad = looked_for.get(mistake, lambda gradient: ~gradient.isfinite())

    def clip_all() -> None:
        squares = [gradient.double().square().sum() for stage in stages for gradient in stage._gradients]
        for stage in stages:
            clip_to(stage, torch.stack(squares).sum().sqrt())

    for step, what in enumerate(run.script):
        put_gradients(stages, step, what)
        own = [any(bool(is_bad(gradient).any()) for gradient in stage._gradients) for stage in stages]
        skipped = own if mistake == "own gradients only" else [any(own)] * run.K
        if mistake == "the next scale is divided by":
            for stage, skip in zip(stages, skipped, strict=True):
                next_scale(stage, skip, mistake)
        if mistake == "clipped before unscaled":
            clip_all()
        if mistake == "bad values set to zero":
            for stage in stages:
                for gradient in stage._gradients:
                    gradient.nan_to_num_(0.0, 0.0, 0.0)
        power = {"not unscaled": 0, "unscaled twice": -2}.get(mistake, -1)
        for stage in stages:
            for gradient in stage._gradients:
                gradient.mul_(float(stage.scale) ** power)
        if mistake not in ("clipped before unscaled", "not clipped"):
            clip_all()
        for stage, skip in zip(stages, skipped, strict=True):
            if mistake == "unscaled again after the clip":
                for gradient in stage._gradients:
                    gradient.mul_(1 / float(stage.scale))
            if skip and mistake == "zeroed in place of skipped":
                for gradient in stage._gradients:
                    gradient.zero_()
            if not skip or mistake in ALWAYS_UPDATES:
                stage.update_weights()
            if mistake != "the next scale is divided by":
                next_scale(stage, skip, mistake)
        note(found, step, stages)
    return found


def next_scale(stage: Stage, skip: bool, mistake: str) -> None:
    if mistake == "the scale never changes":
        return
    if skip != (mistake == "good and bad have changed places"):
        stage.scale *= 1.0 if mistake == "scale kept after a skip" else 0.5
        stage.good_steps *= mistake == "count kept after a skip"
        return
    stage.good_steps += 1
    due = stage.growth_interval + {"grows a step late": 1, "grows a step early": -1}.get(mistake, 0)
    if stage.good_steps == due or (mistake == "count kept after a growth" and stage.good_steps > due):
        stage.scale *= 1.0 if mistake == "never grows" else 2.0
        stage.good_steps *= mistake == "count kept after a growth"


STEP_MISTAKES = {
    "own gradients only": "Each stage decides from its own gradients, so some skip a step that others do.",
    "not unscaled": "The gradients still have the loss scale in them when they are clipped and used.",
    "unscaled twice": "The gradients are divided by the loss scale twice.",
    "unscaled again after the clip": "The gradients are divided by the loss scale once more after they were clipped.",
    "clipped before unscaled": "The gradients are clipped while the loss scale is still in them.",
    "not clipped": "The gradients are not clipped.",
    "updated all the same": "The weights are updated although a gradient was not finite.",
    "zeroed in place of skipped": "The gradients are set to zero and the weights updated: momentum moves them.",
    "bad values set to zero": "What is not finite is set to zero, and the weights are updated with the rest.",
    "NaN is missed": "Only infinite gradients are looked for. A NaN is not finite either.",
    "only NaN is looked for": "Only NaNs are looked for. Infinity is not finite either.",
    "the next scale is divided by": "The gradients are divided by the scale of the next step, not by that of this one.",
    "good and bad have changed places": "The scale treats a good step as a skipped one, and a skipped one as good.",
    "the scale never changes": "The loss scale never changes.",
    "scale kept after a skip": "The loss scale is not lowered after a skipped step.",
    "never grows": "The loss scale never grows again.",
    "count kept after a skip": "Good steps in a row are to be counted: the count goes on over a skipped step.",
    "count kept after a growth": "The count of good steps goes on after the scale has grown.",
    "grows a step late": "The loss scale grows one good step too late.",
    "grows a step early": "The loss scale grows one good step too early.",
}


def gives_with(model: Callable[[Any, str], Any], name: str) -> Callable[[Any], Any]:
    return lambda case: model(case, name)


def judge_steps(runs: Sequence[Steps], came: Sequence[Any]) -> str:
    for run, values in zip(runs, came, strict=True):
        if "calls" in values:
            tell_apart(run, values)
    mistakes = [Mistake(name, says, gives_with(with_mistake, name)) for name, says in STEP_MISTAKES.items()]
    compare(runs, came, one_device, mistakes, tolerance=1e-5)
    skips = sum(what != "good" for run in runs for what in run.script)
    steps = sum(len(run.script) for run in runs)
    return (
        f"{steps} steps on 1 to 3 stages, {skips} of them skipped: weights and loss scales are those of one device "
        "with torch.amp.GradScaler and clip_grad_norm_."
    )


def tell_apart(run: Steps, values: dict[str, Any]) -> None:
    """Stages that do not call the same things, each of which waits for all stages."""
    calls = values["calls"]
    for a, b in itertools.combinations(range(run.K), 2):
        for one, other in zip(calls[a], calls[b], strict=False):
            if one != other:
                does = {"any_stage": "asks the others", "clip": "clips", "end": "has ended the step"}
                stuck = f" The step gets stuck: {values['stuck']}." if values["stuck"] else ""
                raise Named(
                    "not all stages join",
                    f"With {run}, in step {values['step']}: stage {a} {does[one]} where stage {b} {does[other]}. What "
                    f"waits for all stages must not depend on what one of them has found.{stuck}",
                )
    raise Wrong(f"With {run}, in step {values['step']}: the stages got stuck. {values['stuck']}.")


def show_steps(answer: Callable) -> None:
    """Print what an answer does on two stages: a line per step."""
    if is_unwritten(answer):
        print(f"{answer.__name__} is not written yet.")
        return
    run = Steps(2, 2, ("good", "inf on stage 1", "good", "good", "nan on stage 0", "good"), 0)
    came = attempt_steps(answer, run)
    if "calls" in came:
        print(f"In step {came['step']} the stages did not do the same: {came['calls']}")
        return
    before = [stage_weights(Stage(run, k)) for k in range(run.K)]
    for step, what in enumerate(run.script):
        after, scales = ([came[name(step, k)] for k in range(run.K)] for name in (weights_name, scale_name))
        does = ["skips  " if new == old else "updates" for new, old in zip(after, before, strict=True)]
        shown = ", ".join(f"stage {k} {does[k]} (next scale {scales[k]:g})" for k in range(run.K))
        print(f"step {step}, {what + ':':16} {shown}")
        before = after


# --- next_state -------------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """When a loss scale changes, by how much, and how far."""

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 3
    hysteresis: int = 2
    smallest: float = 1.0
    largest: float = 2.0**24


class History(NamedTuple):
    """Rules, a first scale, and which steps overflow: `.` is a good step, `x` an overflow."""

    rules: Rules
    first: float
    script: str

    @property
    def is_limited(self) -> bool:
        """Whether the limits of the scale can matter."""
        return self.rules.smallest > WIDE["smallest"]

    def __str__(self) -> str:
        r = self.rules
        return (
            f"steps {self.script} (x: overflow), first scale {self.first:g}, growth {r.growth_factor:g}, backoff "
            f"{r.backoff_factor:g}, growth_interval={r.growth_interval}, hysteresis={r.hysteresis}, "
            + (f"scale between {r.smallest:g} and {r.largest:g}" if self.is_limited else "no limits")
        )


WIDE: dict[str, Any] = {"smallest": 2.0**-60, "largest": 2.0**60}  # no limits, as torch has none
MOST_NUMBERS = 3  # that may be kept between two steps


def draw_histories(draw: random.Random) -> list[History]:
    def script(length: int, share: float) -> str:
        return "".join("x" if draw.random() < share else "." for _ in range(length))

    fixed = [
        History(Rules(**WIDE), 1024.0, "..x..x.xx...x...xx"),
        History(Rules(hysteresis=1, **WIDE), 1024.0, ".xx......x...x..."),
        History(Rules(hysteresis=3, growth_interval=2, **WIDE), 4096.0, "x.xx.xx..xxxx"),
        History(Rules(growth_interval=2, smallest=64.0, largest=512.0), 256.0, "......x..xxxxx....xxx"),
        History(Rules(growth_interval=1, hysteresis=2), 2.0, "xxx.x.x.xx"),
    ]
    for hysteresis in (1, 2, 3):
        growth, backoff = draw.choice([2.0, 4.0]), draw.choice([0.5, 0.25])
        limits = WIDE if hysteresis < 3 else {"smallest": 128.0, "largest": 4096.0}
        rules = Rules(growth, backoff, draw.randint(2, 4), hysteresis, **limits)
        fixed.append(History(rules, 1024.0, script(32, draw.choice([0.2, 0.35]))))
    return fixed


def attempt_history(answer: Callable, case: History) -> dict[str, Any]:
    overflows = [letter == "x" for letter in case.script]
    half = len(overflows) // 2
    first = follow(answer, {"scale": case.first}, overflows, case.rules)
    if first["problem"]:
        return first
    resumed = follow(answer, first["states"][half - 1], overflows[half:], case.rules)
    return first | {"half": half, "resumed": resumed["scales"]}


def follow(answer: Callable, state: dict[str, Any], overflows: Sequence[bool], rules: Rules) -> dict[str, Any]:
    """The states after each step; between two steps a state is saved and read again, as by a checkpoint."""
    found: dict[str, Any] = {"scales": [], "states": [], "problem": ""}
    for step, overflowed in enumerate(overflows):
        state = answer(json.loads(json.dumps(state)), overflowed, rules)
        if not isinstance(state, dict) or "scale" not in state:
            missing = "Is a `return` missing?" if state is None else "It must have an entry 'scale'."
            return found | {"problem": f"step {step}: expected a dictionary, came {str(state)[:80]}. {missing}"}
        for name, value in state.items():
            if not isinstance(value, int | float):
                kind = type(value).__name__
                return found | {"problem": f"step {step}: {name!r} is a {kind}; a checkpoint keeps numbers here."}
        found["states"].append(dict(state))
        found["scales"].append(float(state["scale"]))
    return found


def by_torch(case: History) -> list[float]:
    """The scale after each step, of torch's GradScaler."""
    rules, weight = case.rules, nn.Parameter(torch.zeros(1))
    scaler = torch.amp.GradScaler(
        "cpu", case.first, rules.growth_factor, rules.backoff_factor, growth_interval=rules.growth_interval
    )
    scaler.scale(torch.zeros(1))
    optimizer: Any = SGD([weight])
    scales = []
    for letter in case.script:
        weight.grad = torch.full((1,), math.inf if letter == "x" else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


Steppers = Callable[[str, int], set[int]]


def in_a_row(script: str, interval: int) -> set[int]:
    """The steps after which the scale grows: each run of good steps is cut into pieces, from its beginning."""
    return {piece.end() - 1 for piece in re.finditer(r"\." * interval, script)}


def in_all(script: str, interval: int) -> set[int]:
    """Every so many good steps, whatever lies between them."""
    return {place for place, letter in enumerate(script) if letter == "."} & set(
        [place for place, letter in enumerate(script) if letter == "."][interval - 1 :: interval]
    )


def ever_after(script: str, interval: int) -> set[int]:
    """Every good step that has enough good ones before it."""
    return {place for place in range(len(script)) if script[: place + 1].endswith("." * interval)}


def since_growth(script: str, step: int, growths: set[int]) -> int:
    """How many overflows there were since the last growth, the one of this step among them."""
    return script[max((g for g in growths if g < step), default=-1) + 1 : step + 1].count("x")


def since_good(script: str, step: int, growths: set[int]) -> int:
    return step - script.rfind(".", 0, step)


def since_beginning(script: str, step: int, growths: set[int]) -> int:
    return script[: step + 1].count("x")


def by_counting(
    case: History,
    growths_of: Steppers = in_a_row,
    number: Callable[[str, int, set[int]], int] = since_growth,
    every: bool = False,
) -> list[float]:
    """The scale after each step, from counts in the whole history instead of counters; the options are mistakes."""
    rules, growths, scale, scales = case.rules, growths_of(case.script, case.rules.growth_interval), case.first, []
    for step, letter in enumerate(case.script):
        overflows = number(case.script, step, growths)
        due = overflows % rules.hysteresis == 0 if every else overflows >= rules.hysteresis
        if step in growths:
            scale = min(rules.largest, rules.growth_factor * scale)
        elif letter == "x" and due:
            scale = max(rules.smallest, rules.backoff_factor * scale)
        scales.append(scale)
    return scales


def right_scales(case: History) -> list[float]:
    return by_torch(case) if case.rules.hysteresis == 1 and not case.is_limited else by_counting(case)


def under(case: History, **changes: Any) -> list[float]:
    """By other rules than those that hold."""
    return by_counting(case._replace(rules=case.rules._replace(**changes)))


def changed(case: History, **by: int) -> list[float]:
    """With some rules larger or smaller by a number."""
    changes = {name: getattr(case.rules, name) + number for name, number in by.items()}
    if min(changes.values()) < 0:
        raise ValueError(changes)
    return under(case, **changes)


def early(case: History) -> list[float]:
    if case.rules.growth_interval == 1:  # nothing is earlier than at once
        return by_counting(case)
    return changed(case, growth_interval=-1)


HISTORY_MISTAKES = [
    Mistake(
        "every overflow lowers",
        "The scale is lowered at every overflow: nothing is forgiven.",
        lambda case: under(case, hysteresis=1),
    ),
    Mistake(
        "forgives one too many",
        "One overflow more is forgiven than the hysteresis says.",
        lambda case: changed(case, hysteresis=1),
    ),
    Mistake(
        "only overflows in a row count",
        "A good step makes the count of overflows begin anew; only a growth should.",
        lambda case: by_counting(case, number=since_good),
    ),
    Mistake(
        "forgives anew after lowering",
        "After the scale has been lowered overflows are forgiven again, without a growth in between.",
        lambda case: by_counting(case, every=True),
    ),
    Mistake(
        "forgives only once",
        "The count of overflows does not begin anew when the scale grows.",
        lambda case: by_counting(case, number=since_beginning),
    ),
    Mistake(
        "count kept after an overflow",
        "Good steps in a row are to be counted: the count goes on over an overflow.",
        lambda case: by_counting(case, in_all),
    ),
    Mistake(
        "count kept after a growth",
        "The count of good steps goes on after the scale has grown.",
        lambda case: by_counting(case, ever_after),
    ),
    Mistake("grows a step late", "It grows one good step too late.", lambda case: changed(case, growth_interval=1)),
    Mistake("grows a step early", "It grows one good step too early.", early),
    Mistake("no limits", "The scale leaves its limits.", lambda case: under(case, smallest=0.0, largest=math.inf)),
    Mistake("no smallest", "The scale falls below the smallest.", lambda case: under(case, smallest=0.0)),
    Mistake("no largest", "The scale grows beyond the largest.", lambda case: under(case, largest=math.inf)),
    Mistake("never lowered", "The scale is never lowered.", lambda case: under(case, backoff_factor=1.0)),
    Mistake("never grows", "The scale never grows.", lambda case: under(case, growth_factor=1.0)),
    Mistake(
        "factors of 2",
        "It doubles and halves; the rules have other factors.",
        lambda case: under(case, growth_factor=2.0, backoff_factor=0.5),
    ),
    Mistake(
        "good and bad have changed places",
        "A good step is taken for an overflow, and an overflow for a good step.",
        lambda case: by_counting(case._replace(script=case.script.translate(str.maketrans(".x", "x.")))),
    ),
]


SCALE, DECISION = "the scale after step {}", "the decision of rank {}"


def in_words(values: Sequence[Any], name: str) -> dict[str, Any]:
    """Values under a name and their number, so that a message says which one differs."""
    return {name.format(number): value for number, value in enumerate(values)}


def named_by(gives: Callable[[Any], Sequence[Any]], name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda case: in_words(gives(case), name)


def judge_histories(cases: Sequence[History], came: Sequence[Any]) -> str:
    for case, values in zip(cases, came, strict=True):
        if values["problem"]:
            raise Wrong(f"With {case}: {values['problem']}")
        most = max(len(state) for state in values["states"])
        if most > MOST_NUMBERS:
            raise Named(
                "more than three numbers", f"With {case}: the state has {most} entries; {MOST_NUMBERS} are enough."
            )
        half = values["half"]
        if values["resumed"] != values["scales"][half:]:
            raise Named(
                "state outside the dictionary",
                f"With {case}: resumed from the state after step {half - 1}, the scales are {values['resumed'][:4]}"
                f"..., in the run itself they were {values['scales'][half : half + 4]}... Something is remembered "
                "outside the state.",
            )
    mistakes = [Mistake(m.name, m.says, named_by(m.gives, SCALE)) for m in HISTORY_MISTAKES]
    scales = [in_words(values["scales"], SCALE) for values in came]
    compare(cases, scales, named_by(right_scales, SCALE), mistakes, tolerance=1e-9)
    steps, overflows = (sum(len(c.script) for c in cases), sum(c.script.count("x") for c in cases))
    return (
        f"{steps} steps, {overflows} with an overflow, hysteresis 1 to 3: every scale is right, with hysteresis 1 that "
        "of torch.amp.GradScaler, also when it is resumed from its state."
    )


# --- skip_together ----------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """K ranks, and a gradient that is not finite on one of them, or nowhere."""

    K: int
    what: str  # "nan on rank 1", or "nothing"

    def __str__(self) -> str:
        return f"K={self.K}, not finite: {self.what}"


def target(num_ranks: int) -> int:
    """ceil(log2 K): so many messages a rank may send, and so many may follow one after another."""
    return (num_ranks - 1).bit_length()


class Rank:
    """One rank with the gradients of its own stage, which can send single numbers to other ranks.

    gradients: tensors, or None where a parameter has none. rank, world_size: as everywhere.
    """

    def __init__(self, worker: Worker, gradients: Sequence[Tensor | None]):
        self.rank, self.world_size, self.gradients = worker.rank, worker.world_size, list(gradients)
        self._worker = worker
        self._after = 0  # how many messages had to come one after another for what this rank knows
        self._sent_to: list[int] = []
        self._log: list[str] = []
        self._waited = 0
        self._last = ""

    def _check(self, peer: int, does: str) -> None:
        if peer == self.rank or not 0 <= peer < self.world_size:
            raise ValueError(f"rank {self.rank} {does} rank {peer}; the others are among 0 to {self.world_size - 1}")

    def begin_send(self, number: float, to: int) -> Any:
        """Begin to send one number to another rank; returns a handle that must be waited for."""
        self._check(to, "sends to")
        message = torch.tensor([float(number), self._after + 1], dtype=torch.float64)
        self._sent_to.append(to)
        self._log.append(f"send to {to}")
        return self._worker.transport.isend(message, to, "word of overflow", control=True)

    def receive(self, source: int) -> float:
        """Wait for the next number of another rank."""
        self._check(source, "receives from")
        message = torch.empty(2, dtype=torch.float64)
        self._last = f"waits for a number of rank {source}"
        self._log.append(f"receive from {source}")
        operation = self._worker.transport.irecv(message, source, "word of overflow", control=True)
        self._worker.transport.wait(operation)
        self._last = ""
        self._after = max(self._after, int(message[1]))
        return message[0].item()

    def wait(self, handle: Any) -> None:
        """Wait until a number has been sent; it is when the other rank has received it."""
        self._last = "waits for a send"
        self._worker.transport.wait(handle)
        self._last = ""
        self._waited += 1


def gradients_of(case: Search, rank: int) -> list[Tensor | None]:
    """Of one rank. Some parameters have none, and the last of several ranks has none at all."""
    draw = torch.Generator().manual_seed(rank)
    kind, _, place = case.what.partition(" on rank ")
    if rank == case.K - 1 > 1 and place != str(rank):
        return [None, None]
    gradients: list[Tensor | None] = [torch.randn(2, 3, generator=draw), None, torch.randn(4, generator=draw)]
    if place == str(rank):
        bad = gradients[2 * (rank % 2)]
        assert bad is not None
        bad.view(-1)[2] = BAD[kind]
    return gradients


def draw_searches(draw: random.Random) -> list[Search]:
    cases = [Search(1, "nothing"), Search(1, "nan on rank 0")]
    cases += [Search(3, f"{kind} on rank {rank}") for kind, rank in (("nan", 1), ("nan", 2), ("-inf", 2))]
    large = draw.choice([6, 7])
    for k in (2, 3, 4, 5, large, 8):
        kinds = [draw.choice(list(BAD)) for _ in range(k)]
        ranks = range(k) if k < 6 else draw.sample(range(k), 4)
        cases += [Search(k, f"{kinds[r]} on rank {r}") for r in ranks] + [Search(k, "nothing")]
    return cases


def attempt_search(answer: Callable, case: Search) -> dict[str, Any]:
    ranks: dict[int, Rank] = {}

    def decide(worker: Worker) -> bool | str:
        ranks[worker.rank] = Rank(worker, gradients_of(case, worker.rank))
        return as_decision(answer(ranks[worker.rank]))

    stuck, decisions = "", []
    try:
        decisions = run_in_threads(decide, case.K, limit=5)
    except (Deadlock, PeerLost) as error:
        stuck = str(error)
    in_order = [ranks[k] for k in range(case.K)]
    return {
        "stuck": stuck,
        "last": [rank._last for rank in in_order],
        "decisions": decisions,
        "sent to": [rank._sent_to for rank in in_order],
        "waited": [rank._waited for rank in in_order],
        "logs": [rank._log for rank in in_order],
        "one after another": max(rank._after for rank in in_order),
    }


def as_decision(came: Any) -> bool | str:
    """Whether to skip; in words what came if it says neither yes nor no."""
    if isinstance(came, Tensor) and came.numel() == 1:
        came = came.item()
    if isinstance(came, bool | int | float) and came in (0, 1):
        return bool(came)
    return "nothing" if came is None else str(came)[:40]


def finds(case: Search, kinds: Sequence[str]) -> list[bool]:
    """For each rank, whether its own gradients have a value of these kinds."""
    kind, _, place = case.what.partition(" on rank ")
    return [place == str(rank) and kind in kinds for rank in range(case.K)]


def all_as(case: Search, kinds: Sequence[str]) -> list[bool]:
    return [any(finds(case, kinds))] * case.K


def heard_of(distances: Callable[[int], Sequence[int]], around: bool = True) -> Callable[[Search], list[bool]]:
    """Decisions if each rank has heard of those at some distances only, in a ring or on a line.

    distances: from K; negative ones are lower ranks.
    """

    def decisions(case: Search) -> list[bool]:
        own, places = finds(case, list(BAD)), range(case.K)
        heard = [[k, *(k + d for d in distances(case.K))] for k in places]
        return [any(own[place % case.K] for place in row if around or place in places) for row in heard]

    return decisions


def powers(num_ranks: int) -> list[int]:
    """1, 2, 4 and so on, below K."""
    return [2**i for i in range(target(num_ranks))]


def below_power(num_ranks: int) -> range:
    """From 1 up to below the largest power of 2 that is at most K."""
    return range(1, 2 ** (num_ranks.bit_length() - 1))


def minus(distances: Callable[[int], Sequence[int]]) -> Callable[[int], list[int]]:
    return lambda num_ranks: [-distance for distance in distances(num_ranks)]


def lost_in_max(case: Search, keeps: Callable[[int], bool]) -> list[bool]:
    """A NaN that only its own rank keeps, and it only on some ranks; infinity reaches all."""
    if "nan" not in case.what:
        return all_as(case, list(BAD))
    return [own and keeps(rank) for rank, own in enumerate(finds(case, list(BAD)))]


def gives_lost(keeps: Callable[[int], bool]) -> Callable[[Search], list[bool]]:
    return lambda case: lost_in_max(case, keeps)


DECISION_MISTAKES = [
    Mistake(
        "own gradients only",
        "Each rank decides from its own gradients, so some skip a step that others do.",
        lambda case: finds(case, list(BAD)),
    ),
    Mistake(
        "NaN is missed",
        "A NaN is not finite either, and it goes unnoticed.",
        lambda case: all_as(case, ["inf", "-inf"]),
    ),
    Mistake(
        "only NaN is looked for", "Only NaNs are found, infinite gradients are not.", lambda case: all_as(case, ["nan"])
    ),
    Mistake(
        "minus infinity is missed",
        "Minus infinity is not finite either, and it goes unnoticed.",
        lambda case: all_as(case, ["inf", "nan"]),
    ),
    Mistake("only plus infinity is found", "NaN and minus infinity go unnoticed.", lambda case: all_as(case, ["inf"])),
    Mistake(
        "the news travels one way",
        "A rank hears of lower ranks, never of higher ones.",
        heard_of(lambda k: range(-k, 0), around=False),
    ),
    Mistake(
        "the news travels one way",
        "A rank hears of higher ranks, never of lower ones.",
        heard_of(lambda k: range(1, k), around=False),
    ),
    Mistake("one neighbour only", "A rank hears of the rank before it only.", heard_of(lambda k: [-1])),
    Mistake("one neighbour only", "A rank hears of the rank after it only.", heard_of(lambda k: [1])),
    Mistake("two neighbours only", "A rank hears of its two neighbours only.", heard_of(lambda k: [-1, 1])),
    *(
        Mistake(
            "too few rounds",
            "With a number of ranks that is no power of 2 some ranks are never heard of.",
            heard_of(distances),
        )
        for distances in (below_power, minus(below_power))
    ),
    *(
        Mistake(
            "nothing is passed on",
            "A rank hears of those that send to it, and what it has heard it does not pass on.",
            heard_of(distances),
        )
        for distances in (powers, minus(powers))
    ),
    *(
        Mistake(
            "NaN lost in max",
            "A NaN is lost on its way. Which of two numbers is the larger one if one is NaN?",
            gives_lost(keeps),
        )
        for keeps in (lambda rank: True, lambda rank: rank % 2 == 0)
    ),
    Mistake(
        "skip and update have changed places",
        "The answer is the wrong way round: True means that all ranks skip.",
        lambda case: [not any(finds(case, list(BAD)))] * case.K,
    ),
    Mistake(
        "all instead of any",
        "The step is skipped only if every rank has found something.",
        lambda case: [all(finds(case, list(BAD)))] * case.K,
    ),
]


def judge_searches(cases: Sequence[Search], came: Sequence[Any]) -> str:
    for case, values in zip(cases, came, strict=True):
        if values["stuck"]:
            tell_stuck(case, values, [v["logs"] for c, v in zip(cases, came, strict=True) if c.K == case.K])
    right = named_by(lambda case: all_as(case, list(BAD)), DECISION)
    mistakes = [Mistake(m.name, m.says, named_by(m.gives, DECISION)) for m in DECISION_MISTAKES]
    compare(cases, [in_words(values["decisions"], DECISION) for values in came], right, mistakes)
    for case, values in sorted(zip(cases, came, strict=True), key=lambda pair: -pair[0].K):
        judge_messages(case, values)
    last = came[-1]
    return (
        f"{len(cases)} steps on 1 to 8 ranks: all ranks of a step decided alike and rightly. With 8 ranks none sent "
        f"more than {max(map(len, last['sent to']))} messages, and {last['one after another']} came one after another."
    )


def tell_stuck(case: Search, values: dict[str, Any], logs_of_all: Sequence[Sequence[list[str]]]) -> None:
    """logs_of_all: what each rank did in every step with as many ranks, also in those that did not get stuck."""
    logs, at = values["logs"], f"With {case}"
    if set(values["last"]) == {"waits for a send"} and all(len(log) == 1 for log in logs):
        raise Named(
            "all wait for a send",
            f"{at}: every rank waits until its number has been taken, and nobody is there to take one: "
            f"{values['stuck']}.",
        )
    if all(len(log) == 1 and log[0].startswith("receive") for log in logs) and all(values["last"]):
        raise Named("all receive first", f"{at}: every rank waits for a number, and nobody has sent one.")
    for rank, other in itertools.product(range(case.K), logs_of_all):
        for one, two in zip(logs[rank], other[rank], strict=False):
            if one != two:
                raise Named(
                    "messages depend on what is found",
                    f"{at}: rank {rank} began to {one} where in another step it began to {two}. Who sends to whom must "
                    "not depend on what was found: another rank waits for every message that it expects. "
                    f"{values['stuck']}.",
                )
    raise Wrong(f"{at}: the ranks got stuck. {values['stuck']}.")


def judge_messages(case: Search, values: dict[str, Any]) -> None:
    to, after, most, at = values["sent to"], values["one after another"], target(case.K), f"With {case}"
    sent = [len(peers) for peers in to]
    for k in range(case.K):
        if values["waited"][k] < sent[k]:
            raise Named(
                "a send that nobody waits for",
                f"{at}: rank {k} began to send {sent[k]} numbers and waited for {values['waited'][k]}. On real "
                "processes a message whose handle is dropped may be lost.",
            )
    busiest = max(range(case.K), key=lambda k: sent[k])
    if sent[busiest] <= most and after <= most:
        return
    text = (
        f"{at}: rank {busiest} sends {sent[busiest]} messages, and {after} messages come one after another, each of "
        f"which needs the one before. Of both {most} are allowed."
    )
    if case.K > 3 and (found := pattern(case.K, to, after)):
        raise Named(found[0], f"{text} {found[1]}")
    raise Wrong(text)


def pattern(num_ranks: int, to: Sequence[list[int]], after: int) -> tuple[str, str] | None:
    """The name of a well-known way to tell all, and what it is."""
    others = [[k for k in range(num_ranks) if k != rank] for rank in range(num_ranks)]
    if all(sorted(peers) == others[rank] for rank, peers in enumerate(to)):
        return "everyone tells everyone", "Every rank sends to every other one."
    if all(set(peers) == {(rank + 1) % num_ranks} for rank, peers in enumerate(to)):
        return "once round the ring", "Every rank sends to the next one only, so news must go round the whole ring."
    for rank, peers in enumerate(to):
        if sorted(peers) == others[rank] and all(to[k] == [rank] for k in others[rank]):
            return "one rank collects", f"Every rank tells rank {rank}, which tells all."
    if all(abs(peer - rank) == 1 for rank, peers in enumerate(to) for peer in peers) and after >= num_ranks - 1:
        return "along a chain", "Every rank sends to its neighbours only, so news must go along the whole chain."
    return None


def not_there(kind: str, message: str) -> Named | None:
    """A message to or from a rank that cannot be."""
    found = re.search(r"rank (-?\d+) (sends to|receives from) rank (-?\d+); the others", message)
    if kind != "ValueError" or not found:
        return None
    rank, does, peer = found.groups()
    if rank == peer:
        return Named("a message to itself", f"Rank {rank} {does} itself: {message}.")
    return Named("a rank that is not there", f"There is no rank {peer}: {message}.")


def show_messages(answer: Callable, num_ranks: int = 5) -> None:
    """Print who sent to whom, with a NaN on the last rank."""
    if is_unwritten(answer):
        print(f"{answer.__name__} is not written yet.")
        return
    case = Search(num_ranks, f"nan on rank {num_ranks - 1}")
    came = attempt_search(answer, case)
    if came["stuck"]:
        print(came["stuck"])
        return
    for rank, to in enumerate(came["sent to"]):
        decision = came["decisions"][rank]
        said = ("update", "skip")[decision] if isinstance(decision, bool) else decision
        print(f"rank {rank} sends to {', '.join(map(str, to)) or 'nobody'}, decides: {said}")
    print(f"{came['one after another']} messages one after another")


def run_on_processes(answer: Callable) -> str:
    """Two decisions of three real processes, with a NaN on one of them and with none."""
    from course_utils.processes import launch

    found = {what: launch(decide_once, 3, answer, what) for what in ("nan on rank 1", "nothing")}
    decisions = {what: {decision for decision, _ in ranks} for what, ranks in found.items()}
    if decisions != {"nan on rank 1": {True}, "nothing": {False}}:
        return f"On three real processes the ranks decided otherwise than in threads: {found}."
    most = max(messages for _, messages in found["nothing"])
    return f"On three real processes: with a NaN on rank 1 all skip, without it none does; {most} messages a rank."


def decide_once(worker: Worker, answer: Callable, what: str) -> tuple[bool | str, int]:
    rank = Rank(worker, gradients_of(Search(worker.world_size, what), worker.rank))
    return as_decision(answer(rank)), len(rank._sent_to)


TASKS = (
    Task(
        unit="08",
        name="end_step",
        kind="rebuild",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_steps,
        attempt=attempt_steps,
        judge=judge_steps,
        look_at=(
            "what size the gradients have when they are clipped and when they are used.",
            "what each stage does, and remembers, when another stage has overflowed.",
        ),
        hints=(
            "Take a step in which only stage 1 has an infinite gradient. What must stage 0 do with its weights, its "
            "scale and its count of good steps, and how does it learn of it?",
            "The order is: look, ask, unscale, clip, update or skip, choose the next scale. The scaler is in lesson 08 "
            "under 'Write it first', the shared decision under 'A mistake made on purpose' "
            "(../../notebooks/08_mixed_precision.ipynb).",
            "See whether every gradient of this stage is finite; some parameters have none. Ask whether any stage has "
            "found one that is not. Divide the gradients by the scale, then clip. If no stage has found anything, "
            "update the weights, count a good step, and at the interval double the scale and count from 0 again. "
            "Otherwise leave the weights, halve the scale and count from 0.",
        ),
        instead=(LossScaler.unscale, LossScaler.update, LossScaler.multiply),
    ),
    Task(
        unit="08",
        name="next_state",
        kind="transfer",
        minutes=20,
        points=3,
        difficulty=2,
        cases=draw_histories,
        attempt=attempt_history,
        judge=judge_histories,
        look_at=(
            "which two things are counted, and what makes each of the counts begin anew.",
            "what happens at an overflow that is forgiven, and at a growth that the largest scale stops.",
        ),
        hints=(
            "Follow the steps x . x . x with hysteresis 2 and a growth interval of 3 by hand. At which of the "
            "overflows is the scale lowered?",
            "Two counts are enough: good steps in a row, and overflows since the last growth. Megatron-LM keeps the "
            "same two: https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/grad_scaler.py",
            "At an overflow: good steps in a row are 0 again, and there is one overflow more. If there are at least as "
            "many as the hysteresis says, lower the scale, but not below the smallest. At a good step: one more in a "
            "row. If that is the interval, both counts begin anew, and the scale grows, but not above the largest. "
            "Both counts go into the state; at the first step they are not there yet.",
        ),
        instead=(LossScaler.update, LossScaler.multiply),
    ),
    Task(
        unit="08",
        name="skip_together",
        kind="transfer",
        minutes=30,
        points=4,
        difficulty=3,
        cases=draw_searches,
        attempt=attempt_search,
        judge=judge_searches,
        look_at=(
            "of which ranks a rank has heard after the first message, and after the second.",
            "whether a number of ranks that is no power of two reaches every rank as well.",
        ),
        hints=(
            "Begin with 4 ranks and two messages each. After the first message a rank can know of two ranks. Whom must "
            "it hear from next, so that it knows of four?",
            "What a rank knows can double with every round, if it passes on all that it has heard. To hear of the same "
            "rank twice does no harm to an 'any'. This pattern is known from barriers, as dissemination: "
            "https://doi.org/10.1007/BF01379320",
            "Look at your own gradients first. Then, in rounds with the distances 1, 2, 4 and so on, as long as the "
            "distance is below the number of ranks: send what you know so far to the rank that far ahead in the ring, "
            "receive from the rank that far behind, and add what it says to what you know. Wait for the send after the "
            "receive.",
        ),
        instead=(tell_all,),
        on_error=not_there,
        on_processes=run_on_processes,
    ),
)
