"""What all tests share: one torch thread, repeatable examples, and which tests this machine cannot run."""

import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import settings

# A property test draws the same examples every time, so a red run can be repeated; time is judged by the budgets.
settings.register_profile("course", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("course")


def pytest_collection_finish(session: pytest.Session) -> None:
    """One thread, as on every stage of a pipeline: equal bits are promised for that. Torch is not imported for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cannot = {"gpu": why_no_gpu, "network": why_no_namespaces}
    for marker, why in cannot.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why() if marked else ""
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"


def why_no_namespaces() -> str:
    """Why this machine cannot make two network namespaces, or nothing; tried, because root alone does not tell."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if shutil.which("ip") is None:
        return "needs the command `ip` (package iproute2)"
    name = f"course-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""
