"""Checkpoints that commit: whatever kills a run, and at whatever moment, the last good checkpoint is whole.

    <folder>/step_00000060/stage_0.pt    one stage: its parameters and their optimizer state, by name
                           stage_1.pt
                           manifest.json written last: sizes and hashes of the files, and what all ranks have in common

A folder without a valid manifest is no checkpoint. Every file is written under another name, forced to the disk and
then renamed; an older checkpoint is removed only when the newer one is safe. The names of parameters do not depend on
the cut, so any number of stages can resume. All ranks must see the same folder, and each run needs its own.

The files are read with `weights_only=True` after their hashes are checked: code in them is refused and never run.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from course_utils.transfer import as_json, tell_all
from course_utils.transports import Transport, describe

FORMAT = 1  # to be counted up when older programs cannot read what newer ones write
MANIFEST = "manifest.json"
OUR_FOLDERS = re.compile(r"step_(\d{8,})")
OUR_FILES = re.compile(r"(stage_\d+\.pt|manifest\.json)(\.part)?")  # .part: while it is being written
MAY_DIFFER = ("stages", "schedule", "rematerialisation", "steps")  # unless messages are rounded, these change no bit

# All that belongs to one parameter: "value", and what the optimizer keeps (Adam: "step", "exp_avg", "exp_avg_sq").
ParameterState = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be saved, or what is there cannot be resumed. Nothing that was good is overwritten."""


@dataclass
class RankState:
    """What one rank holds of a run between two steps.

    Attributes:
        step: number of steps done; so it is the position in the data as well, the number of the next step.
        stages: {stage: {parameter name: see `collect`}}, the stages of this rank; there may be none.
        record: `StageRecord.summary()`.
        shared: what is the same on all ranks, such as the state of the learning rate; it must fit into JSON.
        config: the configuration of the run, for `compare_config`; it must fit into JSON.
    """

    step: int
    stages: Mapping[int, Mapping[str, ParameterState]]
    record: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveReport:
    """What became of a `save`, the same on every rank.

    Attributes:
        problem: what went wrong, in words; empty if nothing did.
        num_bytes: of the files of all stages.
    """

    step: int
    saved: bool
    problem: str
    num_bytes: int


@dataclass(frozen=True)
class StageFile:
    """What the manifest knows of the file of a stage."""

    size: int  # bytes
    sha256: str
    parameters: list[str]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint, all but its tensors.

    Attributes:
        step, config, shared: as in `RankState`.
        record: of the whole run.
        stages: by stage. There are no names of files in it: it cannot lead out of its folder.
        torch: the version that wrote it.
    """

    folder: Path
    step: int
    config: Mapping[str, Any]
    shared: Mapping[str, Any]
    record: Mapping[str, str]
    stages: list[StageFile]
    torch: str = str(torch.__version__)

    def record_of(self, names: Iterable[str]) -> dict[str, str]:
        """The part of the record that a rank resumes: of these names, those that were recorded."""
        return {name: self.record[name] for name in names if name in self.record}

    def to_json(self) -> bytes:
        """The bytes of the file; among them is the hash of the rest."""
        content = {"format": FORMAT, **asdict(self)}
        del content["folder"]
        content = json.loads(as_json(content))  # as it will be read again: keys are text, tuples are lists
        return json.dumps({**content, "sha256": sha256(as_json(content))}, indent=1, sort_keys=True).encode()


# --- Save ------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: made by the first save if it is not there, for this user only.
        keep: so many checkpoints are kept, the newest and those before it.
        on_failure: what `save` does on all ranks if one of them cannot write, because the disk is full for example:
            "stop" raises CheckpointError, "continue" returns a report that says so.
    """

    def __init__(self, folder: str | Path, keep: int = 2, on_failure: Literal["stop", "continue"] = "stop"):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept")
        if on_failure not in ("stop", "continue"):
            raise ValueError(f"on_failure is {on_failure!r}; it must be 'stop' or 'continue'")
        self.folder, self.keep, self.on_failure = Path(folder), keep, on_failure

    def save(self, transport: Transport, state: RankState) -> SaveReport:
        """Save what all ranks hold. Every rank calls it between the same two steps, also one without stages.

        Needs memory for the file of its largest stage, twice. A rank waits for others no longer than its transport.

        Raises:
            CheckpointError: on all ranks: they are not in the same state; or, with "stop", it could not be saved.
        """
        folder = self.folder / f"step_{state.step:08d}"
        own: dict[str, Any] = {"common": [state.step, state.config, state.shared], "files": {}, "record": state.record}
        own["problem"] = attempt(f"{folder} could not be made", self.make, folder)
        for stage, parameters in state.stages.items():
            data, path = pack(parameters), folder / f"stage_{stage}.pt"
            own["files"][stage] = asdict(StageFile(len(data), sha256(data), list(parameters)))
            own["problem"] = own["problem"] or attempt(f"{path} could not be written", write_durably, path, data)
        ranks = tell_all(transport, own, "word of its part of the checkpoint")

        files, record = check_and_merge(ranks)
        problem = "; ".join(rank["problem"] for rank in ranks if rank["problem"])
        manifest = Manifest(folder, state.step, state.config, state.shared, record, files)
        outcome = self.commit(manifest, problem) if transport.rank == 0 else None
        saved, problem = tell_all(transport, outcome, "word that the checkpoint is complete")[0]
        if not saved:
            problem = f"no checkpoint of step {state.step} was saved: {problem}. Those before it are whole."
            if self.on_failure == "stop":
                raise CheckpointError(problem)
        return SaveReport(state.step, saved, problem, sum(file.size for file in files))

    def make(self, folder: Path) -> None:
        """Make a folder for a checkpoint, on every rank: there can be no new manifest before all have been here."""
        if (folder / MANIFEST).exists():
            raise FileExistsError("it is a checkpoint already, and is not overwritten; name another folder")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_names(self.folder)

    def commit(self, manifest: Manifest, problem: str) -> tuple[bool, str]:
        """Make the checkpoint valid unless there is a problem, and tidy up: (whether it is valid, what went wrong)."""
        path = manifest.folder / MANIFEST
        sizes = {path.name: path.stat().st_size for path in manifest.folder.glob("stage_*.pt")}
        unseen = [f"stage_{i}.pt" for i, file in enumerate(manifest.stages) if sizes.get(f"stage_{i}.pt") != file.size]
        if unseen and not problem:
            problem = (
                f"{manifest.folder} lacks {', '.join(unseen)} as rank 0 sees it: all ranks must see the same folder"
            )
        problem = problem or attempt(f"{path} could not be written", write_durably, path, manifest.to_json())
        safe = manifest.step - 1 if problem else manifest.step
        left = attempt(f"{self.folder} could not be tidied up", self.tidy_up, safe)
        return not problem, "; ".join(filter(None, (problem, left)))

    def tidy_up(self, safe: int) -> None:
        """Remove what has no manifest, which killed and failed saves have left, and checkpoints that are too old.

        Damaged ones stay, and those of later steps than `safe`: another run has made them, or nobody knows whether they
        are on the disk.
        """
        folders = self.folders()
        valid = [folder for folder in folders if step_of(folder) <= safe and is_valid(folder)]
        for folder in [folder for folder in folders if not (folder / MANIFEST).exists()] + valid[: -self.keep]:
            discard(folder)

    def folders(self) -> list[Path]:
        """Those of checkpoints, complete or not, by step. Links are left alone."""
        found = [path for path in self.folder.glob("step_*") if path.is_dir() and not path.is_symlink()]
        return sorted((path for path in found if OUR_FOLDERS.fullmatch(path.name)), key=step_of)

    def latest(self) -> Manifest | None:
        """The newest checkpoint, or None. Raises CheckpointError if its manifest is damaged."""
        complete = [folder for folder in self.folders() if (folder / MANIFEST).exists()]
        return read_manifest(complete[-1]) if complete else None


def collect(named: Iterable[tuple[str, Tensor]], optimizer: Optimizer) -> dict[str, ParameterState]:
    """{name: the parameter and what the optimizer keeps for it}, for `RankState`; nothing is copied."""
    return {name: {"value": parameter, **optimizer.state.get(parameter, {})} for name, parameter in named}


def check_and_merge(ranks: list[dict[str, Any]]) -> tuple[list[StageFile], dict[str, str]]:
    """The files by stage, and the record of the run. Raises CheckpointError on all ranks, because all see the same."""
    files = {int(stage): StageFile(**entry) for rank in ranks for stage, entry in rank["files"].items()}
    stages = sorted(int(stage) for rank in ranks for stage in rank["files"])
    if len({as_json(rank["common"]) for rank in ranks}) > 1 or stages != list(range(len(stages))):
        raise CheckpointError(
            f"the ranks have done {[rank['common'][0] for rank in ranks]} steps and hold the stages {stages}: all must "
            "save at the same place of the same loop, with equal config and shared state, and hold each stage once"
        )
    return [files[stage] for stage in stages], {name: d for rank in ranks for name, d in rank["record"].items()}


# --- Resume ----------------------------------------------------------------------------------------------------------


def restore(manifest: Manifest, named: Iterable[tuple[str, Tensor]], optimizer: Optimizer) -> None:
    """Give these parameters and their optimizer what was saved. Nothing is changed before all is checked.

    Learning rates and other settings of the optimizer stay as they are.

    Raises:
        CheckpointError: as `load`.
    """
    named = list(named)
    saved = load(manifest, dict(named))
    for name, parameter in named:
        state = saved[name]
        with torch.no_grad():
            parameter.copy_(state.pop("value"))
        optimizer.state[parameter] = {  # Adam counts its steps on the CPU
            key: tensor if key == "step" else tensor.to(parameter.device) for key, tensor in state.items()
        }


def load(manifest: Manifest, wanted: Mapping[str, Tensor]) -> dict[str, ParameterState]:
    """Some parameters, from the files that hold them, whoever wrote those. Needs memory for one file twice.

    Args:
        wanted: {name: a tensor of the shape and dtype that it must have}.

    Raises:
        CheckpointError: one is missing or of another shape or dtype, or a file is not what was saved.
    """
    found: dict[str, Any] = {}
    for stage, file in enumerate(manifest.stages):
        if wanted.keys() & file.parameters:
            content = unpack(manifest.folder / f"stage_{stage}.pt", file)
            found |= {name: content[name] for name in wanted.keys() & content.keys()}
    for name, like in wanted.items():
        for key, tensor in found.get(name, {"value": None}).items():
            expected = "a scalar float32" if key == "step" else describe(like)
            if describe(tensor) != expected:
                raise CheckpointError(
                    f"{key} of {name} in {manifest.folder} is {describe(tensor)}; this model needs {expected}: "
                    "resume the model that the checkpoint was made of"
                )
    return found


def compare_config(saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str] = MAY_DIFFER) -> None:
    """Refuse to resume what would become another run. A field that is missing counts as None.

    Raises:
        CheckpointError: names each field that differs, with both values.
    """
    before, after = (flat(json.loads(as_json(config))) for config in (saved, now))
    different = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r} now"
        for name in dict.fromkeys([*before, *after])
        if name.split(".")[0] not in may_differ and before.get(name) != after.get(name)
    ]
    if different:
        raise CheckpointError(
            f"the checkpoint is of another run: {'; '.join(different)}. Resume with the old values (only "
            f"{', '.join(may_differ)} may change), or begin anew in another folder"
        )


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"model": {"heads": 2}} -> {"model.heads": 2}"""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return fields


# --- What lies on the disk -------------------------------------------------------------------------------------------


def write_durably(path: Path, data: bytes) -> None:
    """After a crash, at whatever moment, the file is complete or not there; after the return it is on the disk."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_names(path.parent)


def sync_names(folder: Path) -> None:
    """Force the names in a folder to the disk. Windows has no way to ask for it."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove our files and then the folder. The manifest goes first: what is half removed is no checkpoint any more."""
    names = [name for name in os.listdir(folder) if OUR_FILES.fullmatch(name)]
    for name in sorted(names, key=lambda name: name != MANIFEST):
        os.unlink(folder / name)
        if name == MANIFEST:
            sync_names(folder)
    os.rmdir(folder)


def pack(parameters: Mapping[str, ParameterState]) -> bytes:
    """The file of a stage. Tensors are copied, or torch would save all of the memory that a tensor is a part of."""
    copies = {
        name: {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}
        for name, state in parameters.items()
    }
    buffer = io.BytesIO()
    torch.save(copies, buffer)
    return buffer.getvalue()


def unpack(path: Path, file: StageFile) -> dict[str, ParameterState]:
    """The reverse of `pack`, with a check of everything. The bytes that are opened are those that were hashed."""
    data = read(path)
    if (len(data), sha256(data)) != (file.size, file.sha256):
        raise damaged(path, f"was changed: {len(data)} bytes, SHA-256 {sha256(data)}, not {file.size}, {file.sha256}")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind; torch's own text would advise to let it run
        raise damaged(path, f"holds more than tensors, perhaps code: not read ({type(error).__name__})") from None
    if not isinstance(content, dict) or list(content) != file.parameters or not all(map(is_state, content.values())):
        raise damaged(path, "is not the file of a stage that its manifest describes")
    return content


def read(path: Path) -> bytes:
    if not path.is_file():
        raise damaged(path, "is missing")
    return path.read_bytes()


def is_state(value: Any) -> bool:
    """Whether it may be a ParameterState."""
    tensors = value.values() if isinstance(value, dict) and "value" in value else [None]
    return all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in tensors)


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError unless it is to the last byte what `Manifest.to_json` gives."""
    path = folder / MANIFEST
    data = read(path)
    try:
        content = json.loads(data)
        version, _ = content.pop("format"), content.pop("sha256")
        if version > FORMAT:
            raise CheckpointError(f"{path} has format {version}, this program knows {FORMAT}: resume with a newer one")
        stages = [StageFile(**entry) for entry in content.pop("stages")]
        manifest = Manifest(folder, stages=stages, **content)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"is no manifest of a checkpoint ({type(error).__name__}: {error})") from error
    if manifest.to_json() != data or manifest.step != step_of(folder):
        raise damaged(path, f"was changed: its hash is not the one that it names, or it is not of {folder.name}")
    return manifest


def is_valid(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder))
    except CheckpointError:
        return False


def damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {how}. Nothing was changed. Put the right file there, or remove {path.parent} to resume from the "
        "checkpoint before it, if there is one"
    )


# --- Small things ----------------------------------------------------------------------------------------------------


def attempt(what: str, function: Callable[..., None], *arguments: Any) -> str:
    """Call a function; if the disk does not let it, the answer says so, for the other ranks to hear."""
    try:
        function(*arguments)
    except OSError as error:
        return f"{what}: {error.strerror or error}"
    return ""


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
