"""Text is UTF-8 whatever the machine's locale says: every file that is opened as text says so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ado_tasks", "bench", "dags", "docker")
TEXT = ("read_text", "write_text")
FILES = ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile")  # of text where their mode has no b


def unnamed(source: str) -> Iterator[int]:
    """Lines with a call that reads or writes text and does not say in which encoding."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and _is_text(call) and "encoding" not in {each.arg for each in call.keywords}:
            yield call.lineno


def _is_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in TEXT:
        return isinstance(call.func, ast.Attribute)  # storage.write_text says it inside
    of = ast.unparse(call.func).rpartition(".")[0]
    if name not in FILES or (name == "open" and of in {"os", "tarfile"}):
        return False
    place = 1 if name == "fdopen" or not of else 0  # of the mode among the arguments
    mode = next((each.value for each in call.keywords if each.arg == "mode"), None)
    mode = call.args[place] if mode is None and len(call.args) > place else mode
    if mode is None:
        return "Temporary" not in name  # whose files are of bytes where nothing is said
    return isinstance(mode, ast.Constant) and "b" not in str(mode.value)  # not Image.open(path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_files_are_utf_8(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in unnamed(path.read_text(encoding="utf-8"))
    ]
    assert found == [], 'say encoding="utf-8"'


def test_the_rule_itself() -> None:
    text = ["p.read_text()", "p.write_text(x)", "open(p)", "p.open()", "p.open('w')", "open(p, mode='a')",
            "os.fdopen(n)", "tempfile.TemporaryFile('w+')"]  # fmt: skip
    bytes_ = ["write_text(p, x)", "open(p, 'rb')", "p.open('wb')", "os.open(p, os.O_RDWR)", "tarfile.open(mode='w:gz')",
              "Image.open(p)", "tempfile.TemporaryFile()", "os.fdopen(n, 'wb')"]  # fmt: skip
    assert list(unnamed("\n".join(text + bytes_))) == list(range(1, len(text) + 1))
    assert list(unnamed("p.read_text(encoding='utf-8')\nopen(p, 'w', encoding='utf-8')")) == []
