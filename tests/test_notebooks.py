"""Notebooks are what their texts give, and building one twice gives the same bytes."""

import base64
import re
import shutil
import struct
import zlib
from pathlib import Path

import nbformat
import pytest

from course_utils import authoring
from course_utils.authoring import AuthoringError, build, differences, lessons, normalise, pixels_only, read_text

COURSE = Path(__file__).resolve().parents[1]
TINY = COURSE / "tests/sources/07_tiny.py"
LESSONS = lessons([])
COPIED_TO_LEARNERS = [*(COURSE / "notebooks").glob("*.ipynb"), *(COURSE / "exercises").glob("*/*.ipynb")]


# --- The lessons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, notebook", LESSONS, ids=[source.stem for source, _ in LESSONS])
def test_a_lesson_is_what_its_text_gives(source, notebook):
    assert list(differences(source, notebook)) == [], f"run: python course.py build {source.stem[:2]}"


def test_every_lesson_has_a_text():
    notebooks = {path.stem for path in (COURSE / "notebooks").glob("*.ipynb")}
    assert notebooks == {source.stem for source, _ in LESSONS}


@pytest.mark.parametrize("path", COPIED_TO_LEARNERS, ids=lambda path: path.stem)
def test_a_link_leads_to_a_notebook_that_learners_have(path):
    """JupyterLab says nothing when a link leads nowhere."""
    prose = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", "\n".join(prose))):
        if re.match(r"https?://|#", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve()
        assert file in [path.resolve() for path in COPIED_TO_LEARNERS], f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}: there is no such heading"


def unit(name):
    """The address of a unit of exercises, from a lesson."""
    return f"../exercises/{name}/{name}.ipynb"


@pytest.mark.parametrize("source, notebook", LESSONS[1:12], ids=[source.stem for source, _ in LESSONS[1:12]])
def test_a_lesson_leads_to_its_exercises_and_to_the_next_one(source, notebook):
    summary = "".join(
        c.source for c in nbformat.read(notebook, as_version=4).cells if "summary" in c.metadata.get("tags", [])
    )
    following = LESSONS[[text for text, _ in LESSONS].index(source) + 1][1].name
    practise, _, after = summary.partition("**Next:**")
    link = f"Exercises: [unit {source.name[:2]}]({unit(source.stem)})"
    assert f"{link}." in practise and f"]({following})" in after


def anchors(path):
    """What can stand behind # in a link to a notebook: JupyterLab's form of its headings."""
    prose = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    return {heading.strip().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", "\n".join(prose), re.M)}


@pytest.mark.parametrize("path", COPIED_TO_LEARNERS, ids=lambda path: path.stem)
def test_a_mistake_made_on_purpose_is_compared(path):
    """Without a comparison nobody notices when such a cell raises nothing."""
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        assert "raises-exception" not in tags or "nbval-check-output" in tags, cell.source


# --- Building --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(text, notebook): a tiny lesson, built."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "sources").mkdir()
    source = Path(shutil.copy(TINY, folder / "sources"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(COURSE))
        build(source, folder / "07_tiny.ipynb")
    return source, folder / "07_tiny.ipynb"


@pytest.fixture
def cells(built):
    return nbformat.read(built[1], as_version=4).cells


def find(cells, text):
    return next(cell for cell in cells if text in cell.source)


def test_a_built_notebook_is_what_its_text_gives(built):
    assert list(differences(*built)) == []


def test_building_again_gives_the_same_bytes(built, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(COURSE))
    before = built[1].read_bytes()
    build(*built)
    assert built[1].read_bytes() == before
    assert [path.name for path in built[1].parent.iterdir() if path.is_file()] == [built[1].name]


def test_ids_are_given_or_come_from_the_text(built, cells):
    assert find(cells, "sum(range(5))").id == "sum"
    ids = [cell.id for cell in cells]
    assert len(set(ids)) == len(ids)
    text = built[0].read_text().replace("# # A tiny lesson", "# # A small lesson")
    changed = built[0].with_name("08_changed.py")
    changed.write_text(text)
    new = [cell.id for cell in read_text(changed).cells]
    changed.unlink()
    assert new[0] != ids[0] and new[1:] == ids[1:]


def test_the_same_id_twice_is_an_error(tmp_path):
    source = tmp_path / "01_twice.py"
    source.write_text('# %% id="a"\n1\n\n# %% id="a"\n2\n')
    with pytest.raises(AuthoringError, match="the id 'a' is given to two cells"):
        read_text(source)


def test_counts_are_in_order_and_results_carry_theirs(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    result = find(cells, "sum(range(5))").outputs[0]
    assert (result.data["text/plain"], result.execution_count) == ("10", 1)


def test_counts_begin_at_one_whatever_the_kernel_did_before():
    cells = [
        nbformat.v4.new_code_cell(source, execution_count=count) for source, count in [("1", 5), ("", None), ("2", 9)]
    ]
    cells[2].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=9)]
    normalise(nbformat.v4.new_notebook(cells=cells))
    assert [cell.execution_count for cell in cells] == [1, None, 2] and cells[2].outputs[0].execution_count == 2


def test_nothing_of_the_run_is_left_in_the_notebook(built, cells):
    text = built[1].read_text("utf-8")
    assert "widget-view" not in text and "widgets" not in nbformat.read(built[1], as_version=4).metadata
    assert find(cells, "IntSlider").outputs == []
    assert find(cells, "object()").outputs[0].data["text/plain"] == "<object at 0x...>"
    assert str(COURSE) not in text and 'execution"' not in text
    assert len(find(cells, "two lines").outputs) == 1  # written in two pieces, kept as one


def test_a_picture_keeps_its_pixels_and_loses_its_version(cells):
    output = next(out for out in find(cells, "plt.plot").outputs if "image/png" in out.data)
    png = base64.b64decode(output.data["image/png"])
    assert b"Matplotlib" not in png and b"IDAT" in png and png.endswith(b"IEND\xaeB`\x82")


def test_pixels_only_removes_whole_chunks():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start, end = authoring.PNG_SIGNATURE + chunk(b"IHDR", bytes(13)), chunk(b"IDAT", b"pixels") + chunk(b"IEND", b"")
    assert pixels_only(start + chunk(b"tEXt", b"Software\0x") + chunk(b"tIME", bytes(7)) + end) == start + end
    with pytest.raises(AuthoringError, match="no PNG"):
        pixels_only(b"GIF89a")


def test_a_sentence_that_a_widget_leaves_is_kept():
    output = nbformat.v4.new_output("display_data", {authoring.WIDGET: {}, "text/plain": "Stage 1 waits for stage 0."})
    bare = nbformat.v4.new_output("display_data", {authoring.WIDGET: {}, "text/plain": "IntSlider(value=10)"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=[output, bare])])
    normalise(notebook)
    assert [dict(out.data) for out in notebook.cells[0].outputs] == [{"text/plain": "Stage 1 waits for stage 0."}]


def test_folders_of_the_machine_become_short():
    file = COURSE / "course_utils" / "pipeline.py"
    told = authoring.without_places(f"File {file}:3, in /tmp/ipykernel_17/2.py")
    assert told == f"File {Path('course_utils/pipeline.py')}:3, in cell"


@pytest.mark.parametrize(
    "tag, code, message", [("", "1 / 0", "division by zero"), ("raises-exception", "1", "raised nothing")]
)
def test_a_cell_that_does_not_do_as_its_tag_says_leaves_the_old_notebook(tmp_path, tag, code, message):
    source = tmp_path / "01_wrong.py"
    source.write_text(f'# %% tags=["{tag or "x"}"]\n{code}\n')
    target = tmp_path / "01_wrong.ipynb"
    target.write_text("as it was")
    with pytest.raises(AuthoringError, match=message):
        build(source, target)
    assert target.read_text() == "as it was"


# --- Finding an edit by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["source", "tags", "id", "removed", "count", "metadata"])
def test_a_notebook_that_was_edited_by_hand_is_found(built, tmp_path, edit):
    notebook = nbformat.read(built[1], as_version=4)
    cell = notebook.cells[1]
    if edit == "source":
        cell.source += "\n# a remark"
    elif edit == "tags":
        cell.metadata.tags = []
    elif edit == "id":
        cell.id = "another"
    elif edit == "removed":
        del notebook.cells[-1]
    elif edit == "count":
        cell.execution_count = 9
    else:
        notebook.metadata.language_info["version"] = "3.11.7"
    nbformat.write(notebook, tmp_path / "07_tiny.ipynb")
    assert len(list(differences(built[0], tmp_path / "07_tiny.ipynb"))) == 1


def test_a_missing_notebook_is_found(built, tmp_path):
    assert list(differences(built[0], tmp_path / "07_tiny.ipynb")) == ["07_tiny.ipynb is missing"]


def test_the_command(built, monkeypatch, capsys):
    monkeypatch.setattr(authoring, "NOTEBOOKS", built[1].parent)
    monkeypatch.setattr(authoring.lessons, "__defaults__", (built[1].parent,))
    assert authoring.main(["07", "--check"]) == 0
    assert "as its text" in capsys.readouterr().out
    assert authoring.main(["12"]) == 1
    assert "start with '12'; there are: 07_tiny" in capsys.readouterr().err
