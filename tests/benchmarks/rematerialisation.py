"""What re-materialisation saves and costs in the capstone: bytes of stash, and the time of a step as a ratio.

    python -m tests.benchmarks.rematerialisation

The capstone's configuration on its two processes, GPipe, one thread each. The bytes are counted (`memory.py`), in the
same run for all policies. For the time the policies take turns in the same two processes, and a ratio to "never" is
taken in each turn: the table shows the medians. A step goes from micro-batches to their gradients.
"""

import statistics
from typing import Any

from course_utils.memory import measure_memory
from course_utils.pipeline import Pipeline
from course_utils.processes import launch
from course_utils.recipes import TrainingConfig
from course_utils.schedules import POLICIES, gpipe, rematerialise
from course_utils.training_state import build_rank
from course_utils.transports import Worker
from tests.benchmarks.capstone_step import by_turns


def seconds_on_rank(worker: Worker, config: TrainingConfig, repetitions: int) -> dict[str, list[float]]:
    """{policy: seconds of each repetition} as this rank sees them."""
    plain = gpipe(config.stages, config.micro_batches)
    pipelines = {
        policy: build_rank(worker.transport, config, config.cut, rematerialise(plain, policy), Pipeline)[0]
        for policy in POLICIES
    }
    return by_turns(worker, pipelines, config, repetitions)


def measure(config: TrainingConfig | None = None, repetitions: int = 20) -> dict[str, dict[str, Any]]:
    """{policy: {"stash": [bytes per rank], "peak": [bytes per rank], "ratio": median of its time to that of never}}."""
    config = config or TrainingConfig()
    ranks = launch(seconds_on_rank, config.stages, config, repetitions, wait_limit=60, limit=300)
    steps = {policy: [max(turn) for turn in zip(*(rank[policy] for rank in ranks), strict=True)] for policy in POLICIES}
    table = {}
    for policy in POLICIES:
        schedule = rematerialise(gpipe(config.stages, config.micro_batches), policy)
        memory = measure_memory(config, schedule)
        ratios = [mine / never for mine, never in zip(steps[policy], steps["never"], strict=True)]
        table[policy] = {
            "stash": [rank.stash for rank in memory],
            "peak": [rank.peak for rank in memory],
            "ratio": statistics.median(ratios),
        }
    return table


def main() -> None:
    config = TrainingConfig()
    print(f"GPipe, K={config.stages}, M={config.micro_batches}, batch of {config.batch_size}: per rank, in KiB")
    print(f"{'policy':12}{'stash':>18}{'peak':>18}{'time of a step':>18}")
    for policy, row in measure(config).items():
        stash, peak = (" ".join(f"{size / 1024:8.0f}" for size in row[name]) for name in ("stash", "peak"))
        print(f"{policy:12}{stash:>18}{peak:>18}{row['ratio']:18.2f}")


if __name__ == "__main__":
    main()
