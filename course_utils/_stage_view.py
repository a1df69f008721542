"""The caller's view of its workers: what has come from each of them, and what all of them do at one moment."""

from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from course_utils import _pipes, _status_file
from course_utils._failures import Failure
from course_utils.waits import RankState, Snapshot

IMITATED = "queues by {} imitated, messages real"
# Those in which the others have not failed, but it matters what they did.
OF_THE_WHOLE_RUN = ("timeout", "closed", "limit")


@dataclass
class Stage:
    """The caller's view of a worker."""

    rank: int
    process: BaseProcess
    control: Connection
    output: Connection
    watched: psutil.Process | None = field(init=False)  # knows whether it is stopped, and never takes another for it
    messages: _pipes.Messages = field(default_factory=_pipes.Messages)
    is_ready: bool = False
    result: list = field(default_factory=list)  # the one result, once it is there
    failure: Failure | None = None

    def __post_init__(self) -> None:
        try:
            self.watched = psutil.Process(self.process.pid)
        except psutil.Error:  # it has ended already
            self.watched = None

    @property
    def has_reported(self) -> bool:
        return bool(self.result) or self.failure is not None

    @property
    def condition(self) -> str:
        """What its process cannot say: "frozen" by SIGSTOP or a debugger, "died" if it is no more, else nothing."""
        try:
            status = self.watched.status() if self.watched else psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return "died"
        except psutil.Error:  # it may not be looked at
            return ""
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "frozen"
        return "died" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else ""


def look(folder: Path, stages: list[Stage], world_size: int) -> Snapshot:
    """What the workers do now, from what they write down and from what has become of their processes."""
    states, noun = _status_file.read(folder / "status", world_size)
    model = _status_file.read_model(folder / "status", world_size)
    somebody_failed = any(stage.failure for stage in stages)
    for stage in stages:
        states[stage.rank] = complete(states[stage.rank], stage, somebody_failed)
    return Snapshot(states, noun, more="" if model == "buffered" else IMITATED.format(model))


def complete(state: RankState, stage: Stage, somebody_failed: bool) -> RankState:
    """What a rank has written down, and what its process does not know or cannot say any more."""
    condition = stage.condition  # first: a process that ends well does so after its result has come
    if state.state == "starting":
        state = replace(state, text="its start")
    if stage.result:
        return state
    if failure := stage.failure:
        kind = {"died": "died", "timeout": "gave up", "closed": "lost"}.get(failure.kind, "failed")
        if kind in ("gave up", "lost") and state.state != "gave up":  # a wait that was none of the transport's
            kind = "failed"
        return replace(state, state=kind, how=failure.how or failure.summary.split("\n")[0])
    if state.state == "gave up" and not somebody_failed:  # it has lived through that
        return RankState(stage.rank, "computing", "", state.seconds)
    if condition:
        return replace(state, state=condition, how="a moment ago")
    return state


def what_followed(failure: Failure, stages: list[Stage], snapshot: Snapshot) -> list[str]:
    """On the other stages; after a time-out also what those do that have not failed."""
    lines = []
    for stage in stages:
        if stage.failure and stage.failure is not failure:
            lines.append(f"{snapshot.noun} {stage.rank}: {stage.failure.summary}")
        elif not stage.has_reported and failure.kind in OF_THE_WHOLE_RUN:
            lines.append(snapshot.states[stage.rank].line(snapshot.noun))
    return lines
