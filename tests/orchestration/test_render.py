"""The graph as Airflow tasks: ids, edges, hints, nothing heavy; and what a task does with a failure."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dvc_projects import Fleet

from ado_tasks.orchestration.graph import from_plain
from ado_tasks.orchestration.resolve import stage_graph

ROOT = Path(__file__).resolve().parents[2]


def entry(name: str, *upstream: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "name": name, "command": ["true"], "wdir": ".", "deps": [], "params": {}, "upstream": list(upstream),
        "outs": [{"path": f"{name}.txt"}], "frozen": False, "always_changed": False, "description": None, "meta": None,
    }  # fmt: skip
    return {**plain, **changes}


@pytest.fixture(scope="module", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory):
    """Airflow reads its folder when it is imported; these tests need no database."""
    os.environ.setdefault("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))


def rendered(graph: Any, **options: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from airflow.sdk import DAG

        from ado_tasks.orchestration.render import render

        with DAG("test", default_args={"retries": 4}) as dag:
            render(graph, root=Path("/nowhere"), revision="abc", **options)
    return dag


def test_one_task_a_stage_and_one_edge_a_dependency() -> None:
    graph = stage_graph(ROOT)
    dag = rendered(graph)
    assert {task.task_display_name for task in dag.tasks} == {stage.name for stage in graph}
    for stage in graph:
        task = dag.get_task(f"stages.{stage.task_id}")
        assert task.upstream_task_ids == {f"stages.{above.task_id}" for above in graph.upstream(stage.name)}
        assert task.upstream == {above.name: f"stages.{above.task_id}" for above in graph.upstream(stage.name)}


def test_hints_become_arguments() -> None:
    hints = {
        "queue": "gpu", "pool": "gpus", "pool_slots": 2, "priority": 7, "retries": 1, "retry_delay_seconds": 3,
        "timeout_seconds": 60, "executor": "LocalExecutor",
    }  # fmt: skip
    dag = rendered(from_plain([entry("a", meta={"airflow": hints}), entry("b")]))
    hinted, plain = dag.get_task("stages.a"), dag.get_task("stages.b")
    assert (hinted.queue, hinted.pool, hinted.pool_slots, hinted.priority_weight) == ("gpu", "gpus", 2, 7)
    assert (hinted.retries, hinted.retry_delay) == (1, timedelta(seconds=3))
    assert (hinted.execution_timeout, hinted.executor) == (timedelta(minutes=1), "LocalExecutor")
    assert (plain.retries, plain.executor, plain.execution_timeout) == (4, None, None)


def test_workers_take_stages_from_their_queue() -> None:
    graph = from_plain([entry("a", meta={"airflow": {"queue": "gpu"}}), entry("b")])
    dag = rendered(graph, queue="apple")
    assert [(dag.get_task(f"stages.{name}").queue, dag.get_task(f"stages.{name}").executor) for name in "ab"] == [
        ("gpu", "EdgeExecutor"), ("apple", "EdgeExecutor"),
    ]  # fmt: skip
    alone = rendered(graph).get_task("stages.a")
    assert (alone.queue, alone.executor) == ("default", None)  # nobody would listen to the queue


PARSE = """\
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
from airflow.sdk import DAG
before = set(sys.modules)
import time
began = time.process_time()
from ado_tasks.orchestration.render import render
from ado_tasks.orchestration.resolve import stage_graph
with DAG("test") as dag:
    render(stage_graph(pathlib.Path(sys.argv[1])), root=pathlib.Path(sys.argv[1]), revision="{{ run_id }}")
taken = time.process_time() - began
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
from airflow.serialization.serialized_objects import DagSerialization
from airflow.models.serialized_dag import SerializedDagModel
print(json.dumps([loaded, SerializedDagModel.hash(DagSerialization.to_dict(dag)), taken]))
"""


def test_a_dag_file_imports_nothing_heavy_and_has_one_version(airflow_home, tmp_path: Path) -> None:
    stage_graph(ROOT)
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "AIRFLOW_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PARSE, str(ROOT)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (loaded, version, _), (_, again, _) = found
    assert version == again
    assert not {"boto3", "dvc", "mlflow", "mlx", "networkx", "numpy", "pandas", "yaml"} & set(loaded)


@pytest.fixture
def fleet(make_project, make_fleet, monkeypatch) -> Fleet:
    fleet = make_fleet(make_project({"dvc.yaml": {"stages": {
        "first": {"cmd": "echo 1 > first.txt", "outs": ["first.txt"]},
        "second": {"cmd": "cat first.txt > second.txt", "deps": ["first.txt"], "outs": ["second.txt"]},
        "bad": {"cmd": "python -m ado_tasks prepare --params none.yaml --out x", "outs": ["x"]},
        "shaky": {"cmd": "exit 1", "outs": ["y"]},
    }}}))  # fmt: skip
    places = fleet.places
    for name, value in {
        "ADO_GIT_REMOTE": places.git_remote, "ADO_DVC_REMOTE": places.dvc_remote, "ADO_STORE": places.store,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return fleet


class Instance:
    """What a task asks of its task instance: results of others."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results[task_ids]


def test_a_task_runs_its_stage_with_the_locks_of_those_above(fleet: Fleet) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    graph = stage_graph(fleet.project.folder)
    from airflow.sdk import DAG

    from ado_tasks.orchestration.render import render

    with DAG("test") as dag:
        render(graph, root=fleet.project.folder, revision=fleet.publish())
    first = dag.get_task("stages.first").execute({"ti": Instance({})})
    second = dag.get_task("stages.second").execute({"ti": Instance({"stages.first": first})})
    assert second["lock"]["deps"][0]["md5"] == first["lock"]["outs"][0]["md5"]
    with pytest.raises(AirflowFailException, match=r"StageError: bad: .*ConfigError"):
        dag.get_task("stages.bad").execute({"ti": Instance({})})
    with pytest.raises(AirflowException, match="StageError: shaky: 'exit 1' ended with 1") as caught:
        dag.get_task("stages.shaky").execute({"ti": Instance({})})
    assert not isinstance(caught.value, AirflowFailException)
