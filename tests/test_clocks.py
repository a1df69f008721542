"""Differences of clocks: with clocks that are wrong by known amounts, and with messages that take known times."""

import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_utils.clocks import Offsets, ask, estimate_offsets
from course_utils.processes import launch
from course_utils.threads import run_in_threads
from course_utils.timeline import Timeline, merge
from course_utils.transports import Worker

WRONG_BY = [0.0, 5.2512345678, -1000.0, 3e6 + 0.123456]  # seconds; a clock may have started at any time


def compare(worker: Worker, rounds: int = 20, jitter: float = 0.0) -> tuple[Offsets, float, float]:
    """What a rank finds, and what its own clock shows before and after."""
    noise = random.Random(worker.rank)

    def clock() -> float:
        time.sleep(noise.random() * jitter)  # as if the messages took longer, one time more than another
        return time.perf_counter() + WRONG_BY[worker.rank]

    begun = clock()
    return estimate_offsets(worker.transport, rounds, clock), begun, clock()


def check_offsets(found: Offsets, world_size: int) -> None:
    assert (found.ahead[0], found.uncertainty[0]) == (0, 0)
    assert len(found.ahead) == len(found.uncertainty) == world_size
    for rank in range(1, world_size):
        assert found.uncertainty[rank] > 0
        assert abs(found.ahead[rank] - WRONG_BY[rank]) <= found.uncertainty[rank] + 1e-9


@pytest.mark.parametrize("jitter", [0.0, 0.002])
@pytest.mark.parametrize("rounds", [1, 20])
def test_known_differences_are_found_within_the_uncertainty(rounds: int, jitter: float) -> None:
    results = [found for found, _, _ in run_in_threads(compare, 4, rounds, jitter)]
    check_offsets(results[0], 4)
    assert results == [results[0]] * 4  # on every rank the same


def test_a_rank_alone_has_nobody_to_ask() -> None:
    assert run_in_threads(compare, 1)[0][0] == Offsets((0.0,), (0.0,))


def test_at_least_one_round() -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        run_in_threads(lambda worker: estimate_offsets(worker.transport, rounds=0), 2)


@pytest.mark.processes
def test_two_processes() -> None:
    (first, begun, ended), (second, other_begun, other_ended) = launch(compare, 2)
    check_offsets(first, 2)
    assert first == second
    assert first.uncertainty[1] < 0.5  # usually a fifth of a millisecond
    # The recordings of both ranks, put together: what overlaps in truth overlaps.
    parts = []
    for rank, (start, end) in enumerate([(begun, ended), (other_begun, other_ended)]):
        parts.append(Timeline(2, "measured", unit="seconds"))
        parts[rank].add(rank, "F", rank, 0, start, end)
    together = merge(parts, first.ahead)
    assert max(together.start) < min(together.end) and together.makespan < 60


# --- With known times of messages -------------------------------------------------------------------------------


class Line:
    """Rank 0's end of a line to a rank whose clock is ahead; messages take the times that are given."""

    def __init__(self, ahead: float, trips: list[tuple[float, float]]):
        self.now, self.ahead, self.trips = 100.0, ahead, list(trips)

    def clock(self) -> float:
        return self.now

    def irecv(self, buffer: torch.Tensor, peer: int, label: object, control: bool) -> torch.Tensor:
        assert control and peer == 1
        return buffer

    def isend(self, tensor: torch.Tensor, peer: int, label: object, control: bool) -> None:
        assert control and peer == 1

    def wait(self, operation: torch.Tensor | None) -> None:
        if operation is not None:
            there, back = self.trips.pop(0)
            operation.fill_(self.now + there + self.ahead)
            self.now += there + back


trips = st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=1, max_size=8)


@given(st.floats(-1e6, 1e6), trips)
def test_the_shortest_round_trip_wins(true: float, times: list[tuple[float, float]]) -> None:
    line = Line(true, times)
    ahead, uncertainty = ask(line, 1, len(times), line.clock)
    assert uncertainty == pytest.approx(min(map(sum, times)) / 2, abs=1e-8)
    assert abs(ahead - true) <= uncertainty + 1e-8
    errors = [(there - back) / 2 for there, back in times if sum((there, back)) <= 2 * uncertainty + 1e-8]
    assert min(abs(ahead - true - error) for error in errors) < 1e-8
    assert line.trips == []  # every round was used


def test_the_sentence() -> None:
    offsets = Offsets((0.0, 0.0012, -2.5), (0.0, 0.00005, 0.001))
    assert str(offsets) == (
        "Clocks against that of rank 0: rank 1 +1.200 ms ± 0.050 ms; rank 2 -2500.000 ms ± 1.000 ms."
    )
    assert str(Offsets((0.0,), (0.0,))) == "Clocks against that of rank 0: there is no other rank."
