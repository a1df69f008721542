"""Pictures: white, the same each time, readable without colour, and told in a sentence. What is drawn is measured."""

import base64
import io
import itertools
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from course_utils import plots
from course_utils.plots import describe_curve, describe_timeline, draw_curve, draw_timeline, draw_timelines, show
from course_utils.schedules import gpipe, looped, naive, one_f_one_b, rematerialise
from course_utils.simulation import simulate
from course_utils.timeline import COMPUTE, KINDS, Interval, Timeline
from tests.test_timeline import a_million, recorded, with_everything


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What a notebook would be given to display: (data, metadata)."""
    shown: list[tuple[dict, dict]] = []
    monkeypatch.setattr(plots.InteractiveShell, "initialized", lambda: True)
    monkeypatch.setattr(plots, "display", lambda data, raw, metadata: shown.append((data, metadata)))
    return shown


def test_a_picture_says_itself(notebook: list, capsys: pytest.CaptureFixture) -> None:
    says = 'Loss < 1 & "falling".'
    show(draw_curve([3, 2, 1]), says=says)
    ((data, metadata),) = notebook
    assert capsys.readouterr().out == says + "\n"
    assert data["text/plain"] == says
    assert metadata == {"image/png": {"alt": says}}
    assert data["text/html"].startswith('<img alt="Loss &lt; 1 &amp; &quot;falling&quot;." src="data:image/png;base64,')
    assert data["image/png"] in data["text/html"]


def test_a_picture_is_white_and_the_same_each_time(notebook: list) -> None:
    for _ in range(2):
        show(draw_timeline(simulate(gpipe(2, 2))), says="two ranks")
    first, second = (base64.b64decode(data["image/png"]) for data, _ in notebook)
    assert first == second
    assert b"Software" not in first and b"matplotlib" not in first.lower()
    pixels = imread(io.BytesIO(first))
    assert pixels.shape[1] == 9 * 96
    assert np.all(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1.0)  # white corners
    assert pixels.shape[2] == 3 or np.all(pixels[..., 3] == 1.0)  # nothing transparent
    assert len(first) < 25_000


def test_a_figure_made_elsewhere_becomes_white_and_is_laid_out(notebook: list) -> None:
    figure = Figure(figsize=(2, 1), facecolor="black")
    figure.add_subplot()
    show(figure, says="nothing")
    assert np.all(imread(io.BytesIO(base64.b64decode(notebook[0][0]["image/png"])))[0, 0] == 1.0)
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"


def test_without_a_notebook_only_the_sentence_is_printed(capsys: pytest.CaptureFixture) -> None:
    show(draw_curve([1.0]), says="one value")
    assert capsys.readouterr().out == "one value\n"


def test_a_long_sentence_is_broken_between_words(capsys: pytest.CaptureFixture) -> None:
    says = " ".join(["bubble"] * 40)
    show(draw_curve([1.0]), says=says)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines) == says and max(map(len, lines)) <= 100


@pytest.mark.parametrize("says", ["", "  \n"])
def test_a_picture_without_a_sentence(says: str) -> None:
    with pytest.raises(ValueError, match="says is empty"):
        show(draw_curve([1.0]), says=says)


def test_pyplot_is_not_used() -> None:
    program = """if True:
        import sys
        from course_utils.plots import draw_curve
        draw_curve([1, 2])
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- Timelines --------------------------------------------------------------------------------------------------


def boxes_of(figure: Figure, number: int = 0) -> dict[tuple[float, float, float], PolyCollection]:
    """{(middle of the lane, start, end): the collection that holds the box}, of one picture of a figure"""
    found = {}
    for collection in figure.axes[number].collections:
        assert isinstance(collection, PolyCollection)
        for path in collection.get_paths():
            (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            found[round((low + high) / 2, 6), round(left, 6), round(right, 6)] = collection
    return found


def zero_based(timeline: Timeline) -> list[Interval]:
    first = min(timeline.start)
    return [interval._replace(start=interval.start - first, end=interval.end - first) for interval in timeline]


@pytest.mark.parametrize("timeline", [simulate(one_f_one_b(3, 4), 1, 2, 0.5), recorded(), with_everything()])
def test_each_interval_is_a_box_in_the_lane_of_its_rank(timeline: Timeline) -> None:
    boxes = boxes_of(draw_timeline(timeline))
    assert set(boxes) == {(i.rank, i.start, i.end) for i in zero_based(timeline)}
    for interval in zero_based(timeline):
        box, style = boxes[interval.rank, interval.start, interval.end], plots.STYLES[interval.kind]
        assert box.get_hatch() == style.get("hatch")
        assert tuple(box.get_facecolor()[0][:3]) == to_rgb(style["facecolor"])


def test_the_clock_of_the_picture_starts_at_zero() -> None:
    timeline = Timeline(1, "made by hand", unit="s")
    timeline.add(0, "F", 0, 0, 1000.0, 1001.0)
    timeline.add(0, "B", 0, 0, 1002.0, 1004.0)
    assert set(boxes_of(draw_timeline(timeline))) == {(0, 0, 1), (0, 2, 4)}


def test_lanes_label_and_legend() -> None:
    figure = draw_timeline(simulate(gpipe(3, 2), transfer=0.25))
    (axes,) = figure.axes
    assert axes.get_title() == "simulated: forward 1, backward 1, transfer 0.25"
    assert axes.get_xlabel() == "units of time"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1", "rank 2"]
    low, high = axes.get_ylim()
    assert low > high  # rank 0 is on top
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "backward", "idle"]
    assert [bool(patch.get_hatch()) for patch in figure.legends[0].get_patches()] == [False, True, False]


def lightness(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_can_be_read_on_their_boxes() -> None:
    for kind in COMPUTE:
        assert (lightness(plots.STYLES[kind]["facecolor"]) + 0.05) / 0.05 > 7  # black text


def test_kinds_are_told_apart_without_colour() -> None:
    """By their hatching, or by being light or dark."""
    looks = [(style.get("hatch"), lightness(style["facecolor"]) > 0.2) for style in plots.STYLES.values()]
    assert list(plots.STYLES) == list(KINDS) and len(set(looks)) == len(KINDS)


def test_the_legend_has_what_occurs() -> None:
    def legend(*timelines: Timeline) -> list[str]:
        return [text.get_text() for text in draw_timelines(timelines).legends[0].get_texts()]

    busy = simulate(gpipe(1, 2))
    assert legend(busy) == ["forward", "backward"]
    assert legend(simulate(rematerialise(gpipe(1, 2), "always"))) == ["forward", "backward", "recompute"]
    assert legend(with_everything()) == [*KINDS.values(), "idle"]
    assert legend(busy, recorded()) == ["forward", "backward", "idle"]


def test_timelines_below_each_other() -> None:
    """With one unit they have one scale, and the shorter one is not idle after its end."""
    long, short = recorded(), simulate(gpipe(3, 1))
    short.unit = long.unit
    figure = draw_timelines([long, short])
    assert [axes.get_title() for axes in figure.axes] == ["made by hand", short.label]
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 8), (0, 8)]
    assert set(boxes_of(figure, 1)) == {(i.rank, i.start, i.end) for i in short}
    for axes, timeline in zip(figure.axes, [long, short], strict=True):
        assert [patch.get_x() + patch.get_width() for patch in axes.patches] == [timeline.makespan] * timeline.num_ranks
    short.unit = "units of time"
    figure = draw_timelines([long, short, long])
    assert [axes.get_xlim()[1] for axes in figure.axes] == [8, short.makespan, 8]
    assert [axes.get_xlabel() for axes in figure.axes] == ["s", "units of time", "s"]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_timelines([])


# --- Many intervals ---------------------------------------------------------------------------------------------


def heights(figure: Figure, rank: int) -> dict[tuple, list[float]]:
    """For each look the height of its outline in this lane, column by column."""
    found, bottom = {}, rank + 0.4
    for collection in figure.axes[0].collections:
        for path in collection.get_paths():
            corners = path.vertices[:-1]
            down, up = np.split(corners[:, 1], 2)
            if rank - 0.5 < down[0] <= rank + 0.5:
                look = (collection.get_hatch(), tuple(collection.get_facecolor()[0][:3]))
                found[look] = (down - up[::-1])[::2].tolist()
                assert down == pytest.approx(bottom)  # each stands on the one before
                bottom = up[::-1]
    return found


def look(kind: str) -> tuple:
    return plots.STYLES[kind].get("hatch"), to_rgb(plots.STYLES[kind]["facecolor"])


def test_more_intervals_than_can_be_seen_are_drawn_as_shares_of_the_time() -> None:
    timeline = simulate(rematerialise(gpipe(2, 1600), "except_last"), [3, 1], [1, 5])
    assert len(timeline) > plots.MANY
    figure = draw_timeline(timeline)
    edges = np.linspace(0, timeline.makespan, plots.COLUMNS + 1)
    for rank in range(2):
        found = heights(figure, rank)
        assert set(found) == {look(kind) for kind in "FBR"}
        for kind in "FBR":
            mine = [i for i in timeline if (i.rank, i.kind) == (rank, kind)]
            for column in (0, 1, 37, 80, 120, 159):
                low, high = edges[column : column + 2]
                inside = sum(max(0.0, min(i.end, high) - max(i.start, low)) for i in mine)
                assert found[look(kind)][column] == pytest.approx(0.8 * inside / (high - low), abs=1e-6)
    assert figure.axes[0].get_xlabel() == "units of time (heights: shares of the time)"
    assert not figure.axes[0].texts


def test_narrow_boxes_are_drawn_as_shares_and_wide_ones_are_not() -> None:
    def is_in_shares(*timelines: Timeline) -> bool:
        return "shares" in draw_timelines(timelines).axes[0].get_xlabel()

    assert not is_in_shares(simulate(one_f_one_b(8, 32))) and is_in_shares(simulate(naive(4, 200)))
    measured = simulate(gpipe(2, 10))
    for i in range(100):  # short waits and sends do not count
        measured.add(0, "ws"[i % 2], 0, 0, 50 + i / 1000, 50 + (i + 1) / 1000)
    assert not is_in_shares(measured)
    assert is_in_shares(a_million(num_ranks=60, num_intervals=6000))  # wide, but too many
    short = simulate(gpipe(1, 10), 0.001, 0.001)
    assert is_in_shares(short, measured) and not is_in_shares(short)  # beside a long one it is only a dot


def test_thin_boxes_have_no_edges() -> None:
    timeline = Timeline(1, "made by hand")
    for kind, start, end in (("F", 0, 10), ("F", 10, 10.01), ("s", 10.01, 20), ("F", 20, 40)):
        timeline.add(0, kind, 0, 0, start, end)
    forward, send = draw_timeline(timeline).axes[0].collections
    assert [bool(width) for width in forward.get_linewidths()] == [True, False, True]
    assert not any(send.get_linewidths())


def test_a_million_intervals_are_drawn_and_told() -> None:
    """Usually within 1.5 s; the limit says that it hung."""
    timeline, started = a_million(), time.perf_counter()
    figure = draw_timeline(timeline)
    FigureCanvasAgg(figure).draw()
    assert "micro-batches: 125000" in describe_timeline(timeline)
    assert time.perf_counter() - started < 20
    assert sum(len(collection.get_paths()) for collection in figure.axes[0].collections) == 5 * 8
    shares = list(itertools.chain.from_iterable(heights(figure, 7).values()))
    assert shares == pytest.approx([0.8 * 0.9 / 5] * len(shares), rel=0.01)


@pytest.mark.parametrize(
    "timeline",
    [
        simulate(one_f_one_b(4, 8)),
        simulate(one_f_one_b(2, 16), 1, 2),
        simulate(looped(2, 2, 4), 1, 2, 0.5),
        simulate(gpipe(3, 4), [1, 4, 1], [2, 8, 2]),
        simulate(gpipe(8, 12), 1, 3),
    ],
)
def test_names_fit_into_their_boxes(timeline: Timeline) -> None:
    figure = draw_timeline(timeline)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    pixels_per_unit = axes.bbox.width / timeline.makespan
    lengths = {(i.rank, (i.start + i.end) / 2): i.end - i.start for i in timeline}
    assert axes.texts
    for text in axes.texts:
        middle, rank = text.get_position()
        assert text.get_window_extent().width <= lengths[rank, middle] * pixels_per_unit


def test_names_only_where_there_is_room() -> None:
    def names(timeline: Timeline) -> list[str]:
        return sorted(text.get_text() for text in draw_timeline(timeline).axes[0].texts)

    assert names(simulate(gpipe(1, 2))) == ["B0", "B1", "F0", "F1"]
    assert names(simulate(gpipe(8, 32))) == []
    assert names(with_everything()) == ["B0", "B0", "F0", "F0", "R0"]  # not where a rank waits
    assert names(simulate(looped(1, 2, 1))) == ["0B0", "0F0", "1B0", "1F0"]
    assert set(name[0] for name in names(simulate(gpipe(4, 16), 1, 3))) == {"B"}


def test_the_sentence_of_a_timeline() -> None:
    assert describe_timeline(simulate(one_f_one_b(4, 8), 1, 2)) == (
        "Timeline (simulated: forward 1, backward 2, transfer 0). "
        "Ranks: 4, micro-batches: 8, makespan: 33 units of time. Every rank computes 73% of that time. "
        "The bubble is 27.3% of the total time, which is 37.5% of the ideal time."
    )
    sentence = describe_timeline(simulate(gpipe(2, 2), [1, 2], [1, 2]))
    assert "makespan: 10 units of time. Ranks 0 to 1 compute 40%, 80% of that time." in sentence


def test_the_sentence_of_a_recording() -> None:
    assert describe_timeline(with_everything()) == (
        "Timeline (made by hand). Ranks: 2, micro-batches: 1, makespan: 16 s. Ranks 0 to 1 compute 50%, 38% of that "
        "time. Of the time of all ranks: recompute 6.2%, wait for a neighbour 32.8%, send 2.3%. "
        "The bubble is 56.2% of the total time, which is 128.6% of the ideal time."
    )
    waiting = Timeline(1, "made by hand")
    waiting.add(0, "w", 0, 0, 0.0, 2.0)
    assert describe_timeline(waiting).endswith(
        "computes 0% of that time. Of the time of all ranks: wait for a neighbour 100.0%."
    )


def test_an_empty_timeline_is_told_but_not_drawn() -> None:
    timeline = Timeline(2, "made by hand")
    assert describe_timeline(timeline) == "An empty timeline (made by hand)."
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_timeline(timeline)


# --- Curves -----------------------------------------------------------------------------------------------------


def test_a_curve() -> None:
    (axes,) = draw_curve([4.0, 2.0, 1.0], name="learning rate", log=True, first_step=10).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [10, 11, 12] and list(line.get_ydata()) == [4, 2, 1]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "learning rate", "log")
    assert draw_curve([1.0]).axes[0].get_yscale() == "linear"


def test_the_sentence_of_a_curve() -> None:
    assert describe_curve([2.5, 0.1234, 3.0, 1.0], first_step=5) == (
        "Curve of loss: 2.5 at step 5, 1 at step 8; lowest 0.123 at step 6, highest 3 at step 7."
    )


def test_values_that_are_not_finite_leave_gaps() -> None:
    values = [1.0, float("nan"), 0.5, float("inf")]
    line = draw_curve(values, log=True).axes[0].lines[0]
    assert [bool(np.isfinite(value)) for value in line.get_ydata()] == [True, False, True, False]
    sentence = describe_curve(values)
    assert "highest 1 at step 1" in sentence and sentence.endswith("Values that are not finite: 2.")
    assert describe_curve([float("nan")]) == "Curve of loss: no finite values."


def test_curves_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no values of 'loss'"):
        draw_curve([])
    with pytest.raises(
        ValueError, match=re.escape("loss has the value -0.5; a logarithmic axis needs positive values")
    ):
        draw_curve([1.0, -0.5], log=True)
