"""Each run of a task becomes one MLflow run, whatever happens to the task or to MLflow."""

import json
from pathlib import Path

import pytest

from ado_tasks import config, sync, tracking
from ado_tasks.errors import DivergenceError
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

    client = MlflowClient(sync.tracking_uri())
    (run,) = client.search_runs([client.get_experiment_by_name(sync.EXPERIMENT).experiment_id])
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
