"""The five runs of lesson 12 show what a person on call would need, and nothing is left of them."""

import json
import tempfile

import pytest

from course_utils import mystery
from course_utils.mystery import CASES, CAUSES, Evidence, Mystery, finish, mysteries, observe, reveal, start


@pytest.mark.processes
@pytest.mark.slow
def test_each_run_shows_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = mysteries()
    assert list(tmp_path.iterdir()) == [], "copies of the engine are left"
    assert list(runs) == ["A", "B", "C", "D", "E"]

    few, slow = runs["A"].timeline, runs["D"].timeline
    assert few.bubble_of_total > 0.55 and max(few.utilisation(r) for r in range(4)) < 0.45
    assert max(range(4), key=slow.utilisation) == 2 and slow.utilisation(2) > 1.5 * slow.utilisation(1)

    border, healthy = runs["B"].seen, runs["B"].healthy
    assert border.losses[0] == healthy.losses[0] and border.fingerprint != healthy.fingerprint
    ratios = [right / wrong for right, wrong in zip(healthy.norms[0], border.norms[0], strict=True)]
    assert ratios == pytest.approx([16, 4, 1], rel=1e-5)

    late, healthy = runs["E"].seen, runs["E"].healthy
    assert late.skipped == healthy.skipped and late.skipped.index(True) == 2 and sum(late.skipped) == 1
    assert late.rates[:3] == healthy.rates[:3] and late.rates[3] > healthy.rates[3] == healthy.rates[2]
    assert late.fingerprint != healthy.fingerprint

    assert "both wait, this is a deadlock" in runs["C"].seen.error and not runs["C"].healthy.error
    for run in runs.values():
        assert str(run).startswith(f"run {run.letter}: K=") and CASES[run.letter].cause not in str(run)


def test_healthy_runs_have_one_device_s_fingerprint():
    """Whatever the number of stages and their places; the one with an overflow is another run."""
    strings = {letter: observe(letter).fingerprint for letter in "BCE"}
    assert strings["B"] == strings["C"] != strings["E"]
    assert mystery.train(mystery.CONFIG, run=mystery.run_in_threads).fingerprint == strings["B"]


@pytest.mark.parametrize("letter", CASES)
def test_a_cause_is_one_of_those_that_are_offered_and_is_revealed(letter):
    assert CASES[letter].cause in CAUSES and len(CAUSES) >= 10
    text = reveal(letter)
    assert text.startswith(f"{letter}: {CASES[letter].cause}. ")
    assert ("emulated" in text.lower()) != ("    - " in text and "    + " in text and "#" in text)


def test_without_the_museum_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(mystery, "COURSE", tmp_path)
    with pytest.raises(FileNotFoundError, match="museum is not there: these runs need the whole course"):
        mysteries()


@pytest.mark.processes
def test_a_run_that_fails_otherwise_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "B", CASES["B"])
    process = start("B", tmp_path / "B")
    process.kill()
    with pytest.raises(RuntimeError, match="run B failed in another way than it should"):
        finish("B", process)


def test_a_run_that_does_not_end_is_ended(monkeypatch):
    class Endless:
        returncode = None

        def communicate(self, timeout):
            raise mystery.subprocess.TimeoutExpired("run", timeout)

    with pytest.raises(RuntimeError, match="run B did not end within 120 s: run the cell again"):
        finish("B", Endless())


def test_evidence_travels_as_text():
    evidence = Evidence("abc", [1.5], [0.1], [True], [[float("inf"), 2.0]])
    assert Evidence(**json.loads(json.dumps(vars(evidence)))) == evidence
    shown = str(Mystery("B", mystery.gpipe(2, 4), None, evidence, evidence))
    assert "inf" in shown and "yes" in shown and "norms, stage 1" in shown
