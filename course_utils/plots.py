"""Pictures that also say what they show, in a sentence computed from the same data.

Drawn on `Figure` objects, never through pyplot: nothing global is touched, so drawing works in any thread.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from course_utils.timeline import KINDS, Interval, Timeline

DPI = 96
FONT_SIZE = 8
# Sky blue and orange of Okabe and Ito (2008) are told apart by colour-blind readers, hatching without any colour.
STYLES: dict[str, dict[str, Any]] = {"F": {"facecolor": "#56b4e9"}, "B": {"facecolor": "#e69f00", "hatch": "///"}}
EDGE, IDLE = "#404040", "#eeeeee"


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure, 9 inches wide, and its axes."""
    figure = Figure(figsize=(9, height), dpi=DPI, layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def show(figure: Figure, says: str) -> None:
    """Print the sentence and show the picture, a white PNG, with the sentence as its text for those who cannot see it.

    Raises:
        ValueError: the sentence is empty.
    """
    if not says.strip():
        raise ValueError("says is empty; give the sentence that a reader needs who cannot see the picture")
    print(says)
    if not InteractiveShell.initialized():
        return  # a script or a test: nobody can look at pictures
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    # With a palette of 256 colours a picture takes a third of the room, and the version of matplotlib is left out.
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    png = base64.b64encode(small.getvalue()).decode()
    picture = {
        "image/png": png,
        "text/html": f'<img alt="{html.escape(says)}" src="data:image/png;base64,{png}">',
        "text/plain": says,
    }
    display(picture, raw=True, metadata={"image/png": {"alt": says}})


def draw_timeline(timeline: Timeline) -> Figure:
    """One lane per rank; boxes are named where there is room: F3, or 2F3 if a rank has several stages."""
    if timeline.makespan == 0:
        raise ValueError("the timeline has no length; there is nothing to draw")
    figure, axes = new_figure(1.3 + 0.4 * timeline.num_ranks)
    begin = min(timeline.start)
    for kind in KINDS:
        for rank in range(timeline.num_ranks):
            spans = [(i.start - begin, i.end - i.start) for i in timeline if (i.rank, i.kind) == (rank, kind)]
            axes.broken_barh(spans, (rank - 0.4, 0.8), edgecolor=EDGE, linewidth=0.8, **STYLES[kind])
    write_names(axes, timeline, begin)
    axes.set_yticks(range(timeline.num_ranks), [f"rank {rank}" for rank in range(timeline.num_ranks)])
    axes.set(xlim=(0, timeline.makespan), ylim=(timeline.num_ranks - 0.5, -0.5), facecolor=IDLE)
    axes.set(title=timeline.label, xlabel=timeline.unit)
    boxes = [Patch(edgecolor=EDGE, label=name, **STYLES[kind]) for kind, name in KINDS.items()]
    boxes.append(Patch(facecolor=IDLE, edgecolor=EDGE, label="idle"))
    figure.legend(handles=boxes, loc="outside right center", frameon=False, handleheight=1.5)
    return figure


def write_names(axes: Axes, timeline: Timeline, begin: float) -> None:
    """The names of all boxes that are wide enough for the longest name."""
    several = len(set(zip(timeline.rank, timeline.stage, strict=True))) > len(set(timeline.rank))

    def name(interval: Interval) -> str:
        return f"{interval.stage if several else ''}{interval.kind}{interval.micro_batch}"

    widest = max(len(name(interval)) for interval in timeline)
    points_per_unit = 0.75 * 9 * 72 / timeline.makespan  # the axes take about three quarters of the figure's width
    room = 0.7 * FONT_SIZE * widest / points_per_unit
    for interval in timeline:
        if interval.end - interval.start >= room:
            middle = (interval.start + interval.end) / 2 - begin
            text = axes.text(middle, interval.rank, name(interval), ha="center", va="center", fontsize=FONT_SIZE)
            text.set_bbox({"facecolor": STYLES[interval.kind]["facecolor"], "linewidth": 0, "pad": 1})


def describe_timeline(timeline: Timeline) -> str:
    """The picture in words: how long, how busy each rank is, how large the bubble."""
    if timeline.makespan == 0:
        return f"An empty timeline ({timeline.label})."
    busy = [f"{timeline.utilisation(rank):.0%}" for rank in range(timeline.num_ranks)]
    equal = len(set(busy)) == 1
    ranks = f"Every rank computes {busy[0]}" if equal else f"Ranks 0 to {len(busy) - 1} compute {', '.join(busy)}"
    return (
        f"Timeline ({timeline.label}). Ranks: {timeline.num_ranks}, micro-batches: {len(set(timeline.micro_batch))}, "
        f"makespan: {timeline.makespan:.6g} {timeline.unit}. "
        f"{ranks} of that time. The bubble is {timeline.bubble_of_total:.1%} of the total time, which is "
        f"{timeline.bubble_of_ideal:.1%} of the ideal time."
    )


def draw_curve(values: Sequence[float], name: str = "loss", log: bool = False, first_step: int = 1) -> Figure:
    """A quantity over the steps of a run, the axis linear or logarithmic. Values that are not finite leave gaps.

    Raises:
        ValueError: there are no values, or the axis is logarithmic and a value is not positive.
    """
    if not len(values):
        raise ValueError(f"there are no values of {name!r} to draw")
    bad = [value for value in values if log and value <= 0]
    if bad:
        raise ValueError(f"{name} has the value {bad[0]}; a logarithmic axis needs positive values, use log=False")
    figure, axes = new_figure(3)
    finite = [value if math.isfinite(value) else math.nan for value in values]
    marker = "." if len(values) < 30 else ""
    axes.plot(range(first_step, first_step + len(values)), finite, color="#0072b2", marker=marker)
    axes.set(xlabel="step", ylabel=name, yscale="log" if log else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure


def describe_curve(values: Sequence[float], name: str = "loss", first_step: int = 1) -> str:
    """The curve in words: where it begins and ends, and its lowest and highest point."""
    steps = {first_step + i: value for i, value in enumerate(values) if math.isfinite(value)}
    if not steps:
        return f"Curve of {name}: no finite values."
    lowest, highest = min(steps, key=lambda step: steps[step]), max(steps, key=lambda step: steps[step])
    lost = len(values) - len(steps)
    return (
        f"Curve of {name}: {values[0]:.3g} at step {first_step}, {values[-1]:.3g} at step "
        f"{first_step + len(values) - 1}; lowest {steps[lowest]:.3g} at step {lowest}, highest {steps[highest]:.3g} at "
        f"step {highest}." + (f" Values that are not finite: {lost}." if lost else "")
    )
