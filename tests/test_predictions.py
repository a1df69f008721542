"""What a reader expects is kept beside what came out, and drawn with it."""

import json

import pytest

from course_utils import course_map, predictions
from course_utils.charts import (
    LINES,
    describe_bars,
    describe_calibration,
    describe_lines,
    describe_prediction,
    draw_bars,
    draw_calibration,
    draw_lines,
    draw_prediction,
    settled,
)
from course_utils.predictions import predict, read


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "FILE", tmp_path / "my_work/predictions.json")
    return tmp_path / "my_work/predictions.json"


def test_without_a_value_everything_runs_and_nothing_is_kept(file, capsys):
    guess = predict("bubble", K=4, M=8, value=None)
    assert "no prediction" in capsys.readouterr().out
    guess.settle(measured=0.28, formula=3 / 11)
    assert not file.exists()
    assert describe_prediction(guess) == "bubble, K=4, M=8: formula 0.273, measured 0.28."
    assert len(draw_prediction(guess).axes[0].patches) == 2


def test_a_prediction_is_kept_with_its_outcome(capsys):
    predict("bubble", K=4, M=8, value=0.3, unit="share").settle(measured=0.28, formula=0.27)
    assert capsys.readouterr().out == "bubble, K=4, M=8: you predict 0.3 share.\n"
    (kept,) = read().values()
    wanted = {"value": 0.3, "first": 0.3, "measured": 0.28, "formula": 0.27, "situation": {"K": 4, "M": 8}}
    assert kept == wanted | {"quantity": "bubble", "unit": "share"}


def test_what_was_predicted_before_the_outcome_was_seen_stays():
    predict("bubble", K=2, value=0.5)
    predict("bubble", K=2, value=0.4).settle(measured=0.1)  # changed in time
    predict("bubble", K=2, value=0.1).settle(measured=0.11)
    (kept,) = read().values()
    assert (kept["first"], kept["value"], kept["measured"]) == (0.4, 0.1, 0.11)


def test_predictions_of_different_situations_are_different():
    predict("bubble", K=2, value=0.5)
    predict("bubble", K=4, value=0.5)
    assert sorted(read()) == ["bubble, K=2", "bubble, K=4"]


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), [1]])
def test_a_prediction_is_a_number(value):
    with pytest.raises(ValueError, match="must be a number"):
        predict("bubble", value=value)
    with pytest.raises(ValueError, match="measured is"):
        predict("bubble").settle(measured=value)


@pytest.mark.parametrize("damage", ["", "[]", "{"])
def test_a_damaged_file_is_begun_anew(file, damage):
    file.parent.mkdir()
    file.write_text(damage)
    assert read() == {}
    predict("bubble", value=1)
    assert list(json.loads(file.read_text())) == ["bubble"]


def test_a_folder_that_cannot_be_written_stops_no_lesson(file, capsys):
    file.parent.write_text("a file where the folder should be")
    predict("bubble", value=1).settle(measured=2)
    assert "not kept" in capsys.readouterr().out


def test_the_picture_marks_the_readers_own_bar():
    guess = predict("bubble", K=4, value=0.3, unit="share").settle(measured=0.28)
    axes = draw_prediction(guess).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["your prediction", "measured"]
    assert axes.patches[0].get_hatch() and not axes.patches[1].get_hatch()
    assert [patch.get_width() for patch in axes.patches] == [0.3, 0.28] and axes.get_xlabel() == "share"


def test_bars_and_lines_say_what_they_show():
    assert describe_bars({"a": 1, "b": 2}, "bytes", "Weights") == "Weights (bytes). a: 1; b: 2."
    series = {"measured": {1: 0.5, 8: 0.125}, "formula": {1: 0.5, 8: 1 / 9}}
    assert describe_lines(series, "M", "bubble").endswith("formula: 0.5 at M 1, 0.111 at M 8.")
    axes = draw_lines(series, "M", "bubble", log_x=True, log_y=True).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8"]
    for too_many in ({}, {str(i): {1: 1} for i in range(len(LINES) + 1)}):
        with pytest.raises(ValueError, match="lines were given"):
            draw_lines(too_many, "x", "y")
    with pytest.raises(ValueError, match="no values"):
        draw_bars({}, "x")


def test_the_map_marks_one_lesson(capsys):
    boxes = course_map.draw_map("05").axes[0].patches
    strong = [box.get_linewidth() > 2 for box in boxes]
    assert len(boxes) == 13 and strong.index(True) == 5 and sum(strong) == 1
    course_map.where("00")
    assert capsys.readouterr().out.startswith("Lesson 00 of 00 to 12, Start here. It adds:")
    with pytest.raises(ValueError, match="no lesson '13'"):
        course_map.where("13")


def test_numbers_on_pictures_have_no_exponents():
    assert describe_bars({"a": 2370.4, "b": 0.27272}, "kB") == "Bars (kB). a: 2,370; b: 0.273."
    axes = draw_lines({"a": {4: 40.0, 4**11: 5000.0}}, "bytes", "µs", log_x=True, log_y=True).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "4.19M"]
    axes.figure.draw_without_rendering()
    assert {"50", "100", "200", "1k", "2k"} <= {tick.get_text() for tick in axes.get_yticklabels()}
    assert draw_bars({"a": 4e6}, "bytes").axes[0].texts[0].get_text() == "4,000,000"


def test_lines_of_what_cannot_be_negative_begin_at_zero():
    assert draw_lines({"a": {1: 70.0, 2: 90.0}}, "M", "ms").axes[0].get_ylim()[0] == 0
    assert draw_lines({"a": {1: -1.0, 2: 90.0}}, "M", "ms").axes[0].get_ylim()[0] < 0


# --- Over the whole course -------------------------------------------------------------------------------------------


def test_what_was_expected_first_is_compared_with_what_was_measured(capsys):
    for name, value, measured in [
        ("a", 0.3, 0.2),
        ("b", 4.0, 2.0),
        ("c", 10.0, 1.0),
        ("d", None, 5.0),
        ("e", 0.0, 1.0),
    ]:
        predict(name, value=value).settle(measured=measured)
    predict("a", value=0.2).settle(measured=0.2)  # once more, with the outcome known
    predict("never run", value=3.0)
    pairs = settled(read())
    assert pairs == {"a": (0.3, 0.2), "b": (4.0, 2.0), "c": (10.0, 1.0)}
    assert describe_calibration(pairs) == (
        "3 predictions: half of them were off by a factor of 2 or less, 2 by no more than 2. The farthest, by a factor "
        "of 10: c."
    )
    points = draw_calibration(pairs).axes[0].lines[-1]
    assert list(points.get_xdata()) == [0.2, 2.0, 1.0] and list(points.get_ydata()) == [0.3, 4.0, 10.0]


def test_without_predictions_it_says_how_to_make_some():
    assert "Put numbers in place of None" in describe_calibration({})
    assert "Your 0 predictions" in draw_calibration({}).axes[0].get_title()
