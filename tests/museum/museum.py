"""The bug museum: bugs that users of pipelines have met, as mutations of our engine. `python -m tests.museum.museum`.

`exhibits.toml` has them as data. An exhibit is shown on a copy of the engine, in which `tests/test_guards.py` is run.
"""

import shutil
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
COURSE = HERE.parents[1]
NEEDED = ("course_utils", "tests/test_guards.py", "tests/models.py")  # by the guards
INTRODUCTION = """# The bug museum

Bugs that users of pipeline parallelism have met, each as a mutation of this course's engine of one to five lines
(`exhibits.toml`). Nearly all are silent: no error, a loss that falls, and a wrong result. Each is caught by a guard in
`tests/test_guards.py`, which says by how much it is wrong; `tests/test_museum.py` applies every bug to a copy of the
engine and demands that exactly this guard fails.

This table is written by `python -m tests.museum.museum`; `python -m tests.museum.museum mean-of-means FOLDER` makes a
copy of the engine with that bug in it.
"""


@dataclass(frozen=True)
class Edit:
    """A piece of one file of the engine, and what stands there instead."""

    file: str
    before: str
    after: str


@dataclass(frozen=True)
class Exhibit:
    """One bug: see `exhibits.toml` for what the fields mean."""

    id: str
    title: str
    thread: str
    symptom: str
    figure: str
    caught_by: str
    edit: tuple[Edit, ...]
    also: tuple[str, ...] = ()
    raises: str = "AssertionError"
    caught: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "caught", frozenset({self.caught_by, *self.also}))

    @property
    def num_lines(self) -> int:
        """How many lines of the engine it changes, adds or removes."""
        return sum(max(len(lines(edit.before)), len(lines(edit.after))) for edit in self.edit)


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def exhibits() -> list[Exhibit]:
    """All of them. Raises TypeError for a field that is missing or not known."""
    found = []
    for entry in tomllib.loads((HERE / "exhibits.toml").read_text("utf-8"))["exhibit"]:
        edits = tuple(Edit(**edit) for edit in entry.pop("edit"))
        found.append(Exhibit(edit=edits, also=tuple(entry.pop("also", ())), **entry))
    return found


def copy_engine(folder: Path) -> None:
    """Put into a folder what the guards need, compiled modules included."""
    for name in NEEDED:
        source, target = COURSE / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, target)


def apply(exhibit: Exhibit, folder: Path) -> None:
    """Put a bug into a copy of the engine.

    Raises:
        ValueError: a text does not stand there exactly once; the engine has moved on and the exhibit must follow.
    """
    for edit in exhibit.edit:
        path = folder / "course_utils" / edit.file
        text = path.read_text("utf-8")
        if (count := text.count(edit.before)) != 1:
            raise ValueError(
                f"{exhibit.id}: this stands {count} times in {edit.file}, and not once; take what stands there now for "
                f"{edit.before!r}"
            )
        path.write_text(text.replace(edit.before, edit.after), "utf-8")


def table() -> str:
    """README.md of this folder."""
    rows = ["| bug | what was done | met in | what a user sees | caught by | which says |", "| --- " * 6 + "|"]
    for exhibit in exhibits():
        repository, _, number = exhibit.thread.partition("#")
        short = repository.rpartition("/")[2]
        thread = f"[{short}#{number}](https://github.com/{repository}/issues/{number})" if exhibit.thread else ""
        guards = f"`{exhibit.caught_by}`" + "".join(f", also `{guard}`" for guard in exhibit.also)
        hangs = "" if exhibit.raises == "AssertionError" else f" ({exhibit.raises})"
        cells = (f"`{exhibit.id}`", exhibit.title, thread, exhibit.symptom, guards, f"“{exhibit.figure}”{hangs}")
        rows.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION + "\n" + "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    if not arguments:
        (HERE / "README.md").write_text(table(), "utf-8")
        print(f"{len(exhibits())} exhibits: {HERE / 'README.md'}")
        return 0
    known = {exhibit.id: exhibit for exhibit in exhibits()}
    if len(arguments) != 2 or arguments[0] not in known:
        print(f"usage: python -m tests.museum.museum [EXHIBIT FOLDER]\nexhibits: {', '.join(known)}")
        return 2
    copy_engine(Path(arguments[1]))
    apply(known[arguments[0]], Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
