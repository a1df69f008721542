"""What runs in a worker process: make ready, join the others, run the function, report, and wait to be released.

The caller's side is `processes.py`. All that is unpickled, here and there, comes through pipes that the processes
inherited; nothing that arrives from a socket is ever unpickled.
"""

import ctypes
import hmac
import io
import os
import pickle
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from course_utils import _pipes, _server, _stacks
from course_utils._by_value import shorten, show_sources
from course_utils._status_file import StatusRecord
from course_utils._surroundings import Settings
from course_utils.transports import PeerLost, TorchTransport, WaitTimeout, Worker

PDEATHSIG = 1  # prctl(PR_SET_PDEATHSIG, signal): Linux sends the signal when the parent has gone
# What torch's own errors are and say, for those that do not come through a Transport.
DIST_ERRORS = (RuntimeError, dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
GLOO_TIMEOUTS = ("Timed out", "timed out", "Wait timeout")
NO_MEMORY = "can't allocate memory"  # on the CPU torch says so in a RuntimeError
GLOO_LOSSES = ("Connection closed by peer", "Connection reset", "Broken pipe")


def main(rank: int, world_size: int, method: str, folder: Path, control: Connection, output: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's: it ends its workers itself
    _server.lead_a_family()
    end_with_the_caller(method, folder)
    redirect_output(output)
    caller = Caller(control)
    try:
        settings: Settings = pickle.loads(caller.receive())
        status = StatusRecord(settings.folder / "status", rank, world_size)
        _stacks.answer_requests(settings.folder, rank)
        worker, fn, args = make_ready(rank, world_size, settings, status, caller)
        caller.tell("ready")
        status.computing()
        result = fn(worker, *args)
        caller.end_a_fork()
        status.ended()
        caller.tell_result(result)
    except BaseException as error:  # SystemExit too: whatever ends the function is the caller's to know
        caller.end_a_fork(error)
        caller.tell_failure(error)
    # Hold: as long as this process lives its sockets stay open, so that no other stage fails because of this one before
    # the caller has heard from all and knows the first cause.
    caller.wait_for_release()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


class Caller:
    """The pipe to the caller. If it ends the caller has gone, and so does this process."""

    def __init__(self, control: Connection):
        self.control, self.pid = control, os.getpid()
        self.lock = threading.Lock()  # a function may emit from several threads
        self.incoming = _pipes.Messages()
        self.received: list[bytes] = []

    def receive(self) -> bytes:
        while not self.received:
            data = _pipes.read(self.control)
            if not data:
                os._exit(1)
            self.received = self.incoming.feed(data)
        return self.received.pop(0)

    def wait_for_release(self) -> None:
        while self.receive() != _pipes.RELEASE:
            pass

    def tell(self, kind: str, *content: Any) -> None:
        message = cloudpickle.dumps((kind, *content))
        with self.lock:
            _pipes.send(self.control, message)

    def end_a_fork(self, error: BaseException | None = None) -> None:
        """A fork of the worker that comes back from the function is no stage: it ends here, and says why it failed."""
        if os.getpid() != self.pid:
            if isinstance(error, Exception):
                traceback.print_exception(error)
            os._exit(1)

    def tell_failure(self, error: BaseException) -> None:
        try:
            self.tell("failed", *describe(error))
        except MemoryError:  # even for that the function has left too little: let go of what it held
            traceback.clear_frames(error.__traceback__)
            self.tell("failed", *describe(error))

    def emit(self, event: Any) -> None:
        """Send a small value to the caller, live. Raises TypeError if it cannot be pickled."""
        self.tell_value("event", event)

    def tell_result(self, result: Any) -> None:
        self.tell_value("result", result)

    def tell_value(self, kind: str, value: Any) -> None:
        if os.getpid() != self.pid:
            raise RuntimeError("a fork of a stage cannot emit events: only the process that launch has started can")
        try:
            message = cloudpickle.dumps((kind, value))
        except Exception as error:
            what = f"the {kind} {shorten(value)} cannot be sent to the caller: {error}"
            raise TypeError(f"{what}. Send numbers, text, tensors, or lists and dicts of them.") from error
        with self.lock:
            _pipes.send(self.control, message)


def end_with_the_caller(method: str, folder: Path) -> None:
    """See to it that this process does not outlive its caller, whatever it is doing then."""
    if method == "forkserver":
        from multiprocessing import forkserver

        # The server ends when nobody holds this pipe any more. A worker is forked with a copy of it.
        server: Any = forkserver._forkserver
        if server._forkserver_alive_fd is not None:
            os.close(server._forkserver_alive_fd)
            server._forkserver_alive_fd = None
        # Not with spawn: there the parent is the *thread* that started this process, and may end before the run does.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent: Any = parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        _server.end_descendants({os.getpid()})
        if sys.platform != "win32" and os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="watch the caller", daemon=True).start()


class PipeWriter(io.RawIOBase):
    """Where print ends up: in the pipe to the caller, at once."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        _pipes.write(self.pipe, bytes(data))
        return len(data)


def redirect_output(output: Connection) -> None:
    """Send everything that is written in this process to the caller, unbuffered: os._exit or a kill loses nothing.

    On Windows this holds for Python's own output only, elsewhere for that of C libraries and child processes too.
    """
    raw: Any = PipeWriter(output)
    if sys.platform != "win32":
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        output.close()
        raw = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
        with suppress(AttributeError, ValueError, OSError):  # C's own buffer, where its name is known
            library = ctypes.CDLL(None)
            stdout = ctypes.c_void_p.in_dll(library, "__stdoutp" if sys.platform == "darwin" else "stdout")
            library.setvbuf(stdout, None, 2, 0)  # _IONBF
    text = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", newline="\n", write_through=True)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = text  # type: ignore[misc]


def make_ready(
    rank: int, world_size: int, settings: Settings, status: StatusRecord, caller: Caller
) -> tuple[Worker, Callable, tuple]:
    os.environ.clear()
    os.environ.update(settings.environment)
    sys.path[:] = settings.search_path
    show_sources(settings.sources)
    torch.set_num_threads(1)  # more would compete for the cores, and change the last bits of sums
    fn, args = pickle.loads(caller.receive())
    data_group = join_groups(rank, world_size, settings)
    transport = TorchTransport(rank, world_size, data_group, status, settings.wait_limit)
    return Worker(rank, world_size, transport, caller.emit), fn, args


def join_groups(rank: int, world_size: int, settings: Settings) -> dist.ProcessGroup:
    """Make the default group, for control, and return a second one, for data.

    They find each other through a file in the run's own folder (torch.distributed.FileStore): there is no port for it.
    What listens until all are connected is bound to 127.0.0.1.
    """
    if settings.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = settings.interface
    store = dist.FileStore(str(settings.folder / "store"), world_size)
    store.set(f"started {rank}", "")
    # The caller keeps the limit of the start and knows more; this one is only there so that no wait is without.
    store.wait([f"started {other}" for other in range(world_size)], timedelta(seconds=2 * settings.startup_limit))
    limit = timedelta(seconds=settings.wait_limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    data_group = dist.new_group(backend="gloo", timeout=limit)
    for name, group in (("control", dist.group.WORLD), ("data", data_group)):
        recognise_peers(rank, world_size, name, group, settings.token)
    close_listeners()
    return data_group


def recognise_peers(rank: int, world_size: int, name: str, group: Any, token: bytes) -> None:
    """Check that at the end of each connection is a worker of this run, which knows its token.

    While the group forms, any user of the machine could connect in a worker's place. Each side proves that it knows the
    token without showing it; the proof names its direction, so that it cannot be sent back as an answer.
    """
    waits: list[Any] = []
    received = {}
    for peer in range(world_size):
        if peer != rank:
            received[peer] = torch.zeros(32, dtype=torch.uint8)
            mine = torch.frombuffer(bytearray(proof(token, name, rank, peer)), dtype=torch.uint8)
            waits += [dist.irecv(received[peer], peer, group=group), dist.isend(mine, peer, group=group)]
    for work in waits:
        work.wait()
    for peer, answer in received.items():
        if not hmac.compare_digest(bytes(answer.tolist()), proof(token, name, peer, rank)):
            raise PermissionError(f"what answers in the place of stage {peer} does not belong to this run")


def proof(token: bytes, group_name: str, sender: int, receiver: int) -> bytes:
    return hmac.digest(token, f"{group_name}: {sender} to {receiver}".encode(), "sha256")


def close_listeners() -> None:
    """All are connected: let no port of this process listen any more.

    gloo keeps its listening sockets as long as a group lives. Each is replaced by an unconnected socket under the same
    descriptor, which gloo may close later. Only on Linux, where gloo's event loop is known to bear it.
    """
    if sys.platform != "linux":
        return
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of the listing itself is closed by now
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as found:
                is_internet = found.family in (socket.AF_INET, socket.AF_INET6)
                listens = is_internet and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens:
                with socket.socket() as unconnected:
                    os.dup2(unconnected.fileno(), descriptor, inheritable=False)


def describe(error: BaseException) -> tuple[str, str, str, float]:
    """Kind of cause, one line, the traceback without this module's frames, and when it was."""
    if isinstance(error, WaitTimeout) or says(error, GLOO_TIMEOUTS):
        kind = "timeout"
    elif isinstance(error, PeerLost) or says(error, GLOO_LOSSES):
        kind = "closed"
    else:
        kind = "exception"
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    summary = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error):
        summary += " (out of memory: smaller micro-batches, more stages or re-materialisation need less)"
    return kind, summary, "".join(traceback.format_exception(type(error), error, frames)), time.monotonic()


def says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Whether an error of torch.distributed, and not one of the function's own, contains one of the phrases."""
    return type(error) in DIST_ERRORS and any(phrase in str(error) for phrase in phrases)
