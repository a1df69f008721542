"""Run a function on K fresh processes, one per stage, also from a notebook cell, and watch over them.

    def hello(worker):
        print("hello from", worker.rank)
        return worker.rank**2

    launch(hello, 3)  # prints `[stage 1] hello from 1` and so on, returns [0, 1, 4]

Each process is a rank of torch.distributed over gloo on this machine. An exception, a crash, a wait without end or an
interrupt of the cell ends all of them, with the first cause shown first, and leaves no process and no file behind.

    run = start(hello, 3)  # returns at once
    print(run.status())  # who waits for whom now, also while the run is stuck
"""

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from course_utils import _by_value
from course_utils._failures import Failure
from course_utils._stage_view import OF_THE_WHOLE_RUN
from course_utils._watching import END, Options, Watcher, active
from course_utils.waits import Snapshot, Verdict

POLL = 0.2  # seconds; on Windows a wait without an end could not be interrupted
SECONDS_TO_STOP = 10.0


class StageError(RuntimeError):
    """A run did not get to its end. The message has what held it up or its first cause, and then what followed from it.

    Attributes:
        kind: "exception" of the function's own, "died" without one, "timeout" of a wait or because of a deadlock,
            "closed" by another stage, "limit" of the whole run or of its start, "stopped".
        rank: of the stage on which it depends: the one that failed first, or that others waited for because it was
            slow, stood still, or had ended. None if there is no such one, as in a deadlock.
        verdict: what held the run up: see `waits.Verdict`.
    """

    def __init__(self, message: str, kind: str, rank: int | None = None, verdict: Verdict | None = None):
        super().__init__(message)
        self.kind, self.rank, self.verdict = kind, rank, verdict

    def __reduce__(self) -> tuple:
        return StageError, (str(self), self.kind, self.rank, self.verdict)


class Run:
    """The workers of one `start`, under way or ended. As a context manager it stops what still runs at the end."""

    def __init__(self, fn: Callable, world_size: int, args: tuple, options: Options):
        parcel = _by_value.pack(fn, args)
        self._cells = _by_value.cell_names(parcel.sources)
        self._watcher = Watcher(parcel, world_size, options)
        self._has_begun = False

    def result(self, timeout: float | None = None) -> list:
        """Wait for the end; return what the function returned, by rank.

        Raises:
            StageError: a stage failed, a limit was passed, or the run was stopped.
            TimeoutError: `timeout` seconds have passed; the run goes on.
            KeyboardInterrupt: after the run has been stopped and cleaned up.
        """
        watcher = self._watcher
        with self._stopped_by_interrupt():
            if not wait_for(watcher.done, timeout):
                raise TimeoutError(f"no result within {timeout:g} s; the run goes on: ask again, or stop() it")
        if watcher.error is not None:
            raise watcher.error
        if watcher.failure is not None and watcher.last is not None:
            raise self._describe(watcher.failure, watcher.last)
        return watcher.results

    def events(self) -> Iterator[tuple[int, Any]]:
        """(rank, event) for each `worker.emit(event)`, live, until the run has ended, well or badly: `result` tells."""
        while True:
            with self._stopped_by_interrupt():
                try:
                    item = self._watcher.events.get(timeout=POLL)
                except queue.Empty:
                    continue
            if item is END:
                self._watcher.events.put(END)  # for whoever asks again
                return
            yield item

    def status(self, stacks: bool = False) -> Snapshot:
        """What holds the run up, who waits for whom, and what each stage does now: `print(run.status())`.

        At any time and from any thread or cell, also while a stage is stuck or dead; of a run that has ended, what was
        last. `status().verdict` has the kind and the ranks. With `stacks` the text ends with every stage's stack.
        """
        snapshot = self._watcher.look()
        if not stacks:
            return snapshot
        texts = [f"{snapshot.noun} {rank}:\n{stack}" for rank, stack in self.stacks().items()]
        return replace(snapshot, more="\n".join(filter(None, [snapshot.more, *texts])))

    def stacks(self) -> dict[int, str]:
        """By rank, where in the code each stage is, innermost call first; also of one in a wait, a sleep or a C loop.

        Takes at most about a second. In place of a stack a text may say why there is none: the stage has ended, its
        process is stopped, or the system is Windows, where a process cannot be asked.
        """
        stacks = self._watcher.stacks()
        return {rank: self._with_cell_names(stack) for rank, stack in stacks.items()}

    def stop(self) -> None:
        """End the run: returns when no process is left. Does nothing if it has ended already."""
        self._watcher.stop()
        if self._has_begun:
            # An interrupt may have come while the thread was just being started: then it is not known to be there yet.
            wait_for(self._watcher.done, SECONDS_TO_STOP if self._watcher.thread.ident else POLL)

    def kill(self, rank: int) -> None:
        """Kill the process of one stage, as the system does when memory runs out; the run then fails of it.

        Raises:
            ValueError: there is no such rank, or it has not started yet.
        """
        stages = {stage.rank: stage for stage in self._watcher.stages}
        if rank not in stages:
            raise ValueError(f"rank is {rank}; the ranks that have started are {', '.join(map(str, stages)) or 'none'}")
        stages[rank].process.kill()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _begin(self) -> None:
        self._has_begun = True
        self._watcher.thread.start()

    @contextmanager
    def _stopped_by_interrupt(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.stop()
            raise

    def _describe(self, failure: Failure, last: Snapshot) -> StageError:
        verdict = last.verdict
        parts = []
        if failure.kind in ("died", "timeout", "closed", "limit") and verdict.kind not in ("failed", "starting"):
            parts.append(str(verdict))
        parts.append(("" if failure.rank is None else f"{last.noun} {failure.rank} failed: ") + failure.summary)
        if failure.traceback:
            parts.append(failure.traceback.rstrip())
        if self._watcher.others:
            head = "at that moment:" if failure.kind in OF_THE_WHOLE_RUN else "because of that:"
            parts.append("\n".join([head, *self._watcher.others]))
        rank = verdict.culprit if failure.kind in OF_THE_WHOLE_RUN else failure.rank
        return StageError(self._with_cell_names("\n\n".join(parts)), failure.kind, rank, verdict)

    def _with_cell_names(self, text: str) -> str:
        for file_name, cell in self._cells.items():
            text = text.replace(f'File "{file_name}"', cell)
        return text


def start(
    fn: Callable,
    world_size: int,
    *args: Any,
    startup_limit: float = 60.0,
    limit: float | None = None,
    wait_limit: float = 60.0,
    output: Callable[[str], Any] | None = None,
    on_event: Callable[[int, Any], Any] | None = None,
    method: str | None = None,
) -> Run:
    """Begin to run fn(worker, *args) on `world_size` new processes; return at once with a handle.

    fn and its arguments are sent by value: fn may be defined in a notebook cell, its modules are imported anew. What
    the stages print appears as `[stage 1] ...` lines while they run.

    Args:
        startup_limit: seconds until all stages must have started and joined their groups.
        limit: seconds for the whole run; None for no limit.
        wait_limit: seconds that a stage waits for a single message; a deadlock is ended after a few.
        output: called with each line instead of print, in a thread of its own.
        on_event: called with (rank, event) for each `worker.emit(event)`, in a thread of its own.
        method: "forkserver" or "spawn"; None for the one that suits this system.

    Raises:
        TypeError: fn is not callable, or something cannot be sent to another process.
        ValueError: an argument out of its range.
    """
    run = prepare(fn, world_size, args, Options(startup_limit, limit, wait_limit, output, on_event, method))
    with run._stopped_by_interrupt():
        run._begin()
    return run


def launch(fn: Callable, world_size: int, *args: Any, **options: Any) -> list:
    """Run fn(worker, *args) on `world_size` new processes; return the results by rank. Options as for `start`."""
    run = prepare(fn, world_size, args, Options(**options))
    with run:  # an interrupt at any moment from here on ends the run
        run._begin()
        return run.result()


def prepare(fn: Callable, world_size: int, args: tuple, options: Options) -> Run:
    if not callable(fn):
        raise TypeError(
            f"fn is {_by_value.shorten(fn)}, which is no function; it must be callable as fn(worker, *args)"
        )
    if not isinstance(world_size, int) or isinstance(world_size, bool):
        raise TypeError(f"world_size is {world_size!r}; it must be a whole number: how many processes to start")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; a run needs at least 1 process")
    for name in ("startup_limit", "limit", "wait_limit"):
        seconds = getattr(options, name)
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{name} is {seconds!r}; it must be more than 0 seconds")
    return Run(fn, world_size, args, options)


def wait_for(event: threading.Event, timeout: float | None) -> bool:
    """event.wait(timeout) in small pieces: on Windows an interrupt does not end a wait, only what comes after it."""
    give_up = None if timeout is None else time.monotonic() + timeout
    while not event.wait(POLL if give_up is None else min(POLL, max(0.0, give_up - time.monotonic()))):
        if give_up is not None and time.monotonic() >= give_up:
            return False
    return True


def stop_all() -> None:
    """At the end of the caller: nothing outlives it."""
    left = list(active)
    for watcher in left:
        watcher.stop()
    for watcher in left:
        wait_for(watcher.done, SECONDS_TO_STOP)


atexit.register(stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=active.clear)  # they belong to the parent
