"""course.py: what it would install, and what it says when it cannot. Nothing here downloads anything."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import course

pytestmark = pytest.mark.smoke

FILE = Path(course.__file__)
COMMANDS = ["lab", "test", "check", "train", "fingerprint", "build", "progress", "unit", "wheelhouse"]
COMMANDS += ["feedback-report", "nbgrader", "bench", "soak"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone in a folder with spaces in its name, without .venv; pip is never run."""
    root = tmp_path / "my course, second try"
    root.mkdir()
    for name in ("course.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(FILE.parent / name, root)
    monkeypatch.setattr(course, "ROOT", root)
    monkeypatch.setattr(course, "VENV", root / ".venv")
    monkeypatch.setattr(course, "OLDEST", root / ".venv-oldest")
    monkeypatch.setattr(course, "CONSTRAINTS", "constraints.txt")
    monkeypatch.setattr(course.sys, "platform", "linux")
    monkeypatch.setattr(course.shutil, "which", lambda name: None)  # no NVIDIA driver
    monkeypatch.delenv("COURSE_TORCH_INDEX", raising=False)
    return root


@pytest.fixture
def ran(clone, monkeypatch):
    """The commands that course.py runs, each with the words that follow its program; `fail` are to fail."""
    commands: list[list[str]] = []
    fail: set[str] = set()

    def call(command, cwd=None):
        assert cwd == clone
        commands.append(command)
        if "venv" in command:
            python = Path(command[-1]) / course.PYTHON
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return int(any(word in command for word in fail))

    monkeypatch.setattr(course.subprocess, "call", call)
    monkeypatch.setattr(course, "run", lambda command: commands.append(command) or 0)
    call.commands, call.fail = commands, fail
    return call


def stamp_of(clone):
    return clone / ".venv" / course.STAMP


def change(file, old, new):
    text, times = re.subn(f"(?m){old}", new, file.read_text())
    assert times == 1
    file.write_text(text)


def pip_steps(ran):
    return [command[4:] for command in ran.commands if command[1:4] == ["-m", "pip", "install"]]


# --- The file itself -------------------------------------------------------------------------------------------------


def test_it_is_small_ascii_and_needs_only_the_standard_library():
    text = FILE.read_text("ascii")
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= sys.stdlib_module_names
    assert sum(1 for line in text.splitlines() if line.strip()) <= 195


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 11, 0), (3, 15, 0)])
def test_a_wrong_python_gets_one_sentence(version):
    code = f"import sys, runpy; sys.version_info = {version}; runpy.run_path({str(FILE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "3.11.1" in done.stderr and "{}.{}.{}".format(*version) in done.stderr and done.stderr.count("\n") == 1


def test_an_old_python_can_read_it_up_to_its_sentence():
    ast.parse(FILE.read_text(), feature_version=(3, 8))


def test_without_a_command_it_lists_them_one_line_each():
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line[2] != " "]
    assert listed == COMMANDS == list(course.COMMANDS)
    assert "COURSE_TORCH_INDEX" in done.stdout and "--torch cpu|cuda|keep" in done.stdout


def test_an_unknown_command_is_an_error():
    done = subprocess.run([sys.executable, str(FILE), "tset"], capture_output=True, text=True)
    assert done.returncode == 2 and "'tset'" in done.stderr


# --- What it installs ------------------------------------------------------------------------------------------------


def test_the_first_use_makes_an_environment_and_installs_the_small_torch(ran, clone, capsys):
    course.main(["lab", "--no-browser"])
    make, torch, rest, lab = ran.commands
    assert make == [sys.executable, "-m", "venv", "--clear", str(clone / ".venv")]
    assert torch[-3:] == ["--index-url", "https://download.pytorch.org/whl/cpu", "torch"] and "--no-deps" in torch
    assert rest[-2:] == ["--editable", "."] and "--index-url" not in rest
    for command in (torch, rest):
        assert command[command.index("--constraint") + 1] == "constraints.txt"
        assert "-q" not in command
    assert lab == [str(clone / ".venv" / course.PYTHON), "-m", "course_utils.workspace", "--no-browser"]
    assert json.loads(stamp_of(clone).read_text())["path"] == str(clone)
    assert "about 0.2 GB of torch" in capsys.readouterr().out


def test_the_second_use_installs_nothing(ran, clone):
    course.main(["train"])
    ran.commands.clear()
    course.main(["train", "--stages", "2", "--micro-batches", "8"])
    expected = ["-m", "course_utils.commands", "train", "--stages", "2", "--micro-batches", "8"]
    assert ran.commands == [[str(clone / ".venv" / course.PYTHON), *expected]]


def test_the_test_extra_is_added_once_and_stays(ran):
    course.main(["lab"])
    course.main(["check"])
    assert pip_steps(ran)[-1][-1] == ".[test]"
    ran.commands.clear()
    course.main(["lab"])
    course.main(["test"])
    assert len(ran.commands) == 2


def test_an_empty_variable_means_plain_pip_with_the_pinned_versions(ran, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_TORCH_INDEX", "")
    course.main(["test"])
    assert pip_steps(ran) == [
        ["--disable-pip-version-check", "--constraint", "constraints.txt", "--editable", ".[test]"]
    ]
    assert "up to 3 GB" in capsys.readouterr().out


def test_without_constraints_nothing_is_pinned(ran, monkeypatch):
    monkeypatch.setattr(course, "CONSTRAINTS", "")
    course.main(["test"])
    assert all("--constraint" not in step for step in pip_steps(ran))


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_the_usual_index_has_the_small_torch(ran, monkeypatch, platform, capsys):
    monkeypatch.setattr(course.sys, "platform", platform)
    course.main(["lab"])
    assert len(pip_steps(ran)) == 1
    assert "about 0.2 GB" in capsys.readouterr().out


def test_with_an_nvidia_driver_torch_comes_with_cuda(ran, monkeypatch, capsys):
    monkeypatch.setattr(course.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    course.main(["lab"])
    assert len(pip_steps(ran)) == 1
    assert "up to 3 GB of torch (with CUDA)" in capsys.readouterr().out


def test_another_choice_of_torch_makes_the_environment_anew_and_is_remembered(ran):
    course.main(["lab"])
    ran.commands.clear()
    course.main(["lab", "--torch", "cuda"])
    assert "--clear" in ran.commands[0] and len(pip_steps(ran)) == 1
    ran.commands.clear()
    course.main(["lab"])
    assert len(ran.commands) == 1


def test_cuda_where_the_usual_index_has_none_names_the_variable(ran, monkeypatch):
    monkeypatch.setattr(course.sys, "platform", "win32")
    with pytest.raises(SystemExit, match="COURSE_TORCH_INDEX"):
        course.main(["lab", "--torch=cuda"])
    monkeypatch.setenv("COURSE_TORCH_INDEX", "https://example.org/cuda")
    course.main(["lab", "--torch=cuda"])
    assert "https://example.org/cuda" in pip_steps(ran)[0]


def test_keep_takes_the_torch_that_is_there(ran, monkeypatch):
    monkeypatch.setattr(course, "version_of_torch", lambda: "2.12.0+cu130")
    course.main(["lab", "--torch", "keep"])
    assert "--system-site-packages" in ran.commands[0]
    assert pip_steps(ran) == [["--disable-pip-version-check", "torch==2.12.0+cu130", "--editable", "."]]


def test_keep_without_a_torch_says_so(ran, monkeypatch):
    monkeypatch.setattr(course.sys, "base_prefix", "/elsewhere")
    with pytest.raises(SystemExit, match="--torch keep needs a Python that has torch"):
        course.main(["lab", "--torch", "keep"])


def test_an_unknown_choice_of_torch_is_an_error(ran, capsys):
    with pytest.raises(SystemExit) as error:
        course.main(["lab", "--torch", "gpu"])
    assert error.value.code == 2 and "keep" in capsys.readouterr().err


# --- The oldest torch ------------------------------------------------------------------------------------------------


def test_the_oldest_torch_has_an_environment_of_its_own(ran, clone):
    course.main(["test"])
    before, usual = stamp_of(clone).read_text(), (clone / "constraints.txt").read_text()
    ran.commands.clear()
    course.main(["test", "--oldest", "-m", "not slow"])
    make, torch, rest, tests = ran.commands
    python = str(clone / ".venv-oldest" / course.PYTHON)
    assert make[-1] == str(clone / ".venv-oldest") and torch[0] == rest[0] == python
    assert torch[-3:] == ["--index-url", "https://download.pytorch.org/whl/cpu", "torch"] and rest[-1] == ".[test]"
    assert tests == [python, str(clone / "tests/oldest.py"), "-m", "not slow"]
    for command in (torch, rest):
        assert command[command.index("--constraint") + 1] == ".venv-oldest.txt"
    versions = (clone / ".venv-oldest.txt").read_text().splitlines()
    lowest = re.search('"torch>=(.+)"', (clone / "pyproject.toml").read_text())[1]
    assert versions[-1] == f"torch=={lowest}.*"
    assert (
        versions[:-1] == [line for line in usual.splitlines() if not line.startswith("torch==")] != usual.splitlines()
    )
    assert (stamp_of(clone).read_text(), (clone / "constraints.txt").read_text()) == (before, usual)
    ran.commands.clear()
    course.main(["test", "--oldest"])
    assert ran.commands == [tests[:2]]


def test_the_oldest_torch_is_the_bound_of_the_project_and_may_come_from_another_index(ran, clone, monkeypatch):
    change(clone / "pyproject.toml", '"torch>=.+"', '"torch>=2.12.1"')
    monkeypatch.setattr(course, "CONSTRAINTS", "")
    monkeypatch.setenv("COURSE_TORCH_INDEX", "https://example.org/cuda")
    course.main(["test", "--oldest"])
    assert (clone / ".venv-oldest.txt").read_text() == "torch==2.12.1.*\n"
    assert "https://example.org/cuda" in pip_steps(ran)[0] and not (clone / ".venv").exists()


def test_another_bound_or_another_pin_makes_it_up_to_date(ran, clone):
    course.main(["test", "--oldest"])
    for name, old, new in (("pyproject.toml", '"torch>=.+"', '"torch>=2.12.1"'), ("constraints.txt", "^tqdm=", "#")):
        ran.commands.clear()
        change(clone / name, old, new)
        course.main(["test", "--oldest"])
        assert len(pip_steps(ran)) == 2
    ran.commands.clear()
    change(clone / "constraints.txt", "^torch==.*", "torch==2.99.0")
    course.main(["test", "--oldest"])  # the pin of torch is not its pin
    assert pip_steps(ran) == []


def test_only_test_knows_the_oldest_torch(ran, clone):
    course.main(["bench", "--oldest"])
    assert ran.commands[-1][-1] == "--oldest" and not (clone / ".venv-oldest").exists()


# --- What can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no stamp", "broken stamp", "no python", "moved"])
def test_a_half_made_or_moved_environment_is_made_anew(ran, clone, damage):
    course.main(["lab"])
    stamp = stamp_of(clone)
    if damage == "no stamp":
        stamp.unlink()
    elif damage == "broken stamp":
        stamp.write_text('{"path": ')
    elif damage == "moved":
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"path": "/where/it/was"}))
    else:
        (clone / ".venv" / course.PYTHON).unlink()
    ran.commands.clear()
    course.main(["lab"])
    assert "--clear" in ran.commands[0] and len(pip_steps(ran)) == 2


def test_other_versions_are_installed_over_the_old_ones(ran, clone):
    course.main(["lab"])
    ran.commands.clear()
    (clone / "constraints.txt").write_text("torch==2.14.0\n")
    course.main(["lab"])
    assert not any("venv" in command for command in ran.commands) and len(pip_steps(ran)) == 2


def test_another_setting_of_a_tool_installs_nothing(ran, clone):
    course.main(["lab"])
    ran.commands.clear()
    with (clone / "pyproject.toml").open("a") as file:
        file.write("[tool.another]\nsetting = 1\n")
    course.main(["lab"])
    assert len(ran.commands) == 1


def test_an_index_that_cannot_be_reached_is_replaced_by_the_usual_one(ran, capsys):
    ran.fail.add("--index-url")
    course.main(["lab"])
    assert len(pip_steps(ran)) == 2
    assert "usual index: up to 3 GB" in capsys.readouterr().out


def test_a_failing_pip_ends_in_one_clear_sentence(ran, clone):
    ran.fail.add("--editable")
    with pytest.raises(SystemExit, match=r"Setting up failed; .* a full disk .* run the command again") as error:
        course.main(["lab"])
    assert isinstance(error.value.code, str)  # printed, and status 1
    assert not stamp_of(clone).exists()
    assert ran.commands[-1][-1] == "."  # JupyterLab was not started


def test_a_python_without_ensurepip_is_told_debians_package(ran, monkeypatch):
    monkeypatch.setattr(course.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"sudo apt install python3\.\d+-venv"):
        course.main(["lab"])
    assert ran.commands == []


def test_a_second_command_waits_for_the_first_and_then_has_nothing_to_do(ran, clone, monkeypatch, capsys):
    def first_command_ends(seconds):
        lock.close()
        python = clone / ".venv" / course.PYTHON
        python.parent.mkdir(parents=True)
        python.touch()
        stamp_of(clone).write_text(json.dumps(course.what_is_wanted(course.VENV, False, None)))

    lock = (clone / ".venv.lock").open("w")
    assert course.locked(lock)
    monkeypatch.setattr(course.time, "sleep", first_command_ends)
    course.main(["lab"])
    assert len(ran.commands) == 1  # JupyterLab
    assert "Waiting: another command" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_sentence(ran, clone):
    (clone / ".venv.lock").mkdir()  # whoever may not write gets an OSError too; root may always
    with pytest.raises(SystemExit, match="This folder must be writable"):
        course.main(["lab"])


# --- Handing over ----------------------------------------------------------------------------------------------------


def test_options_status_and_folder_reach_the_command(tmp_path):
    """A real environment without packages, and a stand-in for the command."""
    root = tmp_path / "my course"
    (root / "course_utils").mkdir(parents=True)
    for name in ("course.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(FILE.parent / name, root)
    stand_in = "import os, sys\nprint(sys.argv[1:], os.getcwd())\nsys.exit(7)\n"
    (root / "course_utils/commands.py").write_text(stand_in)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / ".venv")], check=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "COURSE_TORCH_INDEX": ""}
    made = "import course, json; print(json.dumps(course.what_is_wanted(course.VENV, False, None)))"
    stamp = subprocess.run([sys.executable, "-c", made], cwd=root, env=environment, capture_output=True, check=True)
    (root / ".venv/course.json").write_bytes(stamp.stdout)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(root / "course.py"), "train", "--out", "a b", "--stages=2"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == f"{['train', '--out', 'a b', '--stages=2']} {elsewhere}"
    assert seconds < 2  # 0.1 on a quiet machine
