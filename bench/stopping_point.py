"""Where distillation stops itself: on a taught and on an under-trained teacher of digits; in any finished workspace.

Both cases have the same network, the same students and the same optimiser steps; `distill` runs with `stop: inferior`.
Beside each student's interval on the selection part, which decided, stands the report part's, from other noise, which
nothing was chosen on: the decision has to be the same there but for differences that lie about the margin.

`python bench/stopping_point.py FOLDER --cases digits` goes on where an earlier call stopped. On two quiet cores a case
takes two to six minutes, most of it the teacher of digits. `--finished` asks the students of a folder where the graph
has run (make demo, make preset) the same, one after another: where `stop: inferior` would have ended that chain.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.anchor import AnchorConfig, anchor
from ado_tasks.config import read_params
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.distill import distill
from ado_tasks.distillation.stopping import Stopping
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.kernel import kernel_sums
from ado_tasks.metrics.noninferiority import difference_from_sums
from ado_tasks.models.classifier import load_features
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.stages import Stage, stopping_point
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import SILENT
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import read_json
from ado_tasks.train import TrainConfig, train
from ado_tasks.variants import student_variants

MODEL = {
    "block_out_channels": [16, 32], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16,
}  # fmt: skip
STUDENTS = DistillConfig(  # the demo's, in a quarter of its steps and without matching: they are to reach an end
    teacher_steps=32, teacher_solver="dpmpp_2m", student_steps=(8, 4, 2, 1), stage_steps=120, batch_size=32,
    learning_rate=(7e-4, 1.2e-3, 3e-3, 3e-3), charbonnier=0.03, stop="inferior",
)  # fmt: skip
SAMPLES = 1000  # of teacher and students, as the demo's
REPORT = "report"
DIGITS = PrepareConfig(source="digits")


@dataclass(frozen=True)
class Case:
    """A dataset, and how long its teacher learns."""

    data: PrepareConfig
    teacher_steps: int


CASES = {
    "digits": Case(DIGITS, 2600),  # the demo's teacher
    "under-trained": Case(DIGITS, 150),
}


def run(name: str, folder: Path) -> Path:
    """Every task of a case that is not done yet; the folder of its results."""
    case = CASES[name]
    data, own = folder / case.data.name, folder / name
    paths: dict[str, Any] = {"dataset": data / "data", "features": data / "features", "teacher": own / "teacher"}
    learned: dict[str, Any] = {"scratch": own / "scratch", "seed": 0}
    taught = TrainConfig(
        model=MODEL, steps=case.teacher_steps, learning_rate=1e-2, warmup_steps=min(100, case.teacher_steps // 5),
        ema_decay=0.997,
    )  # fmt: skip
    only = lambda *names: {each: paths[each] for each in names}  # noqa: E731
    tasks: dict[Path, Callable[[Path], object]] = {
        paths["dataset"]: lambda out: prepare(case.data, out=out, seed=0),
        paths["features"]: lambda out: features(FeaturesConfig(), **only("dataset"), out=out, seed=0),
        paths["teacher"]: lambda out: train(taught, **only("dataset"), out=out, **learned),
        own / "anchor": lambda out: anchor(AnchorConfig(n_generated=SAMPLES), **paths, out=out, seed=0),
        own / "students": lambda out: distill(STUDENTS, **paths, anchor=own / "anchor", out=out, **learned),
    }
    for out, task in tasks.items():
        if not out.exists():
            began = time.monotonic()
            task(out)
            print(f"{name}: {out.name} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return own


def on_report(name: str, folder: Path) -> list[Stage]:
    """KID − teacher of each student on the report part and its own noise."""
    data, own = folder / CASES[name].data.name, folder / name
    part, extractor = open_dataset(data / "data").split(REPORT), load_features(data / "features")
    real = extractor.whitened(extractor.features(part.batch(np.arange(len(part)))))
    start = draw(0, REPORT, SAMPLES, part)

    def sums(model: StoredModel, steps: int):
        images = Sampler(model)(start, "ddim", grids.uniform_time(steps))
        return kernel_sums(extractor.whitened(extractor.features(images)), real)

    teacher = sums(read_model(own / "teacher"), read_json(own / "anchor" / "anchor.json")["steps"])
    students = student_variants(own / "students")
    return [Stage(each.nfe, difference_from_sums(sums(each.model, each.nfe), teacher)) for each in students]


def in_margins(difference: Interval, margin: float) -> str:
    value, low, high = (end / margin for end in (difference.value, difference.low, difference.high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def report(name: str, folder: Path) -> None:
    """Print a case: the teacher, each student on both parts, and where the chain ended."""
    own = folder / name
    frozen, index = read_json(own / "anchor" / "anchor.json"), read_json(own / "students" / "index.json")
    margin, others = index["margin"], on_report(name, folder)
    print(
        f"\n{name}: teacher of {CASES[name].teacher_steps} steps, KID {frozen['kid_teacher']:.3f} at 50 and "
        f"{frozen['kid_coarse']:.3f} at 4 DDIM steps, margin {margin:.4f}; A/A {frozen['aa']['pass_rate']:.2f}"
    )
    print("  steps  KID − teacher, in margins: selection part           report part")
    for found, other in zip(index["kid_minus_teacher"], others, strict=True):
        here = Interval(found["value"], *found["ci"])
        print(f"  {found['steps']:5}  {in_margins(here, margin):>41}  {in_margins(other.difference, margin):>20}")
    print(f"  {index['reason']}")
    print(f"  on the report part: {stopping_point(others, margin).reason}", flush=True)


def would_stop(workspace: Path) -> None:
    """Print where `stop: inferior` would have ended the chain of a finished workspace: the same students, asked now."""
    params = read_params(workspace / "params.yaml")
    name, seed = params["dataset"], params["seed"]
    data = open_dataset(workspace / "data" / name)
    asked = Stopping.read(data, workspace / "features" / name, workspace / "anchor", seed)
    for student in student_variants(workspace / "models" / "progressive"):
        passed = asked.goes_on(student.model, student.model.unet.parameters(), student.times, SILENT)
        print(f"  {student.nfe:5}  {in_margins(asked.found[-1].difference, asked.margin):>41}", flush=True)
        if not passed:
            break
    print(f"{name}: {asked.stop().reason}")


def last_of(name: str, folder: Path) -> int | None:
    """Steps of a case's last non-inferior student, of the teacher's own walk if there is none; None: not run yet."""
    path = folder / name / "students" / "index.json"
    return (read_json(path)["steps"] or STUDENTS.teacher_steps) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--finished", action="store_true", help="FOLDER is where the graph has run: judge its chain")
    options = parser.parse_args()
    if options.finished:
        return would_stop(options.folder)
    for name in options.cases:
        run(name, options.folder)
        report(name, options.folder)
    base = last_of("digits", options.folder)
    for name in CASES:
        steps = last_of(name, options.folder)
        if name != "digits" and base is not None and steps is not None:
            verdict = "sooner" if steps > base else "later" if steps < base else "at the same"
            print(f"{name}: stops {verdict} ({steps} steps; digits {base})")


if __name__ == "__main__":
    main()
