"""What arrives from a socket is never run: the source has no place where that could happen.

That no port listens, that a stranger is refused and that folders are closed is tested in test_processes.py, that
checkpoints run no code in test_checkpoint.py.
"""

import ast
import re
from pathlib import Path

import pytest

COURSE = Path(__file__).resolve().parents[1]
SOURCES = sorted((COURSE / "course_utils").rglob("*.py"))
# torch.distributed's collectives for any object unpickle what comes from the network.
OBJECT_COLLECTIVE = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?$")
# These make objects, or run code, out of bytes or text.
UNPICKLES = {"loads", "load", "Unpickler", "recv", "eval", "exec", "compile", "import_module", "__import__"}
# Where that is meant: each reads what the other end of an inherited pipe has written, or a name from our own code.
ALLOWED = {
    ("_worker.py", "pickle.loads(caller.receive())"): 2,  # what to run, from the caller
    ("_watching.py", "pickle.loads(message)"): 1,  # results and events of a worker, read from its pipe
    ("checkpoint.py", "torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)"): 1,  # tensors alone
}
# The text of an answer that was handed in, in a process of its own that has limits; a text of ours that learners mend.
ALLOWED |= {
    ("checks/sandbox.py", "exec(compile(text, ANSWER, 'exec'), space)"): 1,
    ("checks/sandbox.py", "compile(text, ANSWER, 'exec')"): 1,
    ("checks/sandbox.py", "exec(compile(text, '<cell>', 'exec'), space)"): 1,
    ("checks/sandbox.py", "compile(text, '<cell>', 'exec')"): 1,
    ("checks/tasks.py", "exec(text, space)"): 1,
    ("checks/unit_10.py", "load(json.loads(text))"): 1,  # the learner's own `load`
    ("checks/bug_hunt.py", "exec(compile(SCRIPT, NAME, 'exec'), module.__dict__)"): 1,
    ("checks/bug_hunt.py", "compile(SCRIPT, NAME, 'exec')"): 1,
}
JSON_OR_TEXT = re.compile(r"^(json\.loads|tomllib\.loads?|re\.compile)\(")
NAMES_OF_OURS = {
    ("checks/__init__.py", "importlib.import_module(f'course_utils.checks.lesson_{lesson}')"): 1,
    ("checks/tasks.py", "importlib.import_module(f'course_utils.checks.unit_{unit}')"): 1,
    ("checkpoint.py", "load(manifest, dict(named))"): 1,  # a function of that module, which calls torch.load as above
}


def dangerous_calls(source: str) -> list[str]:
    """Calls that make objects or run code, and collectives for any object, as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = ast.unparse(node)
            if OBJECT_COLLECTIVE.search(name) or name in UNPICKLES and not JSON_OR_TEXT.match(text):
                found.append(text)
    return found


def test_functions_and_results_never_come_from_a_socket():
    found: dict[tuple[str, str], int] = {}
    for path in SOURCES:
        for call in dangerous_calls(path.read_text("utf-8")):
            key = path.relative_to(COURSE / "course_utils").as_posix(), call
            found[key] = found.get(key, 0) + 1
    assert found == ALLOWED | NAMES_OF_OURS


@pytest.mark.parametrize(
    "call",
    [
        "dist.broadcast_object_list(things, 0)",
        "torch.distributed.all_gather_object(out, x)",
        "recv_object_list(x)",
        "pickle.loads(sock.recv(10))",
        "cloudpickle.load(file)",
        "torch.load(path)",
        "connection.recv()",
        "eval(text)",
        "pickle.Unpickler(file).load()",
    ],
)
def test_such_a_call_would_be_found(call):
    assert dangerous_calls(f"def f():\n    return [{call}]")


def test_plain_data_is_no_danger():
    assert not dangerous_calls(
        "json.loads(text); tomllib.loads(text); re.compile('x'); dist.recv_anything; work.wait()"
    )


def test_no_collective_of_the_package_moves_anything_but_tensors():
    """Besides, nothing of torch.distributed is imported by a name under which these calls would not be found."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch.distributed", "pickle")):
                assert node.module == "torch.distributed.pipelining", f"{path.name} imports names from {node.module}"
