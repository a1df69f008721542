"""Every bug of the museum is caught by the guard that it names, and by no other; see tests/museum/README.md."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.museum import guarding, museum
from tests.museum.museum import Exhibit

EXHIBITS = museum.exhibits()
UNCHANGED = "the engine as it is"
IT_HUNG = 2 * guarding.LIMIT  # seconds for one line of the guards' process
GUARDS = [
    node.name
    for node in ast.parse((museum.COURSE / "tests/test_guards.py").read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


class Guards:
    """The guards at work on copies of the engine, one after another; results come while the tests ask for them."""

    def __init__(self, home: Path, wanted: list[str], chosen: Mapping[str, set[str]]):
        """In each copy that is wanted: all guards, or those that are chosen for it."""
        self.home, self.results, self.misfits = home, dict[str, dict[str, Any]](), dict[str, ValueError]()
        for name in wanted:
            museum.copy_engine(home / name)
        for exhibit in EXHIBITS:
            if exhibit.id in wanted:
                try:
                    museum.apply(exhibit, home / exhibit.id)
                except ValueError as error:
                    self.misfits[exhibit.id] = error
        self.process = subprocess.Popen(
            [sys.executable, guarding.__file__],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            for name in wanted:
                if name not in self.misfits:
                    pipe.write(json.dumps({"folder": str(home / name), "chosen": sorted(chosen.get(name, ()))}) + "\n")

    def of(self, name: str) -> dict[str, Any]:
        """What came out for one copy; waits for it. Raises ValueError if the bug could not be put into it."""
        if name in self.misfits:
            raise self.misfits[name]
        assert self.process.stdout is not None
        while name not in self.results:
            line = self.process.stdout.readline()
            assert line, f"the guards' process has ended, with status {self.process.wait(IT_HUNG)}, before {name}"
            if line.startswith("{"):
                result = json.loads(line)
                self.results[Path(result["folder"]).name] = result
        return self.results[name]

    def end(self) -> None:
        """Also what it has forked and nobody wants any more."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            self.process.wait(IT_HUNG)


@pytest.fixture(scope="module")
def guards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guards]:
    """At work on what the chosen tests need, in their order."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork, without which every exhibit would take seconds to start")
    mine = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {item.callspec.params["exhibit"].id: item.callspec.params["exhibit"] for item in mine}
    all_guards = {item.callspec.params["exhibit"].id for item in mine if item.get_closest_marker("weekly")}
    chosen = {name: exhibit.caught for name, exhibit in wanted.items() if name not in all_guards}
    running = Guards(tmp_path_factory.mktemp("museum"), [UNCHANGED, *wanted], chosen)
    yield running
    running.end()


@pytest.mark.slow
def test_the_unchanged_copy_passes_all_exhibit_guards(guards):
    result = guards.of(UNCHANGED)
    assert (result["guards"], result["ran"]) == ({}, len(GUARDS))
    assert Path(result["of"]).is_relative_to(guards.home)  # of the copy, not of this folder


@pytest.mark.slow
@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.id)
def test_an_exhibit_is_caught(guards, exhibit: Exhibit):
    result = guards.of(exhibit.id)
    assert result["guards"] is not None, f"the guards were killed or died after {result['seconds']:.0f} s"
    told = {guard: f"{kind}: {message}" for guard, (kind, message) in result["guards"].items()}
    assert set(told) == exhibit.caught, told
    kind, message = result["guards"][exhibit.caught_by]
    assert kind == exhibit.raises and exhibit.figure in message, f"{kind}: {message}"
    assert all(result["guards"][guard][0] == "AssertionError" for guard in exhibit.also), told


@pytest.mark.weekly
@pytest.mark.slow
@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.id)
def test_no_other_guard_catches_an_exhibit(guards, exhibit: Exhibit):
    result = guards.of(exhibit.id)
    assert (set(result["guards"]), result["ran"]) == (exhibit.caught, len(GUARDS))


ONE_STEP = """
import time

from course_utils.processes import StageError, launch
from tests.test_guards import Pipeline, alike, cut_at, gpipe, stage_of


def step(worker):
    cut, micro_batches = cut_at(3), alike(2)
    time.sleep(worker.rank)  # a send whose receive is posted already may go out before it is dropped
    pipeline = Pipeline({worker.rank: stage_of(cut, worker.rank)}, gpipe(2, 2), worker.transport, cut.carry_after)
    return pipeline.step(micro_batches, pipeline.plan(micro_batches), 20)


try:
    launch(step, 2, wait_limit=3)
    print("delivered")
except StageError as error:
    print(error.kind, error)
"""


@pytest.mark.processes
@pytest.mark.slow
def test_gloo_does_not_deliver_what_nobody_keeps(tmp_path):
    """In threads a guard counts the sends that were dropped. What becomes of them only real processes show."""
    museum.copy_engine(tmp_path)
    museum.apply(next(exhibit for exhibit in EXHIBITS if exhibit.id == "work-dropped"), tmp_path)
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-B", "one_step.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    told = done.stdout + done.stderr
    assert told.startswith("timeout ") and "the activations of micro-batch 0" in told, told


# --- The collection ---------------------------------------------------------------------------------------------------


def test_the_table_is_up_to_date():
    written = (museum.HERE / "README.md").read_text("utf-8")
    assert written == museum.table(), "run `python -m tests.museum.museum`"


def test_an_exhibit_is_small_and_fits_the_engine(tmp_path):
    assert len(EXHIBITS) >= 30
    assert len({exhibit.id for exhibit in EXHIBITS}) == len(EXHIBITS)
    museum.copy_engine(tmp_path)
    for exhibit in EXHIBITS:
        assert 1 <= exhibit.num_lines <= 5, f"{exhibit.id} changes {exhibit.num_lines} lines"
        texts = {edit.file: (museum.COURSE / "course_utils" / edit.file).read_text("utf-8") for edit in exhibit.edit}
        museum.apply(exhibit, tmp_path)
        for file, text in texts.items():
            path = tmp_path / "course_utils" / file
            changed = path.read_text("utf-8")
            ast.parse(changed)
            assert changed != text
            path.write_text(text, "utf-8")


def test_every_guard_catches_an_exhibit():
    """A guard that never failed proves nothing."""
    needed = {exhibit.caught_by for exhibit in EXHIBITS}
    assert needed == set(GUARDS)


def test_an_exhibit_that_does_not_fit_any_more_says_so(tmp_path):
    museum.copy_engine(tmp_path)
    museum.apply(EXHIBITS[0], tmp_path)
    with pytest.raises(ValueError, match=rf"{EXHIBITS[0].id}: this stands 0 times in {EXHIBITS[0].edit[0].file}"):
        museum.apply(EXHIBITS[0], tmp_path)
