"""Task `anchor`: what "as good as the teacher" will mean, frozen before any student exists."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.config import as_plain, config
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.interop.diffusers_folder import check_teacher, read_model
from ado_tasks.metrics.kernel import kernel_sums, kid_from_sums, real_sums
from ado_tasks.metrics.noninferiority import kid_difference, margin, non_inferior, samples_needed
from ado_tasks.models.classifier import load_features
from ado_tasks.report import SILENT, Reporter
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import atomic_folder, save_arrays, write_json

AA_TRIALS = 50  # random halvings in the A/A check
AA_POWER = 0.8  # docs/science.md, Metrics: the share of A/A pairs that must pass
SELECTION = "selection"  # the draw that choices are made on


@config
class AnchorConfig:
    """How the margin is found."""

    n_generated: Annotated[int, Field(ge=100)] = 2000  # samples
    steps: Annotated[int, Field(ge=2)] = 50  # DDIM steps of the teacher that students are held against
    coarse_steps: Annotated[int, Field(ge=1)] = 4  # the margin is a tenth of what so few steps lose
    batch_size: Annotated[int, Field(ge=1)] = 256  # images through the network at a time
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU


@dataclass(frozen=True)
class AnchorResult:
    """What was frozen."""

    margin: float  # of KID, own features
    kid_teacher: float  # at `steps`
    kid_coarse: float  # at `coarse_steps`
    aa_pass_rate: float  # share of A/A pairs, at half the samples, that are judged non-inferior


def anchor(
    config: AnchorConfig, *, dataset: Path, features: Path, teacher: Path, out: Path, seed: int,
    report: Reporter = SILENT,
) -> AnchorResult:  # fmt: skip
    """Freeze the margin of non-inferiority: a tenth of what the teacher loses at 4 instead of 50 DDIM steps.

    All on the selection part and its own noise. `out/anchor.json` holds the margin, the KIDs and an A/A check;
    `out/teacher.safetensors` the whitened features of the teacher's samples, which choices among students reuse.

    Args:
        config: see AnchorConfig.
        dataset: folder made by `prepare`.
        features: folder made by `features`.
        teacher: a Diffusers folder.
        out: folder; it appears whole or not at all.
        seed: of the noise and the halvings.
        report: where progress and figures go.

    Raises:
        ConfigError: the teacher makes other images than the dataset's, has fewer classes, or is a student of few steps.
        StatisticsError: the margin is not positive: few steps lose nothing, and there is nothing to preserve.
    """
    stored = read_model(teacher)
    check_teacher(stored, str(teacher))
    part = open_dataset(dataset).split("selection")
    extractor = load_features(features)
    stored.unet.config.check_data(part.shape, part.num_classes, f"{teacher}/unet/config.json")
    sampler = Sampler(stored, config.batch_size, config.shards)
    start = draw(seed, SELECTION, config.n_generated, part)
    fine = sampler(start, "ddim", grids.uniform_time(config.steps), report=report)
    coarse = sampler(start, "ddim", grids.uniform_time(config.coarse_steps))
    real, of_fine, of_coarse = (
        extractor.whitened(extractor.features(images)) for images in (part.batch(np.arange(len(part))), fine, coarse)
    )
    reference = real_sums(real, groups=part.groups)
    kid_fine, kid_coarse = (kid_from_sums(kernel_sums(x, real), reference) for x in (of_fine, of_coarse))
    limit = margin(kid_coarse - kid_fine)
    check = _aa_check(of_fine, real, part.groups, limit, seed)
    with atomic_folder(out) as folder:
        write_json(
            folder / "anchor.json",
            {
                "margin": limit, "kid_teacher": kid_fine, "kid_coarse": kid_coarse, "steps": config.steps,
                "coarse_steps": config.coarse_steps, "n_generated": len(start), "n_real": len(real),
                "features_sha256": extractor.sha256, "seed": seed, "aa": check, "config": as_plain(config),
            },
        )  # fmt: skip
        save_arrays(folder / "teacher.safetensors", {"features": mx.array(of_fine)})
    for name, value in {"margin": limit, "kid_teacher": kid_fine, "kid_coarse": kid_coarse}.items():
        report.metric(name, value)
    report.metric("aa_pass_rate", check["pass_rate"])
    return AnchorResult(limit, kid_fine, kid_coarse, check["pass_rate"])


def _aa_check(generated: np.ndarray, real: np.ndarray, groups: np.ndarray, limit: float, seed: int) -> dict[str, Any]:
    """Halve the samples at random, many times: two halves are the same teacher with independent noise.

    At half the samples the intervals are wider than in any verdict, so the pass rate is a lower bound of theirs.
    """
    half = len(generated) // 2
    passed, intervals = 0, []
    for trial in range(AA_TRIALS):
        order = rng.generator(seed, "anchor", "aa", trial).permutation(len(generated))
        interval = kid_difference(generated[order[:half]], generated[order[half : 2 * half]], real, groups=groups)
        passed += non_inferior(interval, limit)
        intervals.append(interval)
    middle = sorted(intervals, key=lambda interval: interval.high - interval.low)[AA_TRIALS // 2]
    return {
        "trials": AA_TRIALS,
        "n": half,
        "pass_rate": passed / AA_TRIALS,
        "samples_needed": samples_needed(middle, half, limit, power=AA_POWER),
    }
