"""The variants of a model that are compared: which weights, which solver, where it steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from ado_tasks.diffusion.solvers import SOLVERS
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import RECORD, StoredModel, read_model
from ado_tasks.models.quantised import floating
from ado_tasks.models.weights import flat_parameters, parameter_count
from ado_tasks.storage import read_json

TEACHER_STEPS = (50, 8, 4, 2, 1)  # DDIM: the reference, and what halving its steps costs without distillation
MULTISTEP = ("ipndm", "dpmpp_2m", "angle_ab2")
BASELINE_GRIDS = ("uniform_time", "uniform_log_snr", "edm_rho")
ARCHITECTURE = "architecture"  # the family of the network that a search chose, with plain DDIM
CALIBRATED = {"calibrated": "teacher", "architecture_calibrated": ARCHITECTURE}  # at learned knots: whose network it is
INDEX = "index.json"  # of a family whose chain ended itself: which students there are, where it stopped, and why


@dataclass(frozen=True)
class Variant:
    """One way to sample."""

    name: str  # <family>-<nfe>
    solver: str  # as shown: "ddim", "ipndm+gits"
    method: str  # key of SOLVERS
    times: np.ndarray  # (steps + 1,) float64, from 1 down to 0
    model: StoredModel
    told: np.ndarray | None = None  # (steps,): times that the network is told, where they are not the solver's

    @property
    def nfe(self) -> int:
        """Network evaluations an image."""
        return SOLVERS[self.method].nfe(self.times)

    @property
    def parameters(self) -> int:
        """Numbers in its network."""
        return parameter_count(floating(self.model.unet))

    @property
    def family(self) -> str:
        """Its name without the number."""
        return self.name.rpartition("-")[0]


def teacher_variants(
    teacher: StoredModel, steps: tuple[int, ...] = TEACHER_STEPS, family: str = "teacher"
) -> list[Variant]:
    """The teacher, or another network that needs many steps, with plain DDIM on Diffusers' trailing grid."""
    return [Variant(f"{family}-{n}", "ddim", "ddim", grids.uniform_time(n), teacher) for n in steps]


def student_folders(models: Path) -> list[Path]:
    """Families of students: folders whose own folders are named by numbers of steps; probes of a search are none."""
    families = {child.parent for child in models.glob("*/*") if child.name.isdigit()}
    return sorted(family for family in families if family.name != "probes")


def student_variants(family: Path) -> list[Variant]:
    """The students in a family's folder, most steps first.

    Raises:
        ArtifactError: there are none, or not those that its index says.
    """
    steps = sorted((int(path.name) for path in family.glob("*") if path.name.isdigit()), reverse=True)
    if not steps:
        raise ArtifactError(f"{family}: no student in it; folders named by their number of steps are expected")
    index = family_index(family)
    if index is not None and index["students"] != steps:
        raise ArtifactError(f"{family}: has students of {steps} steps, its {INDEX} says {index['students']}")
    return [student_variant(family / str(n)) for n in steps]


def family_index(family: Path) -> dict[str, Any] | None:
    """What a family whose chain ended itself says of that; None of any other. Raises ArtifactError where damaged."""
    path = family / INDEX
    return read_json(path, "students", "steps", "failed", "reason", "margin") if path.exists() else None


def student_variant(folder: Path) -> Variant:
    """The student in a folder <family>/<steps>, with the sampler that its record names.

    DDIM on uniform times where it names none. Raises ArtifactError where it names one that does not exist, or times
    that are not of that many steps.
    """
    model, steps = read_model(folder), int(folder.name)
    said = model.record.get("sampler", {})
    try:
        method, times = said.get("solver", "ddim"), said.get("times", grids.uniform_time(steps))
        times = np.array(times, dtype=np.float64)
        allowed = method in SOLVERS and times.shape == (steps + 1,)
    except (AttributeError, TypeError, ValueError):
        method, times, allowed = "", np.zeros(0), False
    if not allowed:
        raise ArtifactError(
            f"{folder / RECORD}: the sampler is {said}; allowed: one of {', '.join(SOLVERS)} at {steps + 1} times"
        )
    return Variant(f"{folder.parent.name}-{steps}", method, method, times, model)


def calibrated_variants(teacher: StoredModel, schedules: Path, family: str = "calibrated") -> list[Variant]:
    """The frozen teacher at its learned knots, fewest steps last; of multistep solvers, the nearest in validation."""
    nearest: dict[int, dict[str, Any]] = {}
    for entry in read_knots(schedules):
        best = nearest.get(entry["nfe"])
        if entry["solver"] in MULTISTEP and (best is None or entry["distance"] < best["distance"]):
            nearest[entry["nfe"]] = entry
    return [
        calibrated_variant(f"{family}-{entry['nfe']}", teacher, entry)
        for entry in sorted(nearest.values(), key=lambda entry: -entry["nfe"])
    ]


def calibrated_variant(name: str, teacher: StoredModel, entry: Mapping[str, Any]) -> Variant:
    """The frozen teacher at the knots of one file of `calibrate`."""
    learner = "ld3" if entry.get("method") == "ld3" else "gits"  # what the knots began with or were learned by
    told = entry.get("told")
    return Variant(
        name, f"{entry['solver']}+{learner}", entry["solver"], np.array(entry["times"]), teacher,
        None if told is None else np.array(told),
    )  # fmt: skip


def read_architecture(folder: Path | None, teacher: StoredModel) -> StoredModel | None:
    """The network that a search chose: `teacher` itself where that is the same network; None without a folder.

    Raises:
        ConfigError: its images or its number of classes are not the teacher's.
    """
    if folder is None:
        return None
    found = read_model(folder)
    for key in ("sample_size", "in_channels", "out_channels", "num_class_embeds"):
        own, asked = (getattr(each.unet.config, key) for each in (found, teacher))
        if own != asked:
            raise ConfigError(f"{folder}/unet/config.json.{key}: {own} is not allowed; allowed: the teacher's, {asked}")
    return teacher if _same_network(found, teacher) else found


def architecture_variants(architecture: StoredModel, schedules: Path | None) -> list[Variant]:
    """The network that a search chose: as many steps of plain DDIM as the reference's, then its own learned knots."""
    plain = teacher_variants(architecture, TEACHER_STEPS[:1], ARCHITECTURE)
    if schedules is None:
        return plain
    return [*plain, *calibrated_variants(architecture, schedules, "architecture_calibrated")]


def all_variants(
    teacher: StoredModel, students: Sequence[Path], schedules: Path, architecture: StoredModel | None = None,
    architecture_schedules: Path | None = None,
) -> list[Variant]:  # fmt: skip
    """Everything that is compared: the teacher, each family of students, the teacher at learned knots.

    Then the network that a search chose, and it at its own learned knots; not where it is the teacher itself (see
    `read_architecture`): one network is not compared under two names.

    Raises:
        ConfigError: two families have one name, and so would their variants; or schedules of no network.
    """
    names = [family.name for family in students]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"students: {', '.join(map(str, students))}: two families of one name; allowed: different ones"
        )
    if architecture is None and architecture_schedules is not None:
        raise ConfigError(
            f"architecture_schedules: {architecture_schedules}: of which network is not said; allowed with architecture"
        )
    families = [variant for family in students for variant in student_variants(family)]
    found = [*teacher_variants(teacher), *families, *calibrated_variants(teacher, schedules)]
    if architecture is None or architecture is teacher:
        return found
    return [*found, *architecture_variants(architecture, architecture_schedules)]


def read_knots(schedules: Path) -> list[dict[str, Any]]:
    """Every learned schedule in a folder made by `calibrate`. Raises ArtifactError where one is damaged, or none is."""
    files = sorted(schedules.glob("*-*.json"))
    if not files:
        raise ArtifactError(f"{schedules}: no schedule in it; files named <solver>-<nfe>.json are expected")
    return [read_json(path, "solver", "nfe", "times", "distance") for path in files]


def baseline_grid(name: str, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """One of the grids that a learned schedule has to beat."""
    if name == "uniform_time":
        return grids.uniform_time(steps)
    return {"uniform_log_snr": grids.uniform_log_snr, "edm_rho": grids.edm_rho}[name](steps, schedule)


def schedule_of(model: StoredModel) -> NoiseSchedule:
    """The noise schedule a model was trained with."""
    return schedule_from_diffusers(model.scheduler_config)


def _same_network(one: StoredModel, other: StoredModel) -> bool:
    """Whether two networks are of one configuration and have the same weights, bit for bit."""
    first, second = (flat_parameters(model.unet) for model in (one, other))
    return (
        one.unet.config == other.unet.config
        and first.keys() == second.keys()
        and all(bool(mx.array_equal(first[name], second[name])) for name in first)
    )
