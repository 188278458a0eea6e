"""`dvc.yaml` → JSON → stage graph. A DAG file calls `stage_graph`, which reads the JSON and imports nothing heavy.

The JSON is DVC's own reading of the project, made by a process of its own and kept under `.dvc/tmp`. It holds while
every file that DVC read is unchanged and no graph file was added or removed.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ado_tasks.orchestration.failures import CycleError, GraphError
from ado_tasks.orchestration.graph import StageGraph, from_plain

_SCRIPT = Path(__file__).with_name("dvc_resolve.py")
RESOLVED = Path(".dvc/tmp/stage-graph")  # in a project
_FORMAT = 1  # of the JSON
_PATIENCE_S = 120.0


def stage_graph(project: Path, *, all_pipelines: bool = False) -> StageGraph:
    """The stages that `dvc repro` would run in a project, checked.

    Args:
        project: folder with `.dvc` and `dvc.yaml`.
        all_pipelines: as `dvc repro --all-pipelines`: those that the top `dvc.yaml` does not lead to as well.

    Raises:
        GraphError: DVC cannot read the project, or it cannot be rendered; its subclasses say why.
    """
    return from_plain(resolved(project, all_pipelines=all_pipelines))


def resolved(project: Path, *, all_pipelines: bool = False) -> list[dict[str, Any]]:
    """The resolver's plain mappings, from the cache where it holds."""
    project = project.absolute()
    if not (project / ".dvc").is_dir() or not (project / "dvc.yaml").is_file():
        raise GraphError(f"{project}: no DVC project: a folder with .dvc and dvc.yaml is required")
    cache = _cache_file(project, all_pipelines)
    found = _read(cache)
    if found is None or not _holds(found, project):
        found = {**_run_resolver(project, all_pipelines), "format": _FORMAT, "resolver": _sha256(_SCRIPT)}
        pruned = _output_folders(found["stages"])
        found["graph_files"] = sorted(_graph_files(project, pruned))
        _write(cache, found)
    return found["stages"]


def _cache_file(project: Path, all_pipelines: bool) -> Path:
    name = "all.json" if all_pipelines else "graph.json"
    if os.access(project / ".dvc", os.W_OK):
        return project / RESOLVED / name
    home = hashlib.sha256(str(project).encode()).hexdigest()[:16]  # a project that is read-only here
    return Path(tempfile.gettempdir()) / f"ado-stage-graph-{os.getuid()}" / home / name


def _read(cache: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else None


def _write(cache: Path, found: dict[str, Any]) -> None:
    """Atomically: several processes may parse the same DAG file at once."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f".{cache.name}.tmp-{os.getpid()}")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(cache)


def _holds(found: dict[str, Any], project: Path) -> bool:
    if found.get("resolver") != _sha256(_SCRIPT):
        return False
    if any(_sha256(project / path) != digest for path, digest in found["read"].items()):
        return False
    return found["graph_files"] == sorted(_graph_files(project, _output_folders(found["stages"])))


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _output_folders(stages: list[dict[str, Any]]) -> set[str]:
    return {out["path"] for stage in stages for out in stage["outs"]}


def _graph_files(project: Path, pruned: set[str]) -> Iterator[str]:
    """Every `dvc.yaml` and `*.dvc` below the project; not in what stages make, hidden folders and environments."""
    for folder, folders, files in os.walk(project):
        here = Path(folder).relative_to(project)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and (here / name).as_posix() not in pruned
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        ]
        yield from ((here / name).as_posix() for name in files if name == "dvc.yaml" or name.endswith(".dvc"))


def _run_resolver(project: Path, all_pipelines: bool) -> dict[str, Any]:
    # -P: the folder of the script, full of modules with everyday names, stays out of the module path.
    command = [sys.executable, "-P", str(_SCRIPT), *(["--all-pipelines"] if all_pipelines else [])]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    try:
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise GraphError(f"{project}: DVC did not resolve dvc.yaml within {_PATIENCE_S:.0f} s") from None
    if done.returncode != 0:
        raise GraphError(f"{project}: DVC's resolver failed: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout)
    if "error" in found:
        kind, message = found["error"]["kind"], found["error"]["message"]
        error = CycleError if kind == "CyclicGraphError" else GraphError
        raise error(f"{project / 'dvc.yaml'}: {message}")
    return found
