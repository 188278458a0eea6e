"""What breaks around a run on a real Airflow is named in the task's log, promotes nothing, and is got over."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import pytest
import s3_server
from airflow_server import Airflow, airflow, environment
from small_project import make_small_project

DAG = "reoptimize"
BALLAST = 40  # KiB of the small disk that are left when it is "full"


def commit(folder: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    subprocess.run(["git", *identity, "commit", "-q", "-a", "-m", message], cwd=folder, check=True)


def fails(server: Airflow, run: str, task: str, *words: str) -> None:
    """Trigger a run; it ends as failed, and the log of `task` says why."""
    server.trigger(DAG, run, approval="automatic")
    assert server.finished(DAG, run) == "failed"
    log = server.log_of(DAG, run, task)
    for word in words:
        assert word in log, log
    assert not (server.folder / ".ado/store/promotion").exists()


def test_what_a_person_has_to_mend_fails_at_once_with_its_name(tmp_path: Path) -> None:
    folder = make_small_project(tmp_path / "project")
    params, graph = (folder / "params.yaml").read_text(), (folder / "dvc.yaml").read_text()
    with airflow(folder) as server:
        server.wait_for_dag(DAG)
        (folder / "params.yaml").write_text(params + "# tried something\n")
        fails(server, "dirty", "plan", "DirtyTreeError", "not committed: params.yaml")
        assert server.tries(DAG, "dirty", "plan") == 1

        commit(folder, {"params.yaml": params.replace("steps: 1", "stops: 1")}, "a key is missing")
        fails(server, "missing", "stages.train", "StageError", "steps")
        assert server.tries(DAG, "missing", "stages.train") == 1

        commit(folder, {"params.yaml": params, "dvc.yaml": graph.replace("cmd:", "cmt:", 1)}, "the graph is broken")
        (error,) = server.until(lambda: server.ask("GET", "/importErrors")["import_errors"])
        assert "GraphError" in error["stack_trace"]
        assert "cmt" in error["stack_trace"]

        commit(folder, {"dvc.yaml": graph}, "and whole again")
        server.until(lambda: not server.ask("GET", "/importErrors")["import_errors"])
        server.trigger(DAG, "mended", approval="automatic")
        assert server.finished(DAG, "mended") == "success"
        assert server.result(DAG, "mended", "outcome")["outcome"] == "promoted"


def waits(server: Airflow, run: str, task: str, *words: str) -> None:
    """The task has failed, its log says why, and it will be tried again."""
    server.until(lambda: server.states(DAG, run).get(task) == "up_for_retry")
    log = server.log_of(DAG, run, task)
    for word in words:
        assert word in log, log
    assert server.states(DAG, run).get("promote") in {None, "scheduled", "queued"}


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server on a port that was promised to others."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environ = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    with (folder / "mlflow.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        try:
            s3_server.wait_for_port(port, 120)
            yield
        finally:
            process.terminate()
            process.wait()


@pytest.mark.bars
def test_dead_servers_are_waited_for_and_nothing_is_promoted_meanwhile(tmp_path: Path) -> None:
    """S3 and MLflow are both away when the run begins; each comes back after it was missed."""
    folder = make_small_project(tmp_path / "project")
    s3_port, mlflow_port = s3_server.free_port(), s3_server.free_port()
    elsewhere = {
        **s3_server.S3Server(f"http://127.0.0.1:{s3_port}", "not there yet", ()).environment,
        "ADO_STORE": "s3://away/store", "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
    }  # fmt: skip
    with airflow(folder, **elsewhere) as server, ExitStack() as later:
        server.wait_for_dag(DAG)
        server.trigger(DAG, "patient", approval="automatic")
        waits(server, "patient", "plan", "StorageError", f"http://127.0.0.1:{s3_port}")

        later.enter_context(s3_server.s3_server(tmp_path / "s3", s3_port))
        keys = {"aws_access_key_id": s3_server.KEY, "aws_secret_access_key": s3_server.SECRET}
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}", region_name="us-east-1", **keys)
        client.create_bucket(Bucket="away")
        waits(server, "patient", "register", "RegistryError", f"http://127.0.0.1:{mlflow_port}")
        keys_there = [found["Key"] for found in client.list_objects_v2(Bucket="away")["Contents"]]
        assert not [key for key in keys_there if "/promotion/" in key]

        (tmp_path / "mlflow").mkdir()
        later.enter_context(mlflow_server(tmp_path / "mlflow", mlflow_port))
        assert server.finished(DAG, "patient") == "success"
        assert server.result(DAG, "patient", "outcome")["outcome"] == "promoted"
        record = json.loads(client.get_object(Bucket="away", Key="store/promotion/ado.json")["Body"].read())
        assert [event["action"] for event in record["history"]] == ["promote"]  # once, though tried twice


@pytest.mark.bars
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small disk is mounted by root, on Linux")
def test_a_full_disk_is_named_and_when_there_is_room_the_run_goes_on(tmp_path: Path) -> None:
    folder, disk = make_small_project(tmp_path / "project"), tmp_path / "disk"
    disk.mkdir()
    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes((8192 - BALLAST) * 1024))
        server = stack.enter_context(airflow(folder, ADO_STORE=str(disk / "store"), ADO_DVC_REMOTE=str(disk / "dvc")))
        server.wait_for_dag(DAG)
        server.trigger(DAG, "full", approval="automatic")
        server.until(lambda: "up_for_retry" in server.states(DAG, "full").values())
        (task,) = [task for task, state in server.states(DAG, "full").items() if state == "up_for_retry"]
        log = server.log_of(DAG, "full", task)
        assert "StorageError" in log, log
        assert "No space left on device" in log or "disk is full" in log, log
        ballast.unlink()
        assert server.finished(DAG, "full") == "success"
        assert server.result(DAG, "full", "outcome")["outcome"] == "promoted"
