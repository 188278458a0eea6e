"""What a run does after its stages, one function a task: plain arguments in, JSON out, no Airflow.

Each may be called again after it was interrupted: what was done is found and not done twice.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ado_tasks.endpoints import Endpoints
from ado_tasks.orchestration import git_flow, outcome
from ado_tasks.orchestration.apart import call
from ado_tasks.orchestration.plan import store_bundle
from ado_tasks.orchestration.stage import load_lock
from ado_tasks.orchestration.workspace import lock_file, merge_locks, pull, workspace
from ado_tasks.stores import open_store


def commit_lock(
    locks: Mapping[str, Mapping[str, Any]], *, branch: str, run_id: str, places: Endpoints, scratch: Path
) -> str:
    """Write what all stages made into `dvc.lock` on the run's branch; returns the revision that holds it.

    The only writer of that branch after the plan. `locks` is each stage's `StageResult.lock`, by its name.
    """
    store = open_store(places.store)
    entries = {name: load_lock(lock, store) for name, lock in locks.items()}
    with git_flow.clone(places.git_remote, branch, scratch) as copy:
        merge_locks(copy, entries)
        files = sorted({str(lock_file(name)) for name in entries})
        revision = git_flow.commit(copy, f"dvc.lock of run {run_id}", *files)
        git_flow.push(copy, places.git_remote, branch)
        store_bundle(copy, revision, places)
    return revision


def judge(revision: str, *, places: Endpoints, root: Path) -> dict[str, Any]:
    """The gate's verdict on what a revision's `dvc.lock` holds."""
    with workspace(revision, places, root) as tree:
        pull(tree)
        return call(
            "ado_tasks.gate:decide", tree, cwd=tree, mlflow_uri=places.mlflow_uri,
            store_url=places.store, model=places.registered_model,
        )  # fmt: skip


def register(
    revision: str, verdict: Mapping[str, Any], *, run_id: str, places: Endpoints, root: Path
) -> dict[str, Any]:
    """Make the approved model a version of the registered model."""
    with workspace(revision, places, root) as tree:
        pull(tree)
        return call(
            "ado_tasks.register:register", tree, dict(verdict), cwd=tree, run_id=run_id, revision=revision,
            mlflow_uri=places.mlflow_uri, store_url=places.store, model=places.registered_model,
        )  # fmt: skip


def promote(
    version: str, verdict: Mapping[str, Any], *, run_id: str, approver: str, places: Endpoints
) -> dict[str, Any]:
    """Make a registered version the champion."""
    record = call(
        "ado_tasks.promote:promote", version, dict(verdict), key=run_id, approver=approver,
        mlflow_uri=places.mlflow_uri, store_url=places.store, model=places.registered_model,
    )  # fmt: skip
    return {"version": version, "by": approver, "record": record}


def rollback(reason: str, *, run_id: str, by: str, places: Endpoints) -> dict[str, Any]:
    """Make the former champion the champion again."""
    return call(
        "ado_tasks.rollback:rollback", reason, key=run_id, by=by,
        mlflow_uri=places.mlflow_uri, store_url=places.store, model=places.registered_model,
    )  # fmt: skip


def watch(*, seed: int, places: Endpoints, root: Path) -> dict[str, Any]:
    """Sample the champion anew and say how it does: `state` is "absent", "healthy", "unclear" or "degraded"."""
    known: dict[str, Any] = {"mlflow_uri": places.mlflow_uri, "model": places.registered_model}
    found = call("ado_tasks.monitor:champion", store_url=places.store, **known)
    if found is None:
        return {"state": "absent", "why": f"{places.registered_model} has no champion yet"}
    with workspace(found["revision"], places, root) as tree:
        pull(tree)
        return {**found, **call("ado_tasks.monitor:monitor", tree, found["version"], seed=seed, cwd=tree, **known)}


def conclude(
    run_id: str, plan: Mapping[str, Any], *, places: Endpoints, **ends: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Say how the run ended, and keep it so that the next plan knows."""
    ended = outcome.conclude(plan, ends.get("verdict"), ends.get("approval"), ends.get("promoted"), ends.get("merged"))
    outcome.record(open_store(places.store), run_id, plan, ended)
    return ended
