"""What `course.py soak` runs: one training, broken off again and again, gives the bits of an undisturbed one.

The training goes through many launches. All but the last are to end early: with fewer steps than the whole, an
exception in a stage, the kill of one (in a step, in a save, or from the caller at any moment). Each next one resumes
from the newest checkpoint, mostly with another number of stages. Some steps have a gradient that is not a number, in
the undisturbed run too: all stages must skip them alike.

After each launch: the error named the right stage, every step was the one of the undisturbed run to the last bit, no
process, thread, open file or folder is left. At the end: the same fingerprint, and the caller's memory has not grown.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from course_utils import _server  # noqa: E402
from course_utils.checkpoint import Checkpoints  # noqa: E402
from course_utils.processes import StageError  # noqa: E402
from course_utils.training import Step, TrainingResult, train  # noqa: E402
from tests.faults_at_random import (  # noqa: E402
    ENDINGS,
    FatalCheckpoints,
    FaultyPipeline,
    Launch,
    Plan,
    launch_with,
    make_plan,
)

SETTLED = 10.0  # seconds in which the processes, threads and open files of a launch must have gone


class SoakFailure(AssertionError):
    """Something is not as in the undisturbed run, or something is left. Names the launch."""


# --- The runs --------------------------------------------------------------------------------------------------------


class Soak:
    """A plan being carried out, with its checkpoints in a folder.

    Attributes:
        whole: the undisturbed run.
        endings: how often launches have ended how.
        steps: how many all launches together have reported; after a resume some are done a second time.
        measured: after each launch, the figures of `figures`.
    """

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder
        self.endings: Counter[str] = Counter()
        self.steps = 0
        self.measured: dict[str, list[float]] = {name: [] for name in ALLOWED}

    def undisturbed(self, on_step: Callable[[Step], Any] | None = None) -> None:
        """The run that is to be compared with. Raises SoakFailure."""
        config, nans = self.plan.config, self.plan.nans
        engine = partial(FaultyPipeline, nans=nans, fault=None)
        self.whole = train(config, run=launch_with(None, config.steps), on_step=on_step, engine=engine)
        self.expected = [repr(step) for step in self.whole.steps]  # as text a norm that is not a number equals itself
        skipped = {step.number for step in self.whole.steps if step.skipped}
        if skipped != set(nans):
            raise SoakFailure(f"skipped were the steps {sorted(skipped)}, not a number {sorted(nans)}")

    def broken_off(self) -> Iterator[int]:
        """All launches; yields the number of steps that are safe after each of them. Raises SoakFailure."""
        before = held() | {"folders": []}
        for number, launch in enumerate(self.plan.launches):
            try:
                self.launch(launch)
                check_nothing_left(before)
            except Exception as error:
                raise SoakFailure(f"launch {number}, {launch}: {error}") from error
            for name, figure in figures().items():
                self.measured[name].append(figure)
            yield self.safe_steps()

    def safe_steps(self) -> int:
        """Those of the newest checkpoint."""
        manifest = Checkpoints(self.folder).latest()
        return manifest.step if manifest else 0

    def launch(self, launch: Launch) -> None:
        """Resume, end as planned, and compare: each step, and if it came to the end the whole."""
        done, fault = self.safe_steps(), launch.fault
        ending = fault.ending if fault else "whole"
        steps = max(fault.step, done) if ending == "fewer steps" else self.plan.config.steps
        config = replace(self.plan.config, **launch.changes, steps=steps)
        try:
            result = train(
                config,
                run=launch_with(fault, steps),
                on_step=self.compare,
                engine=partial(FaultyPipeline, nans=self.plan.nans, fault=fault),
                checkpoints=FatalCheckpoints(self.folder, fault),
                save_every=launch.save_every,
                resume=True,
            )
        except StageError as error:
            if fault is None or (error.kind, error.rank) != (ENDINGS[ending], fault.rank):
                raise SoakFailure(f"ended with kind {error.kind!r} of rank {error.rank}: {error}") from error
            if ending == "exception" and "ArithmeticError: injected in step" not in str(error):
                raise SoakFailure(f"another exception came: {error}") from error
        else:
            if (safe := self.safe_steps()) != config.steps:
                raise SoakFailure(f"it ended well after step {config.steps}, and the newest checkpoint has {safe}")
            if ending not in ("whole", "fewer steps"):
                if ending in ("exception", "kill in a step") and done < config.steps:
                    raise SoakFailure("it ended well: the fault never came")
                ending = "too late"  # a kill at any moment, and the whole training was done first
            if config.steps == self.plan.config.steps:
                self.compare_whole(result)
        self.endings[ending] += 1

    def compare(self, step: Step) -> None:
        self.steps += 1
        if repr(step) != self.expected[step.number]:
            raise SoakFailure(f"{step} is {self.expected[step.number]} in the undisturbed run")

    def compare_whole(self, result: TrainingResult) -> None:
        if (result.fingerprint, result.answers) != (self.whole.fingerprint, self.whole.answers):
            raise SoakFailure(
                f"fingerprint and answers are {result.fingerprint}, {result.answers}; those of the undisturbed run are "
                f"{self.whole.fingerprint}, {self.whole.answers}"
            )
        left = sorted(path.name for path in self.folder.glob("*/*") if path.suffix == ".part")
        if left or len(list(self.folder.iterdir())) > 2:  # Checkpoints.keep
            raise SoakFailure(f"what killed saves have left was not tidied up: {left}, {list(self.folder.iterdir())}")


# --- What this process holds -----------------------------------------------------------------------------------------


def held() -> dict[str, Any]:
    """What must be the same after each launch; the processes are the server and the tracker of multiprocessing."""
    me = psutil.Process()
    open_files = "num_handles" if sys.platform == "win32" else "num_fds"
    below = me.children(recursive=True)
    return {
        "processes": sorted(process.pid for process in below),
        "threads": me.num_threads(),
        "open files": getattr(me, open_files)(),
        "open files of the server": [getattr(process, open_files)() for process in below],
        "folders": sorted(path.name for path in _server.home.glob("stages-run-*")) if _server.home else [],
    }


def check_nothing_left(before: dict[str, Any]) -> None:
    """Wait until this process holds what it held before. Raises SoakFailure if it has not come to that soon."""
    now, give_up = None, time.monotonic() + SETTLED
    while now != before:
        if time.monotonic() > give_up:
            raise SoakFailure(f"after {SETTLED:g} s there are {now}; before the launch there were {before}")
        time.sleep(0 if now is None else 0.01)
        with suppress(psutil.NoSuchProcess):  # a stage that was just ending
            now = held()


# What may grow: (in all, and for each launch). An allocator does not give everything back and caches fill: that is
# some MB once. A forgotten result of this tiny model has 30 kB and hides in that, but not among the objects, which are
# counted to the last one: a forgotten `processes.Run` is 165 of them.
ALLOWED = {"memory, kB": (8000.0, 20.0), "memory of the server, kB": (8000.0, 20.0), "Python's objects": (200.0, 1.0)}


def figures() -> dict[str, float]:
    """What this process and the server have for themselves alone, and the containers that Python keeps here."""
    gc.collect()
    me = psutil.Process()
    own, server = (sum(p.memory_full_info().uss for p in some) / 1000 for some in ([me], me.children()))
    return dict(zip(ALLOWED, (own, server, float(len(gc.get_objects()))), strict=True))


def growth(soak: Soak) -> Iterator[tuple[str, bool]]:
    """The rows of a table of the figures since a fifth of the launches, each with whether it is good."""
    yield f"{'':26}{'at first':>12}{'at the end':>12}{'growth':>10}{'allowed':>10}{'a launch':>10}", True
    for name, values in soak.measured.items():
        values = values[len(values) // 5 :]
        in_all, each = ALLOWED[name]
        allowed, grown = in_all + each * len(values), values[-1] - values[0]
        slope = statistics.linear_regression(range(len(values)), values).slope
        figures = f"{values[0]:12,.0f}{values[-1]:12,.0f}{grown:10,.0f}{allowed:10,.0f}{slope:10.2f}"
        yield f"{name:26}{figures}  {'ok' if grown <= allowed else 'grows'}", grown <= allowed


def main(arguments: list[str] | None = None) -> int:
    """The exit code is 0, 1 if something was not as it should be, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="course.py soak", description=(__doc__ or "").split("\n\n")[0])
    for name, default in (("--launches", 200), ("--steps", 2000), ("--seed", 0), ("--stages", 2)):
        parser.add_argument(name, type=int, default=default, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        plan = make_plan(**vars(options))
    except ValueError as error:
        parser.error(str(error))
    progress = partial(tqdm, total=options.steps, unit="step", disable=None)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(plan, Path(folder) / "checkpoints")
        try:
            with progress(desc="undisturbed") as bar:
                soak.undisturbed(lambda step: bar.update())
            with progress(desc="broken off") as bar:
                for safe in soak.broken_off():
                    bar.update(safe - bar.n)
                    bar.set_postfix(launches=soak.endings.total())
        except (SoakFailure, StageError) as failure:
            print(f"failed: {failure}", file=sys.stderr)
            return 1
    rows = list(growth(soak))
    endings = ", ".join(f"{count} {ending}" for ending, count in sorted(soak.endings.items()))
    print(f"{soak.endings.total()} launches in {time.perf_counter() - began:.0f} s: {endings}")
    again = soak.steps - options.steps
    print(f"{soak.steps} steps, {again} of them for the second time; {len(plan.nans)} were skipped")
    print(f"fingerprint {soak.whole.fingerprint}, that of the undisturbed run; every step had its bits")
    print("no process, thread, open file or folder was left after any launch")
    print("\n".join(row for row, _ in rows))
    return 0 if all(good for _, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
