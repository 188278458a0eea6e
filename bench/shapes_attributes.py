"""Do few-step pictures of drawn shapes show what was asked for, and the teacher's sample?

A finished workspace of drawn shapes is measured (data, features, models/teacher, models/<family>/<steps>). All rows
start from the same noise and labels, a draw that nothing was chosen on. Shape, colour, size and place are read by
fitting a drawing to each (`datasets/shape_attributes.py`); beside it stands the project's judge, a network. Both
are first tried on real images of the report part, as they are and blurred and noisy; the better of the two on those as
they are says whether a picture shows what was asked for.

- condition: colour and shape right, at most 2 points less often than the teacher at 50 DDIM steps;
- place and size: within the tolerance of the teacher@50's of the same noise, at most 2 points less often than the
  teacher's own fine solutions are (DDIM and DPM-Solver++(2M), 50 steps each). How often two finer ones agree is shown.

Differences are paired by noise, with 95 % intervals; a bar is met where the difference itself keeps it, and for certain
where the interval's lower end does.

    python bench/shapes_attributes.py .ado/presets/shapes32
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from ado_tasks.config import read_params
from ado_tasks.datasets.shape_attributes import Reading, Tolerance, agree, read_shapes
from ado_tasks.datasets.shapes import COLOURS, SHAPES
from ado_tasks.datasets.shards import Dataset, Split, open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.metrics.interval import Interval, mean_interval
from ado_tasks.models.classifier import Judge, load_judge
from ado_tasks.report import Terminal
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import write_json
from ado_tasks.variants import Variant, schedule_of, student_variants, teacher_variants

DRAW = "shapes-attributes"  # name of the noise: nothing is chosen on it
REFERENCE = 50  # DDIM steps of the teacher that students are held against
ALLOWED = 0.02  # by how much of all pictures a student may fall behind
BLUR_PIXELS, NOISE_LEVELS = 0.7, 8.0  # of the worse images that the readers are tried on
COLUMNS = ("shape", "colour", "size", "cx", "cy")  # of index.parquet: what only drawn shapes have


@dataclass(frozen=True)
class Row:
    """One way to sample, and what its pictures show."""

    name: str
    nfe: int
    reading: Reading
    judged: np.ndarray  # int64 (n,): labels by the judge
    student: bool = False
    figures: dict[str, Any] = field(default_factory=dict)


def known_of(part: Split) -> Reading:
    """What was drawn, as a reading."""
    height, width, _ = part.shape
    shape, colour = (
        np.array([names.index(name) for name in part.index[column]])
        for column, names in (("shape", SHAPES), ("colour", COLOURS))
    )
    size, cx, cy, turn = (part.index[name].to_numpy(np.float64) for name in ("size", "cx", "cy", "turn"))
    return Reading(shape, colour, size * min(height, width), cx * width, cy * height, turn, np.zeros(len(size)))


def readers_error(images: Images, known: Reading, judge: Judge, threads: int) -> dict[str, Any]:
    """How well both readers read real images whose attributes are known."""
    found = read_shapes(images, threads)
    apart = np.hypot(found.x - known.x, found.y - known.y)
    radius = np.abs(found.radius - known.radius)
    quantiles = {"median": 0.5, "95 %": 0.95, "most": 1.0}
    return {
        "shape": float(np.mean(found.shape == known.shape)),
        "colour": float(np.mean(found.colour == known.colour)),
        "both": float(np.mean(found.label == known.label)),
        "judge_both": float(np.mean(judge.predict(images) == known.label)),
        "place_pixels": {name: float(np.quantile(apart, q)) for name, q in quantiles.items()},
        "radius_pixels": {name: float(np.quantile(radius, q)) for name, q in quantiles.items()},
        "misfit_levels": float(np.median(found.misfit)),
    }


def worse(images: Images, seed: int) -> Images:
    """Blurred, then noisy: as soft as few steps make them, or softer."""
    noise = np.random.default_rng(seed).normal(scale=NOISE_LEVELS / 127.5, size=images.shape)
    return (gaussian_filter(images, (0, BLUR_PIXELS, BLUR_PIXELS, 0)) + noise).astype(np.float32)


def difference(student: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Share of yes in `student` less that in `base`, both bool (n,) of the same noises, and the bar."""
    found: Interval = mean_interval(student.astype(np.float64) - base)
    return {
        "value": found.value, "ci": [found.low, found.high],
        "met": found.value >= -ALLOWED, "certain": found.low >= -ALLOWED,
    }  # fmt: skip


def judge_rows(
    rows: Sequence[Row], labels: np.ndarray, tolerance: Tolerance, own: tuple[Row, Row], finest: tuple[Row, Row],
    by_judge: bool,
) -> None:  # fmt: skip
    """Fill in the figures of every row: accuracies, agreement with the first row, for students the verdicts."""
    base = rows[0]

    def right(row: Row) -> np.ndarray:
        return (row.judged if by_judge else row.reading.label) == labels

    alike, alike_finest = (agree(one.reading, other.reading, tolerance) for one, other in (own, finest))
    tighter = Tolerance(tolerance.place / 2, tolerance.radius / 2)
    for row in rows:
        same = agree(row.reading, base.reading, tolerance)
        row.figures.update(
            colour=float(np.mean(row.reading.colour == labels % len(COLOURS))),
            shape=float(np.mean(row.reading.shape == labels // len(COLOURS))),
            condition=float(np.mean(row.reading.label == labels)),
            condition_by_judge=float(np.mean(row.judged == labels)),
            agreement=float(np.mean(same)),
            agreement_at_half_tolerance=float(np.mean(agree(row.reading, base.reading, tighter))),
            misfit_levels=float(np.median(row.reading.misfit)),
        )
        if row.student:
            row.figures.update(
                condition_minus_teacher=difference(right(row), right(base)),
                agreement_minus_own=difference(same, alike),
                agreement_minus_finest=difference(same, alike_finest),
            )


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    start: Draw
    judge: Judge
    batch: int
    shards: int
    threads: int
    report: Terminal

    def row(self, variant: Variant, sampler: Sampler, name: str, *, student: bool = False) -> Row:
        """Sample, and read."""
        images = sampler(self.start, variant.method, variant.times, told=variant.told, report=self.report)
        images = np.clip(images, -1, 1)
        return Row(name, variant.nfe, read_shapes(images, self.threads), self.judge.predict(images), student)

    def sampler(self, model: StoredModel) -> Sampler:
        """A sampler of a model."""
        return Sampler(model, self.batch, self.shards)


def opened(workspace: Path) -> Dataset:
    """The workspace's dataset. Raises ConfigError where it is not one of drawn shapes."""
    name = read_params(workspace / "params.yaml").get("dataset")
    data = open_dataset(workspace / "data" / str(name))
    missing = [column for column in COLUMNS if column not in data.index]
    if missing or data.num_classes != len(SHAPES) * len(COLOURS):
        raise ConfigError(f"{data.folder}: not drawn shapes: index.parquet lacks {', '.join(missing) or 'classes'}")
    return data


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but printing."""
    workspace = options.workspace
    data = opened(workspace)
    teacher = read_model(workspace / "models" / "teacher")
    judge = load_judge(workspace / "features" / data.folder.name)
    part = data.split("report")
    real, known = part.batch(np.arange(min(len(part), options.n))), known_of(part)
    known = Reading(*(getattr(known, name)[: len(real)] for name in Reading.__dataclass_fields__))
    readers = {
        name: readers_error(images, known, judge, options.threads)
        for name, images in (("real", real), ("real, blurred and noisy", worse(real, options.seed)))
    }
    by_judge = readers["real"]["judge_both"] > readers["real"]["both"]
    start = draw(options.seed, DRAW, options.n, part)
    if start.labels is None:
        raise ConfigError(f"{data.folder}: without classes there is nothing that was asked for")
    bench = Bench(
        start, judge, min(options.batch, options.n), options.shards, options.threads, Terminal("shapes-attributes")
    )
    sampler, schedule = bench.sampler(teacher), schedule_of(teacher)
    rows = [bench.row(teacher_variants(teacher, (REFERENCE,))[0], sampler, f"teacher ddim@{REFERENCE}")]
    solutions = [("dpmpp_2m", REFERENCE), ("ddim", options.fine_steps), ("dpmpp_2m", options.fine_steps)]
    for solver, steps in solutions:
        times = grids.uniform_time(steps) if solver == "ddim" else grids.uniform_log_snr(steps, schedule)
        rows.append(bench.row(Variant("fine", solver, solver, times, teacher), sampler, f"teacher {solver}@{steps}"))
    for variant in teacher_variants(teacher, tuple(options.teacher_steps)):
        rows.append(bench.row(variant, sampler, f"teacher ddim@{variant.nfe}"))
    for family in options.family:
        for variant in student_variants(workspace / "models" / family):
            rows.append(bench.row(variant, bench.sampler(variant.model), variant.name, student=True))
    own, finest = (rows[0], rows[1]), (rows[2], rows[3])
    tolerance = Tolerance(options.place, options.radius)
    judge_rows(rows, start.labels, tolerance, own, finest, by_judge)
    return {
        "readers": readers,
        "condition_read_by": "judge" if by_judge else "fitted drawings",
        "tolerance_pixels": asdict(tolerance),
        "own": {
            f"{one.name} and {other.name}": float(np.mean(agree(one.reading, other.reading, tolerance)))
            for one, other in (own, finest)
        },
        "allowed": ALLOWED,
        "n": len(start),
        "seed": options.seed,
        "draw": DRAW,
        "rows": [{"name": row.name, "nfe": row.nfe, "student": row.student, **row.figures} for row in rows],
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for name, found in report["readers"].items():
        place, radius = found["place_pixels"], found["radius_pixels"]
        lines.append(
            f"{name}: colour and shape right {100 * found['both']:.2f} % (judge {100 * found['judge_both']:.2f} %); "
            f"place off by {place['median']:.3f}, 95 % under {place['95 %']:.3f}, most {place['most']:.3f} pixels; "
            f"radius {radius['median']:.3f}, {radius['95 %']:.3f}, {radius['most']:.3f}"
        )
    for pair, share in report["own"].items():
        lines.append(f"{pair} agree in place and size: {100 * share:.2f} %")
    lines.append(f"condition read by: {report['condition_read_by']}; n = {report['n']}")
    lines.append("")
    lines.append(
        f"{'':22} {'colour':>8} {'shape':>8} {'both':>8} {'judge':>8} {'agree':>8} {'misfit':>7}   "
        f"{'both - teacher':24} {'agree - own':24}"
    )
    for row in report["rows"]:
        shares = [
            f"{100 * row[name]:7.2f}%" for name in ("colour", "shape", "condition", "condition_by_judge", "agreement")
        ]
        verdicts = [_cell(row.get(name)) for name in ("condition_minus_teacher", "agreement_minus_own")]
        lines.append(f"{row['name']:22} {' '.join(shares)} {row['misfit_levels']:7.2f}   {' '.join(verdicts)}")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"{'':24}"
    low, high = found["ci"]
    verdict = "met" if found["met"] else "MISSED"
    return f"{100 * found['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] {verdict:7}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="a finished workspace of drawn shapes")
    parser.add_argument("--n", type=int, default=5000, help="pictures a row")
    parser.add_argument("--family", nargs="+", default=["progressive"], help="families of students, under models/")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[], help="further rows of the teacher's DDIM")
    parser.add_argument("--fine-steps", type=int, default=200, help="of the two finer solutions")
    parser.add_argument("--place", type=float, default=Tolerance.place, help="tolerance of the centre, pixels")
    parser.add_argument("--radius", type=float, default=Tolerance.radius, help="tolerance of the radius, pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", type=int, default=256, help="images through a network at a time")
    parser.add_argument("--shards", type=int, default=2, help="parts of a batch at the same time, on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of the fits")
    parser.add_argument("--out", type=Path, default=Path("reports/shapes-attributes.json"), help="report")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where all bars are met, 1 where one is missed, 2 where the bench cannot run."""
    options = parse_arguments(arguments)
    try:
        if min(options.n, options.fine_steps, options.threads, options.batch) < 1 or options.n < 2:
            raise ConfigError("--n: at least 2; --fine-steps, --threads, --batch: at least 1 are allowed")
        if min(options.place, options.radius) <= 0:
            raise ConfigError("--place, --radius: more than 0 pixels are allowed")
        report = run(options)
    except AdoError as problem:
        print(f"shapes-attributes: {problem}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)
    print(table(report))
    print(f"report: {options.out}")
    verdicts = [row[name] for row in report["rows"] if row["student"]
                for name in ("condition_minus_teacher", "agreement_minus_own")]  # fmt: skip
    return 0 if all(verdict["met"] for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
