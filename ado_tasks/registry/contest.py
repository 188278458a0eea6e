"""Challenger against champion: both sampled anew from one noise, measured by one network, then judged by the gate.

Figures of two runs cannot be held against each other: with the data, the feature network changes, and with it what KID
means. So what is kept of a champion is the model itself (its package, in MLflow), and every challenger is compared with
it, and with the anchor, on the challenger's own report part: the interval is then that of `evaluate`, paired by noise.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.datasets.shards import open_dataset
from ado_tasks.errors import ArtifactError
from ado_tasks.interop.package import Package, read_package, write_package
from ado_tasks.metrics.noninferiority import kid_difference
from ado_tasks.models.classifier import FeatureExtractor, load_features
from ado_tasks.registry.client import connect, named_registry_errors
from ado_tasks.registry.record import Record, Version, read_record
from ado_tasks.registry.versions import COST_TAG, fetch_package, get_version
from ado_tasks.registry.workspace import Workspace
from ado_tasks.sampling import Draw, Sampler, draw
from ado_tasks.stores import open_store


@dataclass(frozen=True)
class Contest:
    """What the gate is told besides the reports."""

    name: str  # of the variant
    model_sha256: str  # of its package
    champion: dict[str, Any] | None  # see `ado_tasks.gate.gate`
    against: dict[str, Any]  # KID(challenger) − KID(that model) by role; empty where nothing needs comparing


def hold(place: Workspace, name: str, *, mlflow_uri: str, store_url: str, model: str) -> Contest:
    """Compare a variant of a workspace with the champion and the anchor, where there are any.

    Nothing is sampled where there is no champion, and where the registry knows the challenger's bytes already.

    Raises:
        ArtifactError: a model or a version is missing or damaged, or makes other images than the data has.
        RegistryError, StorageError: MLflow or the store cannot be reached.
    """
    package = place.package(name)
    record = read_record(open_store(store_url), model)
    with tempfile.TemporaryDirectory(prefix="ado-gate-") as folder:
        sha256 = write_package(Path(folder) / "challenger", package)
        if record.champion is None:
            return Contest(name, sha256, None, {})
        champion = _champion_figures(record, record.champion, mlflow_uri, model)
        known = {record.champion.model_sha256, *(each.model_sha256 for each in record.withdrawn)}
        if sha256 in known:
            return Contest(name, sha256, champion, {})
        return Contest(name, sha256, champion, _differences(place, package, record, Path(folder), mlflow_uri, model))


def _champion_figures(record: Record, champion: Version, mlflow_uri: str, model: str) -> dict[str, Any]:
    """What the gate is told of the champion."""
    with named_registry_errors(mlflow_uri):
        tags = get_version(connect(mlflow_uri), model, champion.version).tags
    cost = json.loads(tags.get(COST_TAG, "{}"))
    return {
        "version": champion.version,
        "model_sha256": champion.model_sha256,
        "cost": cost.get("cost"),
        "hardware": cost.get("hardware"),
        "withdrawn": [
            {"version": each.version, "model_sha256": each.model_sha256, "reason": each.reason}
            for each in record.withdrawn
        ],
    }


def _differences(
    place: Workspace, package: Package, record: Record, folder: Path, mlflow_uri: str, model: str
) -> dict[str, Any]:
    """KID(challenger) − KID(champion), and − KID(anchor), with intervals, by name."""
    rivals = {"champion": record.champion, "anchor": record.anchor}
    measured = FeaturesOf(place)
    of_challenger = measured(package)
    found: dict[str, Any] = {}
    made: dict[str, np.ndarray] = {}
    for role, rival in rivals.items():
        if rival is None:
            continue
        if rival.version not in made:
            with named_registry_errors(mlflow_uri):
                fetched = fetch_package(connect(mlflow_uri), model, rival.version, folder / role)
            made[rival.version] = measured(read_package(fetched))
        interval = kid_difference(of_challenger, made[rival.version], measured.real, groups=measured.groups)
        found[role] = {"version": rival.version, "value": interval.value, "ci": [interval.low, interval.high]}
    return found


class FeaturesOf:
    """Whitened features of a package's samples: from the noise and labels that `evaluate` drew for the report.

    With `purpose` and `seed`, from other noise: as much of it, drawn for that purpose.
    """

    def __init__(self, place: Workspace, *, purpose: str | None = None, seed: int | None = None) -> None:
        """Read the data and the feature network. Raises ArtifactError where they are not the report's."""
        self._quality = place.quality()
        self._extractor: FeatureExtractor = load_features(place.features)
        expected = self._quality["reference"]["features_sha256"]
        if self._extractor.sha256 != expected:
            raise ArtifactError(f"{place.features}: SHA-256 {self._extractor.sha256}, the report used {expected}")
        self._data = open_dataset(place.data)
        self._start: Draw = self._draw(self._quality["reference"], purpose, seed)
        self.real = self.of_part("report")
        self.groups = self._data.split("report").groups

    def of_part(self, name: str) -> np.ndarray:
        """Those of the real images of a part of the data."""
        part = self._data.split(name)
        return self._white(part.batch(np.arange(len(part))))

    def _draw(self, reference: dict[str, Any], purpose: str | None, seed: int | None) -> Draw:
        seeds = reference["seeds"]
        drawn_by = seeds["report"] if seed is None else seed
        return draw(drawn_by, purpose or seeds["draw"], reference["n_generated"], self._data.split("report"))

    def _white(self, images: np.ndarray) -> np.ndarray:
        return self._extractor.whitened(self._extractor.features(images))

    def __call__(self, package: Package) -> np.ndarray:
        """One row a sample. Raises ArtifactError where it makes other images than the data has."""
        classes = len(self._data.classes)
        if package.shape != self._data.shape or package.classes not in {0, classes}:
            raise ArtifactError(
                f"{package.name} makes {package.shape} images of {package.classes} classes, the data has "
                f"{self._data.shape} and {classes}: they cannot be compared; register under another name (ADO_MODEL)"
            )
        config = self._quality["config"]
        sampler = Sampler(package.model, config["batch_size"], config["shards"])
        start = self._start if package.classes else Draw(self._start.noise, None)
        return self._white(sampler(start, package.method, np.array(package.times), told=package.told_array))
