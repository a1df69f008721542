"""The learner's copies: whatever the course and the learner do, no answer is lost and git sees nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_utils import workspace
from course_utils.workspace import lab_arguments, quieten, text_hash, update_copies

pytestmark = pytest.mark.smoke

COURSE = Path(__file__).resolve().parents[1]
LESSON = "notebooks/02_cut.ipynb"
EXERCISE = "exercises/02/02.ipynb"


def write_notebook(path: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def answer(path: Path, text: str) -> None:
    """What a learner does: writes into a cell, and saves."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = text
    nbformat.write(notebook, path)


def open_run_and_save(path: Path) -> None:
    """What JupyterLab changes by itself: outputs, counts, the kernel's name, the language's version."""
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate(notebook.cells, start=1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", text="ran\n")]
        cell.metadata["trusted"] = True
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.14.0"}
    path.write_text(json.dumps(notebook, indent=4), "utf-8")


def sources(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


@pytest.fixture
def course(tmp_path) -> Path:
    root = tmp_path / "course"
    write_notebook(root / LESSON, "1 + 1", "2 + 2")
    write_notebook(root / "notebooks/03_send.ipynb", "send()")
    write_notebook(root / EXERCISE, "...  # your turn", "check(cut)")
    (root / "exercises/02/picture.png").write_bytes(b"\x89PNG")
    (root / "notebooks/sources").mkdir()
    (root / "notebooks/sources/02_cut.py").write_text("# %%\n1 + 1\n")
    (root / "notebooks/.ipynb_checkpoints").mkdir()
    write_notebook(root / "notebooks/.ipynb_checkpoints/02_cut-checkpoint.ipynb", "old")
    return root


@pytest.fixture
def mine(course) -> Path:
    my_work = course / "my_work"
    update_copies(course, my_work)
    return my_work


def visible(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.startswith("."))


def test_lessons_and_exercises_are_copied_and_nothing_else(course, mine):
    expected = [EXERCISE, "exercises/02/picture.png", LESSON, "notebooks/03_send.ipynb"]
    assert visible(mine) == sorted(expected)
    assert (mine / LESSON).read_bytes() == (course / LESSON).read_bytes()


def test_a_second_time_does_nothing(course, mine):
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    changes = update_copies(course, mine)
    assert changes.describe() == ""
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


def test_an_answer_stays_when_the_course_does_not_change(course, mine):
    answer(mine / EXERCISE, "def cut(): ...")
    open_run_and_save(mine / EXERCISE)
    kept = (mine / EXERCISE).read_bytes()
    assert update_copies(course, mine).describe() == ""
    assert (mine / EXERCISE).read_bytes() == kept


def test_a_copy_that_was_only_opened_and_run_is_refreshed(course, mine):
    open_run_and_save(mine / LESSON)
    write_notebook(course / LESSON, "1 + 1", "3 + 3")
    changes = update_copies(course, mine)
    assert changes.refreshed == [LESSON] and LESSON in changes.describe()
    assert sources(mine / LESSON) == ["1 + 1", "3 + 3"]


def test_if_both_changed_the_answer_stays_and_the_new_one_is_put_beside_it_once(course, mine):
    answer(mine / EXERCISE, "def cut(): ...")
    kept = (mine / EXERCISE).read_bytes()
    write_notebook(course / EXERCISE, "...  # your turn, about four lines", "check(cut)")
    changes = update_copies(course, mine)
    beside = "exercises/02/02.new.ipynb"
    assert changes.beside == {EXERCISE: beside}
    assert EXERCISE in changes.describe() and beside in changes.describe()
    assert (mine / EXERCISE).read_bytes() == kept
    assert sources(mine / beside)[0] == "...  # your turn, about four lines"
    assert update_copies(course, mine).describe() == ""
    (mine / beside).unlink()
    assert update_copies(course, mine).describe() == ""  # offered once is enough


def test_the_one_beside_is_replaced_only_if_it_is_untouched(course, mine):
    answer(mine / EXERCISE, "my first answer")
    write_notebook(course / EXERCISE, "second version")
    update_copies(course, mine)
    write_notebook(course / EXERCISE, "third version")
    assert update_copies(course, mine).beside == {EXERCISE: "exercises/02/02.new.ipynb"}
    answer(mine / "exercises/02/02.new.ipynb", "my second answer")
    write_notebook(course / EXERCISE, "fourth version")
    assert update_copies(course, mine).beside == {EXERCISE: "exercises/02/02.new2.ipynb"}
    everything = [sources(path)[0] for path in sorted((mine / "exercises/02").glob("*.ipynb"))]
    assert set(everything) == {"my first answer", "my second answer", "fourth version"}


def test_a_learner_who_made_the_same_change_is_up_to_date(course, mine):
    write_notebook(course / EXERCISE, "...  # mended")
    write_notebook(mine / EXERCISE, "...  # mended")
    assert update_copies(course, mine).describe() == ""
    write_notebook(course / EXERCISE, "...  # mended again")
    assert update_copies(course, mine).refreshed == [EXERCISE]


def test_a_learner_who_takes_a_change_back_gets_the_new_one(course, mine):
    answer(mine / EXERCISE, "a try")
    write_notebook(course / EXERCISE, "...  # a better question")
    assert list(update_copies(course, mine).beside) == [EXERCISE]
    answer(mine / EXERCISE, "...  # your turn")
    assert update_copies(course, mine).refreshed == [EXERCISE]


def test_a_deleted_copy_comes_back(course, mine):
    (mine / LESSON).unlink()
    assert update_copies(course, mine).new == [LESSON]


def test_what_the_course_gave_up_stays(course, mine):
    (course / LESSON).unlink()
    assert update_copies(course, mine).describe() == ""
    assert (mine / LESSON).exists()


@pytest.mark.parametrize("record", [None, "", "{", "[]"])
def test_without_its_record_nothing_is_overwritten(course, mine, record):
    answer(mine / EXERCISE, "my answer")
    path = mine / workspace.RECORD
    path.unlink() if record is None else path.write_text(record)
    write_notebook(course / LESSON, "new")
    changes = update_copies(course, mine)
    assert not changes.refreshed and sources(mine / EXERCISE)[0] == "my answer"
    assert set(changes.beside) == {EXERCISE, LESSON}


@pytest.mark.parametrize("content", [b"", b"half a note{", b'{"cells": 3}', b"\xff\xfe"])
def test_a_copy_that_is_no_notebook_any_more_counts_as_changed(course, mine, content):
    (mine / EXERCISE).write_bytes(content)
    assert update_copies(course, mine).describe() == ""
    write_notebook(course / EXERCISE, "new")
    assert list(update_copies(course, mine).beside) == [EXERCISE]
    assert (mine / EXERCISE).read_bytes() == content


def test_an_interrupted_copy_leaves_the_old_one(course, mine, monkeypatch):
    write_notebook(course / LESSON, "new")
    before = (mine / LESSON).read_bytes()

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(workspace.shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        update_copies(course, mine)
    monkeypatch.undo()
    assert (mine / LESSON).read_bytes() == before and len(list((mine / "notebooks").iterdir())) == 2
    assert update_copies(course, mine).refreshed == [LESSON]


def test_the_hash_sees_text_only(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "x", "y")
    before = text_hash(tmp_path / "a.ipynb")
    open_run_and_save(tmp_path / "a.ipynb")
    assert text_hash(tmp_path / "a.ipynb") == before
    write_notebook(tmp_path / "b.ipynb", "x\ny")
    write_notebook(tmp_path / "c.ipynb", "x", "y ")
    assert len({before, text_hash(tmp_path / "b.ipynb"), text_hash(tmp_path / "c.ipynb")}) == 3


# --- The whole story -------------------------------------------------------------------------------------------------


def test_copy_solve_run_update(course):
    """With git: the course is a clone, the learner works, the course is updated; `git status` stays clean."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Teacher", "-c", "user.email=teacher@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=course, check=True, capture_output=True, text=True).stdout

    if shutil.which("git") is None:
        pytest.skip("needs git")
    shutil.copy(COURSE / ".gitignore", course)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "the course")
    mine = course / "my_work"
    update_copies(course, mine)
    assert git("status", "--porcelain") == ""

    answer(mine / EXERCISE, "def cut(): return 42")
    (mine / "notebooks/my own notes.ipynb").write_text("{}")
    for path in mine.rglob("0*.ipynb"):
        open_run_and_save(path)
    assert git("status", "--porcelain") == ""

    write_notebook(course / LESSON, "a better lesson")
    write_notebook(course / EXERCISE, "...  # a better question")
    write_notebook(course / "notebooks/04_new.ipynb", "a new lesson")
    git("add", ".")
    git("commit", "-qm", "an update")
    changes = update_copies(course, mine)
    assert git("status", "--porcelain") == ""
    assert (changes.new, changes.refreshed, list(changes.beside)) == (["notebooks/04_new.ipynb"], [LESSON], [EXERCISE])
    assert sources(mine / EXERCISE)[0] == "def cut(): return 42"
    assert sources(mine / LESSON) == ["a better lesson"]
    assert (mine / "notebooks/my own notes.ipynb").exists()
    assert update_copies(course, mine).describe() == ""


# --- JupyterLab ------------------------------------------------------------------------------------------------------


def test_new_copies_are_trusted(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    from nbformat.sign import NotebookNotary

    workspace.trust([mine / LESSON])
    notary = NotebookNotary()
    assert notary.check_signature(nbformat.read(mine / LESSON, as_version=4))
    assert not notary.check_signature(nbformat.read(mine / EXERCISE, as_version=4))


def test_news_and_warnings_are_off_and_other_settings_stay(tmp_path):
    overrides = tmp_path / "share/jupyter/lab/settings/overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text('{"another": {"setting": 1}}')
    for _ in range(2):
        quieten(tmp_path)
        settings = json.loads(overrides.read_text())
        assert settings["another"] == {"setting": 1}
        assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    assert "log_level = 40" in (tmp_path / "etc/ipython/ipython_kernel_config.py").read_text()


def test_jupyterlab_opens_in_my_work_and_gets_the_options(mine):
    arguments = lab_arguments(mine, first_time=True, options=["--no-browser"])
    assert arguments[0] == f"--ServerApp.root_dir={mine}" and arguments[-1] == "--no-browser"
    write_notebook(mine / "notebooks" / "00_first.ipynb", "hello")
    assert "--LabApp.default_url=/lab/tree/notebooks/00_first.ipynb" in lab_arguments(mine, True, [])
    assert not any("default_url" in argument for argument in lab_arguments(mine / "empty", True, []))
    assert not any("default_url" in argument for argument in lab_arguments(mine, False, []))


def test_importing_it_is_quick():
    """The first thing a learner sees after `lab` is the list of copies, not a wait for torch or JupyterLab."""
    code = "import sys, course_utils.workspace; print({'torch', 'jupyterlab', 'nbformat'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=COURSE, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "set()", done.stderr
