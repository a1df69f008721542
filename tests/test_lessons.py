"""What every lesson promises: how it opens and ends, how long it is, and that each claim is shown by a cell."""

import ast
import re
import statistics
from functools import cache
from pathlib import Path

import nbformat
import pytest

from course_utils import course_map

COURSE = Path(__file__).resolve().parents[1]
START = "00_start_here.ipynb"
LESSONS = sorted((COURSE / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FROM_02 = [path for path in LESSONS if path.name[:2] >= "02"]
# Definitions that a lesson makes and the package keeps: the same code in both.
KEPT = {
    # (lesson, name): module
    ("01", "padding_mask"): "transformer",
    ("01", "causal_mask"): "transformer",
    ("01", "target_mask"): "transformer",
    ("01", "sum_over_tokens"): "pipeline",
    ("03", "send"): "links",
    ("03", "receive"): "links",
    ("03", "exchange"): "links",
    ("03", "ping_pong"): "links",
    ("03", "fit_link"): "links",
    ("05", "even_sizes"): "number_words",
    ("05", "sum_over_tokens"): "pipeline",
    ("06", "gpipe"): "schedules",
    ("09", "gradient_norms"): "optimization",
    ("09", "clip_by_global_norm"): "optimization",
    ("10", "Noam"): "optimization",
}

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
each_from_02 = pytest.mark.parametrize("path", FROM_02, ids=lambda path: path.stem)


@cache
def notebook(path):
    return nbformat.read(path, as_version=4)


def cells_of(path, kind="", tag=""):
    """The cells of a notebook, all or those of a kind and with a tag."""
    return [cell for cell in notebook(path).cells if cell.cell_type.startswith(kind) and (not tag or tag in tags(cell))]


def tags(cell):
    return cell.metadata.get("tags", [])


def prose(path, tag=""):
    return "\n\n".join(cell.source for cell in cells_of(path, "markdown", tag))


def claims(path):
    """{claim: whether a cell shows it, by an assert or because its output is compared}"""
    found: dict[str, bool] = {}
    for cell in cells_of(path, "code"):
        for name in (tag.removeprefix("claim:") for tag in tags(cell) if tag.startswith("claim:")):
            asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source)))
            found[name] = found.get(name, False) or asserts or "nbval-check-output" in tags(cell)
    return found


def glossary():
    """{term: anchor}, from the headings of the glossary in lesson 00."""
    headings = re.findall(r"^#{3,} (.+)$", prose(COURSE / "notebooks" / START, "glossary"), re.M)
    return {term: term.replace(" ", "-") for term in headings}


# --- Opening ---------------------------------------------------------------------------------------------------------


@each_lesson
def test_a_lesson_says_first_what_it_gives_and_what_it_takes(path):
    opening = notebook(path).cells[0]
    title = course_map.lesson(path.name[:2]).title
    assert tags(opening) == ["opening"] and opening.source.startswith(f"# {path.name[:2]} · {title}\n")
    assert course_map.lesson(path.name[:2]).file == path.stem
    for part in ("**You will be able to**", "**You need**"):
        assert part in opening.source
    read, run = re.search(r"\*\*Minutes:\*\* (\d+) to read, (\d+) to run", opening.source).groups()
    assert int(read) + int(run) <= 45
    assert len(re.findall(r"\]\(00_start_here\.ipynb#", opening.source)) <= 6 and "**New terms:**" in opening.source


@each_lesson
def test_a_lesson_shows_where_it_stands(path):
    cell = notebook(path).cells[1]
    assert tags(cell) == ["where"]
    assert cell.source == f'from course_utils.course_map import where\n\nwhere("{path.name[:2]}")'


@pytest.mark.parametrize("path", sorted((COURSE / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_term_is_in_the_glossary(path):
    anchors = set(glossary().values())
    assert all(anchor == anchor.lower() for anchor in anchors), (
        "GitHub's anchors are in lower case, JupyterLab's as written"
    )
    for anchor in re.findall(r"\]\((?:00_start_here\.ipynb)?#([^)]+)\)", prose(path)):
        assert anchor in anchors, f"{path.name} links to #{anchor}; add that heading to the glossary"


def test_the_glossary_has_each_term_once_with_a_sentence():
    parts = re.split(r"^#{3,} (.+)$", prose(COURSE / "notebooks" / START, "glossary"), flags=re.M)[1:]
    terms = parts[::2]
    assert len(terms) == len(set(terms)) >= 40
    for term, text in zip(terms, parts[1::2], strict=True):
        assert len(text.split()) >= 5, term


# --- Length ----------------------------------------------------------------------------------------------------------


@each_lesson
def test_a_lesson_is_short(path):
    words = sum(len(cell.source.split()) for cell in cells_of(path, "markdown") if "glossary" not in tags(cell))
    assert words <= 2000
    lines = [cell.source.count("\n") + 1 for cell in cells_of(path, "code")]
    assert statistics.median(lines) < 9, lines
    assert max(lines) <= 30 and sum(n > 20 for n in lines) <= max(1, len(lines) // 10), lines


# --- Doing -----------------------------------------------------------------------------------------------------------


@each_lesson
def test_the_heart_is_first_for_the_reader_to_write(path):
    stubs, answers = cells_of(path, "code", "stub"), cells_of(path, "code", "answers")
    asked = re.findall(rf'check\("({path.name[:2]}\.\w+)"', "\n".join(cell.source for cell in stubs))
    answered = re.findall(rf'check\("({path.name[:2]}\.\w+)"', "\n".join(cell.source for cell in answers))
    assert asked and sorted(set(asked)) == sorted(set(answered))
    for cell in stubs:
        assert "your turn" in cell.source and "nbval-check-output" in tags(cell)
        assert "not written yet" in text_of(cell)
    for cell in answers:
        assert "check(" not in cell.source or ": right. " in text_of(cell)
    assert cells_of(path, "markdown", "stub") and cells_of(path, "markdown", "answers")


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@each_lesson
def test_a_prediction_comes_before_the_outcome(path):
    sources = [cell.source for cell in cells_of(path, "code")]
    made = [i for i, source in enumerate(sources) if re.search(r"= predict\(", source)]
    settled = [i for i, source in enumerate(sources) if ".settle(" in source]
    assert made and settled and min(made) < min(settled)
    calls = [node for source in sources for node in ast.walk(ast.parse(source)) if is_call(node, "predict")]
    for call in calls:
        values = [keyword.value for keyword in call.keywords if keyword.arg == "value"]
        assert len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is None


def is_call(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


@each_from_02
def test_there_is_a_mistake_that_users_made(path):
    assert cells_of(path, "code", "mistake")
    assert re.search(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull|discussions)/\d+\)", prose(path))


@each_from_02
def test_the_fingerprint_is_shown_and_compared(path):
    cells = cells_of(path, "code", "fingerprint")
    assert cells
    for cell in cells:
        assert "assert" in cell.source and re.search(r"\b[0-9a-f]{12}\b", text_of(cell))
        assert "nbval-check-output" not in tags(cell)


@each_from_02
def test_a_picture_is_computed_in_a_cell_of_its_own(path):
    cells = [
        cell
        for cell in cells_of(path, "code")
        if any(is_call(node, "show") for node in ast.walk(ast.parse(cell.source)))
    ]
    assert cells
    for cell in cells:
        assert "assert" not in cell.source and "nbval-check-output" not in tags(cell)
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)


@each_lesson
def test_there_is_a_sentence_under_every_picture(path):
    cells = notebook(path).cells
    for cell, after in zip(cells[2:], cells[3:], strict=False):
        shown = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        assert not shown or after.cell_type == "markdown", cell.source


@each_lesson
def test_nothing_unexplained_is_on_the_screen(path):
    for cell in cells_of(path, "code"):
        for output in cell.outputs:
            assert output.get("name") != "stderr", cell.source
            assert output.output_type != "error" or "raises-exception" in tags(cell), cell.source
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert "\r" not in text and "Warning" not in text, cell.source


# --- Ending ----------------------------------------------------------------------------------------------------------


@each_lesson
def test_every_claim_of_the_summary_is_shown(path):
    (summary,) = cells_of(path, "markdown", "summary")
    assert summary.source.startswith("## What you know now")
    bullets = re.findall(r"^- (.+(?:\n  .+)*)", summary.source, re.M)
    assert len(bullets) >= 3
    assert all(bullet.endswith(" -->") for bullet in bullets), "a bullet ends with the cell that shows it"
    named = re.findall(r"<!-- shown: ([\w-]+) -->", "\n".join(bullets))
    shown = claims(path)
    assert sorted(named) == sorted(shown), "a place in the summary for every claim, and a claim for every place"
    assert all(shown.values()), [name for name, good in shown.items() if not good]


@each_lesson
def test_a_lesson_ends_with_what_is_kept_asked_and_cited(path):
    cells = [cell for cell in notebook(path).cells if "glossary" not in tags(cell)]
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    order = ["## What you know now", "## Questions", "## Answers", "## References"]
    places = [text.index(f"\n{heading}\n") for heading in order]
    assert places == sorted(places)
    for part in ("**Kept for later:**", "**Practise:**", "**Next:**"):
        assert part in prose(path, "summary")
    asked = re.findall(r"^\d+\. ", text[places[1] : places[2]], re.M)
    answered = re.findall(r"^\d+\. ", text[places[2] : places[3]], re.M)
    assert 3 <= len(asked) == len(answered) <= 5
    assert re.search(r"\]\(https?://|<https?://|arXiv", text[places[3] :])


# --- What a lesson defines and the package keeps ---------------------------------------------------------------------


def normalised(source, name):
    """A definition without its docstrings and annotations, as text."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    for node in ast.walk(found[-1]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
        for field in ("annotation", "returns"):
            if hasattr(node, field):
                setattr(node, field, None)
    return ast.unparse(found[-1])


@pytest.mark.parametrize("lesson, name", KEPT, ids=lambda value: value)
def test_what_a_lesson_defines_the_package_keeps(lesson, name):
    (path,) = (path for path in LESSONS if path.name.startswith(lesson))
    sources = [
        cell.source for cell in cells_of(path, "code") if f" {name}(" in cell.source and "stub" not in tags(cell)
    ]
    kept = (COURSE / f"course_utils/{KEPT[lesson, name]}.py").read_text("utf-8")
    assert normalised("\n".join(sources), name) == normalised(kept, name)


# --- The cheat sheet -------------------------------------------------------------------------------------------------


def test_the_cheat_sheet_says_what_the_lessons_say():
    sheet = prose(COURSE / "notebooks/cheat_sheet.ipynb")
    (hang,) = (path for path in LESSONS if path.name.startswith("03"))
    questions = re.search(r"## Five questions for a hang\n(.*?) Whatever", prose(hang))[1].split("? ")
    assert len(questions) == 5
    for question in questions:
        assert question.strip(" ?").lower() in sheet.lower()
    for formula in ("(K − 1) / (M + K − 1) of the *total* time", "(K − 1) / M of the *ideal* time"):
        assert formula in sheet
    for number in ("02", "03", "05", "07", "08", "09", "10", "12"):
        assert f"[{number}]({course_map.lesson(number).file}.ipynb)" in sheet


def test_the_bytes_per_parameter_of_the_cheat_sheet_add_up():
    rows = re.findall(r"^\| .*(?:fp32|16-bit).* \|$", prose(COURSE / "notebooks/cheat_sheet.ipynb"), re.M)
    for row in rows:
        weight, gradient, adam, in_all = [sum(map(int, cell.split("+"))) for cell in row.strip("|").split("|")[1:]]
        assert weight + gradient + adam == in_all
    assert len(rows) == 2


# --- The rules themselves can fail -----------------------------------------------------------------------------------


def test_a_claim_needs_an_assert_or_a_comparison(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("print(1)", metadata={"tags": ["claim:bare"]}),
        nbformat.v4.new_code_cell("assert 1", metadata={"tags": ["claim:asserted"]}),
        nbformat.v4.new_code_cell("1", metadata={"tags": ["claim:compared", "nbval-check-output"]}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert claims(tmp_path / "a.ipynb") == {"bare": False, "asserted": True, "compared": True}


def test_definitions_are_compared_without_what_only_explains():
    lesson = 'def f(x):\n    """Short."""\n    return x + 1'
    assert normalised(lesson, "f") == normalised(
        'def f(x: int) -> int:\n    """Long.\n\n    More."""\n    return x + 1', "f"
    )
    assert normalised(lesson, "f") != normalised("def f(x):\n    return x + 2", "f")
