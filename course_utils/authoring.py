"""From text to notebook: `python course.py build 11` makes notebooks/11_*.ipynb from notebooks/sources/11_*.py.

`build --units 11` does the same for an exercise unit, from solutions/sources/, and derives the copy for students.

A lesson is written as a Python file in which `# %%` starts a cell (jupytext's py:percent form). Building runs it in a
fresh kernel and removes whatever would differ from one run to the next, so a change of a lesson is a change of lines in
its text, and the notebook in the repository is always what the text gives. The way is one way: a notebook is never
edited by hand, and `build --check` compares each one with its text, cell by cell, without running anything.
"""

import argparse
import base64
import hashlib
import os
import re
import struct
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_utils import units

COURSE = Path(__file__).resolve().parents[1]
NOTEBOOKS = COURSE / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
CELL_LIMIT = 300  # seconds
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS_WITHOUT_PIXELS = {b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf"}  # the version of matplotlib, the date, ...


class AuthoringError(Exception):
    """A lesson's text cannot be built, or a notebook is not what its text gives."""


# --- From text to cells ----------------------------------------------------------------------------------------------


def read_text(source: Path) -> NotebookNode:
    """The notebook that a text describes, without outputs.

    Cell ids are given (`# %% id="first-run"`) or a hash of the cell's text, so they are the same in every build and
    change only with their cell.
    """
    import jupytext

    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    used: set[str] = set()
    for cell in notebook.cells:
        given = cell.metadata.pop("id", "")
        if given in used:
            raise AuthoringError(f"{source.name}: the id {given!r} is given to two cells: give each its own")
        cell.id = given or free_id(cell, used)
        used.add(cell.id)
    is_unit = source.parent.parent.name == "solutions"
    return units.with_grading(notebook, units.unit_of(source)) if is_unit else notebook


def free_id(cell: NotebookNode, used: set[str]) -> str:
    """A hash of the text; of the text and a number if the lesson has the same cell twice."""
    number = 0
    while True:
        text = f"{cell.cell_type}\n{cell.source}" + f"\n{number}" * (number > 0)
        cell_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        if cell_id not in used:
            return cell_id
        number += 1


def has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


# --- Running ---------------------------------------------------------------------------------------------------------


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel whose working folder is `folder`, as a learner's "Run all" does.

    Raises:
        AuthoringError: a cell failed, a cell that is tagged raises-exception did not, or one took too long.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_LIMIT,
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise AuthoringError(f"running failed: {error}") from None
    for number, cell in enumerate(notebook.cells, start=1):
        failed = any(output.output_type == "error" for output in cell.get("outputs", []))
        if has_tag(cell, "raises-exception") and not failed:
            raise AuthoringError(f"cell {number} is tagged raises-exception, and it raised nothing: remove the tag")


# --- What differs from run to run ------------------------------------------------------------------------------------


def normalise(notebook: NotebookNode) -> None:
    """Leave in the outputs only what the text determines, so that two builds give the same bytes."""
    notebook.metadata = nbformat.from_dict(METADATA)  # a run adds the version of Python and the state of widgets
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)  # when the cell ran
        runs = bool(cell.source.strip())
        count += runs
        cell.execution_count = count if runs else None
        cell.outputs = [output for output in cell.outputs if keep(output)]
        for output in cell.outputs:
            normalise_output(output, count)


def keep(output: NotebookNode) -> bool:
    """Drop what shows nothing without a kernel: a widget that has left no sentence and no picture of itself."""
    if "data" not in output:
        return True
    bare_widget = WIDGET in output.data
    output.data.pop(WIDGET, None)
    only_text = set(output.data) <= {"text/plain"}
    return not (bare_widget and only_text and re.match(r"\w+\(", output.data.get("text/plain", "X(")))


def normalise_output(output: NotebookNode, count: int) -> None:
    if output.output_type == "execute_result":
        output.execution_count = count
    if output.output_type == "stream":
        output.text = without_places(output.text)
    if output.output_type == "error":
        output.evalue = without_places(output.evalue)
        output.traceback = [without_places(line) for line in output.traceback]
    for kind, value in output.get("data", {}).items():
        if kind == "image/png":
            output.data[kind] = base64.b64encode(pixels_only(base64.b64decode(value))).decode() + "\n"
        elif isinstance(value, str) and kind.startswith("text/"):
            output.data[kind] = without_places(value)


def without_places(text: str) -> str:
    """Without the folders of the machine that built the notebook, addresses in memory, and numbers of processes."""
    for folder, name in places():
        text = text.replace(folder, name)
    text = re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "cell", text)
    return re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)


def places() -> list[tuple[str, str]]:
    """Folders and what to write instead, the longest first; IPython writes those in the home folder with a ~."""
    folders = [(sysconfig.get_path("purelib"), "site-packages"), (sysconfig.get_path("stdlib"), "python"), (COURSE, "")]
    found = []
    for folder, name in folders:
        for form in (str(folder), str(folder).replace(str(Path.home()), "~", 1)):
            found.append((form + os.sep, name + "/" * bool(name)))
    return sorted(found, key=lambda pair: len(pair[0]), reverse=True)


def pixels_only(png: bytes) -> bytes:
    """A PNG without the chunks that say who wrote it and when (PNG specification, section 11.3)."""
    if not png.startswith(PNG_SIGNATURE):
        raise AuthoringError("an image/png output is no PNG")
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        end = start + 12 + length  # length and kind before the data, a checksum behind it
        if kind not in PNG_CHUNKS_WITHOUT_PIXELS:
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


# --- Building and checking -------------------------------------------------------------------------------------------


def build(source: Path, target: Path) -> NotebookNode:
    """Run a lesson's text and write the notebook; the old one stays if anything fails."""
    notebook = read_text(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    execute(notebook, target.parent)
    normalise(notebook)
    nbformat.validate(notebook)
    text = as_written(notebook)
    if str(Path.home()) in text and len(Path.home().parts) > 1:
        raise AuthoringError(f"an output names the home folder {Path.home()}: print a path relative to the course")
    write(text, target)
    return notebook


def write(text: str, target: Path) -> None:
    """Write a notebook in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(text, "utf-8", newline="\n")
    os.replace(unfinished, target)


def as_written(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def differences(source: Path, target: Path) -> Iterator[str]:
    """How the notebook differs from what its text gives; nothing is run."""
    if not target.exists():
        yield f"{target.name} is missing"
        return
    wanted, stored = read_text(source), nbformat.read(target, as_version=4)
    nbformat.validate(stored)
    if len(wanted.cells) != len(stored.cells):
        yield f"{target.name} has {len(stored.cells)} cells, its text gives {len(wanted.cells)}"
    for number, (want, have) in enumerate(zip(wanted.cells, stored.cells, strict=False), start=1):
        for what in ("cell_type", "id", "source", "metadata"):
            if want[what] != have[what]:
                yield f"{target.name}, cell {number}: {what} is {have[what]!r}, its text gives {want[what]!r}"
    if wanted.metadata != stored.metadata:
        yield f"{target.name}: metadata is {stored.metadata!r}, a build gives {wanted.metadata!r}"
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code" and cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"{target.name}: execution counts are {counts}, a build gives 1, 2, 3, ..."


def student_differences(solution: Path, copy: Path) -> Iterator[str]:
    """How a unit's copy for students differs from what its solutions give."""
    wanted = as_written(units.student_copy(nbformat.read(solution, as_version=4)))
    if not copy.exists() or copy.read_text("utf-8") != wanted:
        yield f"exercises/{copy.parent.name}: it is not what solutions/{solution.parent.name} gives"


def lessons(wanted: list[str], folder: Path = NOTEBOOKS) -> list[tuple[Path, Path]]:
    """(text, notebook) of the lessons whose numbers are given, of all if none is.

    Raises:
        AuthoringError: no text, or more than one, starts with a number that was asked for.
    """
    pairs = []
    for name in wanted or [""]:
        found = sorted((folder / "sources").glob(f"{name}*.py"))
        if name and len(found) != 1:
            there = ", ".join(path.stem for path in sorted((folder / "sources").glob("*.py"))) or "none"
            raise AuthoringError(
                f"{len(found)} texts in {folder.name}/sources/ start with {name!r}; there are: {there}"
            )
        pairs += [(path, folder / f"{path.stem}.ipynb") for path in found]
    return pairs


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="course.py build", description="Build notebooks from their texts.")
    parser.add_argument("number", nargs="*", help="of a lesson or a unit, 11 for example; none: all")
    parser.add_argument("--units", action="store_true", help="exercise units, not lessons")
    parser.add_argument("--check", action="store_true", help="run nothing; compare the notebooks with their texts")
    options = parser.parse_args(arguments)
    try:
        wanted: list[tuple[Path, Path, Path | None]] = []
        if options.units:
            wanted += units.units(options.number)
        else:
            wanted += [(source, target, None) for source, target in lessons(options.number)]
        wrong = 0
        for source, target, copy in wanted:
            if options.check:
                found = list(differences(source, target))
                if copy is not None and not found:
                    found = list(student_differences(target, copy))
                wrong += len(found)
                print("\n".join(found) or f"{target.name}: as its text")
            else:
                build_one(source, target, copy)
    except (AuthoringError, ValueError) as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    if wrong:
        print("Texts are edited, notebooks are built: python course.py build", file=sys.stderr)
    return 1 if wrong else 0


def build_one(source: Path, target: Path, copy: Path | None) -> None:
    """Build a notebook, and if it is a unit's the copy for students, and say so."""
    started = time.perf_counter()
    notebook = build(source, target)
    if copy is not None:
        write(as_written(units.student_copy(notebook)), copy)
    print(f"{target.name}: {len(notebook.cells)} cells, {time.perf_counter() - started:.0f} s")
    for number in cells_with_stderr(notebook):
        print(f"{target.name}, cell {number}: writes to stderr, which JupyterLab shows in red: is it meant?")


def cells_with_stderr(notebook: NotebookNode) -> list[int]:
    return [
        number
        for number, cell in enumerate(notebook.cells, start=1)
        if any(output.get("name") == "stderr" for output in cell.get("outputs", []))
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
