"""Exercise units: from one text the notebook with solutions, and from that the copy for students.

A unit is written under solutions/sources/. Tags say what a cell is: `answer:NAME` holds the learner's function between
BEGIN SOLUTION and END SOLUTION, `check:NAME` its check, `setup` the imports; cells tagged `solution` are for teachers
and those who have finished. What nbgrader has to know follows from these tags, and the student's copy is what nbgrader
itself would make of the notebook, byte for byte (tests/test_classroom.py compares them).
"""

import hashlib
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_utils.checks.tasks import find_task

COURSE = Path(__file__).resolve().parents[1]
CODE_STUB = "...  # your turn"
BEGIN, END = "BEGIN SOLUTION", "END SOLUTION"


def tagged(cell: NotebookNode, kind: str) -> str:
    """The NAME of a cell's tag `kind:NAME`; empty if it has none."""
    names = [tag.partition(":")[2] for tag in cell.metadata.get("tags", []) if tag.startswith(f"{kind}:")]
    return names[0] if names else ""


def unit_of(path: Path) -> str:
    """`06` of .../06_the_gpipe_schedule.py."""
    return path.name[:2]


def with_grading(notebook: NotebookNode, unit: str) -> NotebookNode:
    """The same notebook with what nbgrader must know about each cell.

    Raises:
        ValueError: a task that the checks do not have.
    """
    for cell in notebook.cells:
        answer, check = tagged(cell, "answer"), tagged(cell, "check")
        if answer:
            cell.metadata["nbgrader"] = grading(answer, solution=True)
        elif check:
            points = find_task(f"unit{unit}.{check}").points
            cell.metadata["nbgrader"] = grading(f"{check}-check", grade=True, locked=True, points=points)
        elif cell.cell_type == "code" and not {"setup", "solution"} & set(cell.metadata.get("tags", [])):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "given"]  # a grader need not run it
    return notebook


def grading(grade_id: str, **given: bool | int) -> NotebookNode:
    return nbformat.from_dict(
        {"grade": False, "grade_id": grade_id, "locked": False, "schema_version": 3, "solution": False, "task": False}
        | given
    )


# --- The copy for students --------------------------------------------------------------------------------------------


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """What students get: no solutions, no outputs."""
    copy = deepcopy(notebook)
    copy.cells = [cell for cell in copy.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if (grading := cell.metadata.get("nbgrader")) is None:
            continue
        cell.metadata["deletable"] = False
        if grading.grade:
            cell.metadata["editable"] = False
        else:
            cell.source = without_solution(cell.source)
        grading["checksum"] = checksum(cell)
        grading["cell_type"] = cell.cell_type
    return copy


def without_solution(source: str) -> str:
    """Each solution replaced by a stub with its indentation."""
    return re.sub(rf"(?ms)^([ \t]*)[^\n]*{BEGIN}.*?{END}[^\n]*$", rf"\1{CODE_STUB}", source)


def checksum(cell: NotebookNode) -> str:
    """nbgrader's checksum of a cell: by it a grader knows whether an answer was touched."""
    grading = cell.metadata["nbgrader"]
    parts = [cell.source, cell.cell_type, grading.grade, grading.solution, grading.grade and not grading.solution]
    parts += [grading.grade_id, *([float(grading.points)] if grading.grade else [])]
    return hashlib.md5("".join(map(str, parts)).encode()).hexdigest()


# --- Where things are -------------------------------------------------------------------------------------------------


def units(wanted: list[str], course: Path = COURSE) -> Iterator[tuple[Path, Path, Path]]:
    """(text, notebook with solutions, student's copy) of the units whose numbers are given, of all if none is.

    Raises:
        ValueError: there is no such unit.
    """
    for name in wanted or [""]:
        found = sorted((course / "solutions/sources").glob(f"{name}*.py"))
        if name and len(found) != 1:
            there = ", ".join(unit_of(path) for path in sorted((course / "solutions/sources").glob("*.py")))
            raise ValueError(f"there is no exercise unit {name!r}; there are {there}")
        for path in found:
            inside = Path(path.stem) / f"{path.stem}.ipynb"
            yield path, course / "solutions" / inside, course / "exercises" / inside
