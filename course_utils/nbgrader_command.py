"""nbgrader in an environment of its own: `python course.py nbgrader autograde 06_the_gpipe_schedule`.

nbgrader switches on extensions of JupyterLab that learners do not need, so it is never installed beside it. Its
environment, .venv-classroom, sees the packages of this one and adds what only nbgrader needs.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from course_utils.workspace import COURSE

VENV = COURSE / ".venv-classroom"
STAMP = "course.json"  # written last: an unfinished environment has none


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def requirements() -> list[str]:
    """The [classroom] extra."""
    return tomllib.loads((COURSE / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"][
        "classroom"
    ]


def ensure(venv: Path = VENV) -> Path:
    """Make the environment unless it is there; its Python.

    Raises:
        OSError, subprocess.CalledProcessError: it could not be made; the reason has been printed.
    """
    packages = sysconfig.get_path("purelib")
    wanted = {"packages": packages, "requirements": requirements(), "path": str(venv)}
    stamp, python = venv / STAMP, python_of(venv)
    if python.exists() and stamp.exists() and json.loads(stamp.read_text("utf-8")) == wanted:
        return python
    print(f"Setting up {venv}: nbgrader and what it needs, about 20 MB to download.", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    inside = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(inside) / "course.pth").write_text(f"import site; site.addsitedir({packages!r})\n", "utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = os.environ.get("COURSE_CONSTRAINTS", "constraints.txt")
    if constraints:
        pip += ["--constraint", str(COURSE / constraints)]
    subprocess.run([*pip, *requirements()], check=True, cwd=COURSE)
    stamp.write_text(json.dumps(wanted), "utf-8")
    return python


def environment(python: Path) -> dict[str, str]:
    """nbgrader looks for `alembic` on the PATH, and for the templates of pages in Jupyter's folders."""
    first = {"PATH": str(python.parent), "JUPYTER_PATH": str(Path(sys.prefix) / "share/jupyter")}
    return os.environ | {k: os.pathsep.join(filter(None, [v, os.environ.get(k)])) for k, v in first.items()}


def main(arguments: list[str]) -> int:
    """Run nbgrader in the course's folder; its own exit status."""
    try:
        python = ensure()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The environment for nbgrader could not be made; the reason is above. {error}", file=sys.stderr)
        return 2
    (COURSE / "classroom").mkdir(exist_ok=True)
    return subprocess.call([str(python), "-m", "nbgrader", *arguments], cwd=COURSE, env=environment(python))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
