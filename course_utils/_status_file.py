"""What each worker of a run is doing, in a small file that the caller can read while the worker is stuck or dead."""

import mmap
import struct
import time
from pathlib import Path
from typing import NamedTuple

STATES = ("starting", "running", "waiting", "ended")
RECORD_SIZE = 256  # bytes per rank: the head and then the text, cut to what fits
HEAD = struct.Struct("<IIQ")  # index in STATES, length of the text in bytes, time.monotonic_ns() of the change


class Status(NamedTuple):
    state: str
    text: str
    since: float  # seconds of time.monotonic(), a clock that all processes of a machine share

    def __str__(self) -> str:
        what = f"waits for {self.text}" if self.state == "waiting" else " ".join(filter(None, (self.state, self.text)))
        return f"{what}, for {time.monotonic() - self.since:.1f} s now"


def create(path: Path, world_size: int) -> None:
    """Make the file in which every rank is starting."""
    path.write_bytes(world_size * pack("starting", ""))


def read(path: Path, rank: int) -> Status:
    with path.open("rb") as file:
        file.seek(rank * RECORD_SIZE)
        record = file.read(RECORD_SIZE)
    index, length, since = HEAD.unpack_from(record)
    text = record[HEAD.size : HEAD.size + length].decode("utf-8", "replace")
    return Status(STATES[index], text, since / 1e9)


def pack(state: str, text: str) -> bytes:
    data = text.encode("utf-8", "replace")[: RECORD_SIZE - HEAD.size]
    return (HEAD.pack(STATES.index(state), len(data), time.monotonic_ns()) + data).ljust(RECORD_SIZE, b"\0")


class StatusRecord:
    """The record of one rank, to write. A change costs a few microseconds: no system call, only mapped memory."""

    def __init__(self, path: Path, rank: int):
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.place = slice(rank * RECORD_SIZE, (rank + 1) * RECORD_SIZE)

    def waiting(self, text: str) -> None:
        self.map[self.place] = pack("waiting", text)

    def running(self, text: str = "") -> None:
        self.map[self.place] = pack("running", text)

    def ended(self) -> None:
        self.map[self.place] = pack("ended", "")
