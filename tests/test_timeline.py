"""Timelines: what is computed from their columns, against sums over their intervals; and recordings put together."""

import math
import pickle
import random
import time
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils.schedules import gpipe
from course_utils.simulation import simulate
from course_utils.timeline import COMPUTE, KINDS, OTHER, Interval, Timeline, merge


def recorded() -> Timeline:
    """Two ranks on a clock that does not start at zero."""
    timeline = Timeline(2, "made by hand", unit="s")
    timeline.add(0, "F", 0, 0, 100.0, 101.0)
    timeline.add(1, "F", 1, 0, 101.0, 102.0)
    timeline.add(1, "B", 1, 0, 102.0, 104.0)
    timeline.add(0, "B", 0, 0, 106.0, 108.0)
    return timeline


def with_everything() -> Timeline:
    """Two ranks that also wait, send and recompute, from 10 to 26."""
    timeline = Timeline(2, "made by hand", unit="s")
    timeline.add(0, "F", 0, 0, 11.0, 13.0)
    timeline.add(0, "s", 0, 0, 13.0, 13.5)
    timeline.add(0, "R", 0, 0, 13.5, 15.5)
    timeline.add(0, "w", 0, 0, 15.5, 22.0)
    timeline.add(0, "B", 0, 0, 22.0, 26.0)
    timeline.add(1, "w", 1, 0, 10.0, 14.0)
    timeline.add(1, "F", 1, 0, 14.0, 16.0)
    timeline.add(1, "B", 1, 0, 17.0, 21.0)
    timeline.add(1, "s", 1, 0, 21.0, 21.25)
    return timeline


def test_the_letters() -> None:
    assert list(KINDS) == list("FBRws") and KINDS == COMPUTE | OTHER
    assert all(letter.isupper() for letter in COMPUTE) and all(letter.islower() for letter in OTHER)


def test_what_a_timeline_tells() -> None:
    timeline = recorded()
    assert len(timeline) == 4
    assert list(timeline)[2] == Interval(1, "B", 1, 0, 102.0, 104.0)
    assert timeline.makespan == 8
    assert [timeline.busy(rank) for rank in (0, 1)] == [3, 3]
    assert [timeline.utilisation(rank) for rank in (0, 1)] == [3 / 8, 3 / 8]
    assert timeline.bubble_of_total == 10 / 16
    assert timeline.bubble_of_ideal == 10 / 6
    assert timeline.efficiency == 6 / 16


def test_only_computing_is_busy_and_everything_is_in_the_makespan() -> None:
    timeline = with_everything()
    assert timeline.makespan == 16
    assert [timeline.busy(rank) for rank in (0, 1)] == [8, 6]
    assert [timeline.utilisation(rank) for rank in (0, 1)] == [8 / 16, 6 / 16]
    assert timeline.idle() == 32 - 14
    assert timeline.bubble_of_total == 18 / 32 and timeline.bubble_of_ideal == 18 / 14
    assert timeline.efficiency == 12 / 32  # without the recomputation
    assert [timeline.time_in("w"), timeline.time_in("s"), timeline.time_in("ws", 0)] == [10.5, 0.75, 7]


def test_the_two_conventions_for_the_bubble() -> None:
    timeline = simulate(gpipe(4, 16))
    assert (timeline.bubble_of_total, timeline.bubble_of_ideal) == (3 / 19, 3 / 16)
    assert timeline.efficiency == 16 / 19


def test_a_rank_that_is_idle_counts() -> None:
    timeline = Timeline(2, "made by hand")
    timeline.add(0, "F", 0, 0, 0.0, 1.0)
    assert timeline.utilisation(1) == 0 and timeline.bubble_of_total == 1 / 2 and timeline.bubble_of_ideal == 1


def test_a_rank_that_does_not_exist() -> None:
    for share in (recorded().busy, recorded().utilisation):
        for rank in (2, -1):
            with pytest.raises(ValueError, match=f"rank is {rank}; the timeline has the ranks 0 to 1"):
                share(rank)


def test_a_timeline_is_kept_in_columns() -> None:
    timeline = recorded()
    assert list(timeline.rank) == [0, 1, 1, 0] and list(timeline.end) == [101, 102, 104, 108]
    assert bytes(timeline.kind) == b"FFBB"
    columns = (timeline.rank, timeline.kind, timeline.stage, timeline.micro_batch, timeline.start, timeline.end)
    assert sum(column.itemsize for column in columns) <= 32  # bytes: a million intervals take 32 MB at most
    assert "array" not in repr(timeline)
    assert pickle.loads(pickle.dumps(timeline)) == timeline


def test_a_timeline_that_was_asked_goes_on_growing() -> None:
    timeline = recorded()
    _ = timeline.makespan, timeline.busy(0), timeline.efficiency, timeline.check(), merge([timeline])
    timeline.add(0, "F", 0, 1, 108.0, 109.0)
    assert timeline.makespan == 9


@pytest.mark.parametrize(
    "interval, words",
    [
        ((2, "F", 0, 0, 0.0, 1.0), "rank is 2; the timeline has the ranks 0 to 1"),
        ((-1, "F", 0, 0, 0.0, 1.0), "rank is -1"),
        ((0, "X", 0, 0, 0.0, 1.0), "kind is 'X'; known are F, B, R, w, s"),
        ((0, "FB", 0, 0, 0.0, 1.0), "kind is 'FB'"),
        ((0, "F", 3, 4, 2.0, 1.0), "3F4 lasts from 2.0 to 1.0"),
        ((0, "F", 0, 0, float("nan"), 1.0), "0F0 lasts from nan to 1.0"),
        ((0, "F", 0, 0, 0.0, float("inf")), "0F0 lasts from 0.0 to inf"),
    ],
)
def test_intervals_that_cannot_be(interval: tuple, words: str) -> None:
    timeline = recorded()
    with pytest.raises(ValueError, match=words):
        timeline.add(*interval)
    assert len(list(timeline)) == 4  # no column has grown


def test_an_empty_timeline() -> None:
    timeline = Timeline(2, "made by hand")
    assert timeline.makespan == 0 and timeline.busy(0) == 0 and list(timeline) == []
    for share in ("bubble_of_total", "bubble_of_ideal", "efficiency"):
        with pytest.raises(ValueError, match="no length"):
            getattr(timeline, share)
    with pytest.raises(ValueError, match="no length"):
        timeline.utilisation(0)


def test_a_timeline_in_which_nobody_computes() -> None:
    timeline = Timeline(1, "made by hand")
    timeline.add(0, "w", 0, 0, 0.0, 1.0)
    assert timeline.bubble_of_total == 1 and timeline.efficiency == 0
    with pytest.raises(ValueError, match="no rank computes"):
        _ = timeline.bubble_of_ideal


def test_a_timeline_without_ranks_or_label() -> None:
    with pytest.raises(ValueError, match="num_ranks is 0"):
        Timeline(0, "simulated")
    with pytest.raises(ValueError, match="label is empty"):
        Timeline(1, " ")


# --- Many intervals ---------------------------------------------------------------------------------------------


def random_timeline(rng: random.Random, num_ranks: int = 3, most: int = 12) -> Timeline:
    """Every rank does one thing after another, with gaps; recorded in any order, on a clock that began long ago."""
    intervals = []
    for rank in range(num_ranks):
        now = 1e5 + rng.random()
        for micro_batch in range(rng.randrange(most)):
            start = now + rng.choice([0.0, rng.random()])
            now = start + rng.choice([0.0, rng.random()])
            intervals.append((rank, rng.choice(list(KINDS)), rng.randrange(5), micro_batch, start, now))
    rng.shuffle(intervals)
    timeline = Timeline(num_ranks, "random", unit="seconds")
    for interval in intervals:
        timeline.add(*interval)
    return timeline


@given(st.integers(0, 2**32))
def test_columns_and_intervals_give_the_same(seed: int) -> None:
    timeline = random_timeline(random.Random(seed)).check()
    intervals = list(timeline)
    lengths = [[i.end - i.start for i in intervals if i.rank == r and i.kind in "FBR"] for r in range(3)]
    makespan = max([i.end for i in intervals], default=0.0) - min([i.start for i in intervals], default=0.0)
    assert timeline.makespan == makespan
    assert [timeline.busy(rank) for rank in range(3)] == pytest.approx(list(map(math.fsum, lengths)), abs=1e-9)
    assert timeline.idle() == pytest.approx(3 * makespan - sum(map(sum, lengths)), abs=1e-9)
    if makespan:
        useful = math.fsum(i.end - i.start for i in intervals if i.kind in "FB")
        assert timeline.efficiency == pytest.approx(useful / (3 * makespan), rel=1e-12)


def a_million(num_ranks: int = 8, num_intervals: int = 1_000_000) -> Timeline:
    """A long recording: each rank runs F, B, R, w, s in turns, 0.9 of each unit of time."""
    i = np.arange(num_intervals)
    timeline = Timeline(num_ranks, "a long recording", unit="seconds")
    start = (i // num_ranks).astype("f8")
    timeline.rank = array("i", (i % num_ranks).astype("i4").tobytes())
    timeline.stage = timeline.rank[:]
    timeline.micro_batch = array("i", (i // num_ranks).astype("i4").tobytes())
    timeline.kind = array("B", np.frombuffer(b"FBRws", "u1")[i // num_ranks % 5].tobytes())
    timeline.start, timeline.end = array("d", start.tobytes()), array("d", (start + 0.9).tobytes())
    return timeline


def test_a_million_intervals() -> None:
    """Usually it takes 0.4 s; the limit says that it hung."""
    timeline = a_million()
    started = time.perf_counter()
    assert timeline.makespan == pytest.approx(125_000 - 0.1)
    assert timeline.utilisation(3) == pytest.approx(0.9 * 3 / 5, rel=1e-4)
    assert timeline.efficiency == pytest.approx(0.9 * 2 / 5, rel=1e-4)
    assert timeline.bubble_of_total == pytest.approx(1 - 0.9 * 3 / 5, rel=1e-4)
    assert timeline.bubble_of_ideal == pytest.approx(5 / 2.7 - 1, rel=1e-4)
    assert len(merge([timeline.check()])) == 1_000_000
    assert time.perf_counter() - started < 10


# --- Recordings put together ------------------------------------------------------------------------------------


def one_rank(rank: int, *intervals: tuple[str, int, float, float], **options: str) -> Timeline:
    timeline = Timeline(2, **({"label": "measured", "unit": "seconds"} | options))
    for kind, micro_batch, start, end in intervals:
        timeline.add(rank, kind, rank, micro_batch, start, end)
    return timeline


def test_recordings_of_one_clock() -> None:
    first = one_rank(0, ("F", 0, 102.0, 103.0), ("B", 0, 106.0, 108.0))
    second = one_rank(1, ("w", 0, 101.0, 103.5), ("F", 0, 103.5, 104.5))
    merged = merge([second, first])
    assert (merged.num_ranks, merged.label, merged.unit) == (2, "measured", "seconds")
    assert list(merged) == [
        Interval(1, "w", 1, 0, 0.0, 2.5),
        Interval(1, "F", 1, 0, 2.5, 3.5),
        Interval(0, "F", 0, 0, 1.0, 2.0),
        Interval(0, "B", 0, 0, 5.0, 7.0),
    ]
    assert list(first)[0].start == 102.0  # what was given stays as it is


def test_recordings_of_clocks_that_are_apart() -> None:
    first = one_rank(0, ("F", 0, 102.0, 103.0), ("B", 0, 104.5, 105.5))
    second = one_rank(1, ("F", 0, 7003.0, 7004.0))  # ahead by 6900
    assert [(i.rank, i.start) for i in merge([first, second], offsets=[0.0, 6900.0])] == [(0, 0.0), (0, 2.5), (1, 1.0)]
    # Negative times are times as well.
    assert [(i.rank, i.start) for i in merge([first, second], offsets=(200.0, 7100.0))][2] == (1, 1.0)


@given(st.integers(0, 2**32), st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_a_timeline_taken_apart_and_merged_is_the_same_but_for_its_zero(seed: int, offsets: list[float]) -> None:
    whole = random_timeline(random.Random(seed))
    parts = [Timeline(3, "random", unit="seconds") for _ in range(3)]
    for rank, kind, stage, micro_batch, start, end in whole:
        parts[rank].add(rank, kind, stage, micro_batch, start + offsets[rank], end + offsets[rank])
    merged = merge(parts, offsets)
    expected = sorted(whole, key=lambda interval: interval.rank)
    zero = min(whole.start, default=0.0)
    assert [interval[:4] for interval in merged] == [interval[:4] for interval in expected]
    assert list(merged.start) == pytest.approx([interval.start - zero for interval in expected], abs=1e-9)
    assert list(merged.end) == pytest.approx([interval.end - zero for interval in expected], abs=1e-9)
    assert not len(merged) or min(merged.start) == 0.0


def test_only_what_is_alike_is_merged() -> None:
    good = one_rank(0, ("F", 0, 0.0, 1.0))
    for other in (one_rank(1, unit="ms"), one_rank(1, label="simulated"), Timeline(3, "measured", unit="seconds")):
        with pytest.raises(ValueError, match="one .num_ranks, unit, label.; these have .*measured"):
            merge([good, other])
    with pytest.raises(ValueError, match=r"these have \[\]"):
        merge([])
    for offsets in ([0.0], [0.0, 1.0, 2.0], [0.0, float("nan")]):
        with pytest.raises(ValueError, match="a finite one for each of the 2 ranks"):
            merge([good], offsets)
    assert len(merge([one_rank(0), one_rank(1)])) == 0


def test_a_rank_that_does_two_things_at_once() -> None:
    twice = [one_rank(0, ("F", 0, 1.0, 2.0)), one_rank(1), one_rank(0, ("B", 0, 1.5, 3.0))]
    with pytest.raises(ValueError, match="rank 0 does two things at once: 0F0 from 0.0 to 1.0 and 0B0 from 0.5 to 2.0"):
        merge(twice)
    assert one_rank(0, ("F", 0, 1.0, 2.0), ("B", 0, 2.0, 3.0)).check().makespan == 2  # they touch
    assert one_rank(0, ("F", 1, 1.0, 2.0), ("F", 0, 1.0, 1.0)).check().makespan == 1  # nothing lasts no time
    inside = one_rank(0, ("B", 0, 3.0, 4.0), ("F", 0, 1.0, 9.0))
    with pytest.raises(ValueError, match="0F0 from 1.0 to 9.0 and 0B0"):
        inside.check()
    both = one_rank(0, ("F", 0, 1.0, 2.0))
    both.add(1, "F", 1, 0, 1.0, 2.0)
    assert both.check() is both  # two ranks may
