"""Guided distillation on digits: one network, one evaluation a step, held against the guided teacher's two.

At each weight: KID of samples to samples of the guided teacher from other noise, minus the guided teacher's own, both
at 50 DDIM steps from the same noise, with its 95 % interval; the margin is a tenth of what the guided teacher loses at
4 steps. Beside it the mean squared distance of student and guided teacher at the same noise, over that of the unguided
teacher and the guided one; and how often a judge finds the class that was asked for.

`python bench/guided.py FOLDER --weights 1 2`, then the others: it goes on where an earlier call stopped.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.distill import distill
from ado_tasks.distillation.guided import at_weight
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.kernel import kernel_sums, kid_from_sums, real_sums
from ado_tasks.metrics.noninferiority import difference_from_sums, margin, non_inferior
from ado_tasks.models.classifier import load_features, load_judge
from ado_tasks.optimise.guided import GuidedConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.sampling import Images, Sampler, draw
from ado_tasks.train import TrainConfig, train

TEACHER = TrainConfig(  # the demo's, a tenth of the labels dropped
    model={
        "block_out_channels": [16, 32], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16,
    },
    steps=2600, learning_rate=1e-2, warmup_steps=100, ema_decay=0.997, label_dropout=0.1,
)  # fmt: skip
FINE, COARSE = 50, 4  # DDIM steps, as in `anchor`


def run(folder: Path, taught: TrainConfig, config: GuidedConfig) -> None:
    """Every task that is not done yet."""
    paths: dict[str, Any] = {name: folder / name for name in ("dataset", "features", "teacher")}
    learned: dict[str, Any] = {"dataset": folder / "dataset", "scratch": folder / "scratch", "seed": 0}
    tasks: dict[str, Callable[[Path], object]] = {
        "dataset": lambda out: prepare(PrepareConfig(), out=out, seed=0),
        "features": lambda out: features(FeaturesConfig(), dataset=paths["dataset"], out=out, seed=0),
        "teacher": lambda out: train(taught, out=out, **learned),
        "guided": lambda out: distill(config, teacher=paths["teacher"], out=out, **learned),
    }
    for name, task in tasks.items():
        if not (folder / name).exists():
            began = time.monotonic()
            task(folder / name)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def line(folder: Path, weight: float, count: int) -> str:
    """One weight's figures."""
    part = open_dataset(folder / "dataset").split("report")
    extractor, judge = load_features(folder / "features"), load_judge(folder / "features")
    teacher = read_model(folder / "teacher")
    start, other = (draw(0, name, count, part) for name in ("report", "guided reference"))
    guided, plain = Sampler(teacher, guidance=weight), Sampler(teacher)
    fine = grids.uniform_time(FINE)
    reference = guided(other, "ddim", fine)
    images: dict[str, Images] = {
        "teacher": guided(start, "ddim", fine), "coarse": guided(start, "ddim", grids.uniform_time(COARSE)),
        "student": Sampler(at_weight(folder / "guided", weight))(start, "ddim", fine),
        "plain": plain(start, "ddim", fine),
    }  # fmt: skip
    white = {name: extractor.whitened(extractor.features(each)) for name, each in images.items()}
    real = extractor.whitened(extractor.features(reference))
    sums, within = {name: kernel_sums(each, real) for name, each in white.items()}, real_sums(real)
    limit = margin(kid_from_sums(sums["coarse"], within) - kid_from_sums(sums["teacher"], within))
    found = difference_from_sums(sums["student"], sums["teacher"])
    unguided = difference_from_sums(sums["plain"], sums["teacher"])
    apart = {name: np.square(images[name] - images["teacher"]).mean() for name in ("student", "plain")}
    near = f"{apart['student'] / apart['plain']:.3f}" if weight != 1 else "–"
    right = " / ".join(
        f"{100 * np.mean(judge.predict(images[name]) == start.labels):.1f}" for name in ("student", "teacher")
    ) if judge is not None else "–"  # fmt: skip
    value, low, high = (end / limit for end in (found.value, found.low, found.high))
    verdict = "yes" if non_inferior(found, limit) else "no"
    return (
        f"{weight:6g}  {f'{value:+.2f} [{low:+.2f}, {high:+.2f}]':>25}  {verdict:>12}  {limit:8.4f}  "
        f"{unguided.value / limit:+8.2f}  {near:>7}  {right}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=float, nargs="*", default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--teacher-steps", type=int, default=TEACHER.steps, help="where it is still to be trained")
    parser.add_argument("--steps", type=int, default=1000, help="of the distillation, where it is still to be done")
    options = parser.parse_args()
    taught = replace(TEACHER, steps=options.teacher_steps)
    run(options.folder, taught, GuidedConfig(steps=options.steps, learning_rate=2e-3))
    print("weight  KID − teacher, in margins  non-inferior    margin  unguided   paired  classes %, student / teacher")
    for weight in options.weights:
        print(line(options.folder, weight, options.samples), flush=True)


if __name__ == "__main__":
    main()
