"""`mlflow models serve` of the champion: a real server, asked over HTTP, answers with images."""

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import s3_server
from PIL import Image

from ado_tasks.gate import decide
from ado_tasks.promote import promote
from ado_tasks.register import register

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow.*")  # its own deprecations


@pytest.fixture
def champion(new_workspace: Callable[[int], Path], tmp_path: Path) -> str:
    """A registry with a champion; its address."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    places = {"mlflow_uri": uri, "store_url": str(tmp_path / "store"), "model": "ado"}
    root = new_workspace(1)
    verdict = decide(root, **places)
    made = register(root, verdict, run_id="run", revision="abc", **places)
    promote(made["version"], verdict, key="run", approver="ann", **places)
    return uri


@pytest.fixture
def server(champion: str, tmp_path: Path) -> Iterator[str]:
    """The server's address, as README and guide say to start it."""
    port = s3_server.free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/ado@champion", "--env-manager", "local",
        "--host", "127.0.0.1", "-p", str(port),
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": champion, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=tmp_path, start_new_session=True)
    try:
        s3_server.wait_for_port(port, 120)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def ask(address: str, rows: list[dict[str, int]]) -> list[dict[str, Any]]:
    body = json.dumps({"dataframe_records": rows}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["predictions"]


def test_it_answers_with_the_images_of_the_champion(server: str, champion: str) -> None:
    answered = ask(server, [{"seed": 7, "count": 3, "label": -1}, {"seed": 8, "count": 1, "label": 4}])
    assert [(row["seed"], row["index"], row["label"]) for row in answered] == [
        (7, 0, 0), (7, 1, 1), (7, 2, 2), (8, 0, 4),
    ]  # fmt: skip
    for row in answered:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"]))))
        assert pixels.shape == (8, 8)
    mlflow.set_tracking_uri(champion)
    here = mlflow.pyfunc.load_model("models:/ado@champion").predict(pd.DataFrame({"seed": [7], "count": [3]}))
    assert [row["png"] for row in answered[:3]] == list(here["png"])

    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, [{"seed": 0, "count": 0}])
    assert caught.value.code == 400
    assert "count: 0 is not allowed" in caught.value.read().decode()
