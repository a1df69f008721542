"""A class hands in, and nbgrader grades it: points, sentences, feedback, and nothing broken by the one who tries to."""

import csv
import hashlib
import os
import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import psutil
import pytest

from course_utils import nbgrader_command, units
from course_utils.checks.sandbox import HandIn, try_out_apart
from course_utils.checks.tasks import find_task, tasks_of
from course_utils.grading import as_grade, grade, handed_in
from tests.handing_in import COURSE, HOSTILE, hand_in, solutions

UNIT = "06"
OFTEN = {"endless loop", "os._exit", "deadlock", "100 MB of output", "patches the checks", "forks"}
OFTEN |= {"writes outside its folder", "takes all memory"}  # the other hostile answers are tried weekly
SEED = 7  # the grader's
FOLDER = next(units.units([UNIT]))[0].stem

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]  # nine commands on a slow machine
pytestmark.append(pytest.mark.skipif(os.name != "posix", reason="limits of POSIX"))


# --- One answer -------------------------------------------------------------------------------------------------------


ANSWERS = [pytest.param(what, marks=[] if what in OFTEN else pytest.mark.weekly) for what in HOSTILE]


@pytest.fixture(scope="module")
def hostile(request, tmp_path_factory):
    """{what an answer did: its grade}, those of the chosen tests handed in at once, a right answer behind the last."""
    chosen = {item.callspec.params.get("what") for item in request.session.items if hasattr(item, "callspec")}
    outside = tmp_path_factory.mktemp("of_somebody_else") / "file.txt"
    outside.write_text("as it was")
    task = find_task("unit06.at_most")
    texts = {
        what: text.replace("{outside!r}", repr(str(outside))) for what, (text, _) in HOSTILE.items() if what in chosen
    }
    texts["right"] = "from course_utils.schedules import *\n" + solutions(UNIT)["at_most"]
    outcomes = try_out_apart([HandIn(task, (), text) for text in texts.values()], SEED, limit=2.0)
    yield {name: as_grade(task, outcome, SEED) for name, outcome in zip(texts, outcomes, strict=True)}
    assert outside.read_text() == "as it was"
    assert not [p for p in psutil.Process().children(recursive=True) if "sandbox" in " ".join(p.cmdline())]


@pytest.mark.parametrize("what", ANSWERS)
def test_a_hostile_answer_earns_nothing_and_the_teacher_is_told(what, hostile):
    _, told = HOSTILE[what]
    assert hostile[what].points == 0 and "not right yet" in hostile[what].text
    assert told in hostile[what].for_teacher, hostile[what]


def test_the_one_behind_them_gets_its_points(hostile):
    assert hostile["right"].points == 5


def test_the_solutions_of_all_units_earn_everything():
    """In one process, as a grader has it, on a grader's inputs."""
    tasks = [task for source, _, _ in units.units([]) for task in tasks_of(units.unit_of(source))]
    solved = {unit: hand_in(unit, **solutions(unit)) for unit in {task.unit for task in tasks}}
    outcomes = try_out_apart([handed_in(solved[task.unit], task) for task in tasks], SEED)
    grades = [as_grade(task, outcome, SEED) for task, outcome in zip(tasks, outcomes, strict=True)]
    assert [(g.task, g.points) for g in grades] == [(task.name, task.points) for task in tasks]


def test_answers_are_graded_each_by_itself():
    """Whatever the first one does, the second one gets what it deserves."""
    right = solutions(UNIT)["at_most"]
    for text in ("import os\ndef run_rank(rank): os._exit(0)", "def run_rank(rank): open('/nowhere', 'w')"):
        found = [g.points for g in grade(hand_in(UNIT, run_rank=text, at_most=right), UNIT, SEED)]
        assert found == [0, find_task("unit06.at_most").points]


LEFT_RUNNING = {
    "ranks in a loop": "def norm_of_all(gradients, p, tell):\n    while True:\n        pass",
    "a thread of its own": "import threading\ndef norm_of_all(*a):\n    while True:\n"
    "        threading.Thread(target=endless).start()\ndef endless():\n    while True: pass",
}


@pytest.mark.parametrize("text", LEFT_RUNNING.values(), ids=LEFT_RUNNING)
def test_what_an_answer_leaves_running_does_not_meet_the_next_one(text):
    """It went on beside the next answer, which then took too long."""
    right = solutions("09")
    notebook = hand_in("09", clip_rank=right["clip_rank"], norm_of_all=text, clip_tied=right["clip_tied"])
    assert [g.points for g in grade(notebook, "09", SEED, limit=2.0)] == [3, 0, 5]


def test_cells_of_the_learners_own_count_and_need_not_run():
    """A helper in a cell of its own is found; a note that fails, and a magic, are no harm."""
    helper = "def slots_of(kind): return 1 if kind == 'F' else 2\n"
    text = solutions(UNIT)["at_most"].replace('Action("B", k, b), 2', 'Action("B", k, b), slots_of("B")')
    assert "slots_of(" in text
    notebook = hand_in(UNIT, at_most=text, first=helper)
    for bad in ("1 / 0", "%timeit 1", "!ls"):
        notebook.cells.insert(0, nbformat.v4.new_code_cell(bad))
    assert [g.points for g in grade(notebook, UNIT, SEED)] == [0, 5]


def test_a_missing_cell_is_told():
    notebook = hand_in(UNIT)
    notebook.cells = [cell for cell in notebook.cells if units.tagged(cell, "answer") != "at_most"]
    grades = grade(notebook, UNIT, SEED)
    assert grades[1].points == 0 and "the cell of this answer is missing" in grades[1].text
    assert "not written yet" in grades[0].text and not grades[0].for_teacher


def test_an_error_names_the_line():
    grades = grade(hand_in(UNIT, at_most="def at_most(K, M, cap):\n    rows = []\n    return rows[K]"), UNIT, SEED)
    assert "It raised IndexError" in grades[1].text and "in line 3 of the cell: `return rows[K]`" in grades[1].text
    grades = grade(hand_in(UNIT, at_most="def at_most(K, M, cap)\n    ..."), UNIT, SEED)
    assert "SyntaxError" in grades[1].text and "line 1" in grades[1].text


# --- A class ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nbgrader():
    """The Python of nbgrader's environment, made as `course.py nbgrader` makes it."""
    return nbgrader_command.ensure()


class Class:
    """A course's folder with one unit, and a teacher who types commands in it."""

    def __init__(self, folder: Path, python: Path):
        self.folder, self.python = folder, python
        shutil.copytree(COURSE / "solutions" / FOLDER, folder / "solutions" / FOLDER)
        shutil.copy(COURSE / "nbgrader_config.py", folder)
        (folder / "classroom").mkdir()

    def run(self, *arguments: str) -> str:
        environment = nbgrader_command.environment(self.python) | {"COURSE_SEED": str(SEED), "PYTHONPATH": str(COURSE)}
        done = subprocess.run(
            [str(self.python), "-m", "nbgrader", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submitted(self, student: str) -> Path:
        return self.folder / "classroom/submitted" / student / FOLDER / f"{FOLDER}.ipynb"

    def hand_in(self, student: str, notebook: nbformat.NotebookNode) -> None:
        self.submitted(student).parent.mkdir(parents=True)
        nbformat.write(notebook, self.submitted(student))

    def collect(self, named: dict[str, nbformat.NotebookNode]) -> None:
        """A zip from a learning platform: {name of a file: notebook}."""
        archive = self.folder / "classroom/collected" / FOLDER / "archive/all.zip"
        archive.parent.mkdir(parents=True)
        with zipfile.ZipFile(archive, "w") as file:
            for name, notebook in named.items():
                file.writestr(name, nbformat.writes(notebook))
        self.run("zip_collect", FOLDER)


def hard_coded() -> str:
    """An answer that knows the inputs of the learner's own check, and no others."""
    cases = find_task("unit06.at_most").cases(random.Random(0))
    space = {}
    exec("from course_utils.schedules import *\n" + solutions(UNIT)["at_most"], space)
    table = {tuple(case): space["at_most"](*case).to_text() for case in cases}
    return (
        f"from course_utils.schedules import parse\nTABLE = {table}\ndef at_most(*sizes): return parse(TABLE[sizes])\n"
    )


@pytest.fixture(scope="module")
def graded(tmp_path_factory, nbgrader):
    """(the class, the log of autograde, hashes of what was handed in), after the teacher's commands."""
    room = Class(tmp_path_factory.mktemp("course"), nbgrader)
    room.run("generate_assignment", FOLDER)
    right = solutions(UNIT)
    hostile = hand_in(
        UNIT,
        run_rank="import os\ndef run_rank(rank): os._exit(0)",
        at_most=HOSTILE["patches the checks"][0],
        first="import course_utils.checks as c\nc.check = lambda *a: 8\nprint('x' * 1000)",
    )
    for cell in hostile.cells:
        if units.tagged(cell, "check"):
            cell.source = "8"
            cell.metadata["nbgrader"]["points"] = 100
    two_tries = hand_in(UNIT, **right)  # somebody copied a cell, to keep a try above the answer
    place = next(i for i, cell in enumerate(two_tries.cells) if units.tagged(cell, "answer") == "at_most")
    copied = nbformat.from_dict({**two_tries.cells[place], "id": "copied", "source": "def at_most(K, M, cap): ..."})
    two_tries.cells.insert(place, copied)
    hand_ins = {
        "ada": two_tries,
        "ben": hand_in(UNIT),
        "cleo": hand_in(UNIT, run_rank=right["run_rank"], at_most="def at_most(K, M, cap):\n    return gpipe(K, M)"),
        "dan": hand_in(UNIT, run_rank=right["run_rank"], at_most=hard_coded()),
        "eve": hostile,
    }
    room.collect(
        {
            f"ada_{FOLDER}-Copy1.ipynb": hand_ins["ada"],  # names as platforms give them, the last two as Moodle does
            f"ben_12_assignsubmission_file_{FOLDER} (1).ipynb": hand_ins["ben"],
            f"cleo_13_assignsubmission_file_/{FOLDER}.ipynb": hand_ins["cleo"],
        }
    )
    for student in ("dan", "eve"):
        room.hand_in(student, hand_ins[student])
    paths = [room.submitted(student) for student in hand_ins]
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    log = room.run("autograde", FOLDER)
    room.run("generate_feedback", FOLDER)
    room.run("export", "--to", "classroom/grades.csv")
    return room, log, before


def test_the_students_copy_is_nbgraders_own(graded):
    room, _, _ = graded
    theirs = (room.folder / "exercises" / FOLDER / f"{FOLDER}.ipynb").read_bytes()
    assert theirs == (COURSE / "exercises" / FOLDER / f"{FOLDER}.ipynb").read_bytes()


def test_everybody_gets_exactly_their_points(graded):
    room, _, _ = graded
    with (room.folder / "classroom/grades.csv").open() as file:
        scores = {row["student_id"]: (float(row["score"]), float(row["max_score"])) for row in csv.DictReader(file)}
    assert scores == {"ada": (8, 8), "ben": (0, 8), "cleo": (3, 8), "dan": (3, 8), "eve": (0, 8)}


def test_the_teacher_is_told_what_the_hostile_one_did(graded):
    _, log, _ = graded
    told = [line for line in log.splitlines() if "For the teacher" in line]
    assert all("eve" in line for line in told) and len(told) == 2
    assert "ended its process (exit status 0)" in told[0] and "change the course's own" in told[1]


def test_feedback_says_why(graded):
    room, _, _ = graded
    for student, expected in {
        "ada": "right.",
        "ben": "not written yet",
        "cleo": "that is GPipe. Stage 0 keeps",
        "dan": "It raised KeyError",
        "eve": "For the teacher",
    }.items():
        page = (room.folder / f"classroom/feedback/{student}/{FOLDER}/{FOLDER}.html").read_text()
        assert expected in page, student


def test_what_was_handed_in_is_as_it_was(graded):
    _, _, before = graded
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before} == before


def test_nothing_is_left_running(graded):
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if "course_utils.checks.sandbox" in (p.info["cmdline"] or [])
    ]


def test_students_copies_are_what_nbgrader_makes(nbgrader, tmp_path):
    """All units, byte for byte, by nbgrader's own preprocessors in the order of nbgrader_config.py."""
    script = tmp_path / "release.py"
    script.write_text(RELEASE)
    done = subprocess.run(
        [str(nbgrader), str(script), str(COURSE)],
        env=nbgrader_command.environment(nbgrader) | {"PYTHONPATH": str(COURSE)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [source.stem for source, _, _ in units.units([])]


RELEASE = """
import sys
from pathlib import Path
from nbconvert.exporters import NotebookExporter
from nbgrader.preprocessors import SaveCells
from traitlets.config.loader import PyFileConfigLoader

course = Path(sys.argv[1])
config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
steps = [step for step in config.GenerateAssignment.preprocessors if step is not SaveCells]  # SaveCells: the gradebook
config.Exporter.default_preprocessors = []
exporter = NotebookExporter(config=config)
for step in steps:
    exporter.register_preprocessor(step)
for solution in sorted((course / "solutions").glob("*/*.ipynb")):
    text, _ = exporter.from_filename(str(solution))
    copy = course / "exercises" / solution.parent.name / solution.name
    assert text.rstrip("\\n") == copy.read_text("utf-8").rstrip("\\n"), solution
    print(solution.stem)
"""
