"""`ado sync`: carry recorded runs to MLflow. One MLflow run a record, found again by its record's name: never twice."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ado_tasks import tracking
from ado_tasks.errors import ArtifactError
from ado_tasks.registry.client import connect, experiment_id, named_registry_errors
from ado_tasks.storage import named_storage_errors, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

RECORD_TAG = "ado.record"
_BATCH = 1000  # metrics in one request: MLflow's own limit for log_batch
_PARAM_CHARACTERS = 6000  # MLflow's limit for the value of a parameter


def tracking_uri() -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else an SQLite file under `.ado`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(tracking.HOME / 'mlflow.db').absolute()}"


def main(arguments: Sequence[str]) -> int:
    """Upload what is pending. In the background, leave at once where another uploader is at work.

    Raises:
        ArtifactError: a record is damaged; the others were uploaded.
        RegistryError: MLflow cannot be reached; every record stays where it is.
        StorageError: `.ado` cannot be written.
    """
    parser = argparse.ArgumentParser(prog="ado sync", description=__doc__)
    parser.add_argument("--background", action="store_true", help="leave at once if another uploader is at work")
    options = parser.parse_args(arguments)
    with named_storage_errors(tracking.HOME), tracking.uploader_lock(wait=not options.background) as mine:
        if not mine:
            return 0
        count = upload_all()
    if count and not options.background:
        print(f"{count} runs logged to {tracking_uri()}; see them with: make mlflow", file=sys.stderr)
    if problems := tracking.damaged():
        raise ArtifactError("\n".join([*problems, "not uploaded; remove the folder of a damaged record"]))
    return 0


def upload_all() -> int:
    """Upload every pending record, those that arrive meanwhile too. Returns how many."""
    if not tracking.pending():
        return 0
    uri = tracking_uri()
    count = 0
    with named_registry_errors(uri):
        client = connect(uri)
        experiment = experiment_id(client, uri)
        while folders := tracking.pending():
            for folder in folders:
                upload(client, experiment, folder)
                count += 1
    return count


def upload(client: "MlflowClient", experiment: str, folder: Path) -> str:
    """Make, or complete, the MLflow run of one record; returns its id."""
    from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415

    record, events = tracking.read_record(folder), tracking.read_events(folder)
    name = folder.name
    known = client.search_runs([experiment], f"tags.`{RECORD_TAG}` = '{name}'", max_results=1)
    run = known[0] if known else client.create_run(
        experiment, start_time=record["started_ms"], run_name=record["section"], tags={RECORD_TAG: name}
    )  # fmt: skip
    run_id = run.info.run_id
    params = {**flatten(record["params"]), **{f"input.{key}": value for key, value in record["inputs"].items()}}
    metrics = [
        Metric(event["name"], event["value"], event["time_ms"], event["step"] or 0)
        for event in events
        if event["kind"] == "metric"
    ]
    metrics.append(Metric("seconds", (record["ended_ms"] - record["started_ms"]) / 1e3, record["ended_ms"], 0))
    client.log_batch(
        run_id,
        params=[Param(key, str(value)[:_PARAM_CHARACTERS]) for key, value in params.items()],
        tags=[RunTag(key, str(value)) for key, value in _tags(record).items()],
    )
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
    for event in events:
        if event["kind"] == "picture" and Path(event["path"]).is_file():
            client.log_artifact(run_id, event["path"], "pictures")
    client.set_terminated(run_id, record["status"], record["ended_ms"])
    write_json(
        folder / "uploaded.json", {"run_id": run_id, "uri": tracking_uri(), "uploaded_ms": int(time.time() * 1e3)}
    )
    return run_id


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _tags(record: dict[str, Any]) -> dict[str, Any]:
    tags = {
        "task": record["task"],
        "git.revision": record["git"]["revision"],
        "git.dirty": record["git"]["dirty"],
        **flatten(record["hardware"], "hardware"),
        **dvc_hashes(record["command"], record["ended_ms"]),
    }
    if "error" in record:
        tags["error"] = record["error"]
    return tags


def dvc_hashes(
    command: list[str], ended_ms: int, lock: Path = Path("dvc.lock"), patience_s: float = 5.0
) -> dict[str, str]:
    """The hashes in `dvc.lock` of what a stage read and wrote, found by the stage's command.

    DVC writes its lock a moment after the command has ended, so a lock that is older than that is given up to
    `patience_s` to be renewed. (Where the outputs came out the same, it never is, and its hashes hold.)
    """
    deadline_s = time.monotonic() + patience_s
    while lock.exists() and lock.stat().st_mtime * 1e3 < ended_ms and time.monotonic() < deadline_s:
        time.sleep(0.25)
    entry = next((e for e in _lock_entries(lock) if e.get("cmd") == shlex.join(command)), {})
    return {
        f"dvc.{side}.{item['path']}"[:250]: str(item.get("md5", item.get("hash", "")))
        for side in ("deps", "outs")
        for item in entry.get(side, [])
        if not item["path"].startswith("ado_tasks/")  # code is the git revision's business
    }


def _lock_entries(lock: Path) -> list[dict[str, Any]]:
    try:
        return list((yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}).values())
    except (OSError, yaml.YAMLError):
        return []
