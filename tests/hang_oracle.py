"""A second opinion on who waits for whom: random lists of sends and receives, and what must become of them.

Written without a look at `course_utils.waits`: a list is played by hand, one rank after another as far as each gets,
and circles are found by joining ways (Warshall, 1962) instead of by walking along them.
"""

import random
from collections import Counter
from typing import Any, NamedTuple

import torch

from course_utils.transports import Worker
from tests.schedule_strategies import random_schedule


class Step(NamedTuple):
    """What a rank does next.

    "send" and "recv" wait at once. "isend" and "irecv" begin a message; "wait" waits for the oldest one that was begun
    and not yet waited for. "leave" ends the rank's list, and only there is what was begun not waited for.
    """

    kind: str
    peer: int = 0
    control: bool = False


Lists = list[list[Step]]  # one per rank


class Outcome(NamedTuple):
    """Which ranks wait for each other in the end, and for which ranks that have ended others wait.

    is_complete: nothing was begun by one side only, so that another list may follow.
    """

    circles: frozenset[frozenset[int]]
    left_behind: frozenset[int]
    is_complete: bool

    @property
    def is_fine(self) -> bool:
        return not self.circles and not self.left_behind


# --- What must happen -----------------------------------------------------------------------------------------------


def simple_steps(steps: list[Step]) -> list[tuple[str, tuple[bool, str, int], int]]:
    """("begin" | "wait", (control, direction, peer), how many of this kind it is) for one rank."""
    simple: list[tuple[str, tuple[bool, str, int], int]] = []
    counts: Counter[tuple[bool, str, int]] = Counter()
    begun: list[tuple[tuple[bool, str, int], int]] = []
    leaves = False
    for step in steps:
        if step.kind in ("send", "recv", "isend", "irecv"):
            what = (step.control, step.kind.removeprefix("i"), step.peer)
            counts[what] += 1
            simple.append(("begin", what, counts[what]))
            if step.kind.startswith("i"):
                begun.append((what, counts[what]))
            else:
                simple.append(("wait", what, counts[what]))
        elif step.kind == "wait" and begun:
            simple.append(("wait", *begun.pop(0)))
        elif step.kind == "leave":
            leaves = True
            break
    return simple + ([] if leaves else [("wait", *operation) for operation in begun])


def other_side(what: tuple[bool, str, int], rank: int) -> tuple[bool, str, int]:
    """What the peer has to begin."""
    return what[0], "recv" if what[1] == "send" else "send", rank


def expected(lists: Lists) -> Outcome:
    """Play the lists: a message moves when both sides have begun it, and in each direction one after another."""
    rows = [simple_steps(steps) for steps in lists]
    place = [0] * len(lists)
    begun: list[Counter[tuple[bool, str, int]]] = [Counter() for _ in lists]
    needs: dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            needs.pop(rank, None)
            while place[rank] < len(row):
                what_to_do, what, number = row[place[rank]]
                peer = what[-1]
                if what_to_do == "begin":
                    begun[rank][what] += 1
                elif begun[peer][other_side(what, rank)] < number:
                    needs[rank] = peer
                    break
                place[rank] += 1
                moved = True
    ranks = range(len(lists))
    leads = [[needs.get(a) == b for b in ranks] for a in ranks]
    for through in ranks:
        for a in ranks:
            for b in ranks:
                leads[a][b] = leads[a][b] or (leads[a][through] and leads[through][b])
    circles = {frozenset(b for b in ranks if leads[a][b] and leads[b][a]) for a in ranks if leads[a][a]}
    in_pairs = [begun[what[-1]][other_side(what, rank)] == n for rank in ranks for what, n in begun[rank].items()]
    return Outcome(
        frozenset(circles),
        frozenset(peer for peer in needs.values() if peer not in needs),
        all(in_pairs),
    )


# --- Random lists ---------------------------------------------------------------------------------------------------


def random_lists(rng: random.Random) -> Lists:
    """Some run, some hang: wrong orders, blocking sends, messages that are missing, ranks that end early."""
    make = rng.choice([in_one_order, in_one_order, in_one_order, from_schedule, all_in_a_ring])
    lists = make(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        spoil(rng, rng.choice(lists))
    return lists


def in_one_order(rng: random.Random) -> Lists:
    """All ranks take the messages in the same order, so none hangs."""
    num_ranks = rng.choice([2, 2, 3, 3, 4, 5])
    lists: Lists = [[] for _ in range(num_ranks)]
    blocking = rng.choice([0.0, 0.5, 1.0])
    for _ in range(rng.randint(1, 10)):
        sender, receiver = rng.sample(range(num_ranks), 2)
        control = rng.random() < 0.2
        lists[sender].append(Step("send" if rng.random() < blocking else "isend", receiver, control))
        lists[receiver].append(Step("recv" if rng.random() < 0.7 else "irecv", sender, control))
        for rank in (sender, receiver):
            if rng.random() < 0.3:
                lists[rank].append(Step(rng.choice(["wait", "compute"])))
    return lists


def from_schedule(rng: random.Random) -> Lists:
    """A step of a random schedule, valid or not, with sends that wait or do not."""
    schedule = random_schedule(rng)
    send = rng.choice(["send", "isend"])
    lists: Lists = [[] for _ in range(schedule.num_ranks)]
    for steps, row in zip(lists, schedule.actions, strict=True):
        for action in row:
            if (message := schedule.received_by(action)) is not None:
                steps.append(Step("recv", schedule.channel(message)[0]))
            steps.append(Step("compute"))
            if (message := schedule.sent_by(action)) is not None:
                steps.append(Step(send, schedule.channel(message)[1]))
    return lists


def all_in_a_ring(rng: random.Random) -> Lists:
    """Every rank sends to the next and receives from the one before: all in one order, or one the other way round."""
    num_ranks, send = rng.choice([2, 3, 4]), rng.choice(["send", "isend"])
    first = rng.choice(["send", "recv"])
    lists = []
    for rank in range(num_ranks):
        both = [Step(send, (rank + 1) % num_ranks), Step("recv", (rank - 1) % num_ranks)]
        lists.append(both if first == "send" else both[::-1])
    if rng.random() < 0.3:
        lists[rng.randrange(num_ranks)].reverse()
    return lists


def spoil(rng: random.Random, steps: list[Step]) -> None:
    """Change one rank's list."""
    if not steps:
        return
    at = rng.randrange(len(steps))
    how = rng.choice(["swap", "swap", "drop", "repeat", "wait at once", "end early", "shuffle"])
    if how == "swap" and at:
        steps[at - 1], steps[at] = steps[at], steps[at - 1]
    elif how == "drop":
        del steps[at]
    elif how == "repeat":
        steps.insert(at, steps[at])
    elif how == "wait at once":
        steps[:] = [step._replace(kind=step.kind.removeprefix("i")) for step in steps]
    elif how == "end early":
        steps[at:] = [Step("leave")]
    elif how == "shuffle":
        rng.shuffle(steps)


# --- What does happen -----------------------------------------------------------------------------------------------

KEPT: list[Any] = []  # torch forgets to deliver a message whose operation nobody keeps


def play(worker: Worker, lists: Lists) -> None:
    """Run one rank's list over a transport."""
    transport, begun = worker.transport, []
    for number, (kind, peer, control) in enumerate(lists[worker.rank]):
        if kind in ("send", "recv", "isend", "irecv"):
            begin = transport.isend if "send" in kind else transport.irecv
            operation = begin(torch.zeros(1), peer, f"step {number} of stage {worker.rank}", control)
            KEPT.append(operation)
            if kind.startswith("i"):
                begun.append(operation)
            else:
                transport.wait(operation)
        elif kind == "wait" and begun:
            transport.wait(begun.pop(0))
        elif kind == "compute":
            transport.computing(f"step {number}")
        elif kind == "leave":
            return
    for operation in begun:
        transport.wait(operation)


def play_all(worker: Worker, many: list[Lists]) -> None:
    """One after another; lists for fewer ranks leave the others out."""
    for lists in many:
        if worker.rank < len(lists):
            play(worker, lists)
