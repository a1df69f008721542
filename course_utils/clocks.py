"""By how much the clocks of the ranks differ, found by sending messages to and fro.

On one machine nothing has to be found: `time.perf_counter` reads one clock there for all processes. On several machines
each has its own, which may have started at any time, and a timeline of all ranks needs the differences.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from course_utils.transports import Transport


@dataclass(frozen=True)
class Offsets:
    """How the clocks of the ranks differ from that of rank 0, in seconds; the same on every rank.

    Attributes:
        ahead: for each rank what its clock shows minus what rank 0's shows at the same moment; what `timeline.merge`
            takes off.
        uncertainty: for each rank the true difference is `ahead` plus or minus this. Between two ranks other than 0
            both uncertainties count.

    It holds for the moment of the comparison. Clocks of two machines also run at different speeds, usually by less
    than 50 millionths: within a minute they may come apart by 3 ms, so compare them shortly before the step to record.
    """

    ahead: tuple[float, ...]
    uncertainty: tuple[float, ...]

    def __str__(self) -> str:
        pieces = [
            f"rank {rank} {1e3 * ahead:+.3f} ms ± {1e3 * self.uncertainty[rank]:.3f} ms"
            for rank, ahead in enumerate(self.ahead)
            if rank > 0
        ]
        return "Clocks against that of rank 0: " + ("; ".join(pieces) or "there is no other rank") + "."


def estimate_offsets(transport: Transport, rounds: int = 20, clock: Callable[[], float] = time.perf_counter) -> Offsets:
    """Compare the clocks of all ranks; every rank has to call it at the same point, with the same number of rounds.

    Rank 0 asks another rank for its time and notes when it asked and when the answer came. At some moment in between
    the other rank read its clock; to take it for the middle is wrong by half of the round trip at most. Of all rounds
    the one with the shortest round trip counts (Cristian, 1989, "Probabilistic clock synchronization"; NTP, RFC 5905,
    chooses in the same way).

    Args:
        transport: this rank's messages; control messages are used.
        rounds: questions to each rank; more of them make it likelier that one round trip is short.
        clock: this rank's clock, in seconds; it must run evenly, as time.perf_counter does and time.time need not.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed")
    if transport.rank == 0:
        best = [(0.0, 0.0)] + [ask(transport, rank, rounds, clock) for rank in range(1, transport.world_size)]
        found = torch.tensor(best, dtype=torch.float64)
        sends = [transport.isend(found, rank, RESULT, control=True) for rank in range(1, transport.world_size)]
        for send in sends:
            transport.wait(send)
    else:
        answer(transport, rounds, clock)
        found = torch.empty(transport.world_size, 2, dtype=torch.float64)
        transport.wait(transport.irecv(found, 0, RESULT, control=True))
    ahead, uncertainty = found.T.tolist()
    return Offsets(tuple(ahead), tuple(uncertainty))


QUESTION, ANSWER, RESULT = "a question for the time", "the time of its clock", "the differences of the clocks"


def ask(transport: Transport, rank: int, rounds: int, clock: Callable[[], float]) -> tuple[float, float]:
    """(how far the clock of a rank is ahead, plus or minus what)"""
    found = []
    for _ in range(rounds):
        time_there = torch.empty(1, dtype=torch.float64)
        receive = transport.irecv(time_there, rank, ANSWER, control=True)
        question = torch.zeros(1, dtype=torch.float64)
        asked = clock()
        send = transport.isend(question, rank, QUESTION, control=True)
        transport.wait(receive)
        answered = clock()
        transport.wait(send)
        found.append((answered - asked, time_there.item() - (asked + answered) / 2))
    round_trip, ahead = min(found)
    return ahead, round_trip / 2


def answer(transport: Transport, rounds: int, clock: Callable[[], float]) -> None:
    """Answer rank 0 as often as it asks."""
    for _ in range(rounds):
        question = torch.empty(1, dtype=torch.float64)
        transport.wait(transport.irecv(question, 0, QUESTION, control=True))
        transport.wait(transport.isend(torch.tensor([clock()], dtype=torch.float64), 0, ANSWER, control=True))
