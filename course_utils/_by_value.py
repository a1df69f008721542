"""Functions and arguments as bytes for another process: functions defined in a notebook's cells go by value.

cloudpickle does the work. Two things are added: code keeps the name of its file, and the lines of that file go along,
so that a traceback in the other process shows the line of the cell.
"""

import io
import linecache
import marshal
import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, NamedTuple

import cloudpickle


class Parcel(NamedTuple):
    data: bytes
    sources: dict[str, list[str]]  # file name -> lines, for the code that is inside


class Pickler(cloudpickle.Pickler):
    """cloudpickle names every file `<dynamic-code>`; `marshal` keeps a code object as it is."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.file_names: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            self.file_names.add(obj.co_filename)
            return marshal.loads, (marshal.dumps(obj),)
        return super().reducer_override(obj)


def pack(fn: Callable, args: tuple) -> Parcel:
    """fn and its arguments as bytes. Raises TypeError that names the argument which cannot be sent, and the remedy."""
    file = io.BytesIO()
    pickler = Pickler(file)
    try:
        pickler.dump((fn, args))
    except Exception as error:
        raise TypeError(explain(fn, args, error)) from error
    return Parcel(file.getvalue(), {name: linecache.getlines(name) for name in pickler.file_names})


def explain(fn: Callable, args: tuple, error: Exception) -> str:
    remedy = "Each stage is a process of its own, so values travel as bytes: make such a value inside the function."
    for position, value in enumerate(args):
        if not can_be_sent(value):
            what = f"argument {position} of {name_of(fn)}, {shorten(value)},"
            break
    else:
        what = f"{name_of(fn)} uses a value from outside that"
    return f"{what} cannot be sent to another process: {error}. {remedy}"


def can_be_sent(value: Any) -> bool:
    try:
        Pickler(io.BytesIO()).dump(value)
    except Exception:
        return False
    return True


def name_of(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or shorten(fn)


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def show_sources(sources: dict[str, list[str]]) -> None:
    """Let tracebacks of this process find lines of files that it cannot read, such as notebook cells."""
    for name, lines in sources.items():
        if lines:
            linecache.cache[name] = (sum(map(len, lines)), None, lines, name)


def cell_names(file_names: Iterable[str]) -> dict[str, str]:
    """For files that are cells of the notebook that is running: {"/tmp/ipykernel_12/345.py": "Cell In[3]"}."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return {}
    named = {name: shell.compile.format_code_name(name) for name in file_names}
    return {name: " ".join(label) for name, label in named.items() if label}
