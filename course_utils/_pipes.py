"""Bytes and whole messages through the pipes between a caller and its workers.

A message is its length and then its bytes. The caller never waits for the second half of a message: it feeds what has
arrived to `Messages`, so a worker that stops in the middle of one cannot stop its caller too.
"""

import os
import struct
import sys
from multiprocessing.connection import Connection

LENGTH = struct.Struct("!Q")
CHUNK = 1 << 20
RELEASE = b"release"  # the last message to a worker: it may end


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
