"""What `dvc.yaml` says about code: each stage's task, and whether its `deps` cover the modules that the task runs."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ado_tasks.closure import import_closure
from ado_tasks.errors import ConfigError
from ado_tasks.storage import write_text

GRAPH = Path("dvc.yaml")
NUMERIC_VERSIONS = "numeric-versions.json"
_CODE = "ado_tasks/"


def task_of(command: str) -> str:
    """The task in `python -m ado_tasks <task> …`. Raises ConfigError for another command."""
    words = command.split()
    if words[:3] != ["python", "-m", "ado_tasks"] or len(words) < 4:
        raise ConfigError(f"{command!r} is not a stage's command; allowed: python -m ado_tasks <task> …")
    return words[3]


def code_deps(task: str) -> list[str]:
    """What a stage of this task must list among its `deps` besides its data."""
    root = Path(__file__).resolve().parent.parent
    closure = import_closure(f"ado_tasks.{task}")
    return [*(path.relative_to(root).as_posix() for path in closure), NUMERIC_VERSIONS]


def missing_deps(graph: dict[str, Any]) -> dict[str, list[str]]:
    """For each stage whose `deps` do not cover its code: what is missing."""
    missing = {}
    for name, stage in graph["stages"].items():
        absent = [path for path in code_deps(task_of(stage["cmd"])) if path not in stage["deps"]]
        if absent:
            missing[name] = absent
    return missing


def read_graph(path: Path = GRAPH) -> Any:
    """`dvc.yaml` with its comments, as ruamel reads it (DVC's own YAML library)."""
    return _yaml().load(path.read_text())


def write_code_deps(path: Path = GRAPH) -> None:
    """Renew the code in every stage's `deps`; data, comments and order stay as they are."""
    graph = read_graph(path)
    for stage in graph["stages"].values():
        data = [dep for dep in stage["deps"] if not dep.startswith(_CODE) and dep != NUMERIC_VERSIONS]
        stage["deps"] = data + code_deps(task_of(stage["cmd"]))
    text = io.StringIO()
    _yaml().dump(graph, text)
    write_text(path, text.getvalue())


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 10_000  # commands stay on one line
    yaml.preserve_quotes = True
    return yaml


def main() -> int:
    """Renew the graph, or say what it misses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the code in every stage's deps")
    if parser.parse_args().write:
        write_code_deps()
    missing = missing_deps(read_graph())
    for stage, paths in missing.items():
        print(f"{stage}: deps do not list {', '.join(paths)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
