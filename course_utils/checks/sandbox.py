"""Answers of other people, tried in a process of their own that has limits and may be lost.

The course's process hands over the text of the cells, and looks at what comes back as plain values (`tasks.judge`), so
nothing that an answer does to its own process can change a verdict. What an answer may not do (start processes, write
outside its folder, talk to the network, change the course's own modules) is refused by Python itself through an audit
hook and then told. This keeps accidents and pranks away from a teacher's files; it is no defence against somebody
who is determined (docs.python.org/3/library/sys.html#sys.addaudithook): grade in a container or a throw-away account.
"""

import base64
import contextlib
import json
import linecache
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from course_utils import _plain
from course_utils.checks.tasks import LIMIT, Outcome, Task, find_task, try_out

OUTPUT_LIMIT = 1_000_000  # bytes that all answers of a hand-in may print
FILE_LIMIT = 20_000_000  # bytes of a file, the values that come back among them
MEMORY_LIMIT = 4_000_000_000  # bytes beyond what an idle process has (Linux)
START_LIMIT = 120.0  # seconds until the modules are imported
GRACE = 5.0  # seconds beyond its limit after which an answer that does not end is ended with its process
ANSWER = "<answer>"


@dataclass(frozen=True)
class HandIn:
    """A task and the text that was handed in: cells of the learner's own that come before, and the answer's cell."""

    task: Task
    before: tuple[str, ...]
    answer: str


def try_out_apart(hand_ins: Sequence[HandIn], seed: int, limit: float = LIMIT) -> list[Outcome]:
    """What each answer gives, tried in another process; one that spoils its process costs only itself.

    An outcome may also have the kind "lost", with a sentence that says how the answer ended its process, or
    "forbidden", with what it tried to do.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(hand_ins):  # usually once
        outcomes += one_process(hand_ins[len(outcomes) :], seed, limit)
    return outcomes


def one_process(hand_ins: Sequence[HandIn], seed: int, limit: float) -> list[Outcome]:
    """The outcomes as far as one process came; if it was lost, the last one says how."""
    with tempfile.TemporaryDirectory(prefix="answers-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request = {
            "seed": seed,
            "limit": limit,
            "hand_ins": [{"task": h.task.full_name, "before": h.before, "answer": h.answer} for h in hand_ins],
        }
        (folder / "request.json").write_text(json.dumps(request), "utf-8")
        inside = folder / "inside"
        inside.mkdir()
        why_lost = watch(start(folder), folder, len(hand_ins), limit)
        outcomes: list[Outcome] = []
        for number in range(len(hand_ins)):
            outcome = read_outcome(folder / f"inside/{number}.json")
            if outcome is None:
                return [*outcomes, Outcome("lost", message=why_lost)]
            outcomes.append(outcome)
            if outcome.spoilt:  # it ended with this one: what is left in it must not meet the next one
                break
        return outcomes


def start(folder: Path) -> subprocess.Popen:
    folders = ("TMPDIR", "TEMP", "TMP", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")  # torch sets the last one itself
    kept = {key: value for key, value in os.environ.items() if key != "COURSE_SEED"}
    return subprocess.Popen(
        [sys.executable, "-m", "course_utils.checks.sandbox", str(folder)],
        cwd=folder / "inside",
        env=kept | dict.fromkeys(folders, str(folder / "inside")) | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=os.name == "posix",
    )


def watch(process: subprocess.Popen, folder: Path, number: int, limit: float) -> str:
    """Wait for the process to end, or end it; a sentence about why it ended."""
    output = bytearray()

    def read() -> None:
        assert process.stdout is not None
        while (piece := process.stdout.read1(65536)) and len(output) <= OUTPUT_LIMIT:  # type: ignore[attr-defined]
            output.extend(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    progress, since = -1, time.monotonic()
    why = ""
    try:
        while process.poll() is None and not why:
            done = sum((folder / f"inside/{i}.json").exists() for i in range(number))
            done += (folder / "inside/started").exists()
            if done != progress:
                progress, since = done, time.monotonic()
            given = limit + GRACE if progress else START_LIMIT
            if len(output) > OUTPUT_LIMIT:
                why = f"It printed more than {OUTPUT_LIMIT // 1_000_000} MB, and was ended."
            elif time.monotonic() - since > given:
                why = f"It was still running after {given:g} s, and only the end of its process ended it."
            else:
                time.sleep(0.02)
    finally:
        end(process)
    if not why:
        said = output.decode("utf-8", "replace").strip().splitlines()
        last = f" Its last line: {said[-1][:200]}" if said else ""
        by = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
        why = f"It ended its process ({by}).{last}"
    return why


def end(process: subprocess.Popen) -> None:
    """End the process and all that it has started, as far as the system knows."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


# --- What travels -----------------------------------------------------------------------------------------------------


def write_outcome(outcome: Outcome, path: Path) -> None:
    """As text, the tensors in base64; in one step, so that it is there or not."""
    tensors: list[torch.Tensor] = []
    try:
        described = _plain.take_apart(vars(outcome), tensors)
    except TypeError as error:
        tensors, described = [], _plain.take_apart(vars(Outcome("error", error="TypeError", message=str(error))), [])
    raw = [[_plain.spec_of(t), base64.b64encode(_plain.raw(t).numpy().tobytes()).decode()] for t in tensors]
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"outcome": described, "tensors": raw}), "utf-8")
    os.replace(unfinished, path)


def read_outcome(path: Path) -> Outcome | None:
    """None if there is none, or what is there is none."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            return None
        content = json.loads(path.read_text("utf-8"))
        tensors = []
        for spec, text in content["tensors"]:
            room = _plain.room_for(spec)
            data = bytearray(base64.b64decode(text))
            if room.numel():
                room = torch.frombuffer(data, dtype=torch.uint8).clone().view(room.dtype).reshape(room.shape)
            tensors.append(room)
        values = _plain.put_together(content["outcome"], tensors, ())
        known = {f.name for f in fields(Outcome)}
        return Outcome(**{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
        return None


# --- Inside the process -----------------------------------------------------------------------------------------------


class Forbidden(PermissionError):
    """An answer tried what answers may not do."""


FORBIDDEN = {
    "os.fork": "start a process",
    "os.forkpty": "start a process",
    "os.posix_spawn": "start a process",
    "os.spawn": "start a process",
    "os.system": "start a process",
    "os.exec": "start a process",
    "os.startfile": "start a process",
    "subprocess.Popen": "start a process",
    "os.kill": "send a signal",
    "os.killpg": "send a signal",
    "socket.connect": "use the network",
    "socket.bind": "use the network",
    "socket.sendto": "use the network",
}
CHANGES_FILES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CHANGES_FILES |= {"os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.chown"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(folder: Path) -> list[str]:
    """Refuse from now on what answers may not do; the list that is returned grows by a sentence for each attempt."""
    tried: list[str] = []
    home, null = os.path.realpath(folder), os.path.realpath(os.devnull)

    def outside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return not (real in (null, home) or real.startswith(home + os.sep))

    def refuse(what: str) -> None:
        tried.append(what)
        raise Forbidden(f"an answer may not {what}")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and outside(path):
                refuse(f"write outside its folder: {os.fsdecode(path)}")
        elif event in FORBIDDEN:
            refuse(FORBIDDEN[event])
        elif event in CHANGES_FILES:
            for path in arguments[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1]:
                if outside(path):
                    refuse(f"change files outside its folder: {os.fsdecode(path)}")

    sys.addaudithook(hook)
    return tried


def set_limits() -> None:
    """Memory, size of files and number of processes, where the system has such limits."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_FSIZE": FILE_LIMIT, "RLIMIT_CORE": 0}
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits |= {"RLIMIT_AS": in_use + MEMORY_LIMIT}
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def course_functions() -> dict[str, int]:
    """{name in a module of the course: what it is}: an answer that changes one of them is found out."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "course_utils" and module is not None:
            for name, value in list(vars(module).items()):
                if callable(value) and not name.startswith("__"):
                    found[f"{module_name}.{name}"] = id(getattr(value, "__code__", value))
                    if isinstance(value, type):
                        for part, method in list(vars(value).items()):
                            if hasattr(method, "__code__"):
                                found[f"{module_name}.{name}.{part}"] = id(method.__code__)
    return found


def run_answer(hand_in: dict[str, Any], seed: int, limit: float, tried: list[str]) -> Outcome:
    """Run the cells that were handed in, and try the function that the last one defines."""
    task = find_task(hand_in["task"])
    before = course_functions()
    space: dict[str, Any] = {"__name__": "__main__"}
    for text in hand_in["before"]:
        with contextlib.suppress(Exception):  # notes and trials need not run
            exec(compile(text, "<cell>", "exec"), space)
    tried.clear()  # what was refused to imports does not count: matplotlib, for one, asks a program for fonts
    linecache.cache[ANSWER] = (len(hand_in["answer"]), None, hand_in["answer"].splitlines(keepends=True), ANSWER)
    outcome = define(hand_in["answer"], space, task.name)
    if outcome is None:
        outcome = try_out(task, space[task.name], seed, limit)
    after = course_functions()
    changed = [name for name, what in before.items() if after.get(name) != what]
    if changed:
        tried.append(f"change the course's own {changed[0]}")
    if tried:
        outcome = Outcome("forbidden", message=tried[0])
    outcome.spoilt = bool(tried) or threads_left()
    return outcome


def threads_left() -> bool:
    """Whether threads of an answer still run; they get a moment to end."""
    give_up = time.monotonic() + 0.5
    while threading.active_count() > 1 and time.monotonic() < give_up:
        time.sleep(0.01)
    return threading.active_count() > 1


def define(text: str, space: dict[str, Any], name: str) -> Outcome | None:
    """Run the answer's cell; an outcome if that fails or leaves no function of the name."""
    try:
        exec(compile(text, ANSWER, "exec"), space)
    except SyntaxError as error:
        return Outcome("error", [], "SyntaxError", f"{error.msg}, in line {error.lineno} of the cell")
    except Exception as error:
        return Outcome("error", [], type(error).__name__, f"{error}, when its cell was run")
    return None if name in space else Outcome("error", [], "NameError", f"the cell defines no {name}")


def main(folder: Path) -> None:
    """What the other process does: `python -m course_utils.checks.sandbox FOLDER`."""
    request = json.loads((folder / "request.json").read_text("utf-8"))
    for hand_in in request["hand_ins"]:
        find_task(hand_in["task"])  # imports what the tasks need
    torch.set_num_threads(1)
    inside = folder / "inside"
    set_limits()
    tried = guard(inside)
    (inside / "started").touch()
    for number, hand_in in enumerate(request["hand_ins"]):
        outcome = run_answer(hand_in, request["seed"], request["limit"], tried)
        write_outcome(outcome, inside / f"{number}.json")
        if outcome.spoilt:
            break
    os._exit(0)  # threads that an answer has left do not matter


if __name__ == "__main__":
    main(Path(sys.argv[1]))
