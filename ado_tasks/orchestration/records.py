"""The record of a stage's run, on its way from the workspace to MLflow; to the store where MLflow is away.

A dead MLflow delays nothing: whoever finds it alive later calls `upload_parked`. It loses nothing: a record leaves the
store when MLflow has it, and a run that was logged by halves is completed, for it is found again by its record's name.
"""

import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ado_tasks import tracking
from ado_tasks.endpoints import Endpoints
from ado_tasks.errors import AdoError, ArtifactError
from ado_tasks.stores import Store, open_store

PARKED = "records/"  # in the store
_MODULE = "ado_tasks.orchestration.record_upload"
_PACKAGE = Path(__file__).resolve().parents[2]
_PATIENCE_S = 30.0  # for one stage's record, after the stage has ended
_FEW = 16  # figures and pictures in a task's result: it has to stay under 4 kB
_NAME_CHARACTERS = 60


@dataclass
class Uploader:
    """A process that is about to upload what a stage records in its workspace."""

    tree: Path
    endpoints: Endpoints
    process: "subprocess.Popen[str]"

    @staticmethod
    def start(tree: Path, endpoints: Endpoints) -> "Uploader":
        """Start it. Until it is ready it holds the uploader's lock, so that a measured task waits with its timings."""
        home = tree / tracking.HOME
        home.mkdir(exist_ok=True)
        with (tree / tracking.LOCK).open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            hold = ["--hold", str(lock.fileno())]
            return Uploader(tree, endpoints, _start(tree, endpoints, hold, (lock.fileno(),)))

    def finish(self, store: Store, say: Callable[[str], None]) -> dict[str, Any]:
        """Upload what was recorded, or put it into the store; returns metrics, MLflow's run and pictures' addresses."""
        folders = sorted(path.parent for path in (self.tree / tracking.RUNS).glob("*/record.json"))
        if not folders:
            self.process.terminate()
            self.process.communicate()
            return {}
        told = _send(self.process)
        if isinstance(told, str):
            for folder in folders:
                park(self.tree, folder, store)
            say(f"MLflow cannot be reached; the record waits in {store.url}: {told}")
            told = {}
        return _about(folders[-1], told.get(folders[-1].name), self.endpoints.mlflow_url)


def park(tree: Path, folder: Path, store: Store) -> None:
    """Put a record, its pictures and the lock file that it quotes into the store."""
    pictures = [tree / event["path"] for event in tracking.read_events(folder) if event["kind"] == "picture"]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in [folder, tree / "dvc.lock", *pictures]:
            if path.exists() and path.resolve().is_relative_to(tree.resolve()):
                archive.add(path, path.relative_to(tree).as_posix())
    store.put(f"{PARKED}{folder.name}.tar.gz", packed.getvalue())


def upload_parked(endpoints: Endpoints, say: Callable[[str], None] = print) -> int:
    """Upload the records that wait in the store; returns how many are left because MLflow is still away.

    To be called by one process at a time: two would make two MLflow runs of one record.
    """
    store = open_store(endpoints.store)
    waiting = store.list(PARKED)
    for done, key in enumerate(waiting):
        with tempfile.TemporaryDirectory(prefix="ado-record-") as folder:
            tree = Path(folder)
            found = store.get(key)
            if found is None:
                continue
            with tarfile.open(fileobj=io.BytesIO(found.data), mode="r:gz") as archive:
                _unpack(archive, tree)
            told = _send(_start(tree, endpoints))
        if isinstance(told, str):
            say(f"MLflow cannot be reached; {len(waiting) - done} records wait in {store.url}: {told}")
            return len(waiting) - done
        store.delete(key)
    return 0


def _unpack(archive: tarfile.TarFile, tree: Path) -> None:
    """Write an archive's files under a folder, and nothing else (Python 3.11.2's `extractall` knows no filter yet).

    Raises:
        ArtifactError: a file would lie outside of the folder.
    """
    for member in archive:
        target = (tree / member.name).resolve()
        if not target.is_relative_to(tree.resolve()):
            raise ArtifactError(f"{member.name}: a record's files lie in its own folder; this one does not")
        content = archive.extractfile(member) if member.isreg() else None
        if content is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())


def _start(
    tree: Path, endpoints: Endpoints, arguments: list[str] | None = None, descriptors: tuple[int, ...] = ()
) -> "subprocess.Popen[str]":
    path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MLFLOW_TRACKING_URI": endpoints.mlflow_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        "GIT_PYTHON_REFRESH": "quiet",
    }
    return subprocess.Popen(
        ["nice", "-n", "5", sys.executable, "-P", "-m", _MODULE, *(arguments or [])], cwd=tree, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=descriptors,
    )  # fmt: skip


def _send(process: "subprocess.Popen[str]") -> dict[str, Any] | str:
    """Send the uploader off; what it logged, or why it could not."""
    try:
        printed, errors = process.communicate("go\n", timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"no answer within {_PATIENCE_S:.0f} s"
    if process.returncode != 0:
        lines = errors.strip().splitlines()
        return lines[-1] if lines else f"the uploader ended with {process.returncode}"
    return json.loads(printed.strip().splitlines()[-1])


def _about(folder: Path, logged: Mapping[str, str] | None, mlflow_url: str) -> dict[str, Any]:
    """What a task shows: a few figures, and where the run and its pictures are."""
    events: list[dict[str, Any]] = []
    with suppress(AdoError, OSError):
        events = tracking.read_events(folder)
    scalars = {e["name"]: e["value"] for e in events if e["kind"] == "metric" and e["step"] is None}
    metrics = {name[:_NAME_CHARACTERS]: float(f"{value:.6g}") for name, value in list(scalars.items())[:_FEW]}
    if logged is None:
        return {"metrics": metrics}
    run, experiment = logged["run_id"], logged["experiment_id"]
    names = [Path(e["path"]).name for e in events if e["kind"] == "picture"][:_FEW]
    return {
        "metrics": metrics,
        "mlflow_run": run,
        "mlflow_url": f"{mlflow_url}/#/experiments/{experiment}/runs/{run}",
        "pictures": [f"{mlflow_url}/get-artifact?path=pictures/{name}&run_uuid={run}" for name in names],
    }
