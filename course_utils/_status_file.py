"""What each worker of a run is doing, in a small file that the caller can read while the worker is stuck or dead.

Each rank has a record in the file: what it does now, and how many messages it has begun to send to and to receive from
each of the others. With both, the caller knows of every wait whether the other side has done its part already.

Nobody locks anything. What a rank does now lies in two places: the next is written into the one that is not in use,
then a number that counts the changes makes it the one in use. So the last whole one can be read at any time, also when
its writer was stopped or killed in the middle of the next.
"""

import mmap
import struct
import time
from pathlib import Path

from course_utils.transports import Operation, StatusBlock
from course_utils.waits import RankState, Wait

STATES = ("starting", "computing", "waiting", "gave up", "ended")
WORD = 8  # bytes: a word is written and read whole
PLACE = 256  # bytes: the head and then the text, cut to what fits
# Index in STATES; of a wait: sends, is control, peer, number of the operation; since when, in time.monotonic_ns(), a
# clock that all processes of a machine share; length of the text in bytes; whether ranks hold stages of other numbers.
HEAD = struct.Struct("=B??iQQH?")
WORD_AT = struct.Struct("@Q")  # "@": read at once, not byte by byte
NOTHING = (False, False, 0, 0)  # in the place of a wait


def record_words(world_size: int) -> int:
    """The number of changes, two places, and per peer four channels: when a message was last begun, and how many."""
    return 1 + 2 * PLACE // WORD + 8 * world_size


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

    Only for the thread that uses the rank's transport.
    """

    def __init__(self, path: Path, rank: int, world_size: int):
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        size = record_words(world_size) * WORD
        self.rank, self.bytes = rank, memoryview(mapped)[rank * size : (rank + 1) * size]
        self.words = self.bytes.cast("Q")
        self.action = b""  # what it computes, or did before it waited
        self.waits_for: Operation | None = None
        self.since = 0
        self.has_other_stages = False

    def write(self, state: str, text: bytes, wait: tuple = NOTHING, since: int = 0) -> None:
        number = self.words[0] + 1
        place = WORD + number % 2 * PLACE
        text = text[: PLACE - HEAD.size]
        since = since or time.monotonic_ns()
        HEAD.pack_into(self.bytes, place, STATES.index(state), *wait, since, len(text), self.has_other_stages)
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
            self.has_other_stages = True


def read(path: Path, world_size: int) -> tuple[list[RankState], str]:
    """What every rank does, and what to call a rank.

    The ranks are read one after another, and go on meanwhile. A circle of waits that have not been met is a deadlock
    even so. Whoever left its wait first, of those in it, would have needed its peer's part of the message; but the peer
    had not done that when it was read, and could do it only after it had left its own wait, which is earlier still.
    For this to hold a rank's state is read before the counts of what it has begun, and those only ever grow.
    """
    now = time.monotonic_ns()
    size = record_words(world_size) * WORD
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        records = [read_record(mapped, rank * size, size) for rank in range(world_size)]
    states = [state_of(rank, records, now) for rank in range(world_size)]
    return states, "rank" if any(head[-1] for head, _, _ in records) else "stage"


def read_record(mapped: mmap.mmap, begin: int, size: int) -> tuple[tuple, str, tuple[int, ...]]:
    """Head and text of the last whole state, and the words of the record after that."""
    number = None
    while number != (number := WORD_AT.unpack_from(mapped, begin)[0]):  # a writer may have come round to this place
        place = begin + WORD + number % 2 * PLACE
        record = mapped[place : place + PLACE]
    head = HEAD.unpack_from(record)
    text = record[HEAD.size : HEAD.size + head[-2]].decode("utf-8", "replace")
    return head, text, struct.unpack_from(f"@{size // WORD}Q", mapped, begin)


def state_of(rank: int, records: list, now: int) -> RankState:
    (index, sends, control, peer, number, began, _, _), text, _ = records[rank]
    state, seconds = STATES[index], max(0, now - began) / 1e9
    if state not in ("waiting", "gave up"):
        return RankState(rank, state, text, seconds)
    word = channel_word(rank, control, not sends)  # of the partner
    met_at, count = records[peer][-1][word : word + 2]
    under_way = max(0, now - met_at) / 1e9 if count >= number else None
    return RankState(rank, state, "", seconds, Wait(rank, peer, text, sends, seconds, under_way))
