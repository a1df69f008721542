#!/usr/bin/env python3
"""One command for everything: `python course.py lab` (on Windows `py course.py lab`). Needs nothing but Python.

The first use makes a virtual environment in .venv and installs what the command needs; later uses start at once.

--torch cpu|cuda|keep  Which torch to install. keep: the one that this Python has already. Default: cpu, or cuda on
                       Linux with an NVIDIA driver. It is remembered; another choice makes .venv anew.
--oldest               With test: run the engine's tests with the oldest torch of pyproject.toml, from .venv-oldest.
COURSE_TORCH_INDEX     Environment variable: the index that torch comes from. Default: PyTorch's own one where only
                       that has the small CPU build, which is on Linux. Empty: pip's usual one, as for all else.
COURSE_CONSTRAINTS     Environment variable: the file of exact versions. Default: constraints.txt. Empty: the newest.
"""

import sys

if not (3, 11, 1) <= sys.version_info < (3, 15):  # before anything that an older Python could stumble over
    sys.exit(
        "This course needs Python 3.11.1 or later, up to 3.14, and this is Python {}.{}.{}: start it with one of "
        "those, for example `python3.13 course.py lab` (Windows: `py -3.13 course.py lab`).".format(*sys.version_info)
    )

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV, OLDEST = ROOT / ".venv", ROOT / ".venv-oldest"  # the second one has the oldest torch
PYTHON = "Scripts/python.exe" if os.name == "nt" else "bin/python"  # in .venv
STAMP = "course.json"  # in .venv: what it was made for; written last, so an unfinished .venv has none
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = os.environ.get("COURSE_CONSTRAINTS", "constraints.txt")

COMMANDS = {  # name: (what it does, whether it needs the [test] extra, what Python then runs)
    "lab": ("copy the lessons to my_work/ and open them in JupyterLab", False, ["-m", "course_utils.workspace"]),
    "test": ("run all checks, tests and notebooks (--smoke: a few)", True, [str(ROOT / "tests/run.py"), "test"]),
    "check": ("run the quick ones of them, in two to three minutes", True, [str(ROOT / "tests/run.py"), "check"]),
    "train": ("train the Transformer over several stages", False, ["-m", "course_utils.commands", "train"]),
    "fingerprint": ("compare all ways to train, bit by bit", False, ["-m", "course_utils.commands", "fingerprint"]),
    "build": ("build notebooks from their texts, for example: build 11", True, ["-m", "course_utils.authoring"]),
    "progress": ("show what you have done of the exercises", False, ["-m", "course_utils.checks.overview"]),
    "unit": ("pack an exercise unit into a zip, for example: unit 09", False, ["-m", "course_utils.packing", "unit"]),
    "wheelhouse": ("collect what a place without network needs", False, ["-m", "course_utils.packing", "wheelhouse"]),
    "feedback-report": ("measure how good the checks of exercises are", True, [str(ROOT / "tests/feedback.py")]),
    "nbgrader": ("run nbgrader, from an environment of its own", False, ["-m", "course_utils.nbgrader_command"]),
    "bench": ("make a measurement; without a name: list them", False, [str(ROOT / "tests/bench.py")]),
    "soak": ("train through 200 launches that are mostly broken off", False, [str(ROOT / "tests/soak.py")]),
}


def main(arguments):
    name = arguments[0] if arguments else "help"
    if name not in COMMANDS:
        asked = name in ("help", "-h", "--help")
        print("" if asked else f"course.py has no command {name!r}. It has:\n", end="", file=sys.stderr, flush=True)
        print("\n".join(f"  {name:15} {says}" for name, (says, _, _) in COMMANDS.items()))
        print("\n" + __doc__[__doc__.index("--torch") :].rstrip())
        return 0 if asked else 2
    parser = argparse.ArgumentParser(prog=f"course.py {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--torch", choices=["cpu", "cuda", "keep"])
    options, rest = parser.parse_known_args(arguments[1:])
    venv, (_, needs_test, target) = VENV, COMMANDS[name]
    if name == "test" and "--oldest" in rest:
        rest.remove("--oldest")
        venv, target = OLDEST, [str(ROOT / "tests/oldest.py")]
    if read_stamp(venv) != what_is_wanted(venv, needs_test, options.torch):
        with one_at_a_time():  # another command may meanwhile have made what this one wants
            wanted = what_is_wanted(venv, needs_test, options.torch)
            if read_stamp(venv) != wanted:
                install(venv, wanted, plan(venv, wanted))
    return run([str(venv / PYTHON), *target, *rest])


def read_stamp(venv):
    try:
        return json.loads((venv / STAMP).read_text("utf-8")) if (venv / PYTHON).exists() else {}
    except (OSError, ValueError):
        return {}


def what_is_wanted(venv, needs_test, torch):
    driver = sys.platform == "linux" and (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    made_for, versions = read_stamp(venv), json.dumps(project) + exact_versions(venv)
    return {
        "path": str(ROOT),  # a .venv that was moved along with its folder still points to the old one
        "torch": torch or made_for.get("torch") or ("cuda" if driver else "cpu"),
        "test": needs_test or made_for.get("test", False),
        "versions": hashlib.sha256(versions.encode()).hexdigest(),
    }


def exact_versions(venv):
    """The text of the file of constraints; in that of OLDEST, torch has its lowest version."""
    exact = (ROOT / CONSTRAINTS).read_text("utf-8") if CONSTRAINTS else ""
    if venv == VENV:
        return exact
    lowest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]
    return re.sub(r"(?m)^torch==.*\n", "", exact) + f"torch=={lowest}.*\n"


@contextlib.contextmanager
def one_at_a_time():
    """A lock that ends with this process: `test` in a second terminal waits while `lab` is still setting up."""
    try:
        file = (ROOT / ".venv.lock").open("w")
    except OSError as error:
        sys.exit(f"This folder must be writable, because packages and your work are kept in it: {error}")
    with file:
        waiting = False
        while not locked(file):
            print("" if waiting else "Waiting: another command is setting up .venv.\n", end="", flush=True)
            waiting = True
            time.sleep(1)
        yield


def locked(file):
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # some network folders know no locks
    return True


def torch_index(torch):
    """The index that torch is to come from; empty: pip's usual one."""
    default = PYTORCH_CPU_INDEX if torch == "cpu" and sys.platform == "linux" else ""
    index = "" if torch == "keep" else os.environ.get("COURSE_TORCH_INDEX", default)
    if torch == "cuda" and sys.platform != "linux" and not index:
        sys.exit(
            "pip's usual index has torch with CUDA for Linux only: set COURSE_TORCH_INDEX to the index address that "
            "https://pytorch.org/get-started/locally/ shows for this system, then run the command again."
        )
    return index


def plan(venv, wanted):
    """The commands that make an environment what is wanted, in order."""
    torch, index, steps = wanted["torch"], torch_index(wanted["torch"]), []
    keep, made_for, constraints = torch == "keep", read_stamp(venv), CONSTRAINTS
    if venv == OLDEST:
        constraints = f"{venv.name}.txt"
        (ROOT / constraints).write_text(exact_versions(venv), "utf-8")
    pip = [str(venv / PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    if constraints and not keep:
        pip += ["--constraint", constraints]
    if (made_for.get("path"), made_for.get("torch")) != (wanted["path"], torch):
        see_torch = ["--system-site-packages"] if keep else []
        steps.append([sys.executable, "-m", "venv", "--clear", *see_torch, str(venv)])
    if index:  # torch alone, so that its index is asked for nothing else
        steps.append([*pip, "--no-deps", "--retries", "1", "--index-url", index, "torch"])
    kept = [f"torch=={version_of_torch()}"] if keep else []
    steps.append([*pip, *kept, "--editable", ".[test]" if wanted["test"] else "."])
    return steps


def version_of_torch():
    """The version that `--torch keep` keeps. (A virtual environment cannot hand its packages to another one.)"""
    from importlib import metadata

    try:
        if sys.prefix == sys.base_prefix:
            return metadata.version("torch")
    except metadata.PackageNotFoundError:
        pass
    sys.exit(f"--torch keep needs a Python that has torch and is no virtual environment; {sys.executable} is not one.")


def install(venv, wanted, steps):
    if importlib.util.find_spec("ensurepip") is None:
        package = "python{}.{}-venv".format(*sys.version_info)
        sys.exit(f"This Python cannot make virtual environments. On Debian and Ubuntu: sudo apt install {package}")
    from_usual_index = sys.platform == "linux" and not torch_index(wanted["torch"])
    torch = "up to 3 GB of torch (with CUDA)" if from_usual_index else "about 0.2 GB of torch"
    torch = "no torch" if wanted["torch"] == "keep" else torch
    print(f"Setting up {venv}. To download, unless pip still has it: {torch}, 0.1 GB of other packages.", flush=True)
    for step in steps:
        print("\n> " + subprocess.list2cmdline(step), flush=True)
        if subprocess.call(step, cwd=ROOT) == 0:
            continue
        if "--index-url" in step:
            print("No torch from there (see above). Going on with pip's usual index: up to 3 GB on Linux.", flush=True)
            continue
        sys.exit(
            f"\nSetting up failed; the reason is above. Mostly it is the network, a full disk (here "
            f"{shutil.disk_usage(ROOT).free / 1e9:.1f} GB are free), a program that still runs from it, or a system "
            "without torch packages (32 bits, Intel Mac, Alpine). Mend it and run the command again."
        )
    (venv / STAMP).write_text(json.dumps(wanted), "utf-8")
    print("\nSet up.\n", flush=True)


def run(command):
    if os.name == "posix":
        os.execv(command[0], command)  # becomes the command: its signals and its exit status are its own
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command has received it too, and decides
            pass


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nStopped. Run the same command again to go on.")
