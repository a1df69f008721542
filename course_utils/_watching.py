"""The thread that starts the workers of one run and watches over them until all have gone.

A thread, because an interrupt of the caller's cell reaches its main thread only: what this one has begun it finishes,
so that whatever happens no process and no file is left.
"""

import pickle
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from course_utils import _pipes, _server, _stacks, _stage_view, _status_file, _surroundings, _worker
from course_utils._by_value import Parcel
from course_utils._failures import PATIENCE, Failure, RunEnded, death, endless, says_what_cannot_be_written
from course_utils._stage_view import Stage
from course_utils.waits import RankState, Snapshot, names

SECONDS_TO_END = 2.0  # for a worker that has been released or killed
LOOK_AGAIN = 1.0  # seconds, for what nothing tells by itself
DEADLOCK_AFTER = 3.0  # seconds of its youngest wait, before the run is ended
END = object()  # behind the last event of a run
active: set["Watcher"] = set()  # in this process; what is left of them ends with it


@dataclass
class Options:
    """See `processes.start`."""

    startup_limit: float = 60.0
    limit: float | None = None
    wait_limit: float = 60.0
    output: Callable[[str], Any] | None = None
    on_event: Callable[[int, Any], Any] | None = None
    method: str | None = None


class Watcher:
    """Starts, watches and ends the workers of a run; `done` is set when nothing of them is left.

    Afterwards either `results` has one value per rank, or `failure` says why not, `others` what followed from it and
    `last` what all stages did then; an error of the caller's own callbacks is in `error`.
    """

    def __init__(self, parcel: Parcel, world_size: int, options: Options):
        self.parcel, self.world_size, self.options = parcel, world_size, options
        self.method = _server.choose_method(options.method)
        self.began = time.monotonic()
        self.done = threading.Event()
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.wake_up, self.waker = Pipe(duplex=False)
        self.stages: list[Stage] = []
        self.outputs = [_pipes.Output(f"stage {rank}") for rank in range(world_size)]
        self.sources: dict[Any, Callable[[], Any]] = {}  # what to do when something arrives, or a process ends
        self.folder: Path | None = None
        self.sender: threading.Thread | None = None
        self.results: list = []
        self.failure: Failure | None = None
        self.at_first_failure: Snapshot | None = None
        self.last: Snapshot | None = None
        self.others: list[str] = []
        self.error: BaseException | None = None
        self.next_look = 0.0  # time.monotonic()
        self.thread = threading.Thread(target=self.run, name="watch over stages", daemon=True)

    def stop(self) -> None:
        """Ask the thread to end the run now. From any thread, any number of times."""
        self.stopping.set()
        with suppress(OSError):
            self.waker.send_bytes(b"stop")

    def run(self) -> None:
        active.add(self)
        try:
            self.start_and_listen()
        except BaseException as error:
            self.error, self.last = error, replace(self.look(), end="stopped")
        try:
            self.clean_up()
        except BaseException as error:
            self.error = self.error or error
        active.discard(self)
        self.events.put(END)
        self.done.set()

    def start_and_listen(self) -> None:
        try:
            _server.block_interrupt()
            self.start_all()
            self.listen()
            self.results = [stage.result[0] for stage in self.stages]
            self.last = self.look()
        except RunEnded as ended:
            self.failure = ended.failure
            self.last = self.look_back(ended.failure)
            self.others = _stage_view.what_followed(ended.failure, self.stages, self.last)

    def look(self) -> Snapshot:
        """What all stages do now; of a run that has ended, what they did then. From any thread."""
        if self.last is None and self.folder is not None:
            with suppress(OSError, ValueError):  # the file is just being made, or has just been removed
                snapshot = _stage_view.look(self.folder, self.stages, self.world_size)
                return self.last or snapshot  # since `last` is known processes have been ended
        return self.last or Snapshot([RankState(rank, "starting") for rank in range(self.world_size)])

    def stacks(self) -> dict[int, str]:
        """Where in the code each stage is, or why that is not known. From any thread."""
        alive = {s.rank: s.watched for s in self.stages if s.watched and self.last is None}
        found = _stacks.collect(self.folder, alive) if self.folder else {}
        return {rank: found.get(rank, _stacks.NONE) for rank in range(self.world_size)}

    def look_back(self, failure: Failure) -> Snapshot:
        """What all stages did when the run failed: a wait that runs out soon changes what the others do."""
        then = self.at_first_failure if failure.kind in ("timeout", "closed") else None
        return replace(then or self.look(), end="stopped" if failure.kind == "stopped" else "failed", late_from=0.0)

    # ---- start ----

    def start_all(self) -> None:
        options = self.options
        self.check_limits()
        with says_what_cannot_be_written(lambda: _server.home or tempfile.gettempdir()):
            if self.method == "forkserver":
                _server.start_server(self.check_limits)
            self.folder = _server.make_run_folder(self.method)
            _status_file.create(self.folder / "status", self.world_size)
        with _server.must_answer(self.began + options.startup_limit):
            for rank in range(self.world_size):
                self.check_limits()
                self.stages.append(self.start_one(rank, self.folder))
        self.sources[self.wake_up] = self.check_limits
        for stage in self.stages:
            self.sources[stage.control] = partial(self.read_control, stage)
            self.sources[stage.output] = partial(self.read_output, stage)
            self.sources[stage.process.sentinel] = partial(self.note_death, stage)
        settings = _surroundings.settings_for_workers(
            self.folder, options.startup_limit, options.wait_limit, self.parcel.sources
        )
        # In a thread: arguments may be large, and a worker that does not read them must not keep this thread waiting.
        self.sender = threading.Thread(target=self.send_all, args=(pickle.dumps(settings),), daemon=True)
        self.sender.start()

    def start_one(self, rank: int, folder: Path) -> Stage:
        control, workers_control = Pipe()
        output, workers_output = Pipe(duplex=False)
        with workers_control, workers_output:
            args = (rank, self.world_size, self.method, folder, workers_control, workers_output)
            try:
                process = _server.start_process(self.method, _worker.main, args)
            except (EOFError, OSError):  # the server has gone, perhaps because it did not answer in time
                self.check_limits()
                raise
        return Stage(rank, process, control, output)

    def send_all(self, settings: bytes) -> None:
        for stage in self.stages:
            with suppress(OSError):  # it has died: its sentinel says so
                _pipes.send(stage.control, settings)
                _pipes.send(stage.control, self.parcel.data)

    # ---- watch ----

    def listen(self) -> None:
        """Return when all results are here; raise RunEnded, with the nearest cause known, when they cannot come."""
        while not all(stage.result for stage in self.stages):
            failures = [stage.failure for stage in self.stages if stage.failure]
            patience = self.check_limits()
            if failures:
                nearest = min(failures, key=lambda failure: failure.distance)
                first = min(failure.at for failure in failures)
                patience = first + PATIENCE[nearest.kind] - time.monotonic()
                if patience <= 0 or all(stage.has_reported for stage in self.stages):
                    raise RunEnded(nearest)
            for source in wait(list(self.sources), LOOK_AGAIN if patience is None else min(patience, LOOK_AGAIN)):
                self.sources[source]()
            if not failures:
                self.look_again()

    def look_again(self) -> None:
        """Now and then: notice a death of which a fork of the worker, which holds its pipes, keeps us from hearing.

        And a deadlock. It is certain as soon as it is seen (`_status_file.read`); the rest is for those who look on.
        """
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_AGAIN
        for stage in self.stages:
            if stage.process.sentinel in self.sources and stage.process.exitcode is not None:
                self.note_death(stage)
        now = self.look()
        circle = now.verdict.ranks if now.verdict.kind == "deadlock" else ()
        if circle and min(now.states[rank].seconds for rank in circle) >= DEADLOCK_AFTER:
            self.at_first_failure = now
            raise RunEnded(endless(self.options.wait_limit))

    def check_limits(self) -> float | None:
        """Seconds until the next limit; raises RunEnded if the run was stopped or has passed one."""
        if self.stopping.is_set():
            raise RunEnded(Failure("stopped", None, "the run was stopped before its end"))
        now, limits = time.monotonic(), []
        late = [stage.rank for stage in self.stages if not stage.is_ready]
        if late or not self.stages:
            limits.append(self.began + self.options.startup_limit)
            if now > limits[-1]:
                who = names("stage", late) if late else "the server that starts the stages"
                limit = f"within {self.options.startup_limit:g} s (startup_limit)"
                raise RunEnded(Failure("limit", None, f"{who} did not start {limit}"))
        if self.options.limit is not None:
            limits.append(self.began + self.options.limit)
            if now > limits[-1]:
                raise RunEnded(Failure("limit", None, f"the run had not ended after {self.options.limit:g} s (limit)"))
        return max(0.0, min(limits) - now) + 0.001 if limits else None

    def read_control(self, stage: Stage) -> None:
        data = _pipes.read(stage.control)
        if not data:
            self.sources.pop(stage.control, None)
        for message in stage.messages.feed(data):
            try:
                kind, *content = pickle.loads(message)
            except Exception as error:
                self.note(stage, Failure("exception", stage.rank, f"what it sent cannot be unpickled here: {error!r}"))
                continue
            if kind == "ready":
                stage.is_ready = True
            elif kind == "event":
                self.events.put((stage.rank, *content))
                if self.options.on_event:
                    self.options.on_event(stage.rank, *content)
            elif kind == "result":
                stage.result = content
            else:
                cause, summary, trace, at = content
                self.note(stage, Failure(cause, stage.rank, summary, trace, at))

    def read_output(self, stage: Stage) -> None:
        """Show what a stage has written, line by line; what is too much of it is read too, so that it need not wait."""
        data = _pipes.read(stage.output)
        if not data:
            self.sources.pop(stage.output, None)
        _pipes.show(self.outputs[stage.rank].feed(data), self.options.output)

    def note_death(self, stage: Stage) -> None:
        self.sources.pop(stage.process.sentinel, None)
        while stage.control in self.sources and stage.control.poll():  # what it said before
            self.read_control(stage)
        if not stage.has_reported:
            stage.process.join(SECONDS_TO_END)
            self.note(stage, death(stage.rank, stage.process.exitcode))

    def note(self, stage: Stage, failure: Failure) -> None:
        stage.failure = failure
        self.at_first_failure = self.at_first_failure or self.look()

    # ---- end ----

    def clean_up(self) -> None:
        """Release or kill the workers, end what they have started, show the rest of their output. Bounded in time."""
        give_up = time.monotonic() + SECONDS_TO_END
        try:
            _server.end_stages(self.stages, spare_them=bool(self.results))
            for stage in self.stages if self.results else []:
                with suppress(OSError):  # it has died since
                    _pipes.send(stage.control, _pipes.RELEASE)
            self.show_rest_of_output(give_up)
        finally:
            if self.sender:
                self.sender.join(SECONDS_TO_END)
            for stage in self.stages:
                stage.process.join(max(0.0, give_up - time.monotonic()))
                if stage.process.exitcode is None:
                    stage.process.kill()
                    stage.process.join(SECONDS_TO_END)
                _server.workers.discard(stage.process.pid or 0)
                stage.control.close()
                stage.output.close()
                with suppress(ValueError):  # it runs on in spite of SIGKILL, as in a broken network file system
                    stage.process.close()
            self.wake_up.close()
            self.waker.close()
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def show_rest_of_output(self, give_up: float) -> None:
        while pipes := [stage.output for stage in self.stages if stage.output in self.sources]:
            ready = wait(pipes, max(0.0, give_up - time.monotonic()))
            if not ready or time.monotonic() > give_up:  # a process that could not be found holds the pipe
                break
            for pipe in ready:
                self.sources[pipe]()
