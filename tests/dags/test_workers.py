"""Two workers that share nothing but S3 and HTTP; one is killed in the middle of a stage, and the other goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from contextlib import ExitStack

import boto3
import psutil
import pytest
import yaml
from airflow_server import airflow, environment, secret_of, worker
from small_project import make_small_project

from ado_tasks.orchestration.processes import marked

DAG, QUEUE = "reoptimize", "apple-silicon"
STEPS = 60


@pytest.fixture
def store(s3):
    name = f"workers-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1", **_keys(s3.environment))
    client.create_bucket(Bucket=name)
    return {**s3.environment, "ADO_STORE": f"s3://{name}/store", "ADO_DVC_REMOTE": f"s3://{name}/dvc"}


def _keys(environ):
    return {name.lower(): environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}


def clone(project, folder, branch="main"):
    subprocess.run(["git", "clone", "-q", "--branch", branch, str(project), str(folder)], check=True)
    return folder


def unbroken(project, folder):
    """What one machine makes of the same run without a break: the lock's entries."""
    copy = clone(project, folder, "run/killed")
    (copy / "dvc.lock").unlink()
    environ = environment(PATH=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=copy, env=environ, check=True)
    return yaml.safe_load((copy / "dvc.lock").read_text())["stages"]


@pytest.mark.bars
def test_a_killed_worker_is_replaced_by_another_which_goes_on_from_the_checkpoint(store, tmp_path):
    project = make_small_project(tmp_path / "control")
    remote = str(tmp_path / "remote.git")
    subprocess.run(["git", "clone", "-q", "--bare", str(project), remote], check=True)
    common = {**store, "ADO_WORKER_QUEUE": QUEUE}
    with ExitStack() as stack:
        server = stack.enter_context(airflow(project, ADO_GIT_REMOTE=remote, **common))
        of_workers = {
            **common, "ADO_AIRFLOW_URL": server.url, "ADO_AIRFLOW_SECRET": secret_of(project),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.ports[1]}",
            "ADO_GIT_REMOTE": str(tmp_path / "not" / "mounted" / "here"),  # so the revision comes from the store
        }  # fmt: skip
        folders = {name: clone(project, tmp_path / name) for name in ("one", "two")}
        launchers = {
            name: stack.enter_context(worker(folder, ADO_WORKER_NAME=name, **of_workers))
            for name, folder in folders.items()
        }
        server.wait_for_dag(DAG)
        server.trigger(DAG, "killed", approval="automatic", overrides={"steps": STEPS})
        first = server.until(lambda: _where_it_trains(server, folders))
        _kill(launchers[first], folders[first])
        assert server.finished(DAG, "killed") == "success"
        second = server.result(DAG, "killed", "outcome")
        assert second["outcome"] == "promoted", second
        assert "merged" not in second["why"] or "→" in second["why"]
        train = server.ask("GET", f"/dags/{DAG}/dagRuns/killed/taskInstances/stages.train")
        assert (train["try_number"], train["hostname"]) == (2, _other(first))
        begun = [int(step) for step in re.findall(r"begins at step (\d+)", _log(server, "stages.train"))]
        assert begun[0] == 0
        assert 0 < begun[-1] < STEPS
    made = yaml.safe_load(_show(remote, "run/killed:dvc.lock"))["stages"]
    assert made == unbroken(remote, tmp_path / "unbroken")


def _where_it_trains(server, folders):
    """The worker whose stage has done some steps, and whose checkpoint has had the time to reach the store."""
    for name, folder in folders.items():
        for step in folder.glob(".ado/work/workspaces/*/tree/.ado/scratch/train/step"):
            if int(step.read_text() or 0) >= STEPS // 2:
                return name
    return None


def _kill(launcher, folder):
    """The worker, its launcher and everything they started, at once and without a word."""
    for process in [*marked(str(folder / ".ado/edge")), psutil.Process(launcher.pid)]:
        process.send_signal(signal.SIGKILL)


def _other(name):
    return {"one": "two", "two": "one"}[name]


def _log(server, task):
    texts = []
    for attempt in (1, 2):
        found = server.ask("GET", f"/dags/{DAG}/dagRuns/killed/taskInstances/{task}/logs/{attempt}?full_content=true")
        texts.append(json.dumps(found["content"]))
    return "\n".join(texts)


def _show(remote, what):
    return subprocess.run(["git", "-C", remote, "show", what], capture_output=True, text=True, check=True).stdout
