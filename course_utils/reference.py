"""The promise of the course as a table: every way of running the same micro-batches gives the same fingerprint."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from course_utils.schedules import SCHEDULES, looped
from course_utils.threads import run_in_threads
from course_utils.torch_engine import TorchPipeline
from course_utils.training import TrainingConfig, TrainingResult, train, train_on_one_device
from course_utils.transformer import TransformerConfig

MODEL = TransformerConfig(d_model=32, heads=2, dropout=0.1)
STEPS = 20

# Batches that M does not divide, micro-batches padded to different lengths ...
RAGGED = {
    f"M={m}": TrainingConfig(
        micro_batches=m, batch_size=13, steps=STEPS, warm_up=10, model=MODEL, training_numbers=500, held_out=0
    )
    for m in (1, 2, 5, 8)
}
# ... also with matrix products in bfloat16 ...
LOW = {"M=5 bf16": replace(RAGGED["M=5"], precision="bf16")}
# ... and batches of one shape, for which torch's own engine is defined too.
EVEN = {
    f"M={m} even": replace(RAGGED["M=1"], micro_batches=m, batch_size=16, lowest=100_000, trim_padding=False)
    for m in (2, 8)
}

COLUMNS = RAGGED | LOW | EVEN

Run = Callable[[], TrainingResult]


def runs(config: TrainingConfig, even: bool) -> Iterator[tuple[str, Run]]:
    """The name of every way to run a configuration, and a function that does it."""
    yield "one device", lambda: train_on_one_device(config)
    for policy in ("always", "except_last"):
        recomputed = replace(config, stages=3, rematerialisation=policy)
        yield f"threads K=3 gpipe recompute {policy}", lambda cut=recomputed: train(cut, run=run_in_threads)  # type: ignore[misc]
    for stages in (1, 2, 3, 4):
        for name in SCHEDULES:
            cut = replace(config, stages=stages, schedule=name)
            yield f"threads K={stages} {name}", lambda cut=cut: train(cut, run=run_in_threads)  # type: ignore[misc]
    two_chunks = looped(2, 2, config.micro_batches)
    yield "threads V=2 on 2 ranks", lambda: train(config, two_chunks, run=run_in_threads)
    for stages in (1, 2, 3, 4):
        for name in SCHEDULES if stages > 1 else ("gpipe",):  # one process has no choice
            cut = replace(config, stages=stages, schedule=name)
            yield f"processes K={stages} {name}", lambda cut=cut: train(cut)  # type: ignore[misc]
    yield "processes V=2 on 2 ranks", lambda: train(config, two_chunks)
    for stages, name in ((2, "gpipe"), (3, "gpipe"), (2, "1f1b"), (3, "1f1b")):
        if even and (name == "gpipe" or config.micro_batches >= stages):
            cut = replace(config, stages=stages, schedule=name)
            yield f"torch's engine K={stages} {name}", lambda cut=cut: train(cut, engine=TorchPipeline)  # type: ignore[misc]


def column(name: str, steps: int = STEPS) -> dict[str, str]:
    """{row: fingerprint} of one column of the table."""
    config = replace(COLUMNS[name], steps=steps)
    return {row: run().fingerprint for row, run in runs(config, even=name in EVEN)}


def fingerprint_table() -> dict[str, dict[str, str]]:
    """{column: {row: fingerprint}}; columns are numbers of micro-batches and precisions, rows are ways to run them.

    20 steps of training with dropout, clipping and Noam's learning rate; gradients of every step and the final weights.
    """
    return {name: column(name) for name in COLUMNS}


def one_string_per_column(table: dict[str, dict[str, str]]) -> bool:
    """Whether the promise holds."""
    return all(len(set(column.values())) == 1 for column in table.values())
