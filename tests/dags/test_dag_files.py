"""DAG files: what they import, that they are the same each time, and what they show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from airflow_server import environment
from small_project import make_small_project

DAGS = ["reoptimize", "monitor", "rollback"]
HEAVY = ["mlx", "dvc", "mlflow", "pandas", "numpy", "scipy", "sklearn", "boto3", "botocore", "matplotlib"]
# What a DAG file brings beyond Airflow itself, and what Airflow makes of it.
PROBE = """
import importlib.util, json, sys
import airflow.sdk, airflow.serialization.serialized_objects, airflow.models.serialized_dag
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("dag_file", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
heavy = sorted({name.split(".")[0] for name in set(sys.modules) - before} & set(sys.argv[2].split()))
from airflow.serialization.serialized_objects import DagSerialization
from airflow.models.serialized_dag import SerializedDagModel
plain = DagSerialization.to_dict(module.dag)
print(json.dumps({"heavy": heavy, "hash": SerializedDagModel.hash(plain), "dag": plain["dag"]}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_small_project(tmp_path_factory.mktemp("dags") / "project")


def probe(project: Path, name: str, tmp_path: Path, **variables: str):
    environ = environment(AIRFLOW_HOME=str(tmp_path / "airflow"), **variables)
    command = [sys.executable, "-c", PROBE, str(project / "dags" / f"{name}.py"), " ".join(HEAVY)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def schemas_of(dag):
    """The form's fields: JSON schemas by name, without the serializer's wrapping."""

    def bare(value):
        if isinstance(value, dict):
            return bare(value["__var"]) if "__var" in value else {key: bare(inner) for key, inner in value.items()}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {name: bare(param)["schema"] for name, param in dag["params"]}


@pytest.mark.parametrize("name", DAGS)
def test_nothing_heavy_is_imported_and_each_parse_gives_the_same_version(name, project, tmp_path):
    first, second = probe(project, name, tmp_path), probe(project, name, tmp_path)
    assert first["heavy"] == []
    assert first["hash"] == second["hash"]


def test_reoptimize_shows_the_graph_and_a_typed_form(project, tmp_path):
    dag = probe(project, "reoptimize", tmp_path)["dag"]
    tasks = {task["__var"]["task_id"]: task["__var"] for task in dag["tasks"]}
    order = [
        "plan",
        "stages.train",
        "stages.evaluate",
        "commit_lock",
        "gate",
        "approval",
        "register",
        "promote",
        "merge",
    ]
    for above, below in zip(order, [*order[1:], "outcome"], strict=True):
        assert below in tasks[above]["downstream_task_ids"], (above, below)
    assert tasks["stages.train"]["_operator_extra_links"] == {
        "MLflow run": "_link_MlflowRunLink", "Picture": "_link_PictureLink",
    }  # fmt: skip
    params = schemas_of(dag)
    assert params["preset"]["enum"] == ["params.yaml"]
    assert params["approval"]["enum"] == ["ask", "automatic"]
    assert {name: schema["type"] for name, schema in params.items()} == {
        "force": "boolean", "preset": "string", "overrides": "object", "approval": "string", "approval_hours": "number",
    }  # fmt: skip
    assert dag["max_active_runs"] == 1
    assert "deadline" in dag
    assert dag["doc_md"].startswith("Make the model again")


def test_a_queue_sends_stages_to_workers_and_nothing_else(project, tmp_path):
    dag = probe(project, "reoptimize", tmp_path, ADO_WORKER_QUEUE="apple-silicon")["dag"]
    queued = {
        task["__var"]["task_id"] for task in dag["tasks"] if task["__var"].get("queue") == "apple-silicon"
    }  # fmt: skip
    assert queued == {"stages.train", "stages.evaluate"}


def test_rollback_asks_for_a_reason(project, tmp_path):
    dag = probe(project, "rollback", tmp_path)["dag"]
    reason = schemas_of(dag)["reason"]
    assert (reason["type"], reason["minLength"]) == ("string", 10)


def test_a_broken_graph_is_a_named_import_error(project, tmp_path):
    file = project / "dvc.yaml"
    text = file.read_text()
    file.write_text(text.replace("outs: [models/progressive/8]", "outz: [models]"))
    try:
        with pytest.raises(AssertionError, match=r"GraphError: .*dvc.yaml.*outz"):
            probe(project, "reoptimize", tmp_path)
    finally:
        file.write_text(text)
