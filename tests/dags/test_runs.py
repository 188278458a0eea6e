"""Runs on a real Airflow: scheduler, triggerer, API, approvals by REST; and `dag.test()`, which needs none of them."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest
from airflow_server import airflow, environment
from small_project import make_small_project

from ado_tasks.orchestration.processes import MARK

DAG = "reoptimize"


def record_of(folder):
    return json.loads((folder / ".ado/store/promotion/ado.json").read_text())


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def marked_with(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_a_run_is_approved_its_repetition_refused_and_nothing_is_left(tmp_path):
    folder = make_small_project(tmp_path / "project")
    with airflow(folder) as server:
        server.wait_for_dag(DAG)
        server.trigger(DAG, "first")
        server.answer(DAG, "first", "Approve")
        assert server.finished(DAG, "first") == "success"
        assert set(server.states(DAG, "first").values()) == {"success"}
        promoted = server.result(DAG, "first", "outcome")
        assert promoted["outcome"] == "promoted"
        assert "git merge --ff-only run/first" in promoted["why"]
        assert server.result(DAG, "first", "approval", "answer") == {
            "approved": True, "by": "Anonymous", "timed_out": False,
        }  # fmt: skip
        assert record_of(folder)["champion"]["version"] == "1"
        assert "stages:" in git(folder, "show", "run/first:dvc.lock")
        assert git(folder, "status", "--porcelain") == ""

        server.trigger(DAG, "same")
        assert server.finished(DAG, "same") == "success"
        assert server.states(DAG, "same")["stages.train"] == "skipped"
        assert server.result(DAG, "same", "outcome")["outcome"] == "unchanged"

        server.trigger(DAG, "forced", force=True)
        assert server.finished(DAG, "forced") == "success"
        states = server.states(DAG, "forced")
        assert [states[task] for task in ("gate", "approval", "promote")] == ["success", "skipped", "skipped"]
        assert server.result(DAG, "forced", "stages.train")["cached"]
        assert "challenger is the champion" in server.result(DAG, "forced", "outcome")["why"]
        assert "challenger is the champion" in server.log_of(DAG, "forced", "gate")
        assert record_of(folder)["sequence"] == 2  # registered, promoted; no more

        server.trigger(DAG, "reshaped", overrides={"missing.key": 1})
        assert server.finished(DAG, "reshaped") == "failed"
        assert "ConfigError: override 'missing.key'" in server.log_of(DAG, "reshaped", "plan")
        mark, ports = str(folder / ".ado/airflow"), server.ports
        assert marked_with(mark)
    assert server.launcher.returncode == 0
    assert marked_with(mark) == []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.bars
def test_rejected_and_unanswered_challengers_change_nothing_and_rollback_brings_back(tmp_path):
    folder = make_small_project(tmp_path / "project")
    with airflow(folder, AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL="2") as server:
        server.wait_for_dag(DAG)
        server.trigger(DAG, "rejected")
        server.answer(DAG, "rejected", "Reject")
        assert server.finished(DAG, "rejected") == "success"
        assert server.result(DAG, "rejected", "outcome")["why"] == "rejected by Anonymous"

        server.trigger(DAG, "late", force=True, approval_hours=0.001)
        assert server.finished(DAG, "late") == "success"
        assert server.result(DAG, "late", "outcome") == {"outcome": "rejected", "why": "no answer in time"}
        assert server.states(DAG, "late")["register"] == "skipped"
        assert not (folder / ".ado/store/promotion").exists()

        server.trigger(DAG, "worse", overrides={"kid": 0.5})
        assert server.finished(DAG, "worse") == "success"
        assert server.result(DAG, "worse", "outcome")["outcome"] == "refused"

        server.trigger(DAG, "automatic", force=True, approval="automatic")
        assert server.finished(DAG, "automatic") == "success"
        assert record_of(folder)["champion"]["version"] == "1"

        server.wait_for_dag("rollback")
        server.trigger("rollback", "back", reason="it draws only sevens")
        assert server.finished("rollback", "back") == "failed"
        assert "PromotionError" in server.log_of("rollback", "back", "rollback")
        server.wait_for_dag("monitor")


def test_the_dag_runs_without_a_scheduler(tmp_path):
    folder = make_small_project(tmp_path / "project")
    home = tmp_path / "airflow"
    environ = environment(
        AIRFLOW_HOME=str(home), AIRFLOW__CORE__DAGS_FOLDER=str(folder / "dags"), AIRFLOW__CORE__LOAD_EXAMPLES="False"
    )
    environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environ['PATH']}"
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], env=environ, check=True, capture_output=True)
    # Without the deadline: Airflow 3.3.2's dag.test() looks for its alert by an id that only a real scheduler gives it.
    code = (
        "import sys; sys.path.insert(0, 'dags'); from reoptimize import dag\n"
        "dag.deadline = None\n"
        "run = dag.test(run_conf={'approval': 'automatic'})\nprint('state', run.state)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert "state success" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert record_of(folder)["champion"]["version"] == "1"
