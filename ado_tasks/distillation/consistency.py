"""A family of consistency models: tuned once, then sampled from in one step, two, …; each a Diffusers folder.

All students of the family have the same weights. They differ in the points that they noise to on their way, which are
chosen on the selection part by KID in the features of a fixed random network: not those that figures are reported in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.config import as_plain
from ado_tasks.datasets.shards import Dataset, open_dataset
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, check_teacher, extended, read_model, write_model
from ado_tasks.metrics.kernel import kernel_sums, kid_from_sums, real_sums
from ado_tasks.metrics.random_features import NAME, random_features, standardisation, standardise
from ado_tasks.models.quantised import check_floating
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.optimise.consistency import (
    ConsistencyConfig,
    Tuning,
    best_points,
    highest_level,
    on_grid,
    times_of,
)
from ado_tasks.optimise.loop import Curve, Loop
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.pictures import save_curves
from ado_tasks.report import Reporter
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import atomic_folder, sha256_tree, write_json

RENOISE = "consistency/renoise"  # name of the draw that points are chosen on: it is never reported on
LOWEST_POINT, HIGHEST_POINT = 0.1, 10.0  # noise levels u: the paper's 0.821 lies near the middle, in ratios
MOST_TRAIN = 2000  # images, at most, that the random features are standardised on
SEARCH_BATCH = 256

# How to sample from the folder in Diffusers: exactly so, and within 1e-4 with LCMScheduler.set_timesteps(timesteps=…).
# That one puts a boundary condition of its own around x̂ (σ_d = 0.5, ten times the timestep), which from timestep 50 on
# changes it by less than a millionth.
SCHEDULER = "LCMScheduler"
SNIPPET = """\
alphas_cumprod = DDIMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
for i, t in enumerate(timesteps):
    alpha, sigma = alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()
    z = x if i == 0 else alpha * x + sigma * torch.randn_like(x)  # x begins as torch.randn
    x = alpha * z - sigma * unet(z, t, class_labels=labels).sample
"""


@dataclass(frozen=True)
class Points:
    """Where one student steps, and what that was chosen by."""

    times: tuple[float, ...]  # (steps + 1,), down to 0
    scores: dict[float, float]  # KID by the time that was tried; empty where nothing had to be chosen

    @property
    def steps(self) -> int:
        """Evaluations an image."""
        return len(self.times) - 1


def tune(
    config: ConsistencyConfig, *, teacher: Path, start: Path | None, dataset: Path, out: Path, scratch: Path, seed: int,
    report: Reporter,
) -> Curve:  # fmt: skip
    """Tune a model to consistency (Geng et al. 2024) and write one Diffusers folder for each number of steps.

    Args:
        config: see ConsistencyConfig.
        teacher: a Diffusers folder that predicts v.
        start: another one to begin with, such as a student of few steps; without it the teacher.
        dataset: folder made by `prepare`: the train part is learned from, the selection part chosen on.
        out: folder of the family; `out/<steps>/` is a student. It appears whole or not at all.
        scratch: checkpoints.
        seed: of the order of images, levels, noises, and of the draw that points are chosen on.
        report: where progress and losses go.

    Raises:
        ConfigError: the model does not predict v, the dataset has other sizes or more classes than it, or the teacher
            is a student of few steps and no `start`.
        ArtifactError: a model or the dataset is damaged.
        DivergenceError: a loss or a sample is not finite.
    """
    source = teacher if start is None else start
    stored, data = read_model(source), open_dataset(dataset)
    check_floating(stored.unet, str(source))
    if start is None:
        check_teacher(stored, str(teacher))
    kind = str(stored.scheduler_config.get("prediction_type", "epsilon"))
    if kind != "v_prediction":
        raise ConfigError(
            f"{source}: predicts {kind}; a consistency function must be x itself where there is no noise and finite "
            "where there is nothing else, which only v_prediction is by itself; allowed: v_prediction"
        )
    stored.unet.config.check_data(data.shape, data.num_classes, f"{source}/unet/config.json")
    inputs = {"dataset": data.sha256, "start": sha256_tree(source)}
    checkpoints = Checkpoints.under(scratch, run_key(__name__, as_plain(config), inputs, seed))
    tuning = Tuning(config, schedule_from_diffusers(stored.scheduler_config), kind, seed)
    curve = _train(tuning, stored, data, checkpoints, report)
    tuned = [points for points in _points(config, stored, data, seed) if points.steps in config.student_steps]
    with atomic_folder(out) as folder:
        for points in tuned:
            record = _record(stored, tuning, points)
            write_model(folder / str(points.steps), stored.unet, stored.scheduler_config, record)
        write_json(folder / "curves.json", {"consistency": curve})
        save_curves(folder / "distillation.png", {"consistency tuning": curve}, "weighted distance")
    report.picture("distillation", out / "distillation.png")
    checkpoints.clear()
    return curve


def _train(tuning: Tuning, stored: StoredModel, data: Dataset, checkpoints: Checkpoints, report: Reporter) -> Curve:
    """Leave the averaged weights in the stored model's network; returns the loss curve."""
    config, part, unet = tuning.config, data.split("train"), stored.unet
    step = TrainStep(
        tuning.loss(unet), unet.parameters(), clip=config.clip, ema_decay=config.ema_decay, shards=config.shards
    )
    loop = Loop(
        name="consistency", steps=config.steps,
        batch_of=lambda index: tuning.batch(part, index, unet.config.dropout),
        learning_rate_of=tuning.learning_rate_at, checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every, report=report,
    )  # fmt: skip
    curve = loop.run(step)["training"]
    unet.update(step.averaged_parameters())
    return curve


def _points(config: ConsistencyConfig, stored: StoredModel, data: Dataset, seed: int) -> list[Points]:
    """For one step and more, where to step: found one point after another on the selection part."""
    schedule = schedule_from_diffusers(stored.scheduler_config)
    first = float(on_grid(times_of(np.array([highest_level(config.highest_level, schedule)]), schedule), schedule)[0])
    levels = np.geomspace(HIGHEST_POINT, LOWEST_POINT, config.search_levels)
    candidates = sorted({float(time) for time in on_grid(times_of(levels, schedule), schedule)} - {first}, reverse=True)
    score = _kid_by_points(config, stored, data, seed, first)
    found = best_points(score, [time for time in candidates if time < first], max(config.student_steps) - 1)
    if len(found) < max(config.student_steps):
        raise ConfigError(
            f"search_levels: {config.search_levels} points are too few for {max(config.student_steps)} steps"
        )
    return [Points((first, *points, 0.0), scores) for points, scores in found]


def _kid_by_points(
    config: ConsistencyConfig, stored: StoredModel, data: Dataset, seed: int, first: float
) -> Callable[[tuple[float, ...]], float]:
    """KID of what is sampled through given points, from the same noise each time, to the selection part's images."""
    train, selection = data.split("train"), data.split("selection")
    scale = standardisation(random_features(train.batch(np.arange(min(len(train), MOST_TRAIN)))))
    real = standardise(random_features(selection.batch(np.arange(len(selection)))), *scale)
    within = real_sums(real)
    sampler = Sampler(stored, min(SEARCH_BATCH, config.search_samples), config.shards)
    start = draw(seed, RENOISE, config.search_samples, selection)

    def score(points: tuple[float, ...]) -> float:
        images = sampler(start, "consistency", np.array([first, *points, 0.0]))
        features = standardise(random_features(np.clip(images, -1, 1)), *scale)
        return kid_from_sums(kernel_sums(features, real), within)

    return score


def _record(stored: StoredModel, tuning: Tuning, points: Points) -> dict[str, Any]:
    done = {
        "task": "distill", "method": "consistency", "steps": points.steps, "config": as_plain(tuning.config),
        "seed": tuning.seed,
    }  # fmt: skip
    timesteps = [round(float(t)) for t in tuning.schedule.timestep(np.array(points.times[:-1]))]
    return {
        "history": extended(stored.record, done)["history"],
        "sampler": {
            "solver": "consistency",
            "steps": points.steps,
            "times": list(points.times),
            "chosen_on": {
                "part": "selection", "draw": RENOISE, "samples": tuning.config.search_samples, "features": NAME,
                "kid_by_time": {str(time): kid for time, kid in points.scores.items()},
            },
            "diffusers": {"scheduler": SCHEDULER, "timesteps": timesteps, "snippet": SNIPPET},
        },
    }  # fmt: skip
