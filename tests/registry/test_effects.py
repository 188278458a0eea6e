"""Gate, register, promote, rollback on a real MLflow: once each, whatever dies in between."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import s3_server

from ado_tasks.errors import ArtifactError, PromotionError, RegistryError
from ado_tasks.gate import decide
from ado_tasks.promote import promote
from ado_tasks.register import register
from ado_tasks.registry.client import connect
from ado_tasks.registry.record import read_record
from ado_tasks.registry.versions import SHA_TAG, fetch_package
from ado_tasks.rollback import rollback
from ado_tasks.stores import FolderStore

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow.*")  # its own deprecations
MODEL = "ado"
NewWorkspace = Callable[[int], Path]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    return {"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db", "store_url": str(tmp_path / "store"), "model": MODEL}


def aliases(places: dict[str, str]) -> dict[str, str]:
    found = connect(places["mlflow_uri"]).get_registered_model(MODEL).aliases
    return {alias: str(version) for alias, version in found.items()}


def versions(places: dict[str, str]) -> list[Any]:
    return list(connect(places["mlflow_uri"]).search_model_versions(f"name = '{MODEL}'"))


def through(root: Path, places: dict[str, str], run: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gate, register and promote the student of a workspace; returns the verdict and the registration."""
    verdict = decide(root, **places)
    assert verdict["approved"], verdict["reasons"]
    made = register(root, verdict, run_id=run, revision="abc", **places)
    promote(made["version"], verdict, key=run, approver="ann", **places)
    return verdict, made


def images(places: dict[str, str], alias: str) -> list[str]:
    """What a seed gives, loaded in a process of its own as a server would."""
    code = (
        "import mlflow, pandas as pd, sys\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
        "print(*model.predict(pd.DataFrame({'seed': [7], 'count': [3]}))['png'])\n"
    )
    command = [sys.executable, "-c", code, places["mlflow_uri"], f"models:/{MODEL}@{alias}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.split()


def test_first_champion_second_champion_and_back(new_workspace: NewWorkspace, places: dict[str, str]) -> None:
    first_workspace = new_workspace(1)
    first_verdict, first = through(first_workspace, places, "run-1")
    assert first_verdict["champion"] is None
    assert aliases(places) == {"champion": "1"}
    before = images(places, "champion")

    same = decide(first_workspace, **places)
    assert not same["approved"]
    assert same["reasons"][0].startswith("The challenger is the champion: version 1 has the same bytes")

    second = new_workspace(2)
    verdict = decide(second, **places)
    assert json.loads((second / "reports/verdict.json").read_text()) == verdict
    assert verdict["champion"] == "1"
    assert set(verdict["figures"]["against"]) == {"champion", "anchor"}
    assert verdict["figures"]["against"]["champion"]["value"] != 0
    made = register(second, verdict, run_id="run-2", revision="abc", **places)
    assert aliases(places) == {"champion": "1", "challenger": "2"}
    promote(made["version"], verdict, key="run-2", approver="bob", **places)
    assert aliases(places) == {"champion": "2", "previous": "1"}
    assert images(places, "champion") != before

    rollback("blurred sevens", key="undo", by="ann", **places)
    rollback("blurred sevens", key="undo", by="ann", **places)  # a retry
    assert aliases(places) == {"champion": "1"}
    assert images(places, "champion") == before
    withdrawn = connect(places["mlflow_uri"]).get_model_version(MODEL, "2")
    assert withdrawn.tags["ado.rolled_back"] == "blurred sevens"
    again = decide(second, **places)
    assert again["reasons"][0].endswith("blurred sevens")
    assert first["version"] == "1"


def test_a_version_says_what_was_done_to_it(new_workspace: NewWorkspace, places: dict[str, str]) -> None:
    root = new_workspace(1)
    verdict = decide(root, **places)
    made = register(root, verdict, run_id="run-1", revision="abc", **places)
    client = connect(places["mlflow_uri"])
    tags, run = client.get_model_version(MODEL, made["version"]).tags, client.get_run(made["mlflow_run"])
    assert tags["git.revision"] == "abc"
    assert tags["dvc.outs.models/teacher"] == "abc.dir"
    assert tags["ado.steps"] == "train → distill (progressive, 2)"
    assert [event["task"] for event in json.loads(tags["ado.history"])] == ["train", "distill"]
    assert tags[SHA_TAG] == verdict["model_sha256"]
    assert run.data.params["history.1.config.lr"] == "0.1"
    assert run.data.metrics["cost.speedup_vs_teacher.min"] == 9.0
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(made["mlflow_run"], "pictures")] == ["pictures/samples.png"]


def test_registering_again_makes_nothing_twice(new_workspace: NewWorkspace, places: dict[str, str]) -> None:
    root = new_workspace(1)
    verdict = decide(root, **places)
    first = register(root, verdict, run_id="run-1", revision="abc", **places)
    second = register(root, verdict, run_id="run-1", revision="abc", **places)
    assert (first["created"], second["created"]) == (True, False)
    assert first["version"] == second["version"]
    other = register(root, verdict, run_id="run-2", revision="abc", **places)
    assert other["version"] != first["version"]
    assert len(versions(places)) == 2


def test_what_was_refused_or_changed_is_neither_registered_nor_promoted(
    new_workspace: NewWorkspace, places: dict[str, str]
) -> None:
    root = new_workspace(1)
    verdict, made = through(root, places, "run-1")
    with pytest.raises(PromotionError, match="the gate refused progressive-2, so it is not registered: too slow"):
        register(root, verdict | {"approved": False, "reasons": ["too slow"]}, run_id="r", revision="abc", **places)
    with pytest.raises(PromotionError, match="the gate refused version 1"):
        promote("1", verdict | {"approved": False}, key="r", approver="ann", **places)
    with pytest.raises(PromotionError, match="the verdict is about 0000"):
        promote("1", verdict | {"model_sha256": "0000"}, key="r", approver="ann", **places)
    with pytest.raises(RegistryError, match="there is no version 99"):
        promote("99", verdict, key="r", approver="ann", **places)
    with pytest.raises(ArtifactError, match="not the same"):
        register(root, verdict | {"model_sha256": "0000"}, run_id="r", revision="abc", **places)
    assert aliases(places) == {"champion": made["version"]}


def test_a_version_that_is_not_whole_is_never_promoted(
    new_workspace: NewWorkspace, places: dict[str, str], tmp_path: Path
) -> None:
    root = new_workspace(1)
    verdict = decide(root, **places)
    made = register(root, verdict, run_id="run-1", revision="abc", **places)
    weights = next(tmp_path.glob("mlartifacts/models/*/artifacts/artifacts/package/model/unet/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged or changed"):
        promote(made["version"], verdict, key="run-1", approver="ann", **places)
    assert aliases(places) == {"challenger": "1"}
    assert read_record(FolderStore.at(places["store_url"]), MODEL).champion is None


def test_labels_seeds_and_counts(new_workspace: NewWorkspace, places: dict[str, str]) -> None:
    root = new_workspace(1)
    made = register(root, decide(root, **places), run_id="run-1", revision="abc", **places)
    model = mlflow.pyfunc.load_model(f"models:/{MODEL}/{made['version']}")
    few, many = (model.predict(pd.DataFrame({"seed": [7], "count": [count]})) for count in (3, 12))
    assert list(few["png"]) == list(many["png"])[:3]  # an image depends on its seed and index alone
    assert list(many["label"]) == [*range(10), 0, 1]
    sevens = model.predict(pd.DataFrame({"seed": [7, 8], "count": [2, 1], "label": [7, -1]}))
    assert list(sevens["label"]) == [7, 7, 0]
    assert list(sevens["index"]) == [0, 1, 0]
    assert sevens["png"][0] != few["png"][0]
    for wrong in (
        {"seed": [-1], "count": [1]},
        {"seed": [0], "count": [0]},
        {"seed": [0], "count": [1], "label": [10]},
    ):
        with pytest.raises(mlflow.exceptions.MlflowException, match="is not allowed: a whole number from"):
            model.predict(pd.DataFrame(wrong))
    with pytest.raises(mlflow.exceptions.MlflowException, match="at most 1024 images"):
        model.predict(pd.DataFrame({"seed": [0, 1], "count": [1000, 1000]}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts an MLflow server, again where it was killed, always on the same port."""
    port = s3_server.free_port()
    running: list[subprocess.Popen] = []
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    environment = {
        **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip

    def start() -> subprocess.Popen:
        with (tmp_path / "server.log").open("a") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
        s3_server.wait_for_port(port)
        return running[-1]

    start.uri = f"http://127.0.0.1:{port}"
    yield start
    for process in running:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """As a power cut would: with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_mlflow_killed_between_register_and_promote(
    new_workspace: NewWorkspace, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    places = {"mlflow_uri": server.uri, "store_url": str(tmp_path / "store"), "model": MODEL}
    process = server()
    root = new_workspace(1)
    verdict = decide(root, **places)
    made = register(root, verdict, run_id="run-1", revision="abc", **places)
    kill(process)
    with pytest.raises(RegistryError, match=f"MLflow at {server.uri}"):
        promote(made["version"], verdict, key="run-1", approver="ann", **places)
    assert read_record(FolderStore.at(places["store_url"]), MODEL).champion is None
    server()
    assert register(root, verdict, run_id="run-1", revision="abc", **places) | {"created": True} == made
    for _ in range(2):
        promote(made["version"], verdict, key="run-1", approver="ann", **places)
    assert aliases(places) == {"champion": "1"}
    assert len(versions(places)) == 1
    record = read_record(FolderStore.at(places["store_url"]), MODEL)
    assert [event.action for event in record.history] == ["promote"]
    assert fetch_package(connect(server.uri), MODEL, "1", tmp_path / "fetched").is_dir()


def test_mlflow_away_after_the_record_was_written_is_finished_by_the_retry(
    new_workspace: NewWorkspace, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_workspace(1)
    verdict = decide(root, **places)
    made = register(root, verdict, run_id="run-1", revision="abc", **places)

    def dies(*_: Any) -> None:
        raise mlflow.exceptions.MlflowException("the server is gone")

    with monkeypatch.context() as patched:
        patched.setattr("ado_tasks.promote.reconcile", dies)
        with pytest.raises(RegistryError, match="the server is gone"):
            promote(made["version"], verdict, key="run-1", approver="ann", **places)
    assert aliases(places) == {"challenger": "1"}  # behind the record, and pointing to something whole
    promote(made["version"], verdict, key="run-1", approver="ann", **places)
    assert aliases(places) == {"champion": "1"}
