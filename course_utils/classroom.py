"""What nbgrader runs instead of a hand-in's cells: each answer in a process of its own (`grading.py`).

nbgrader executes a whole notebook in one kernel and reads points from what its cells show. An answer that ends that
kernel leaves no grade and no word, and one that prints without end may get full points. Here the cells of a hand-in are
not executed at all: their text goes to the sandbox, and the check's cells show what came of it.
"""

from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.preprocessors import DeduplicateIds, NbGraderPreprocessor
from traitlets import Float

from course_utils.checks import seed
from course_utils.checks.tasks import LIMIT
from course_utils.grading import Grade, grade
from course_utils.units import tagged


class GradeTasks(NbGraderPreprocessor):
    """Write points and sentences into the check's cells; nbgrader takes the points from there."""

    limit = Float(LIMIT, help="seconds that an answer gets").tag(config=True)

    def preprocess(self, notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        where = resources["nbgrader"]
        grades = {g.task: g for g in grade(notebook, where["assignment"][:2], seed(), self.limit)}
        for cell in notebook.cells:
            if cell.cell_type == "code" and (found := grades.get(task_of(cell))):
                cell.outputs = outputs(found)
        for g in grades.values():
            if g.for_teacher:
                self.log.warning("For the teacher: %s, %s, task %s: %s", where["student"], where["assignment"], g.task,
                                 g.for_teacher)  # fmt: skip
        return notebook, resources


class LastOfEach(DeduplicateIds):
    """Of cells that were copied the last one counts; nbgrader 0.9 fails on what it leaves of the others."""

    def preprocess(self, notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        notebook, resources = super().preprocess(notebook, resources)
        for cell in notebook.cells:
            if not cell.metadata.get("nbgrader", True):
                del cell.metadata["nbgrader"]
        return notebook, resources


def task_of(cell: NotebookNode) -> str:
    """The task whose check a cell is. From nbgrader's record, which it has just restored."""
    grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
    return grade_id.removesuffix("-check") if grade_id.endswith("-check") else tagged(cell, "check")


def outputs(found: Grade) -> list[NotebookNode]:
    """The sentence, and the points as the value of the cell."""
    text = f"{found.task}: {found.text}\n"
    if found.for_teacher:
        text += f"For the teacher: {found.for_teacher}\n"
    return [
        nbformat.v4.new_output("stream", text=text),
        nbformat.v4.new_output("execute_result", {"text/plain": f"{found.points:g}"}),
    ]
