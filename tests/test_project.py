"""The project around the course: what its files say about each other has to agree."""

import io
import re
import shutil
import subprocess
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

import course
from tests import oldest, run

COURSE = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((COURSE / "pyproject.toml").read_text("utf-8"))["project"]
# lessons 02 to 07 are cut from these
READ_IN_LESSONS = ["stages", "schedules", "validity", "simulation", "transfer"]
READ_IN_LESSONS += ["transports", "pipeline", "optimization", "timeline"]


def files_of_the_project() -> list[str]:
    """What git has, or would have after `git add .`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (COURSE / ".git").exists():
        pytest.skip("needs git and a clone")
    listed = subprocess.run(command, cwd=COURSE, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (COURSE / name).exists()]


# --- Files that name each other --------------------------------------------------------------------------------------


def test_at_most_18_entries_meet_the_eye():
    entries = {name.split("/")[0] for name in files_of_the_project()}
    visible = sorted(entry for entry in entries if not entry.startswith("."))
    assert len(visible) <= 18, visible


def test_make_knows_the_same_commands():
    text = (COURSE / "Makefile").read_text("utf-8")
    targets = dict(re.findall(r"^([\w-]+): ; @?\$\(PYTHON\) course\.py(.*)$", text, re.M))
    assert targets == {"help": ""} | {name: f" {name} $(ARGS)" for name in course.COMMANDS}


def test_ci_runs_the_test_command_and_nothing_else():
    text = (COURSE / ".ci/run").read_text("utf-8")
    assert 'exec "$python" course.py test' in text and not re.search(r"(?m)^[^#]*\bpip\b", text)
    assert (COURSE / ".ci/run").stat().st_mode & 0o100 or run.os.name == "nt"


def test_the_readme_names_the_two_commands():
    readme = COURSE / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    text = readme.read_text("utf-8")
    assert "python course.py lab" in text and "python course.py test" in text and "COURSE_TORCH_INDEX" in text


def test_the_readme_s_links_lead_somewhere_and_its_map_has_every_lesson():
    text = (COURSE / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", link)]
    assert [link for link in links if not (COURSE / link).exists()] == []
    for path in (COURSE / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{path.name}" in links, path.name


def test_the_workflow_calls_commands_that_exist():
    jobs = yaml.safe_load((COURSE / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = [line.split()[2] for line in lines if line.startswith("python course.py")]
    assert "bash .ci/run" in lines and {"test", "train", "soak", "feedback-report"} == set(called) <= set(
        course.COMMANDS
    )
    assert jobs["newest"]["env"] == {"COURSE_CONSTRAINTS": ""}
    weekly = "github.event_name == 'schedule' || github.event_name == 'workflow_dispatch'"
    on_mondays = [name for name, job in jobs.items() if job["if"] == weekly]
    assert on_mondays == ["newest", "oldest", "soak", "feedback", "weekly"]
    assert jobs["oldest"]["steps"][-1] == {"run": "python course.py test --oldest"}
    assert jobs["weekly"]["steps"][-1] == {"run": "python course.py test --weekly"}
    for path in (COURSE / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text("utf-8"))


def test_one_version():
    citation = yaml.safe_load((COURSE / "CITATION.cff").read_text("utf-8"))
    changelog = (COURSE / "CHANGELOG.md").read_text("utf-8")
    assert citation["version"] == PROJECT["version"] == re.search(r"^## (\S+)", changelog, re.M)[1]


def test_every_direct_dependency_is_pinned_in_one_place():
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    wanted += PROJECT["optional-dependencies"]["classroom"]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}
    pins = (COURSE / "constraints.txt").read_text("utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w.-]+)==\d\S*$", pins, re.M))
    assert names <= pinned, names - pinned
    conda = yaml.safe_load((COURSE / "environment.yml").read_text("utf-8"))["dependencies"]
    assert conda[1:] == ["pip", {"pip": ["-c constraints.txt", "-e ."]}]


def test_the_oldest_and_the_newest_python_agree():
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    assert "(3, 11, 1) <= sys.version_info < (3, 15)" in (COURSE / "course.py").read_text("ascii")


def test_no_file_names_a_machine_or_a_registry():
    """What a build may leave behind: a home folder, an address of packages. PyTorch's own public index is meant."""
    bad = re.compile(
        r"/root/|/home/\w|/Users/\w|C:\\\\Users|--extra-index-url|--find-links[ =]\S*[/:]|pypi\.org/simple"
    )
    for name in files_of_the_project():
        if (
            name.endswith((".py", ".md", ".txt", ".toml", ".yml", ".ipynb", ".cff"))
            and Path(name).name != Path(__file__).name
        ):
            found = bad.search((COURSE / name).read_text("utf-8"))
            assert not found, f"{name}: {found[0]}"


# --- What learners read stays small ----------------------------------------------------------------------------------


def lines_of_code(path: Path) -> int:
    """Lines that are not blank, not a comment and not part of a docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    fresh = True  # at the start of a statement, where a string alone is a docstring
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type in skipped:
            fresh = fresh or token.type == tokenize.NEWLINE
        elif token.type == tokenize.STRING and fresh:
            fresh = False
        else:
            lines.update(range(token.start[0], token.end[0] + 1))
            fresh = False
    return len(lines)


def test_lines_of_code_are_counted_as_meant(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""Doc.\n\nMore."""\n\n# why\nx = """a\nb"""  # two\n\n\ndef f():\n    """Doc."""\n    return 1\n'
    )
    assert lines_of_code(tmp_path / "a.py") == 4


@pytest.mark.parametrize("path", sorted((COURSE / "course_utils").glob("*.py")), ids=lambda path: path.stem)
def test_a_module_can_be_read_in_one_sitting(path):
    assert lines_of_code(path) <= 250


def test_the_engine_can_be_read_in_one_sitting():
    counted = {name: lines_of_code(COURSE / f"course_utils/{name}.py") for name in READ_IN_LESSONS}
    assert sum(counted.values()) <= 1400, counted


NOTEBOOKS = ["notebooks/11_all.ipynb"]


# --- The oldest torch ------------------------------------------------------------------------------------------------


def test_the_engine_s_tests_are_all_but_those_of_lessons_and_project():
    assert f"torch>={oldest.lowest_torch()}" in PROJECT["dependencies"]
    chosen = set(oldest.engine_tests())
    assert all((COURSE / name).exists() for name in chosen)
    for name in ("pipeline", "processes", "fingerprint", "checkpoint", "torch_runtime", "soak"):
        assert f"tests/test_{name}.py" in chosen
    left_out = {path.relative_to(COURSE).as_posix() for path in (COURSE / "tests").glob("test_*.py")} - chosen
    for pattern in oldest.NOT_THE_ENGINE:
        assert any(Path(name).match(f"{pattern}.py") for name in left_out), f"{pattern} leaves out nothing"
    assert f"tests/{Path(__file__).name}" in left_out
    assert all(Path(name).match("test_lesson*.py") for name in left_out if "lesson" in name)


@pytest.mark.parametrize(
    "found, is_oldest",
    [("2.11.0", True), ("2.11.1+cpu", True), ("2.11", True), ("2.13.0", False), ("2.110.0", False), ("2.1.0", False)],
)
def test_only_the_oldest_torch_of_the_project_is_tested_as_the_oldest(monkeypatch, capsys, found, is_oldest):
    commands: list[list[str]] = []
    monkeypatch.setattr(oldest, "lowest_torch", lambda: "2.11")
    monkeypatch.setattr(oldest.metadata, "version", lambda name: found)
    monkeypatch.setattr(oldest.subprocess, "call", lambda command, cwd: commands.append(command) or 3)
    assert oldest.main(["-m", "not slow"]) == (3 if is_oldest else 2)
    output = capsys.readouterr()
    if is_oldest:
        assert commands[0][1:3] == ["-m", "pytest"] and commands[0][-2:] == ["-m", "not slow"]
        assert f"torch {found}: failed (status 3)" in output.out
    else:
        assert commands == [] and f"This Python has torch {found}, not 2.11" in output.err


# --- The runs --------------------------------------------------------------------------------------------------------


def test_test_runs_everything_and_check_the_quick_part():
    everything = [step.name for step in run.plan("test", NOTEBOOKS)]
    assert everything == ["lint", "format", "types", "tests", "timed tests", "solutions", "lessons"]
    quick = run.plan("check", NOTEBOOKS)
    assert [step.name for step in quick] == ["lint", "format", "types", "quick tests"]
    assert "not slow" in " ".join(quick[-1].command)
    assert [step.name for step in run.plan("test", [])] == everything[:-2]
    tests = [step.arguments for step in run.plan("test", []) if "pytest" in step.arguments]
    assert [arguments[-2:] for arguments in tests] == [("-m", "not timed and not weekly"), ("-m", "timed")]
    (weekly,) = run.plan("test --weekly", NOTEBOOKS)
    assert weekly.arguments[-2:] == ("-m", "weekly")  # together all of them
    (smoke,) = run.plan("test --smoke", NOTEBOOKS)
    assert "smoke" in smoke.arguments
    (lessons,) = run.plan("test --lessons", NOTEBOOKS)
    assert lessons.arguments[-1] == NOTEBOOKS[-1] and lessons.name == "lessons"


def test_reports_lie_in_a_folder_that_git_ignores():
    for step in run.plan("test", NOTEBOOKS):
        assert not step.tests or f"--junitxml={run.RESULTS / step.tests}.xml" in step.command
    assert f"/{run.RESULTS.name}/" in (COURSE / ".gitignore").read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    "seconds, status, verdict",
    [(5, 0, "ok"), (15, 0, "ok, 1.5 times its budget"), (25, 0, "too slow"), (5, 1, "failed (status 1)")],
)
def test_a_run_fails_at_twice_the_budget_or_with_a_step(monkeypatch, capsys, seconds, status, verdict):
    now = iter([0.0, seconds])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd: status)
    monkeypatch.setattr(run, "plan", lambda which, notebooks: [run.Step("lint", ("ruff", "check"), 10)])
    assert run.main(["check"]) == int(verdict.startswith(("too", "failed")))
    assert f"lint{'':30}{seconds:8.1f}{10:8}  {verdict}" in capsys.readouterr().out


def test_the_table_shows_each_lesson(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    cases = "".join(
        f'<testcase classname="notebooks.{name}.ipynb" name="Cell {i}" time="{time}" />'
        for name, time in [("02_cut", 10), ("11_all", 150)]
        for i in range(2)
    )
    (tmp_path / "lessons.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    step = run.plan("test", NOTEBOOKS)[-1]
    rows = [text for text, _ in run.table("test", [(step, 0, 110.0)])]
    assert re.search(r"02_cut +20\.0 +45 +ok$", rows[2]) and re.search(r"11_all +300\.0 +225 +ok, 1\.3 times", rows[3])
