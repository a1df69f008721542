"""What `course.py bench` runs: `bench` lists the measurements, `bench step_time` makes one."""

import runpy
import sys
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1]
MEASUREMENTS = {
    "step_time": "a step of the course's engine against one of PyTorch's, as a ratio",
    "checks_cost": "what the checks of a step cost, as a share of the step",
    "recording_cost": "what it costs to record a step, as a share of the step",
    "precision": "a step in bfloat16 against one in float32",
    "rematerialisation": "bytes kept and time of a step with recomputation",
    "launching": "starting K processes",
    "delay_line": "a step over a line of 20 ms; needs Linux and root",
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in MEASUREMENTS:
        print("course.py bench makes one of these measurements:")
        print("\n".join(f"  {name:17} {says}" for name, says in MEASUREMENTS.items()))
        return 0 if not arguments else 2
    sys.path.insert(0, str(COURSE))
    sys.argv = [arguments[0]]
    runpy.run_module(f"tests.benchmarks.{arguments[0]}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
