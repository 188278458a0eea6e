"""A chain of students that ends itself: each is held against the teacher before the next is made of it.

The question is evaluate's, the noise and the images are those of choices: KID(student) − KID(teacher at the anchor's
steps) on the selection part, against the margin that `anchor` froze before any student existed. The first student that
is not non-inferior is the last (optimise/stages.py says why); it is kept, as what shows where the chain had to end.

Students are asked in a fixed order, and none behind the first failure, so each may be asked at the full 95 %: the
chance that any inferior student passes is that of the first one's passing (Maurer et al. 1995, fixed sequences).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.datasets.shards import Dataset
from ado_tasks.errors import ArtifactError
from ado_tasks.interop.diffusers_folder import StoredModel
from ado_tasks.metrics.kernel import KernelSums, kernel_sums
from ado_tasks.metrics.noninferiority import difference_from_sums, non_inferior
from ado_tasks.models.classifier import FeatureExtractor, load_features
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.stages import Stage, Stop, stopping_point
from ado_tasks.report import Reporter
from ado_tasks.sampling import Draw, Sampler, draw
from ado_tasks.storage import load_arrays, read_json

SELECTION = "selection"  # part and draw that choices are made on, as the anchor's


@dataclass
class Stopping:
    """What students are held against, and what was found of those so far."""

    anchor: dict[str, Any]  # anchor.json
    extractor: FeatureExtractor
    real: np.ndarray  # (m, d) whitened features of the selection part
    teacher: KernelSums  # of the teacher's samples, from the same noise as a student's
    start: Draw
    found: list[Stage] = field(default_factory=list)

    @staticmethod
    def read(data: Dataset, features: Path, anchor: Path, seed: int) -> "Stopping":
        """From the folders that `features` and `anchor` made.

        Raises:
            ArtifactError: they do not belong together, or to this dataset and seed.
        """
        said = read_json(anchor / "anchor.json", "margin", "steps", "features_sha256", "seed", "n_real", "config")
        extractor, part = load_features(features), data.split(SELECTION)
        expected = {"features_sha256": extractor.sha256, "seed": seed, "n_real": len(part)}
        wrong = [f"{name} {said[name]}, here {value}" for name, value in expected.items() if said[name] != value]
        if wrong:
            raise ArtifactError(f"{anchor}: frozen under other conditions ({'; '.join(wrong)}); run `anchor` again")
        of_teacher = np.array(load_arrays(anchor / "teacher.safetensors")["features"])
        real = extractor.whitened(extractor.features(part.batch(np.arange(len(part)))))
        start = draw(seed, SELECTION, len(of_teacher), part)
        return Stopping(said, extractor, real, kernel_sums(of_teacher, real), start)

    def goes_on(self, stored: StoredModel, student: Any, times: np.ndarray, report: Reporter) -> bool:
        """Whether another student may follow this one: hold it, with DDIM's steps, against the teacher.

        Args:
            stored: the model whose network and noise schedule the student has.
            student: its weights.
            times: of its sampler.
            report: where the difference goes.

        Raises:
            DivergenceError: a sample is not finite.
        """
        unet = UNet2D(stored.unet.config)  # its own: what is compiled keeps the weights that it met
        unet.update(student)
        settings = self.anchor["config"]  # sampled as the teacher's were
        model = StoredModel(unet, stored.scheduler_config, {})
        sampler = Sampler(model, settings["batch_size"], settings["shards"])
        images, steps = sampler(self.start, "ddim", times), len(times) - 1
        sums = kernel_sums(self.extractor.whitened(self.extractor.features(images)), self.real)
        self.found.append(Stage(steps, difference_from_sums(sums, self.teacher)))
        report.metric(f"distill_{steps}.kid_minus_teacher", self.found[-1].difference.value)
        return non_inferior(self.found[-1].difference, self.margin)

    @property
    def margin(self) -> float:
        """What a student may lose."""
        return float(self.anchor["margin"])

    def stop(self) -> Stop:
        """Where the chain stopped, and why."""
        return stopping_point(self.found, self.margin)

    def index(self, asked: Iterable[int]) -> dict[str, Any]:
        """The family's index.json: the students that exist, where it stopped of the `asked`, why, what was measured."""
        stop, made = self.stop(), [stage.steps for stage in self.found]
        return {
            "students": made,
            "not_made": [steps for steps in asked if steps not in made],
            "steps": stop.steps, "failed": stop.failed, "decided": stop.decided, "reason": stop.reason,
            "margin": self.margin,
            "kid_minus_teacher": [
                {
                    "steps": stage.steps, "value": stage.difference.value,
                    "ci": [stage.difference.low, stage.difference.high],
                    "non_inferior": non_inferior(stage.difference, self.margin),
                }
                for stage in self.found
            ],
            "measured_on": {
                "part": SELECTION, "draw": SELECTION, "seed": self.anchor["seed"], "n_generated": len(self.start),
                "n_real": len(self.real), "teacher_steps": self.anchor["steps"],
                "features_sha256": self.extractor.sha256,
            },
        }  # fmt: skip
