"""`ado compare --runs`: evaluations recorded in MLflow, each beside the run that trained and the one that measured."""

from pathlib import Path
from typing import Any

import pytest

from ado_tasks import comparison
from ado_tasks.compare import main
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.registry.client import connect, experiment_id

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow.*", "ignore::DeprecationWarning")  # its own deprecations


def record(client: Any, uri: str, task: str, tags: dict[str, str], params: dict[str, Any], **figures: float) -> str:
    run = client.create_run(experiment_id(client, uri), tags={"task": task, **tags}).info.run_id
    for name, value in params.items():
        client.log_param(run, name, value)
    for name, value in figures.items():
        client.log_metric(run, name.replace("__", "."), value)
    client.set_terminated(run)
    return run


def judged(teacher: str) -> dict[str, str]:
    """What `evaluate` and `measure` read."""
    return {
        "dvc.deps.models/teacher": teacher,
        "dvc.deps.models/progressive": f"{teacher}-students",
        "dvc.deps.schedules/teacher": f"{teacher}-schedules",
    }


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two architectures: one measured, one not; and a run that failed, which must not be seen."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = connect(uri)
    small = {"model.block_out_channels": "[16, 32]", "model.layers_per_block": 1, "model.down_block_types": "['Down']"}
    wide = {**small, "model.block_out_channels": "[32, 64]", "model.down_block_types": "['AttnDown', 'AttnDown']"}
    for name, params in (("small", small), ("wide", wide)):
        record(client, uri, "train", {"dvc.outs.models/teacher": name}, params)
    record(
        client, uri, "measure", judged("small"), {},
        **{"teacher-50.speedup": 1.0, "progressive-4.speedup": 11.0, "progressive-4.latency_ms_per_image": 2.5},
    )  # fmt: skip
    for name in ("small", "wide"):
        record(
            client, uri, "evaluate", {**judged(name), "dvc.deps.features/digits": "f" * 32}, {},
            **{"teacher-50.kid": 0.5, "progressive-4.kid": 0.53, "progressive-4.fd": 2.0, "calibrated-8.kid": 0.51},
        )  # fmt: skip
    failed = client.create_run(experiment_id(client, uri), tags={"task": "evaluate"}).info.run_id
    client.set_terminated(failed, "FAILED")
    return uri


def test_rows_join_what_was_trained_measured_and_judged(uri: str) -> None:
    rows = {(row.architecture, row.variant): row for row in comparison.last_runs(uri, 5)}
    assert set(rows) == {
        (architecture, variant)
        for architecture in ("16-32 ×1", "32-64 ×1 attn 2")
        for variant in ("teacher-50", "progressive-4", "calibrated-8")
    }
    row = rows["16-32 ×1", "progressive-4"]
    assert row.kid == pytest.approx(0.03)  # minus its own teacher's
    assert (row.fd, row.latency_ms, row.speedup) == (2.0, 2.5, 11.0)
    assert rows["32-64 ×1 attn 2", "progressive-4"].speedup is None  # the other's cost is not taken for its own
    assert row.cells()["kid"] == "+0.030"


def test_the_newest_come_first_and_as_many_as_asked(uri: str) -> None:
    assert {row.architecture for row in comparison.last_runs(uri, 1)} == {"32-64 ×1 attn 2"}


def test_the_command_prints_a_table_and_draws_a_picture(uri: str, tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "runs.png"
    assert main(["--runs", "2", "--markdown", "--out", str(picture)]) == 0
    table = capsys.readouterr().out
    assert table.count("progressive-4") == 2
    assert "| run | started | architecture |" in table
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_an_evaluation_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished evaluation is recorded; run `make demo`"):
        comparison.last_runs(f"sqlite:///{tmp_path}/empty.db", 3)


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="--runs: 0 is not allowed"):
        main(["--runs", "0"])
