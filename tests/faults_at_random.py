"""A training that is to be broken off many times, all drawn from one seed; and the engine in which it is."""

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from course_utils.checkpoint import Checkpoints, SaveReport
from course_utils.pipeline import Pipeline
from course_utils.processes import start
from course_utils.recipes import TrainingConfig
from course_utils.schedules import POLICIES, Action
from course_utils.training import Step
from course_utils.transformer import TransformerConfig

CONFIG = TrainingConfig(
    micro_batches=3,
    batch_size=7,
    warm_up=4,
    loss_scale=1024.0,  # so that a skipped step halves it: one more thing that all must know after a resume
    model=TransformerConfig(d_model=16, heads=2, dropout=0.1),
    highest=9999,
    training_numbers=200,
    held_out=2,
)
# How a launch ends before the whole is done, and what StageError.kind then is; "": it ends well.
ENDINGS = {
    "fewer steps": "",
    "exception": "exception",
    "kill in a step": "died",
    "kill in a save": "died",
    "kill by the caller": "died",
}
SAVE_EVERY = (5, 3, 7)  # steps
SHORT_MOMENT = 0.03  # seconds; a kill that is to come at any moment comes within this time
IT_HUNG = 5.0  # seconds for a step, and a hundred steps' for the rest of a launch; nothing takes nearly as long
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no SIGKILL; there SIGTERM ends a process at once


@dataclass(frozen=True)
class Fault:
    """How one launch is to end.

    Attributes:
        ending: a key of ENDINGS.
        step: in which it happens, or in the first step after it that this launch comes to.
        rank: to which it happens.
        action: before whose result is handed on it happens, such as "B1" (exception, kill in a step).
        delay: seconds after the begin of the save, or after the report of the step, until the kill.
    """

    ending: str
    step: int
    rank: int
    action: str
    delay: float


@dataclass(frozen=True)
class Launch:
    """One launch: what is other than in the undisturbed run, and how it is to end.

    Attributes:
        changes: of the configuration; none of them changes a bit.
        save_every: steps; it differs, so that what a killed save has left is not written again but must be removed.
        fault: None: it comes to the end of the training.
    """

    changes: dict[str, Any]
    save_every: int
    fault: Fault | None


@dataclass(frozen=True)
class Plan:
    """What is to happen in a soak: everything is drawn from one seed.

    Attributes:
        config: of the undisturbed run.
        nans: {step: the parameter whose gradient is not a number there}.
        launches: the last one has no fault.
    """

    config: TrainingConfig
    nans: dict[int, str]
    launches: list[Launch]


def make_plan(launches: int, steps: int, seed: int, stages: int) -> Plan:
    """Every ending equally often, at random steps of the first nine tenths of the training.

    Raises:
        ValueError: fewer launches than one of each ending and the last; too few steps; too many stages.
    """
    if launches <= len(ENDINGS):
        raise ValueError(f"{launches} launches are too few: {len(ENDINGS) + 1} end once in each way and once well")
    if steps < 20:
        raise ValueError(f"{steps} steps are too few; at least 20 leave room for faults and for checkpoints")
    draw = random.Random(seed)
    config = replace(CONFIG, stages=stages, steps=steps, recorded_steps=steps, seed=seed)
    names = config.cut.parameter_names
    nans = {step: draw.choice(names) for step in draw.sample(range(steps), max(2, steps // 100))}
    endings = [list(ENDINGS)[i % len(ENDINGS)] for i in range(launches - 1)]
    draw.shuffle(endings)
    planned: list[Launch] = []
    for ending, step in zip(endings, sorted(draw.choices(range(steps * 9 // 10), k=launches - 1)), strict=True):
        changes = {
            "stages": draw.choice([1, 2, 3, stages]),
            "schedule": draw.choice(["gpipe", "1f1b"]),
            "rematerialisation": draw.choice(POLICIES),
        }
        action = f"{draw.choice('FB')}{draw.randrange(config.micro_batches)}"
        fault = Fault(ending, step, draw.randrange(changes["stages"]), action, draw.uniform(0, SHORT_MOMENT))
        planned.append(Launch(changes, draw.choice(SAVE_EVERY), fault))
    return Plan(config, nans, [*planned, Launch({}, SAVE_EVERY[0], None)])


# --- How faults get into a run ---------------------------------------------------------------------------------------


class FaultyPipeline(Pipeline):
    """The engine, in which some gradients are not a number and one rank may fail."""

    def __init__(self, *arguments: Any, nans: dict[int, str], fault: Fault | None, **options: Any):
        super().__init__(*arguments, **options)
        self.nans, self.fault, self.number = nans, fault, -1

    def step(self, micro_batches, plan, num_tokens, dropout_key=None, loss_scale=1.0):
        self.number = dropout_key[1]
        losses = super().step(micro_batches, plan, num_tokens, dropout_key, loss_scale)
        for stage in self.stages.values():
            for name, parameter in stage.named_parameters_globally():
                if name == self.nans.get(self.number):
                    parameter.grad[(0,) * parameter.dim()] = math.nan
        return losses

    def hand_on(self, action: Action, tensors: tuple) -> None:
        fault, me = self.fault, f"{action.kind}{action.micro_batch}"
        if fault and self.number >= fault.step and (self.transport.rank, me) == (fault.rank, fault.action):
            if fault.ending == "exception":
                raise ArithmeticError(f"injected in step {self.number}, {me}")
            if fault.ending == "kill in a step":
                os.kill(os.getpid(), KILL)
        super().hand_on(action, tensors)


class FatalCheckpoints(Checkpoints):
    """Checkpoints of a run in which one rank is killed soon after it has begun to save."""

    def __init__(self, folder: Path, fault: Fault | None):
        super().__init__(folder)
        self.fault = fault

    def save(self, transport, state) -> SaveReport:
        fault = self.fault
        is_due = fault is not None and fault.ending == "kill in a save" and state.step >= fault.step
        if is_due and transport.rank == fault.rank:
            timer = threading.Timer(fault.delay, os.kill, (os.getpid(), KILL))
            timer.daemon = True
            timer.start()
        return super().save(transport, state)


def launch_with(fault: Fault | None, steps: int) -> Callable[..., list]:
    """As `processes.launch`, for at most so many steps; may kill a stage from here, soon after it has heard of one."""

    def run(function: Callable, world_size: int, *arguments: Any, on_event: Callable[[int, Any], None]) -> list:
        is_due = fault is not None and fault.ending == "kill by the caller"
        with start(function, world_size, *arguments, limit=IT_HUNG * (100 + steps)) as under_way:
            for rank, event in under_way.events():
                on_event(rank, event)
                if is_due and isinstance(event, Step) and event.number >= fault.step:
                    is_due = False
                    time.sleep(fault.delay)
                    with suppress(ValueError):  # all has ended meanwhile
                        under_way.kill(fault.rank)
            return under_way.result()

    return run
