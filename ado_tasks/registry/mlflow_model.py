"""The registered model: what `mlflow models serve` runs. Seeds, counts and classes in; PNG images out.

MLflow stores this very file with each version (models-from-code) and the modules of ours that it needs beside it, so a
version makes the same images whatever the project has become since. Nothing is pickled.
"""

import base64
import io
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.datasets.shards import to_uint8
from ado_tasks.interop.package import Package, read_package
from ado_tasks.sampling import Draw, Images, Sampler

ARTIFACT = "package"  # the name of the package among the version's artifacts
BATCH = 16  # images through the network at a time; a part of every image's last bits, and so of the format
MOST = 1024  # images a request
ANY = -1  # as a label: the classes in turn


class DiffusionModel(PythonModel):
    """Samples from a package.

    Input columns: `seed` (whole number from 0), `count` (images), `label` (a class, -1 or absent: the classes in turn).
    One row comes out an image: `seed`, `index`, `label` (-1 for a model without classes) and `png`, base64. Image
    `index` of a seed is the same however many are asked for.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read the package."""
        self._alone = _OneThread()
        self._package, self._sampler = self._alone(_load, Path(context.artifacts[ARTIFACT]))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """The images that each row asks for, in order."""
        wanted = [_request(row, self._package.classes) for row in model_input.to_dict("records")]
        if sum(count for _, count, _ in wanted) > MOST:
            raise _refused(f"count: at most {MOST} images a request are allowed")
        return self._alone(self._sample, wanted)

    def _sample(self, wanted: list[tuple[int, int, int]]) -> pd.DataFrame:
        rows = []
        for seed, count, label in wanted:
            start = start_of(self._package, seed, count, label)
            package = self._package
            images = self._sampler(start, package.method, np.array(package.times), told=package.told_array)
            labels = np.full(count, ANY) if start.labels is None else start.labels
            rows += [
                {"seed": seed, "index": index, "label": int(labels[index]), "png": as_png(images[index])}
                for index in range(count)
            ]
        return pd.DataFrame(rows).astype({"seed": "int64", "index": "int64", "label": "int64"})


class _OneThread:
    """Calls functions in one thread of its own: MLX ties compiled functions and streams to the thread.

    A server predicts in whatever thread is free. The thread is never ended: one that lets go of MLX's memory while
    Python shuts down takes the process with it (SIGABRT), and one that waits is simply gone with its process.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        Thread(target=self._run, daemon=True, name="sampler").start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        return future.result()

    def _run(self) -> None:
        while True:
            future, function, arguments = self._calls.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as problem:
                future.set_exception(problem)


def start_of(package: Package, seed: int, count: int, label: int = ANY) -> Draw:
    """What images 0 to count - 1 of a seed start from: noise by (seed, index), labels as asked or in turn."""
    shape = package.shape
    noise = np.stack([np.array(mx.random.normal(shape, key=rng.key(seed, "serve", i))) for i in range(count)])
    if not package.classes:
        return Draw(noise, None, seed)
    labels = np.arange(count) % package.classes if label == ANY else np.full(count, label)
    return Draw(noise, labels.astype(np.int32), seed)


def as_png(image: Images) -> str:
    """One image (H, W, C) in [-1, 1] as base64 of a PNG, whose pixels are exact."""
    pixels = to_uint8(image)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _load(folder: Path) -> tuple[Package, Sampler]:
    package = read_package(folder)
    return package, Sampler(package.model, batch_size=BATCH)


def _request(row: dict[Any, Any], classes: int) -> tuple[int, int, int]:
    """Seed, count and label of one row. Raises MlflowException, which a server answers with status 400."""
    label = row.get("label", ANY)
    values = {"seed": row.get("seed"), "count": row.get("count", 1), "label": ANY if pd.isna(label) else label}
    allowed = {"seed": range(2**63), "count": range(1, MOST + 1), "label": range(ANY, max(classes, 0))}
    for name, value in values.items():
        if value is None or pd.isna(value) or int(value) != value or int(value) not in allowed[name]:
            last = allowed[name].stop - 1
            raise _refused(f"{name}: {value} is not allowed: a whole number from {allowed[name].start} to {last}")
    return int(values["seed"]), int(values["count"]), int(values["label"])


def _refused(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)


set_model(DiffusionModel())
