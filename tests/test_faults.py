"""What can go wrong with real processes, as a table: the right stage is blamed, in bounded time, and nothing is left.

After each test here no process, folder, socket, thread or descriptor is left: the fixtures below see to that. Every run
has a limit, and one that reaches it "hung". What this matrix has elsewhere:

    an exception, os._exit, kill -9, SIGSTOP, a sleep, of plain functions   test_processes.py, test_waits.py
    one interrupt, at any moment; kill -9 of the caller                     test_processes.py
    both receive first; random lists of sends and receives that hang        test_waits.py
    the disk is full at any operation of a checkpoint                       test_checkpoint.py
"""

import inspect
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist

from course_utils import _pipes, _server, _watching, processes
from course_utils.pipeline import Pipeline
from course_utils.processes import StageError, launch, start
from course_utils.recipes import TrainingConfig
from course_utils.schedules import gpipe
from course_utils.training import train, train_rank
from course_utils.transports import Worker
from tests import models
from tests.launching import (  # noqa: F401  nothing_left is a fixture for every test here
    IT_HUNG,
    Place,
    Script,
    fails,
    in_namespace,
    nothing_left,
    on_linux,
    open_descriptors,
    receive_from,
    wait_until,
)

pytestmark = [pytest.mark.processes, pytest.mark.slow]  # about a minute in all
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers need not import this file, and pytest with it

not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals or limits")
RUN = replace(models.TINY_RUN, stages=3, held_out=0)
PATIENCE = 3.0  # seconds: the limit of a wait where a run ends by that


@pytest.fixture(autouse=True)
def no_descriptor_left(request: pytest.FixtureRequest) -> Iterator[None]:
    launch(lambda worker: None, 1)  # the server is there
    before = open_descriptors()
    yield
    if "kernel" not in request.node.name:  # jupyter_client keeps an event loop
        assert open_descriptors() == before


# ---- in a real training step, of three stages ----


def broken(stage: int, kind: str, fault: Callable[[Any], Any]) -> type[Pipeline]:
    """An engine that commits a fault instead of returning what micro-batch 1 has become on one stage.

    Args:
        kind: "F" or "B".
        fault: called with the tensors to be handed on; returns what is handed on instead.
    """

    class Broken(Pipeline):
        def forward(self, action: Any, *rest: Any) -> Any:
            return self.meet(action, super().forward(action, *rest))

        def backward(self, action: Any, *rest: Any) -> Any:
            return self.meet(action, super().backward(action, *rest))

        def meet(self, action: Any, tensors: Any) -> Any:
            is_here = (action.stage, action.kind, action.micro_batch) == (stage, kind, 1)
            return fault(tensors) if is_here else tensors

    return Broken


def training_fails(engine: type[Pipeline], wait_limit: float = IT_HUNG) -> StageError:
    with pytest.raises(StageError) as caught:
        train(RUN, engine=engine, run=partial(launch, limit=2 * IT_HUNG, wait_limit=wait_limit))
    assert caught.value.kind != "limit", "it hung"
    return caught.value


def raise_an_exception(tensors: Any) -> Any:
    raise ArithmeticError("planted")


def exit_at_once(tensors: Any) -> Any:
    os._exit(7)


def be_killed(tensors: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still(tensors: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(tensors: Any) -> Any:
    time.sleep(1e6)


def change_the_shape(tensors: Any) -> Any:
    return (tensors[0][:, 1:], *tensors[1:])


def change_the_dtype(tensors: Any) -> Any:
    return (tensors[0].double(), *tensors[1:])


def hand_on_too_little(tensors: Any) -> Any:
    return tensors[:1]


def call_a_collective_alone(tensors: Any) -> Any:
    dist.all_reduce(torch.zeros(1))
    return tensors


def leave_memory(num_bytes: int) -> None:
    """Let this process have no more than this besides what it has."""
    import resource

    size = psutil.Process().memory_info().vms + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def ask_torch_for_too_much(tensors: Any) -> Any:
    leave_memory(1 << 26)
    return torch.zeros(1 << 32)


def ask_python_for_too_much(tensors: Any) -> Any:
    leave_memory(1 << 26)
    return bytearray(1 << 34)


def use_up_the_last_byte(tensors: Any) -> Any:
    leave_memory(1 << 22)
    held: Any = ()
    while True:
        held = (held,)


class Fault(NamedTuple):
    """
    Attributes:
        kind, rank: of the StageError.
        says: how its text begins, as a pattern.
    """

    commit: Callable[[Any], Any]
    stage: int
    action: str
    kind: str
    rank: int
    says: str
    wait_limit: float = IT_HUNG


DIED = "stage {0}'s process ended \\({1}\\) while it was in {2} of micro-batch 1;"
MISMATCH = "stage {0} failed: PlanMismatch: {1}: the plan says {2}, the stage gave {3}"
SHAPE = r"\dx\d+x16 float32"
MEMORY = r" \(out of memory: smaller micro-batches, more stages or re-materialisation need less\)\n"

IN_TRAINING = {
    **{
        f"an exception in {action} of stage {stage}": Fault(
            *(raise_an_exception, stage, action, "exception", stage),
            rf"stage {stage} failed: ArithmeticError: planted\n\nTraceback [\s\S]*in raise_an_exception\n    raise Ar",
        )
        for stage in range(3)
        for action in ("F", "B")
    },
    "os._exit in F of stage 1": Fault(
        *(exit_at_once, 1, "F", "died", 1), DIED.format(1, "exit code 7", "F")
    ),
    "kill -9 in B of stage 2": Fault(
        *(be_killed, 2, "B", "died", 2), DIED.format(2, "killed by signal 9", "B")
    ),
    "SIGSTOP in B of stage 1": Fault(
        *(stand_still, 1, "B", "timeout", 1),
        r"stage 1 stands still: its process is stopped \(SIGSTOP\), everyone waits for it, it was in B of",
        PATIENCE,
    ),
    "a sleep in F of stage 0": Fault(
        *(sleep, 0, "F", "timeout", 0),
        r"stage 0 is slow: everyone waits for it, it has been in F of micro-batch 1 for \d+\.\d s\n",
        PATIENCE,
    ),
    "a collective of one stage alone, in F of stage 1": Fault(
        *(call_a_collective_alone, 1, "F", "timeout", 1),
        r"stage 1 is slow: everyone waits for it, it has been in F of micro-batch 1 for \d+\.\d s\n",
        PATIENCE,
    ),
    "activations of a wrong shape": Fault(
        *(change_the_shape, 1, "F", "exception", 1),
        MISMATCH.format(1, r"the activations of micro-batch 1 \(stage 1 to 2\)", SHAPE, SHAPE),
    ),
    "activations of a wrong dtype": Fault(
        *(change_the_dtype, 0, "F", "exception", 0),
        MISMATCH.format(0, r"the activations of micro-batch 1 \(stage 0 to 1\)", r"[\dx]+ float32", r"[\dx]+ float64"),
    ),
    "gradients of a wrong shape": Fault(
        *(change_the_shape, 2, "B", "exception", 2),
        MISMATCH.format(2, r"the gradients of micro-batch 1 \(stage 2 to 1\)", SHAPE, SHAPE),
    ),
    "a carry that lacks a tensor": Fault(
        *(hand_on_too_little, 1, "F", "exception", 1),
        r"stage 1 failed: PlanMismatch: the activations of micro-batch 1: the plan has 2 tensors, the stage gave 1\n",
    ),
}  # fmt: skip

OUT_OF_MEMORY = {
    "torch": Fault(
        *(ask_torch_for_too_much, 1, "F", "exception", 1),
        rf"stage 1 failed: RuntimeError: .*can't allocate memory: you tried to allocate \d+ bytes.*{MEMORY}",
    ),
    "python": Fault(*(ask_python_for_too_much, 2, "B", "exception", 2), f"stage 2 failed: MemoryError{MEMORY}"),
    "the last byte": Fault(*(use_up_the_last_byte, 0, "B", "exception", 0), f"stage 0 failed: MemoryError{MEMORY}"),
}


def check(fault: Fault) -> None:
    engine = broken(fault.stage, fault.action, fault.commit)
    error = training_fails(engine, fault.wait_limit)
    assert re.match(fault.says, str(error)), error
    assert (error.kind, error.rank) == (fault.kind, fault.rank), error


@not_on_windows
@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_fault_in_a_training_step(name: str) -> None:
    check(IN_TRAINING[name])


@on_linux  # elsewhere the system does not keep this limit
@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_a_stage_runs_out_of_memory(name: str) -> None:
    check(OUT_OF_MEMORY[name])


def test_another_number_of_micro_batches_on_one_stage() -> None:
    """All stages refuse, before any data has moved, and say who has which."""

    def differ(worker: Worker, config: TrainingConfig) -> None:
        config = replace(config, micro_batches=2 if worker.rank == 1 else 3)
        train_rank(worker, config, config.cut, gpipe(config.stages, config.micro_batches))

    error = fails(differ, 3, RUN)
    assert error.kind == "exception"
    assert "PlanMismatch: the ranks have different plans for the next step" in str(error)
    found = re.findall(r"^ +rank (\d): (\d) micro-batches over 3 stages", str(error), re.M)
    assert found[:3] == [("0", "3"), ("1", "2"), ("2", "3")]
    assert str(error).count("PlanMismatch") >= 3 or "because of that" in str(error)


# ---- messages of two stages ----


def test_both_send_first() -> None:
    """With sends that wait until they are received."""

    def send_first(worker: Worker) -> None:
        transport, peer = worker.transport, 1 - worker.rank
        transport.wait(transport.isend(torch.zeros(1), peer, "a letter"))
        receive_from(worker, peer)

    error = fails(send_first, 2, wait_limit=1.0)
    sentence = (
        r"stage 0 waits for stage 1 to take a letter( \(for \d\.\d s\))?; stage 1 waits for stage 0 to take a letter: "
        r"both wait, this is a deadlock\n\nstage [01] failed: \w+: stage "
    )
    assert re.match(sentence, str(error)), error
    assert error.rank is None and error.verdict is not None and error.verdict.ranks == (0, 1)


def test_a_deadlock_ends_before_its_waits_run_out() -> None:
    """Stages 0 and 1 wait for each other, 2 for 1, and 3 computes. Nobody has failed: that is said of all."""

    def circle(worker: Worker) -> None:
        if worker.rank == 3:
            time.sleep(1e6)
        receive_from(worker, 1 if worker.rank != 1 else 0)

    error = fails(circle, 4, wait_limit=2 * IT_HUNG)
    assert (error.kind, error.rank) == ("timeout", None)
    assert re.fullmatch(
        r"stage 0 waits for a number from stage 1 \(for \d+\.\d s\); stage 1 waits for a number from stage 0: both "
        r"wait, this is a deadlock\n\nno wait of a deadlock ends: the run did not wait for 60 s \(wait_limit\)\n\n"
        r"at that moment:(\nstage [012] waits for a number from stage [01] \(for \d+\.\d s\)){3}\n"
        r"stage 3 computes \(for \d+\.\d s\)",
        str(error),
    )


def test_both_receive_first_without_the_transport() -> None:
    """What torch.distributed itself waits for nobody knows; that it does not come in time is said all the same."""

    def receive_first(worker: Worker) -> None:
        dist.recv(torch.zeros(1), 1 - worker.rank)

    error = fails(receive_first, 2, wait_limit=1.0)
    assert error.kind == "timeout" and re.match(r"stage [01] failed: \w+: .*[Tt]imed out", str(error))
    assert "in receive_first\n    dist.recv(torch.zeros(1), 1 - worker.rank)" in str(error)


def send_other(worker: Worker, sent: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Straight over the transport, below all checks of the engine."""
    transport = worker.transport
    mine, begin = (sent, transport.isend) if worker.rank == 0 else (buffer, transport.irecv)
    transport.wait(begin(mine, 1 - worker.rank, "a letter"))
    return mine


def test_a_message_that_is_larger_than_its_buffer() -> None:
    """gloo ends the receiver, which cannot say why; what it printed does. So the engine checks before it sends."""
    lines: list[str] = []
    error = fails(send_other, 2, torch.ones(8), torch.zeros(4), output=lines.append)
    assert (error.kind, error.rank) == ("died", 1)
    assert re.match(
        r"stage 1's process ended \(killed by signal 6\) while it waited.* for a letter from stage 0", str(error)
    )
    assert any("32 vs 16. Received data size doesn't match expected size" in line for line in lines)


def test_a_message_of_another_size_or_dtype_may_arrive_as_nonsense() -> None:
    """Nothing fails: that is why the engine compares plans."""
    _, prefix = launch(send_other, 2, torch.ones(2), torch.full((4,), -1.0), limit=IT_HUNG)
    assert prefix.tolist() == [1, 1, -1, -1]
    _, bits = launch(send_other, 2, torch.ones(2), torch.zeros(2, dtype=torch.int32), limit=IT_HUNG)
    assert bits.tolist() == [0x3F800000, 0x3F800000]  # 1.0 as an integer


# ---- what a worker has started itself ----


class Started(NamedTuple):
    """A process, never to be taken for another that gets its number."""

    pid: int
    at: float

    @property
    def is_alive(self) -> bool:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return process.create_time() == self.at and process.status() != psutil.STATUS_ZOMBIE
        return False


def start_children(worker: Worker) -> None:
    """A command, a fork, and a daemon, in its own session, whose parent has gone, that floods the pipe. Emits all."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    if os.fork() == 0:
        time.sleep(1e6)
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            os.write(writer, b"%d" % os.getpid())
            while True:
                try:
                    print(100 * "noise ")
                except OSError:  # nobody reads any more
                    time.sleep(1)
        os._exit(0)
    os.wait()
    daemon = int(os.read(reader, 20))
    children = {child.pid for child in psutil.Process().children()} | {daemon}
    worker.emit([Started(pid, psutil.Process(pid).create_time()) for pid in children])


def leave_children(worker: Worker, how: str) -> None:
    if worker.rank == 0:
        if how != "end":
            receive_from(worker, 1)
        return
    start_children(worker)
    if how == "fail":
        raise ArithmeticError("planted")
    if how == "exit":
        os._exit(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        time.sleep(1e6)


HOW_IT_ENDS = {"end": "", "fail": "exception", "exit": "died", "kill": "died", "stop": "stopped"}


@on_linux
@pytest.mark.parametrize("how", HOW_IT_ENDS)
def test_what_a_worker_leaves_behind_ends_with_the_run(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hold up the end, though it holds the pipe of the output."""
    monkeypatch.setattr(_watching, "SECONDS_TO_END", 2 * IT_HUNG)  # for what has not let go
    monkeypatch.setattr(processes, "SECONDS_TO_STOP", 2 * IT_HUNG)
    lines: list[str] = []
    with start(leave_children, 2, how, limit=IT_HUNG, output=lines.append) as run:
        (rank, children), *_ = run.events() if how != "stop" else [next(run.events())]
        assert rank == 1 and len(children) == 3
        began = time.monotonic()
        if how == "stop":
            wait_until(lambda: lines)
            assert all(child.is_alive for child in children)
            run.stop()
        if how == "end":
            assert run.result() == [None, None]
        else:
            with pytest.raises(StageError) as caught:
                run.result()
            assert caught.value.kind == HOW_IT_ENDS[how]
    assert time.monotonic() - began < IT_HUNG
    assert not [child for child in children if child.is_alive]


@on_linux
def test_a_process_that_cannot_be_found_holds_up_the_end_only_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It floods the pipe of the output, until nobody reads from that any more."""
    monkeypatch.setattr(_server, "descendants", lambda pids: [])
    monkeypatch.setattr(_server, "end_group", lambda worker: None)
    lines: list[str] = []
    with start(leave_children, 2, "kill", limit=IT_HUNG, output=lines.append) as run:
        [(_, children)] = run.events()
        with pytest.raises(StageError, match="killed by SIGKILL"):
            run.result(timeout=IT_HUNG)
    for child in filter(lambda child: child.is_alive, children):
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(child.is_alive for child in children))
    assert any("noise" in line for line in lines)


@on_linux
def test_what_a_spawned_worker_leaves_behind_ends_with_the_run() -> None:
    """There is no server to which it would fall. A fork that holds the pipes of its parent does not hide its death."""

    def leave_a_fork(worker: Worker) -> None:
        if os.fork() == 0:
            time.sleep(1e6)
        [fork] = [child.pid for child in psutil.Process().children()]
        worker.emit([Started(fork, psutil.Process(fork).create_time())])
        os._exit(3)

    with start(leave_a_fork, 1, limit=2 * IT_HUNG, method="spawn") as run:
        [(_, [child])] = run.events()
        with pytest.raises(StageError, match="exit code 3"):
            run.result()
    wait_until(lambda: not child.is_alive)  # it was killed; it dies when the system lets it


@not_on_windows
def test_a_fork_that_comes_back_is_no_stage() -> None:
    def fork(worker: Worker) -> int:
        if os.fork() == 0:
            with pytest.raises(RuntimeError, match="a fork of a stage cannot emit events"):
                worker.emit("from the fork")
            return -1  # would be taken for the result of the stage
        os.wait()
        if os.fork() == 0:
            raise ArithmeticError("in the fork")
        os.wait()
        return worker.rank

    lines: list[str] = []
    with start(fork, 2, limit=IT_HUNG, output=lines.append) as run:
        assert run.result() == [0, 1] and list(run.events()) == []
    assert sum("ArithmeticError: in the fork" in line for line in lines) == 2


@on_linux
def test_other_processes_of_the_caller_are_spared() -> None:
    """Two runs at once, and a process that the caller has started through the same server."""
    import multiprocessing

    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(1e6,))
    with _server.main_stand_in():
        other.start()
    try:
        with start(leave_children, 2, "stop", limit=IT_HUNG) as lasting:
            children = next(lasting.events())[1]
            for how in ("end", "kill"):
                with suppress(StageError):
                    launch(leave_children, 2, how, limit=IT_HUNG, output=lambda line: None)
            assert all(child.is_alive for child in children) and other.is_alive()
            assert lasting.status().verdict.kind in ("running", "slow")
    finally:
        other.kill()
        other.join()
        other.close()


# ---- output without end ----


def test_a_stage_that_floods_its_output() -> None:
    """100 MB: what is shown has a limit, which is said once; the run, its events and its memory do not mind."""

    def flood(worker: Worker, enough: Path) -> int:
        written, block = 0, 999 * (b"x" * 99 + b"\n")
        while worker.rank == 1 and (written < 100_000_000 or not enough.exists()):
            written += os.write(1, block)
        for number in range(50 if worker.rank == 0 else 0):
            worker.emit(number)
            time.sleep(0.01)
        print("the end")
        return written

    shown, last, memory = [0, 0], ["", ""], psutil.Process().memory_info().rss

    def show(line: str) -> None:
        rank = int(line[7])
        shown[rank] += len(line) + 1
        last[rank] = line

    with tempfile.TemporaryDirectory() as folder:
        enough = Path(folder) / "enough"

        def on_event(rank: int, number: int) -> None:
            if number == 49:  # events are not behind the flood: it ends only after this one
                enough.touch()

        results = launch(flood, 2, enough, output=show, on_event=on_event, limit=2 * IT_HUNG)
    assert results[0] == 0 and results[1] >= 100_000_000
    assert last[0] == "[stage 0] the end"
    assert last[1] == (
        "[stage 1] ... 10 MB of output are shown; what this stage writes from here on is dropped: let it write to a "
        "file instead"
    )
    assert 0.99 * _pipes.MOST_OUTPUT < shown[1] < _pipes.MOST_OUTPUT + 200
    assert psutil.Process().memory_info().rss - memory < 30_000_000


def test_a_stage_that_fails_in_its_flood() -> None:
    def flood(worker: Worker) -> None:
        if worker.rank == 0:
            receive_from(worker, 1)
        for _ in range(300):
            os.write(1, 99_999 * b"x")  # without the end of a line
        raise ArithmeticError("planted")

    lines: list[str] = []
    error = fails(flood, 2, output=lines.append)
    assert str(error).startswith("stage 1 failed: ArithmeticError: planted\n")
    assert sum(map(len, lines)) < _pipes.MOST_OUTPUT + 200 and max(map(len, lines)) < 100_000
    assert sum("is dropped" in line for line in lines) == 1


def test_lines_are_cut_and_counted() -> None:
    output = _pipes.Output("stage 3", most=70)
    assert output.feed(b"one\ntw") == ["[stage 3] one"]
    assert output.feed(b"o\n\xff") == ["[stage 3] two"]
    assert output.feed(b"") == ["[stage 3] \ufffd"]
    (told,) = output.feed(60 * b"x" + b"\n" + b"y\n")
    assert told.startswith("[stage 3] ... 7e-05 MB of output are shown")
    assert output.feed(b"more\n") == output.feed(b"") == [] and not output.rest
    output = _pipes.Output("stage 3")
    pieces = [len(line) for _ in range(5) for line in output.feed(10_000 * b"x")]
    assert pieces == [len("[stage 3] ") + 20_000] * 2


# ---- the caller: interrupted twice, killed, restarted ----


def for_ever() -> TrainingConfig:
    return replace(RUN, steps=10**6)


@on_linux
def test_an_interrupt_in_a_training_run_and_another_while_it_ends() -> None:
    config = for_ever()
    run = start(train_rank, 3, config, config.cut, gpipe(3, config.micro_batches), limit=2 * IT_HUNG)
    next(run.events())  # a step is done

    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        run._watcher.stopping.wait(IT_HUNG)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        try:
            with run:
                thread.start()
                run.result()
        finally:
            thread.join()
            time.sleep(0.1)  # the second one is raised here at the latest
    assert run._watcher.done.wait(IT_HUNG) and run._watcher.failure.kind == "stopped"
    assert launch(lambda worker: worker.rank, 2) == [0, 1]


LEAVES_CHILDREN = "\n".join(
    [
        "import os, psutil, signal, subprocess, sys, time, torch",
        "from contextlib import suppress",
        "from typing import Any, NamedTuple",
        "from course_utils.processes import launch, start",
        "from course_utils.transports import Worker",
        *map(inspect.getsource, (receive_from, Started, start_children, leave_children)),
        'run = start(leave_children, 2, "stop", output=lambda line: None)',
        'print("children:", len(next(run.events())[1]), flush=True)',
    ]
)


@on_linux
def test_kill_9_of_the_caller_ends_what_its_workers_have_left(tmp_path: Path) -> None:
    script = Script(tmp_path, LEAVES_CHILDREN + "\nrun.result()", head="")
    script.wait_for_line("children: 3")
    assert len(script.left()) >= 6  # the caller, two workers, three children, and the server
    script.process.kill()
    script.check_nothing_left()
    script.finish(expected_exit=-signal.SIGKILL)


@on_linux
def test_a_kernel_that_is_restarted_or_killed_in_the_middle_of_a_run() -> None:
    """As JupyterLab does it: the kernel is asked first, and when it is busy killed after a while."""
    jupyter_client = pytest.importorskip("jupyter_client")
    place = Place()
    kernel = jupyter_client.KernelManager(kernel_name="python3", shutdown_wait_time=1.0)
    kernel.start_kernel(env=place.environment)
    client = kernel.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=4 * IT_HUNG)
        client.execute(LEAVES_CHILDREN + "\nrun.result()")
        wait_for_output(client, "children: 3")
        before = [Started(pid, psutil.Process(pid).create_time()) for pid in place.left()]
        assert len(before) >= 6
        kernel.restart_kernel(now=False)
        wait_until(lambda: not any(process.is_alive for process in before))
        wait_until(lambda: not list(place.temporary.glob("stages-*")))

        client.stop_channels()
        client = kernel.client()  # without what the old kernel has still said
        client.start_channels()
        client.wait_for_ready(timeout=4 * IT_HUNG)
        client.execute(LEAVES_CHILDREN + "\nprint(launch(lambda worker: worker.rank, 2))")
        wait_for_output(client, "[0, 1]")  # and the other run is still under way
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
        kernel.cleanup_resources()
        kernel.context.destroy()
    place.check_nothing_left()


def wait_for_output(client: Any, text: str) -> None:
    """Until a cell has printed a text; what it says instead fails the test."""
    give_up = time.monotonic() + 4 * IT_HUNG
    while time.monotonic() < give_up:
        with suppress(queue.Empty):
            message = client.get_iopub_msg(timeout=1)
            assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
            if text in message["content"].get("text", ""):
                return
    pytest.fail(f"{text!r} was never printed")


# ---- a disk that is full, or gone ----


@on_linux
def test_files_of_a_run_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's /dev/full takes no byte, as a full disk."""
    (tmp_path / "status").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(_server, "make_run_folder", lambda method: tmp_path)
        with pytest.raises(
            OSError, match="no stage can start, because the files of a run cannot be written to"
        ) as caught:
            launch(lambda worker: None, 2)
    assert "(No space left on device): make room there, or set TMPDIR" in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(_server, "home", tmp_path / "gone")
        patch.setattr(_server, "start_server", lambda check: None)
        with pytest.raises(OSError, match=rf"cannot be written to {tmp_path}/gone \(No such file or directory\)"):
            launch(lambda worker: None, 2)
    assert launch(lambda worker: worker.rank, 2) == [0, 1]


@on_linux
def test_a_disk_that_is_full_when_the_stages_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(_server, "make_run_folder", lambda method: tmp_path)
        error = fails(lambda worker: None, 2)
    assert error.kind == "exception" and "DistStoreError: No space left on device" in str(error)


FULL_DISK = """
    import pathlib
    from dataclasses import replace
    from course_utils.checkpoint import CheckpointError, Checkpoints
    from course_utils.recipes import TrainingConfig
    from course_utils.training import train
    from course_utils.transformer import TransformerConfig

    folder = pathlib.Path("disk")
    config = TrainingConfig(
        stages=2, micro_batches=2, steps=2, batch_size=4, model=TransformerConfig(d_model=16, heads=2), held_out=0
    )
    for on_failure in ("continue", "stop"):
        try:
            result = train(config, checkpoints=Checkpoints(folder / on_failure, on_failure=on_failure), save_every=1)
            print(len(result.steps), [(save.saved, "No space left on device" in save.problem) for save in result.saves])
        except StageError as error:
            print(error.kind, "No space left on device" in str(error), "CheckpointError" in str(error))
        print(Checkpoints(folder / on_failure).latest(), [path.name for path in folder.rglob("*") if path.is_file()])
"""


@on_linux
def test_checkpoints_on_a_full_disk(tmp_path: Path) -> None:
    """A real one, of 100 kB: less than the weights and their moments."""
    (tmp_path / "disk").mkdir()
    prefix = in_namespace("--mount", setup=f"mount -t tmpfs -o size=100k tmpfs '{tmp_path}/disk'")
    script = Script(
        tmp_path, "import warnings; warnings.simplefilter('ignore')\n" + textwrap.dedent(FULL_DISK), prefix=prefix
    )
    assert script.finish().splitlines() == [
        "2 [(False, True), (False, True)]",
        "None []",
        "exception True True",
        "None []",
    ]
    script.check_nothing_left()
