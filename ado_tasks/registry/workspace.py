"""A folder in which the graph was run: where its models, data and reports are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ado_tasks.config import read_params
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.interop.package import Package
from ado_tasks.storage import read_json
from ado_tasks.variants import ARCHITECTURE, CALIBRATED, Variant, calibrated_variants, student_variant, teacher_variants


@dataclass(frozen=True)
class Workspace:
    """A clone of the project with the outputs of its stages in place."""

    root: Path

    @property
    def params(self) -> dict[str, Any]:
        """All of params.yaml."""
        return read_params(self.root / "params.yaml")

    @property
    def _dataset(self) -> str:
        name = self.params.get("dataset")
        if not isinstance(name, str):
            raise ConfigError(f"dataset: {name!r} is not allowed: the name of a folder under data/ is required")
        return name

    @property
    def data(self) -> Path:
        """The dataset's folder."""
        return self.root / "data" / self._dataset

    @property
    def features(self) -> Path:
        """The folder of the networks that measure quality."""
        return self.root / "features" / self._dataset

    @property
    def reports(self) -> Path:
        """The folder of the reports."""
        return self.root / "reports"

    def quality(self) -> dict[str, Any]:
        """The report of `evaluate`. Raises ArtifactError where it is missing."""
        return read_json(self.reports / "evaluate.json", "variants", "chosen", "reference", "config")

    def cost(self) -> dict[str, Any] | None:
        """The report of `measure`; None where nothing was measured."""
        path = self.reports / "measure.json"
        return read_json(path, "variants", "hardware") if path.exists() else None

    def package(self, name: str) -> Package:
        """A variant by its name, <family>-<nfe>, as it is served. Raises ArtifactError where it is not there."""
        family, _, number = name.rpartition("-")
        if not (number.isascii() and number.isdigit()):
            raise ArtifactError(f"variant {name!r}: a name such as progressive-4 is expected")
        variant = self._variant(name, family, int(number))
        told = None if variant.told is None else tuple(float(t) for t in variant.told)
        return Package(variant.name, variant.method, tuple(float(t) for t in variant.times), variant.model, told)

    def _variant(self, name: str, family: str, steps: int) -> Variant:
        models = self.root / "models"
        if family in {"teacher", ARCHITECTURE}:
            return teacher_variants(read_model(models / family), (steps,), family)[0]
        if family in CALIBRATED:
            frozen = CALIBRATED[family]
            learned = calibrated_variants(read_model(models / frozen), self.root / "schedules" / frozen, family)
            found = next((variant for variant in learned if variant.name == name), None)
            if found is None:
                raise ArtifactError(f"variant {name!r}: no such schedule; there: {', '.join(v.name for v in learned)}")
            return found
        return student_variant(models / family / str(steps))

    def dvc_hashes(self) -> dict[str, str]:
        """What dvc.lock says of every stage's outputs, by path; empty where there is no lock."""
        try:
            lock = yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, yaml.YAMLError) as problem:
            raise ArtifactError(f"{self.root / 'dvc.lock'}: cannot be read ({problem})") from None
        outs = [out for stage in (lock or {}).get("stages", {}).values() for out in stage.get("outs", [])]
        return {out["path"]: str(out.get("md5", "")) for out in outs}

    def pictures(self) -> tuple[Path, ...]:
        """Pictures of the reports."""
        return tuple(sorted(self.reports.glob("*.png")))
