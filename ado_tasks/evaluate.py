"""Task `evaluate`: the quality of every variant, on a part of the data and on noise that nothing was chosen on."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.config import as_plain, config
from ado_tasks.datasets.shards import Dataset, open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.errors import ArtifactError
from ado_tasks.evaluation.calibration import compare_grids
from ado_tasks.evaluation.pictures import save_paired, save_quality
from ado_tasks.evaluation.quality import Reference, Scores, Yardstick, base_of, score
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.metrics.noninferiority import kid_difference, non_inferior
from ado_tasks.models.classifier import load_features, load_judge
from ado_tasks.optimise.cost import family_passes, training_passes
from ado_tasks.pictures import save_grid
from ado_tasks.report import SILENT, Reporter
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import atomic_files, load_arrays, read_json, write_json
from ado_tasks.variants import (
    ARCHITECTURE,
    CALIBRATED,
    Variant,
    all_variants,
    family_index,
    read_architecture,
    schedule_of,
)

REPORT, SELECTION = "report", "selection"  # names of draws: nothing is ever chosen on the first
# The solution that paired distances are taken to: as near to the exact one (mean square 1.2e-6 a pixel on the demo's
# teacher) as 500 steps of DDIM (1.3e-6), at an eighth of the evaluations: so more noises can be compared.
FINE_STEPS, FINE_SOLVER = 64, "dpmpp_2m"
PICTURED = 20  # samples a row
COMPARED = 256  # samples, at most, on which grids are compared one by one: a batch


@config
class EvaluateConfig:
    """How much is drawn."""

    n_generated: Annotated[int, Field(ge=100)] = 2000  # samples of each variant for distributions
    n_paired: Annotated[int, Field(ge=30)] = 768  # samples that are compared one by one with the fine solution
    draws: Annotated[int, Field(ge=50)] = 400  # random halves for FD and its floor; 50 leave an error of 0.04 floors
    batch_size: Annotated[int, Field(ge=1)] = 256  # images through the network at a time
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    judge_all: bool = False  # on the selection part, for `ado choose`; else only up to the cheapest that is good enough


@dataclass(frozen=True)
class EvaluateResult:
    """The verdict."""

    chosen: str  # fewest evaluations among those that were non-inferior on the selection part
    variants: int  # how many were compared


def evaluate(
    config: EvaluateConfig, *, dataset: Path, features: Path, anchor: Path, teacher: Path, students: tuple[Path, ...],
    schedules: Path, out: Path, seed: int, architecture: Path | None = None,
    architecture_schedules: Path | None = None, report: Reporter = SILENT,
) -> EvaluateResult:  # fmt: skip
    """Compare every variant with the teacher at 50 steps and with real images, and write reports/evaluate.json.

    Args:
        config: see EvaluateConfig.
        dataset: folder made by `prepare`; figures are of its report part.
        features: folder made by `features`.
        anchor: folder made by `anchor`: the margin.
        teacher: a Diffusers folder.
        students: folders of students, one a family.
        schedules: folder made by `calibrate` for the teacher.
        out: folder of the reports; evaluate.json, samples.png, quality.png and paired.png appear in it together.
        seed: of the noise.
        architecture: folder made by `search`: its network is compared too, unless it is the teacher.
        architecture_schedules: folder made by `calibrate` for that network.
        report: where progress and figures go.

    Raises:
        ArtifactError: an input is damaged, or the margin was frozen with other features.
        ConfigError: a model makes other images than the dataset's, or has fewer classes; or schedules of an
            architecture without the architecture.
        DivergenceError: a sample is not finite.
    """
    frozen = read_json(anchor / "anchor.json", "features_sha256", "margin")
    data, extractor = open_dataset(dataset), load_features(features)
    judge = load_judge(features) if data.num_classes > 1 else None
    if frozen["features_sha256"] != extractor.sha256:
        raise ArtifactError(
            f"{anchor}: the margin was frozen with other features than {features} holds; run `anchor` again"
        )
    stored = read_model(teacher)
    searched = read_architecture(architecture, stored)
    variants = all_variants(stored, students, schedules, searched, architecture_schedules)
    for variant in variants:
        variant.model.unet.config.check_data(data.shape, data.num_classes, f"{variant.name}: unet/config.json")
    stopped = {family.name: index for family in students if (index := family_index(family)) is not None}
    samplers = _Samplers(config)
    start = draw(seed, REPORT, config.n_generated, data.split("report"))

    paired = start.first(config.n_paired)
    fine = _fine(samplers, stored, paired)
    samples: dict[str, Images] = {}
    for number, variant in enumerate(variants):
        samples[variant.name] = samplers(variant, start)
        report.progress(number + 1, 2 * len(variants))

    yardstick = Yardstick(
        Reference.of(data, extractor), extractor, judge, frozen["margin"], config.draws,
        rng.derive(seed, "evaluate", "halves"),
    )  # fmt: skip
    base = base_of(yardstick, samples["teacher-50"], fine)
    ddim_error = {v.nfe: _mean_square(samples[v.name], fine) for v in variants if v.family == "teacher"}
    entries = []
    for number, variant in enumerate(variants):
        found = score(yardstick, samples[variant.name], start, base)
        entries.append(_entry(variant, found, ddim_error.get(variant.nfe)))
        report.progress(len(variants) + number + 1, 2 * len(variants))
        for name in ("kid", "fd", "class_accuracy", "paired_distance"):
            if entries[-1][name] is not None:
                report.metric(f"{variant.name}.{name}", entries[-1][name])

    calibration = _compare_grids(samplers, stored, schedules, paired.first(COMPARED))
    chosen, reasons = _choose(config, samplers, variants, data, extractor, anchor, frozen["margin"], seed)
    result = {
        "variants": entries,
        "reference": yardstick.describe() | {
            "n_generated": len(start), "features_sha256": extractor.sha256,
            "judge_sha256": None if judge is None else judge.sha256,
            "seeds": {"report": seed, "draw": REPORT}, "anchor": frozen, "n_paired": len(paired),
            "fine": {"solver": FINE_SOLVER, "grid": "uniform_log_snr", "steps": FINE_STEPS},
        },
        "calibration": calibration,
        "chosen": chosen,
        "choice": reasons,
        "compute": _compute(stored, variants, schedules, architecture_schedules),
        **_architecture(samplers, stored, searched, architecture_schedules, paired.first(COMPARED)),
        **({"stopped": stopped} if stopped else {}),  # chains that ended themselves, on the selection part
        "config": as_plain(config),
    }  # fmt: skip
    with atomic_files(out, last="evaluate.json") as folder:
        rows = {"real, report part": _real(data)}
        rows |= {name: images[:PICTURED] for name, images in samples.items()}
        save_grid(folder / "samples.png", rows)
        save_quality(folder / "quality.png", entries, frozen["margin"])
        save_paired(folder / "paired.png", entries, calibration)
        write_json(folder / "evaluate.json", result)
    for name in ("samples", "quality", "paired"):
        report.picture(name, out / f"{name}.png")
    return EvaluateResult(chosen, len(variants))


def _real(data: Dataset) -> Images:
    """Images for the picture: those whose labels begin the samples'; without classes (patches lie by block) spread."""
    part = data.split("report")
    spread = np.linspace(0, len(part) - 1, PICTURED).astype(np.int64)
    return part.batch(np.arange(PICTURED) if data.num_classes else spread)


class _Samplers:
    """One ready sampler a model, made when first needed; what was sampled from the same noise is not sampled again."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._made: dict[int, Sampler] = {}
        self._known: list[tuple[StoredModel, str, np.ndarray, np.ndarray | None, Draw, Images]] = []

    def __call__(self, variant: Variant, start: Draw) -> Images:
        return self.sample(variant.model, variant.method, variant.times, start, variant.told)

    def sample(
        self, model: StoredModel, solver: str, times: np.ndarray, start: Draw, told: np.ndarray | None = None
    ) -> Images:
        for known, by, at, told_at, drawn, images in self._known:
            same = known is model and by == solver and np.array_equal(at, times) and _equal(told_at, told)
            if same and start.begins(drawn):
                return images[: len(start)]
        if id(model) not in self._made:
            self._made[id(model)] = Sampler(model, self._config.batch_size, self._config.shards)
        images = self._made[id(model)](start, solver, times, told=told)
        self._known.append((model, solver, times, told, start, images))
        return images


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _fine(samplers: _Samplers, model: StoredModel, start: Draw) -> Images:
    """The model's own solution from this noise, as near to the exact one as is worth its evaluations."""
    times = grids.uniform_log_snr(FINE_STEPS, schedule_of(model))
    return samplers(Variant("fine", FINE_SOLVER, FINE_SOLVER, times, model), start)


def _compare_grids(samplers: _Samplers, model: StoredModel, schedules: Path, start: Draw) -> list[dict[str, Any]]:
    """A model's learned knots beside the usual grids, each by its distance to that model's own fine solution."""
    sample = partial(samplers.sample, model, start=start)
    return compare_grids(sample, schedule_of(model), schedules, _fine(samplers, model, start))


def _architecture(
    samplers: _Samplers, teacher: StoredModel, searched: StoredModel | None, schedules: Path | None, start: Draw
) -> dict[str, Any]:
    """What is said of the network that a search chose, beside its variants; nothing where there was no search."""
    if searched is None:
        return {}
    if schedules is None or searched is teacher:
        return {"architecture": {"is_teacher": searched is teacher}}
    calibration = _compare_grids(samplers, searched, schedules, start)
    return {"architecture": {"is_teacher": False, "calibration": calibration}}


def _mean_square(images: Images, fine: Images) -> float:
    return float(np.mean(np.square(images[: len(fine)].astype(np.float64) - fine)))


def _entry(variant: Variant, found: Scores, ddim_error: float | None) -> dict[str, Any]:
    ratio = found.paired_distance / ddim_error if ddim_error and variant.family != "teacher" else None
    return {
        "name": variant.name,
        "solver": variant.solver,
        "nfe": variant.nfe,
        "params": variant.parameters,
        **found.as_plain(),
        "paired_ratio_to_ddim": ratio,  # to the teacher's plain DDIM at the same NFE
    }


def _compute(
    teacher: StoredModel, variants: list[Variant], schedules: Path, architecture_schedules: Path | None = None
) -> dict[str, Any]:
    """Network evaluations of training, of each family's distillation, of learned schedules; None where not known."""
    training = training_passes(teacher.record)
    families: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        if variant.family not in {"teacher", ARCHITECTURE, *CALIBRATED}:
            families.setdefault(variant.family, []).append(variant.model.record)
    return {
        "training": None if training is None else training.evaluations,
        "distillation": {
            family: None if passes is None else passes.evaluations
            for family, passes in ((family, family_passes(records)) for family, records in families.items())
        },
        "calibration": _calibration_cost(schedules),
        **(
            {}
            if architecture_schedules is None
            else {"architecture_calibration": _calibration_cost(architecture_schedules)}
        ),
    }


def _calibration_cost(schedules: Path) -> dict[str, int] | None:
    """Network evaluations by what they were for, as `calibrate` wrote them; None of a folder without an index."""
    index = schedules / "index.json"
    return read_json(index).get("cost") if index.exists() else None


def _choose(
    config: EvaluateConfig, samplers: _Samplers, variants: list[Variant], data: Any, extractor: Any, anchor: Path,
    limit: float, seed: int,
) -> tuple[str, list[dict[str, Any]]]:  # fmt: skip
    """The first variant, cheapest first, that is non-inferior on the selection part and its noise; else the teacher.

    Cheaper are fewer evaluations; of equal numbers, those of the network with fewer parameters.
    """
    part = data.split("selection")
    real = extractor.whitened(extractor.features(part.batch(np.arange(len(part)))))
    teacher = np.array(load_arrays(anchor / "teacher.safetensors")["features"])
    start = draw(seed, SELECTION, len(teacher), part)
    chosen, reasons = None, []
    for variant in sorted((v for v in variants if v.family != "teacher"), key=lambda v: (v.nfe, v.parameters)):
        found = extractor.whitened(extractor.features(samplers(variant, start)))
        interval = kid_difference(found, teacher, real, groups=part.groups)
        passed = non_inferior(interval, limit)
        reasons.append({"name": variant.name, "upper_end": interval.high, "margin": limit, "non_inferior": passed})
        if passed and chosen is None:
            chosen = variant.name
        if chosen and not config.judge_all:
            break
    return chosen or "teacher-50", reasons
