"""Real processes: whatever happens, the right cause is shown, in bounded time, and nothing is left."""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist

from course_utils import _by_value, _pipes, _server, _worker
from course_utils.processes import StageError, launch, start
from tests.launching import (  # noqa: F401  nothing_left is a fixture for every test here
    HEAD,
    IT_HUNG,
    ROOT,
    Script,
    descendants,
    fails,
    in_namespace,
    listening,
    nothing_left,
    on_linux,
    open_descriptors,
    pid_of,
    receive_from,
    sleep_for_ever,
    wait_until,
)

pytestmark = [pytest.mark.processes, pytest.mark.slow]  # a minute in all; `check` has test_training and others for it
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers need not import this file, and pytest with it


# ---- what a run gives ----


def test_results_come_by_rank_and_messages_travel():
    def pass_on(worker, start):
        total = torch.tensor([float(start)])
        if worker.rank > 0:
            worker.transport.wait(worker.transport.irecv(total, worker.rank - 1, "total"))
        total += worker.rank
        if worker.rank + 1 < worker.world_size:
            worker.transport.wait(worker.transport.isend(total, worker.rank + 1, "total"))
        everywhere = total.clone()
        dist.all_reduce(everywhere)  # the default group is there for control
        return worker.rank, total.item(), everywhere.item(), worker.transport.data_group is not dist.group.WORLD

    assert launch(pass_on, 3, 10) == [(0, 10.0, 34.0, True), (1, 11.0, 34.0, True), (2, 13.0, 34.0, True)]


def test_one_stage_alone_and_large_values():
    values = torch.arange(2_000_000, dtype=torch.float32)  # 8 MB, more than any pipe holds
    [result] = launch(lambda worker, x: x * 2, 1, values)
    assert torch.equal(result, values * 2)


def test_a_class_of_the_caller_comes_back_as_the_same_class():
    class Pair:
        def __init__(self, rank):
            self.rank = rank

    assert all(isinstance(pair, Pair) for pair in launch(lambda worker: Pair(worker.rank), 2))


def test_events_and_output_are_live(tmp_path):
    go_on = tmp_path / "go on"

    def announce(worker):
        print("before")
        worker.emit({"rank": worker.rank})
        while not go_on.exists():
            time.sleep(0.005)
        worker.emit("after")

    lines: list[str] = []
    told: list[tuple] = []
    with start(announce, 2, output=lines.append, on_event=lambda *event: told.append(event), limit=IT_HUNG) as run:
        events = run.events()
        first = [next(events), next(events)]
        wait_until(lambda: len(lines) == 2)
        go_on.touch()
        rest = list(events)
        assert run.result() == [None, None]
    assert sorted(first) == [(0, {"rank": 0}), (1, {"rank": 1})] and sorted(rest) == [(0, "after"), (1, "after")]
    assert sorted(told, key=str) == sorted(first + rest, key=str)
    assert sorted(lines) == ["[stage 0] before", "[stage 1] before"]
    assert list(run.events()) == []


def test_output_is_printed_with_its_stage(capsys):
    launch(lambda worker: print("hello"), 2)
    assert sorted(capsys.readouterr().out.splitlines()) == ["[stage 0] hello", "[stage 1] hello"]


def test_nothing_of_much_output_is_lost():
    def chatter(worker):
        for number in range(5000):
            print(number)
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        print("no end of line: é", end="", file=sys.stderr)

    lines: list[str] = []
    launch(chatter, 2, output=lines.append)
    for rank in range(2):
        own = [line.removeprefix(f"[stage {rank}] ") for line in lines if line.startswith(f"[stage {rank}] ")]
        assert own == [*map(str, range(5000)), "from C", "from a child", "no end of line: é"]


def test_a_stage_is_one_thread_in_the_callers_place(monkeypatch, tmp_path):
    """Variables, folder and search path as they are now, not as they were when the server was started."""
    launch(lambda worker: None, 1)
    folder = tmp_path / "with spaces"
    folder.mkdir()
    (folder / "my_module_in_a_folder.py").write_text("VALUE = 5\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COURSE_TEST", "now")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "77")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no such interface")
    monkeypatch.delenv("HOME", raising=False)

    def look(worker):
        module = importlib.import_module("my_module_in_a_folder")
        names = ("COURSE_TEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "HOME")
        variables = [os.environ.get(name) for name in names]
        return torch.get_num_threads(), os.getcwd(), module.VALUE, sys.path, variables

    for result in launch(look, 2):
        assert result == (1, str(folder), 5, sys.path, ["now", *6 * [None]])
    assert os.environ["RANK"] == "77"


def test_edited_modules_count_from_the_next_run_on(monkeypatch, tmp_path):
    module = tmp_path / "my_edited_module.py"
    module.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def look(worker):
        return importlib.import_module("my_edited_module").VALUE, sys.modules["course_utils"].__file__

    assert launch(look, 1)[0][0] == 1
    module.write_text("VALUE = 1 + 1\n")
    assert launch(look, 1)[0] == (2, str(ROOT / "course_utils" / "__init__.py"))


@on_linux
def test_edited_course_code_counts_from_the_next_run_on(tmp_path):
    """The server that forks the workers must not have imported it."""
    shutil.copytree(ROOT / "course_utils", tmp_path / "course_utils", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
        import course_utils.transports as module

        def look(worker):
            import course_utils, course_utils.transports
            found = [getattr(module, "EDITED", 0) for module in (course_utils, course_utils.transports)]
            return *found, course_utils.__file__

        print(launch(look, 1))
        for path in ("course_utils/__init__.py", "course_utils/transports.py"):
            with open(path, "a") as file:
                file.write("EDITED = 1")
        print(launch(look, 1))
    """
    script = Script(tmp_path, code)
    file = str(tmp_path / "course_utils" / "__init__.py")
    assert script.finish() == f"[{(0, 0, file)}]\n[{(1, 1, file)}]\n"
    script.check_nothing_left()


def test_two_runs_at_once_in_one_process():
    def meet(worker, name):
        total = torch.ones(1)
        for _ in range(20):
            dist.all_reduce(total)
            total /= worker.world_size
        return name, worker.rank, os.getpid()

    results: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda n=number: results.update({n: launch(meet, 2, n, limit=IT_HUNG)}))
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(IT_HUNG)
    assert [[r[:2] for r in results[n]] for n in range(3)] == [[(n, 0), (n, 1)] for n in range(3)]
    assert len({r[2] for n in range(3) for r in results[n]}) == 6


def test_spawned_workers_do_the_same():
    def add(worker, x):
        print("spawned")
        total = torch.tensor([x + worker.rank])
        dist.all_reduce(total)
        return total.item()

    lines: list[str] = []
    with start(add, 2, 1, method="spawn", output=lines.append) as run:
        assert run.result() == [3, 3]
    assert sorted(lines) == ["[stage 0] spawned", "[stage 1] spawned"]
    assert run._watcher.folder is not None and not run._watcher.folder.exists()


# ---- what is refused at once ----


def test_bad_arguments_are_named_with_the_remedy():
    with pytest.raises(ValueError, match="world_size is 0; a run needs at least 1 process"):
        launch(print, 0)
    with pytest.raises(ValueError, match="world_size is -2"):
        launch(print, -2)
    for wrong in (True, "2", 2.0, None):
        with pytest.raises(TypeError, match=f"world_size is {wrong!r}; it must be a whole number"):
            launch(print, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn is 7, which is no function"):
        launch(7, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'fork'; use 'forkserver', 'spawn'"):
        launch(print, 2, method="fork")
    for name in ("limit", "wait_limit", "startup_limit"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be more than 0 seconds"):
            launch(print, 2, **{name: 0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'timeout'"):
        launch(print, 2, timeout=3)


def test_what_cannot_be_sent_is_named_with_the_remedy():
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"argument 1 of train, <unlocked.*cannot be sent.*make such a value inside"):

        def train(worker, *args):
            pass

        launch(train, 2, 1, lock)
    with pytest.raises(TypeError, match="locked_up uses a value from outside that cannot be sent"):

        def locked_up(worker):
            return lock

        launch(locked_up, 2)
    error = fails(lambda worker: threading.Lock() if worker.rank else 0, 2)
    assert error.rank == 1 and "the result <unlocked" in str(error) and "Send numbers, text, tensors" in str(error)
    error = fails(lambda worker: worker.emit(threading.Lock()), 1)
    assert "the event <unlocked" in str(error)


def test_unsafe_forkservers_are_not_used():
    unsafe, safe = [(3, 9, 15), (3, 10, 8), (3, 11, 0)], [(3, 9, 16), (3, 10, 9), (3, 11, 1), (3, 12, 0), (3, 14, 0)]
    assert not any(map(_server.has_safe_forkserver, unsafe)) and all(map(_server.has_safe_forkserver, safe))


@on_linux
def test_an_unsafe_version_falls_back_to_spawn(monkeypatch):
    assert _server.choose_method() == "forkserver"
    monkeypatch.setattr(_server.sys, "version_info", (3, 11, 0))
    assert _server.choose_method() == _server.choose_method("forkserver") == "spawn"


# ---- stages that fail ----


def test_an_exception_in_a_middle_stage():
    def middle_fails(worker):
        if worker.rank == 1:
            raise ValueError("the weights are wrong")
        receive_from(worker, 1)

    error = fails(middle_fails, 3)
    assert (error.rank, error.kind) == (1, "exception")
    text = str(error)
    assert text.startswith(
        "stage 1 failed: ValueError: the weights are wrong\n\nTraceback (most recent call last):\n  File"
    )
    assert (
        'raise ValueError("the weights are wrong")' in text
        and "test_processes.py" in text
        and "in middle_fails" in text
    )
    assert "_worker.py" not in text
    # It held its sockets until the caller had heard of it, so nobody else failed.
    assert "because of that" not in text and "PeerLost" not in text


def test_the_cause_comes_before_what_followed_from_it():
    """Stage 1 fails while the others wait for it: theirs are consequences, whoever is heard first."""

    def last_words(worker):
        if worker.rank == 1:
            time.sleep(0.1)
            os._exit(3)
        receive_from(worker, 1)

    for _ in range(5):
        error = fails(last_words, 3)
        assert (error.rank, error.kind) == (1, "died"), error
        assert "stage 1 failed: its process ended with exit code 3 before it had a result" in str(error)
        for line in str(error).split("because of that:\n")[1:]:
            assert "PeerLost: stage" in line


def test_a_second_exception_is_a_consequence():
    def both_fail(worker):
        if worker.rank == 0:
            raise KeyError("first")
        time.sleep(0.02)
        raise OSError("second")

    error = fails(both_fail, 2)
    assert error.rank == 0 and str(error).startswith("stage 0 failed: KeyError: 'first'")


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_stage_that_dies_and_its_last_words(how):
    def die(worker):
        if worker.rank == 1:
            print("last line")
            print("last words", end="")
            if how == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL)
        receive_from(worker, 1)

    lines: list[str] = []
    error = fails(die, 2, output=lines.append)
    assert (error.rank, error.kind) == (1, "died")
    assert ("exit code 7" if how == "exit" else "killed by SIGKILL") in str(error)
    assert lines == ["[stage 1] last line", "[stage 1] last words"]


def test_system_exit_is_a_failure_too():
    error = fails(lambda worker: sys.exit("enough"), 2)
    assert error.kind == "exception" and "SystemExit: enough" in str(error)


def test_a_killed_stage_seen_from_outside():
    with start(sleep_for_ever, 2, limit=IT_HUNG) as run:
        next(run.events())
        os.kill(pid_of(run, 1), signal.SIGKILL)
        with pytest.raises(StageError, match="stage 1 failed: its process was killed by SIGKILL"):
            run.result()


@on_linux
def test_a_killed_server_is_replaced():
    launch(lambda worker: None, 1)
    killed = _server.server_pid
    with start(sleep_for_ever, 2, limit=IT_HUNG) as run:
        next(run.events())
        assert killed is not None
        os.kill(killed, signal.SIGKILL)  # and the workers go with it
        with pytest.raises(StageError) as caught:
            run.result()
    assert caught.value.kind == "died"
    assert launch(lambda worker: worker.rank, 2) == [0, 1] and _server.server_pid != killed


def test_a_stage_that_sleeps_for_ever_ends_by_the_limit_of_a_wait():
    def one_sleeps(worker):
        if worker.rank == 1:
            time.sleep(1e6)
        receive_from(worker, 1)

    error = fails(one_sleeps, 2, wait_limit=0.7)
    assert (error.rank, error.kind) == (1, "timeout")
    assert re.match(
        r"stage 1 is slow: stage 0 waits for it, it has been computing for 0\.\d s\n\n"
        r"stage 0 failed: WaitTimeout: stage 0 waited 0.7 s for a number from stage 1\n\nTraceback",
        str(error),
    )
    assert "at that moment:\nstage 1 computes (for 0." in str(error)


def test_a_stage_that_sleeps_for_ever_ends_by_the_limit_of_the_run():
    def one_sleeps(worker):
        if worker.rank == 1:
            time.sleep(1e6)
        receive_from(worker, 1)

    error = fails(one_sleeps, 2, limit=0.7)
    assert (error.rank, error.kind) == (1, "limit")
    assert re.match(
        r"stage 1 is slow: stage 0 waits for it, it has been computing for 0\.\d s\n\n"
        r"the run had not ended after 0.7 s \(limit\)\n\n"
        r"at that moment:\nstage 0 waits for a number from stage 1 \(for 0\.\d s\)\nstage 1 computes \(for 0\.\d s\)$",
        str(error),
    )


class SlowToUnpickle:
    def __reduce__(self):
        return time.sleep, (1e6,)


def test_a_start_that_takes_too_long():
    """Also with arguments that fill the pipe and that nobody takes out of it."""
    error = fails(lambda worker, *args: None, 2, SlowToUnpickle(), torch.zeros(1_000_000), startup_limit=1.0)
    assert (error.rank, error.kind) == (None, "limit")
    assert str(error).startswith("stages 0 and 1 did not start within 1 s (startup_limit)")
    assert "stage 0 is starting (for" in str(error)


@on_linux
def test_a_server_that_does_not_answer_is_replaced():
    launch(lambda worker: None, 1)
    stuck = _server.server_pid
    assert stuck is not None
    os.kill(stuck, signal.SIGSTOP)
    try:
        error = fails(lambda worker: None, 2, startup_limit=0.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stuck, signal.SIGCONT)
    assert str(error).startswith("the server that starts the stages did not start within 0.5 s (startup_limit)")
    assert launch(lambda worker: worker.rank, 2) == [0, 1] and _server.server_pid != stuck


def test_a_function_that_cannot_be_imported_there(monkeypatch, tmp_path):
    (tmp_path / "vanishing_module.py").write_text("def work(worker):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    vanishing_module = importlib.import_module("vanishing_module")
    (tmp_path / "vanishing_module.py").unlink()
    error = fails(vanishing_module.work, 2)
    assert "ModuleNotFoundError: No module named 'vanishing_module'" in str(error)


def test_an_error_of_a_callback_ends_the_run_and_is_raised():
    def complain(*args):
        raise LookupError("in the callback")

    def say_and_sleep(worker):
        print("x")
        sleep_for_ever(worker)

    for option in ("output", "on_event"):
        with pytest.raises(LookupError, match="in the callback"):
            launch(say_and_sleep, 2, limit=IT_HUNG, **{option: complain})


def test_stop_and_the_context_manager():
    with start(sleep_for_ever, 2) as run:
        next(run.events())
        with pytest.raises(TimeoutError, match="no result within 0.05 s; the run goes on"):
            run.result(timeout=0.05)
    with pytest.raises(StageError, match="the run was stopped before its end") as caught:
        run.result()
    assert caught.value.kind == "stopped" and cloudpickle.loads(cloudpickle.dumps(caught.value)).kind == "stopped"
    run.stop()
    at_once = start(sleep_for_ever, 2)
    at_once.stop()
    assert at_once._watcher.done.is_set()


def test_no_run_keeps_a_descriptor():
    def one_fails(worker):
        print("x")
        return 1 // worker.rank

    def run_some(times):
        for _ in range(times):
            launch(lambda worker: worker.emit(1), 2)
            fails(one_fails, 2)
            fails(sleep_for_ever, 2, limit=0.1)

    run_some(1)
    before = open_descriptors()
    run_some(3)
    assert open_descriptors() == before


# ---- interrupts, and the end of the caller ----


@on_linux
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03, 0.2])
def test_an_interrupt_at_any_moment(delay):
    launch(lambda worker: None, 1)
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        launch(sleep_for_ever, 2)
    timer.join()
    assert time.monotonic() - began < IT_HUNG
    wait_until(lambda: not descendants(), descendants)
    assert launch(lambda worker: worker.rank, 2) == [0, 1]


@on_linux
def test_many_interrupts_during_the_start():
    """Among them some while the thread that watches over the run is itself just being started."""
    launch(lambda worker: None, 1)
    for number in range(40):
        timer = threading.Timer(number * 0.00015, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            launch(sleep_for_ever, 2)
        timer.join()
    wait_until(lambda: not descendants(), descendants)


@on_linux
def test_an_interrupt_from_the_terminal_while_the_server_starts(tmp_path):
    """Ctrl-C reaches the whole group of processes."""
    code = """
        print("ready", flush=True)
        try:
            launch(lambda worker: time.sleep(1e6), 2)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(launch(lambda worker: worker.rank, 2))
    """
    script = Script(tmp_path, code)
    script.wait_for_line("ready")
    time.sleep(0.1)
    os.killpg(script.process.pid, signal.SIGINT)
    assert script.finish() == "ready\ninterrupted\n[0, 1]\n"
    script.check_nothing_left()


BUSY_FOUR = """
    def busy(worker):
        worker.emit(worker.rank)
        if worker.rank == 0:
            while True:
                pass
        if worker.rank == 1:
            x = torch.ones(300, 300)
            while True:
                x = x @ x
        if worker.rank == 2:
            worker.transport.wait(worker.transport.irecv(torch.zeros(1), 3, "a number"))
        time.sleep(1e6)
"""


@on_linux
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_kill_9_of_the_caller(tmp_path, method):
    """A worker in a Python loop, one in torch, one in a wait, one asleep; and a fork of the caller that lives on."""
    code = f"""
        run = start(busy, 4, method={method!r})
        events = run.events()
        for _ in range(4):
            next(events)
        fork = os.fork() if {method == "forkserver"} else 0
        if fork == 0 and {method == "forkserver"}:
            time.sleep(60)
            os._exit(0)
        print("all busy", fork, flush=True)
        time.sleep(1e6)
    """
    script = Script(tmp_path, textwrap.dedent(BUSY_FOUR) + textwrap.dedent(code))
    script.wait_for_line("all busy")
    fork = int(script.seen[-1].split()[-1])
    assert len(script.left()) >= 5
    script.process.kill()
    if fork:  # it keeps multiprocessing's resource tracker, which is of no harm, but nothing else
        wait_until(lambda: not any("stages-" in str(path) for path in script.temporary.iterdir()))
        wait_until(
            lambda: {what for pid, what in script.left().items() if pid != fork and "resource_tr" not in what} == set()
        )
        os.kill(fork, signal.SIGKILL)
    script.check_nothing_left()
    script.finish(expected_exit=-signal.SIGKILL)


@on_linux
def test_kill_9_of_the_caller_while_it_starts(tmp_path):
    script = Script(tmp_path, "print('now', flush=True)\nlaunch(print, 2)\n")
    script.wait_for_line("now")
    time.sleep(0.2)
    script.process.kill()
    script.check_nothing_left()
    script.finish(expected_exit=None)


def test_a_caller_that_ends_takes_its_run_along(tmp_path):
    code = """
        def chatter(worker):
            worker.emit("begun")
            while True:
                print("still here")

        run = start(chatter, 2)
        next(run.events())
    """
    # Registered first, so it is called last.
    first = "import atexit; atexit.register(lambda: print('ended in order:', run._watcher.done.is_set()))\n"
    script = Script(tmp_path, code, head=first + HEAD)
    lines = script.finish().splitlines()
    assert lines.pop() == "ended in order: True"
    assert set(lines) <= {"[stage 0] still here", "[stage 1] still here"}
    script.check_nothing_left()


# ---- who may connect ----


@on_linux
def test_no_port_listens_after_the_start_and_only_loopback_before():
    seen: set[str] = set()
    stop = threading.Event()

    def look_around():
        while not stop.is_set():
            seen.update(address for _, address, _ in listening(list(descendants())))

    def list_own(worker):
        own = psutil.Process().net_connections(kind="inet")
        after = [c for c in own if c.status == psutil.CONN_LISTEN]
        dist.new_group(backend="gloo")  # made later, by the function itself: its listener stays
        later = [c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        receive = torch.zeros(1)
        if worker.rank == 0:  # messages still travel
            worker.transport.wait(worker.transport.isend(torch.ones(1), 1, "one"))
        else:
            worker.transport.wait(worker.transport.irecv(receive, 0, "one"))
        return after, later, receive.item(), os.environ["GLOO_SOCKET_IFNAME"]

    watcher = threading.Thread(target=look_around)
    watcher.start()
    try:
        results = launch(list_own, 2)
    finally:
        stop.set()
        watcher.join()
    assert [after for after, *_ in results] == [[], []]
    assert [later for _, later, *_ in results] == [["127.0.0.1"], ["127.0.0.1"]]
    assert results[1][2] == 1.0 and results[0][3] == "lo"
    assert seen <= {"127.0.0.1"}


def test_a_stranger_is_refused():
    """One that does not know the token, and one that sends back what it was sent."""

    def wrong_token(worker):
        token = b"right" if worker.rank == 0 else b"wrong"
        _worker.recognise_peers(worker.rank, 2, "data", worker.transport.data_group, token)

    def mirror(worker):
        group = worker.transport.data_group
        if worker.rank == 0:
            _worker.recognise_peers(0, 2, "data", group, b"right")
        seen = torch.zeros(32, dtype=torch.uint8)
        dist.recv(seen, 0, group=group)
        dist.send(seen, 0, group=group)

    for fn in (wrong_token, mirror):
        error = fails(fn, 2, wait_limit=5.0)
        assert error.kind == "exception" and "does not belong to this run" in str(error)


@on_linux
def test_folders_are_closed_to_other_users():
    def modes(worker):
        folder = Path(os.environ["HERE"])
        return [oct(path.stat().st_mode & 0o777) for path in (folder, *folder.glob("stages-run-*"))]

    os.environ["HERE"] = str(_server.make_home())
    try:
        assert launch(modes, 1) == [["0o700", "0o700"]]
    finally:
        del os.environ["HERE"]


# ---- odd places ----


SMALL_RUN = """
    def work(worker):
        total = torch.ones(100_000)
        torch.distributed.all_reduce(total)
        print("at work")
        return total

    print([result.sum().item() for result in launch(work, 2)])
"""
SMALL_OUTPUT = ["[200000.0, 200000.0]", "[stage 0] at work", "[stage 1] at work"]


def check_small_run(*scripts: Script) -> None:
    for script in scripts:
        assert sorted(script.finish().splitlines()) == SMALL_OUTPUT
        script.check_nothing_left()


@on_linux
def test_two_callers_at_once_in_odd_folders_on_one_core(tmp_path):
    """Folders with spaces, a long path for temporary files, and scripts without a main guard."""
    pin = f"\nos.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
    spaces = Path(tempfile.mkdtemp(prefix="t ", dir="/tmp"))
    check_small_run(
        Script(tmp_path / "a folder", pin + textwrap.dedent(SMALL_RUN), temporary=spaces),
        Script(tmp_path / "another one", SMALL_RUN, temporary=tmp_path / ("long" * 30)),
    )


@on_linux
def test_a_host_name_that_does_not_resolve_and_a_small_shared_memory(tmp_path):
    prefix = in_namespace(
        "--uts", "--mount", setup="hostname does-not-resolve.invalid && mount -t tmpfs -o size=64k tmpfs /dev/shm"
    )
    check_small_run(Script(tmp_path, SMALL_RUN, prefix=prefix))


@on_linux
def test_a_server_that_other_code_has_started(tmp_path):
    code = """
        if __name__ == "__main__":
            import multiprocessing
            with multiprocessing.get_context("forkserver").Pool(1) as pool:
                assert pool.map(abs, [-1]) == [1]
    """
    check_small_run(Script(tmp_path, textwrap.dedent(code) + textwrap.indent(textwrap.dedent(SMALL_RUN), "    ")))


# ---- notebooks ----


def test_functions_of_notebook_cells(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom course_utils.processes import launch",
        "FACTOR = 3\n\ndef helper(rank):\n    if rank == 1:\n        raise ValueError('in a cell')\n    return rank",
        "def scaled(worker):\n    print('live')\n    return FACTOR * worker.rank\n\nlaunch(scaled, 2)",
        "launch(lambda worker: helper(worker.rank), 2)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=60, allow_errors=True, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(o.text for o in notebook.cells[2].outputs if o.output_type == "stream")
    [value] = [o.data["text/plain"] for o in notebook.cells[2].outputs if o.output_type == "execute_result"]
    assert sorted(printed.splitlines()) == ["[stage 0] live", "[stage 1] live"] and value == "[0, 3]"
    [error] = notebook.cells[3].outputs
    assert error.ename == "StageError" and error.evalue.startswith("stage 1 failed: ValueError: in a cell")
    assert "Cell In[2], line 5, in helper\n    raise ValueError('in a cell')" in error.evalue
    assert "Cell In[4], line 1, in <lambda>\n    launch(lambda worker" in error.evalue


# ---- the parts, alone ----


def test_messages_are_put_together_from_any_pieces():
    sender, receiver = multiprocessing.Pipe()
    with sender, receiver:
        for message in (b"", b"one", b"two" * 1000):
            _pipes.send(sender, message)
        sender.close()
        stream = b"".join(iter(lambda: _pipes.read(receiver), b""))
    for size in (1, 7, 8, 9, 4000):
        messages = _pipes.Messages()
        found = [m for i in range(0, len(stream), size) for m in messages.feed(stream[i : i + size])]
        assert found == [b"", b"one", b"two" * 1000] and not messages.pieces


def test_output_of_python_goes_through_a_pipe_without_descriptors():
    """As on Windows."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        raw: Any = _worker.PipeWriter(writer)
        print("héllo\n", 1, file=io.TextIOWrapper(raw, encoding="utf-8", newline="\n", write_through=True))
        assert _pipes.read(reader).decode() == "héllo\n 1\n"


def test_code_keeps_its_file_and_its_lines():
    parcel = _by_value.pack(test_code_keeps_its_file_and_its_lines, (1,))
    fn, args = cloudpickle.loads(parcel.data)
    assert fn.__code__.co_filename == __file__ and args == (1,)
    assert parcel.sources[__file__] == Path(__file__).read_text().splitlines(keepends=True)


def test_one_stage_is_killed_by_its_caller():
    def wait_for_the_other(worker):
        worker.emit("ready")
        buffer = torch.zeros(1)
        worker.transport.wait(worker.transport.irecv(buffer, 1 - worker.rank, "a number that is never sent"))

    run = start(wait_for_the_other, 2)
    assert next(run.events())[1] == "ready"
    with pytest.raises(ValueError, match="rank is 2; the ranks that have started are 0, 1"):
        run.kill(2)
    run.kill(1)
    with pytest.raises(StageError, match="stage 1's process ended") as caught:
        run.result()
    assert (caught.value.rank, caught.value.kind) == (1, "died")
