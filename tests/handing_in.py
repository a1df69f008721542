"""Hand-ins of an imagined class, made from a unit's notebooks."""

from pathlib import Path

import nbformat

from course_utils import units

COURSE = Path(__file__).resolve().parents[1]


def read(unit: str, which: str) -> nbformat.NotebookNode:
    """A unit's notebook, which: "solutions" or "exercises"."""
    _, solution, copy = next(units.units([unit]))
    return nbformat.read(solution if which == "solutions" else copy, as_version=4)


def answer_cell(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if units.tagged(cell, "answer") == name)


def solutions(unit: str) -> dict[str, str]:
    """{task: the cell with its solution}"""
    cells = read(unit, "solutions").cells
    return {name: cell.source for cell in cells if (name := units.tagged(cell, "answer"))}


def hand_in(unit: str, **answers: str) -> nbformat.NotebookNode:
    """The students' copy with these cells put in; `first` is a cell that the student has added before all others."""
    notebook = read(unit, "exercises")
    first = answers.pop("first", None)
    for name, text in answers.items():
        answer_cell(notebook, name).source = text
    if first is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    return notebook


HOSTILE = {  # what an answer does instead of answering: (text, what the teacher is told)
    "endless loop": ("def at_most(*a):\n    while True: pass", ""),
    "a loop outside of Python": ("def at_most(*a): return sum(range(10**14))", "only the end of its process ended it"),
    "os._exit": ("import os\ndef at_most(*a): os._exit(0)", "It ended its process (exit status 0)"),
    "exit while the cell runs": ("import os\nos._exit(3)\ndef at_most(*a): ...", "exit status 3"),
    "deadlock": (
        "import threading\ndef at_most(*a):\n    lock = threading.Lock()\n    lock.acquire()\n    lock.acquire()",
        "only the end of its process ended it",
    ),
    "100 MB of output": (
        "def at_most(*a):\n    for _ in range(100): print('x' * 1_000_000)",
        "It printed more than 1 MB",
    ),
    "patches the checks": (
        "import course_utils.checks.tasks as t\nt.same = lambda *a: True\n"
        "t.try_out = lambda *a: t.Outcome('values', [])\ndef at_most(*a): return 1",
        "change the course's own course_utils.checks.tasks.",
    ),
    "patches a class": (
        "from course_utils.schedules import Schedule\nSchedule.to_text = lambda self: ''\ndef at_most(*a): return 1",
        "change the course's own course_utils.schedules.Schedule.to_text",
    ),
    "writes outside its folder": (
        "def at_most(*a): open({outside!r}, 'w').write('x')",
        "write outside its folder",
    ),
    "removes a file": ("import os\ndef at_most(*a): os.remove({outside!r})", "change files outside its folder"),
    "writes outside and hides it": (
        "def at_most(*a):\n    try: open({outside!r}, 'a')\n    except OSError: pass\n    raise ValueError",
        "write outside its folder",
    ),
    "forks": ("import os\ndef at_most(*a):\n    while True: os.fork()", "start a process"),
    "starts a program": (
        "import subprocess, sys\ndef at_most(*a): subprocess.Popen([sys.executable, '-c', 'input()'])",
        "start a process",
    ),
    "takes all memory": ("def at_most(*a): return len(bytearray(10**11))", ""),
    "a file without end": (
        "def at_most(*a):\n    with open('big', 'wb') as f:\n        while True: f.write(bytes(10**6))",
        "",
    ),
}
