"""How long a launch takes: the first one, which starts the server, and those after it.

python tests/benchmarks/launching.py
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from course_utils.processes import launch  # noqa: E402


def nothing(worker):
    return worker.rank


def seconds(world_size: int, method: str | None = None) -> float:
    began = time.perf_counter()
    assert launch(nothing, world_size, method=method) == list(range(world_size))
    return time.perf_counter() - began


def main() -> None:
    if hasattr(os, "getloadavg"):
        kept = "not kept" if sys.dont_write_bytecode else "kept"
        print(f"cores {os.cpu_count()}, load {os.getloadavg()[0]:.1f}, bytecode {kept}")
    print(f"first launch, K=2: {seconds(2):.2f} s")
    for world_size in (1, 2, 4, 8):
        times = sorted(seconds(world_size) for _ in range(21))
        median = statistics.median(times)
        print(f"warm, K={world_size}: median {median:.3f} s, fastest {times[0]:.3f} s, slowest {times[-1]:.3f} s")
    print(f"spawn, K=2: {seconds(2, 'spawn'):.2f} s")


if __name__ == "__main__":
    main()
