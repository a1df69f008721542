"""Where ranks compute. On machines without a GPU only the decisions are tested; the rest is marked `gpu`."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from course_utils import devices
from course_utils.devices import check_device, place_rank
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig
from course_utils.threads import ThreadTransport, run_in_threads
from course_utils.training import TrainingResult, train, train_on_one_device
from course_utils.transports import TorchTransport, Worker
from tests.models import TINY_RUN

# --- What is decided, shown with GPUs that are not there ------------------------------------------------------------


class TransportInThreads(TorchTransport, ThreadTransport):
    """Messages of a thread, for code that looks for a transport of processes."""

    def __init__(self, transport: ThreadTransport):
        TorchTransport.__init__(self, transport.rank, transport.world_size, "all ranks")
        self.board = transport.board

    isend, irecv, wait = ThreadTransport.isend, ThreadTransport.irecv, ThreadTransport.wait


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(gpus=2, nccl=True): what PyTorch says of it."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def pretend(gpus: int, nccl: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(devices.dist, "is_nccl_available", lambda: nccl)
        monkeypatch.setattr(devices.dist, "new_group", lambda ranks, timeout, backend: (backend, *ranks))

    return pretend


def place(worker: Worker, wanted: str = "cuda") -> tuple:
    transport = TransportInThreads(worker.transport)
    device = place_rank(transport, wanted)
    return device, transport.wire_device, list(transport.data_groups.items())


@pytest.mark.parametrize("gpus", [3, 4, 8])
def test_a_gpu_for_each_rank_means_nccl_with_a_group_for_each_direction(machine: Any, gpus: int) -> None:
    machine(gpus)
    placed = run_in_threads(place, 3)
    assert [device for device, _, _ in placed] == [wire for _, wire, _ in placed] == ["cuda:0", "cuda:1", "cuda:2"]
    groups = [made for _, _, made in placed]
    assert groups[0] == groups[1] == groups[2]  # in one order, or communicators would be connected crosswise
    assert dict(groups[0]) == {(a, b): ("nccl", a, b) for a in range(3) for b in range(3) if a != b}


@pytest.mark.parametrize(("gpus", "nccl"), [(1, True), (2, True), (3, False)])
def test_ranks_that_share_a_gpu_talk_through_host_memory(machine: Any, gpus: int, nccl: bool) -> None:
    machine(gpus, nccl)
    placed = run_in_threads(place, 3)
    assert [device for device, _, _ in placed] == [f"cuda:{rank % gpus}" for rank in range(3)]
    assert all(wire == "cpu" and groups == [] for _, wire, groups in placed)


def test_one_rank_without_a_gpu_of_its_own_decides_for_all(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two machines of which one has fewer GPUs than ranks."""
    machine(2)
    counts = iter([2, 2, 1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: next(counts))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert all(wire == "cpu" and groups == [] for _, wire, groups in run_in_threads(place, 3))


def test_under_torchrun_the_local_rank_chooses(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (device, wire, _), *_ = run_in_threads(place, 4)
    assert device == wire == "cuda:1"


def test_the_processor_is_the_default_and_needs_no_message(machine: Any) -> None:
    machine(8)
    assert place_rank(None, "cpu") == "cpu"  # type: ignore[arg-type]
    assert TrainingConfig().device == "cpu"


@pytest.mark.parametrize(("wanted", "words"), [("gpu", "'gpu'; there are cpu, cuda"), ("cuda", "no CUDA device here")])
def test_a_device_that_is_not_there(wanted: str, words: str, machine: Any) -> None:
    machine(0)
    for refuse in (check_device, lambda device: replace(TINY_RUN, device=device)):
        with pytest.raises(ValueError, match=words):
            refuse(wanted)


# --- On GPUs ----------------------------------------------------------------------------------------------------------


def assert_close(result: TrainingResult, expected: TrainingResult) -> None:
    """Other kernels add in another order: equal up to rounding, never relative to a value that is zero."""
    for step, other in zip(result.steps, expected.steps, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-4)
        assert step.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("run", [run_in_threads, pytest.param(launch, marks=pytest.mark.processes)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_training_on_gpus_is_close_to_training_on_the_processor(run: Any, schedule: str, stages: int) -> None:
    """With as many GPUs as stages over NCCL, else through host memory."""
    config = replace(TINY_RUN, stages=stages, schedule=schedule, device="cuda")
    assert_close(train(config, run=run), train_on_one_device(replace(config, device="cpu")))


@pytest.mark.gpu
def test_one_gpu_alone() -> None:
    config = replace(TINY_RUN, device="cuda")
    assert_close(train_on_one_device(config), train_on_one_device(replace(config, device="cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_on_gpus(precision: str) -> None:
    config = replace(TINY_RUN, steps=5, device="cuda", precision=precision)
    losses = [step.loss for step in train(config, run=run_in_threads).steps if not step.skipped]
    assert losses and all(loss == pytest.approx(losses[0], rel=0.2) for loss in losses)
