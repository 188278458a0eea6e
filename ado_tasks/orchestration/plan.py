"""What a run would do: its revision, which of its stages have something to do, and whether it is worth beginning."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ado_tasks.endpoints import Endpoints
from ado_tasks.errors import ConfigError
from ado_tasks.graph import GRAPH, changed_stages
from ado_tasks.orchestration import git_flow, outcome, overrides
from ado_tasks.orchestration.failures import GraphError
from ado_tasks.orchestration.graph import StageGraph
from ado_tasks.orchestration.resolve import RESOLVED, stage_graph
from ado_tasks.orchestration.workspace import bare_name, lock_file
from ado_tasks.stores import open_store

PARAMS = "params.yaml"
_SCRIPT = Path(__file__).with_name("dvc_changed.py")


class GraphShapeError(GraphError):
    """The run's stages are not those that the DAG was rendered with."""


@dataclass(frozen=True)
class Plan:
    """What the plan task decided."""

    branch: str
    base: str  # revision that the branch starts from
    revision: str  # that the stages run
    to_run: list[str]  # names of stages whose command, inputs or settings changed since a run that came to an end
    proceed: bool
    reason: str

    def as_plain(self) -> dict[str, Any]:
        """As XCom holds it."""
        return asdict(self)


def plan(
    run_id: str, *, shape: str, places: Endpoints, scratch: Path, preset: str = "params.yaml",
    changes: Mapping[str, Any] | None = None, force: bool = False,
) -> Plan:  # fmt: skip
    """Make the run's branch and say what would run on it.

    Args:
        run_id: of the Airflow run. Called again with the same one, the branch is found and used.
        shape: `StageGraph.shape` that the DAG was rendered with.
        places: where git and the store are.
        scratch: a folder for clones.
        preset: the params file of the project that the run takes as its `params.yaml`.
        changes: overrides of it; both are committed on the branch.
        force: go on though nothing changed.

    Raises:
        ConfigError: an override of a section that does not exist.
        DirtyTreeError: uncommitted changes in the project.
        GitError: the remote cannot be reached.
        GraphShapeError: other stages or edges than the DAG has, or than the settings need.
    """
    git_flow.check_clean(places.git_remote)
    branch = git_flow.branch_name(run_id)
    known = git_flow.remote_branches(places.git_remote, branch)
    with git_flow.clone(places.git_remote, branch if known else places.git_branch, scratch) as copy:
        base = git_flow.git("rev-parse", f"refs/remotes/origin/{places.git_branch}", cwd=copy)
        if not known:
            _commit_settings(copy, run_id, preset, changes or {})
        _bring_resolved(places.git_remote, copy)
        graph = stage_graph(copy)
        _check_shape(graph, shape, [*([preset] if preset != PARAMS else []), *(changes or {})])
        to_run = _to_run(copy, graph, places)
        revision = git_flow.git("rev-parse", "HEAD", cwd=copy)
        if to_run or force:
            git_flow.push(copy, places.git_remote, branch)
            store_bundle(copy, revision, places)
    return Plan(branch, base, revision, to_run, bool(to_run or force), _reason(to_run, force, len(graph.stages)))


def bundle_key(revision: str) -> str:
    """Where the store keeps a revision for workers that do not reach the git remote."""
    return f"git/{revision}.bundle"


def _commit_settings(copy: Path, run_id: str, preset: str, changes: Mapping[str, Any]) -> None:
    source = copy / preset
    if not source.is_file():
        there = ", ".join(sorted(path.name for path in copy.glob("params*.yaml")))
        raise ConfigError(f"preset {preset!r}: not in the repository's branch; there: {there}")
    text = overrides.apply(source.read_text(encoding="utf-8"), changes, preset)
    if text == (copy / PARAMS).read_text(encoding="utf-8"):
        return
    before = copy.with_name(f"{copy.name}-{PARAMS}")  # goes with the folder of the clone
    (copy / PARAMS).rename(before)
    (copy / PARAMS).write_text(text, encoding="utf-8")
    _check_stages(changed_stages(copy / GRAPH, before, copy / PARAMS), preset, changes)
    lines = "\n".join([f"from {preset}", *(f"{name}: {value}" for name, value in changes.items())])
    git_flow.commit(copy, f"{PARAMS} of run {run_id}\n\n{lines}", PARAMS)


def _check_stages(changed: Sequence[str], preset: str, changes: Mapping[str, Any]) -> None:
    """Stages that a preset wants and `dvc.yaml` does not have would be left out, or run with settings of others."""
    if changed:
        asked = ", ".join([*([preset] if preset != PARAMS else []), *changes])
        raise GraphShapeError(
            f"{asked}: needs other stages than {GRAPH} has ({', '.join(changed)}). Commit the settings as {PARAMS}, "
            f"and what `python -m ado_tasks.graph --methods-of {PARAMS}` makes of {GRAPH}, and the DAG follows"
        )


def _bring_resolved(remote: str, copy: Path) -> None:
    """Where the remote is a folder here, what DVC made of its files holds for a clone whose files are the same."""
    found = Path(remote) / RESOLVED
    if found.is_dir():
        shutil.copytree(found, copy / RESOLVED)


def _check_shape(graph: StageGraph, shape: str, changes: Sequence[str]) -> None:
    if graph.shape == shape:
        return
    stages = ", ".join(stage.name for stage in graph.stages)
    if changes:
        raise GraphShapeError(
            f"{', '.join(changes)}: adds, removes or rewires stages; the run would have {stages}. Commit such a change "
            f"to {PARAMS} or dvc.yaml, and the DAG follows"
        )
    raise GraphShapeError(
        "the branch that runs start from has other stages than this folder, which the DAG was rendered from: "
        f"{stages}. Bring both to the same revision"
    )


def _to_run(copy: Path, graph: StageGraph, places: Endpoints) -> list[str]:
    """Stages that have something to do, after the committed lock or after the last concluded run: the fewer."""
    found = _changed(copy, graph)
    last = outcome.last_concluded(open_store(places.store))
    if not found or last is None:
        return found
    locks = sorted({str(lock_file(stage.name)) for stage in graph.stages})
    try:
        git_flow.git("fetch", "--quiet", "origin", last["branch"], cwd=copy)
        git_flow.git("restore", "--source", "FETCH_HEAD", "--worktree", "--", *locks, cwd=copy)
    except git_flow.GitError:  # the branch was deleted: the committed lock decides
        return found
    return min(found, _changed(copy, graph), key=len)


def _changed(copy: Path, graph: StageGraph) -> list[str]:
    """What DVC finds changed, what no lock file knows, and all that reads from them. What runs always is no change."""
    found = set(_changed_by_itself(copy))
    changed: list[str] = []
    for stage in graph.stages:
        own = (stage.name in found and not stage.always_changed) or not _is_locked(copy, stage.name)
        if not stage.frozen and (own or set(stage.upstream) & set(changed)):
            changed.append(stage.name)
    return changed


def _changed_by_itself(copy: Path) -> list[str]:
    command = [sys.executable, "-P", str(_SCRIPT)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GraphError(f"DVC could not compare the stages with dvc.lock: {done.stderr.strip()[-2000:]}")
    told = json.loads(done.stdout)
    if "error" in told:
        raise GraphError(f"DVC could not compare the stages with dvc.lock: {told['error']}")
    return told["changed"]


def _is_locked(copy: Path, name: str) -> bool:
    """Whether a lock file knows a stage: without data at hand, DVC takes one that never ran for one that did."""
    path = copy / lock_file(name)
    locked = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return bare_name(name) in ((locked or {}).get("stages") or {})


def store_bundle(copy: Path, revision: str, places: Endpoints) -> None:
    """Put a clone's HEAD into the store, for workers that do not reach the git remote."""
    store = open_store(places.store)
    if store.get(bundle_key(revision)) is not None:
        return
    bundle = copy.parent / "run.bundle"
    git_flow.git("update-ref", "refs/ado/run", revision, cwd=copy)  # HEAD alone is no name that a bundle is fetched by
    git_flow.git("bundle", "create", "--quiet", str(bundle), "refs/ado/run", cwd=copy)
    store.upload_file(bundle_key(revision), bundle)


def _reason(to_run: list[str], force: bool, stages: int) -> str:
    if to_run:
        return f"{len(to_run)} of {stages} stages have something to do: {', '.join(to_run)}"
    if force:
        return f"nothing changed since the last run; forced, so all {stages} stages are restored and judged again"
    return (
        "nothing changed since the last run, or since what dvc.lock holds: code, settings and data are the same; "
        "a forced run judges them again"
    )
