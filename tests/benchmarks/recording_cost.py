"""What it costs to record a step: the time of one record, measured alone, times their number, as a share of the step.

    python -m tests.benchmarks.recording_cost

The step: that of the capstone on two stages (`capstone_step`). The records: of the busiest rank, counted in a
run of the executor with every forward recomputed, which makes most of them.
"""

import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from course_utils.emulation import emulate
from course_utils.pipeline import Pipeline
from course_utils.recipes import TrainingConfig, settle
from course_utils.schedules import Action
from course_utils.threads import run_in_threads
from course_utils.timeline import Timeline
from tests.benchmarks.capstone_step import beside_steps, seconds_of

RECORDS = 2000  # that are timed together


def measure(repetitions: int = 50) -> dict[str, float]:
    """{"record": microseconds, "records": of a rank per step, "step": milliseconds, "share": records/step}: medians."""
    records = records_per_step(TrainingConfig())
    pairs = beside_steps(lambda micro_batches: seconds_of(record_many) / RECORDS, repetitions)
    return {
        "record": 1e6 * statistics.median(record for record, _ in pairs),
        "records": records,
        "step": 1e3 * statistics.median(step for _, step in pairs),
        "share": statistics.median(records * record / step for record, step in pairs),
    }


def records_per_step(config: TrainingConfig) -> int:
    """How many intervals the busiest rank records in a step."""
    _, schedule = settle(replace(config, rematerialisation="always"))
    timeline = emulate(schedule, 1e-5, 1e-5, message_shape=[1], run=run_in_threads)
    return max(list(timeline.rank).count(rank) for rank in range(config.stages))


def record_many() -> None:
    """What the executor does for each interval: it reads the clock before and after, and notes both."""
    executor: Any = SimpleNamespace(
        timeline=Timeline(1, "measured", "seconds"), transport=SimpleNamespace(rank=0), device="cpu"
    )
    for micro_batch in range(RECORDS):
        began = time.perf_counter()
        Pipeline.note(executor, "F", Action("F", 0, micro_batch), began)


def main() -> None:
    figures = measure()
    print(
        f"a record: {figures['record']:.2f} us; {figures['records']} of them in a step of {figures['step']:.1f} ms on "
        f"each of two stages; share {figures['share']:.3%}"
    )


if __name__ == "__main__":
    main()
