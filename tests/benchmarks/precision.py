"""The time of the capstone's step in bf16 as a ratio to fp32, on one device and one thread.

    python -m tests.benchmarks.precision

A step goes from micro-batches to their gradients, once as a whole batch and once in the capstone's eight micro-batches.
The two precisions take turns; the ratio is taken in each turn, and the table shows the medians. Which of them is
faster is a matter of the CPU's instructions and of the size of the matrices, so `precision="auto"` measures too.
"""

import statistics
from dataclasses import replace

import torch

from course_utils.pipeline import Pipeline
from course_utils.recipes import TrainingConfig, with_precision
from course_utils.schedules import gpipe
from course_utils.threads import run_in_threads
from course_utils.training_state import build_rank
from course_utils.transports import Worker
from tests.benchmarks.capstone_step import by_turns

MICRO_BATCHES = (1, 8)
PRECISIONS = ("fp32", "bf16")


def seconds_of_steps(worker: Worker, config: TrainingConfig, repetitions: int) -> dict[str, list[float]]:
    """{precision: seconds of each repetition}."""
    schedule = gpipe(1, config.micro_batches)
    pipelines = {
        precision: build_rank(worker.transport, replace(config, precision=precision), config.cut, schedule, Pipeline)[0]
        for precision in PRECISIONS
    }
    return by_turns(worker, pipelines, config, repetitions)


def measure(config: TrainingConfig | None = None, repetitions: int = 20) -> dict[int, dict[str, float]]:
    """{M: {"fp32": milliseconds, "bf16": milliseconds, "ratio": median of bf16/fp32}}."""
    table = {}
    for num_micro_batches in MICRO_BATCHES:
        one_stage = replace(config or TrainingConfig(), stages=1, micro_batches=num_micro_batches)
        (seconds,) = run_in_threads(seconds_of_steps, 1, one_stage, repetitions)
        turns = zip(seconds["bf16"], seconds["fp32"], strict=True)
        table[num_micro_batches] = {name: 1e3 * statistics.median(column) for name, column in seconds.items()}
        table[num_micro_batches]["ratio"] = statistics.median(low / full for low, full in turns)
    return table


def main() -> None:
    print(f"a step of the capstone on one thread ({torch.backends.cpu.get_cpu_capability()}): milliseconds")
    for num_micro_batches, row in measure().items():
        auto = with_precision(replace(TrainingConfig(), precision="auto", micro_batches=num_micro_batches)).precision
        print(
            f"M={num_micro_batches:<3} fp32 {row['fp32']:8.1f}   bf16 {row['bf16']:8.1f}   ratio {row['ratio']:.2f}   "
            f"auto chooses {auto}"
        )


if __name__ == "__main__":
    main()
