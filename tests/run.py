"""What `course.py test` and `course.py check` run: every step, whatever the others say, then a table with the times.

Each step has a budget on two cores. A run fails if a step fails, or if it takes more than twice its budget: machines
differ, but a course that takes twice as long is another course.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1]
RESULTS = COURSE / ".test-results"
# Seconds on two cores, all steps together.
BUDGETS = {"test": 1320, "test --smoke": 120, "test --lessons": 420, "test --weekly": 1000, "check": 150}
LESSONS_BUDGET = 420  # all of them, two at a time
# The capstone trains a model: 150 s alone on two cores, and half as long again beside another lesson.
LESSON_BUDGET = {"10": 60, "11": 225}
ANY_LESSON_BUDGET = 45
# Seconds after which a cell counts as hung, also beside another lesson; tests/nbval_limits.py applies them.
CELL_LIMIT = {"11": 400}
ANY_CELL_LIMIT = 60
QUICK = "not slow and not network and not gpu and not timed and not weekly"


@dataclass(frozen=True)
class Step:
    """One command of a run. `tests` is a name if it is pytest, which then writes its times to NAME.xml."""

    name: str
    arguments: tuple[str, ...]  # for this Python
    budget: float  # seconds
    tests: str = ""

    @property
    def report(self) -> Path:
        return RESULTS / f"{self.tests}.xml"

    @property
    def command(self) -> list[str]:
        report = [f"--junitxml={self.report}"] if self.tests else []
        return [sys.executable, "-m", *self.arguments, *report]


def plan(which: str, notebooks: list[str]) -> list[Step]:
    """The steps of "test", "test --smoke", "test --lessons", "test --weekly" or "check", in order."""
    # Two at a time, but the cells of a notebook and the tests of a file in one process: cells depend on each other.
    workers = str(min(2, usable_cores()))
    two_at_a_time = ("-n", workers, "--dist", "loadscope", "--no-loadscope-reorder")
    limits = ("-p", "tests.nbval_limits", f"--timeout={max(CELL_LIMIT.values()) + 60}")
    arguments = ("pytest", *limits, "--nbval-lax", *two_at_a_time, *notebooks)
    lessons = Step("lessons", arguments, LESSONS_BUDGET, "lessons")
    if which == "test --lessons":
        return [lessons]
    if which == "test --smoke":
        return [Step("smoke tests", ("pytest", "-m", "smoke"), 120, "smoke")]
    if which == "test --weekly":
        return [Step("weekly tests", ("pytest", *two_at_a_time, "-m", "weekly"), BUDGETS[which], "weekly")]
    steps = [
        Step("lint", ("ruff", "check"), 10),
        Step("format", ("ruff", "format", "--check"), 10),
        Step("types", ("mypy",), 40),
    ]
    if which == "check":
        return [*steps, Step("quick tests", ("pytest", *two_at_a_time, "-m", QUICK), 120, "quick")]
    # What compares times needs the machine for itself.
    steps.append(Step("tests", ("pytest", *two_at_a_time, "-m", "not timed and not weekly"), 700, "tests"))
    steps.append(Step("timed tests", ("pytest", "-m", "timed"), 80, "timed"))
    units = [path.relative_to(COURSE).as_posix() for path in sorted((COURSE / "solutions").glob("*/*.ipynb"))]
    solutions = Step("solutions", ("pytest", *limits, "--nbval-lax", *two_at_a_time, *units), 90, "solutions")
    return [*steps, solutions, lessons] if notebooks else steps


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def notebooks_of(numbers: list[str]) -> list[str]:
    """The notebooks of these lessons, longest first so that none is begun last and waited for; of all if none is given.

    Raises:
        ValueError: a lesson has no notebook.
    """
    found = sorted((COURSE / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if missing := sorted(set(numbers) - {path.name[:2] for path in found}):
        raise ValueError(f"there is no lesson {missing[0]}; there are {' '.join(path.name[:2] for path in found)}")
    wanted = [path for path in found if not numbers or path.name[:2] in numbers]
    wanted.sort(key=lambda path: -LESSON_BUDGET.get(path.name[:2], ANY_LESSON_BUDGET))
    return [path.relative_to(COURSE).as_posix() for path in wanted]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="course.py", description="Run the checks of the course.")
    parser.add_argument("which", choices=["test", "check"])
    parser.add_argument("--smoke", action="store_true", help="only what must work on every system (with test)")
    parser.add_argument("--weekly", action="store_true", help="only what is too long for every run (with test)")
    parser.add_argument("--lessons", nargs="+", metavar="NN", help="run these lessons and nothing else (with test)")
    parser.add_argument("--cores", type=int, help="use so many cores, where the system can say that (Linux)")
    options = parser.parse_args(arguments)
    parts = {"test --smoke": options.smoke, "test --lessons": options.lessons, "test --weekly": options.weekly}
    chosen = [part for part, wanted in parts.items() if wanted]
    if len(chosen) > 1 or (chosen and options.which != "test"):
        parser.error("--smoke, --lessons and --weekly belong to test, one of them at a time")
    which = chosen[0] if chosen else options.which
    try:
        notebooks = notebooks_of(options.lessons or [])
    except ValueError as error:
        parser.error(str(error))
    if options.cores:
        if not 1 <= options.cores <= usable_cores() or not hasattr(os, "sched_setaffinity"):
            parser.error(
                f"--cores {options.cores}: this process may use {usable_cores()}, and Linux alone can say fewer"
            )
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # what is started inherits it
    RESULTS.mkdir(exist_ok=True)
    steps = plan(which, notebooks)
    results: list[tuple[Step, int, float]] = []
    for step in steps:
        print(f"\n=== {step.name}: {subprocess.list2cmdline(step.command[1:])}", flush=True)
        step.report.unlink(missing_ok=True)  # of an earlier run
        started = time.perf_counter()
        status = subprocess.call(step.command, cwd=COURSE)
        results.append((step, status, time.perf_counter() - started))
    rows = list(table(which, results))
    print("\n" + "\n".join(row for row, _ in rows))
    return 0 if all(good for _, good in rows) else 1


def table(which: str, results: list[tuple[Step, int, float]]) -> Iterator[tuple[str, bool]]:
    """The closing table, row by row, each with whether it is good."""
    yield f"{'':34}{'seconds':>8}{'budget':>8}", True
    for step, status, seconds in results:
        yield row(step.name, seconds, step.budget, status)
        files = seconds_per_file(step)
        if step.tests == "lessons":
            for name, seconds in sorted(files.items()):
                yield row("  " + name, seconds, LESSON_BUDGET.get(name[:2], ANY_LESSON_BUDGET))
        else:
            slowest = sorted(files.items(), key=lambda item: item[1], reverse=True)[:5]
            yield from ((f"  {name:32}{seconds:8.1f}", True) for name, seconds in slowest)
    yield row(f"course.py {which}", sum(seconds for _, _, seconds in results), BUDGETS[which])


def row(name: str, seconds: float, budget: float, status: int = 0) -> tuple[str, bool]:
    verdict = f"failed (status {status})" if status else "too slow" if seconds > 2 * budget else "ok"
    over = f", {seconds / budget:.1f} times its budget" if seconds > budget and not status else ""
    return f"{name:34}{seconds:8.1f}{budget:8.0f}  {verdict}{over}", verdict == "ok"


def seconds_per_file(step: Step) -> dict[str, float]:
    """What pytest's report says about each notebook or file of tests; nothing if there is no report."""
    seconds: dict[str, float] = {}
    if step.tests and step.report.exists():
        for case in ElementTree.parse(step.report).iter("testcase"):
            name = case.get("classname", "").removesuffix(".ipynb").rpartition(".")[2]
            seconds[name] = seconds.get(name, 0) + float(case.get("time", 0))
    return seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
