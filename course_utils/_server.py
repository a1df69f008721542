"""Where worker processes come from: forked in milliseconds by a server that has torch loaded, or started afresh.
And how what they have started themselves ends with them.

The server is multiprocessing's forkserver, one per caller, started with the first run. Its socket and the folders of
the runs that it serves lie in one folder, the *home* (mode 0700), which is removed when the caller ends.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import process, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # otherwise imported where it is needed: workers import this module too and rarely need it
    import psutil

METHODS = ("forkserver", "spawn")
PRELOAD = "course_stage_preload"  # the name under which the server imports a copy of _preload.py
PR_SET_CHILD_SUBREAPER = 36  # prctl: whom Linux makes the parent of processes whose own parent has gone
SECONDS_TO_END = 2.0  # for what workers have left behind
LONGEST_FOLDER = 60  # bytes: the path of a Unix socket, which lies two names deeper, holds 104 to 108

lock = threading.RLock()  # held while the process-wide things below are changed for a moment
home: Path | None = None
server_pid: int | None = None  # of the server that this module started
workers: set[int] = set()  # the pids of those that this process has started and not yet seen ended


def choose_method(wanted: str | None = None) -> str:
    """How workers are started: "forkserver" where it is quick and safe, which is Linux, else "spawn"."""
    if wanted not in (None, *METHODS):
        raise ValueError(f"method is {wanted!r}; use 'forkserver', 'spawn', or None for the one that suits this system")
    if wanted == "spawn" or sys.platform != "linux" or not has_safe_forkserver(sys.version_info[:3]):
        return "spawn"
    return "spawn" if sys.flags.ignore_environment else "forkserver"


def has_safe_forkserver(version: tuple[int, int, int]) -> bool:
    """Not with CVE-2022-42919: there every user of the machine could make the server run code."""
    first_safe = {(3, 9): 16, (3, 10): 9, (3, 11): 1}
    return version[2] >= first_safe.get((version[0], version[1]), 0)


def make_home() -> Path:
    """The server's folder. Raises OSError if no folder with a short path can be written."""
    global home
    with lock:
        if home is None:
            folders = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
            short = [f for f in folders if len(os.fsencode(f)) <= LONGEST_FOLDER and os.access(f, os.W_OK | os.X_OK)]
            if not short:
                raise OSError(
                    f"the temporary folder {folders[0]} cannot hold a socket: it must be writable, with a path of at "
                    f"most {LONGEST_FOLDER} bytes; set TMPDIR to another"
                )
            home = Path(tempfile.mkdtemp(prefix="stages-", dir=short[0]))
        return home


def make_run_folder(method: str) -> Path:
    """A folder for the files of one run. With the server it lies in the home, which the server removes in the end."""
    return Path(tempfile.mkdtemp(prefix="stages-run-", dir=make_home() if method == "forkserver" else None))


def start_server(check: Callable[[], Any]) -> None:
    """Make sure that the server runs and has loaded torch; check() is called while waiting and may raise."""
    global server_pid
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    folder = make_home()
    with lock:
        before = server._forkserver_pid
        if not (folder / f"{PRELOAD}.py").exists():
            shutil.copyfile(Path(__file__).with_name("_preload.py"), folder / f"{PRELOAD}.py")
        config = process.current_process()._config  # type: ignore[attr-defined]
        try:
            with main_stand_in(), importable(folder), changed(config, "tempdir", str(folder)):
                forkserver.set_forkserver_preload([PRELOAD])
                forkserver.ensure_running()
        except BaseException:
            if server_pid is None:
                remove_home()
            raise
        pid = server._forkserver_pid
        if pid != before:
            server_pid = pid
    # A server that other code had started before works too, only slower: it has not loaded torch.
    while pid == server_pid and not (folder / f"ready-{pid}").exists():
        check()
        time.sleep(0.002)


def start_process(method: str, target: Callable, args: tuple) -> BaseProcess:
    context: Any = multiprocessing.get_context(method)
    with lock, main_stand_in():
        started = context.Process(target=target, args=args, name=f"stage {args[0]}")
        started.start()
        # Whoever starts a process through multiprocessing also polls all that are in this set. One reader of an exit
        # code takes it from the other, so ours are polled by their own run alone.
        process._children.discard(started)  # type: ignore[attr-defined]
        workers.add(started.pid or 0)
    return started


@contextlib.contextmanager
def must_answer(until: float) -> Iterator[None]:
    """Kill the server if it has not started the processes by then (time.monotonic()): who waits for it is told so."""

    def kill() -> None:
        if server_pid is not None:
            os.kill(server_pid, signal.SIGKILL)
            # Until it is dead: multiprocessing must not take it for alive when it is asked for a server the next time.
            os.waitid(os.P_PID, server_pid, os.WEXITED | os.WNOWAIT)

    timer = threading.Timer(max(0.0, until - time.monotonic()), kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def end_stages(stages: Sequence, spare_them: bool) -> None:
    """End all that the workers of a run have started, and unless they are to be spared the workers too.

    Args:
        stages: as `_stage_view.Stage`.
    """
    for stage in stages:
        if not spare_them and stage.watched:
            with contextlib.suppress(Exception):  # it has ended
                stage.watched.suspend()  # first of all, so that it starts nothing more
    end_descendants({stage.process.pid for stage in stages})
    for stage in stages:
        if not spare_them:
            if stage.watched:
                end_group(stage.watched)
            stage.process.kill()


def lead_a_family() -> None:
    """In a worker: head a group of its own, and on Linux be the new parent of whatever loses its parent below it.

    So all that the worker starts can be found as long as it lives, even a daemon that has forked twice and made a
    session. When it has died they fall to the server, or where there is none only the rest of its group can be found.
    On Windows only what a worker has started directly, and that in turn, is found.
    """
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # it leads a session already
            os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(pids: set[int]) -> None:
    """Kill all that these workers have started, but not the workers. Takes at most SECONDS_TO_END."""
    give_up = time.monotonic() + SECONDS_TO_END
    while (found := descendants(pids)) and time.monotonic() < give_up:  # again: they may have started others meanwhile
        for one in found:
            with contextlib.suppress(Exception):  # it has ended
                one.kill()
        time.sleep(0.002)


def descendants(pids: set[int]) -> "list[psutil.Process]":
    """What these processes below this one have started, and what was started by workers that are dead."""
    import psutil

    found, family = [], set(pids)
    is_locked = lock.acquire(timeout=SECONDS_TO_END)  # so that no worker is just being started
    try:
        for one in psutil.Process().children(recursive=True):  # a parent comes before its children
            with contextlib.suppress(psutil.Error, OSError):
                if one.ppid() in family or is_locked and is_orphan(one):
                    family.add(one.pid)
                    if one.status() != psutil.STATUS_ZOMBIE:
                        found.append(one)
    finally:
        if is_locked:
            lock.release()
    return found


def is_orphan(one: "psutil.Process") -> bool:
    """Whether it has fallen to the server because the worker that started it has died.

    What the server itself has forked is a worker, or the caller's own and known to multiprocessing, or in its group.
    """
    if sys.platform == "win32" or server_pid is None or one.ppid() != server_pid:
        return False
    known = {child.pid for child in list(process._children)}  # type: ignore[attr-defined]
    return one.pid not in known | workers and os.getpgid(one.pid) != server_pid


def end_group(worker: "psutil.Process") -> None:
    """Kill a worker and the rest of its group, also if it has died itself."""
    import psutil

    if sys.platform == "win32" or not worker.is_running() and psutil.pid_exists(worker.pid):
        return  # the number has gone to another process: nothing is left of the group
    with contextlib.suppress(OSError):  # nothing is left of it
        os.killpg(worker.pid, signal.SIGKILL)


def block_interrupt() -> None:
    """Let what this thread starts from now on be deaf to Ctrl-C, from its first moment."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # first, because it unblocks the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class StandIn(types.ModuleType):
    """Looks like the caller's main module, but without the file and the name by which a child would run it again."""

    __file__ = None

    def __init__(self, main: types.ModuleType):
        super().__init__("__main__")
        self.__dict__["_main"] = main

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_main"], name)


@contextlib.contextmanager
def main_stand_in() -> Iterator[None]:
    """Functions travel by value, so no child needs the caller's script: one without a main guard works too."""
    with changed(sys.modules, "__main__", StandIn(sys.modules["__main__"])):
        yield


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the server find its preload: it looks in PYTHONPATH, or since Python 3.12.8 and 3.13.1 in our sys.path."""
    search_path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, str(folder))
    try:
        with changed(os.environ, "PYTHONPATH", search_path):
            yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def changed(mapping: Any, key: str, value: Any) -> Iterator[None]:
    before = mapping.get(key)
    mapping[key] = value
    try:
        yield
    finally:
        if before is None:
            del mapping[key]
        else:
            mapping[key] = before


def remove_home() -> None:
    global home
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)
        home = None


def forget_server() -> None:
    """In a fork of the caller: the server ends when nobody holds its pipe any more, so a fork must not hold it."""
    global home, server_pid, lock
    lock = threading.RLock()
    home = server_pid = None
    workers.clear()
    forkserver = sys.modules.get("multiprocessing.forkserver")
    server = getattr(forkserver, "_forkserver", None)
    if server is not None and server._forkserver_pid is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = server._forkserver_pid = server._forkserver_address = None


atexit.register(remove_home)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_server)
