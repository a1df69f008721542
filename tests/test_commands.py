"""The command line: what `course.py train` prints, writes and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from course_utils import commands, reference
from course_utils.commands import main
from course_utils.recipes import RECIPES

TRAIN = ["train", "--steps", "2", "--batch-size", "16", "--micro-batches", "4"]
HAS_GPU = torch.cuda.is_available()


@pytest.mark.processes
@pytest.mark.smoke
def test_train_writes_its_result(tmp_path, capsys):
    assert main([*TRAIN, "--out", str(tmp_path / "new folder")]) == 0
    result = json.loads((tmp_path / "new folder" / "result.json").read_text())
    assert {key: result[key] for key in ("held_out", "stages", "micro_batches", "steps", "seed")} == {
        "held_out": 500,
        "stages": 2,
        "micro_batches": 4,
        "steps": 2,
        "seed": 0,
    }
    assert 0 <= result["exact_match"] <= 1 and result["seconds"] > 0 and len(result["fingerprint"]) == 12
    assert "held-out numbers exactly right" in capsys.readouterr().out
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "new folder").stat().st_mode == (tmp_path / "usual").stat().st_mode  # results are for others too


@pytest.mark.processes
def test_train_goes_on_where_it_was_saved(tmp_path, capsys):
    folder = ["--checkpoints", str(tmp_path / "run")]
    assert main([*TRAIN, *folder]) == 0
    assert main([*TRAIN, *folder]) == 2
    assert "is a checkpoint of step 2: resume from it" in capsys.readouterr().err
    more = ["train", "--steps", "3", "--batch-size", "16", "--micro-batches", "4", "--stages", "3"]
    assert main([*more, *folder, "--resume"]) == 0
    assert "resumed after step 2: 1 steps in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_00000002", "step_00000003"]


def test_options_replace_fields_of_the_recipe(tmp_path, monkeypatch):
    configs = []

    def stop(config, **options):
        configs.append(config)
        raise ValueError("seen")

    monkeypatch.setattr(commands, "train", stop)
    main(["train"])
    main(
        ["train", "--recipe", "article", "--precision", "bf16", "--rematerialisation", "always", "--wire-dtype", "bf16"]
    )
    main(["train", "--recipe", "article", "--seed", "0", "--steps", "7"])
    article = RECIPES["article"]
    assert configs[0] == RECIPES["default"]
    assert configs[1] == replace(article, precision="bf16", rematerialisation="always", wire_dtype="bf16")
    assert configs[2] == replace(article, steps=7)


@pytest.mark.parametrize(
    ("environment", "run", "tells"),
    [
        ({}, commands.launch, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, commands.launch, True),  # a shell that srun has started
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, commands.run_this_rank, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, commands.run_this_rank, False),
    ],
)
def test_a_rank_that_a_launcher_has_started_joins_the_others(monkeypatch, tmp_path, capsys, environment, run, tells):
    """Of those ranks only the last one, which has the losses, prints and writes."""
    seen = []

    def stop(config, **options):
        seen.append(options["run"])
        raise ValueError("seen")

    monkeypatch.setattr(commands, "train", stop)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main([*TRAIN, "--out", str(tmp_path / "out")])
    assert seen == [run]
    assert bool(capsys.readouterr().out) == tells == (tmp_path / "out").exists()


def test_too_few_ranks_are_told_before_anything_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(commands, "train", None)  # not even called
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    folders = ["--out", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "run")]
    assert main([*TRAIN, "--stages", "3", *folders]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is 2, but there are 3 ranks to run") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stages", "0"], "8 blocks into 0 stages"),
        (["--stages", "99"], "8 blocks into 99 stages"),
        (["--micro-batches", "1000"], "micro-batches is 1000"),
        (["--steps", "-3"], "steps is -3"),
        (["--precision", "fp16"], "fp16 on a CPU"),
        pytest.param(["--device", "cuda"], "no CUDA device here", marks=pytest.mark.skipif(HAS_GPU, reason="has one")),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, named):
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_out_before_the_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main([*TRAIN, "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert f"cannot write to --out {tmp_path / 'file'}" in error and "name a folder that can be written" in error
    assert main([*TRAIN, "--checkpoints", str(tmp_path / "file")]) == 2
    assert f"cannot write to --checkpoints {tmp_path / 'file'}" in capsys.readouterr().err


def test_an_old_result_survives_a_failing_write(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    commands.write_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        commands.write_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.processes
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_stops_it_cleanly():
    process = subprocess.Popen(
        [sys.executable, "-m", "course_utils.commands", "train", "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background, such as these tests, ignore it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert "2 stages" in process.stdout.readline()
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped; no process was left behind" in error
    assert "Traceback" not in error


def test_fingerprint_prints_its_table(monkeypatch, capsys):
    table = {"M=1": {"one device": "aa", "threads": "aa"}, "M=2": {"one device": "bb"}}
    monkeypatch.setattr(reference, "fingerprint_table", lambda: table)
    assert main(["fingerprint"]) == 0
    printed = capsys.readouterr().out
    assert "one device" in printed and "every column holds one string" in printed
    assert main(["fingerprint", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table
    monkeypatch.setattr(reference, "fingerprint_table", lambda: {"M=1": {"one device": "aa", "threads": "ab"}})
    assert main(["fingerprint"]) == 1
    assert "the columns differ" in capsys.readouterr().out


def test_the_table_covers_what_it_promises():
    rows = {name for name, _ in reference.runs(reference.EVEN["M=8 even"], even=True)}
    assert {"one device", "threads V=2 on 2 ranks", "processes V=2 on 2 ranks"} <= rows
    for stages in (1, 2, 3, 4):
        for schedule in ("naive", "gpipe", "1f1b"):
            assert f"threads K={stages} {schedule}" in rows
            assert stages == 1 or f"processes K={stages} {schedule}" in rows
    assert "processes K=1 gpipe" in rows
    assert any(row.endswith("recompute always") for row in rows)
    assert reference.COLUMNS["M=5 bf16"].precision == "bf16"
    assert any(row.startswith("torch's engine") and row.endswith("1f1b") for row in rows)
