"""The learner's copies. Lessons and exercises are copied to my_work/, run and changed there, and never lost.

The course's own files stay as they are, so an update of the course never meets a learner's changes. What happens to
a copy when the course is updated depends on the *text of its cells*, because JupyterLab rewrites everything else
(outputs, counts, the name of the kernel) when it merely opens and saves a notebook:

    copy        course       what happens
    missing     any          it is made
    untouched   changed      it is replaced
    changed     as before    it stays
    changed     changed      it stays, and the new one is put beside it: lesson.new.ipynb
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1]
MY_WORK = COURSE / "my_work"
FOLDERS = ("notebooks", "exercises")  # they keep their names in my_work/, so links between them work there too
NOT_COPIED = {"sources", "__pycache__"}
RECORD = ".copies.json"  # {path of a copy: [hash of what was copied, hash of the newest one the learner was given]}


@dataclass
class Changes:
    """What `update_copies` did; paths are relative to my_work/."""

    new: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)  # the learner's copy: the new one beside it

    def describe(self) -> str:
        """What the learner is told: nothing if nothing changed."""
        lines = []
        if self.new:
            lines.append(f"{len(self.new)} new in my_work/: {', '.join(self.new[:3])}{' ...' * (len(self.new) > 3)}")
        if self.refreshed:
            lines.append(f"brought up to date, you had not changed them: {', '.join(self.refreshed)}")
        for mine, new in self.beside.items():
            lines.append(f"changed by you and by the course: {mine} stays as it is, the course's is beside it: {new}")
        return "\n".join(lines)


def text_hash(path: Path) -> str:
    """A hash of what a person wrote: of a notebook's cells the kind and the text, of any other file the bytes."""
    content = path.read_bytes()
    if path.suffix == ".ipynb":
        try:
            cells = json.loads(content)["cells"]
            content = json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells]).encode()
        except (ValueError, KeyError, TypeError):
            pass  # not a notebook (any more): it is compared by its bytes
    return hashlib.sha256(content).hexdigest()


def course_files(course: Path) -> list[str]:
    """The files that a learner gets, relative to the course's folder."""
    files = []
    for folder in FOLDERS:
        for path in sorted((course / folder).rglob("*")):
            name = path.relative_to(course)
            hidden = any(part.startswith(".") or part in NOT_COPIED for part in name.parts)
            if path.is_file() and not hidden:
                files.append(name.as_posix())
    return files


def update_copies(course: Path = COURSE, my_work: Path = MY_WORK) -> Changes:
    """Bring my_work/ up to date without ever overwriting what the learner changed."""
    record = read_record(my_work)
    changes = Changes()
    try:
        for name in course_files(course):
            update_copy(name, course, my_work, record, changes)
    finally:  # what was copied before an error is remembered
        write_record(my_work, record)
    return changes


def update_copy(name: str, course: Path, my_work: Path, record: dict[str, list[str]], changes: Changes) -> None:
    """The table at the top of this file, for one file."""
    source, mine = course / name, my_work / name
    theirs = text_hash(source)
    copied, given = record.get(name, ["", ""])
    now = text_hash(mine) if mine.exists() else ""
    if now and now not in (copied, theirs):  # changed by the learner
        if theirs != given:
            new = name_beside(name, my_work, record)
            copy(source, my_work / new)
            changes.beside[name] = new
            record[new] = [theirs, theirs]
            record[name] = [copied, theirs]
        return
    if now != theirs:
        copy(source, mine)
        (changes.refreshed if now else changes.new).append(name)
    record[name] = [theirs, theirs]


def name_beside(name: str, my_work: Path, record: dict[str, list[str]]) -> str:
    """lesson.new.ipynb, or the next number if the learner has changed that one as well."""
    path = Path(name)
    number = 1
    while True:
        new = path.with_name(f"{path.stem}.new{number if number > 1 else ''}{path.suffix}").as_posix()
        if not (my_work / new).exists() or text_hash(my_work / new) == record.get(new, [""])[0]:
            return new
        number += 1


def copy(source: Path, target: Path) -> None:
    """Copy a file in one step: whoever looks sees the old one or the new one, never half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def read_record(my_work: Path) -> dict[str, list[str]]:
    """What was copied when. Without a record every copy counts as changed by the learner, so none is overwritten."""
    try:
        record = json.loads((my_work / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(my_work: Path, record: dict[str, list[str]]) -> None:
    text = json.dumps(record, indent=1, sort_keys=True)
    path = my_work / RECORD
    if not path.exists() or path.read_text("utf-8") != text:
        write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file in one step, its folder too if it is missing: after a crash the old one is there, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


# --- JupyterLab ------------------------------------------------------------------------------------------------------


def trust(notebooks: list[Path]) -> None:
    """Sign notebooks as `jupyter trust` does: JupyterLab then shows their stored outputs as the lesson meant them."""
    if notebooks:
        import nbformat
        from nbformat.sign import NotebookNotary

        notary = NotebookNotary()
        for path in notebooks:
            notary.sign(nbformat.read(path, as_version=4))


def quieten(prefix: Path) -> None:
    """In this environment: no pop-up about news in JupyterLab, no warning of each kernel about its local connection."""
    news = "@jupyterlab/apputils-extension:notification"
    overrides = prefix / "share/jupyter/lab/settings/overrides.json"
    settings = json.loads(overrides.read_text("utf-8")) if overrides.exists() else {}
    settings[news] = settings.get(news, {}) | {"fetchNews": "false", "checkForUpdates": False}
    write_if_new(overrides, json.dumps(settings, indent=1) + "\n")
    write_if_new(prefix / "etc/ipython/ipython_kernel_config.py", "c = get_config()\nc.IPKernelApp.log_level = 40\n")


def write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text("utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def lab_arguments(my_work: Path, first_time: bool, options: list[str]) -> list[str]:
    """JupyterLab's arguments. (A file given as an argument would make that file's folder the root.)"""
    arguments = [f"--ServerApp.root_dir={my_work}"]
    lessons = sorted((my_work / "notebooks").glob("*.ipynb"))
    if first_time and lessons:
        arguments.append(f"--LabApp.default_url=/lab/tree/notebooks/{lessons[0].name}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")  # as in most containers; JupyterLab would refuse to start
    return arguments + options


def main(options: list[str]) -> None:
    """Update the copies and open JupyterLab on them; `options` are JupyterLab's, `--no-browser` for example."""
    first_time = not (MY_WORK / RECORD).exists()
    try:
        changes = update_copies()
    except OSError as error:
        sys.exit(f"my_work/ could not be brought up to date, nothing in it is lost: {error}")
    if said := changes.describe():
        print(said, flush=True)
    if sys.prefix != sys.base_prefix:
        quieten(Path(sys.prefix))
    changed = [*changes.new, *changes.refreshed, *changes.beside.values()]
    trust([MY_WORK / name for name in changed if name.endswith(".ipynb")])

    from jupyterlab.labapp import main as jupyterlab

    jupyterlab(lab_arguments(MY_WORK, first_time, options))


if __name__ == "__main__":
    main(sys.argv[1:])
