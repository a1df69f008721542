"""Run guards in copies of the engine: `python guarding.py`, two copies at a time.

A line of its input is JSON: {"folder": of the copy, "chosen": [guards to run; none: all of them]}. Each copy is run in
a fork of this process, which has loaded torch and nothing of the course: what would take seconds to start takes none.
For every copy a line of JSON comes out: {"folder": ..., "seconds": ..., "guards": {guard: [kind of the error, its
message]}}, with the guards that failed alone; "guards" is null if the copy took longer than its limit and was killed,
or died.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy  # noqa: F401  all of these are loaded here, once
import pytest  # noqa: F401
import torch._dynamo
import torch.distributed  # noqa: F401

AT_ONCE = 2
LIMIT = 100.0  # seconds for the guards of one copy, which take about two; in a loop without an end it is killed


def run_guards(folder: str, chosen: list[str]) -> None:
    """In the fork: import the guards of the copy, with the copy's engine, and write down which fail."""
    sys.path[:0] = [folder]
    os.chdir(folder)
    torch.set_num_threads(1)
    failed: dict[str, tuple[str, str]] = {}
    try:
        from tests import test_guards

        guards = {name: guard for name, guard in vars(test_guards).items() if name.startswith("test_")}
        guards = {name: guards[name] for name in chosen} if chosen else guards
    except Exception:
        failed["import"] = ("ImportError", traceback.format_exc())
        guards = {}
    for name, guard in guards.items():
        try:
            guard()
        except Exception as error:
            failed[name] = (type(error).__name__, str(error))
    result = {"guards": failed, "ran": len(guards), "of": getattr(sys.modules.get("course_utils"), "__file__", "")}
    part = Path(folder, "result.part")
    part.write_text(json.dumps(result))
    part.rename(Path(folder, "result.json"))


def start(folder: str, chosen: list[str]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(Path(folder, "output.txt"), os.O_CREAT | os.O_WRONLY, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run_guards(folder, chosen)
            status = 0
        finally:
            os._exit(status)  # with whatever threads a bug has left
    return child


def main() -> None:
    waiting, running = [json.loads(line) for line in sys.stdin if line.strip()], dict[int, tuple[str, float]]()
    caller = os.getppid()
    while waiting or running:
        if os.getppid() != caller:  # it has been killed: nobody is left who would read a result
            for child in running:
                os.kill(child, signal.SIGKILL)
            return
        while waiting and len(running) < AT_ONCE:
            folder, chosen = (request := waiting.pop(0))["folder"], request["chosen"]
            running[start(folder, chosen)] = folder, time.monotonic()
        for child, (folder, began) in list(running.items()):
            seconds = time.monotonic() - began
            if seconds > LIMIT:
                os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0 if seconds > LIMIT else os.WNOHANG)[0] == child:
                del running[child]
                result = Path(folder, "result.json")
                told = json.loads(result.read_text()) if result.exists() else {"guards": None}
                print(json.dumps({"folder": folder, "seconds": seconds, **told}), flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
