""" "Run all" in a student's copy that nobody has touched goes to the end, with every check unsolved."""

import atexit
from collections.abc import Iterator
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

from course_utils import progress, units
from course_utils.checks import overview
from course_utils.checks.tasks import tasks_of
from tests.handing_in import read

UNITS = list(units.units([]))
IN_A_KERNEL = ("03", "08")  # in every run of the tests; all of them weekly


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(copy, id=copy.stem, marks=[] if copy.stem[:2] in IN_A_KERNEL else pytest.mark.weekly)
        for _, _, copy in UNITS
    ],
)
def test_an_untouched_copy_runs_to_its_end(copy, tmp_path):
    notebook = nbformat.read(copy, as_version=4)
    options = {"resources": {"metadata": {"path": str(tmp_path)}}, "extra_arguments": ["--IPKernelApp.log_level=40"]}
    NotebookClient(notebook, kernel_name="python3", timeout=120, **options).execute()
    for cell in notebook.cells:
        if units.tagged(cell, "check"):
            text = "".join(output.get("text", "") for output in cell.outputs)
            points = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
            assert "not written yet" in text and points == ["0"], text


def run_all(unit: str, added: str) -> Iterator[tuple[NotebookNode, Any]]:
    """Run a unit's cells in this process, an answer's with a text added to it; each cell and its value.

    Raises:
        AssertionError: a cell raised.
    """
    shell = InteractiveShell(user_ns={}, config=Config(HistoryManager={"enabled": False}))
    atexit.unregister(shell.atexit_operations)  # it empties all memory, once more for each shell
    for cell in read(unit, "exercises").cells:
        if cell.cell_type == "code":
            answer = units.tagged(cell, "answer")
            came = shell.run_cell(cell.source + (added.format(name=answer) if answer else ""))
            error = came.error_before_exec or came.error_in_exec
            assert error is None, f"unit {unit}: {error!r} in {cell.source}"
            yield cell, came.result


ODD = {
    "nothing": "",
    "a number": "\ndef {name}(*arguments, **named): return 7\n",
    "a text": "\ndef {name}(*arguments, **named): return 'x'\n",
    "a list": "\ndef {name}(*arguments, **named): return [1]\n",
    "four Nones": "\ndef {name}(*arguments, **named): return (None,) * 4\n",
    "infinity": "\ndef {name}(*arguments, **named): return float('inf')\n",
    "an error": "\ndef {name}(*arguments, **named): raise KeyError('x')\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ODD)
def test_whatever_answers_give_run_all_goes_on(what, monkeypatch, capsys):
    for source, _, _ in UNITS:
        for cell, points in run_all(units.unit_of(source), ODD[what]):
            said = capsys.readouterr().out
            if units.tagged(cell, "check"):
                expected = "not right yet" if ODD[what] else "not written yet"
                assert points == 0 and expected in said, said


# --- Progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def my_work(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FILE", tmp_path / "my_work/progress.json")
    (tmp_path / "my_work/exercises").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my_work/exercises")
    return tmp_path / "my_work"


def unwritten(*sizes):
    """To be written."""
    ...


def test_progress_is_kept_for_a_learner(my_work, capsys):
    from course_utils.checks import check, start
    from tests.bank.unit_06 import by_events, just_gpipe

    start("06")
    assert progress.read()["unit06.at_most"].opened and not progress.read()["unit06.at_most"].attempts
    check("unit06.at_most", unwritten)
    assert progress.read()["unit06.at_most"].attempts == 0, "an unwritten answer is no attempt"
    check("unit06.at_most", just_gpipe)
    assert (progress.read()["unit06.at_most"].attempts, progress.read()["unit06.at_most"].passed) == (1, "")
    progress.attempted("unit06.at_most", passed=True)
    first = progress.read()["unit06.at_most"]
    progress.attempted("unit06.at_most", passed=False)
    later = progress.read()["unit06.at_most"]
    assert first.passed == later.passed and (first.attempts, later.attempts) == (2, 3) and by_events
    capsys.readouterr()
    overview.show_progress()
    said = capsys.readouterr().out
    assert "unit 06    5 of  8 points  run_rank: opened, at_most: right" in said
    assert said.splitlines()[-1] == f"5 of {sum(t.points for u in overview.units() for t in tasks_of(u))} points in all"
    start("06")
    assert "right since" in capsys.readouterr().out


def test_progress_is_nobodys_elsewhere(my_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress.attempted("unit06.at_most", passed=True)
    assert progress.read() == {}


def test_a_damaged_file_is_kept_beside_the_new_one(my_work, capsys):
    progress.FILE.write_text("{half")
    progress.opened(["unit06.at_most"])
    assert progress.FILE.with_suffix(".damaged.json").read_text() == "{half"
    assert "could not be read" in capsys.readouterr().out and "unit06.at_most" in progress.read()


def test_a_full_disk_does_not_stop_a_check(my_work, monkeypatch, capsys):
    def full(path, text):
        raise OSError("No space left on device")

    monkeypatch.setattr(progress, "write_atomically", full)
    progress.attempted("unit06.at_most", passed=True)
    assert "Your progress is not kept: No space left on device" in capsys.readouterr().out


# --- Hints ------------------------------------------------------------------------------------------------------------


def test_hints_are_opened_by_the_learner(capsys):
    from course_utils import checks

    checks.last_checked.clear()
    checks.hint(1)
    assert "Run a cell with a check first" in capsys.readouterr().out
    checks.check("unit06.at_most", lambda *sizes: None)
    said = capsys.readouterr().out
    assert "hint(1)" in said and "warm-up" not in said
    checks.hint(2)
    assert "at_most, hint 2 of 3" in capsys.readouterr().out
    checks.hint(3, "unit06.run_rank")
    assert "run_rank, hint 3 of 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no hint 4; there are 1, 2 and 3"):
        checks.hint(4)
    with pytest.raises(ValueError, match="unit 06 has no task 'gpipe'; it has run_rank, at_most"):
        checks.hint(1, "unit06.gpipe")
    with pytest.raises(ValueError, match="there is no exercise unit '99'"):
        checks.check("unit99.x", print)


def test_in_the_bug_hunt_a_symptom_is_offered_after_a_while(capsys, monkeypatch):
    from course_utils import checks

    monkeypatch.setattr(checks, "tried", {})

    def said(answer):
        checks.check("unit12.split", answer)
        return capsys.readouterr().out

    assert "Look on. After 3 wrong answers, or ten minutes" in said(unwritten)
    assert all("Look on." in said(lambda rows, M: []) for _ in range(2))
    assert "A symptom, when you want it: hint(1)" in said(lambda rows, M: [])
    monkeypatch.setattr(checks, "tried", {"unit12.split": (0, checks.time.monotonic() - checks.LONG - 1)})
    assert "A symptom, when you want it: hint(1)" in said(unwritten)
