"""Parts of the course to carry away: `course.py unit 09` packs one exercise unit, `course.py wheelhouse` all packages.

A packed unit is a zip with the students' notebook, the wheel of course_utils, a README and `run_checks.py`: it needs
nothing of the course's folder. A wheelhouse is a folder of wheels from which a classroom installs without a network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from course_utils.checks.tasks import points, tasks_of
from course_utils.units import unit_of, units
from course_utils.workspace import COURSE

PACKED = COURSE / "packed"

RUN_CHECKS = '''"""Check the notebook in this folder: python run_checks.py, or python run_checks.py --json for a program."""

import sys

from course_utils.grading import main

sys.exit(main())
'''

README = """{title}

1. With Python 3.11.1 or later, in this folder:

       python -m venv .venv
       .venv/bin/python -m pip install {wheel}        (Windows: .venv\\Scripts\\python)

   On Linux pip takes 3 GB of torch with CUDA. The small one, 0.2 GB, comes from PyTorch's own index, before that:

       .venv/bin/python -m pip install torch --index-url https://download.pytorch.org/whl/cpu

2. .venv/bin/jupyter lab {notebook}

3. Solve, save, and check everything at once: .venv/bin/python run_checks.py

{tasks}

The inputs of the checks are drawn from a seed. COURSE_SEED=7 in the environment draws others.
"""


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the package into a folder; its path.

    Raises:
        subprocess.CalledProcessError: pip could not; the reason has been printed.
    """
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(COURSE)], check=True)
    return next(folder.glob("*.whl"))


def pack_unit(source: Path, copy: Path, wheel: Path, target: Path) -> Path:
    """Write one unit's zip."""
    unit, notebook = unit_of(source), copy.name
    tasks = "\n".join(
        f"   {t.name:24} {t.minutes:3} minutes  {points(t.points):9} {'*' * t.difficulty}" for t in tasks_of(unit)
    )
    title = f"Exercises {unit}: {source.stem[3:].replace('_', ' ')}"
    readme = README.format(title=title, wheel=wheel.name, notebook=notebook, tasks=tasks)
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"unit_{source.stem}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(copy, f"{source.stem}/{notebook}")
        archive.write(wheel, f"{source.stem}/{wheel.name}")
        archive.writestr(f"{source.stem}/README.txt", readme)
        archive.writestr(f"{source.stem}/run_checks.py", RUN_CHECKS)
    return path


def unit_command(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = list(units(options.numbers))
        wheel = build_wheel(Path(folder))
        for source, _, copy in found:
            print(pack_unit(source, copy, wheel, options.out))
    return 0


def wheelhouse_command(options: argparse.Namespace) -> int:
    """Download the wheels that this Python would install, torch's small build among them where there is one."""
    options.out.mkdir(parents=True, exist_ok=True)
    constraints = COURSE / os.environ.get("COURSE_CONSTRAINTS", "constraints.txt")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build_wheel(options.out)
    here = ["--wheel-dir", str(options.out), "--find-links", str(options.out), "--constraint", str(constraints)]
    few = ["--no-deps"] * options.no_deps
    subprocess.run([*pip, "wheel", *few, *here, *options.packages, "pipeline-parallelism-from-scratch"], check=True)
    print(
        f"\n{len(list(options.out.glob('*.whl')))} wheels in {options.out}. In the classroom, without a network:\n"
        f"  python -m pip install --no-index --find-links {options.out.name} pipeline-parallelism-from-scratch"
    )
    return 0


def main(arguments: list[str]) -> int:
    """Run a command; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="course.py")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("unit", help="pack exercise units, each into a zip")
    command.add_argument("numbers", nargs="*", help="of units, for example 09; none: all")
    command.add_argument("--out", type=Path, default=PACKED, metavar="FOLDER", help="default: packed/")
    command.set_defaults(command=unit_command)
    command = commands.add_parser("wheelhouse", help="collect the wheels that a classroom without a network needs")
    command.add_argument("packages", nargs="*", default=[], help="more packages to collect, for example nbgrader")
    command.add_argument("--no-deps", action="store_true", help="nothing but the course and the packages named")
    command.add_argument("--out", type=Path, default=PACKED / "wheelhouse", metavar="FOLDER")
    command.set_defaults(command=wheelhouse_command)
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: pip failed with status {error.returncode}; the reason is above", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
