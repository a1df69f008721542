"""Pictures that also say what they show, in a sentence computed from the same data.

Drawn on `Figure` objects, never through pyplot: nothing global is touched, so drawing works in any thread.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from course_utils._lines import in_lines
from course_utils.timeline import COMPUTE, KINDS, Interval, Timeline

DPI = 96
FONT_SIZE = 8
# Sky blue, orange and yellow (Okabe and Ito, 2008) are told apart by colour-blind readers, hatching without any colour.
STYLES: dict[str, dict[str, Any]] = {
    "F": {"facecolor": "#56b4e9"},
    "B": {"facecolor": "#e69f00", "hatch": "///"},
    "R": {"facecolor": "#f0e442", "hatch": "xxx"},
    "w": {"facecolor": "#ffffff", "hatch": "..."},
    "s": {"facecolor": "#404040"},
}
EDGE, IDLE = "#404040", "#eeeeee"
LANE = 0.8  # of the distance between two lanes is filled
MANY = 5000  # intervals that are drawn one by one at most
COLUMNS = 160  # in which the shares of the time are shown if there are more
PIXELS = 650  # about so many the axes are wide


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
    print(in_lines(says))
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
    return draw_timelines([timeline])


def draw_timelines(timelines: Sequence[Timeline]) -> Figure:
    """Timelines one below the other, for example a measured and a simulated one, each from its own first start.

    If they have one unit they have one scale, so that lengths can be compared. A timeline with more intervals than can
    be told apart is cut into COLUMNS pieces of time, and heights show what share of each piece was spent on what.

    Raises:
        ValueError: there is no timeline, or one without length.
    """
    if not timelines or any(timeline.makespan == 0 for timeline in timelines):
        raise ValueError("the timeline has no length; there is nothing to draw")
    num_lanes = [timeline.num_ranks for timeline in timelines]
    figure = Figure(
        figsize=(9, 1.3 * len(timelines) + 0.4 * sum(num_lanes)), dpi=DPI, layout="constrained", facecolor="white"
    )
    all_axes = figure.subplots(len(timelines), 1, squeeze=False, height_ratios=[1 + lanes for lanes in num_lanes])
    same_scale = len({timeline.unit for timeline in timelines}) == 1
    for axes, timeline in zip(all_axes[:, 0], timelines, strict=True):
        longest = max(other.makespan for other in timelines) if same_scale else timeline.makespan
        draw_lanes(axes, timeline, longest)
    legend = [
        Patch(edgecolor=EDGE, label=name, **STYLES[kind])
        for kind, name in KINDS.items()
        if any(ord(kind) in timeline.kind for timeline in timelines)
    ]
    if any(shows_idle_time(timeline) for timeline in timelines):
        legend.append(Patch(facecolor=IDLE, edgecolor=EDGE, label="idle"))
    figure.legend(handles=legend, loc="outside right center", frameon=False, handleheight=1.5)
    return figure


def draw_lanes(axes: Axes, timeline: Timeline, longest: float) -> None:
    """The lanes of one timeline, on axes from 0 to `longest`."""
    lengths = (np.array(timeline.end) - np.array(timeline.start)) * PIXELS / longest
    computing = lengths[np.isin(timeline.kind, [ord(kind) for kind in COMPUTE])]
    many = len(timeline) > MANY or (len(computing) > 0 and np.median(computing) < 1)
    for rank in range(timeline.num_ranks):
        axes.add_patch(Rectangle((0, rank - LANE / 2), timeline.makespan, LANE, facecolor=IDLE))
    for kind, corners in (shares(timeline) if many else boxes(timeline)).items():
        # An edge would hide what is thin.
        has_edge = lengths[np.array(timeline.kind) == ord(kind)] > 4 if kind in COMPUTE and not many else [False]
        edges = np.where(has_edge, 0.8, 0.0).tolist()
        axes.add_collection(PolyCollection(corners, edgecolor=EDGE, linewidth=edges, **STYLES[kind]), autolim=False)
    axes.set_yticks(range(timeline.num_ranks), [f"rank {rank}" for rank in range(timeline.num_ranks)])
    axes.set(xlim=(0, longest), ylim=(timeline.num_ranks - 0.5, -0.5), title=timeline.label)
    axes.set_xlabel(f"{timeline.unit} (heights: shares of the time)" if many else timeline.unit)
    if not many:
        write_names(axes, timeline, longest)


def boxes(timeline: Timeline) -> dict[str, list[np.ndarray]]:
    """For each kind that occurs the corners, (4, 2), of one box per interval."""
    left, right = np.array(timeline.start), np.array(timeline.end)
    left, right = left - left.min(), right - left.min()
    top, bottom = np.array(timeline.rank) - LANE / 2, np.array(timeline.rank) + LANE / 2
    x, y = np.stack([left, left, right, right], axis=1), np.stack([top, bottom, bottom, top], axis=1)
    corners, kinds = np.stack([x, y], axis=2), np.array(timeline.kind)
    return {kind: list(corners[kinds == ord(kind)]) for kind in KINDS if ord(kind) in timeline.kind}


def shares(timeline: Timeline) -> dict[str, list[np.ndarray]]:
    """For each kind that occurs one outline per rank, (corners, 2), of its share of the time in each of COLUMNS.

    The kinds are stacked from the bottom of the lane upwards, in the order of KINDS; what is left on top is idle.
    """
    edges = np.linspace(0, timeline.makespan, COLUMNS + 1)
    key = np.array(timeline.rank) * 256 + np.array(timeline.kind)
    order = np.lexsort((timeline.start, key))
    first = min(timeline.start)
    start, end = np.array(timeline.start)[order] - first, np.array(timeline.end)[order] - first
    outlines: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS if ord(kind) in timeline.kind}
    for rank in range(timeline.num_ranks):
        bottom = np.full(COLUMNS, rank + LANE / 2)
        for kind in outlines:
            mine = slice(*np.searchsorted(key[order], [rank * 256 + ord(kind), rank * 256 + ord(kind) + 1]))
            # How much of this kind there was up to any moment grows inside its intervals, and there alone.
            moments = np.stack([start[mine], end[mine]], axis=1).ravel()
            passed = np.cumsum(end[mine] - start[mine])
            so_far = np.stack([passed - (end[mine] - start[mine]), passed], axis=1).ravel()
            if len(moments):
                top = bottom - LANE * np.diff(np.interp(edges, moments, so_far)) / np.diff(edges)
                x, down, up = edges.repeat(2)[1:-1], bottom.repeat(2), top.repeat(2)
                outlines[kind].append(np.stack([np.r_[x, x[::-1]], np.r_[down, up[::-1]]], axis=1))
                bottom = top
    return outlines


def shows_idle_time(timeline: Timeline) -> bool:
    """Whether so much time is not covered by any interval that it can be seen."""
    uncovered = timeline.num_ranks * timeline.makespan - timeline.time_in("".join(KINDS))
    return uncovered > timeline.makespan / PIXELS


def write_names(axes: Axes, timeline: Timeline, longest: float) -> None:
    """The names of all boxes of computing that are wide enough for the longest name."""
    several = len(set(zip(timeline.rank, timeline.stage, strict=True))) > len(set(timeline.rank))
    begin = min(timeline.start)

    def name(interval: Interval) -> str:
        return f"{interval.stage if several else ''}{interval.kind}{interval.micro_batch}"

    computing = [interval for interval in timeline if interval.kind in COMPUTE]
    widest = max((len(name(interval)) for interval in computing), default=0)
    points_per_unit = 0.75 * 9 * 72 / longest  # the axes take about three quarters of the figure's width
    room = 0.7 * FONT_SIZE * widest / points_per_unit
    for interval in computing:
        if interval.end - interval.start >= room:
            middle = (interval.start + interval.end) / 2 - begin
            text = axes.text(middle, interval.rank, name(interval), ha="center", va="center", fontsize=FONT_SIZE)
            text.set_bbox({"facecolor": STYLES[interval.kind]["facecolor"], "linewidth": 0, "pad": 1})


def describe_timeline(timeline: Timeline, with_bubble: bool = True) -> str:
    """The picture in words: how long, how busy each rank is, and, if it is wanted, how large the bubble."""
    if timeline.makespan == 0:
        return f"An empty timeline ({timeline.label})."
    start = (
        f"Timeline ({timeline.label}). Ranks: {timeline.num_ranks}, micro-batches: {len(set(timeline.micro_batch))}, "
        f"makespan: {timeline.makespan:.6g} {timeline.unit}. "
    )
    busy = [f"{timeline.utilisation(rank):.0%}" for rank in range(timeline.num_ranks)]
    equal = len(set(busy)) == 1
    ranks = f"Every rank computes {busy[0]}" if equal else f"Ranks 0 to {len(busy) - 1} compute {', '.join(busy)}"
    all_time = timeline.num_ranks * timeline.makespan
    other = [f"{KINDS[kind]} {timeline.time_in(kind) / all_time:.1%}" for kind in "Rws" if ord(kind) in timeline.kind]
    also = f"Of the time of all ranks: {', '.join(other)}. " if other else ""
    if timeline.idle() == all_time or not with_bubble:
        return f"{start}{ranks} of that time. {also}".rstrip()
    return (
        f"{start}{ranks} of that time. {also}"
        f"The bubble is {timeline.bubble_of_total:.1%} of the total time, which is "
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
