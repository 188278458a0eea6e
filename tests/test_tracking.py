"""Each run of a task becomes one MLflow run, whatever happens to the task or to MLflow."""

import json
from pathlib import Path

import pytest

from ado_tasks import config, sync, tracking
from ado_tasks.errors import ArtifactError, DivergenceError, RegistryError, StorageError
from ado_tasks.registry.client import EXPERIMENT
from ado_tasks.report import Reporter


@config.config
class Settings:
    steps: int = 3
    stages: tuple[int, ...] = (8, 4)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADO_SYNC", "manual")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sys.argv", ["ado", "train", "--out", "models/teacher"])
    return tmp_path


def run_once(fail: Exception | None = None) -> Path:
    with tracking.recorded("train", "train", Settings(), {"out": Path("models/teacher"), "seed": 7}) as report:
        assert isinstance(report, Reporter)
        for step in range(3):
            report.metric("loss", 1.0 / (step + 1), step)
        report.metric("accuracy", 0.5)
        Path("samples.png").write_bytes(b"picture")
        report.picture("samples", Path("samples.png"))
        if fail:
            raise fail
    return sorted(tracking.RUNS.iterdir())[-1]


def test_a_record_says_what_ran(workspace: Path) -> None:
    record = tracking.read_record(run_once())
    assert record["status"] == "FINISHED"
    assert record["params"] == {"steps": 3, "stages": [8, 4]}
    assert record["inputs"] == {"out": "models/teacher", "seed": 7}
    assert record["hardware"]["mlx"]
    assert record["ended_ms"] >= record["started_ms"]


def test_a_failed_task_leaves_its_error(workspace: Path) -> None:
    with pytest.raises(DivergenceError):
        run_once(DivergenceError("the loss is nan at step 3"))
    (folder,) = tracking.RUNS.iterdir()
    assert tracking.read_record(folder)["status"] == "FAILED"
    assert "step 3" in tracking.read_record(folder)["error"]


def test_a_line_cut_short_is_left_out(workspace: Path) -> None:
    folder = run_once()
    path = folder / "events.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [event["name"] for event in tracking.read_events(folder)] == ["loss", "loss", "loss", "accuracy"]


def test_only_one_uploader_at_a_time(workspace: Path) -> None:
    with tracking.uploader_lock(wait=False) as first, tracking.uploader_lock(wait=False) as second:
        assert first
        assert not second


@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_a_damaged_record_is_named_and_keeps_no_other_back(workspace: Path) -> None:
    folder = run_once()
    (folder / "events.jsonl").write_text('[1]\n{"kind": "metric"}\n{"kind": "song"}\n')
    for name, text in (("0-text", "{"), ("0-empty", "{}")):
        (tracking.RUNS / name).mkdir()
        (tracking.RUNS / name / "record.json").write_text(text)
    with pytest.raises(
        ArtifactError, match=r"0-empty/record\.json: has no section[\s\S]*0-text/record\.json: not valid"
    ):
        sync.main([])
    assert (folder / "uploaded.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_mlflow_that_is_away_is_named_and_the_record_stays(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_once()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"MLflow at http://127\.0\.0\.1:9"):
        sync.main([])
    assert tracking.pending() == [folder]


def test_a_home_that_is_a_file_is_named(workspace: Path) -> None:
    Path(".ado").write_text("")
    with pytest.raises(StorageError, match=r"\.ado"):
        sync.main([])


@pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
def test_records_reach_mlflow_once(workspace: Path) -> None:
    from mlflow import MlflowClient

    folder = run_once()
    command = " ".join(tracking.read_record(folder)["command"])
    out = {"path": "models/teacher", "md5": "abc.dir"}
    dep = {"path": "data/digits", "md5": "def.dir"}
    (workspace / "dvc.lock").write_text(
        json.dumps({"stages": {"train": {"cmd": command, "deps": [dep], "outs": [out]}}})
    )
    assert sync.main([]) == 0
    (folder / "uploaded.json").unlink()  # as if the uploader had been killed between the last request and this note
    assert sync.main([]) == 0
    assert tracking.pending() == []
    assert not (workspace / "mlruns").exists()
    assert list((workspace / tracking.HOME / "mlartifacts").rglob("*.png"))

    client = MlflowClient(sync.tracking_uri())
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.data.params["stages"] == "[8, 4]"
    assert run.data.params["input.seed"] == "7"
    assert run.data.metrics["accuracy"] == 0.5
    assert {p.step: p.value for p in client.get_metric_history(run.info.run_id, "loss")} == {0: 1.0, 1: 0.5, 2: 1 / 3}
    assert run.data.tags["dvc.outs.models/teacher"] == "abc.dir"
    assert run.data.tags["dvc.deps.data/digits"] == "def.dir"
    assert run.data.tags["git.revision"]
    assert run.data.tags["hardware.blas"]
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/samples.png"]
