"""A stage's record reaches MLflow; where MLflow is away it waits in the store, and nothing waits for it."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dvc_projects import Fleet

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import ArtifactError
from ado_tasks.orchestration.records import PARKED, upload_parked
from ado_tasks.stores import open_store

PREPARE = {
    "params.yaml": {"seed": 1, "prepare": {"source": "digits", "train": 100, "selection": 50, "report": 50}},
    "dvc.yaml": {
        "stages": {
            "prepare": {
                "cmd": "python -m ado_tasks prepare --out data",
                "params": ["seed", "prepare"],
                "outs": ["data"],
                "deps": ["notes.txt"],
            },
        }
    },
    "notes.txt": "first",
}
# MLflow asks SQLAlchemy for something that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture
def fleet(make_project, make_fleet, monkeypatch) -> Fleet:
    monkeypatch.setattr("ado_tasks.orchestration.records._PATIENCE_S", 300.0)  # a busy machine is slow, not wrong
    return make_fleet(make_project(PREPARE))


def runs(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ado")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_a_dead_mlflow_loses_nothing(fleet: Fleet) -> None:
    away = replace(fleet.places, mlflow_uri=NOWHERE)
    result = fleet.run("prepare", endpoints=away)
    assert result.mlflow_run is None
    assert result.metrics["images_train"] == 100
    assert any("MLflow cannot be reached; the record waits" in line for line in fleet.said)
    store = open_store(fleet.places.store)
    assert len(store.list(PARKED)) == 1
    assert upload_parked(away, fleet.said.append) == 1
    assert upload_parked(fleet.places) == 0
    assert store.list(PARKED) == []
    (run,) = runs(fleet.places.mlflow_uri)
    assert run.data.metrics["images_train"] == 100
    assert run.data.tags["dvc.outs.data"] == result.lock["outs"][0]["md5"]
    assert (run.info.status, run.data.tags["git.dirty"]) == ("FINISHED", "False")
    again = fleet.run("prepare", machine="two")
    assert (again.cached, again.metrics) == (True, result.metrics)


def test_a_parked_record_cannot_write_outside_of_its_folder(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    places = endpoints({}, tmp_path)
    open_store(places.store).put(f"{PARKED}bad.tar.gz", packed.getvalue())
    with pytest.raises(ArtifactError, match=r"\.\./outside\.txt"):
        upload_parked(places)


def test_a_record_is_logged_once_and_found_again_with_its_result(fleet: Fleet) -> None:
    first = fleet.run("prepare")
    (run,) = runs(fleet.places.mlflow_uri)
    assert first.mlflow_run == run.info.run_id
    assert first.mlflow_url is not None and first.mlflow_url.endswith(f"/runs/{run.info.run_id}")
    again = fleet.run("prepare", machine="two")
    assert again.cached
    assert again.as_plain() == {**first.as_plain(), "cached": True, "seconds": 0.0, "joules": None}
    assert len(runs(fleet.places.mlflow_uri)) == 1
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(fleet.shared)
