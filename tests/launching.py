"""What the tests of real processes share: callers in processes of their own, and what must not be left after a run."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import psutil
import pytest
import torch

from course_utils import _server
from course_utils.processes import Run, StageError, launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers need not import this file, and pytest with it

ROOT = Path(__file__).parents[1]
IT_HUNG = 30.0  # seconds; nothing takes nearly as long
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# ---- what must not be left ----


def descendants() -> dict[int, str]:
    """Processes below this one, without multiprocessing's server and tracker, which live as long as this process."""
    lasting = (_server.server_pid, resource_tracker_pid())
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid not in lasting and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def resource_tracker_pid() -> int | None:
    from multiprocessing import resource_tracker

    return resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]


def listening(pids: list[int]) -> list[tuple[int, str, int]]:
    """(pid, address, port) of every listening internet socket of these processes."""
    found = []
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections(kind="inet")
        except psutil.Error:
            continue
        found += [(pid, c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def temporary_folders() -> list[str]:
    return sorted(path.name for path in _server.home.glob("stages-run-*")) if _server.home else []


def open_descriptors() -> int:
    return psutil.Process().num_fds() if sys.platform != "win32" else psutil.Process().num_handles()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test: no process, no folder, no listening socket and no thread of the runs that it made."""
    _server.make_home()
    before = (descendants(), temporary_folders(), listening([os.getpid()]), threading.active_count())
    yield
    scripts_ended = [script.end() for script in Script.under_way]
    Script.under_way.clear()
    assert not any(scripts_ended), "a script was left, perhaps by a test that has failed"
    after = (descendants(), temporary_folders(), listening([os.getpid()]), threading.active_count())
    assert after == before


HEAD = "import os, sys, time\nimport torch\nfrom course_utils.processes import StageError, launch, start\n"


class Place:
    """A folder for temporary files, and a mark in the environment by which processes can be found."""

    def __init__(self, temporary: Path | None = None):
        self.temporary = temporary or Path(tempfile.mkdtemp(prefix="t-", dir="/tmp" if os.name == "posix" else None))
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.mark = secrets.token_hex(8)
        variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "TEST_MARK": self.mark}
        self.environment = {**os.environ, **variables}

    def left(self) -> dict[int, str]:
        """Processes with the mark in their environment."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = f"{process.status()} {' '.join(process.cmdline())}"
            except psutil.Error:
                continue
        return found

    def check_nothing_left(self) -> None:
        """Within a moment: the server ends by itself when its caller has gone."""

        def left() -> tuple:
            return self.left(), list(map(str, self.temporary.iterdir()))

        wait_until(lambda: left() == ({}, []), left)
        self.temporary.rmdir()


class Script(Place):
    """A caller in a process of its own."""

    under_way: ClassVar[list["Script"]] = []

    def __init__(
        self,
        folder: Path,
        code: str,
        temporary: Path | None = None,
        prefix: tuple[str, ...] = (),
        head: str = HEAD,
    ):
        super().__init__(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "script.py"
        path.write_text(head + textwrap.dedent(code))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(path)],
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.seen: list[str] = []
        self.under_way.append(self)

    def end(self) -> bool:
        """End what is left of it, if anything is; only its own processes."""
        left = list(self.left())
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=IT_HUNG)
        shutil.rmtree(self.temporary, ignore_errors=True)
        return bool(left)

    def wait_for_line(self, text: str) -> None:
        assert self.process.stdout and self.process.stderr
        for line in self.process.stdout:
            self.seen.append(line)
            if text in line:
                return
        pytest.fail(f"{text!r} was never printed, only {self.seen}; {self.process.stderr.read()}")

    def finish(self, expected_exit: int | None = 0) -> str:
        """All that it printed. Fails if it does not end, or ends in another way."""
        try:
            output, errors = self.process.communicate(timeout=2 * IT_HUNG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        output = "".join(self.seen) + output
        assert expected_exit is None or self.process.returncode == expected_exit, output + errors
        assert not any(word in errors for word in ("Traceback", "Warning", "[W", "Fatal")), errors
        return output


def wait_until(condition: Callable[[], Any], what: Callable[[], Any] = lambda: "") -> None:
    give_up = time.monotonic() + IT_HUNG
    while not condition():
        assert time.monotonic() < give_up, what()
        time.sleep(0.01)


def fails(fn: Callable, world_size: int, *args: Any, **options: Any) -> StageError:
    with pytest.raises(StageError) as caught:
        launch(fn, world_size, *args, **{"limit": IT_HUNG, **options})
    assert caught.value.kind != "limit" or "limit" in options or "startup_limit" in options, "it hung"
    return caught.value


def receive_from(worker: Any, peer: int) -> None:
    worker.transport.wait(worker.transport.irecv(torch.zeros(1), peer, "a number"))


def pid_of(run: Run, rank: int) -> int:
    pid = run._watcher.stages[rank].process.pid
    assert pid is not None
    return pid


def sleep_for_ever(worker: Any) -> None:
    worker.emit("asleep")
    time.sleep(1e6)


def in_namespace(*kinds: str, setup: str) -> tuple[str, ...]:
    """A command prefix that runs what follows in namespaces of its own; skips where the system does not allow it."""
    prefix = ("unshare", *kinds, "sh", "-c", f'{setup} && exec "$@"', "sh")
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command `unshare` (util-linux)")
    if tried.returncode:
        pytest.skip(f"cannot make a namespace here: {tried.stderr.strip()}")
    return prefix
