"""A package as an MLflow model: its code, its signature, an example, the packages it needs."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ado_tasks.closure import PACKAGE, import_closure

SERVED = "ado_tasks.registry.mlflow_model"
ARTIFACT = "package"  # the name of the package among the version's artifacts
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "rich")  # third parties in its closure


def log_served(package: Path) -> Any:
    """Log the package at `package` as the model of the active MLflow run; returns MLflow's ModelInfo."""
    import mlflow  # noqa: PLC0415

    with _code() as code:
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(code / Path(*SERVED.split(".")).with_suffix(".py")),
            artifacts={ARTIFACT: str(package)},
            code_paths=[str(code / PACKAGE)],
            signature=signature(),
            input_example=example(),
            pip_requirements=requirements(),
        )


def signature() -> Any:
    """Columns in and out; `label` may be left out."""
    from mlflow.models import ModelSignature  # noqa: PLC0415
    from mlflow.types import ColSpec, Schema  # noqa: PLC0415

    inputs = [ColSpec("long", "seed"), ColSpec("long", "count"), ColSpec("long", "label", required=False)]
    outputs = [ColSpec("long", "seed"), ColSpec("long", "index"), ColSpec("long", "label"), ColSpec("string", "png")]
    return ModelSignature(Schema(inputs), Schema(outputs))  # pyright: ignore[reportArgumentType]


def example() -> pd.DataFrame:
    """Two images of seed 0, of the first two classes."""
    return pd.DataFrame({"seed": [0], "count": [2]})


def requirements() -> list[str]:
    """What a new environment would install; MLX is named as each system needs it."""
    mlx = version("mlx")
    platforms = [f"mlx=={mlx}; sys_platform == 'darwin'", f"mlx[cpu]=={mlx}; sys_platform == 'linux'"]
    return [*platforms, *(f"{name}=={version(name)}" for name in REQUIREMENTS)]


@contextmanager
def _code() -> Iterator[Path]:
    """A folder with the modules of ours that the model needs, and no other."""
    with tempfile.TemporaryDirectory(prefix="ado-served-") as name:
        root = Path(__file__).resolve().parents[2]
        for path in import_closure(SERVED):
            target = Path(name) / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        yield Path(name)
