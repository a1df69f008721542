"""How good the checks of the exercises are, in figures: `python course.py feedback-report`.

Three of them must be 0: wrong answers that a check accepts, right answers that it refuses, and messages that name a
mistake that was not made. Wrong answers are the bank's (tests/bank/), which people really give, and mutants of the
solutions (tests/mutants.py), at most 40 of each. Those that change nothing that a caller could see are listed in the
bank, each with its reason. A mutant's mistake has no name to compare with; a message may name one if it names the same
for other inputs.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nbformat
import torch

from course_utils import units
from course_utils.checks.tasks import Task, Verdict, examine, find_task, tasks_of
from tests.bank import Answer, all_answers, equivalents
from tests.mutants import mutants

PUBLISHED = Path(__file__).parent / "bank/published.json"
SEEDS = (0, 7, 11)  # of the inputs; the first one is a learner's own
MUTANTS_PER_TASK = 40  # evenly over all that the rules give
MUTANT_LIMIT = 4.0  # seconds
HARD_LIMIT = 60.0  # seconds after which the process of a mutant is ended


@dataclass(frozen=True)
class Mutant:
    """A solution with one change; `text` is the whole cell, `setup` what runs before it."""

    task: Task
    change: str
    setup: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.task.full_name.removeprefix('unit')}: {self.change}"

    def answer(self) -> Callable:
        space: dict = {"__name__": "__main__"}
        exec(self.setup, space)
        exec(compile(self.text, "<mutant>", "exec"), space)
        return space[self.task.name]


def all_mutants(wanted: Iterable[str] = ()) -> list[Mutant]:
    """Of the solutions of these units, of all if none is given."""
    found = []
    for source, solution, _ in units.units(list(wanted)):
        cells = nbformat.read(solution, as_version=4).cells
        setup = "\n".join(cell.source for cell in cells if "setup" in cell.metadata.get("tags", []))
        setup = "\n".join(line for line in setup.split("\n") if not line.startswith("start("))
        for task in tasks_of(units.unit_of(source)):
            cell = next(cell for cell in cells if units.tagged(cell, "answer") == task.name)
            all_of_it = [Mutant(task, change, setup, text) for change, text in mutants(cell.source)]
            number = min(MUTANTS_PER_TASK, len(all_of_it))
            found += [all_of_it[i * len(all_of_it) // number] for i in range(number)]
    return found


def in_forks(works: Sequence[Callable[[], list]], at_once: int = 2) -> list[list | None]:
    """What each piece of work returns, each in a process of its own; None if that is lost or does not end.

    Processes are forked by one thread: with several, a child could begin while another thread holds a lock.
    """
    results: list[list | None] = [None] * len(works)
    running: dict[int, tuple[int, int, float, bytes]] = {}  # {pipe: (number, process, when to give up, what came)}
    waiting = list(range(len(works)))
    while waiting or running:
        while waiting and len(running) < at_once:
            number = waiting.pop(0)
            pipe, child = fork(works[number])
            running[pipe] = (number, child, time.monotonic() + HARD_LIMIT, b"")
        ready, _, _ = select.select(list(running), [], [], 1.0)
        for pipe, (number, child, give_up, text) in list(running.items()):
            piece = os.read(pipe, 65536) if pipe in ready else b""
            if piece:
                running[pipe] = (number, child, give_up, text + piece)
            elif pipe in ready or time.monotonic() > give_up:
                del running[pipe]
                os.close(pipe)
                for end in (os.killpg, os.kill):  # its group, if it got so far as to have one
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        end(child, signal.SIGKILL)
                os.waitpid(child, 0)
                with contextlib.suppress(ValueError):
                    results[number] = json.loads(text)
    return results


def fork(work: Callable[[], list]) -> tuple[int, int]:
    """Begin a piece of work; (the pipe on which its result comes as JSON, its process)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return reading, child
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        with os.fdopen(writing, "w") as pipe:
            json.dump(work(), pipe)
    finally:
        os._exit(0)


def try_mutant(mutant: Mutant) -> list:
    """[whether it is accepted, the mistake that is named, whether other inputs say otherwise]"""
    torch.set_num_threads(1)
    try:
        answer = mutant.answer()
    except Exception:
        return [False, "", False]
    first = examine(mutant.task, answer, SEEDS[0], MUTANT_LIMIT)
    if not first.mistake:
        return [first.passed, "", False]
    others = [examine(mutant.task, mutant.answer(), seed, MUTANT_LIMIT) for seed in SEEDS[1:]]
    return [False, first.mistake, any(other.passed or other.mistake not in ("", first.mistake) for other in others)]


def try_answer(answer: Answer, seconds: list[float]) -> list[Verdict]:
    task, verdicts = find_task(f"unit{answer.task}"), []
    for seed in SEEDS:
        started = time.perf_counter()
        verdicts.append(examine(task, answer.answer, seed))
        seconds.append(time.perf_counter() - started)
    return verdicts


def report(mutants_: list[Mutant], answers: list[Answer]) -> dict:
    """The figures, and the names of what is wrong."""
    came = in_forks([functools.partial(try_mutant, mutant) for mutant in mutants_])
    lost = [False, "", False]  # a process that was lost, or ended, is no right answer
    tried = [
        dict(zip(("passed", "mistake", "wrong_name"), result or lost, strict=True), name=mutant.name)
        for mutant, result in zip(mutants_, came, strict=True)
    ]
    seconds: list[float] = []
    verdicts = {answer: try_answer(answer, seconds) for answer in answers}
    right = {a: v for a, v in verdicts.items() if not a.mistake}
    wrong = {a: v for a, v in verdicts.items() if a.mistake}
    equivalent = {f"{task}: {change}" for task, listed in equivalents().items() for change in listed}
    accepted = {m["name"] for m in tried if m["passed"]}
    named = sum(bool(v[0].mistake) for v in wrong.values())
    return {
        "false_accepts": len(accepted - equivalent) + sum(v.passed for vs in wrong.values() for v in vs),
        "mutants": len(mutants_) - len({m["name"] for m in tried} & equivalent),
        "right_refused": sum(not all(v.passed for v in vs) for vs in right.values()),
        "right_answers": len(right),
        "wrong_names": sum(m["wrong_name"] for m in tried)
        + sum(v.mistake not in ("", a.mistake) for a, vs in wrong.items() for v in vs),
        "bank": len(wrong),
        "named_share": round(named / len(wrong), 3) if wrong else 0.0,
        "seconds_of_95_percent": round(sorted(seconds)[int(0.95 * len(seconds))], 2) if seconds else 0.0,
        "details": {
            "accepted": sorted(accepted - equivalent)
            + sorted(a.name for a, vs in wrong.items() if any(v.passed for v in vs)),
            "refused": sorted(a.name for a, vs in right.items() if not all(v.passed for v in vs)),
            "misled": sorted(m["name"] for m in tried if m["wrong_name"])
            + sorted(a.name for a, vs in wrong.items() if any(v.mistake not in ("", a.mistake) for v in vs)),
            "not_equivalent": sorted({m["name"] for m in tried if not m["passed"]} & equivalent),
        },
    }


def replace_judge(task: Task, judge: Callable) -> Task:
    """The same task with another judge, for tests of this file."""
    return dataclasses.replace(task, judge=judge)


def published() -> dict:
    return json.loads(PUBLISHED.read_text("utf-8"))


def faults(found: dict) -> list[str]:
    """What makes the command fail."""
    said = [f"{key} is {found[key]}" for key in ("false_accepts", "right_refused", "wrong_names") if found[key]]
    said += [f"listed as equivalent, and refused: {name}" for name in found["details"]["not_equivalent"]]
    for key in ("mutants", "right_answers", "bank"):
        if found[key] < published()[key]:
            said.append(f"{key}: {found[key]}, and {published()[key]} are published in tests/bank/published.json")
    return said


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="course.py feedback-report", description="How good the checks are.")
    parser.add_argument("units", nargs="*", help="numbers of units; none: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        print("error: mutants are tried in forked processes, which this system does not have", file=sys.stderr)
        return 2
    answers = [a for a in all_answers() if not options.units or a.task[:2] in options.units]
    found = report(all_mutants(options.units), answers)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"false accepts {found['false_accepts']} of {found['mutants']} mutants and {found['bank']} wrong answers")
        print(f"right answers refused {found['right_refused']} of {found['right_answers']}")
        print(f"wrong names {found['wrong_names']} of {found['mutants'] + found['bank']}")
        print(f"mistakes of the bank that are named: {found['named_share']:.0%}")
        print(f"95 % of all checks of the bank's answers took at most {found['seconds_of_95_percent']:g} s here")
        for what, names in found["details"].items():
            for name in names:
                print(f"  {what}: {name}")
    wrong = faults(found) if not options.units else []
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
