"""How good the checks of the exercises are, in figures: `python course.py feedback-report`.

Three of them must be 0: wrong answers that a check accepts, right answers that it refuses, and messages that name a
mistake that was not made. Wrong answers are the bank's (tests/bank/), which people really give, and mutants of the
solutions (tests/mutants.py). Those that change nothing that a caller could see stand in tests/bank/equivalent.py, each
with its reason. A mutant's mistake has no name to compare with; a message may name one if it names the same for other
inputs.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nbformat
import torch

from course_utils import units
from course_utils.checks.tasks import Task, Verdict, examine, find_task, tasks_of
from tests.bank import Answer, all_answers
from tests.bank.equivalent import EQUIVALENT
from tests.mutants import mutants

PUBLISHED = Path(__file__).parent / "bank/published.json"
SEEDS = (0, 7, 11)  # of the inputs; the first one is a learner's own
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
            found += [Mutant(task, change, setup, text) for change, text in mutants(cell.source)]
    return found


def in_a_fork(work: Callable[[], list]) -> list | None:
    """What the work returns, in a process of its own; None if that is lost or does not end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            with os.fdopen(writing, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    give_up, text = time.monotonic() + HARD_LIMIT, b""
    try:
        while (left := give_up - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
            piece = os.read(reading, 65536)
            if not piece:
                break
            text += piece
    finally:
        os.close(reading)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        return json.loads(text)
    except ValueError:
        return None


def try_mutant(mutant: Mutant) -> dict:
    """{"passed", "mistake", "wrong_name"}: what its author would be told."""

    def work() -> list:
        torch.set_num_threads(1)
        try:
            answer = mutant.answer()
        except Exception:
            return [False, "", False]
        first = examine(mutant.task, answer, SEEDS[0], MUTANT_LIMIT)
        wrong_name = False
        if first.mistake:
            others = [examine(mutant.task, mutant.answer(), seed, MUTANT_LIMIT) for seed in SEEDS[1:]]
            wrong_name = any(other.mistake not in ("", first.mistake) or other.passed for other in others)
        return [first.passed, first.mistake, wrong_name]

    passed, mistake, wrong_name = in_a_fork(work) or [False, "", False]
    return {"name": mutant.name, "passed": passed, "mistake": mistake, "wrong_name": wrong_name}


def try_answer(answer: Answer) -> list[Verdict]:
    task = find_task(f"unit{answer.task}")
    return [examine(task, answer.answer, seed) for seed in SEEDS]


def report(mutants_: list[Mutant], answers: list[Answer]) -> dict:
    """The figures, and the names of what is wrong."""
    with ThreadPoolExecutor(2) as pool:
        tried = list(pool.map(try_mutant, mutants_))
    verdicts = {answer: try_answer(answer) for answer in answers}
    right = {a: v for a, v in verdicts.items() if not a.mistake}
    wrong = {a: v for a, v in verdicts.items() if a.mistake}
    equivalent = {f"{task}: {change}" for task, listed in EQUIVALENT.items() for change in listed}
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
        "details": {
            "accepted": sorted(accepted - equivalent)
            + sorted(a.name for a, vs in wrong.items() if any(v.passed for v in vs)),
            "refused": sorted(a.name for a, vs in right.items() if not all(v.passed for v in vs)),
            "misled": sorted(m["name"] for m in tried if m["wrong_name"])
            + sorted(a.name for a, vs in wrong.items() if any(v.mistake not in ("", a.mistake) for v in vs)),
            "not_equivalent": sorted({m["name"] for m in tried if not m["passed"]} & equivalent),
        },
    }


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
        for what, names in found["details"].items():
            for name in names:
                print(f"  {what}: {name}")
    wrong = faults(found) if not options.units else []
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
