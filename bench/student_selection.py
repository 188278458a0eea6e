"""Which students to keep: families beside the teacher, on the selection part and on noise that no stage draws.

    python bench/student_selection.py WORKSPACE --family progressive longer

WORKSPACE is a folder in which the stages prepare, features, train and anchor have run, with students in
models/<family>/<steps>. Nothing of the report part is read: choosing by this table leaves it as it was. Rows are the
teacher (50 steps of DDIM, 50 of DPM-Solver++(2M)) and every student, all from the same noise and labels:

- KID − teacher [95 %]: to the teacher's 50 steps of DDIM; ✓ where the upper end is under the anchor's margin;
- FD over training images, in floors: as `evaluate` has it, here of the selection part;
- paired: squared distance a pixel to the teacher's fine solution (`evaluate`'s), of the first 2,000 noises;
- classes: how often the judge sees the class that was asked for;
- agree: of drawn shapes, how often place and size are those of the teacher's 50 steps of DDIM, of the first
  `--agree-n` noises;
- cost: network evaluations of the family's distillation up to that student, over those of the teacher's training.

Named at the end is the family with the largest sum of agreement (without drawn shapes: the least sum of upper ends of
KID − teacher), over the numbers of evaluations that every family has a student of, or those of `--by`. JSON in `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from selection_report import choice, table, verdict

from ado_tasks import rng
from ado_tasks.datasets.shape_attributes import Reading, Tolerance, agree, read_shapes
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.errors import AdoError, ArtifactError, ConfigError
from ado_tasks.evaluate import FINE_SOLVER, FINE_STEPS, EvaluateConfig
from ado_tasks.evaluation.quality import Base, Reference, Yardstick, base_of
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.metrics.accuracy import class_accuracy
from ado_tasks.metrics.checks import group_codes
from ado_tasks.metrics.frechet import MIN_DRAWS, half_size
from ado_tasks.metrics.noninferiority import difference_from_sums, non_inferior
from ado_tasks.metrics.paired import paired_distance
from ado_tasks.models.classifier import load_features, load_judge
from ado_tasks.optimise.cost import family_passes, training_passes
from ado_tasks.registry.workspace import Workspace
from ado_tasks.report import Reporter, Terminal
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import named_storage_errors, read_json, write_json
from ado_tasks.variants import Variant, schedule_of, student_variants, teacher_variants

DRAW, PART = "student-selection", "selection"  # name of the noise: no stage draws by it
REFERENCE = 50  # steps of the teacher that students are held against
PAIRED = 2000  # noises, at most, of the distance to the fine solution
COLUMNS = {"shape", "size", "cx", "cy"}  # of index.parquet, where images are drawn shapes


@dataclass(frozen=True)
class Line:
    """A row of the table before it is measured: a way to sample, and what is known of it."""

    variant: Variant
    family: str
    seed: int | None = None  # of a student's last stage
    cost: float | None = None  # of a student, over the teacher's training; None where not known

    def described(self) -> dict[str, Any]:
        """As the report has it."""
        named = {"name": self.variant.name, "family": self.family, "solver": self.variant.solver}
        return {**named, "nfe": self.variant.nfe, "seed": self.seed, "cost": self.cost}


def teacher_lines(teacher: StoredModel) -> list[Line]:
    """What students are held against, first, and how far another solver's own solution is from it."""
    times = grids.uniform_log_snr(REFERENCE, schedule_of(teacher))
    other = Variant(f"teacher-dpmpp_2m-{REFERENCE}", "dpmpp_2m", "dpmpp_2m", times, teacher)
    return [Line(variant, "teacher") for variant in (*teacher_variants(teacher, (REFERENCE,)), other)]


def student_lines(family: Path, teacher: StoredModel) -> list[Line]:
    """A family's students, most steps first; what a student cost includes those it came after.

    Raises:
        ArtifactError: there is none, or one is damaged.
    """
    lines, records = [], []
    training = training_passes(teacher.record)
    for variant in student_variants(family):
        records.append(variant.model.record)
        passes = family_passes(records)
        cost = None if passes is None or training is None else passes.evaluations / training.evaluations
        seeds = [done.get("seed") for done in variant.model.record.get("history", []) if done.get("task") == "distill"]
        lines.append(Line(variant, family.name, seeds[-1] if seeds else None, cost))
    return lines


@dataclass(frozen=True)
class Within:
    """Says a row's progress as that of the whole table, in network evaluations of an image."""

    report: Reporter
    before: int  # evaluations of earlier rows
    nfe: int  # of this one
    total: int  # evaluations of all

    def progress(self, done: int, total: int, **figures: float) -> None:
        """`done` of the row's images are there."""
        self.report.progress(self.before + done * self.nfe, self.total, **figures)

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Pass it on."""
        self.report.metric(name, value, step)

    def picture(self, name: str, path: Path) -> None:
        """Pass it on."""
        self.report.picture(name, path)


@dataclass(frozen=True)
class Measure:
    """What every row is measured with; all of it of the selection part."""

    yardstick: Yardstick
    start: Draw
    base: Base  # the teacher's samples, and its fine solution from the first noises
    reading: Reading | None  # of the first `agree_n` of the teacher's samples; None where images are no drawn shapes
    agree_n: int
    threads: int
    tolerance: Tolerance

    def __call__(self, images: Images) -> dict[str, Any]:
        """Figures of a row's samples (n, H, W, C), not clipped, row i from noise i."""
        yardstick, fine = self.yardstick, self.base.fine
        found = yardstick.features(images)
        difference = difference_from_sums(
            yardstick.kernel_sums(found), self.base.sums, groups=yardstick.reference.groups
        )
        excess = yardstick.excess(found)
        figures: dict[str, Any] = {
            "kid_minus_teacher": {
                "value": difference.value, "ci": [difference.low, difference.high],
                "non_inferior": non_inferior(difference, yardstick.margin),
            },
            "fd": excess.model,
            "fd_over_train": {
                "ratio_to_floor": excess.ratio, "value": excess.excess, "range": [excess.low, excess.high],
                "floor": excess.floor.mean,
            },
            "paired_distance": paired_distance(images[: len(fine)], fine).mean,
        }  # fmt: skip
        if yardstick.judge is not None and self.start.labels is not None:
            accuracy = class_accuracy(yardstick.judge.predict(images), self.start.labels)
            figures |= {"class_accuracy": accuracy.value, "class_accuracy_ci": [accuracy.low, accuracy.high]}
        if self.reading is not None:
            own = read_shapes(images[: self.agree_n], self.threads)
            figures["agreement"] = float(np.mean(agree(own, self.reading, self.tolerance)))
        return figures


def yardstick_of(workspace: Workspace, n: int, draws: int, seed: int) -> tuple[Yardstick, bool]:
    """What distributions are measured with on the selection part, and whether the images are drawn shapes.

    Raises:
        ArtifactError: an input is missing or damaged, or the margin was frozen with other features.
        ConfigError: so few samples that no distance can be taken to half of the part.
    """
    data, extractor = open_dataset(workspace.data), load_features(workspace.features)
    frozen = read_json(workspace.root / "anchor" / "anchor.json", "features_sha256", "margin")
    if frozen["features_sha256"] != extractor.sha256:
        raise ArtifactError(
            f"{workspace.root / 'anchor'}: the margin was frozen with other features than {workspace.features} holds; "
            "run `anchor` again"
        )
    part = data.split(PART)
    least = half_size(group_codes(part.groups, len(part)))
    if n < least:
        raise ConfigError(f"--n: {n} is not allowed; allowed: {least} and more, half of the {PART} part")
    judge = load_judge(workspace.features) if data.num_classes > 1 else None
    reference, halves = Reference.of(data, extractor, PART), rng.derive(seed, DRAW, "halves")
    yardstick = Yardstick(reference, extractor, judge, frozen["margin"], draws, halves)
    return yardstick, set(data.index.columns) >= COLUMNS


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but printing."""
    workspace = Workspace(options.workspace)
    yardstick, drawn = yardstick_of(workspace, options.n, options.draws, options.seed)
    part = open_dataset(workspace.data).split(PART)
    teacher = read_model(workspace.root / "models" / "teacher")
    lines = teacher_lines(teacher)
    for family in options.family:
        lines += student_lines(workspace.root / "models" / family, teacher)
    _check_by(options.by, lines)
    for line in lines:
        line.variant.model.unet.config.check_data(
            part.shape, part.num_classes, f"{line.variant.name}: unet/config.json"
        )
    start = draw(options.seed, DRAW, options.n, part)
    paired, agree_n = start.first(PAIRED), min(options.agree_n, options.n)
    times = grids.uniform_log_snr(FINE_STEPS, schedule_of(teacher))
    fine = Variant("fine", FINE_SOLVER, FINE_SOLVER, times, teacher)
    total = options.n * sum(line.variant.nfe for line in lines) + len(paired) * fine.nfe
    done, terminal = 0, Terminal(DRAW)

    def sample(variant: Variant, start: Draw) -> Images:
        nonlocal done
        sampler = Sampler(variant.model, min(options.batch, options.n), options.shards)
        within = Within(terminal, done, variant.nfe, total)
        images = sampler(start, variant.method, variant.times, told=variant.told, report=within)
        done += len(start) * variant.nfe
        return images

    try:
        reference = sample(lines[0].variant, start)
        base = base_of(yardstick, reference, sample(fine, paired))
        reading = read_shapes(reference[:agree_n], options.threads) if drawn else None
        tolerance = Tolerance(options.place, options.radius)
        measure = Measure(yardstick, start, base, reading, agree_n, options.threads, tolerance)
        rows = []
        for line in lines:
            images = reference if line is lines[0] else sample(line.variant, start)
            rows.append(line.described() | measure(images))
            for name in ("paired_distance", "agreement"):  # said at once: what is interrupted has told them
                if name in rows[-1]:
                    terminal.metric(f"{line.variant.name}.{name}", rows[-1][name])
    finally:
        terminal.close()
    return {
        "part": PART, "draw": DRAW, "seed": options.seed, "n": len(start), "paired_n": len(paired),
        "draws": options.draws,
        "agree_n": agree_n if drawn else None, "tolerance_pixels": asdict(tolerance) if drawn else None,
        "margin": yardstick.margin, "features_sha256": yardstick.extractor.sha256,
        "fine": {"solver": FINE_SOLVER, "grid": "uniform_log_snr", "steps": FINE_STEPS},
        "n_real": len(yardstick.reference.report), "choice": choice(rows, options.by), "rows": rows,
    }  # fmt: skip


def _check_by(by_nfe: Sequence[int], lines: Sequence[Line]) -> None:
    """Raises ConfigError where a family has no student of a number of evaluations that families are chosen by."""
    for family in dict.fromkeys(line.family for line in lines if line.family != "teacher"):
        own = sorted({line.variant.nfe for line in lines if line.family == family}, reverse=True)
        if not set(by_nfe) <= set(own):
            allowed = " ".join(map(str, own))
            raise ConfigError(f"--by: {' '.join(map(str, by_nfe))}: family {family} has none; allowed: {allowed}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--family", nargs="+", required=True, help="families of students, under models/")
    parser.add_argument("--by", type=int, nargs="+", default=[], help="evaluations that families are chosen by (all)")
    parser.add_argument("--n", type=int, default=5000, help="samples of each row (default: %(default)s)")
    parser.add_argument("--agree-n", type=int, default=2000, help="of them read for place and size")
    parser.add_argument("--place", type=float, default=Tolerance.place, help="tolerance of the centre, pixels")
    parser.add_argument("--radius", type=float, default=Tolerance.radius, help="tolerance of the radius, pixels")
    parser.add_argument("--draws", type=int, default=EvaluateConfig().draws, help="halves behind each FD")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", type=int, default=256, help="images through a network at a time")
    parser.add_argument("--shards", type=int, default=2, help="parts of a batch at the same time, on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of the reading of place and size")
    parser.add_argument("--out", type=Path, default=Path("reports/student-selection.json"), help="report")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError where an option is out of range, or a family is given twice."""
    for name, least in {"n": 2, "agree_n": 1, "draws": MIN_DRAWS, "batch": 1, "shards": 1, "threads": 1}.items():
        if (given := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {given} is not allowed; allowed: {least} and more")
    if min(options.place, options.radius) <= 0:
        raise ConfigError("--place, --radius: more than 0 pixels are allowed")
    if len(set(options.family)) < len(options.family):
        raise ConfigError(f"--family: {' '.join(options.family)}: one is given twice; allowed: different ones")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the bench cannot run."""
    options = parse_arguments(arguments)
    try:
        check(options)
        with named_storage_errors(options.out):  # before the work, not after it
            options.out.parent.mkdir(parents=True, exist_ok=True)
        report = run(options)
        write_json(options.out, report)
    except AdoError as problem:
        print(f"{DRAW}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 2
    Console(width=150).print(table(report))
    print(verdict(report["choice"]))
    print(f"report: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
