"""A training through many launches, most of them broken off: the short form of `course.py soak`; what it notices."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import cloudpickle
import pytest

from course_utils import _server
from course_utils.processes import StageError
from course_utils.training_state import Step
from tests import soak
from tests.faults_at_random import ENDINGS, Fault, FaultyPipeline, Launch, make_plan
from tests.soak import ALLOWED, Soak, SoakFailure, check_nothing_left, growth, held

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers need not import this file, and pytest with it


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_broken_off_again_and_again_gives_the_bits_of_an_undisturbed_one(tmp_path):
    run = Soak(make_plan(launches=11, steps=40, seed=0, stages=2), tmp_path / "checkpoints")
    run.undisturbed()
    safe = list(run.broken_off())
    assert safe == sorted(safe) and safe[-1] == 40
    assert {launch.changes.get("stages", 2) for launch in run.plan.launches} == {1, 2, 3}
    # The caller's kill and the one in a save come at any moment: on a slow machine after the end. The others must come.
    assert run.endings.total() == 11 and run.endings["whole"] == 1
    assert all(run.endings[ending] == 2 for ending in ("fewer steps", "exception", "kill in a step"))
    assert len(run.plan.nans) == 2 and run.steps > 40
    rows = list(growth(run))
    assert all(good for _, good in rows), "\n".join(row for row, _ in rows)


class Drifting(FaultyPipeline):
    """Computes other gradients in one step of the runs that are to be broken off; the loss of that step is right."""

    def step(self, *arguments: Any) -> Any:
        losses = super().step(*arguments)
        if self.fault is not None and self.number == 2:
            for stage in self.stages.values():
                for _, parameter in stage.named_parameters_globally():
                    parameter.grad.mul_(1.0 + 2**-20)
        return losses


@pytest.mark.processes
@pytest.mark.slow
def test_a_step_that_differs_in_its_last_bits_is_noticed_in_that_step(tmp_path, monkeypatch):
    plan = make_plan(launches=6, steps=20, seed=0, stages=2)
    first = plan.launches[0]
    late = replace(first, fault=replace(first.fault, ending="exception", step=19))
    monkeypatch.setattr(soak, "FaultyPipeline", Drifting)
    run = Soak(replace(plan, nans={}, launches=[late]), tmp_path)
    run.undisturbed()
    with pytest.raises(
        SoakFailure, match=r"(?s)launch 0, Launch.*: Step\(number=2, .* is Step\(number=2, .* undisturbed run"
    ):
        list(run.broken_off())


# --- What is to happen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_has_every_ending_equally_often_and_comes_from_its_seed(seed):
    plan = make_plan(launches=101, steps=500, seed=seed, stages=2)
    assert plan == make_plan(launches=101, steps=500, seed=seed, stages=2)
    assert plan.launches != make_plan(launches=101, steps=500, seed=seed + 1, stages=2).launches
    *broken_off, last = plan.launches
    assert (last.changes, last.fault) == ({}, None) and plan.config.recorded_steps == plan.config.steps == 500
    assert Counter(launch.fault.ending for launch in broken_off) == dict.fromkeys(ENDINGS, 20)
    steps = [launch.fault.step for launch in broken_off]
    assert steps == sorted(steps) and steps[0] >= 0 and steps[-1] < 450
    assert all(launch.fault.rank < launch.changes["stages"] for launch in broken_off)
    assert {launch.fault.rank for launch in broken_off} == {0, 1, 2}
    assert {launch.fault.action for launch in broken_off} == {"F0", "F1", "F2", "B0", "B1", "B2"}
    assert len(plan.nans) == 5 and set(plan.nans.values()) <= set(plan.config.cut.parameter_names)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"launches": 5}, "5 launches are too few: 6"),
        ({"steps": 19}, "19 steps are too few"),
        ({"stages": 0}, "0 stages"),
        ({"stages": 99}, "99"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, named, capsys):
    with pytest.raises(ValueError, match=named):
        make_plan(**{"launches": 16, "steps": 60, "seed": 0, "stages": 2, **changes})
    with pytest.raises(SystemExit) as ended:
        soak.main([word for name, value in changes.items() for word in (f"--{name}", str(value))])
    assert ended.value.code == 2 and named.split(":")[0] in capsys.readouterr().err


# --- What it notices: each of these must be able to fail --------------------------------------------------------------

FAULT = Fault("kill in a step", step=7, rank=1, action="B1", delay=0.0)
STEP = Step(3, 1.0, 2.0, 0.1, 40, False, 1024.0)


@contextmanager
def an_open_file() -> Iterator[None]:
    with open(os.devnull):
        yield


@contextmanager
def a_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(60,))
    thread.start()
    yield
    done.set()
    thread.join()


@contextmanager
def a_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield
    process.communicate(b"\n", timeout=60)


@contextmanager
def a_folder() -> Iterator[None]:
    folder = _server.make_run_folder("forkserver")
    yield
    folder.rmdir()


@pytest.mark.parametrize("something", [an_open_file, a_thread, a_process, a_folder], ids=lambda what: what.__name__)
def test_what_is_left_after_a_launch_is_noticed(monkeypatch, something):
    _server.make_home()
    before = held()
    with something():
        monkeypatch.setattr(soak, "SETTLED", 0.1)
        with pytest.raises(SoakFailure, match=r"after 0\.1 s there are .*; before the launch there were"):
            check_nothing_left(before)
    monkeypatch.undo()
    check_nothing_left(before)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_grows_a_little_in_each_launch_is_noticed(tmp_path, name):
    run = Soak(make_plan(launches=200, steps=20, seed=0, stages=2), tmp_path)
    in_all, each = ALLOWED[name]
    for other in ALLOWED:
        run.measured[other] = [1e5 + (in_all if other == name else 0) * (i >= 50) for i in range(200)]
    assert all(good for _, good in growth(run))  # once, as a cache does
    run.measured[name] = [1e5 + (each + in_all / 150) * i for i in range(200)]
    assert [row.split(",")[0].split("  ")[0] for row, good in growth(run) if not good] == [name.split(",")[0]]


def ends(run: Soak, outcome: Any, monkeypatch: pytest.MonkeyPatch, safe: int = 0, fault: Fault | None = FAULT) -> None:
    """Carry out a launch that ends with this outcome, an error or a result, and whose newest checkpoint is `safe`."""

    def train(config, **options):
        monkeypatch.setattr(run, "safe_steps", lambda: safe)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(soak, "train", train)
    run.launch(Launch({"stages": 3}, 5, fault))


def test_another_end_than_the_planned_one_is_noticed(tmp_path, monkeypatch):
    run = Soak(make_plan(launches=6, steps=20, seed=0, stages=2), tmp_path)
    end = partial(ends, run, monkeypatch=monkeypatch)
    end(StageError("", "died", 1))
    with pytest.raises(SoakFailure, match="kind 'died' of rank 0"):
        end(StageError("", "died", 0))
    with pytest.raises(SoakFailure, match="kind 'closed' of rank 1"):
        end(StageError("", "closed", 1))
    with pytest.raises(SoakFailure, match="kind 'died' of rank 1"):
        end(StageError("", "died", 1), fault=None)
    exception = replace(FAULT, ending="exception")
    end(StageError("ArithmeticError: injected in step 7, B1", "exception", 1), fault=exception)
    with pytest.raises(SoakFailure, match="another exception came: KeyError"):
        end(StageError("KeyError: 3", "exception", 1), fault=exception)
    with pytest.raises(SoakFailure, match="the fault never came"):
        end(None, safe=20)
    with pytest.raises(SoakFailure, match="ended well after step 20, and the newest checkpoint has 15"):
        end(None, safe=15)
    assert run.endings == {"kill in a step": 1, "exception": 1}


def test_another_step_or_fingerprint_or_a_file_that_was_not_tidied_up_is_noticed(tmp_path):
    run = Soak(make_plan(launches=6, steps=20, seed=0, stages=2), tmp_path)
    run.expected = {3: repr(STEP)}
    run.compare(STEP)
    with pytest.raises(SoakFailure, match="gradient_norm=2.5, .* is .* gradient_norm=2.0"):
        run.compare(replace(STEP, gradient_norm=2.5))
    run.whole = result("abc")
    run.compare_whole(result("abc"))
    with pytest.raises(SoakFailure, match="fingerprint and answers are abd"):
        run.compare_whole(result("abd"))
    for name in ("step_00000015/manifest.json", "step_00000020/manifest.json", "step_00000020/stage_0.pt.part"):
        run.compare_whole(result("abc"))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(SoakFailure, match=r"not tidied up: \['stage_0.pt.part'\]"):
        run.compare_whole(result("abc"))


def result(fingerprint: str) -> Any:
    class Result:
        answers = {7: "seven"}

    Result.fingerprint = fingerprint
    return Result


def test_the_command_says_what_failed_and_its_exit_code_too(monkeypatch, capsys):
    def broken_off(self: Soak) -> Iterator[int]:
        for i in range(7):
            self.endings["exception"] += 1
            self.measured = {name: [*values, grows * i] for name, values in self.measured.items()}
            yield i
        if fails:
            raise SoakFailure("launch 7, 2 stages: it hung")

    monkeypatch.setattr(Soak, "undisturbed", lambda self, on_step: setattr(self, "whole", result("abc")))
    monkeypatch.setattr(Soak, "broken_off", broken_off)
    command = ["--launches", "7", "--steps", "20"]
    fails, grows = False, 1.0
    assert soak.main(command) == 0
    assert "7 launches in 0 s: 7 exception" in capsys.readouterr().out
    fails, grows = False, 10_000.0
    assert soak.main(command) == 1
    assert capsys.readouterr().out.count("  grows\n") == len(ALLOWED)
    fails, grows = True, 1.0
    assert soak.main(command) == 1
    assert "launch 7, 2 stages: it hung" in capsys.readouterr().err


def test_its_default_is_the_long_form(monkeypatch):
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(soak, "make_plan", lambda **options: asked.append(options) or (_ for _ in ()).throw(ValueError))
    with pytest.raises(SystemExit):
        soak.main([])
    assert asked == [{"launches": 200, "steps": 2000, "seed": 0, "stages": 2}]
