"""Airflow's settings, as environment variables: for the control plane on this machine, and for a worker that joins."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ado_tasks.endpoints import Endpoints
from ado_tasks.errors import ConfigError, StorageError

SECRET = "ADO_AIRFLOW_SECRET"
SECRET_CHARACTERS = 64  # PyJWT warns below 64 bytes for HS512, which Airflow signs with
USER = "operator"
_EDGE = "airflow.providers.edge3.executors.EdgeExecutor"


def control_plane_home(root: Path) -> Path:
    """Where the control plane keeps its database, logs and secret."""
    return root / ".ado" / "airflow"


def passwords_file(root: Path) -> Path:
    """Where Airflow writes the password that it makes for `USER`, when it listens beyond loopback."""
    return control_plane_home(root) / "passwords.json"


def control_plane(places: Endpoints, root: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of api-server, scheduler, dag-processor and triggerer.

    Raises:
        ConfigError: a secret that is too short.
        StorageError: the secret cannot be written.
    """
    home = control_plane_home(root)
    return {
        **_common(places, root, home),
        **_authentication(places, root),
        "AIRFLOW__API_AUTH__JWT_SECRET": own_secret(home / "secret", environ),
        "AIRFLOW__API__HOST": places.airflow_host,
        "AIRFLOW__API__PORT": str(places.airflow_port),
        "AIRFLOW__API__BASE_URL": places.airflow_url,
        "AIRFLOW__API__WORKERS": "1",
        # A stage without a queue runs here; one with a queue waits for a worker.
        "AIRFLOW__CORE__EXECUTOR": f"LocalExecutor,{_EDGE}" if places.worker_queue else "LocalExecutor",
        # A run takes one stage at a time on this machine, as `dvc repro` does; the rest is for monitor and rollback.
        "AIRFLOW__CORE__PARALLELISM": "3",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
        # A task whose process was killed is given back after this many seconds, not after five minutes.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "5",
        "AIRFLOW__EDGE__API_ENABLED": "True",
    }


def worker(places: Endpoints, root: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of an Edge worker. It reaches the control plane at `places.airflow_url`, by outbound HTTP only.

    Raises:
        ConfigError: no queue, or no secret to show.
    """
    if not places.worker_queue:
        raise ConfigError("ADO_WORKER_QUEUE: a worker needs the queue that it takes stages from; set it in ado.env")
    if not environ.get(SECRET):
        raise ConfigError(
            f"{SECRET}: a worker shows the control plane's secret; copy it from there, .ado/airflow/secret"
        )
    return {
        **_common(places, root, root / ".ado" / "edge"),
        "AIRFLOW__API_AUTH__JWT_SECRET": _checked(environ[SECRET]),
        "AIRFLOW__CORE__EXECUTOR": _EDGE,
        "AIRFLOW__EDGE__API_URL": f"{places.airflow_url}/edge_worker/v1/rpcapi",
        "AIRFLOW__EDGE__API_ENABLED": "True",
    }


def _common(places: Endpoints, root: Path, home: Path) -> dict[str, str]:
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{places.airflow_url}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _authentication(places: Endpoints, root: Path) -> dict[str, str]:
    if places.on_loopback:
        return {"AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True"}
    return {
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords_file(root)),
    }


def own_secret(file: Path, environ: Mapping[str, str] = os.environ) -> str:
    """The secret that the parts of an Airflow prove themselves with: the variable's, the file's, or one made now."""
    if environ.get(SECRET):
        return _checked(environ[SECRET])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(secrets.token_urlsafe(SECRET_CHARACTERS) + "\n")
    except FileExistsError:
        pass
    except OSError as problem:
        raise StorageError(f"{file}: {problem.strerror}") from None
    return _checked(file.read_text(encoding="utf-8").strip())


def _checked(secret: str) -> str:
    if len(secret) < SECRET_CHARACTERS:
        raise ConfigError(
            f"{SECRET}: {len(secret)} characters are not allowed: {SECRET_CHARACTERS} or more are required"
        )
    return secret
