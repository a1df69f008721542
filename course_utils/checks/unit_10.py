"""Exercises of unit 10: the Noam rate from memory, a cosine with a warm-up, a schedule that survives a stop."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._dynamo  # noqa: F401  seconds that the first optimizer would take, out of the time that an answer has
from torch import Tensor

from course_utils.checks.report import Wrong, is_unwritten
from course_utils.checks.tasks import Mistake, Named, Task
from course_utils.optimization import Noam

RELATIVE = 1e-6  # float32 is good enough
OF_THE_PEAK = 1e-7  # and near a rate of 0 no float has many digits


def as_number(value: Any) -> float | str | None:
    """A rate as a float; what is none in words."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return None if value is None else float(value)
    return f"a {type(value).__name__}"


def are_close(right: Sequence[float], came: Sequence[Any]) -> bool:
    return len(right) == len(came) and first_off(right, came) is None


def first_off(right: Sequence[float], came: Sequence[Any]) -> int | None:
    """The place of the first rate that is not the right one."""
    least = OF_THE_PEAK * max(map(abs, right))
    for i, (a, b) in enumerate(zip(right, came, strict=True)):
        if not isinstance(b, float) or not math.isclose(a, b, rel_tol=RELATIVE, abs_tol=least):
            return i
    return None


def judge_rates(
    cases: Sequence[Any],
    came: Sequence[Any],
    right: Callable[[Any], list[float]],
    mistakes: Sequence[Mistake],
    name_of: Callable[[Any, int], str],
) -> None:
    """Raises unless all rates are right; Named if one of the mistakes, and only one, gives all that came."""
    for case, values in zip(cases, came, strict=True):
        expected = right(case)
        if len(values) != len(expected):
            raise Wrong(f"With {case}: expected {len(expected)} rates in all, came {len(values)}.")
        if (i := first_off(expected, values)) is None:
            continue
        wanted = f"With {case}: {name_of(case, i)} should have the rate {expected[i]:.7g}"
        if values[i] is None:
            raise Wrong(f"{wanted}, and nothing came. Is a `return` missing?")
        if isinstance(values[i], str):
            raise Wrong(f"{wanted}, and {values[i]} came.")
        found = [m for m in mistakes if all(gives(m, c, v) for c, v in zip(cases, came, strict=True))]
        shown = f"{wanted}; it has {values[i]:.7g}."
        if len(found) == 1:
            raise Named(found[0].name, f"{found[0].says} {shown}")
        raise Wrong(shown)


def gives(mistake: Mistake, case: Any, came: Sequence[Any]) -> bool:
    try:
        return are_close(mistake.gives(case), came)
    except (ArithmeticError, ValueError):
        return False


def rates_of(answer: Callable, steps: Sequence[int], *given: float) -> dict[int, float] | None:
    """{step: rate} to draw; None, and a sentence, if the answer is not written yet or gives something else."""
    if is_unwritten(answer):
        print(f"{answer.__name__} is not written yet.")
        return None
    rates = {}
    for step in steps:
        rate = as_number(answer(step, *given))
        if not isinstance(rate, float) or not math.isfinite(rate):
            print(f"{answer.__name__}: for step {step} a rate was expected, {rate or 'nothing'} came.")
            return None
        rates[step] = rate
    return rates


# --- noam_rate --------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """A Noam schedule, and the steps whose rates are asked for."""

    d_model: int
    warm_up: int
    factor: float
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"d_model={self.d_model}, warm_up={self.warm_up}, factor={self.factor:g}"


def draw_sizes(draw: random.Random) -> list[Sizes]:
    given = [(512, 4000, 1.0), (128, 150, 0.2), (64, 1, 1.0)]
    given += [(draw.randint(8, 200), draw.randint(2, 60), round(draw.uniform(0.1, 3.0), 2)) for _ in range(4)]
    sizes = []
    for d_model, warm_up, factor in given:
        steps = {1, 2, 3, max(1, warm_up // 2), warm_up, warm_up + 1, 4 * warm_up, draw.randint(2, 9 * warm_up)}
        sizes.append(Sizes(d_model, warm_up, factor, tuple(sorted(steps))))
    return sizes


def attempt_sizes(answer: Callable, sizes: Sizes) -> list[Any]:
    return [as_number(answer(step, sizes.d_model, sizes.warm_up, sizes.factor)) for step in sizes.steps]


def peak_of(sizes: Sizes) -> float:
    return sizes.factor / math.sqrt(sizes.d_model * sizes.warm_up)


def in_parts_of_the_peak(sizes: Sizes) -> list[float]:
    """A straight line to the peak, then its fall with the root of the step: the formula in other words."""
    w = sizes.warm_up
    return [peak_of(sizes) * (n / w if n <= w else math.sqrt(w / n)) for n in sizes.steps]


def noam_with(
    ahead: int = 0,
    rise: Callable[[int, int], float] = lambda n, w: n * w**-1.5,
    fall: Callable[[int], float] = lambda n: n**-0.5 if n > 0 else math.inf,
    join: Callable[..., float] = min,
    width: Callable[[int], float] = lambda d: d**-0.5,
    factor: bool = True,
) -> Callable[[Sizes], list[float]]:
    """What an answer gives in which one part of the formula is another one."""

    def rates(sizes: Sizes) -> list[float]:
        scale = width(sizes.d_model) * (sizes.factor if factor else 1.0)
        steps = [step + ahead for step in sizes.steps]
        return [scale * join(rise(n, sizes.warm_up), fall(n)) for n in steps]

    return rates


NOAM_MISTAKES = (
    Mistake(
        "step from 0",
        "The first update has the rate 0, and each later one that of the step before: the steps given count from 1.",
        noam_with(ahead=-1),
    ),
    Mistake("step counted twice", "Every step has the rate of the next one.", noam_with(ahead=1)),
    Mistake("max instead of min", "The larger of the two terms was taken.", noam_with(join=max)),
    Mistake("sum instead of min", "The two terms were added up.", noam_with(join=lambda *terms: sum(terms))),
    Mistake(
        "warm-up power",
        "The rise is too steep: look at the power of the warm-up.",
        noam_with(rise=lambda n, w: n * w**-0.5),
    ),
    Mistake("never falls", "The rate rises and never falls.", noam_with(fall=lambda n: math.inf)),
    Mistake("no warm-up", "The rate falls from the first step on.", noam_with(rise=lambda n, w: math.inf)),
    Mistake("d_model^0.5", "A wider model gets a higher rate here.", noam_with(width=lambda d: d**0.5)),
    Mistake("no d_model", "The width of the model changes nothing here.", noam_with(width=lambda d: 1.0)),
    Mistake("1/d_model", "The rate falls too fast with the width of the model.", noam_with(width=lambda d: 1 / d)),
    Mistake("no factor", "The factor changes nothing here.", noam_with(factor=False)),
)


def judge_sizes(cases: Sequence[Sizes], came: Sequence[Any]) -> str:
    judge_rates(cases, came, in_parts_of_the_peak, NOAM_MISTAKES, lambda case, i: f"step {case.steps[i]}")
    return (
        f"{sum(len(case.steps) for case in cases)} rates of {len(cases)} schedules, first steps, peaks and falls; "
        f"with {cases[0]} the peak is {peak_of(cases[0]):.3g}, at step {cases[0].warm_up}."
    )


# --- cosine_rate ------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A cosine schedule with a warm-up, and the steps whose rates are asked for."""

    warm_up: int
    total: int
    peak: float
    final: float
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"warm_up={self.warm_up}, total={self.total}, peak={self.peak:g}, final={self.final:g}"


def draw_curves(draw: random.Random) -> list[Curve]:
    given = [(10, 100, 1e-3, 1e-5), (1, 8, 0.5, 0.1), (0, 7, 1.0, 0.0), (4, 5, 0.2, 0.05)]
    for _ in range(4):
        warm_up, peak = draw.randint(2, 20), round(draw.uniform(0.01, 0.9), 3)
        total = warm_up + draw.randint(3, 60)
        given.append((warm_up, total, peak, round(peak * draw.uniform(0.05, 0.5), 4)))
    given.append((500_000, 10**8, 3e-4, 3e-5))
    curves = []
    for warm_up, total, peak, final in given:
        fall = total - warm_up
        steps = {1, 2, warm_up - 1, warm_up, warm_up + 1, warm_up + fall // 3, warm_up + fall // 2, total - 1, total}
        steps |= {total + 1, total + fall, 3 * total, draw.randint(1, total)}
        curves.append(Curve(warm_up, total, peak, final, tuple(sorted(step for step in steps if step >= 1))))
    return curves


def attempt_curve(answer: Callable, curve: Curve) -> list[Any]:
    return [as_number(answer(step, *curve[:4])) for step in curve.steps]


def by_half_angles(curve: Curve) -> list[float]:
    """The same curve through the square of a sine of half the angle, counted from the end."""
    rates = []
    for n in curve.steps:
        if n <= curve.warm_up:
            rates.append(curve.peak * (n / curve.warm_up))
        else:
            left = max(0.0, curve.total - n) / (curve.total - curve.warm_up)
            rates.append(curve.final + (curve.peak - curve.final) * math.sin(left * math.pi / 2) ** 2)
    return rates


def cosine_with(
    ahead: int = 0,
    rise: Callable[[int, Curve], float] = lambda n, c: c.peak * n / c.warm_up,
    share: Callable[[int, Curve], float] = lambda n, c: min(1.0, (n - c.warm_up) / (c.total - c.warm_up)),
    weight: Callable[[float], float] = lambda s: (1 + math.cos(math.pi * s)) / 2,
    between: Callable[[float, Curve], float] = lambda w, c: w * c.peak + (1 - w) * c.final,
) -> Callable[[Curve], list[float]]:
    """What an answer gives in which one part is another one."""

    def rates(curve: Curve) -> list[float]:
        steps = [step + ahead for step in curve.steps]
        return [
            rise(n, curve) if n < curve.warm_up else between(weight(share(n, curve)), curve) for n in steps
        ]  # fmt: skip

    return rates


COSINE_MISTAKES = (
    Mistake("step from 0", "Each step has the rate of the one before it.", cosine_with(ahead=-1)),
    Mistake("step counted twice", "Each step has the rate of the one after it.", cosine_with(ahead=1)),
    Mistake(
        "rises again",
        "After the last step the rate rises again; a cosine does not stop by itself.",
        cosine_with(share=lambda n, c: (n - c.warm_up) / (c.total - c.warm_up)),
    ),
    Mistake(
        "a whole period",
        "The rate falls and is back at the peak in the last step: that is a whole period of the cosine.",
        cosine_with(weight=lambda s: (1 + math.cos(2 * math.pi * s)) / 2),
    ),
    Mistake(
        "a quarter of a period",
        "The fall is that of a quarter of a period: it ends steeply.",
        cosine_with(weight=lambda s: math.cos(math.pi / 2 * s)),
    ),
    Mistake(
        "degrees",
        "The angle was given in degrees; `cos` wants radians.",
        cosine_with(weight=lambda s: (1 + math.cos(180 * s)) / 2),
    ),
    Mistake(
        "a straight fall",
        "The rate falls in a straight line.",
        cosine_with(weight=lambda s: 1 - s),
    ),
    Mistake(
        "warm-up counted twice",
        "The rate drops after the peak: the steps of the warm-up were counted in the fall as well.",
        cosine_with(share=lambda n, c: min(1.0, n / c.total)),
    ),
    Mistake(
        "does not reach the end",
        "In the last step the fall is not over yet: it was made as long as the whole run.",
        cosine_with(share=lambda n, c: min(1.0, (n - c.warm_up) / c.total)),
    ),
    Mistake(
        "one step too late at the peak",
        "The rise was divided by one step too many.",
        cosine_with(rise=lambda n, c: c.peak * n / (c.warm_up + 1)),
    ),
    Mistake(
        "warm-up from the final rate",
        "The rise begins at the final rate; it is a straight line from 0.",
        cosine_with(rise=lambda n, c: c.final + (c.peak - c.final) * n / c.warm_up),
    ),
    Mistake(
        "falls to 0",
        "The fall goes to 0, and the final rate is left out.",
        cosine_with(between=lambda w, c: w * c.peak),
    ),
    Mistake(
        "final rate on top",
        "The final rate was added to a fall from the whole peak, so the peak is too high.",
        cosine_with(between=lambda w, c: w * c.peak + c.final),
    ),
    Mistake(
        "cut off at the final rate",
        "The fall goes towards 0 and is cut off at the final rate, before the last step.",
        cosine_with(between=lambda w, c: max(w * c.peak, c.final)),
    ),
)


def judge_curves(cases: Sequence[Curve], came: Sequence[Any]) -> str:
    judge_rates(cases, came, by_half_angles, COSINE_MISTAKES, lambda case, i: f"step {case.steps[i]}")
    return (
        f"{sum(len(case.steps) for case in cases)} rates of {len(cases)} schedules, one of them of {cases[-1].total:,} "
        "steps: rise, peak, middle, last step and what comes after it."
    )


# --- resumable --------------------------------------------------------------------------------------------------------

MOST_CHARACTERS = 400
ALONE, BEFORE, AFTER = (
    "the optimizer's state is not loaded at all",
    "the optimizer's state is loaded before the functions are made",
    "the optimizer's state is loaded last",
)


class Stops(NamedTuple):
    """A run that is stopped and resumed.

    attempts: updates that are tried, 0, 1, 2, ...; `skipped` are those that overflow.
    stops: before these attempts the process ends and a fresh one takes over.
    order: what happens to the optimizer's own state there.
    """

    attempts: int
    skipped: tuple[int, ...]
    stops: tuple[int, ...]
    order: str
    bases: tuple[float, ...]
    seed: int

    def __str__(self) -> str:
        which = ", ".join(str(t + 1) for t in self.skipped)
        bases = " and ".join(f"{base:g}" for base in self.bases)
        return (
            f"{self.attempts} attempts, {f'of which {which} overflow' if which else 'none of which overflows'}, base "
            f"rates {bases}, stopped after {' and '.join(map(str, self.stops))} attempts, where {self.order}"
        )


def draw_stops(draw: random.Random) -> list[Stops]:
    def seed() -> int:
        return draw.randrange(10**6)

    runs = [
        Stops(6, (), (3,), ALONE, (1.0,), seed()),
        Stops(12, (2, 6), (5,), ALONE, (1.0, 0.25), seed()),
        Stops(12, (0, 1, 7), (4, 8), BEFORE, (0.5, 2.0), seed()),
        Stops(12, (3, 6), (4, 9), AFTER, (0.5, 2.0), seed()),
        Stops(5, (1,), (0,), BEFORE, (0.1,), seed()),
    ]
    for order in (ALONE, BEFORE, AFTER):
        attempts, first = draw.randint(40, 60), draw.randint(5, 15)
        second = attempts - draw.randint(5, 9)  # late, so that a state that grows is large
        skipped = sorted(draw.sample(range(attempts), 6))
        for start in (0, first, second):  # between two stops something happens
            skipped = [t for t in skipped if t != start + 2 and (t != start or order != AFTER)]
        bases = (round(draw.uniform(0.1, 0.9), 2), round(draw.uniform(1.0, 3.0), 2))
        runs.append(Stops(attempts, tuple(skipped), (first, second), order, bases, seed()))
    return runs


def rate_of_run(run: Stops) -> Callable[[int], float]:
    """(update 1, 2, 3, ...) -> the part of the base rates: no curve, so that no two updates can be confused."""

    def rate_of(update: int) -> float:
        if update < 1:
            raise ValueError(f"rate_of was asked for update {update}; updates count from 1")
        return random.Random(run.seed * 1_000_003 + update).uniform(0.2, 0.9)

    return rate_of


def attempt_stops(answer: Callable, run: Stops) -> dict[str, Any]:
    rate_of, size, moved, log = rate_of_run(run), 0, False, []

    def fresh() -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": base} for base in run.bases])

    def tried(t: int) -> None:
        if t not in run.skipped:
            optimizer.step()
        step(t in run.skipped)

    optimizer = fresh()
    made = answer(optimizer, rate_of)
    if not isinstance(made, tuple | list) or len(made) != 3 or not all(map(callable, made)):
        return {"no functions": type(made).__name__}
    step, save, load = made
    for t in range(run.attempts):
        if t in run.stops:
            state = save()
            try:
                text = json.dumps(state)
            except (TypeError, ValueError, RecursionError) as error:
                return {"not plain": str(error)[:200]}
            size, of_optimizer = max(size, len(text)), optimizer.state_dict()
            for later in range(t, t + 3):  # the old process goes on for a moment
                tried(later)
            moved = moved or json.dumps(state) != text
            optimizer = fresh()
            if run.order == BEFORE:
                optimizer.load_state_dict(of_optimizer)
            step, save, load = answer(optimizer, rate_of)
            load(json.loads(text))
            if run.order == AFTER:
                optimizer.load_state_dict(of_optimizer)
        log += [as_number(group["lr"]) for group in optimizer.param_groups]
        tried(t)
    return {"log": log, "size": size, "moved": moved}


def never_stopped(run: Stops) -> list[float]:
    """The rates of a run that nobody interrupts: those of its updates, in order, and again where one was skipped."""
    return rates_at(run, [done_before(run, t) for t in range(run.attempts)])


def done_before(run: Stops, t: int, since: int = 0) -> int:
    """The number of updates among the attempts since, since + 1, ..., t - 1."""
    return sum(u not in run.skipped for u in range(since, t))


def rates_at(run: Stops, done: Sequence[int]) -> list[float]:
    rate_of = rate_of_run(run)
    return [base * rate_of(1 + number) for number in done for base in run.bases]


def noticed(run: Stops, t: int) -> list[int]:
    """The stops that show in the rates of an attempt; an optimizer that is loaded last keeps its old ones for one."""
    return [stop for stop in run.stops if stop < t or (stop == t and run.order != AFTER)]


def counts_from_the_stop(run: Stops) -> list[float]:
    return rates_at(run, [done_before(run, t, max(noticed(run, t), default=0)) for t in range(run.attempts)])


def loads_nothing(run: Stops) -> list[float]:
    """As before; and a loaded optimizer's rates pass for base rates, since those of before are not restored."""
    rate_of, bases, rates = rate_of_run(run), list(run.bases), []
    for t in range(run.attempts):
        if t in run.stops and run.order == BEFORE:
            old = max((stop for stop in run.stops if stop < t), default=0)
            bases = [base * rate_of(1 + done_before(run, t, old)) for base in bases]
        done = done_before(run, t, max(noticed(run, t), default=0))
        rates += [base * rate_of(1 + done) for base in bases]
    return rates


def began_anew(run: Stops, t: int) -> bool:
    """Whether there was no update yet since the last stop, if there was one."""
    return any(stop <= t and done_before(run, t, stop) == 0 for stop in run.stops)


def late_after_a_stop(run: Stops) -> list[float]:
    """Nothing is written by `load`, so up to the first update the rates are those with which the new process began."""
    rate_of, rates = rate_of_run(run), []
    for t in range(run.attempts):
        anew, now = began_anew(run, t) and run.order != AFTER, rate_of(1 + done_before(run, t))
        held = (now if run.order == BEFORE else 1.0) * rate_of(1)
        rates += [base * (held if anew else now) for base in run.bases]
    return rates


def late_by_an_update(run: Stops) -> list[float]:
    """Rates are set after an update only, to that update's own."""
    rate_of, rates = rate_of_run(run), []
    for t in range(run.attempts):
        done = done_before(run, t)
        plain = done == 0 or (run.order == ALONE and began_anew(run, t))
        rates += [base if plain else base * rate_of(done) for base in run.bases]
    return rates


def multiplied_again(run: Stops) -> list[float]:
    """Base rates are taken from an optimizer that has been loaded already."""
    rate_of, bases, rates = rate_of_run(run), list(run.bases), []
    for t in range(run.attempts):
        if t in run.stops and run.order == BEFORE:
            bases = [base * rate_of(1 + done_before(run, t)) for base in bases]
        rates += [base * rate_of(1 + done_before(run, t)) for base in bases]
    return rates


def stuck_after_a_stop(run: Stops) -> list[float]:
    """Rates are written into parameter groups that the optimizer has replaced."""
    stuck = run.order == AFTER
    return rates_at(
        run, [done_before(run, min(t, run.stops[0]) if stuck else t) for t in range(run.attempts)]
    )  # fmt: skip


def behind(run: Stops, t: int) -> int:
    """The updates done, one less for each stop before which there was one."""
    return done_before(run, t) - sum(done_before(run, stop) > 0 for stop in noticed(run, t))


STOP_MISTAKES = (
    Mistake(
        "rate moves on a skipped step",
        "The rate went on after an attempt that was skipped.",
        lambda run: rates_at(run, list(range(run.attempts))),
    ),
    Mistake(
        "rate moves only on a skipped step",
        "The rate moves when an attempt is skipped, and only then.",
        lambda run: rates_at(run, [t - done_before(run, t) for t in range(run.attempts)]),
    ),
    Mistake("state not restored", "After a stop the schedule begins again.", counts_from_the_stop),
    Mistake("state not restored", "After a stop the schedule begins again.", loads_nothing),
    Mistake(
        "the loaded rate comes late",
        "The first update after a stop did not have its rate yet: the optimizer was not told of it.",
        late_after_a_stop,
    ),
    Mistake(
        "each rate comes late",
        "The first update had the base rate, and each later one the rate of the update before it.",
        late_by_an_update,
    ),
    Mistake(
        "base rates from a loaded optimizer",
        "The optimizer's state had been loaded already, so the rates that stood in it were no base rates any more.",
        multiplied_again,
    ),
    Mistake(
        "parameter groups of before",
        "After the optimizer's own state was loaded the rates stood still: it had replaced its parameter groups.",
        stuck_after_a_stop,
    ),
    Mistake(
        "one step ahead after a stop",
        "Each stop leaves out one update's rate.",
        lambda run: rates_at(run, [done_before(run, t) + len(noticed(run, t)) for t in range(run.attempts)]),
    ),
    Mistake(
        "one step behind after a stop",
        "Each stop repeats one update's rate.",
        lambda run: rates_at(run, [behind(run, t) for t in range(run.attempts)]),
    ),
    Mistake(
        "one step ahead",
        "Each update has the rate of the next one.",
        lambda run: rates_at(run, [done_before(run, t) + 1 for t in range(run.attempts)]),
    ),
    Mistake(
        "no base rates",
        "All parameter groups have the same rate, whatever they were built with.",
        lambda run: never_stopped(run._replace(bases=(1.0,) * len(run.bases))),
    ),
)


def judge_stops(cases: Sequence[Stops], came: Sequence[Any]) -> str:
    for run, values in zip(cases, came, strict=True):
        if "no functions" in values:
            forgotten = " Is a `return` missing?" if values["no functions"] == "NoneType" else ""
            raise Wrong(f"Expected three functions, step, save and load; came a {values['no functions']}.{forgotten}")
        if "not plain" in values:
            raise Named("state not plain", f"With {run}: JSON does not take the saved state: {values['not plain']}.")
    for run, values in zip(cases, came, strict=True):
        if values["moved"]:
            raise Named(
                "the saved state goes on",
                f"With {run}: the state that was saved changed while the old process went on for a few attempts.",
            )
    logs = [values["log"] for values in came]
    judge_rates(cases, logs, never_stopped, STOP_MISTAKES, name_in_run)
    for run, values in zip(cases, came, strict=True):
        if values["size"] > MOST_CHARACTERS:
            raise Named(
                "state too large",
                f"With {run}: the state has {values['size']} characters in JSON, {MOST_CHARACTERS} are allowed. It "
                "must not grow with the length of the run.",
            )
    return (
        f"{len(cases)} runs with {sum(len(run.stops) for run in cases)} stops and "
        f"{sum(len(run.skipped) for run in cases)} overflows, all three orders of loading: every rate is that of a run "
        f"never stopped, and no state had more than {max(values['size'] for values in came)} characters."
    )


def name_in_run(run: Stops, place: int) -> str:
    t, group = divmod(place, len(run.bases))
    return f"attempt {t + 1}, parameter group {group},"


def on_error(kind: str, message: str) -> Named | None:
    if kind == "ValueError" and message.startswith("rate_of was asked for update 0"):
        return Named("asks for update 0", "It asked `rate_of` for update 0; updates count from 1.")
    return None


def rates_of_a_stopped_run(answer: Callable) -> dict[str, Any]:
    """Twelve attempts, the third and the seventh overflow, a stop after five: {what: {attempt: rate}} to draw."""
    run = Stops(12, (2, 6), (5,), AFTER, (1.0,), 132)
    came = attempt_stops(answer, run)
    if "log" not in came:
        return {}
    logs = {"never stopped": never_stopped(run), "stopped after 5": came["log"]}
    return {name: {t + 1: rate for t, rate in enumerate(rates)} for name, rates in logs.items()}


TASKS = (
    Task(
        unit="10",
        name="noam_rate",
        kind="rebuild",
        minutes=8,
        points=2,
        difficulty=1,
        cases=draw_sizes,
        attempt=attempt_sizes,
        judge=judge_sizes,
        look_at=(
            "the rate at step warm_up, computed from each of the two terms alone.",
            "what becomes of the peak if warm_up, d_model or factor is four times as large.",
        ),
        hints=(
            "Two curves, one rises with the step and one falls. At which step do they meet, and how high is each of "
            "them there?",
            "The fall is a power of the step alone; the rise is a straight line that must meet it at step warm_up, and "
            "that fixes its power of warm_up (../../notebooks/10_noam_warm_up.ipynb, 'Two halves and a peak').",
            "Compute the rise, the step times the warm-up to the power -3/2, and the fall, the step to the power -1/2. "
            "Take the smaller one. Multiply it by the factor and by the width of the model to the power -1/2.",
        ),
        instead=(Noam.get_lr,),
    ),
    Task(
        unit="10",
        name="cosine_rate",
        kind="transfer",
        minutes=15,
        points=3,
        difficulty=2,
        cases=draw_curves,
        attempt=attempt_curve,
        judge=judge_curves,
        look_at=(
            "the rate at the last step of the warm-up and at the one after it.",
            "the rate at the last step of all and at the one after it.",
        ),
        hints=(
            "Write down by hand what the rate is at steps warm_up, total and half-way between them. Which angles have "
            "a cosine of 1, 0 and -1?",
            "Half a period of a cosine, moved up and scaled so that it lies between two rates: Loshchilov and Hutter, "
            "2017, equation 5 (https://arxiv.org/abs/1608.03983), of one cycle only.",
            "In the warm-up the rate is the peak times the share of the warm-up that is done. After it compute which "
            "share of the fall is done, from 0 at step warm_up to 1 at step total, and never more than 1. One half of "
            "1 plus the cosine of pi times that share goes from 1 to 0; it is the weight of the peak, and what is left "
            "is the weight of the final rate.",
        ),
    ),
    Task(
        unit="10",
        name="resumable",
        kind="transfer",
        minutes=30,
        points=4,
        difficulty=3,
        cases=draw_stops,
        attempt=attempt_stops,
        judge=judge_stops,
        look_at=(
            "which rates stand in the optimizer right after `load`, before any step.",
            "what `optimizer.load_state_dict` does to the parameter groups, before and after your functions are made.",
        ),
        hints=(
            "List what your functions remember. Which of it would be another value in a fresh process, if the "
            "optimizer had been loaded before your functions were made?",
            "Lesson 10, 'Resume' (../../notebooks/10_noam_warm_up.ipynb), and what went wrong for others: "
            "https://github.com/pytorch/pytorch/issues/65342 and https://github.com/huggingface/nanotron/pull/256.",
            "Remember two things, the number of updates done and the base rate of each group, and write a helper that "
            "sets every group of the optimizer, asked for anew each time, to its base rate times rate_of(updates done "
            "+ 1). Call the helper at the beginning, after each update that was not skipped, and in load, after both "
            "things were taken from the state. Nothing that save has returned may change later.",
        ),
        on_error=on_error,
    ),
)
