"""What `dvc.yaml` says about code: each stage's task, and whether its `deps` cover the modules that the task runs.

And which methods of distillation it has, and whether it searches for an architecture: `--methods-of params.yaml` takes
them from a params file.
"""

import argparse
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from ado_tasks.closure import import_closure
from ado_tasks.config import read_params, section
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.search_stages import set_search
from ado_tasks.storage import write_text

GRAPH = Path("dvc.yaml")
NUMERIC_VERSIONS = "numeric-versions.json"
_CODE = "ado_tasks/"
_FAMILY = re.compile(r"[A-Za-z][\w-]*", re.ASCII)
# Other stages' folders and variants.
_TAKEN = ("teacher", "calibrated", "searched", "probes", "architecture", "architecture_calibrated")


def task_of(command: str) -> str:
    """The task in `python -m ado_tasks <task> …`. Raises ConfigError for another command."""
    words = command.split()
    if words[:3] != ["python", "-m", "ado_tasks"] or len(words) < 4:
        raise ConfigError(f"{command!r} is not a stage's command; allowed: python -m ado_tasks <task> …")
    return words[3]


def code_deps(task: str) -> list[str]:
    """What a stage of this task must list among its `deps` besides its data. Raises ConfigError for no task."""
    root = Path(__file__).resolve().parent.parent
    if not (root / _CODE / f"{task}.py").is_file():  # its closure would be empty: no code would be watched
        raise ConfigError(f"'python -m ado_tasks {task} …': no such task; allowed: those that `ado --help` lists")
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
    """`dvc.yaml` with its comments, as ruamel reads it (DVC's own YAML library).

    Raises:
        ConfigError: it is missing, not YAML, or has no stages.
    """
    try:
        graph = _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read ({problem.strerror})") from None
    except (YAMLError, ValueError) as problem:  # ValueError: not UTF-8
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None
    if not isinstance(graph, Mapping) or not isinstance(graph.get("stages"), Mapping):
        raise ConfigError(f"{path}: has no stages; allowed: a graph such as the repository's {GRAPH}")
    return graph


def write_code_deps(path: Path = GRAPH) -> None:
    """Renew the code in every stage's `deps`; data, comments and order stay as they are."""
    graph = read_graph(path)
    renew_code_deps(graph)
    _write(graph, path)


def renew_code_deps(graph: Any) -> None:
    """The same in a graph that was read."""
    for stage in graph["stages"].values():
        data = [dep for dep in stage["deps"] if not dep.startswith(_CODE) and dep != NUMERIC_VERSIONS]
        stage["deps"] = data + code_deps(task_of(stage["cmd"]))


def set_methods(graph: Any, methods: Sequence[str]) -> None:
    """Let `distill` run these methods, and every stage that compares students take their families, in this order.

    Raises:
        ConfigError: the graph has no stage `distill` with a matrix.
    """
    matrix = graph["stages"].get("distill", {}).get("matrix")
    if not matrix:
        raise ConfigError(f"{GRAPH}: stages.distill has no matrix of methods, so none can be set")
    former = [f"models/{method}" for method in matrix["method"]]
    matrix["method"][:] = list(methods)  # the list stays on its line
    families = [f"models/{method}" for method in methods]
    for stage in graph["stages"].values():
        if "--students " not in stage["cmd"]:
            continue
        stage["cmd"] = stage["cmd"].replace("--students " + " ".join(former), "--students " + " ".join(families))
        first = stage["deps"].index(former[0])
        stage["deps"] = [
            *stage["deps"][:first], *families, *(dep for dep in stage["deps"][first:] if dep not in former)
        ]  # fmt: skip


def methods_in(params: Path) -> list[str]:
    """The methods that a params file has sections for, under `distill`.

    Raises:
        ConfigError: it has none, or one whose name cannot be a folder's beside models/teacher.
    """
    found = section(read_params(params), "distill", str(params))
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{params}: distill: {found!r} is not allowed: a section for each method is required")
    for name in found:
        if not isinstance(name, str) or not _FAMILY.fullmatch(name) or name in _TAKEN:
            raise ConfigError(
                f"{params}: distill.{name}: is the name of a folder under models/; allowed: letters, digits, _ and -, "
                f"with a letter first, and none of {', '.join(_TAKEN)}"
            )
    return list(found)


def changed_stages(graph: Path, before: Path, after: Path) -> list[str]:
    """Names of the stages that this graph would have differently for one params file than for another.

    None where it is another project's: no stage `distill` with a matrix. Raises ConfigError as `--methods-of` does.
    """
    if not graph.is_file() or not read_graph(graph)["stages"].get("distill", {}).get("matrix"):
        return []
    one, other = (_of(read_graph(graph), params)["stages"] for params in (before, after))
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _of(graph: Any, params: Path) -> Any:
    set_methods(graph, methods_in(params))
    set_search(graph, read_params(params))
    return graph


def _write(graph: Any, path: Path) -> None:
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
    parser.add_argument(
        "--methods-of", type=Path, metavar="PARAMS",
        help="distil by each method that has a section in this file, and search where it has a section probe",
    )  # fmt: skip
    options = parser.parse_args()
    try:
        if options.write:
            write_code_deps()
        if options.methods_of is not None:
            graph = _of(read_graph(), options.methods_of)
            renew_code_deps(graph)
            _write(graph, GRAPH)
        missing = missing_deps(read_graph())
    except AdoError as problem:
        print(f"ado_tasks.graph: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    for stage, paths in missing.items():
        print(f"{stage}: deps do not list {', '.join(paths)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
