"""Which numbers a step computes with: full precision, or matrix products in a format of 16 bits.

Mixed precision (Micikevicius et al., 2018) keeps weights, gradients and the optimizer in float32 and computes matrix
products on copies with fewer bits. bfloat16 has the range of float32 and 8 bits of precision; float16 has 11 bits of
precision and a small range, so that small gradients vanish unless the loss is scaled (`optimization.LossScaler`).
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from course_utils.stages import one_thread

PRECISIONS = ("fp32", "bf16", "fp16", "auto")
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: str = "cpu", work: Callable[[], object] | None = None) -> str:
    """The precision to train with: "fp32", "bf16" or "fp16".

    "auto" decides between fp32 and bf16 by a small measurement. On CPUs without instructions for bfloat16 its products
    are emulated and several times slower than those of float32; where they are fast, small products may still be slower
    than in float32, because every operand is converted first.

    Args:
        work: what "auto" measures, a layer of the model for example; by default a matrix product.

    Raises:
        ValueError: for a name that is none, and for fp16 on a CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise ValueError(
            "fp16 on a CPU: PyTorch computes its matrix products many times slower there than those of fp32. Use bf16, "
            "fp32, or auto, which measures which of the two is faster here"
        )
    if precision == "auto":
        return "bf16" if low_precision_pays(work or product(device), device) else "fp32"
    return precision


def low_precision_pays(work: Callable[[], object], device: str = "cpu", repetitions: int = 7) -> bool:
    """Whether work is faster in bfloat16 than in float32, on one thread: medians of repetitions that take turns."""
    seconds: dict[torch.dtype | None, list[float]] = {None: [], torch.bfloat16: []}
    with one_thread():
        for _ in range(1 + repetitions):
            for dtype, times in seconds.items():
                started = time.perf_counter()
                with autocast(dtype, device):
                    work()
                times.append(time.perf_counter() - started)
    return statistics.median(seconds[torch.bfloat16][1:]) < statistics.median(seconds[None][1:])


def product(device: str = "cpu", size: int = 256) -> Callable[[], object]:
    """A matrix product as something to measure."""
    matrix = torch.ones(size, size, device=device)
    return lambda: (matrix @ matrix)[0, 0].item()  # asking for a number waits until a GPU is done


def autocast(dtype: torch.dtype | None, device: str = "cpu", enabled: bool = True) -> AbstractContextManager:
    """A region in which PyTorch computes matrix products in `dtype`; None: no region at all."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype, enabled=enabled)
