"""The connection to MLflow: which server, how patient, and its failures by name."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ado_tasks.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "ado"  # where runs go, those of `ado sync` too
# MLflow's own patience is 7 retries of 120 s each: a dead server would be waited for through a coffee break.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # 1, 2, 4, 8 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def connect(uri: str) -> "MlflowClient":
    """A client of the tracking server and registry at `uri`. Nothing is asked of it yet."""
    for name, value in {**_PATIENCE, **_QUIET}.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: PLC0415  (4 s)

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


@contextmanager
def named_registry_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow and its transport raise into a RegistryError that names the server."""
    import requests  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError) as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise RegistryError(f"MLflow at {uri}: {reason}") from problem


def experiment_id(client: "MlflowClient", uri: str) -> str:
    """The experiment of all runs, made where it is missing. A file database keeps artifacts beside itself."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    database = Path(uri.removeprefix("sqlite:///"))
    location = (database.parent / "mlartifacts").absolute().as_uri() if uri.startswith("sqlite:///") else None
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=location)
    except MlflowException:  # made by another at this moment
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return found.experiment_id
