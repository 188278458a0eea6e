"""Where everything outside this folder is: MLflow, storage, git, Airflow. `ado.env.example` explains the variables.

Each has an embedded default that needs no account and no server, so that infrastructure which is shared with other
projects is joined by setting a variable and nothing else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ado_tasks.errors import ConfigError

ENV_FILE = "ado.env"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True)
class Endpoints:
    """Every place that a run talks to. Paths are absolute; an empty value means "what the project itself says"."""

    mlflow_uri: str  # tracking server and registry
    store: str  # s3://bucket/prefix or a folder: promotion record, mirrored checkpoints, git bundles
    dvc_remote: str | None  # None: the remote that .dvc/config names
    git_remote: str  # where runs start from and where they are merged
    git_branch: str
    s3_endpoint: str | None  # None: AWS itself; credentials are boto3's standard variables
    notify: tuple[str, ...]  # URLs that are told of refusals, failures and promotions
    airflow_host: str
    airflow_port: int
    airflow_url: str  # how workers and links reach Airflow
    mlflow_port: int  # where an embedded MLflow server listens, on loopback
    registered_model: str
    worker_queue: str | None  # None: stages run on the machine that Airflow runs on

    @property
    def serves_mlflow(self) -> bool:
        """Whether `make airflow` starts an MLflow server of its own: nobody named one."""
        return not self.mlflow_uri.startswith(("http://", "https://"))

    @property
    def mlflow_url(self) -> str:
        """Where people see the recorded runs."""
        return f"http://127.0.0.1:{self.mlflow_port}" if self.serves_mlflow else self.mlflow_uri.rstrip("/")

    @property
    def on_loopback(self) -> bool:
        """Whether Airflow can be reached from this machine only. If not, it asks for a password."""
        return self.airflow_host in LOOPBACK


def endpoints(environ: Mapping[str, str] | None = None, root: Path | None = None) -> Endpoints:
    """Read the endpoints from the environment; what is not set has its default under `root`/.ado.

    Args:
        environ: variables as `ado.env.example` lists them; the process's own where None.
        root: the project folder; the current one where None.

    Raises:
        ConfigError: a port that is no port, a store or URL of an unknown kind.
    """
    given = {name: value for name, value in (os.environ if environ is None else environ).items() if value.strip()}
    home = (Path.cwd() if root is None else root).absolute()
    host = given.get("ADO_AIRFLOW_HOST", "127.0.0.1")
    port = _port("ADO_AIRFLOW_PORT", given.get("ADO_AIRFLOW_PORT", "8080"))
    airflow_url = _web_address("ADO_AIRFLOW_URL", given.get("ADO_AIRFLOW_URL")) or _own_address(host, port)
    return Endpoints(
        mlflow_uri=given.get("MLFLOW_TRACKING_URI", f"sqlite:///{home / '.ado' / 'mlflow.db'}"),
        store=_store(given.get("ADO_STORE", str(home / ".ado" / "store")), home),
        dvc_remote=given.get("ADO_DVC_REMOTE"),
        git_remote=given.get("ADO_GIT_REMOTE", str(home)),
        git_branch=given.get("ADO_GIT_BRANCH", "main"),
        s3_endpoint=_web_address("AWS_ENDPOINT_URL", given.get("AWS_ENDPOINT_URL")),
        notify=tuple(given.get("ADO_NOTIFY", "").replace(",", " ").split()),
        airflow_host=host,
        airflow_port=port,
        airflow_url=airflow_url.rstrip("/"),
        mlflow_port=_port("ADO_MLFLOW_PORT", given.get("ADO_MLFLOW_PORT", "5000")),
        registered_model=given.get("ADO_MODEL", "ado"),
        worker_queue=given.get("ADO_WORKER_QUEUE"),
    )


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file of `NAME=value` lines (the format of Docker's env_file: no quotes, no expansion).

    A file that is not there holds none. Raises ConfigError with the line that is not `NAME=value`.
    """
    if not path.exists():
        return {}
    variables = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"{path}:{number}: {text!r} is not allowed: a line is NAME=value, or begins with #")
        variables[name.strip()] = value.strip()
    return variables


def load_env_file(path: Path = Path(ENV_FILE)) -> None:
    """Put the variables of `path`, if it is there, into this process's environment; what is set there already wins.

    For the commands at the edge only, before they ask for `endpoints`: boto3 and MLflow read the environment
    themselves. Tasks read none, so they do not call this. An empty value is the default and sets nothing.

    Raises:
        ConfigError: a line that is not `NAME=value`.
    """
    for name, value in read_env_file(path).items():
        if value:
            os.environ.setdefault(name, value)


def _own_address(host: str, port: int) -> str:
    reachable = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"


def _port(name: str, text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"{name}: {text!r} is not allowed: a port is a whole number from 1 to 65535")
    return int(text)


def _store(text: str, home: Path) -> str:
    kind, separator, rest = text.partition("://")
    if not separator:
        return str(home / text)  # an absolute path stays as it is
    if kind != "s3" or not rest.strip("/"):
        raise ConfigError(f"ADO_STORE: {text!r} is not allowed: a folder, or s3://bucket/prefix")
    return text.rstrip("/")


def _web_address(name: str, text: str | None) -> str | None:
    if text is None:
        return None
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"{name}: {text!r} is not allowed: an address begins with http:// or https:// and a host")
    return text
