"""Bytes, whole messages and lines of output through the pipes between a caller and its workers.

A message is its length and then its bytes. The caller never waits for the second half of a message: it feeds what has
arrived to `Messages`, so a worker that stops in the middle of one cannot stop its caller too.
"""

import os
import struct
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LENGTH = struct.Struct("!Q")
CHUNK = 1 << 20
RELEASE = b"release"  # the last message to a worker: it may end
LONGEST_LINE = 16_384  # bytes; a longer one is shown in pieces
MOST_OUTPUT = 10_000_000  # bytes per stage, as they are shown; a notebook that holds ten times as much cannot be opened


def read(pipe: Connection) -> bytes:
    """What has arrived, as far as it has; b"" at the end of the pipe. Waits if nothing has arrived."""
    try:
        # On Windows a pipe carries packets instead of a stream of bytes.
        return pipe.recv_bytes() if sys.platform == "win32" else os.read(pipe.fileno(), CHUNK)
    except (EOFError, OSError):
        return b""


def write(pipe: Connection, data: bytes) -> None:
    """Write all of data. Raises OSError if nobody is left to read it."""
    if sys.platform == "win32":
        pipe.send_bytes(data)
        return
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe.fileno(), rest) :]


def send(pipe: Connection, message: bytes) -> None:
    write(pipe, LENGTH.pack(len(message)))
    write(pipe, message)


class Messages:
    """Puts messages together again from the pieces in which they arrive."""

    def __init__(self) -> None:
        self.pieces = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what `read` returned; return the messages that are now complete."""
        self.pieces += data
        complete = []
        while len(self.pieces) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self.pieces)[0]
            if len(self.pieces) < end:
                break
            complete.append(bytes(memoryview(self.pieces)[LENGTH.size : end]))
            del self.pieces[:end]
        return complete


class Output:
    """Cuts what a stage writes into lines to show, and drops what is more than `most` bytes of them.

    Whoever feeds it goes on reading then, so that a stage never waits because its output is dropped.
    """

    def __init__(self, name: str, most: int = MOST_OUTPUT):
        self.name, self.most = name, most
        self.rest = b""  # of a line whose end has not arrived
        self.shown = 0  # bytes
        self.is_full = False

    def feed(self, data: bytes) -> list[str]:
        """Take what `read` returned; return the lines to show now. b"": the end, also of a last line without an end."""
        if self.is_full:
            return []
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) > LONGEST_LINE):
            lines.append(self.rest)
            self.rest = b""
        texts = []
        for line in lines:
            text = f"[{self.name}] {line.decode('utf-8', 'replace')}"
            self.shown += len(text) + 1
            if self.shown > self.most:
                self.is_full, self.rest = True, b""
                size = f"{self.most / 1e6:g} MB"
                texts.append(
                    f"[{self.name}] ... {size} of output are shown; what this stage writes from here on is dropped: "
                    "let it write to a file instead"
                )
                break
            texts.append(text)
        return texts


def show(lines: list[str], output: Callable[[str], Any] | None) -> None:
    """Print lines, or give them to the caller's function one by one."""
    if output is not None:
        for line in lines:
            output(line)
    elif lines:  # in one piece: in a notebook each piece takes as long as a hundred lines
        print("\n".join(lines), flush=True)
