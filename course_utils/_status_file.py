"""What each worker of a run is doing, in a small file that the caller can read while the worker is stuck or dead.

Each rank has a record in the file: what it does now, and how many messages it has begun to send to and to receive from
each of the others. With both, the caller knows of every wait whether the other side has done its part already. A rank
whose messages move in queues (`queued.py`) also writes down what is held up there, and by which head of a queue.

Nobody locks anything. What a rank does now lies in two places: the next is written into the one that is not in use,
then a number that counts the changes makes it the one in use. So the last whole one can be read at any time, also when
its writer was stopped or killed in the middle of the next. The same goes for what its queues hold up.
"""

import mmap
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from course_utils.transports import Operation, StatusBlock
from course_utils.validity import QUEUES
from course_utils.waits import RankState, Wait

STATES = ("starting", "computing", "waiting", "gave up", "ended")
WORD = 8  # bytes: a word is written and read whole
PLACE = 256  # bytes: the head and then the text, cut to what fits
# Index in STATES; of a wait: sends, is control, peer, number of the operation; since when, in time.monotonic_ns(), a
# clock that all processes of a machine share; length of the text in bytes.
HEAD = struct.Struct("=B??iQQH")
WORD_AT = struct.Struct("@Q")  # "@": read at once, not byte by byte
NOTHING = (False, False, 0, 0)  # in the place of a wait
# What is held up: sends, peer, number. By the head of its queue: sends, peer, number, length of its text in bytes.
HELD_UP = struct.Struct("=?iQ?iQH")
NUM_HELD_UP = struct.Struct("=H")


class Head(NamedTuple):
    """The first operation of a queue: the rank sends or receives, to or from a peer, its so many-th there."""

    sends: bool
    peer: int
    number: int
    text: str


HeldUp = dict[tuple[bool, int, int], Head]  # of one rank: (sends, peer, number) of an operation -> what it is behind


def queues_bytes(world_size: int) -> int:
    """A place for what is held up: at most the first of each channel, and what the rank itself waits for."""
    return WORD + (2 * world_size + 1) * PLACE


def other_stages_word(world_size: int) -> int:
    """Where within a record it says that ranks hold stages of other numbers than theirs."""
    return 1 + 2 * PLACE // WORD + 8 * world_size


def queues_word(world_size: int) -> int:
    """Where within a record the queues are: their model, the number of changes, and two places."""
    return other_stages_word(world_size) + 1


def record_words(world_size: int) -> int:
    """The number of changes, two places; per peer four channels: when a message was last begun, how many; the rest."""
    return queues_word(world_size) + 2 + 2 * queues_bytes(world_size) // WORD


def channel_word(peer: int, control: bool, sends: bool) -> int:
    """Where a channel is within a record."""
    return 1 + 2 * PLACE // WORD + 2 * (4 * peer + 2 * control + sends)


def create(path: Path, world_size: int) -> None:
    """Make the file in which every rank is starting."""
    path.write_bytes(bytes(world_size * record_words(world_size) * WORD))
    for rank in range(world_size):
        StatusRecord(path, rank, world_size).starting()


class StatusRecord(StatusBlock):
    """The record of one rank, to write. A change costs a few microseconds: no system call, only mapped memory.

    Only for the thread that uses the rank's transport; `held_up` and `moves` for whoever holds the lock of its queues.
    """

    def __init__(self, path: Path, rank: int, world_size: int):
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        size = record_words(world_size) * WORD
        self.rank, self.world_size, self.bytes = rank, world_size, memoryview(mapped)[rank * size : (rank + 1) * size]
        self.words = self.bytes.cast("Q")
        self.action = b""  # what it computes, or did before it waited
        self.waits_for: Operation | None = None
        self.since = 0

    def write(self, state: str, text: bytes, wait: tuple = NOTHING, since: int = 0) -> None:
        number = self.words[0] + 1
        place = WORD + number % 2 * PLACE
        text = text[: PLACE - HEAD.size]
        since = since or time.monotonic_ns()
        HEAD.pack_into(self.bytes, place, STATES.index(state), *wait, since, len(text))
        self.bytes[place + HEAD.size : place + HEAD.size + len(text)] = text
        self.words[0] = number

    def starting(self) -> None:
        self.write("starting", b"")

    def computing(self, text: str | None = None) -> None:
        """None: what it did before it waited."""
        if text is not None:
            self.action = text.encode("utf-8", "replace")
        self.write("computing", self.action)

    def ended(self) -> None:
        self.write("ended", b"")

    def waiting(self, operation: Operation) -> None:
        self.waits_for, self.since = operation, time.monotonic_ns()
        self.write_wait("waiting", operation)

    def gave_up(self, operation: Operation) -> None:
        if operation is not self.waits_for:
            self.since = time.monotonic_ns()
        self.write_wait("gave up", operation)

    def write_wait(self, state: str, operation: Operation) -> None:
        wait = (operation.kind == "send", operation.control, operation.peer, operation.number)
        self.write(state, str(operation.label).encode("utf-8", "replace"), wait, self.since)

    def issued(self, operation: Operation) -> None:
        """Count it, before the next wait: whoever sees this rank wait then sees all that it has begun."""
        word = channel_word(operation.peer, operation.control, operation.kind == "send")
        operation.number = self.words[word + 1] + 1
        self.words[word] = time.monotonic_ns()  # first, so that a message never looks older than it is
        self.words[word + 1] = operation.number
        if operation.noun != "stage":
            self.words[other_stages_word(self.world_size)] = True

    # ---- queues ----

    def queues(self, model: str) -> None:
        """From now on this rank's messages move as in a model of queues, a key of `validity.QUEUES`."""
        self.words[queues_word(self.world_size)] = list(QUEUES).index(model)
        self.held_up([])

    def held_up(self, pairs: Sequence[tuple[Operation, Operation]]) -> None:
        """All that is held up: (an operation, the head of the queue that it is in, which is another).

        Of each channel the first operation that does not move yet is among them if it is held up, and so is what this
        rank waits for.
        """
        begin, size = queues_word(self.world_size) + 1, queues_bytes(self.world_size)
        number = self.words[begin] + 1
        place = (begin + 1) * WORD + number % 2 * size
        NUM_HELD_UP.pack_into(self.bytes, place, len(pairs))
        place += NUM_HELD_UP.size
        for held, head in pairs:
            text = str(head.label).encode("utf-8", "replace")[: PLACE - HELD_UP.size]
            HELD_UP.pack_into(
                *(self.bytes, place, held.kind == "send", held.peer, held.number),
                *(head.kind == "send", head.peer, head.number, len(text)),
            )
            place += HELD_UP.size
            self.bytes[place : place + len(text)] = text
            place += len(text)
        self.words[begin] = number

    def moves(self, operation: Operation) -> None:
        """It was held up and is under way only now."""
        self.words[channel_word(operation.peer, operation.control, operation.kind == "send")] = time.monotonic_ns()


def read(path: Path, world_size: int) -> tuple[list[RankState], str]:
    """What every rank does, and what to call a rank.

    The ranks are read one after another, and go on meanwhile. A circle of waits that have not been met is a deadlock
    even so. Whoever left its wait first, of those in it, would have needed its peer's part of the message; but the peer
    had not done that when it was read, and could do it only after it had left its own wait, which is earlier still.
    For this to hold a rank's state is read before the counts of what it has begun, and those only ever grow.

    With queues a circle may also lead through their heads. Still each wait in it ends after the next one: what is
    behind a head moves after it, be that read early or late, for the order of a queue never changes. What a peer has
    issued, and no head holds up, counts as under way; only what it has not issued waits for the rank itself, as above.
    """
    now = time.monotonic_ns()
    size = record_words(world_size) * WORD
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        records = [read_record(mapped, rank * size, size) for rank in range(world_size)]
        queues = [read_queues(mapped, rank * size, world_size) for rank in range(world_size)]
    look = Look(records, queues, now)
    states = [look.state_of(rank) for rank in range(world_size)]
    return states, "rank" if any(words[other_stages_word(world_size)] for *_, words in records) else "stage"


def read_model(path: Path, world_size: int) -> str:
    """The model of queues in which messages move: "buffered" if there are none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return list(QUEUES)[WORD_AT.unpack_from(mapped, queues_word(world_size) * WORD)[0]]


def read_record(mapped: mmap.mmap, begin: int, size: int) -> tuple[tuple, str, tuple[int, ...]]:
    """Head and text of the last whole state, and the words of the record after that."""
    number = None
    while number != (number := WORD_AT.unpack_from(mapped, begin)[0]):  # a writer may have come round to this place
        place = begin + WORD + number % 2 * PLACE
        record = mapped[place : place + PLACE]
    head = HEAD.unpack_from(record)
    text = record[HEAD.size : HEAD.size + head[-1]].decode("utf-8", "replace")
    return head, text, struct.unpack_from(f"@{size // WORD}Q", mapped, begin)


def read_queues(mapped: mmap.mmap, begin: int, world_size: int) -> HeldUp:
    """What a rank's queues held up at the last whole time that it wrote that down."""
    begin, size = begin + (queues_word(world_size) + 1) * WORD, queues_bytes(world_size)
    number = None
    while number != (number := WORD_AT.unpack_from(mapped, begin)[0]):
        place = begin + WORD + number % 2 * size
        record = mapped[place : place + size]
    found, place = HeldUp(), NUM_HELD_UP.size
    for _ in range(NUM_HELD_UP.unpack_from(record)[0]):
        *held, sends, peer, number, length = HELD_UP.unpack_from(record, place)
        place += HELD_UP.size
        text = record[place : place + length].decode("utf-8", "replace")
        found[held[0], held[1], held[2]] = Head(sends, peer, number, text)
        place += length
    return found


class Look:
    """What was read of all ranks, as waits: each with what must move before it can."""

    def __init__(self, records: list, queues: list[HeldUp], now: int):
        self.records, self.queues, self.now = records, queues, now
        self.waits: dict[tuple, Wait] = {}

    def seconds(self, rank: int) -> float:
        return max(0, self.now - self.records[rank][0][5]) / 1e9

    def state_of(self, rank: int) -> RankState:
        (index, sends, control, peer, number, *_), text, _ = self.records[rank]
        state = STATES[index]
        if state not in ("waiting", "gave up"):
            return RankState(rank, state, text, self.seconds(rank))
        return RankState(rank, state, "", self.seconds(rank), self.wait(rank, Head(sends, peer, number, text), control))

    def wait(self, rank: int, what: Head, control: bool = False) -> Wait:
        """The wait of a rank's operation, be it that the rank itself waits for it or that it heads a queue."""
        key = rank, what[:3], control
        if key not in self.waits:
            wait = self.waits[key] = Wait(rank, what.peer, what.text, what.sends, self.seconds(rank))
            word = channel_word(rank, control, not what.sends)  # of the partner
            met_at, count = self.records[what.peer][-1][word : word + 2]
            if not control and (found := self.ahead_of(rank, what)):
                wait.ahead = self.wait(*found)
            elif count >= what.number:
                wait.under_way = max(0, self.now - met_at) / 1e9
        return self.waits[key]

    def ahead_of(self, rank: int, what: Head) -> tuple[int, Head] | None:
        """The head of the queue that holds an operation up: a queue of its own rank, or of the other side."""
        sends, peer, number, _ = what
        if head := self.queues[rank].get((sends, peer, number)):
            return rank, head
        for side, place in ((rank, (sends, peer)), (peer, (not sends, rank))):
            # What is behind it on its channel moves after it: messages between two ranks keep their order.
            first = min((held for held in self.queues[side] if held[:2] == place), default=None)
            if first is not None and first[2] <= number:
                return side, self.queues[side][first]
        return None
