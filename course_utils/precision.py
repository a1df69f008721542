"""Which numbers a step computes with: full precision, or matrix products in a format of 16 bits.

Mixed precision (Micikevicius et al., 2018) keeps weights, gradients and the optimizer in float32 and computes matrix
products on copies with fewer bits. bfloat16 has the range of float32 and 8 bits of precision; float16 has 11 bits of
precision and a small range, so that small gradients vanish unless the loss is scaled (`optimization.LossScaler`).
"""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from course_utils.stages import one_thread

PRECISIONS = ("fp32", "bf16", "fp16", "auto")
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: str = "cpu") -> str:
    """The precision to train with: "fp32", "bf16" or "fp16".

    "auto" decides between fp32 and bf16 by a small measurement: on CPUs without instructions for bfloat16 its products
    are emulated and several times slower than those of float32.

    Raises:
        ValueError: for a name that is none, and for fp16 on a CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise ValueError(
            "fp16 on a CPU: PyTorch computes its matrix products there without vector instructions, many times slower "
            "than in fp32. Use bf16, fp32, or auto, which measures which of the two is faster here"
        )
    if precision == "auto":
        return "bf16" if time_of_product(torch.bfloat16, device) < time_of_product(torch.float32, device) else "fp32"
    return precision


def autocast(dtype: torch.dtype | None, device: str = "cpu", enabled: bool = True) -> AbstractContextManager:
    """A region in which PyTorch computes matrix products in `dtype`; None: no region at all."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype, enabled=enabled)


def time_of_product(dtype: torch.dtype, device: str = "cpu", size: int = 256, repetitions: int = 5) -> float:
    """Seconds of one (size, size) matrix product on one thread: the median of `repetitions` after one to warm up."""
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    with one_thread():
        for _ in range(1 + repetitions):
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # asking for a number waits until a GPU is done
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
