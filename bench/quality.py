"""Quality against network evaluations and against milliseconds: our variants beside Diffusers' own schedulers.

A finished workspace is measured (models/teacher, models/<family>/<steps>, schedules/teacher, features, data). Every row
starts from the same noise and labels, a draw that nothing was chosen on. Diffusers runs in PyTorch on the exported
weights. Per row:

- FD and KID in the project's own features, against the report part of the data;
- mean squared distance to the teacher's fine solution of the same noise, in pixels and in features;
- milliseconds an image, whole samplings of all rows in turn.

Sanity: our DDIM and Diffusers' make the same picture (in float32: MLX on CUDA rounds products to TF32 unless
MLX_ENABLE_TF32=0 is set). Bar: feature distance of our learned schedule (the solver that
was nearest in `calibrate`'s validation) over that of the best of Diffusers' schedulers at as many evaluations.

    python bench/quality.py --workspace . --nfe 4 5 6 8 10

Where the workspace has no schedule for a number of evaluations, one is learned, for angle_ab2 and DPM-Solver++(2M).
Samples and schedules are kept under --scratch by what they depend on: an interrupted run goes on, a second one only
times.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers_schedulers as theirs
import numpy as np
from quality_report import OURS, save_picture, show

from ado_tasks.calibrate import CalibrateConfig, calibrate
from ado_tasks.config import as_plain
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.evaluation.quality import Reference, Yardstick
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.hardware.latency import Spread, interleaved
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.kernel import kid_from_sums
from ado_tasks.metrics.paired import paired_distance, paired_less
from ado_tasks.models.classifier import load_features
from ado_tasks.registry.workspace import Workspace
from ado_tasks.report import Reporter, Terminal
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import atomic_file, sha256_tree, write_json
from ado_tasks.variants import (
    calibrated_variant,
    read_knots,
    schedule_of,
    student_folders,
    student_variants,
    teacher_variants,
)

DRAW = "bench-quality"  # name of the noise: nothing is chosen on it
FINE_SOLVER = "dpmpp_2m"  # at the same number of steps nearer to the exact solution than DDIM (JOURNAL, 2026-11-23)
BARS = {5: 0.7, 10: 0.9}  # set beforehand: most that our feature distance may be, times the best of Diffusers', by NFE
REFERENCE_STEPS = 50  # of the teacher's DDIM, a row always
SAME_PICTURE = 1e-3  # largest difference of a pixel in [-1, 1] between two implementations of DDIM
THEIRS = "diffusers"


@dataclass(frozen=True)
class Row:
    """One way to sample."""

    name: str  # <method>@<nfe>
    side: str  # OURS or THEIRS
    family: str  # the curve that it is a point of
    model: Path
    sample: Callable[[Draw], Images]
    nfe: int
    key: str  # what its samples depend on, beside model and noise
    validated: float | None = None  # distance in `calibrate`'s validation: says which of our schedules is taken


class Samplers:
    """Models made ready on either side when first needed."""

    def __init__(self, batch: int, shards: int) -> None:
        """`batch` images at a time; `shards` parts of it at the same time here, and threads there."""
        self._batch, self._shards = batch, shards
        self._ours: dict[tuple[Path, int], Sampler] = {}
        self._theirs: dict[Path, theirs.Model] = {}

    def ours(self, folder: Path, count: int) -> Sampler:
        """The model of a folder in MLX, for `count` images: a batch is padded, so few get a small one."""
        key = folder, min(self._batch, count)
        if key not in self._ours:
            self._ours[key] = Sampler(read_model(folder), key[1], self._shards)
        return self._ours[key]

    def theirs(self, folder: Path) -> theirs.Model:
        """The model of a folder in PyTorch."""
        if folder not in self._theirs:
            self._theirs[folder] = theirs.Model(folder, self._shards, self._batch)
        return self._theirs[folder]


def learned_schedules(workspace: Workspace, nfe: Sequence[int], scratch: Path, report: Reporter) -> list[Path]:
    """Folders of learned schedules: the workspace's, and one learned here for the evaluations that it has none for."""
    own, model = workspace.root / "schedules" / "teacher", workspace.root / "models" / "teacher"
    missing = tuple(sorted({n for n in nfe if n > 1} - {entry["nfe"] for entry in read_knots(own)}))
    if not missing:
        return [own]
    config = CalibrateConfig(nfe=missing, solvers=("dpmpp_2m", "angle_ab2"))
    told = json.dumps([as_plain(config), sha256_tree(model), open_dataset(workspace.data).sha256])
    learned = scratch / "schedules" / hashlib.sha256(told.encode()).hexdigest()[:16]
    if not learned.exists():
        calibrate(
            config, model=model, dataset=workspace.data, out=learned, seed=workspace.params["seed"], report=report
        )
    return [own, learned]


def our_rows(root: Path, schedules: Sequence[Path], nfe: Sequence[int], samplers: Samplers) -> list[Row]:
    """The teacher with plain DDIM, with each learned schedule, and every student."""
    folder = root / "models" / "teacher"
    teacher, rows = read_model(folder), []

    def add(family: str, where: Path, variant: Any, validated: float | None = None) -> None:
        def sample(start: Draw, variant: Any = variant, where: Path = where) -> Images:
            return samplers.ours(where, len(start))(start, variant.method, variant.times, told=variant.told)

        told = None if variant.told is None else variant.told.tolist()
        key = json.dumps([variant.method, variant.times.tolist(), told])
        rows.append(Row(f"{family}@{variant.nfe}", OURS, family, where, sample, variant.nfe, key, validated))

    for variant in teacher_variants(teacher, tuple(sorted({*nfe, REFERENCE_STEPS}))):
        add("teacher ddim", folder, variant)
    for entry in (entry for where in schedules for entry in read_knots(where)):
        if entry["nfe"] in nfe:
            variant = calibrated_variant(f"calibrated-{entry['nfe']}", teacher, entry)
            add(f"calibrated {entry['solver']}", folder, variant, entry["distance"])
    for family in student_folders(root / "models"):
        for variant in student_variants(family):
            add(family.name, family / variant.name.rpartition("-")[2], variant)
    return rows


def their_rows(
    root: Path, nfe: Sequence[int], samplers: Samplers, probe: Draw
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Each of Diffusers' schedulers on the teacher, LCM's on consistency models; and those that fail there.

    `probe` is sampled once by each, to count evaluations.
    """
    wanted = [
        (name, scheduler, root / "models" / "teacher", asked)
        for name, scheduler in theirs.SCHEDULERS.items()
        for asked in nfe
    ]
    for family in student_folders(root / "models"):
        steps = [variant.nfe for variant in student_variants(family) if variant.method == "consistency"]
        wanted += [(f"LCM, {family.name}", theirs.LCM, family / str(n), n) for n in steps]
    rows: dict[str, Row] = {}
    failed = []
    for name, scheduler, folder, asked in wanted:
        sample = partial(_sample_theirs, samplers, folder, scheduler, asked)
        try:
            made = sample(probe)[1]
        except Exception as problem:  # in Diffusers: some index past their own tables where two timesteps coincide
            failed.append({"name": name, "asked": asked, "why": f"{type(problem).__name__}: {problem}"})
            continue
        key = json.dumps([name, scheduler.class_name, scheduler.fields, asked])
        row = Row(f"{name}@{made}", THEIRS, name, folder, lambda start, s=sample: s(start)[0], made, key)
        rows.setdefault(row.name, row)  # Heun at an even number is Heun at one less
    return list(rows.values()), failed


def _sample_theirs(
    samplers: Samplers, folder: Path, scheduler: theirs.Scheduler, nfe: int, start: Draw
) -> tuple[Images, int]:
    return samplers.theirs(folder).sample(scheduler, nfe, start)


def kept(scratch: Path, parts: Sequence[Any], make: Callable[[], Images]) -> Images:
    """Samples by what they depend on: read where they were made before, else made and kept."""
    path = scratch / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    images = make()
    scratch.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, images, allow_pickle=False)
    return images


def verdicts(rows: Sequence[Mapping[str, Any]], bars: Mapping[int, float] = BARS) -> list[dict[str, Any]]:
    """At each bar's NFE: our learned schedule, chosen in validation, over the best of Diffusers' at no more NFE.

    Theirs is the best on the very noise that is reported on, which is in their favour.
    """
    found = []
    for nfe, bar in bars.items():
        learned = [row for row in rows if row["validated"] is not None and row["nfe"] == nfe]
        others = [row for row in rows if row["side"] == THEIRS and row["paired_features"] is not None]
        others = [row for row in others if row["nfe"] <= nfe and not row["family"].startswith("LCM")]
        if not learned or not others:
            found.append({"nfe": nfe, "bar": bar, "met": None, "why": f"no schedule or no scheduler at {nfe} NFE"})
            continue
        ours = min(learned, key=lambda row: row["validated"])
        best = min(others, key=lambda row: row["paired_features"])
        ratio = ours["paired_features"] / best["paired_features"]
        found.append(
            {"nfe": nfe, "bar": bar, "ours": ours["name"], "best": best["name"], "ratio": ratio, "met": ratio <= bar}
        )
    return found


def same_pictures(images: Mapping[str, Images], nfe: Sequence[int], train_timesteps: int) -> list[dict[str, Any]]:
    """Largest difference of a clipped pixel between our DDIM and Diffusers', where their grid is ours.

    Trailing timesteps are rounded where the number of steps does not divide that of training timesteps.
    """
    found = []
    for n in nfe:
        one, other = images.get(f"teacher ddim@{n}"), images.get(f"DDIM@{n}")
        if one is not None and other is not None and train_timesteps % n == 0:
            difference = float(np.abs(np.clip(one, -1, 1) - np.clip(other, -1, 1)).max())
            found.append({"nfe": n, "difference": difference, "same": difference <= SAME_PICTURE})
    return found


def figures(row: Row, images: Images, yardstick: Yardstick, fine: Images, fine_features: Any) -> dict[str, Any]:
    """Quality of one row. A scheduler whose samples are not finite has none."""
    plain = {"name": row.name, "side": row.side, "family": row.family, "nfe": row.nfe, "validated": row.validated}
    names = ("fd", "kid", "paired_pixels", "paired_features")
    if not np.isfinite(images).all():
        return plain | dict.fromkeys(names) | {"values": None}
    found = yardstick.features(images)
    pixels = paired_distance(images[: len(fine)], fine)
    features = paired_distance(found[: len(fine)], fine_features)
    interval = features.interval()
    return plain | {
        "fd": yardstick.excess(found).model,
        "kid": kid_from_sums(yardstick.kernel_sums(found), yardstick.real_sums),
        "paired_pixels": pixels.mean,
        "paired_features": features.mean,
        "paired_features_ci": [interval.low, interval.high],
        "values": features.values,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Sample, score and time every row, and write the report."""
    workspace, progress = Workspace(options.workspace), Terminal("bench-quality")
    root, folder = options.workspace, options.workspace / "models" / "teacher"
    data, extractor = open_dataset(workspace.data), load_features(workspace.features)
    part = data.split("report")
    start = draw(options.seed, DRAW, options.n, part)
    samplers = Samplers(options.batch, options.shards)
    others, failed = their_rows(root, options.nfe, samplers, start.first(1))
    schedules = learned_schedules(workspace, options.nfe, options.scratch, progress)
    rows = our_rows(root, schedules, options.nfe, samplers) + others
    sums = {row.model: sha256_tree(row.model) for row in rows}
    common = [options.seed, options.n, data.sha256, options.batch]

    paired = start.first(min(options.paired, options.n))
    teacher = read_model(folder)
    times = grids.uniform_log_snr(options.fine_steps, schedule_of(teacher))
    fine = kept(
        options.scratch,
        ["fine", sums[folder], *common, len(paired), options.fine_steps],
        lambda: samplers.ours(folder, len(paired))(paired, FINE_SOLVER, times, report=progress),
    )
    yardstick = Yardstick(Reference.of(data, extractor), extractor, None, 0.0, options.draws, options.seed)
    fine_features = yardstick.features(fine)
    images, scored = {}, []
    for number, row in enumerate(rows):
        images[row.name] = kept(options.scratch, [row.key, sums[row.model], *common], lambda row=row: row.sample(start))
        scored.append(figures(row, images[row.name], yardstick, fine, fine_features))
        progress.progress(number + 1, len(rows))

    few = start.first(options.timed)
    actions = {row.name: (lambda row=row: row.sample(few)) for row in rows}
    timing = Terminal("bench-quality, timing")
    seconds = interleaved(actions, options.rounds, lambda done: timing.progress(done, options.rounds))
    for row in scored:
        spread = Spread.of(seconds[row["name"]]).scaled(1e3 / len(few))
        row |= {"ms": spread.median, "ms_spread": asdict(spread)}

    found, by_name = verdicts(scored), {row["name"]: row for row in scored}
    for one in found:
        if one["met"] is not None:
            one["p"] = paired_less(by_name[one["ours"]]["values"], by_name[one["best"]]["values"])
    for row in scored:
        row.pop("values")
    train_timesteps = int(teacher.scheduler_config.get("num_train_timesteps", 1000))
    return {
        "rows": scored, "failed": failed, "verdicts": found,
        "sanity": same_pictures(images, options.nfe, train_timesteps),
        "n": options.n, "n_paired": len(paired), "n_real": len(part), "seed": options.seed, "draw": DRAW,
        "fine": {"solver": FINE_SOLVER, "grid": "uniform_log_snr", "steps": options.fine_steps},
        "features_sha256": extractor.sha256, "timed": {"batch": len(few), "rounds": options.rounds},
        "hardware": this_machine().as_plain(),
    }  # fmt: skip


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path(), help="folder with the outputs of the stages")
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10], help="network evaluations an image")
    parser.add_argument("--n", type=int, default=1000, help="samples a row")
    parser.add_argument("--paired", type=int, default=1000, help="of them, compared with the fine solution")
    parser.add_argument("--fine-steps", type=int, default=500, help="steps of the fine solution")
    parser.add_argument("--draws", type=int, default=400, help="random halves behind each FD")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", type=int, default=256, help="images through a network at a time")
    parser.add_argument(
        "--shards", type=int, default=2, help="parts of a batch at the same time, and PyTorch's threads"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each row, in turn")
    parser.add_argument("--timed", type=int, default=64, help="images a timing")
    parser.add_argument("--quick", action="store_true", help="256 samples, 100 fine steps, 2 rounds")
    parser.add_argument("--scratch", type=Path, default=Path(".ado/bench-quality"), help="where samples are kept")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/bench-quality.json"), help="report; picture beside it"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.n, options.paired, options.fine_steps, options.rounds = 256, 256, 100, 2
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where all bars are met, 1 where one is missed, 2 where the bench cannot run."""
    options = parse_arguments(arguments)
    try:
        if not theirs.available():
            raise ConfigError("PyTorch and Diffusers are needed: `make parity` installs them")
        if min(options.nfe) < 1 or options.paired > options.n or options.timed > options.n:
            raise ConfigError("--nfe, --paired, --timed: at least 1, at most --n and at most --n are allowed")
        report = run(options)
    except AdoError as problem:
        print(f"bench-quality: {problem}", file=sys.stderr)
        return 2
    picture = options.out.with_suffix(".png")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)
    save_picture(picture, report["rows"])
    show(report)
    print(f"report: {options.out}, picture: {picture}")
    good = all(one["same"] for one in report["sanity"]) and all(one["met"] is not False for one in report["verdicts"])
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
