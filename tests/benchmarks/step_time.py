"""The time of a step on this machine: the course's engine against PyTorch's own, in the same two processes.

    python -m tests.benchmarks.step_time

Two processes, one thread each, messages over loopback. The two engines take turns, so that whatever else the machine
does slows down both; a ratio is taken for each pair of neighbouring steps, and the result is the median of these.
Only ratios mean anything: the model is small, so that the engines are measured and not the arithmetic.
A step goes from a whole batch to its gradients (cut, forward, backward). All gradients are compared, bit for bit.
"""

import statistics
import time
from typing import Any

import torch.distributed as dist

from course_utils.processes import launch
from course_utils.transports import Worker
from tests.benchmarks.engines import MAKERS, NUM_STAGES, both_engines, ratios

MICRO_BATCHES = (2, 4, 8, 16)


def measure_on_rank(
    worker: Worker, num_micro_batches: int, names: tuple[str, ...], repetitions: int
) -> dict[str, list[list[float]]]:
    """{schedule: [[ours, torch's] seconds per repetition]} as this rank sees them."""
    engines = both_engines(worker, num_micro_batches, names)
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for repetition in range(repetitions):
        for name, pair in engines.items():
            pair_seconds = [0.0, 0.0]
            for i in (0, 1) if repetition % 2 else (1, 0):
                dist.barrier()
                started = time.perf_counter()
                pair[i].step()
                pair_seconds[i] = time.perf_counter() - started
            seconds[name].append(pair_seconds)
    return seconds


def measure(repetitions: int = 40, names: tuple[str, ...] = tuple(MAKERS)) -> dict[str, dict[int, dict[str, float]]]:
    """{schedule: {M: {"ours": milliseconds, "torch": milliseconds, "ratio": median of ours/torch}}}."""
    table: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for num_micro_batches in MICRO_BATCHES:
        ranks = launch(measure_on_rank, NUM_STAGES, num_micro_batches, names, repetitions, wait_limit=30, limit=120)
        for name in names:
            table[name][num_micro_batches] = ratios([rank[name] for rank in ranks])
    return table


def mean_ratio(rows: dict[int, dict[str, Any]]) -> float:
    """The geometric mean over M of one schedule's ratios."""
    return statistics.geometric_mean(row["ratio"] for row in rows.values())


def main() -> None:
    print("a step of ours and of torch's engine, K=2, over loopback: milliseconds, median of the ratios")
    for name, rows in measure().items():
        for num_micro_batches, row in rows.items():
            print(f"{name:6} M={num_micro_batches:<3}{row['ours']:8.1f}{row['torch']:8.1f}{row['ratio']:8.2f}")
        print(f"{name:6} geometric mean over M{mean_ratio(rows):11.2f}")


if __name__ == "__main__":
    main()
