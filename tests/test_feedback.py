"""The figures about the checks' feedback: what they count, that they can fail, and that those published hold."""

import ast
import re
from pathlib import Path

import pytest

from course_utils.checks.tasks import Mistake, Named, compare, examine, find_task
from tests import feedback
from tests.bank import Answer, all_answers, equivalents
from tests.mutants import mutants

COURSE = Path(__file__).resolve().parents[1]
ALL = feedback.all_mutants()


def test_mutants_differ_from_the_solution_and_from_each_other():
    text = "def f(a, b=1):\n    total = 0\n    for i in range(a):\n        if i > b:\n            total += g(i, 2)\n"
    text += "    return total\n"
    found = dict(mutants(text))
    assert len(found) == len(set(found.values())) > 12
    assert all(ast.parse(mutant) for mutant in found.values()) and ast.unparse(ast.parse(text)) not in found.values()
    rules = {change.partition(",")[0] for change in found}
    assert {"operator", "constant", "statement dropped", "arguments swapped", "off by one", "condition"} <= rules
    assert "operator, line 4, column 11: i > b -> i >= b" in found


def test_the_published_numbers_are_there():
    """Trying them all takes long (weekly, `course.py feedback-report`); that there are as many is seen at once."""
    there, published = {m.name for m in ALL}, feedback.published()
    listed = {f"{task}: {change}" for task, changes in equivalents().items() for change in changes}
    assert listed <= there, listed - there
    answers = all_answers()
    assert len(there - listed) >= published["mutants"] >= 250
    assert sum(bool(a.mistake) for a in answers) >= published["bank"]
    assert sum(not a.mistake for a in answers) >= published["right_answers"]
    assert all(len(reason.split()) > 3 for changes in equivalents().values() for reason in changes.values())


def test_the_readme_shows_what_is_published():
    text, published = (COURSE / "README.md").read_text("utf-8"), feedback.published()
    for key in ("false_accepts", "right_refused", "wrong_names"):
        assert published[key] == 0
    row = re.search(r"(\d+) mutants of the solutions and (\d+) wrong answers", text)
    assert (int(row[1]), int(row[2])) == (published["mutants"], published["bank"])
    assert f"{published['right_answers']} right answers" in text and f"{published['named_share']:.0%}" in text.replace(
        " %", "%"
    )


@pytest.mark.slow
def test_a_sample_of_the_mutants_is_refused():
    """One of a hundred in every run of the tests."""
    sample = ALL[7::100]
    listed = {f"{task}: {change}" for task, changes in equivalents().items() for change in changes}
    came = feedback.in_forks([lambda mutant=mutant: feedback.try_mutant(mutant) for mutant in sample])
    accepted = [m.name for m, result in zip(sample, came, strict=True) if result and result[0] and m.name not in listed]
    assert len(sample) >= 8 and accepted == []


# --- That the figures can be bad --------------------------------------------------------------------------------------


def test_a_check_that_accepts_anything_is_found_out():
    lazy = feedback.replace_judge(find_task("unit06.at_most"), lambda cases, came: "fine.")
    some = [feedback.Mutant(lazy, m.change, m.setup, m.text) for m in ALL if m.task.name == "at_most"][:12]
    found = feedback.report(some, [])
    assert found["false_accepts"] >= 3 and found["mutants"] >= 10


def test_a_message_that_misleads_is_found_out(monkeypatch):
    def misleads(cases, came):
        raise Named("GPipe", "that is GPipe.")

    task = feedback.replace_judge(find_task("unit06.at_most"), misleads)
    monkeypatch.setattr(feedback, "find_task", lambda name: task)
    answers = [Answer("06.at_most", lambda *sizes: 3, "a number"), Answer("06.at_most", lambda *sizes: 3)]
    found = feedback.report([], answers)
    assert (found["wrong_names"], found["right_refused"], found["false_accepts"]) == (len(feedback.SEEDS), 1, 0)


def test_what_shrinks_is_a_fault():
    good = {"false_accepts": 0, "right_refused": 0, "wrong_names": 0, "details": {"not_equivalent": []}}
    sizes = {key: feedback.published()[key] for key in ("mutants", "right_answers", "bank")}
    assert feedback.faults(good | sizes) == []
    assert "are published" in feedback.faults(good | sizes | {"bank": sizes["bank"] - 1})[0]
    assert feedback.faults(good | sizes | {"false_accepts": 1}) == ["false_accepts is 1"]


def test_a_mistake_is_named_only_if_it_alone_explains_all():
    double, add = (
        Mistake("doubled", "It is doubled.", lambda n: 2 * n),
        Mistake("plus 2", "2 is added.", lambda n: n + 2),
    )
    with pytest.raises(Named, match="It is doubled") as found:
        compare([2, 3], [4, 6], lambda n: n, [double, add])
    assert found.value.mistake == "doubled"
    for came, cases in (([4], [2]), ([4, 7], [2, 3])):  # both explain it; none does
        with pytest.raises(Exception, match="expected") as found:
            compare(cases, came, lambda n: n, [double, add])
        assert not isinstance(found.value, Named)


def test_what_is_no_schedule_is_refused():
    verdict = examine(find_task("unit06.at_most"), lambda *sizes: {"text": 3})
    assert not verdict.passed and "expected a Schedule" in verdict.text and "came a dict" in verdict.text
