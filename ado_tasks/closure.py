"""Which of our own modules a task runs: the static import closure, and one hash for the code in it.

The closure is what a DVC stage must list among its `deps` (a test compares them), and its hash is part of a
checkpoint's key: a checkpoint made by other code is never resumed from.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = "ado_tasks"
_ROOT = Path(__file__).resolve().parent


@cache
def import_closure(module: str) -> tuple[Path, ...]:
    """The files of this package that `module` (as "ado_tasks.train") imports, directly or not, itself included."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting.extend(_imports(name, path))
        waiting.extend(name.rsplit(".", depth)[0] for depth in range(1, name.count(".")))  # packages above
    return tuple(sorted(set(found.values())))


def code_hash(module: str) -> str:
    """SHA-256 over the names and contents of the import closure of `module`."""
    digest = hashlib.sha256()
    for path in import_closure(module):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _file_of(name: str) -> Path | None:
    if name == PACKAGE:
        return _ROOT / "__init__.py"
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    base = _ROOT.joinpath(*parts[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(name: str, path: Path) -> list[str]:
    """Every module that a file may import, at whatever depth of its code. Relative imports are not used here."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=name)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
