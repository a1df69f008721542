"""Bars, lines, and a prediction beside its outcome; each with a sentence from the same data, for `plots.show`."""

import statistics
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from course_utils.plots import new_figure
from course_utils.predictions import Prediction

# Colours that colour-blind readers tell apart (Okabe and Ito, 2008); lines differ in dashes and markers too.
LINES = [
    ("#0072b2", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#009e73", ":", "^"),
    ("#000000", "-.", "D"),
    ("#cc79a7", "-", "x"),
]
BAR, YOURS = "#56b4e9", "#d55e00"


def in_figures(value: float) -> str:
    """Three figures, and never an exponent for a large number: 0.273, 12.3, 2,370."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def short(value: float, place: float | None = None) -> str:
    """For an axis: 0.5, 200, 64k, 4.2M. (`place` is what matplotlib hands to a formatter.)"""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def draw_bars(values: Mapping[str, float], unit: str, title: str = "") -> Figure:
    """One horizontal bar per name, its value written at its end. Raises a ValueError if there is none."""
    if not values:
        raise ValueError("there are no values to draw")
    figure, axes = new_figure(1.0 + 0.35 * len(values))
    bars = axes.barh(list(values), list(values.values()), color=BAR, edgecolor="#404040", height=0.6)
    axes.bar_label(bars, [in_figures(value) for value in values.values()], padding=3, fontsize=9)
    axes.xaxis.set_major_formatter(short)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=unit, title=title)
    return figure


def describe_bars(values: Mapping[str, float], unit: str, title: str = "") -> str:
    """`Weights of each block (bytes). head: 2,064; ...`"""
    named = "; ".join(f"{name}: {in_figures(value)}" for name, value in values.items())
    return f"{title or 'Bars'} ({unit}). {named}."


def draw_lines(
    series: Mapping[str, Mapping[float, float]],
    x: str,
    y: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One line per name through its points {x: y}, all points marked.

    Raises:
        ValueError: there is no line, or more than can be told apart.
    """
    if not 0 < len(series) <= len(LINES):
        raise ValueError(
            f"{len(series)} lines were given; there may be 1 to {len(LINES)}, so that they can be told apart"
        )
    figure, axes = new_figure(3.2)
    for (name, points), (color, dashes, marker) in zip(series.items(), LINES, strict=False):
        axes.plot(list(points), list(points.values()), color=color, linestyle=dashes, marker=marker, label=name)
    axes.set(xlabel=x, ylabel=y, title=title)
    places = sorted({place for points in series.values() for place in points})
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_x or len(places) <= 10:
        axes.set_xticks(places, [short(place) for place in places])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(short)
        axes.yaxis.set_minor_locator(NullLocator())
    elif all(value >= 0 for points in series.values() for value in points.values()):
        axes.set_ylim(bottom=0)  # a line that starts elsewhere looks steeper than it is
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def describe_lines(series: Mapping[str, Mapping[float, float]], x: str, y: str, title: str = "") -> str:
    """Each line in words: where it begins and where it ends."""
    parts = []
    for name, points in series.items():
        ends = [f"{in_figures(points[place])} at {x} {in_figures(place)}" for place in (min(points), max(points))]
        parts.append(f"{name}: {', '.join(ends)}")
    return f"{title or 'Lines'}, {y} over {x}. {'; '.join(parts)}."


def outcome(guess: Prediction) -> dict[str, float]:
    """{name: value} of what there is: your prediction, the formula's, the measurement."""
    found = {"your prediction": guess.value, "formula": guess.formula, "measured": guess.measured}
    return {name: value for name, value in found.items() if value is not None}


def draw_prediction(guess: Prediction) -> Figure:
    """Your prediction, the formula's and the measured value as bars; what there is not is left out."""
    figure = draw_bars(outcome(guess), guess.unit, guess.name)
    if guess.value is not None:
        figure.axes[0].patches[0].set(facecolor=YOURS, hatch="///")
    return figure


def describe_prediction(guess: Prediction) -> str:
    """`bubble, K=4, M=8: your prediction 0.3, formula 0.273, measured 0.281 (share of the total time).`"""
    named = ", ".join(f"{name} {in_figures(value)}" for name, value in outcome(guess).items())
    return f"{guess.name}: {named}{f' ({guess.unit})' * bool(guess.unit)}."


def settled(kept: Mapping[str, Mapping]) -> dict[str, tuple[float, float]]:
    """{name: (what you first expected, what was measured)}, of the predictions of `predictions.read` that have both.

    A value that was given after the outcome was known does not count, and no value that has no logarithm.
    """
    found = {}
    for name, fields in kept.items():
        expected, measured = fields.get("first"), fields.get("measured")
        if expected is not None and measured is not None and expected > 0 and measured > 0:
            found[name] = (expected, measured)
    return found


def draw_calibration(pairs: Mapping[str, tuple[float, float]]) -> Figure:
    """What you expected over what was measured, on two logarithmic axes; on the diagonal they are equal."""
    figure, axes = new_figure(4.0)
    values = [value for pair in pairs.values() for value in pair]
    ends = min(values, default=0.1) / 2, max(values, default=10.0) * 2
    axes.fill_between(ends, [end / 2 for end in ends], [end * 2 for end in ends], color="#e5e5e5", label="factor 2")
    axes.plot(ends, ends, color="#404040", linewidth=1, label="as measured")
    axes.plot([m for _, m in pairs.values()], [e for e, _ in pairs.values()], "o", color=YOURS, label="yours")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured", ylabel="expected")
    axes.set_title(f"Your {len(pairs)} predictions, each in its own unit")
    axes.legend(loc="upper left")
    return figure


def describe_calibration(pairs: Mapping[str, tuple[float, float]]) -> str:
    """How far off they were: half of them, and the farthest; or how to make some."""
    if not pairs:
        return (
            "No predictions are kept. Put numbers in place of None in the cells that call predict(...), in any lesson, "
            "run them before the experiment, and come back."
        )
    factors = {name: max(e / m, m / e) for name, (e, m) in pairs.items()}
    farthest = max(factors, key=lambda name: factors[name])
    within = sum(factor <= 2 for factor in factors.values())
    return (
        f"{len(pairs)} predictions: half of them were off by a factor of {statistics.median(factors.values()):.3g} or "
        f"less, {within} by no more than 2. The farthest, by a factor of {factors[farthest]:.3g}: {farthest}."
    )
