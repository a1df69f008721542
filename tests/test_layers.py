"""Imports point one way: a learner can read the modules from the bottom up and never meets an unknown name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_imports_point_down_only():
    done = lint(COURSE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "module, line, expected",
    [
        ("number_words", "from course_utils import schedules", "not allowed to import"),
        ("stages", "def late():\n    import course_utils.training", "not allowed to import"),
        ("schedules", "import pytest", "not allowed to import"),
        ("a_new_module", "", "a_new_module"),  # every module has its place
    ],
)
def test_an_import_that_points_up_is_found(tmp_path, module, line, expected):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(COURSE / "course_utils", tmp_path / "course_utils", ignore=ignore)
    shutil.copy(COURSE / "pyproject.toml", tmp_path)
    with (tmp_path / f"course_utils/{module}.py").open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert expected in done.stdout + done.stderr
