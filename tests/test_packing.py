"""A unit's zip works where nothing of the course is, and a wheelhouse where there is no network."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import nbformat
import pytest

from course_utils import packing, units
from course_utils.checks.tasks import tasks_of
from tests.handing_in import read, solutions

# These in every run of the tests. All zips are packed alike, and test_classroom tries the solutions of all units.
OFTEN = ("06", "12")
UNITS = [
    pytest.param(source, copy, id=source.stem, marks=[] if units.unit_of(source) in OFTEN else pytest.mark.weekly)
    for source, _, copy in units.units([])
]

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return packing.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, wheel):
    """A Python that has the course's wheel and its dependencies, and knows nothing of this folder."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    say = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", say], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # the dependencies, by a line that runs no .pth file of theirs: this folder's own package stays unknown
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("source, copy", UNITS)
def test_a_packed_unit_works_anywhere(source, copy, wheel, elsewhere, tmp_path):
    unit = units.unit_of(source)
    path = packing.pack_unit(source, copy, wheel, tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / source.stem
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [copy.name, wheel.name, "README.txt", "run_checks.py"],
    )
    assert copy.name in (folder / "README.txt").read_text() and wheel.name in (folder / "README.txt").read_text()

    def checked(course_seed: str) -> dict:
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(elsewhere), "run_checks.py", "--json"],
            cwd=folder, env=inherited | {"COURSE_SEED": course_seed}, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return json.loads(done.stdout)

    untouched = checked("0")
    assert untouched["points"] == 0 and all("not written yet" in task["text"] for task in untouched["tasks"])
    notebook = nbformat.read(folder / copy.name, as_version=4)
    for cell in notebook.cells:
        if name := units.tagged(cell, "answer"):
            cell.source = solutions(unit)[name]
    nbformat.write(notebook, folder / copy.name)
    possible = sum(task.points for task in tasks_of(unit))
    for course_seed in ("0", "7"):
        found = checked(course_seed)
        assert (found["points"], found["possible"]) == (possible, possible), found


def test_run_checks_says_what_is_wrong_with_its_folder(elsewhere, tmp_path):
    (tmp_path / "run_checks.py").write_text(packing.RUN_CHECKS)

    def run(**environment):
        command = [str(elsewhere), "run_checks.py"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)

    done = run()
    assert done.returncode == 2 and "there are 0 exercise notebooks" in done.stderr
    nbformat.write(read("06", "exercises"), tmp_path / "06_the_gpipe_schedule.ipynb")
    done = run(COURSE_SEED="seven")
    assert done.returncode == 2 and "COURSE_SEED is 'seven'; it must be a whole number" in done.stderr


def test_the_commands_say_what_is_wrong(capsys):
    assert packing.main(["unit", "99"]) == 2
    assert "there is no exercise unit '99'; there are 01, 02" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="cuts off the network as POSIX can")
def test_a_wheelhouse_installs_without_a_network(tmp_path, capfd):
    """With one dependency for all: what pip downloads besides is its own work."""
    house = tmp_path / "wheelhouse"
    assert packing.main(["wheelhouse", "--no-deps", "--out", str(house), "cloudpickle"]) == 0
    assert len(list(house.glob("*.whl"))) == 2 and "2 wheels in" in capfd.readouterr().out
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", f"--find-links={house}", "--no-deps"]
    done = subprocess.run(
        [*install, "pipeline-parallelism-from-scratch", "cloudpickle"],
        env=os.environ | nowhere, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    say = "import course_utils.schedules as s, cloudpickle; print(s.gpipe(2, 2).to_text())"
    done = subprocess.run([str(python), "-c", say], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("0F0,0F1,0B0,0B1"), done.stderr
