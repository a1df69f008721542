"""Exercise units: notebooks as their texts give, tasks as the course promises, answers judged rightly."""

import ast
import io
import random
import threading
import tokenize
from pathlib import Path

import nbformat
import pytest

from course_utils import units
from course_utils._plain import take_apart
from course_utils.authoring import differences, student_differences
from course_utils.checks.tasks import LIMIT, examine, find_task, same, tasks_of, try_out
from tests.bank import all_answers

COURSE = Path(__file__).resolve().parents[1]
UNITS = list(units.units([]))
TASKS = [task for source, _, _ in UNITS for task in tasks_of(units.unit_of(source))]
ANSWERS = all_answers()
SEEDS = (0, 7)


def by_name(items):
    return {"ids": [item.full_name if hasattr(item, "full_name") else item.name for item in items]}


# --- The notebooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, solution, copy", UNITS, ids=[source.stem for source, _, _ in UNITS])
def test_a_unit_is_what_its_text_gives(source, solution, copy):
    again = f"run: python course.py build --units {units.unit_of(source)}"
    assert list(differences(source, solution)) == [], again
    assert list(student_differences(solution, copy)) == [], again


def test_nothing_else_lies_beside_the_units():
    for folder, there in (("solutions", {path for _, path, _ in UNITS}), ("exercises", {path for _, _, path in UNITS})):
        assert {path for path in (COURSE / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts} == there


@pytest.mark.parametrize("source, solution, copy", UNITS, ids=[source.stem for source, _, _ in UNITS])
def test_a_unit_has_each_of_its_tasks_once(source, solution, copy):
    tasks = tasks_of(units.unit_of(source))
    for kind in ("answer", "check"):
        found = [units.tagged(cell, kind) for cell in nbformat.read(copy, as_version=4).cells]
        assert [name for name in found if name] == [task.name for task in tasks]
    assert f"**Minutes:** {sum(task.minutes for task in tasks)}" in nbformat.read(copy, as_version=4).cells[0].source
    kinds = {task.kind for task in tasks}
    assert len(tasks) >= 2 and kinds == ({"transfer"} if units.unit_of(source) == "12" else {"rebuild", "transfer"})


def test_there_are_twelve_units_with_at_least_24_tasks():
    assert [units.unit_of(source) for source, _, _ in UNITS] == [f"{number:02}" for number in range(1, 13)]
    lessons = {path.stem for path in (COURSE / "notebooks").glob("*.ipynb")}
    assert {source.stem for source, _, _ in UNITS[:11]} < lessons and len(TASKS) >= 24


def tokens(text):
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    try:
        return [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skipped]
    except (tokenize.TokenError, IndentationError):
        return text.split()


def runs(text):
    words = tokens(text)
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def solution_text(cell):
    """What stands between BEGIN and END SOLUTION."""
    lines = cell.source.split("\n")
    begin = next(i for i, line in enumerate(lines) if units.BEGIN in line)
    end = next(i for i, line in enumerate(lines) if units.END in line)
    indent = len(lines[begin]) - len(lines[begin].lstrip())
    return "\n".join(line[indent:] for line in lines[begin + 1 : end])


@pytest.mark.parametrize("source, solution, copy", UNITS, ids=[source.stem for source, _, _ in UNITS])
def test_a_students_copy_has_no_text_of_a_solution(source, solution, copy):
    given = set().union(*(runs(cell.source) for cell in nbformat.read(copy, as_version=4).cells))
    for cell in nbformat.read(solution, as_version=4).cells:
        name = units.tagged(cell, "answer")
        if name and find_task(f"unit{units.unit_of(source)}.{name}").kind == "transfer":
            assert not runs(solution_text(cell)) & given, name
    assert "solution" not in str([cell.metadata.get("tags") for cell in nbformat.read(copy, as_version=4).cells])


# --- Tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, **by_name(TASKS))
def test_inputs_come_from_the_seed_alone(task):
    one, again, other = (str(list(map(str, task.cases(random.Random(seed))))) for seed in (1, 1, 2))
    assert one == again and one != other
    assert all("<" not in str(case) or " at 0x" not in str(case) for case in task.cases(random.Random(0)))


@pytest.mark.parametrize("task", TASKS, **by_name(TASKS))
def test_a_task_tells_what_a_learner_must_know(task):
    assert task.kind in ("rebuild", "transfer") and 1 <= task.difficulty <= 3 and task.points >= 1 and task.minutes >= 5
    assert len(task.hints) == 3 and all(len(hint) > 60 for hint in task.hints)
    assert "http" in task.hints[1] or ".ipynb" in task.hints[1], "the second hint has a link"
    assert all("def " not in hint and " = " not in hint for hint in task.hints), "no code in hints"


@pytest.fixture(scope="module")
def known():
    """{the shape of a function's or a class's tree: where it stands} of the package and the lessons."""
    files = [*(COURSE / "course_utils").rglob("*.py"), *(COURSE / "notebooks/sources").glob("*.py")]
    nodes = [(path.name, node) for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    kinds = ast.FunctionDef | ast.ClassDef
    return {(type(node), *shape(node)): f"{name}: {node.name}" for name, node in nodes if isinstance(node, kinds)}


@pytest.mark.parametrize("task", [t for t in TASKS if t.kind == "transfer"], ids=lambda task: task.full_name)
def test_the_answer_of_a_transfer_task_stands_nowhere(task, known):
    """By syntax trees without names, texts and annotations: neither in a lesson nor in a module."""
    source, solution, _ = next(unit for unit in UNITS if units.unit_of(unit[0]) == task.unit)
    cell = next(c for c in nbformat.read(solution, as_version=4).cells if units.tagged(c, "answer") == task.name)
    answer = next(node for node in ast.walk(ast.parse(cell.source)) if getattr(node, "name", "") == task.name)
    assert known.get((type(answer), *shape(answer))) is None


def shape(function):
    """The syntax tree of a body, names numbered in the order of their first use, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    numbers = {}
    text = []
    for statement in body:
        for node in ast.walk(statement):
            text.append(type(node).__name__)
            for field in ("id", "arg", "attr"):
                if isinstance(name := getattr(node, field, None), str):
                    text.append(str(numbers.setdefault(name, len(numbers))))
    return text


# --- Answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, **by_name(TASKS))
def test_the_bank_has_enough_answers(task):
    mine = [answer for answer in ANSWERS if f"unit{answer.task}" == task.full_name]
    assert sum(not answer.mistake for answer in mine) >= 2
    assert len({answer.mistake for answer in mine if answer.mistake}) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("answer", ANSWERS, **by_name(ANSWERS))
def test_an_answer_is_judged_rightly(answer):
    """On a learner's own inputs; right ones on others too (`feedback-report`, weekly, tries all on three seeds)."""
    task = find_task(f"unit{answer.task}")
    said = [examine(task, answer.answer, seed) for seed in (SEEDS[:1] if answer.mistake else SEEDS)]
    assert [v.passed for v in said] == [not answer.mistake] * len(said), said[0].text
    for verdict in said:
        assert verdict.mistake in ("", answer.mistake), verdict.text
        assert verdict.text.isprintable(), verdict.text


@pytest.mark.parametrize("answer", [a for a in ANSWERS if not a.mistake], ids=lambda answer: answer.name)
def test_what_came_can_leave_its_process(answer):
    """A grader's process hands on plain values and nothing else."""
    outcome = try_out(find_task(f"unit{answer.task}"), answer.answer, 0)
    assert outcome.kind == "values"
    take_apart(outcome.values, [])


def test_a_stub_is_met_with_a_friendly_sentence():
    for task in TASKS:

        def stub(*arguments):
            """To be written."""
            ...

        verdict = examine(task, stub)
        assert not verdict.passed and not verdict.written and "not written yet" in verdict.text


def test_an_endless_answer_ends():
    def endless(*arguments):
        while True:
            pass

    verdict = examine(find_task("unit06.at_most"), endless, limit=0.3)
    assert "still running after 0.3 s" in verdict.text and LIMIT <= 20


def test_an_endless_answer_on_ranks_leaves_nothing_running():
    def endless(gradients, p, tell):
        while True:
            pass

    assert "still running after 1 s" in examine(find_task("unit09.norm_of_all"), endless, limit=1.0).text
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rank")]


def test_values_are_the_same_only_if_they_are():
    assert same([1, 2.0], (1, 2.0)) and same(float("nan"), float("nan"))
    assert not same(True, 1) and not same([1], [1, 2]) and not same(1.0, 1.1, 0.01) and same(1.0, 1.001, 0.01)


# --- The teacher's guide ----------------------------------------------------------------------------------------------


def test_the_guide_has_a_card_for_each_unit():
    text = (COURSE / "solutions/README.md").read_text("utf-8")
    for source, _, _ in UNITS:
        tasks = tasks_of(units.unit_of(source))
        minutes, points = sum(task.minutes for task in tasks), sum(task.points for task in tasks)
        card = text.partition(f"### {units.unit_of(source)} · ")[2].partition("###")[0]
        assert f": {minutes} minutes, {points} points" in card, source.stem
        assert "**Objectives:**" in card and "**Usual misconceptions:**" in card
        assert all(f"`{task.name}` ({task.kind}, {task.minutes})" in card for task in tasks)
    assert "**nbgrader is no sandbox" in text and "docker run" in text and "GradeTasks.limit" in text
