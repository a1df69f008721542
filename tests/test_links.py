"""Messages that are waited for, and the straight line through what they cost."""

import random
from collections.abc import Callable

import pytest
import torch

from course_utils.links import Link, exchange, fit_link, ping_pong, present, receive, receive_carry, send, send_carry
from course_utils.processes import launch
from course_utils.stages import CutModel, by_count
from course_utils.threads import Deadlock, run_in_threads
from course_utils.transformer import TransformerConfig
from course_utils.transports import Worker

SIZES = [4**n for n in range(1, 12)]


def swap(worker: Worker) -> torch.Tensor:
    return exchange(worker, torch.full((2, 3), worker.rank), 1 - worker.rank)


@pytest.mark.parametrize("run", [run_in_threads, pytest.param(launch, marks=pytest.mark.processes)])
def test_an_exchange(run: Callable) -> None:
    zero_got, one_got = run(swap, 2)
    assert torch.equal(zero_got, torch.ones(2, 3, dtype=torch.int64))
    assert torch.equal(one_got, torch.zeros(2, 3, dtype=torch.int64))


def test_an_exchange_needs_a_queue_for_each_direction() -> None:
    """Begun at once, both messages move; not where all messages of a pair stand in one queue, sends first."""
    run_in_threads(swap, 2, queues="directed pair")
    with pytest.raises(Deadlock):
        run_in_threads(swap, 2, queues="pair")


def test_a_send_waits_for_its_receiver() -> None:
    def both_send_first(worker: Worker) -> None:
        send(worker, torch.zeros(1), 1 - worker.rank, "a letter")
        receive(worker, torch.zeros(1), 1 - worker.rank, "a letter")

    with pytest.raises(Deadlock, match="waits for stage 1 to take a letter"):
        run_in_threads(both_send_first, 2)


def test_a_carry_arrives_as_the_plan_says() -> None:
    """Also what is not contiguous, and where a tensor of the carry is not there."""
    cut = CutModel(TransformerConfig(d_model=8, heads=2), by_count(8, 4))
    geometry = (2, 3, 4)
    hidden = torch.arange(64.0).reshape(2, 8, 4).transpose(1, 2).requires_grad_()
    memory = torch.arange(48.0).reshape(2, 3, 8)
    sent = {0: (memory, None), 1: (None, memory), 2: (hidden, memory)}

    def pass_on(worker: Worker, border: int) -> tuple | None:
        if worker.rank == 0:
            return send_carry(worker, sent[border], 1, "the carry")
        return receive_carry(worker, cut.carry_after(border, geometry), 0, "the carry")

    for border, tensors in sent.items():
        _, came = run_in_threads(pass_on, 2, border)
        assert [tensor is None for tensor in came] == [tensor is None for tensor in tensors]
        for tensor, other in zip(present(came), present(tensors), strict=True):
            assert torch.equal(tensor, other) and not tensor.requires_grad and tensor.is_contiguous()


def test_ping_pong_measures_every_size() -> None:
    measured = run_in_threads(ping_pong, 2, [4, 4000], 3)
    assert [sorted(times) for times in measured] == [[4, 4000], [4, 4000]]
    assert all(0 < seconds < 1 for times in measured for seconds in times.values())


@pytest.mark.processes
def test_ping_pong_between_processes_and_the_line_through_it() -> None:
    link = fit_link(launch(ping_pong, 2, SIZES, 10)[0])
    assert 0 < link.latency < 1 and link.bandwidth > 1e6


def test_the_line_is_found_again() -> None:
    link = Link(latency=60e-6, bandwidth=2.5e9)
    found = fit_link({size: link.seconds(size) for size in SIZES})
    assert found == pytest.approx(link, rel=1e-6)


def test_each_size_counts_alike() -> None:
    """Errors of some per cent: the latency is still found to some per cent. Absolute errors would lose it."""
    link, noise = Link(latency=60e-6, bandwidth=2.5e9), random.Random(0)
    found = fit_link({size: link.seconds(size) * noise.uniform(0.95, 1.05) for size in SIZES})
    assert found.latency == pytest.approx(link.latency, rel=0.05)
    assert found.bandwidth == pytest.approx(link.bandwidth, rel=0.1)


def test_the_price_of_some_messages() -> None:
    link = Link(latency=1.0, bandwidth=10.0)
    assert link.seconds(20) == 3.0 and link.seconds(20, num_messages=2) == 4.0


def test_what_no_line_goes_through() -> None:
    with pytest.raises(ValueError, match="1 size was measured; a straight line needs at least 2"):
        fit_link({4: 1e-5})
    with pytest.raises(ValueError, match="the times do not grow with the size"):
        fit_link({4: 2e-5, 4096: 1e-5})
