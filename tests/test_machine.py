"""What the machine check finds, and what it makes of findings that this machine does not have."""

from dataclasses import replace

import psutil
import pytest
import torch

from course_utils import machine
from course_utils.machine import Machine, describe_machine, inspect_machine, usable_cores, usable_memory

FOUND = Machine(
    cores=4,
    memory=16_000_000_000,
    gpus=(),
    busy=0.05,
    instructions="AVX2",
    alone=1000.0,
    together=(990.0, 960.0),
    backend="gloo",
    precision="fp32",
)


@pytest.mark.processes
def test_this_machine_is_inspected():
    found = inspect_machine(seconds=0.01)
    assert found.cores >= 1
    assert 0 < found.memory <= psutil.virtual_memory().total
    assert found.instructions == torch.backends.cpu.get_cpu_capability()
    assert 0 <= found.busy <= 1
    assert found.alone > 0 and min(found.together) > 0
    assert (found.backend, found.precision) in {("gloo", "fp32"), ("gloo", "bf16")}
    assert len(describe_machine(found).splitlines()) == 8


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({}, "Cores: this process may use 4. Lessons measure with two stages, a core for each."),
        ({}, "Memory: 16.0 GB."),
        ({}, "GPUs: none that PyTorch can use."),
        ({}, "Instructions: PyTorch uses AVX2 here."),
        ({}, "differ by 3%: two stages of equal cost take about equal time"),
        ({}, "Together they get 1.95 times as much done as one alone."),
        ({}, "computed in fp32; a layer of the capstone's model takes longer in bf16 here."),
        ({}, "Backend: gloo"),
        ({}, "they use 5% of the processor's time, little enough to measure beside them."),
        ({"busy": 0.5}, "they use 50% of the processor's time. Times that are measured now say little"),
        ({"cores": 1}, "two stages take turns on it"),
        ({"gpus": ("A", "B")}, "GPUs: A, B. The lessons compute on the processor all the same."),
        ({"together": (500.0, 1000.0)}, "differ by 100%: two stages of equal cost do not take equal time here"),
        ({"together": (500.0, 500.0)}, "Together they get 1.00 times as much done"),
        ({"together": (1300.0, 1200.0)}, "2.50 times as much done as one alone. Other programs disturbed this"),
        ({"busy": 0.5}, "1.95 times as much done as one alone. Other programs disturbed this"),
        ({"precision": "bf16"}, "computed in bf16; a layer of the capstone's model takes longer in fp32 here."),
    ],
)
def test_each_finding_becomes_a_sentence(change, sentence):
    assert sentence in describe_machine(replace(FOUND, **change))


@pytest.fixture
def container(monkeypatch, tmp_path):
    """A folder in which Linux would say what a container may use; 8 cores and 64 GB outside of it."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64 * 10**9})())
    return tmp_path


@pytest.mark.parametrize(
    "text, cores",
    [("150000 100000\n", 2), ("50000 100000\n", 1), ("9900000 100000\n", 8), ("max 100000\n", 8), ("", 8), (None, 8)],
)
def test_a_container_limits_the_cores(container, text, cores):
    if text is not None:
        (container / "cpu.max").write_text(text)
    assert usable_cores() == cores


@pytest.mark.parametrize("text, memory", [("2000000000\n", 2 * 10**9), ("max\n", 64 * 10**9), (None, 64 * 10**9)])
def test_a_container_limits_the_memory(container, text, memory):
    if text is not None:
        (container / "memory.max").write_text(text)
    assert usable_memory() == memory


def test_a_process_that_is_bound_to_a_core_has_one(container, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert usable_cores() == 1


def test_a_system_that_binds_no_process_counts_all_cores(container, monkeypatch):
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 6)
    assert usable_cores() == 6


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    assert machine.names_of_gpus() == ("GPU 0", "GPU 1")


def test_a_driver_that_does_not_fit_is_no_gpu_and_no_noise(monkeypatch, recwarn):
    def unusable():
        machine.warnings.warn("the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unusable)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.names_of_gpus() == ()
    assert not recwarn.list


def test_the_work_of_others_is_told_from_ones_own(monkeypatch):
    clocks = {"passed": 0.0, "own": 0.0, "all": 0.0}
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clocks["passed"])
    monkeypatch.setattr(machine.time, "process_time", lambda: clocks["own"])
    monkeypatch.setattr(machine, "seconds_in_use", lambda: clocks["all"])
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 2)

    def work(result, **seconds):
        clocks.update(seconds)
        return result

    assert machine.beside_others(lambda: work("alone", passed=1.0, own=2.0, all=2.0)) == ("alone", 0.0)
    assert machine.beside_others(lambda: work("shared", passed=2.0, own=3.0, all=4.0)) == ("shared", 0.5)


def test_a_quiet_machine_is_not_called_disturbed():
    assert "disturbed" not in describe_machine(FOUND)


def test_other_programs_that_begin_during_the_check_are_noticed(monkeypatch):
    shares = iter([0.0, 0.9])
    monkeypatch.setattr(machine, "work_of_others", lambda: next(shares))
    monkeypatch.setattr(machine, "launch", lambda *_: [(1000.0, 990.0), (0.0, 960.0)])
    monkeypatch.setattr(machine, "with_precision", lambda config: replace(config, precision="fp32"))
    assert inspect_machine().busy == 0.9


def test_the_seconds_in_use_count_programs_of_low_priority(monkeypatch):
    times = {"user": 1.0, "system": 2.0, "idle": 100.0}
    for more, seconds in (({}, 3.0), ({"nice": 4.0}, 7.0)):  # Windows knows no such time
        monkeypatch.setattr(machine.psutil, "cpu_times", lambda more=more: type("Times", (), {**times, **more})())
        assert machine.seconds_in_use() == seconds
