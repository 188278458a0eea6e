"""DVC's own resolver, as a script: prints the resolved stages of the project in the current folder as JSON.

It runs in a process of its own (see `resolve`): DVC takes seconds to import and keeps state for a whole process.
Beside the stages it prints every file of the project that was read on the way, with its hash: while those are
unchanged, and no graph file was added, the result holds.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_NOT_OURS = {".git", ".venv", "site-packages", "__pycache__"}  # folders
_OF_DVC = {(".dvc", "tmp"), (".dvc", "cache")}
_WITHOUT_EFFECT = {"dvc.lock", ".gitignore"}  # read on the way; they say nothing about the graph


def main() -> int:
    """Print {"stages", "read"}, or {"error": {"kind", "message"}, "read"}."""
    root = Path.cwd().resolve()
    read: set[str] = set()
    sys.addaudithook(lambda event, arguments: _note(read, root, event, arguments))
    stdout, sys.stdout = sys.stdout, sys.stderr  # DVC prints
    found = resolve(root, all_pipelines="--all-pipelines" in sys.argv)
    found["read"] = {path: _sha256(root / path) for path in sorted(read) if (root / path).is_file()}
    json.dump(found, stdout, default=str)  # `meta` is anything that YAML holds, dates too
    return 0


def resolve(root: Path, *, all_pipelines: bool) -> dict[str, Any]:
    """The stages that `dvc repro` (or `dvc repro --all-pipelines`) would look at, or the error it would end with."""
    from dvc.exceptions import DvcException  # noqa: PLC0415
    from dvc.repo import Repo  # noqa: PLC0415
    from dvc.repo.reproduce import get_active_graph, get_subgraph  # noqa: PLC0415

    try:
        with Repo(str(root)) as repo:
            graph = get_active_graph(repo.index.graph)
            targets = [] if all_pipelines else list(repo.stage.collect("dvc.yaml"))
            wanted = set(get_subgraph(graph, targets))
            # Sorted: DVC finds files in the order of the disk. Stages of one file stay in its order.
            stages = sorted(
                (stage for stage in graph if stage in wanted), key=lambda stage: _depth_and_path(stage, root)
            )
            commands = [stage for stage in stages if stage.cmd or _updates_itself(stage)]
            return {"stages": [_plain(stage, root, graph) for stage in commands]}
    except (DvcException, OSError, ValueError) as problem:
        return {"error": {"kind": type(problem).__name__, "message": _message(problem)}}


def _updates_itself(stage: Any) -> bool:
    """An import that `dvc repro` would fetch anew. (What `dvc add` tracks has no command: it is simply there.)"""
    return stage.is_import and not stage.frozen


def _depth_and_path(stage: Any, root: Path) -> tuple[int, str]:
    path = Path(stage.path).relative_to(root)
    return len(path.parts), path.as_posix()


def _plain(stage: Any, root: Path, graph: Any) -> dict[str, Any]:
    from dvc.dependency import ParamsDependency  # noqa: PLC0415

    params = {_place(dep, root): list(dep.params) for dep in stage.deps if isinstance(dep, ParamsDependency)}
    above = [other for other in graph.successors(stage) if other.cmd or _updates_itself(other)]
    return {
        "name": stage.addressing,
        "command": stage.cmd if isinstance(stage.cmd, list) else (stage.cmd or "").splitlines(),
        "wdir": Path(os.path.relpath(stage.wdir, root)).as_posix(),
        "deps": [_place(dep, root) for dep in stage.deps if not isinstance(dep, ParamsDependency)],
        "params": params,
        "outs": [
            {
                "path": _place(out, root),
                "cached": out.use_cache,
                "persist": out.persist,
                "local": out.protocol == "local" and out.is_in_repo,
            }
            for out in stage.outs
        ],
        "upstream": [other.addressing for other in above],
        "frozen": bool(stage.frozen),
        "always_changed": bool(stage.always_changed),
        "description": stage.desc,
        "meta": stage.meta,
    }


def _place(item: Any, root: Path) -> str:
    """A path from the project's folder, or whatever DVC calls what lies elsewhere."""
    if item.protocol == "local" and Path(item.fs_path).is_relative_to(root):
        return Path(item.fs_path).relative_to(root).as_posix()
    return str(item)


def _message(problem: BaseException) -> str:
    """A DVC error and what it came from: the outer one often names the file only."""
    parts = [str(problem).strip()]
    while (problem := problem.__cause__ or problem.__context__) is not None:  # type: ignore[assignment]
        text = str(problem).strip()
        if text and text not in parts[-1]:
            parts.append(text)
    return ": ".join(part for part in parts if part)


def _note(read: set[str], root: Path, event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: remember which files of the project are opened for reading."""
    if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    mode = arguments[1]
    if isinstance(mode, str) and not mode.startswith("r"):
        return
    path = Path(os.path.abspath(os.fsdecode(arguments[0])))
    if not path.is_relative_to(root):
        return
    inside = path.relative_to(root)
    ours = _NOT_OURS.isdisjoint(inside.parts[:-1]) and inside.parts[:2] not in _OF_DVC
    if ours and inside.name not in _WITHOUT_EFFECT:
        read.add(inside.as_posix())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
