"""Five runs with something wrong, for lesson 12: what a person on call would see of each, and later what it was.

Two are the engine as it is, with emulated stages. Three are copies of the engine with one bug of the museum in each
(`tests/museum/exhibits.toml`), run in processes of their own. Do not read on before you have diagnosed them.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from course_utils._lines import in_lines
from course_utils.emulation import emulate
from course_utils.pipeline import Pipeline
from course_utils.recipes import TrainingConfig
from course_utils.schedules import Schedule, gpipe
from course_utils.threads import Deadlock, run_in_threads
from course_utils.timeline import Timeline
from course_utils.training import train
from course_utils.transformer import TransformerConfig

COURSE = Path(__file__).resolve().parents[1]
LIMIT = 120.0  # seconds for a run in a process of its own; it takes about three

# What may be wrong, and what of it can be seen.
CAUSES = {
    "a slow stage": "the timeline: one rank computes nearly all the time and longer per action, the others wait for it",
    "too few micro-batches": "the timeline: all ranks compute equally long and are idle or wait equally long",
    "a slow line": "the timeline: gaps between an action and the one on the next rank that needs its message",
    "gradients divided at a border": "gradient norms: one stage's are the healthy ones, an earlier one's a fraction",
    "gradients of the step before": "gradient norms: in the first step the healthy ones, later on all stages too large",
    "a loss that is a mean of means": "losses: other values than the healthy run's, in the first step already",
    "clipping by a stage's own norm": "norms and losses of the first step as in the healthy run, rates too; then apart",
    "a rate that moves although the step is skipped": "learning rates: another one after a skipped step",
    "dropout that depends on the cut": "losses: other values than the healthy run's, from the first step on",
    "messages from the wrong rank": "the status: each waits for a rank that has nothing to send to it, in a circle",
    "a rank that died": "the error: it names a process that has ended, and the others lost it",
}


@dataclass(frozen=True)
class Case:
    """How a run is made.

    Attributes:
        exhibit: of the museum; "" for a run that is emulated.
        forward: of an emulated run, the seconds of each stage; a backward takes twice as long.
        overflow: the step in which a gradient of the last stage becomes infinite, in the healthy run too.
    """

    cause: str
    schedule: Schedule
    exhibit: str = ""
    forward: tuple[float, ...] = ()
    overflow: int = -1


# Three stages of which the last two have changed places.
SWAPPED = Schedule(4, (0, 2, 1), tuple(gpipe(3, 4).actions[rank] for rank in (0, 2, 1)))
CASES = {
    "A": Case("too few micro-batches", gpipe(4, 2), forward=(0.008, 0.008, 0.008, 0.008)),
    "B": Case("gradients divided at a border", gpipe(3, 4), "divided-at-every-border"),
    "C": Case("messages from the wrong rank", SWAPPED, "neighbour-is-rank-minus-one"),
    "D": Case("a slow stage", gpipe(4, 8), forward=(0.003, 0.003, 0.006, 0.003)),
    "E": Case("a rate that moves although the step is skipped", gpipe(2, 4), "scheduler-stepped-on-a-skip", overflow=2),
}


@dataclass
class Evidence:
    """What is known of a run.

    Attributes:
        losses, rates, skipped: one per step.
        norms: for each step the norms of the gradients of each stage, before clipping.
        error: how it ended, if it did not end well.
    """

    fingerprint: str = ""
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    error: str = ""


@dataclass
class Mystery:
    """A run and what is known of it: a timeline if it was emulated, else its evidence and that of a healthy run."""

    letter: str
    schedule: Schedule
    timeline: Timeline | None = None
    seen: Evidence | None = None
    healthy: Evidence | None = None

    def __str__(self) -> str:
        title = f"run {self.letter}: K={self.schedule.num_stages}, M={self.schedule.num_micro_batches}"
        if self.seen is None or self.healthy is None:
            return f"{title}, only a timeline was kept"
        if self.seen.error:
            return f"{title}, it ended with\n{in_lines(self.seen.error)}"
        rows = [f"{title}, {len(self.seen.losses)} steps", f"{'':24}{'this run':>30}   a healthy one"]
        rows.append(f"{'fingerprint':24}{self.seen.fingerprint:>30}   {self.healthy.fingerprint}")
        for name in ("losses", "rates", "skipped"):
            rows.append(
                f"{name + ', steps 0 to 3':24}" + "   ".join(f"{text(getattr(run, name)):>30}" for run in self.runs)
            )
        for stage in range(self.schedule.num_stages):
            own = [text([step[stage] for step in run.norms]) for run in self.runs]
            rows.append(f"{f'norms, stage {stage}':24}" + "   ".join(f"{column:>30}" for column in own))
        return "\n".join(rows)

    @property
    def runs(self) -> tuple[Evidence, Evidence]:
        assert self.seen is not None and self.healthy is not None
        return self.seen, self.healthy


def text(values: list) -> str:
    """The first four: numbers with three figures, or whether."""
    return " ".join(("yes" if value else "no") if isinstance(value, bool) else f"{value:.3g}" for value in values[:4])


def mysteries() -> dict[str, Mystery]:
    """All five runs, made now: about ten seconds.

    Raises:
        FileNotFoundError: the museum is not beside the package.
        RuntimeError: a run ended in another way than it should, or not in LIMIT seconds.
    """
    seen = observe_exhibits([letter for letter, case in CASES.items() if case.exhibit])
    found = {}
    for letter, case in CASES.items():
        if case.exhibit:
            found[letter] = Mystery(letter, case.schedule, None, seen[letter], observe(letter))
        else:
            backward = [2 * seconds for seconds in case.forward]
            found[letter] = Mystery(letter, case.schedule, emulate(case.schedule, case.forward, backward))
    return found


def observe(letter: str) -> Evidence:
    """Run a case on the engine that is imported: this one, or a copy with a bug in it."""
    case = CASES[letter]
    norms: dict[int, list[float]] = {}  # of each stage

    class Watched(Pipeline):
        """It keeps the gradients' norms, and makes one of them infinite where the case wants it."""

        def step(self, *arguments: Any, **options: Any) -> dict[int, torch.Tensor]:
            losses = super().step(*arguments, **options)
            for index, stage in self.stages.items():
                gradients = [p.grad for p in stage.parameters() if p.grad is not None]
                if stage.is_last and len(norms.get(index, [])) == case.overflow:
                    gradients[0].fill_(math.inf)
                norms.setdefault(index, []).append(torch.stack([g.double().norm() for g in gradients]).norm().item())
            return losses

    try:
        steps = (result := train(CONFIG, case.schedule, run=run_in_threads, engine=Watched)).steps
    except Deadlock as deadlock:
        return Evidence(error=str(deadlock))
    return Evidence(
        fingerprint=result.fingerprint,
        losses=[step.loss for step in steps],
        rates=[step.learning_rate for step in steps],
        skipped=[step.skipped for step in steps],
        norms=[list(row) for row in zip(*(norms[stage] for stage in sorted(norms)), strict=True)],
    )


# A few steps of a small model.
CONFIG = TrainingConfig(
    model=TransformerConfig(d_model=16, heads=2, encoder_layers=1, decoder_layers=1),
    micro_batches=4,
    batch_size=16,
    steps=12,
    warm_up=8,
    highest=9999,
    training_numbers=500,
    held_out=0,
)


def observe_exhibits(letters: list[str]) -> dict[str, Evidence]:
    """Run cases on copies of the engine with their bugs in them, side by side; nothing is left of the copies."""
    if not (COURSE / "tests/museum/museum.py").exists():
        raise FileNotFoundError(
            f"{COURSE / 'tests/museum'} is not there: these runs need the whole course, from its repository"
        )
    with tempfile.TemporaryDirectory() as folder:
        processes = {letter: start(letter, Path(folder) / letter) for letter in letters}
        try:
            return {letter: finish(letter, process) for letter, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def start(letter: str, folder: Path) -> subprocess.Popen:
    """A process that runs a case on a copy of the engine in a folder, and prints its evidence."""
    command = [sys.executable, "-m", "tests.museum.museum", CASES[letter].exhibit, str(folder)]
    subprocess.run(command, cwd=COURSE, check=True, timeout=LIMIT)
    code = f"import json; from course_utils import mystery as m; print(json.dumps(vars(m.observe({letter!r}))))"
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(letter: str, process: subprocess.Popen) -> Evidence:
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"run {letter} did not end within {LIMIT:g} s: run the cell again") from None
    if process.returncode:
        raise RuntimeError(f"run {letter} failed in another way than it should:\n{errors[-2000:]}")
    return Evidence(**json.loads(output.splitlines()[-1]))


def reveal(letter: str) -> str:
    """What was wrong with a run: the cause, and for a bug where users met it and what was changed in the engine."""
    case = CASES[letter]
    if not case.exhibit:
        milliseconds = ", ".join(f"{1000 * seconds:g}" for seconds in case.forward)
        size = f"K={case.schedule.num_stages}, M={case.schedule.num_micro_batches}"
        return f"{letter}: {case.cause}. Emulated with {size} and forwards of {milliseconds} ms."
    exhibits = tomllib.loads((COURSE / "tests/museum/exhibits.toml").read_text("utf-8"))["exhibit"]
    exhibit: Mapping[str, Any] = next(entry for entry in exhibits if entry["id"] == case.exhibit)
    lines = [f"{letter}: {case.cause}. {exhibit['title'][0].upper()}{exhibit['title'][1:]} ({exhibit['thread']})."]
    for edit in exhibit["edit"]:
        lines.append(f"    {edit['file']}")
        lines += [
            f"    {sign} {line}" for sign, name in (("-", "before"), ("+", "after")) for line in edit[name].splitlines()
        ]
    return "\n".join(lines)
