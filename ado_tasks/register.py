"""`ado register`: an approved challenger becomes a version of the registered model, once."""

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import ArtifactError, PromotionError
from ado_tasks.interop.package import Package, write_package
from ado_tasks.registry.aliases import reconcile
from ado_tasks.registry.client import connect, experiment_id, named_registry_errors
from ado_tasks.registry.record import Record, Version, update_record
from ado_tasks.registry.versions import COST_TAG, VARIANT_TAG, Registration, make_version
from ado_tasks.registry.workspace import Workspace
from ado_tasks.storage import read_json
from ado_tasks.stores import Store, open_store
from ado_tasks.verdict import VERDICT, checked_verdict, named_report_errors

_DVC_TAGS = ("data", "features", "models", "schedules", "reports", "anchor")  # folders whose outputs are worth a tag


def register(
    workspace: Path, verdict: Mapping[str, Any], *, run_id: str, mlflow_uri: str, store_url: str, model: str,
    revision: str,
) -> dict[str, Any]:  # fmt: skip
    """Register the model that a verdict approved. Safe to repeat: one version a (run id, model hash).

    Args:
        workspace: folder with the outputs of the graph.
        verdict: what the gate wrote; must approve.
        run_id: of the run that asks.
        mlflow_uri: MLflow.
        store_url: the store, where the promotion record is.
        model: name of the registered model.
        revision: of git: the code and the params that made the model.

    Returns:
        `version`, `mlflow_run`, `model_sha256`, and `created`: False where an earlier attempt had made it.

    Raises:
        PromotionError: the verdict is a refusal.
        ArtifactError: the workspace does not hold the model that was judged.
        RegistryError, StorageError: MLflow or the store cannot be reached; repeat.
    """
    if not verdict["approved"]:
        raise PromotionError(f"the gate refused {verdict['variant']}, so it is not registered: {verdict['reasons'][0]}")
    store = open_store(store_url)
    place = Workspace(workspace)
    package = place.package(verdict["variant"])
    with tempfile.TemporaryDirectory(prefix="ado-register-") as name:
        folder = Path(name) / "package"
        sha256 = write_package(folder, package)
        if sha256 != verdict["model_sha256"]:
            raise ArtifactError(
                f"{workspace}: {package.name} has SHA-256 {sha256}; judged was {verdict['model_sha256']}: not the same"
            )
        with named_report_errors("the verdict's figures"):
            wanted = _registration(place, package, folder, sha256, verdict["figures"], run_id, revision)
        with named_registry_errors(mlflow_uri):
            client = connect(mlflow_uri)
            claim = _Claim(store, model, wanted.key)
            version, created = make_version(client, experiment_id(client, mlflow_uri), model, wanted, claim)
            update_record(store, model, lambda record: _as_challenger(record, Version(str(version.version), sha256)))
            reconcile(client, store, model)
    return {
        "version": str(version.version),
        "mlflow_run": version.run_id,
        "model_sha256": sha256,
        "created": created,
    }


class _Claim:
    """Which MLflow run a registration has: the first that was proposed. Several attempts at once agree on it."""

    def __init__(self, store: Store, model: str, key: str) -> None:
        self._store = store
        self._key = f"registration/{model}/{key}"

    def __call__(self, run_id: str | None) -> str | None:
        """The claimed run, after proposing `run_id`; None where there is none yet and none is proposed."""
        if run_id is not None and self._store.create(self._key, run_id.encode()):
            return run_id
        stored = self._store.get(self._key)
        return None if stored is None else stored.data.decode()


def _as_challenger(record: Record, version: Version) -> Record | None:
    """The record with this version as challenger; None where it is that, or was promoted already."""
    known = [record.challenger, record.champion, *record.former, *record.withdrawn]
    if any(each is not None and each.version == version.version for each in known):
        return None
    return replace(record, challenger=version)


def _registration(
    place: Workspace, package: Package, folder: Path, sha256: str, figures: Mapping[str, Any], run_id: str,
    revision: str,
) -> Registration:  # fmt: skip
    history = package.model.record.get("history", [])
    cost = {"cost": figures["cost"], "hardware": figures["hardware"]}
    hashes = {path: sum for path, sum in place.dvc_hashes().items() if path.split("/")[0] in _DVC_TAGS}
    tags = {
        VARIANT_TAG: package.name,
        COST_TAG: json.dumps(cost),
        "ado.run_id": run_id,
        "ado.history": json.dumps(history),
        "ado.steps": " → ".join(_step(event) for event in history) or "unknown",
        "git.revision": revision,
        **{f"dvc.outs.{path}"[:250]: sum for path, sum in hashes.items()},
    }
    measured = {"quality": figures["quality"], "cost": figures["cost"], "against": figures["against"]}
    params = {f"history.{number}.{name}": value for number, event in enumerate(history) for name, value in _flat(event)}
    return Registration(
        key=hashlib.sha256(json.dumps([run_id, sha256]).encode()).hexdigest()[:32],
        package=folder,
        model_sha256=sha256,
        name=f"register {package.name}",
        params={"method": package.method, "nfe": figures["quality"]["nfe"], **params},
        metrics={name: float(value) for name, value in _flat(measured) if _is_number(value)},
        tags=tags,
        pictures=place.pictures(),
    )


def _step(event: Mapping[str, Any]) -> str:
    details = [str(event[name]) for name in ("method", "steps") if name in event]
    return f"{event.get('task', '?')}{' (' + ', '.join(details) + ')' if details else ''}"


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings and lists, by dotted name."""
    if isinstance(values, Mapping):
        return [pair for key, value in values.items() for pair in _flat(value, f"{prefix}.{key}".lstrip("."))]
    if isinstance(values, list | tuple):
        return [pair for index, value in enumerate(values) for pair in _flat(value, f"{prefix}.{index}")]
    return [(prefix, values)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main(arguments: Sequence[str]) -> int:
    """Register what reports/verdict.json approved, and print the version."""
    parser = argparse.ArgumentParser(prog="ado register", description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path(), help="where the graph was run (default: here)")
    parser.add_argument("--run-id", default="manual", help="of the run that asks; one version a run and model")
    options = parser.parse_args(arguments)
    known = endpoints()
    verdict = read_json(options.workspace / "reports" / VERDICT, "approved", "variant", "model_sha256", "figures")
    verdict = checked_verdict(verdict, str(options.workspace / "reports" / VERDICT))
    made = register(
        options.workspace, verdict, run_id=options.run_id, mlflow_uri=known.mlflow_uri, store_url=known.store,
        model=known.registered_model, revision=_revision(options.workspace),
    )  # fmt: skip
    print(f"{known.registered_model} version {made['version']} ({'new' if made['created'] else 'was there already'})")
    return 0


def _revision(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
