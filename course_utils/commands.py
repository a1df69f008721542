"""The commands that `python course.py train` and `fingerprint` hand on to, inside the course's environment.

`train` also runs on many machines: started by torchrun or by Slurm's srun, each process is one rank (`torchrun.py`):

    torchrun --nnodes 2 ... -m course_utils.commands train --stages 2
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from course_utils.checkpoint import Checkpoints
from course_utils.devices import DEVICES
from course_utils.jobs import job_for, job_from
from course_utils.precision import LOW_PRECISION, PRECISIONS
from course_utils.processes import StageError, launch
from course_utils.recipes import RECIPES, with_precision
from course_utils.schedules import POLICIES, SCHEDULES
from course_utils.torchrun import run_this_rank
from course_utils.training import Step, TrainingResult, train


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the result is the exit code: 0, 1 if it failed, 2 for bad input, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nstopped; no process was left behind", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="course.py")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train numbers to words over several stages")
    defaults = RECIPES["default"]

    def option(name: str, meaning: str, **how: Any) -> None:
        """An option that replaces a field of the recipe; `--batch-size` sets batch_size."""
        default = getattr(defaults, name[2:].replace("-", "_"))
        command.add_argument(name, help=f"{meaning} (default: {default})", default=None, **how)

    command.add_argument("--recipe", choices=RECIPES, default="default", help="what all other options start from")
    option("--stages", "number of stages, K", type=int)
    option("--micro-batches", "pieces of a batch, M", type=int)
    option("--schedule", "order of forwards and backwards", choices=SCHEDULES)
    option("--steps", "how often the weights change", type=int)
    option("--batch-size", "numbers per step", type=int)
    option("--seed", "of weights, batches and dropout", type=int)
    option("--device", "where the stages compute", choices=DEVICES)
    option("--precision", "of matrix products; auto measures", choices=PRECISIONS)
    option("--rematerialisation", "forwards that are computed again instead of kept", choices=POLICIES)
    option("--wire-dtype", "what messages are rounded to", choices=LOW_PRECISION)
    command.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="where to save; the newest two are kept")
    command.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where result.json goes")
    command.set_defaults(command=train_command)

    command = commands.add_parser("fingerprint", help="show that every way to train gives the same bits (some minutes)")
    command.add_argument("--json", action="store_true", help="{column: {row: string}}")
    command.set_defaults(command=fingerprint_command)
    return top


def train_command(options: argparse.Namespace) -> int:
    recipe = RECIPES[options.recipe]
    given = {name: value for name, value in vars(options).items() if hasattr(recipe, name) and value is not None}
    config = replace(recipe, **given)
    job = job_from() and job_for(config.stages)
    # Of the ranks of a job, the last one tells how it goes: it has the last stage, and so the losses as they come.
    tells = job is None or job.rank == job.world_size - 1
    if options.out is not None and tells:
        check_writable("--out", options.out)
    if options.checkpoints is not None:
        check_writable("--checkpoints", options.checkpoints, mode=0o700)  # as `Checkpoints` makes it
    config = with_precision(config)
    shape = f"{config.stages} stages, {config.micro_batches} micro-batches, schedule {config.schedule}"
    if tells:
        print(f"{shape}, {config.precision}", flush=True)
    form = "{n}/{total} [{remaining} left{postfix}]"  # a bar would leave no room for the figures in a terminal
    hidden = None if tells else True  # None: where standard error is no terminal
    with tqdm(total=config.steps, disable=hidden, bar_format=form, postfix="starting the stages") as bar:
        started, tokens = time.perf_counter(), 0

        def show(step: Step) -> None:
            nonlocal tokens
            tokens += step.tokens
            rate = tokens / (time.perf_counter() - started)
            bar.set_postfix_str(
                f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, "
                f"norm {step.gradient_norm:.2f}, {rate:,.0f} tokens/s"
            )
            bar.update(step.number + 1 - bar.n)

        result = train(
            config,
            run=launch if job is None else run_this_rank,
            on_step=show,
            checkpoints=options.checkpoints and Checkpoints(options.checkpoints, on_failure="continue"),
            save_every=options.save_every,
            resume=options.resume,
        )
    if not tells:
        return 0
    first = result.steps[0].number if result.steps else config.steps
    print(
        f"{f'resumed after step {first}: ' if options.resume and first else ''}"
        f"{len(result.steps)} steps in {result.seconds:.1f} s; "
        f"{result.exact_match:.1%} of {len(result.answers)} held-out numbers exactly right; "
        f"fingerprint {result.fingerprint}"
    )
    if options.out is not None:
        write_atomically(options.out / "result.json", summary(result))
        print(f"written: {options.out / 'result.json'}")
    return 0


def summary(result: TrainingResult) -> dict[str, Any]:
    """What result.json holds."""
    return {
        "exact_match": result.exact_match,
        "held_out": len(result.answers),
        "stages": result.config.stages,
        "micro_batches": result.config.micro_batches,
        "schedule": result.config.schedule,
        "device": result.config.device,
        "precision": result.config.precision,
        "rematerialisation": result.config.rematerialisation,
        "wire_dtype": result.config.wire_dtype,
        "steps": len(result.steps),
        "seconds": result.seconds,
        "seed": result.config.seed,
        "fingerprint": result.fingerprint,
    }


def check_writable(option: str, folder: Path, mode: int = 0o777) -> None:
    """Make the folder and try to write: better now than after the training. Raises OSError."""
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = f"cannot write to {option} {folder} ({error.strerror})"
        raise OSError(f"{why}; name a folder that can be written") from None


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def fingerprint_command(options: argparse.Namespace) -> int:
    from course_utils.reference import fingerprint_table, one_string_per_column  # loads torch's engine, a second

    table = fingerprint_table()
    if options.json:
        print(json.dumps(table, indent=2))
    else:
        rows = list(dict.fromkeys(row for column in table.values() for row in column))
        width = max(map(len, rows))
        print(" " * width, *(f"{column:>14}" for column in table))
        for row in rows:
            print(f"{row:<{width}}", *(f"{column.get(row, '-'):>14}" for column in table.values()))
    agree = one_string_per_column(table)
    if not options.json:
        print("every column holds one string" if agree else "the columns differ: something adds in another order")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
