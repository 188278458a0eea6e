"""Two workers that share nothing but S3 and HTTP: one is killed, and the other goes on; lanes of a race run on both."""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from contextlib import ExitStack
from datetime import datetime
from itertools import combinations

import boto3
import psutil
import pytest
import yaml
from airflow_server import airflow, environment, secret_of, worker
from small_project import commit, make_small_project

from ado_tasks.orchestration.processes import marked
from ado_tasks.search_stages import search_stages

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


def two_workers(stack, store, project):
    """An Airflow of the project and two workers beside it: server, its git remote, workers' folders and launchers."""
    place = project.parent
    remote = str(place / "remote.git")
    subprocess.run(["git", "clone", "-q", "--bare", str(project), remote], check=True)
    common = {**store, "ADO_WORKER_QUEUE": QUEUE}
    server = stack.enter_context(airflow(project, ADO_GIT_REMOTE=remote, **common))
    of_workers = {
        **common, "ADO_AIRFLOW_URL": server.url, "ADO_AIRFLOW_SECRET": secret_of(project),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.ports[1]}",
        "ADO_GIT_REMOTE": str(place / "not" / "mounted" / "here"),  # so the revision comes from the store
    }  # fmt: skip
    folders = {name: clone(project, place / name) for name in ("one", "two")}
    launchers = {
        name: stack.enter_context(worker(folder, ADO_WORKER_NAME=name, **of_workers))
        for name, folder in folders.items()
    }
    return server, remote, folders, launchers


@pytest.mark.bars
def test_a_killed_worker_is_replaced_by_another_which_goes_on_from_the_checkpoint(store, tmp_path):
    project = make_small_project(tmp_path / "control")
    with ExitStack() as stack:
        server, remote, folders, launchers = two_workers(stack, store, project)
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


PROBE = {
    "space": {"channels": [[4, 8]], "middle": ["none", "plain", "attention"]},
    "race": {"sizes": [8], "steps": [40], "unguided": 8},
    "tune": {"batch_size": 16, "shards": 1, "validation_images": 64},
    "importance_batches": 2,
}


def add_probes(project):
    """The lanes of a race, as the graph of a params file with a section `probe` has them, and what they read."""
    graph = yaml.safe_load((project / "dvc.yaml").read_text())
    graph["stages"] |= {
        "prepare": {"cmd": "python -m ado_tasks prepare --out data/${dataset}", "params": ["seed", "prepare"],
                    "outs": ["data/${dataset}"]},
        "teacher": {"cmd": "cp -r models/progressive/8 models/teacher", "deps": ["models/progressive/8"],
                    "outs": ["models/teacher"]},
        "probe": search_stages(PROBE)["probe"],
    }  # fmt: skip
    (project / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    with (project / "params.yaml").open("a") as params:
        yaml.safe_dump({"prepare": {"name": "digits", "source": "digits"}, "probe": PROBE}, params)
    with (project / ".gitignore").open("a") as ignored:
        ignored.write("/data\n")
    commit(project, "eight probes")


@pytest.mark.bars
def test_eight_probes_run_on_two_workers_at_the_same_time_and_are_restored_in_the_next_run(store, tmp_path):
    project = make_small_project(tmp_path / "control")
    add_probes(project)
    with ExitStack() as stack:
        server, *_ = two_workers(stack, store, project)
        server.wait_for_dag(DAG)
        server.trigger(DAG, "race", approval="automatic")
        assert server.finished(DAG, "race") == "success"
        lanes = _probes(server, "race")
        assert len(lanes) == 8 and not any(lane["result"]["cached"] for lane in lanes)
        assert {lane["worker"] for lane in lanes} == {"one", "two"}
        together = [pair for pair in combinations(lanes, 2) if _overlap_s(*pair) > 1]
        assert together and all(one["worker"] != other["worker"] for one, other in together)
        assert _span_s(lanes) < sum(lane["end"] - lane["start"] for lane in lanes)

        server.trigger(DAG, "again", approval="automatic", force=True)
        assert server.finished(DAG, "again") == "success"
        restored = _probes(server, "again")
        assert all(lane["result"]["cached"] for lane in restored)
        assert [lane["result"]["lock"] for lane in restored] == [lane["result"]["lock"] for lane in lanes]
        for run, found in (("race", lanes), ("again", restored)):
            first = min(lane["start"] for lane in found)
            for lane in found:
                print(f"{run} {lane['task']} on {lane['worker']}: {lane['start'] - first:.1f} to "
                      f"{lane['end'] - first:.1f} s, stage {lane['result']['seconds']:.1f} s")  # fmt: skip


def _probes(server, run):
    """Each lane's task instance: its worker, when it ran there, and what it returned."""
    found = server.ask("GET", f"/dags/{DAG}/dagRuns/{run}/taskInstances")["task_instances"]
    return [
        {
            "task": each["task_id"], "worker": each["hostname"], "result": server.result(DAG, run, each["task_id"]),
            **{end: datetime.fromisoformat(each[f"{end}_date"]).timestamp() for end in ("start", "end")},
        }
        for each in sorted(found, key=lambda each: each["task_id"]) if each["task_id"].startswith("stages.probe")
    ]  # fmt: skip


def _overlap_s(one, other):
    return min(one["end"], other["end"]) - max(one["start"], other["start"])


def _span_s(lanes):
    return max(lane["end"] for lane in lanes) - min(lane["start"] for lane in lanes)


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
