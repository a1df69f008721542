"""What `course.py test --oldest` runs: the tests of the engine, with the oldest torch that pyproject.toml allows.

Whatever else is written goes on to pytest: `course.py test --oldest -m "not slow" -x`.
"""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1]
# What these test is no code that torch runs, or is run once already with the torch that constraints.txt names: the
# lessons and the checks of what readers write in them, the building of notebooks, and the project around the course.
NOT_THE_ENGINE = ("test_lesson*", "test_notebooks", "test_checks", "test_workspace", "test_project", "test_course")
NOT_THE_ENGINE += ("test_units", "test_exercises_run", "test_feedback", "test_classroom", "test_packing")


def engine_tests(folder: Path = COURSE / "tests") -> list[str]:
    """Every file of tests but those of NOT_THE_ENGINE, as paths below the course: a new file is in by itself."""
    files = sorted(path for path in folder.glob("test_*.py") if not any(path.match(f"{n}.py") for n in NOT_THE_ENGINE))
    return [path.relative_to(folder.parent).as_posix() for path in files]


def lowest_torch() -> str:
    """The bound in pyproject.toml: "2.11" of "torch>=2.11"."""
    project = tomllib.loads((COURSE / "pyproject.toml").read_text("utf-8"))["project"]
    return next(line.removeprefix("torch>=") for line in project["dependencies"] if line.startswith("torch>="))


def main(arguments: list[str]) -> int:
    found, lowest = metadata.version("torch"), lowest_torch()
    if not f"{found}.".startswith(f"{lowest}."):
        print(f"This Python has torch {found}, not {lowest}: run `python course.py test --oldest`.", file=sys.stderr)
        return 2
    print(f"torch {found}: {len(engine_tests())} files of tests", flush=True)
    status = subprocess.call([sys.executable, "-m", "pytest", *engine_tests(), *arguments], cwd=COURSE)
    print(f"torch {found}: {'all passed' if status == 0 else f'failed (status {status})'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
