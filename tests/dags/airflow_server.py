"""A real Airflow of a folder, as `make airflow` starts it, and its REST API."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 600.0  # of a machine that has much else to do; nothing here is about speed


def environment(**more: str) -> dict[str, str]:
    """The tests' environment without what would lead Airflow or a run elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "ADO_", "MLFLOW", "GIT_", "AWS_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Airflow:
    """A running `make airflow`, and what can be asked of it."""

    def __init__(self, folder: Path, launcher: "subprocess.Popen[bytes]", ports: tuple[int, int], log: Path) -> None:
        self.folder, self.launcher, self.ports, self.log = folder, launcher, ports, log
        self.url = f"http://127.0.0.1:{ports[0]}"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        token = json.loads(urllib.request.urlopen(f"{self.url}/auth/token", timeout=60).read())["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api/v2{quote(path, safe='/?=&~')}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")

    def wait_for_dag(self, dag: str) -> None:
        self.until(lambda: any(found["dag_id"] == dag for found in self.ask("GET", "/dags")["dags"]))

    def trigger(self, dag: str, run: str, **conf: Any) -> None:
        self.ask("POST", f"/dags/{dag}/dagRuns", {"logical_date": None, "dag_run_id": run, "conf": conf})

    def finished(self, dag: str, run: str) -> str:
        """The state of a run when it has ended."""
        return self.until(
            lambda: (state := self.ask("GET", f"/dags/{dag}/dagRuns/{run}")["state"]) in {"success", "failed"} and state
        )

    def states(self, dag: str, run: str) -> dict[str, str]:
        found = self.ask("GET", f"/dags/{dag}/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task["state"] for task in found}

    def tries(self, dag: str, run: str, task: str) -> int:
        """How often the task began."""
        return self.ask("GET", f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}")["try_number"]

    def result(self, dag: str, run: str, task: str, key: str = "return_value") -> Any:
        path = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/xcomEntries/{key}"
        return self.ask("GET", f"{path}?deserialize=true")["value"]

    def log_of(self, dag: str, run: str, task: str) -> str:
        folder = self.folder / ".ado/airflow/logs" / f"dag_id={dag}" / f"run_id={run}" / f"task_id={task}"
        return "".join(path.read_text() for path in sorted(folder.glob("*.log")))

    def answer(self, dag: str, run: str, choice: str) -> None:
        """Approve or reject, as a person does, each time that the question is there.

        Airflow 3.3 asks again where an answer comes before its executor has noticed that the task is waiting, or where
        the task could not report its end on a busy machine: a person then sees the question again.
        """
        task = f"/dags/{dag}/dagRuns/{run}/taskInstances/approval"
        answered: set[int] = set()  # tries; a second answer to the same one would start the task anew

        def done() -> bool:
            found = self.ask("GET", task)
            if found["state"] == "awaiting_input" and found["try_number"] not in answered:
                time.sleep(5)
                with suppress(urllib.error.HTTPError):
                    self.ask("PATCH", f"{task}/-1/hitlDetails", {"chosen_options": [choice], "params_input": {}})
                answered.add(found["try_number"])
            return found["state"] in {"success", "failed", "skipped"}

        self.until(done)

    def until(self, found: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.launcher.poll() is None, self.log.read_text()
            with suppress(OSError):
                if value := found():
                    return value
            time.sleep(0.5)
        raise AssertionError(f"no answer; the launcher said:\n{self.log.read_text()}")


def secret_of(folder: Path) -> str:
    """What a worker shows to the Airflow of this folder."""
    return (folder / ".ado/airflow/secret").read_text().strip()


@contextmanager
def worker(folder: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`make worker` in a folder, ended with SIGTERM."""
    command = [sys.executable, "-m", "ado_tasks.orchestration.launch", "worker"]
    with (folder.parent / f"{folder.name}-worker.log").open("wb") as output:
        launcher = subprocess.Popen(
            command, cwd=folder, env=environment(**variables), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield launcher
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait()


@contextmanager
def airflow(folder: Path, **variables: str) -> Iterator[Airflow]:
    """Start it, yield it when everything is healthy, end it with SIGTERM."""
    ports = (free_port(), free_port())
    log = folder.parent / f"{folder.name}-launch.log"
    environ = environment(ADO_AIRFLOW_PORT=str(ports[0]), ADO_MLFLOW_PORT=str(ports[1]), **variables)
    command = [sys.executable, "-m", "ado_tasks.orchestration.launch", "airflow"]
    with log.open("wb") as output:
        launcher = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT)
        running = Airflow(folder, launcher, ports, log)
        try:
            running.until(lambda: "ends all of it" in log.read_text())
            yield running
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait()
