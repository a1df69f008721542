"""Grading what somebody has handed in: a unit's notebook, task by task, each answer in a process that may be lost.

    python -m course_utils.grading 06_the_gpipe_schedule.ipynb --json

is also `run_checks.py` of a unit that `course.py unit 06` has packed. The inputs come from COURSE_SEED, so nothing need
be kept secret: hidden checks are the same checks on other inputs.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_utils._lines import in_lines
from course_utils.checks import seed
from course_utils.checks.sandbox import HandIn, try_out_apart
from course_utils.checks.tasks import LIMIT, Outcome, Task, judge, tasks_of
from course_utils.units import tagged


@dataclass(frozen=True)
class Grade:
    """What one answer earned, what its author is told, and what only a teacher needs to know (mostly nothing)."""

    task: str
    points: int
    possible: int
    text: str
    for_teacher: str = ""


def grade(notebook: NotebookNode, unit: str, course_seed: int, limit: float = LIMIT) -> list[Grade]:
    """The grades of all tasks of a unit, in order; a task whose cell is missing earns nothing.

    Args:
        limit: seconds that an answer gets for all its inputs.

    Raises:
        ValueError: there is no such unit.
    """
    tasks = tasks_of(unit)
    found = {task: hand_in for task in tasks if (hand_in := handed_in(notebook, task)) is not None}
    outcomes = dict(zip(found, try_out_apart(list(found.values()), course_seed, limit), strict=True))
    grades = []
    for task in tasks:
        if task not in outcomes:
            missing = f"the cell of this answer is missing: it has the tag answer:{task.name}"
            grades.append(Grade(task.name, 0, task.points, f"not right yet. It seems that {missing}.", missing))
            continue
        grades.append(as_grade(task, outcomes[task], course_seed))
    return grades


def as_grade(task: Task, outcome: Outcome, course_seed: int) -> Grade:
    """The grade for what an answer did with the inputs of this seed."""
    if outcome.kind in ("lost", "forbidden"):
        told = outcome.message
        if outcome.kind == "forbidden":
            told = f"It tried to {told}, which an answer may not do."
        return Grade(task.name, 0, task.points, f"not right yet. {told}", told)
    verdict = judge(task, outcome, course_seed)
    return Grade(task.name, task.points if verdict.passed else 0, task.points, verdict.text)


def handed_in(notebook: NotebookNode, task: Task) -> HandIn | None:
    """The answer's cell, the last one if it was copied; before it the imports and the cells that the learner added."""
    before: list[str] = []
    found: HandIn | None = None
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if tagged(cell, "answer") == task.name:
            found = HandIn(task, tuple(before), cell.source)
        tags = cell.metadata.get("tags", [])
        if "given" not in tags and not tagged(cell, "answer") and not tagged(cell, "check"):
            before.append(cell.source)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Grade a notebook and print the grades; 0 if all is right, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="run_checks.py", description="Check the answers of an exercise notebook.")
    parser.add_argument("notebook", type=Path, nargs="?", help="default: the one in this folder")
    parser.add_argument("--json", action="store_true", help="print the grades as JSON")
    options = parser.parse_args(arguments)
    try:
        path = options.notebook or the_only_notebook()
        unit = path.name[:2]
        grades = grade(nbformat.read(path, as_version=4), unit, seed())
    except (ValueError, OSError) as error:  # nbformat's errors among them
        print(f"error: {error}", file=sys.stderr)
        return 2
    earned, possible = sum(g.points for g in grades), sum(g.possible for g in grades)
    if options.json:
        told = {"unit": unit, "points": earned, "possible": possible, "tasks": [asdict(g) for g in grades]}
        print(json.dumps(told, indent=1))
    else:
        for g in grades:
            print(in_lines(f"{g.task}, {g.points} of {g.possible}: {g.text}"))
        print(f"{earned} of {possible} points")
    return 0 if earned == possible else 1


def the_only_notebook() -> Path:
    found = sorted(Path.cwd().glob("[0-9][0-9]_*.ipynb"))
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} exercise notebooks in {Path.cwd()}: name one")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
