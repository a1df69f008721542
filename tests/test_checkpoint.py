"""Checkpoints: the disk holds the old one or the new one, whatever happens; and a resumed run is the same run."""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import sleep
from typing import Any

import cloudpickle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from course_utils import checkpoint
from course_utils.checkpoint import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    Manifest,
    RankState,
    SaveReport,
    StageFile,
    collect,
    compare_config,
    load,
    restore,
)
from course_utils.fingerprints import LOSSES, StageRecord, fingerprint
from course_utils.pipeline import Pipeline
from course_utils.processes import StageError, launch
from course_utils.recipes import TrainingConfig
from course_utils.schedules import Schedule, gpipe, looped, one_f_one_b
from course_utils.threads import run_in_threads
from course_utils.training import TrainingResult, train
from course_utils.training_state import Step
from course_utils.transports import TransferError, Worker
from tests.models import TINY_RUN

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers need not import this file, and pytest with it

ROOT = Path(__file__).parents[1]
NAMES = [f"{index:02d}.block_{index}.weight" for index in range(6)]
CONFIG = {"stages": 2, "seed": 0, "model": {"heads": 2}}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing is really forced to the disk, which takes milliseconds; the power cuts below see what is asked for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- A model without a model: parameters whose values are known ------------------------------------------------------


def parameter_state(name: str, step: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(1000 * NAMES.index(name) + step)
    tensors = {key: torch.randn(2, 3, generator=numbers) for key in ("value", "exp_avg", "exp_avg_sq")}
    return tensors | {"step": torch.tensor(float(step))}


def digests(step: int) -> dict[str, str]:
    return {name: f"{step:02x}" * 32 for name in (*NAMES, LOSSES)}


def rank_state(step: int, rank: int, world_size: int, num_stages: int) -> RankState:
    """Stage s is on rank s modulo the number of ranks; the losses are recorded where the last stage is."""
    parts = [
        NAMES[stage * len(NAMES) // num_stages : (stage + 1) * len(NAMES) // num_stages] for stage in range(num_stages)
    ]
    own = range(rank, num_stages, world_size)
    recorded = [name for stage in own for name in parts[stage]] + [LOSSES] * (num_stages - 1 in own)
    return RankState(
        step=step,
        stages={stage: {name: parameter_state(name, step) for name in parts[stage]} for stage in own},
        record={name: digests(step)[name] for name in recorded},
        shared={"noam": {"last_epoch": step}},
        config=CONFIG,
    )


def save(folder: Path, step: int, ranks: int = 2, stages: int | None = None, **options: Any) -> list[SaveReport]:
    """Raises CheckpointError only if all ranks did, and with the same words."""

    def of_rank(worker: Worker) -> SaveReport | str:
        state = rank_state(step, worker.rank, ranks, ranks if stages is None else stages)
        try:
            return Checkpoints(folder, **options).save(worker.transport, state)
        except CheckpointError as error:
            return str(error)

    outcomes = run_in_threads(of_rank, ranks)
    assert len(set(outcomes)) == 1, outcomes
    if isinstance(outcomes[0], str):
        raise CheckpointError(outcomes[0])
    return outcomes


def wanted(names: list[str] = NAMES) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 3) for name in names}


def is_whole(manifest: Manifest) -> bool:
    """Whether a checkpoint has in it what was saved at its step."""
    found = load(manifest, wanted())
    expected = {name: parameter_state(name, manifest.step) for name in NAMES}
    return (
        all(torch.equal(found[name][key], tensor) for name in NAMES for key, tensor in expected[name].items())
        and all(found[name].keys() == expected[name].keys() for name in NAMES)
        and manifest.record == digests(manifest.step)
        and manifest.shared == {"noam": {"last_epoch": manifest.step}}
        and manifest.config == CONFIG
    )


def latest(folder: Path) -> int | None:
    """The step of the newest checkpoint, whose content is checked."""
    manifest = Checkpoints(folder).latest()
    assert manifest is None or is_whole(manifest)
    return None if manifest is None else manifest.step


def latest_of_good_ones(folder: Path) -> int | None:
    """The same where every checkpoint must be whole, also one that is being removed."""
    with_manifest = [path for path in Checkpoints(folder).folders() if (path / MANIFEST).exists()]
    assert all(is_whole(checkpoint.read_manifest(path)) for path in with_manifest)
    return checkpoint.step_of(with_manifest[-1]) if with_manifest else None


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir())


# --- Save and load ---------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path):
    assert Checkpoints(tmp_path / "new").latest() is None
    reports = save(tmp_path / "new" / "one", 7, ranks=3)
    files = list((tmp_path / "new/one/step_00000007").glob("stage_*.pt"))
    assert reports[0] == SaveReport(7, True, "", sum(path.stat().st_size for path in files)) and len(files) == 3
    assert latest(tmp_path / "new" / "one") == 7


@given(
    ranks=st.integers(1, 4),
    num_stages=st.integers(1, 6),
    names=st.lists(st.sampled_from(NAMES), unique=True),
)
def test_any_rank_finds_its_parameters_whoever_wrote_them(tmp_path_factory, ranks, num_stages, names):
    """Also with fewer stages than ranks, and more."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, 3, ranks, num_stages)
    manifest = Checkpoints(folder).latest()
    assert manifest is not None and len(manifest.stages) == num_stages and is_whole(manifest)
    found = load(manifest, wanted(names))
    assert set(found) == set(names)
    assert manifest.record_of([*names, "unknown"]) == {name: digests(3)[name] for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_of_a_tensor_returns(tmp_path, dtype):
    """Not-a-numbers with a message in them, the negative zero, parts of larger memory, tensors without elements."""
    bits = torch.frombuffer(bytearray(random.Random(0).randbytes(64 * dtype.itemsize)), dtype=dtype)
    tensors = {"a": bits, "b": bits.view(8, 8)[::2, 1::3], "c": bits[:0], "d": torch.tensor(-0.0, dtype=dtype)}
    tensors["e"] = torch.zeros(10_000, dtype=dtype)[:1]
    state = RankState(0, {0: {name: {"value": tensor} for name, tensor in tensors.items()}})
    run_in_threads(lambda worker: Checkpoints(tmp_path).save(worker.transport, state), 1)
    found = load(Checkpoints(tmp_path).latest(), tensors)
    for name, tensor in tensors.items():
        value = found[name]["value"]
        assert value.shape == tensor.shape
        assert value.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    assert (tmp_path / "step_00000000/stage_0.pt").stat().st_size < 5000


def test_whatever_fits_into_json_can_be_shared(tmp_path):
    """Keys become strings and tuples lists, and that must not look like damage."""
    shared = {"x": {2: 1, 10: 0.1}, "y": (1, "é"), "z": [float("inf"), float("nan"), 1e-300, True, None]}
    state = RankState(0, {0: {}}, shared=shared, config={"max_norm": float("inf")})
    run_in_threads(lambda worker: Checkpoints(tmp_path).save(worker.transport, state), 1)
    manifest = Checkpoints(tmp_path).latest()
    assert manifest.shared["x"] == {"2": 1, "10": 0.1} and manifest.shared["y"] == [1, "é"]
    assert repr(manifest.shared["z"]) == "[inf, nan, 1e-300, True, None]"
    compare_config(manifest.config, state.config)


def test_two_are_kept_and_nobody_else_may_look_in(tmp_path):
    folder = tmp_path / "checkpoints"
    old = os.umask(0)
    try:
        for step in (1, 2, 3, 10):
            save(folder, step)
    finally:
        os.umask(old)
    assert steps(folder) == [3, 10] and latest(folder) == 10
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())] == [0o700] * 3
    json.loads((folder / "step_00000010/manifest.json").read_text())
    save(folder, 11, keep=1)
    assert steps(folder) == [11]


def test_a_good_checkpoint_is_never_overwritten(tmp_path):
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(CheckpointError, match=r"step_00000001.*is a checkpoint already"):
        save(tmp_path, 1, ranks=3)
    (report, _, _) = save(tmp_path, 1, ranks=3, on_failure="continue")
    assert not report.saved and "already" in report.problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_what_is_not_ours_or_not_older_stays(tmp_path):
    """Damaged checkpoints, files of others, links, and checkpoints of later steps."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "checkpoints"
    save(elsewhere, 0)
    for step in (1, 2, 3, 50):
        save(folder, step, keep=9)
    (folder / "step_00000002" / MANIFEST).write_text("{}")
    (folder / "step_00000000").symlink_to(elsewhere / "step_00000000")
    (folder / "step_1").mkdir()
    (folder / "step_00000001" / "notes.txt").write_text("mine")
    (report, _) = save(folder, 4, keep=1)
    assert report.saved and "tidied up: Directory not empty" in report.problem
    assert [path.name for path in (folder / "step_00000001").iterdir()] == ["notes.txt"]
    shutil.rmtree(folder / "step_00000001")
    (report, _) = save(folder, 5, keep=1)
    assert report.problem == ""
    assert steps(folder) == [0, 1, 2, 5, 50] and (folder / "step_1").exists()
    assert latest(elsewhere) == 0 and latest(folder) == 50


@pytest.mark.parametrize("options", [{"keep": 0}, {"on_failure": "shrug"}])
def test_settings_that_make_no_sense(tmp_path, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is .*must"):
        Checkpoints(tmp_path, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: replace(state, step=state.step + 1), r"done \[5, 6\] steps"),
        (lambda state: replace(state, shared={}), "shared"),
        (lambda state: replace(state, config={}), "config"),
        (lambda state: replace(state, stages={0: {}}), r"stages \[0, 0\]"),
        (lambda state: replace(state, stages={2: {}}), r"stages \[0, 2\]"),
    ],
)
def test_ranks_that_are_not_in_the_same_state_do_not_save(tmp_path, change, named):
    errors = []

    def of_rank(worker: Worker) -> None:
        state = rank_state(5, worker.rank, 2, 2)
        try:
            Checkpoints(tmp_path, on_failure="continue").save(worker.transport, change(state) if worker.rank else state)
        except CheckpointError as error:
            errors.append(str(error))

    run_in_threads(of_rank, 2)
    assert len(errors) == 2 and errors[0] == errors[1]
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(errors[0])
    assert latest(tmp_path) is None


def test_ranks_that_do_not_see_the_same_folder_do_not_save(tmp_path):
    """As on two machines whose folder of that name is not shared."""

    def of_rank(worker: Worker) -> SaveReport:
        checkpoints = Checkpoints(tmp_path / f"machine_{worker.rank}", on_failure="continue")
        return checkpoints.save(worker.transport, rank_state(1, worker.rank, 3, 3))

    reports = run_in_threads(of_rank, 3)
    words = "lacks stage_1.pt, stage_2.pt as rank 0 sees it: all ranks must see the same folder"
    assert all(words in report.problem for report in reports)
    assert not list(tmp_path.rglob(MANIFEST))


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(tmp_path):
    save(tmp_path, 1)

    def of_rank(worker: Worker) -> None:
        if worker.rank == 0:
            Checkpoints(tmp_path).save(worker.transport, rank_state(2, 0, 2, 2))
        else:
            sleep(0.3)

    with pytest.raises(TransferError, match="0 waits for word of its part of the checkpoint from .* 1"):
        run_in_threads(of_rank, 2, limit=0.1)
    assert latest(tmp_path) == 1
    save(tmp_path, 2)
    assert latest(tmp_path) == 2


# --- Whatever kills it -----------------------------------------------------------------------------------------------


class WatchedFile:
    """A file whose writes come in two pieces, each of them an operation."""

    def __init__(self, file: io.BufferedWriter, operation: Callable):
        self.file, self.operation = file, operation

    def write(self, data: bytes) -> None:
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.operation("write", self.write_now, self.file, piece)

    @staticmethod
    def write_now(file: io.BufferedWriter, data: bytes) -> None:
        file.write(data)
        file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


OPERATIONS = ("open", "fsync", "replace", "mkdir", "unlink", "rmdir")


def watch(operation: Callable, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on operation(name, function, *arguments) is called for all that a save does to the disk."""
    real_open = open

    def watched_open(path: Path, mode: str) -> WatchedFile:
        return WatchedFile(operation("create", real_open, path, mode), operation)

    for name in OPERATIONS:
        patch(os, name, partial(operation, name, getattr(os, name)))
    patch(checkpoint, "open", watched_open)


def nursery(folder: str) -> None:
    """Run in a process of its own: for n = 0, 1, ... fork a child that kills itself before the n-th operation.

    In <folder>/<case>/prepared is what each child begins with, and in .../<n> what it leaves. Prints for each case the
    operations of a save that is not killed, and what the interpreter has heard of it.
    """
    told = {}
    for case in KILLED:
        for number in itertools.count(-1):
            copy = Path(folder) / case / str(number)
            shutil.copytree(copy.parent / "prepared", copy)
            child = os.fork()
            if child == 0:
                save_and_die(copy, KILLED[case][1], number)
            _, status = os.waitpid(child, 0)
            if number == -1:
                told[case] = json.loads((copy / "told.json").read_text())
            alive = number in (-1, len(told[case][0]))
            assert (status == 0) == alive, f"{case}, {number}: status {status}"
            if number >= 0 and alive:
                break
    print(json.dumps(told))


def save_and_die(folder: Path, ranks: int, fatal: int) -> None:
    numbers, lock = itertools.count(), threading.Lock()
    operations: list[str] = []
    heard: list[str] = []
    os.fsync = lambda descriptor: None

    def operation(name: str, function: Callable, *arguments: Any, **more: Any) -> Any:
        with lock:
            if next(numbers) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            operations.append(name)
            return function(*arguments, **more)

    def listen(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            heard.append("create")
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            heard.append(event.removeprefix("os.").replace("rename", "replace").replace("remove", "unlink"))

    watch(operation)
    if fatal == -1:
        sys.addaudithook(listen)
    save(folder, 3, ranks, stages=3)
    if fatal == -1:
        told = json.dumps([operations, heard])
        (folder / "told.json").write_text(told)
    os._exit(0)


KILLED = {"the first": ([], 3), "the third": ([1, 2], 3), "the third, of one rank": ([1, 2], 1)}  # older steps, ranks


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_before_any_operation_on_files_leaves_the_last_good_one(tmp_path):
    """Step 3 is saved; step 1 is then too old. All that a save does to the disk is among the operations."""
    for case, (older, _) in KILLED.items():
        (tmp_path / case / "prepared").mkdir(parents=True)
        for step in older:
            save(tmp_path / case / "prepared", step)
    code = "import sys; from tests.test_checkpoint import nursery; nursery(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for case, (operations, heard) in json.loads(done.stdout).items():
        older, ranks = KILLED[case]
        assert sorted(heard) == sorted(name for name in operations if name not in ("open", "fsync", "write"))
        assert operations.count("create") == 4 and operations.count("rmdir") == (1 if older else 0)
        seen, half = [], set()
        for number in range(len(operations) + 1):
            folder = tmp_path / case / str(number)
            seen.append(latest_of_good_ones(folder))
            if seen[-1] == 3:
                save(folder, 4, ranks=2)  # the run goes on
                assert latest(folder) == 4 and steps(folder) == [3, 4]
            else:
                half.add(len(list(folder.glob("step_00000003/stage_?.pt"))))
                save(folder, 3, ranks=2)  # and now with fewer stages
                assert latest(folder) == 3 and steps(folder) == [*older[1:], 3]
        assert set(seen) == {2 if older else None, 3} and seen[-1] == 3
        assert half == {0, 1, 2, 3} if ranks == 1 else half >= {0, 3}  # it was killed between any two files


class Disk:
    """What a power cut may leave: names and content that were not forced to the disk are there or not, as it comes."""

    def __init__(self, folder: Path):
        self.folder, self.lock, self.paths = folder, threading.Lock(), {}
        self.trace: list[tuple] = []

    def operation(self, name: str, function: Callable, *arguments: Any, **more: Any) -> Any:
        with self.lock:
            result = function(*arguments, **more)
            if name in ("open", "create"):
                self.paths[result if name == "open" else result.fileno()] = str(arguments[0])
            if name == "fsync":
                arguments = (self.paths[arguments[0]],)
            if name == "write":
                arguments = (arguments[0].name, arguments[1])
            self.trace.append((name, *(str(a) if isinstance(a, Path) else a for a in arguments)))
        return result

    def after_power_cut(self, moment: int, luck: random.Random, target: Path) -> None:
        """Make the folder as it may be when the power goes after so many operations."""
        shutil.copytree(self.folder, target)
        content: dict[str, bytes] = {}  # of files by the name under which they were made
        safe: dict[str, int] = {}  # how many of those bytes are on the disk
        pending: list[tuple] = []

        def apply(change: tuple) -> None:
            name, *paths = change
            place = [target / Path(path).relative_to(self.folder.parent / "running") for path in paths]
            with contextlib.suppress(FileNotFoundError, FileExistsError, OSError):
                if name == "mkdir":
                    place[0].mkdir()
                elif name == "replace":
                    length = luck.randint(safe.get(paths[0], 0), len(content[paths[0]]))
                    place[1].write_bytes(content[paths[0]][:length])
                elif name == "unlink":
                    place[0].unlink()
                elif name == "rmdir":
                    place[0].rmdir()

        for name, *arguments in self.trace[:moment]:
            path = str(arguments[0])
            if name == "create":
                content[path] = b""
            elif name == "write":
                content[path] += arguments[1]
            elif name == "fsync" and path in content:
                safe[path] = len(content[path])
            elif name == "fsync":
                for change in [change for change in pending if str(Path(change[-1]).parent) == path]:
                    apply(change)
                    pending.remove(change)
            elif name in ("mkdir", "replace", "unlink", "rmdir"):
                pending.append((name, *arguments[: 2 if name == "replace" else 1]))
        for change in pending:
            if luck.random() < 0.5:
                apply(change)


def test_a_power_cut_at_any_moment_leaves_the_last_good_one(tmp_path, monkeypatch):
    """Unlike a kill it also takes what was written but not forced to the disk."""
    prepared, running = tmp_path / "prepared", tmp_path / "running"
    for step in (1, 2):
        save(prepared, step)
    shutil.copytree(prepared, running)
    disk = Disk(prepared)
    with monkeypatch.context() as patch:
        watch(disk.operation, lambda where, name, value: patch.setattr(where, name, value, raising=False))
        save(running, 3, keep=1)
    luck, seen = random.Random(0), []
    for moment in range(len(disk.trace) + 1):
        for number in range(6):
            target = tmp_path / f"{moment}.{number}"
            disk.after_power_cut(moment, luck, target)
            seen.append((moment, latest_of_good_ones(target)))
            assert seen[-1][1] in (2, 3), disk.trace[:moment]
            shutil.rmtree(target)
    assert {step for moment, step in seen if moment == len(disk.trace)} == {3}  # save() had returned
    assert len({moment for moment, step in seen if step == 2}) > 10 and (0, 2) in seen


def save_in_processes(worker: Worker, folder: Path, step: int, fatal: bool) -> SaveReport:
    if fatal and worker.rank == 1:
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    return Checkpoints(folder).save(worker.transport, rank_state(step, worker.rank, worker.world_size, 3))


@pytest.mark.processes
def test_a_process_that_is_killed_while_it_saves(tmp_path):
    launch(save_in_processes, 3, tmp_path, 1, False)
    with pytest.raises(StageError, match="stage 1 failed") as caught:
        launch(save_in_processes, 3, tmp_path, 2, True)
    assert caught.value.kind == "died"
    assert (tmp_path / "step_00000002/stage_1.pt.part").exists() and latest(tmp_path) == 1
    launch(save_in_processes, 2, tmp_path, 2, False)
    assert latest(tmp_path) == 2
    launch(save_in_processes, 2, tmp_path, 3, False)
    assert steps(tmp_path) == [2, 3]


# --- A disk that is full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_failure", "keep"), [("continue", 2), ("stop", 1)])
def test_an_error_of_any_operation_is_known_on_all_ranks_and_the_old_one_is_whole(
    tmp_path, monkeypatch, on_failure, keep
):
    prepared = tmp_path / "prepared"
    for step in (1, 2):
        save(prepared, step)
    outcomes = []
    for fatal in itertools.count():
        folder = tmp_path / str(fatal)
        shutil.copytree(prepared, folder)
        numbers, lock, failed = itertools.count(), threading.Lock(), []

        def operation(
            name: str,
            function: Callable,
            *arguments: Any,
            fatal=fatal,
            numbers=numbers,
            lock=lock,
            failed=failed,
            **more,
        ) -> Any:
            with lock:
                if next(numbers) == fatal:
                    failed.append(name)
                    raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **more)

        reports: list[Any] = []
        with monkeypatch.context() as patch:
            watch(operation, lambda where, name, value: patch.setattr(where, name, value, raising=False))
            try:
                reports = save(folder, 3, on_failure=on_failure, keep=keep)
            except CheckpointError as error:
                assert on_failure == "stop" and "No space left on device" in str(error)
                assert "step 3" in str(error) and "before it are whole" in str(error)
            outcome = latest(folder)
        assert outcome in (2, 3)
        if keep == 2 or not reports:
            assert is_whole(checkpoint.read_manifest(folder / "step_00000002"))
        if reports:
            assert reports[0].saved or on_failure == "continue"
            # That the folder cannot be made does not matter if another rank has made it.
            assert ("No space left on device" in reports[0].problem) == (failed not in ([], ["mkdir"]) or outcome == 2)
            assert not reports[0].saved or outcome == 3
        if outcome == 2:
            assert steps(folder) in ([1, 2], [2]), (fatal, failed)  # the half one was removed
            save(folder, 3)  # there is room again
        else:
            save(folder, 4)
        outcomes.append((*failed, outcome))
        if not failed:
            break
    for name in ("create", "write", "fsync", "replace"):
        assert (name, 2) in outcomes, name
    assert ("unlink", 3) in outcomes and ("rmdir", 3) in outcomes and outcomes[-1] == (3,)


def save_with_a_limit(worker: Worker, folder: Path) -> list[SaveReport]:
    import resource

    checkpoints = Checkpoints(folder, on_failure="continue")
    states = [rank_state(step, worker.rank, worker.world_size, 2) for step in (1, 2, 3)]
    reports = [checkpoints.save(worker.transport, states[0])]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if worker.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    reports.append(checkpoints.save(worker.transport, states[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return [*reports, checkpoints.save(worker.transport, states[2])]


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_the_system_does_not_let_grow(tmp_path):
    mine, other = launch(save_with_a_limit, 2, tmp_path)
    assert mine == other and [report.saved for report in mine] == [True, False, True]
    assert "step_00000002/stage_1.pt could not be written: File too large" in mine[1].problem
    assert steps(tmp_path) == [1, 3] and latest(tmp_path) == 3


# --- What is no checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Manifest:
    save(tmp_path, 1)
    save(tmp_path, 2)
    manifest = Checkpoints(tmp_path).latest()
    assert manifest is not None and is_whole(manifest)
    return manifest


def refused(manifest: Manifest, named: str, like: dict[str, Tensor] | None = None) -> None:
    """Resuming fails with a CheckpointError that says so, and changes no file."""
    folder = manifest.folder.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=named):
        load(Checkpoints(folder).latest(), wanted() if like is None else like)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def forge(manifest: Manifest, **changes: Any) -> None:
    """A manifest with whatever in it, and the right hash."""
    (manifest.folder / MANIFEST).write_bytes(replace(manifest, **changes).to_json())


def plant(manifest: Manifest, data: bytes) -> None:
    """Another file for stage 0, and a manifest that knows it."""
    (manifest.folder / "stage_0.pt").write_bytes(data)
    file = StageFile(len(data), checkpoint.sha256(data), manifest.stages[0].parameters)
    forge(manifest, stages=[file, *manifest.stages[1:]])


def as_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["stage_0.pt", "stage_1.pt", MANIFEST])
def test_one_flipped_bit_anywhere_is_found(saved, name):
    path, checkpoints = saved.folder / name, Checkpoints(saved.folder.parent)
    own = wanted(NAMES[:3] if name == "stage_0.pt" else NAMES[3:])
    with open(path, "r+b", buffering=0) as file:
        for place in range(path.stat().st_size):
            (byte,) = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(CheckpointError, match=name):
                load(checkpoints.latest() if name == MANIFEST else saved, own)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert latest(saved.folder.parent) == 2


@pytest.mark.parametrize("name", ["stage_0.pt", "stage_1.pt", MANIFEST])
def test_a_file_that_is_cut_short_or_goes_on_is_found(saved, name):
    path = saved.folder / name
    data = path.read_bytes()
    for end in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:end])
        refused(saved, f"{name} (was changed|is no manifest)")
    for more in (b"\n", b"\0", data):
        path.write_bytes(data + more)
        refused(saved, f"{name} (was changed|is no manifest)")
    path.unlink()
    if name != MANIFEST:
        refused(saved, rf"{name} is missing.*remove .*step_00000002 to resume from the checkpoint before it")
    else:  # then it is none
        assert latest(saved.folder.parent) == 1
    path.mkdir()
    refused(saved, f"{name} is missing")


def test_a_file_of_another_step_or_stage_is_found(saved):
    names = ["stage_0.pt", "stage_1.pt"]
    shutil.copy(saved.folder.parent / "step_00000001/stage_0.pt", saved.folder / "stage_0.pt")
    refused(saved, "stage_0.pt was changed")
    save(saved.folder.parent, 3)
    folder = saved.folder.parent / "step_00000003"
    contents = [(folder / name).read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        (folder / name).write_bytes(content)
    refused(saved, "stage_0.pt was changed")
    (folder / "stage_1.pt").write_bytes(contents[1])
    assert set(load(Checkpoints(folder.parent).latest(), wanted(NAMES[3:]))) == set(NAMES[3:])  # stage 0 is not read
    os.rename(saved.folder, saved.folder.parent / "step_00000009")
    refused(saved, "step_00000009/manifest.json was changed")


BAD_MANIFESTS = {
    "empty": b"",
    "no JSON": b"step: 2",
    "not text": b"\xff\xfe\xfd",
    "a list": b"[1, 2]",
    "a number": b"7",
    "nothing known": b"{}",
    "nested without end": b"[" * 100_000,
    "a number without end": b'{"format": ' + b"9" * 5000 + b"}",
    "format is a word": b'{"format": "one", "sha256": ""}',
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_a_manifest_that_is_none(saved, kind):
    (saved.folder / MANIFEST).write_bytes(BAD_MANIFESTS[kind])
    refused(saved, "manifest.json is no manifest of a checkpoint")


def test_a_manifest_of_a_newer_format(saved):
    content = json.loads((saved.folder / MANIFEST).read_text())
    (saved.folder / MANIFEST).write_text(json.dumps(content | {"format": 2, "planets": 9}))
    refused(saved, "has format 2, this program knows 1: resume with a newer one")


def test_a_manifest_cannot_lead_out_of_its_folder(saved):
    content = json.loads((saved.folder / MANIFEST).read_text())
    (saved.folder / "stage_0.pt").rename(saved.folder.parent / "evil.pt")
    for change in ({"file": "../evil.pt"}, {"folder": "/"}):
        changed = json.loads(json.dumps(content))
        changed["stages"][0] |= change
        (saved.folder / MANIFEST).write_text(json.dumps(changed))
        refused(saved, "manifest.json is no manifest.*unexpected keyword")
        (saved.folder / MANIFEST).write_text(json.dumps(content | change))
        refused(saved, "manifest.json (is no manifest|was changed)")


FOREIGN = {
    "no zip": b"some text",
    "nothing": b"",
    "a list": as_file([1, 2]),
    "weights alone": as_file({"00.block_0.weight": torch.zeros(2, 3)}),
    "other names": as_file({"a": {"value": torch.zeros(2, 3)}}),
    "numbers": as_file({name: {"value": 1.0} for name in NAMES[:3]}),
    "no value": as_file({name: {"exp_avg": torch.zeros(2, 3)} for name in NAMES[:3]}),
    "sparse": as_file({name: {"value": torch.zeros(2, 3).to_sparse()} for name in NAMES[:3]}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_not_ours(saved, kind):
    plant(saved, FOREIGN[kind])
    refused(saved, "stage_0.pt (holds more than tensors|is not the file of a stage)")


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["pickle", "zip", "zip among tensors", "old form of torch"])
def test_code_in_a_file_is_refused_and_not_run(saved, tmp_path, form):
    evil, tensors = Evil(tmp_path / "mark"), {name: parameter_state(name, 2) for name in NAMES[:3]}
    if form == "pickle":
        data = pickle.dumps(evil, 2)
    elif form == "zip":
        data = as_file(evil)
    elif form == "zip among tensors":
        data = as_file({name: {**state, "exp_avg": evil} for name, state in tensors.items()})
    else:
        buffer = io.BytesIO()
        torch.save(evil, buffer, _use_new_zipfile_serialization=False)
        data = buffer.getvalue()
    with contextlib.suppress(Exception):
        pickle.loads(data) if form == "pickle" else torch.load(io.BytesIO(data), weights_only=False)
    evil.mark.rmdir()  # it was there: the code works
    plant(saved, data)
    refused(saved, "stage_0.pt holds more than tensors, perhaps code: not read")
    assert not evil.mark.exists()


def test_another_model_is_refused_with_both_shapes(saved):
    refused(saved, "no_such.weight.* is nothing.*needs 2x3 float32", {"no_such.weight": torch.zeros(2, 3)})
    refused(saved, f"value of {NAMES[1]}.*is 2x3 float32; this model needs 3x2 float32", {NAMES[1]: torch.zeros(3, 2)})
    refused(saved, "needs 1x2x3 float32", {NAMES[1]: torch.zeros(1, 2, 3)})
    refused(saved, "is 2x3 float32; this model needs 2x3 bfloat16", {NAMES[1]: torch.zeros(2, 3).bfloat16()})
    state = {name: parameter_state(name, 2) for name in NAMES[:3]}
    plant(saved, as_file({**state, NAMES[2]: {**state[NAMES[2]], "exp_avg": torch.zeros(2)}}))
    refused(saved, f"exp_avg of {NAMES[2]}.*is 2 float32; this model needs 2x3 float32")
    plant(saved, as_file({**state, NAMES[2]: {**state[NAMES[2]], "step": torch.zeros(2, 3)}}))
    refused(saved, f"step of {NAMES[2]}.*needs a scalar float32")


def test_a_configuration_may_differ_where_it_changes_no_bit():
    saved = {"stages": 2, "seed": 0, "model": {"heads": 2, "d_model": 16}, "sizes": (1, 2), "gone": None}
    compare_config(json.loads(json.dumps(saved)), saved | {"stages": 3, "schedule": "1f1b", "steps": 9, "new": None})
    with pytest.raises(CheckpointError) as caught:
        compare_config(saved, saved | {"seed": 1, "model": {"heads": 4, "d_model": 16}, "precision": "bf16"})
    text = str(caught.value)
    assert "model.heads was 2 and is 4 now; seed was 0 and is 1 now; precision was None and is 'bf16' now" in text
    assert "only stages, schedule, rematerialisation, steps may change" in text
    with pytest.raises(CheckpointError, match="stages was 2 and is 3"):
        compare_config(saved, saved | {"stages": 3}, may_differ=["seed"])


# --- The optimizer ---------------------------------------------------------------------------------------------------


def small_model(seed: int) -> tuple[list[tuple[str, Tensor]], torch.optim.Adam]:
    numbers = torch.Generator().manual_seed(seed)
    named = [(name, torch.nn.Parameter(torch.randn(2, 3, generator=numbers))) for name in NAMES]
    return named, torch.optim.Adam([{"params": [parameter for _, parameter in named]}], lr=0.1)


def update(named: list[tuple[str, Tensor]], optimizer: torch.optim.Adam, step: int, without: int | None = None) -> None:
    for index, (_, parameter) in enumerate(named):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(100 * step + index))
        parameter.grad = None if index == without else gradient
    optimizer.step()


@pytest.mark.parametrize("done", [0, 1, 4])
def test_adam_goes_on_as_if_nothing_had_happened(tmp_path, done):
    """Also before its first step, and with a parameter that has had no gradient yet."""
    named, optimizer = small_model(0)
    for step in range(done):
        update(named, optimizer, step, without=2)
    stages = {0: collect(named[:2], optimizer), 1: collect(named[2:], optimizer)}
    run_in_threads(lambda worker: Checkpoints(tmp_path).save(worker.transport, RankState(done, stages)), 1)
    again, fresh = small_model(1)
    update(again, fresh, 17)  # what is restored replaces what is there
    restore(Checkpoints(tmp_path).latest(), again, fresh)
    for step in range(done, done + 3):
        for model in ((named, optimizer), (again, fresh)):
            update(*model, step)
        for (name, expected), (_, found) in zip(named, again, strict=True):
            assert torch.equal(found, expected), (name, step)
            for key, tensor in optimizer.state[expected].items():
                assert torch.equal(fresh.state[found][key], tensor), key
    restore(Checkpoints(tmp_path).latest(), [], torch.optim.Adam([{"params": []}]))  # a rank without stages


def test_nothing_is_restored_unless_everything_is_right(tmp_path):
    named, optimizer = small_model(0)
    stages = {0: collect(named[:3], optimizer), 1: collect(named[3:], optimizer)}
    run_in_threads(lambda worker: Checkpoints(tmp_path).save(worker.transport, RankState(0, stages)), 1)
    (tmp_path / "step_00000000/stage_1.pt").write_bytes(b"")
    again, fresh = small_model(1)
    before = [parameter.clone() for _, parameter in again]
    with pytest.raises(CheckpointError):
        restore(Checkpoints(tmp_path).latest(), again, fresh)
    assert all(torch.equal(parameter, old) for (_, parameter), old in zip(again, before, strict=True))


# --- The record of a run ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 4))
def test_a_record_that_is_split_anywhere_and_resumed_by_others_gives_one_fingerprint(splits, ranks):
    def gradient(name: str, step: int) -> Tensor | None:
        return None if step == 3 else parameter_state(name, step)["value"]

    def part_of(records: list[dict[str, str]], names: list[str]) -> dict[str, str]:
        return {name: digest for record in records for name, digest in record.items() if name in names}

    def run(splits: list[int], ranks: int) -> str:
        summaries: list[dict[str, str]] = [{}]
        for number, (start, end) in enumerate(itertools.pairwise(sorted({0, *splits, 10}))):
            owned: list[list[str]] = [[] for _ in range(1 + (ranks + number) % 4)]
            for index, name in enumerate([*NAMES, LOSSES]):
                owned[index % len(owned)].append(name)
            records = [StageRecord(part_of(summaries, names)) for names in owned]
            for step in range(start, end):
                for record, names in zip(records, owned, strict=True):
                    if LOSSES in names:
                        record.add_losses({1: torch.tensor(0.1), 0: torch.tensor(float(step))})
                    for name in names:
                        if name != LOSSES:
                            record.add(name, gradient(name, step))
            summaries = [json.loads(json.dumps(record.summary())) for record in records]
        return fingerprint(summaries)

    assert run(splits, ranks) == run([], 0)


def test_a_record_depends_on_order_and_on_the_numbers_of_steps():
    def chained(*values: float | None) -> str:
        record = StageRecord()
        for value in values:
            record.add("w", None if value is None else torch.full((2,), value))
        return fingerprint([record.summary()])

    assert (
        len({chained(), chained(1), chained(1, 1), chained(1, 2), chained(2, 1), chained(None, 1), chained(1, None)})
        == 7
    )
    first, second, third, fourth = StageRecord(), StageRecord(), StageRecord(), StageRecord()
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    first.add_losses({0: one, 1: two})
    second.add_losses({0: one})
    second.add_losses({0: two})
    third.add_losses({0: one, 1: torch.nextafter(two, one)})
    fourth.add_losses({1: two, 0: one})
    assert len({str(record.summary()) for record in (first, second, third)}) == 3
    assert fourth.summary() == first.summary()
    with pytest.raises(ValueError, match="two ranks recorded losses"):
        fingerprint([first.summary(), second.summary()])


@pytest.mark.parametrize("digest", ["", "12", "x" * 64, "A" * 64, "0" * 64 + "\n"])
def test_a_record_goes_on_from_digests_only(digest):
    with pytest.raises(ValueError, match="the digest of w is .*64 hexadecimal digits"):
        StageRecord({"w": digest})


# --- A run that is resumed -------------------------------------------------------------------------------------------

RUN = replace(TINY_RUN, model=replace(TINY_RUN.model, dropout=0.1), steps=6, recorded_steps=4, loss_scale=8.0)


def resumed(
    config: TrainingConfig,
    schedule: Schedule,
    folder: Path,
    run: Callable[..., list] = run_in_threads,
    engine: type[Pipeline] | None = None,
) -> TrainingResult:
    """Go on from the last checkpoint in the folder, if there is one, and save one after every step."""
    result = train(
        config, schedule, run, engine=engine or SkipsStep0, checkpoints=Checkpoints(folder), save_every=1, resume=True
    )
    assert [(report.step, report.saved) for report in result.saves] == [(s.number + 1, True) for s in result.steps]
    return result


class SkipsStep0(Pipeline):
    """A gradient of the first step is not a number, so no rank updates anything."""

    def step(self, micro_batches, plan, num_tokens, dropout_key=None, *more):
        self.number = dropout_key[1]
        losses = super().step(micro_batches, plan, num_tokens, dropout_key, *more)
        if self.number == 0 and self.transport.rank == 0:
            next(self.stages[0].parameters()).grad[:] = float("nan")
        return losses


@cache
def not_interrupted() -> TrainingResult:
    result = train(RUN, gpipe(2, 3), run=run_in_threads, engine=SkipsStep0)
    assert [step.skipped for step in result.steps] == [True] + 5 * [False]
    return result


def same_run(found: TrainingResult) -> bool:
    expected = not_interrupted()
    same_weights = all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
    return same_weights and (found.fingerprint, found.answers) == (expected.fingerprint, expected.answers)


ROWS = gpipe(2, 3).actions
IDLE = Schedule(3, (0, 2), (ROWS[0], (), ROWS[1]))  # rank 1 has no stage


@pytest.mark.parametrize(
    "parts",
    [
        {6: gpipe(2, 3)},
        {1: gpipe(2, 3), 3: one_f_one_b(3, 3), 6: gpipe(1, 3)},
        {2: gpipe(1, 3), 3: looped(2, 2, 3), 5: one_f_one_b(4, 3), 6: IDLE},
    ],
    ids=["in one go", "2 to 3 to 1", "1 to 4 to a rank without stages"],
)
def test_a_resumed_run_is_the_same_run_with_any_number_of_stages(tmp_path, parts):
    done: list[Step] = []
    for steps_in_all, schedule in parts.items():
        found = resumed(replace(RUN, steps=steps_in_all), schedule, tmp_path)
        done += found.steps
    assert repr(done) == repr(not_interrupted().steps)  # as text, because the norm of step 0 is no number
    assert same_run(found)


class DiesInStep3(SkipsStep0):
    """Its last rank is killed in the middle of a step."""

    def hand_on(self, action, tensors) -> None:
        if self.number == 3 and action.kind == "B" and self.transport.rank == self.transport.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().hand_on(action, tensors)


@pytest.mark.processes
def test_a_killed_run_is_resumed_by_other_processes(tmp_path):
    with pytest.raises(StageError) as caught:
        resumed(RUN, gpipe(2, 3), tmp_path, launch, DiesInStep3)
    assert (caught.value.kind, caught.value.rank) == ("died", 1)
    found = resumed(RUN, gpipe(3, 3), tmp_path, launch)
    assert [step.number for step in found.steps] == [3, 4, 5] and same_run(found)
