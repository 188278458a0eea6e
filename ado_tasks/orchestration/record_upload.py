"""Carry the records below the current folder to MLflow, as a script: ready before it is needed, quick when it is.

MLflow takes seconds to import. So this process is started with a stage and waits, at a lower priority, until the
stage has ended; then a line on its standard input sends it off. It prints {record: {"run_id", "experiment_id"}}.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ado_tasks import sync, tracking
from ado_tasks.registry.client import EXPERIMENT

if TYPE_CHECKING:
    from mlflow import MlflowClient


def main() -> int:
    """Connect, wait for a line, upload all that is pending here. Fails, with the reason, where MLflow is away."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with _alone(uri):
        client = connect(uri)
    if "--hold" in sys.argv:  # the lock that keeps a measured task waiting while MLflow is imported
        os.close(int(sys.argv[sys.argv.index("--hold") + 1]))
    if not sys.stdin.readline():
        return 0  # nobody wants it any more
    folders = tracking.pending()
    sync.upload_all()
    logged = {}
    for folder in folders:
        run_id = json.loads((folder / "uploaded.json").read_text(encoding="utf-8"))["run_id"]
        logged[folder.name] = {"run_id": run_id, "experiment_id": client.get_run(run_id).info.experiment_id}
    print(json.dumps(logged), flush=True)
    return 0


def connect(uri: str) -> "MlflowClient":
    """A client whose experiment exists. Pictures of a database in a file go beside it, not below the current folder."""
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    client = MlflowClient(uri)
    if client.get_experiment_by_name(EXPERIMENT) is None:
        database = _database(uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            client.create_experiment(EXPERIMENT, artifact_location=location)
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_ALREADY_EXISTS":  # another worker was quicker
                raise
    return client


def _database(uri: str) -> Path | None:
    return Path(unquote(urlsplit(uri).path.removeprefix("/"))) if uri.startswith("sqlite:") else None


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Two processes that create the tables of one SQLite file at once would break it: one at a time."""
    database = _database(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
