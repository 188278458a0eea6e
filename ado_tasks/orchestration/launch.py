"""`make airflow` and `make worker`: Airflow on this machine, or this machine as a worker of one.

Airflow's own `standalone` leaves its children behind when it is ended. Here each part runs in a session of its own, its
health is polled, and Ctrl-C or SIGTERM ends all of it.
"""

import argparse
import json
import os
import signal
import socket
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ado_tasks.endpoints import ENV_FILE, Endpoints, endpoints, read_env_file
from ado_tasks.errors import AdoError
from ado_tasks.orchestration import airflow_settings
from ado_tasks.orchestration.processes import Group, LaunchError, hold_lock, marked, refuse_taken_port

START_PATIENCE_S = 300.0  # of a slow disk and busy cores; on an idle laptop everything answers within 30 s
_PARTS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],  # logs are read from disk: no further port
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}
_HEALTH_NAME = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}


class _Ended(Exception):
    """SIGTERM, SIGHUP or Ctrl-C arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C or SIGTERM. Returns 0 after an orderly end, or the code of the named error."""
    parser = argparse.ArgumentParser(prog="python -m ado_tasks.orchestration.launch", description=__doc__)
    parser.add_argument("part", choices=["airflow", "worker"])
    part = parser.parse_args(arguments).part
    root = Path.cwd()
    try:
        environ = {**read_env_file(root / ENV_FILE), **os.environ}
        places = endpoints(environ, root)
        _end_on_signals()
        (run_airflow if part == "airflow" else run_worker)(places, root, environ)
    except AdoError as problem:
        print(f"make {part}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    except _Ended:
        return 0
    return 0


def run_airflow(places: Endpoints, root: Path, environ: Mapping[str, str]) -> None:
    """Start the control plane, say where it is, and keep it until the end."""
    home = airflow_settings.control_plane_home(root)
    group = _new_group("airflow", home)
    refuse_taken_port(places.airflow_host, places.airflow_port, "ADO_AIRFLOW_PORT")
    own_mlflow = places.mlflow_port if places.serves_mlflow else None
    if own_mlflow:
        refuse_taken_port("127.0.0.1", own_mlflow, "ADO_MLFLOW_PORT")
    settings = {**_program_environment(environ), **airflow_settings.control_plane(places, root, environ)}
    settings["MLFLOW_TRACKING_URI"] = places.mlflow_url
    print(f"Airflow starts; what its parts write is in {group.logs.relative_to(root)}/", flush=True)
    try:
        _prepare_database(home, settings, group)
        for name, command in _PARTS.items():
            group.start(name, [_program("airflow"), *command], settings)
        _wait_for_airflow(group, places)
        if own_mlflow:
            _start_mlflow(group, root, own_mlflow, settings)
        print(f"\nAirflow  {places.airflow_url}   {_how_to_enter(places, root)}", flush=True)
        print(f"MLflow   {places.mlflow_url}\nCtrl-C ends all of it.", flush=True)
        _keep(group)
    finally:
        _stop(group)


def run_worker(places: Endpoints, root: Path, environ: Mapping[str, str]) -> None:
    """Join the Airflow at `places.airflow_url`: one stage at a time, from the queue `places.worker_queue`."""
    settings = {**_program_environment(environ), **airflow_settings.worker(places, root, environ)}
    group = _new_group("worker", Path(settings["AIRFLOW_HOME"]))
    if _answer(f"{places.airflow_url}/api/v2/monitor/health") is None:
        raise LaunchError(f"no Airflow answers at {places.airflow_url}; set ADO_AIRFLOW_URL in {ENV_FILE}")
    name = environ.get("ADO_WORKER_NAME") or socket.gethostname()
    command = [_program("airflow"), "edge", "worker", "-q", str(places.worker_queue), "-c", "1", "-H", name]
    try:
        group.start("worker", command, settings)
        print(f"worker {name} takes stages of queue {places.worker_queue} from {places.airflow_url}; Ctrl-C ends it; "
              f"what it writes is in {group.log('worker').relative_to(root)}", flush=True)  # fmt: skip
        _keep(group)
    finally:
        _stop(group)


def _new_group(name: str, home: Path) -> Group:
    hold_lock(home / "launch.lock")
    group = Group(mark=str(home), logs=home / "parts")
    if left := marked(group.mark):
        print(f"{len(left)} processes of a killed `make {name}` are ended first", flush=True)
        group.stop()
    return group


def _prepare_database(home: Path, settings: Mapping[str, str], group: Group) -> None:
    """Make or upgrade Airflow's database, once per version of it (9 s)."""
    began, stamp = time.monotonic(), home / f"database-{version('apache-airflow')}"
    if stamp.exists():
        _say("database", "there", began)
        return
    with sqlite3.connect(home / "airflow.db") as database:
        database.execute(
            "PRAGMA journal_mode=WAL"
        )  # kept in the file: readers and one writer do not wait for each other
    database.close()
    group.start("database", [_program("airflow"), "db", "migrate"], settings)
    if group.processes.pop("database").wait() != 0:
        raise LaunchError(f"Airflow's database could not be made:\n{group.tail('database')}")
    since = home / "since"
    if not since.exists():
        since.write_text(f"{datetime.now(UTC).isoformat(timespec='seconds')}\n", encoding="utf-8")
    stamp.touch()
    _say("database", "made", began)


def _wait_for_airflow(group: Group, places: Endpoints) -> None:
    began, url = time.monotonic(), f"{places.airflow_url}/api/v2/monitor/health"
    group.wait_for("api-server", lambda: _answer(url) is not None, START_PATIENCE_S)
    _say("api-server", "answers", began)
    waiting = dict(_HEALTH_NAME)
    while waiting:
        health = _answer(url) or {}
        for part, key in list(waiting.items()):
            if health.get(key, {}).get("status") == "healthy":
                del waiting[part]
                _say(part, "healthy", began)
        group.check()
        if time.monotonic() - began > START_PATIENCE_S:
            raise LaunchError(f"not healthy after {START_PATIENCE_S:.0f} s: {', '.join(waiting)}; see {group.logs}/")
        time.sleep(0.5)


def _start_mlflow(group: Group, root: Path, port: int, settings: Mapping[str, str]) -> None:
    began, home = time.monotonic(), root / ".ado"
    command = [
        _program("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(home / "mlartifacts"),
    ]  # fmt: skip
    group.start("mlflow", command, {**settings, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    group.wait_for("mlflow", lambda: _answer(f"http://127.0.0.1:{port}/health") is not None, START_PATIENCE_S)
    _say("mlflow", "answers", began)


def _keep(group: Group) -> NoReturn:
    while True:
        group.check()
        time.sleep(1)


def _stop(group: Group) -> None:
    for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(wanted, signal.SIG_IGN)  # the end is under way, and it is bounded
    print("\nending …", flush=True)
    group.stop()
    print("ended: no process is left", flush=True)


def _end_on_signals() -> None:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise _Ended

    for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(wanted, end)


def _program(name: str) -> str:
    """A program of this environment, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def _program_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {**environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}"}


def _answer(url: str) -> Any:
    """What a server says: its JSON, or its text; None where it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
    except (urllib.error.URLError, OSError, ValueError):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _how_to_enter(places: Endpoints, root: Path) -> str:
    if places.on_loopback:
        return "(no password: it listens on this machine only)"
    file = airflow_settings.passwords_file(root)
    return f"(user {airflow_settings.USER}, password in {file.relative_to(root)})"


def _say(part: str, state: str, began: float) -> None:
    print(f"  {part:<14} {state:<8} {time.monotonic() - began:5.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
