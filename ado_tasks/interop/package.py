"""A model with its sampler, as one folder: all that is needed to make its images, and nothing else.

- model/: a Diffusers folder (`ado_tasks.interop.diffusers_folder`)
- sampler.json: the solver, where it steps, and the SHA-256 of both together
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.errors import ArtifactError
from ado_tasks.interop.diffusers_folder import RECORD, StoredModel, read_model, write_model
from ado_tasks.storage import atomic_folder, read_json, sha256_file, write_json

MODEL = "model"
SAMPLER = "sampler.json"


@dataclass(frozen=True)
class Package:
    """A model and how to sample from it."""

    name: str  # of the variant: <family>-<nfe>
    method: str  # key of SOLVERS
    times: tuple[float, ...]  # (steps + 1,), from 1 down to 0
    model: StoredModel
    told: tuple[float, ...] | None = None  # (steps,): times that the network is told, where they are not the solver's

    @property
    def told_array(self) -> np.ndarray | None:
        """`told` as an array."""
        return None if self.told is None else np.array(self.told)

    @property
    def classes(self) -> int:
        """How many classes the model can be asked for; 0 for one that is not told a class."""
        return self.model.unet.config.num_class_embeds or 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of its images."""
        config = self.model.unet.config
        if config.sample_size is None:
            raise ArtifactError(f"{self.name}: its configuration names no sample_size, so no image can be drawn")
        size = config.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height, width, config.in_channels


def write_package(folder: Path, package: Package) -> str:
    """Write a package, atomically, and return its SHA-256. The same package gives the same bytes."""
    with atomic_folder(folder) as partial:
        model = package.model
        write_model(partial / MODEL, model.unet, model.scheduler_config, model.record)
        sha256 = _sha256(partial / MODEL, package.method, package.times, package.told)
        told = {} if package.told is None else {"told": list(package.told)}
        write_json(
            partial / SAMPLER,
            {"name": package.name, "method": package.method, "times": list(package.times), **told, "sha256": sha256},
        )
    return sha256


def read_package(folder: Path) -> Package:
    """Read a package. Raises ArtifactError where a file is missing, damaged or changed since it was written."""
    sampler = _checked_sampler(folder)
    told = tuple(sampler["told"]) if "told" in sampler else None
    return Package(sampler["name"], sampler["method"], tuple(sampler["times"]), read_model(folder / MODEL), told)


def package_sha256(folder: Path) -> str:
    """The SHA-256 that a package's folder states, once its files were found to have it. Raises ArtifactError."""
    return _checked_sampler(folder)["sha256"]


def _checked_sampler(folder: Path) -> dict[str, Any]:
    sampler = read_json(folder / SAMPLER, "name", "method", "times", "sha256")
    found = _sha256(folder / MODEL, sampler["method"], sampler["times"], sampler.get("told"))
    if found != sampler["sha256"]:
        raise ArtifactError(f"{folder}: SHA-256 {found}, expected {sampler['sha256']}: damaged or changed")
    return sampler


def _sha256(model: Path, method: str, times: Sequence[float], told: Sequence[float] | None) -> str:
    """Of what decides the images. The record of what was done to the model does not."""
    files = sorted(path for path in model.rglob("*") if path.is_file() and path.name != RECORD)
    sums = {path.relative_to(model).as_posix(): sha256_file(path) for path in files}
    grid = np.asarray(times, dtype=np.float64).tolist()
    sampler = [method, grid] if told is None else [method, grid, np.asarray(told, dtype=np.float64).tolist()]
    return hashlib.sha256(json.dumps([sums, *sampler], sort_keys=True).encode()).hexdigest()
