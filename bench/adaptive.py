"""Does it pay to give each sample, or each class, its own number of steps? At equal mean cost, on held-out noise.

    python bench/adaptive.py choose WORKSPACE [--samples 384] [--out reports/adaptive]
    python bench/adaptive.py report WORKSPACE [--out reports/adaptive]

WORKSPACE is a folder in which `make demo` has run. `choose` settles everything on noise and labels of the selection
part and writes choice.json: the best fixed schedule for each number of evaluations (learned knots of schedules/, the
usual grids, and knots fitted here for the solver that the adaptive sampler is built on); evaluations a class
(`optimise/step_policy.py`); tolerances of the adaptive sampler (`diffusion/adaptive.py`) whose mean is the number
wanted; and whether the complexity in index.parquet predicts what samples need. `report` draws the evaluation's own
noise, on which nothing was chosen, and writes adaptive.json, adaptive.md and adaptive.png, whichever way it falls:
paired distance to the fine solution (one-sided paired tests, Holm over all), and KID minus that of the best fixed
schedule with its interval.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ado_tasks.backend import mx
from ado_tasks.datasets.complexity import complexity
from ado_tasks.datasets.shards import open_dataset, to_uint8
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.adaptive import Profile, StepControl, error_profile
from ado_tasks.diffusion.solvers import SOLVERS
from ado_tasks.evaluate import FINE_SOLVER, FINE_STEPS, REPORT
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.interval import Interval
from ado_tasks.metrics.noninferiority import kid_difference
from ado_tasks.metrics.paired import holm, paired_distance, paired_less
from ado_tasks.metrics.rank_correlation import rank_correlation
from ado_tasks.models.classifier import load_features
from ado_tasks.optimise.knots import fit_knots, resampled
from ado_tasks.optimise.step_policy import best_policy, class_complexity, class_errors, fixed_policy, steps_needed
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.registry.workspace import Workspace
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import read_json, write_json, write_text
from ado_tasks.variants import BASELINE_GRIDS, baseline_grid, read_knots

TARGETS = (4, 5, 6, 8)  # mean evaluations a sample that are compared: those that `calibrate` learns knots for
NFES = (3, 4, 5, 6, 8, 10)  # that a class may be given
OWN = "angle_ab2"  # the fixed form of the adaptive sampler's steps
USUAL = ("ipndm", "dpmpp_2m", OWN)  # on the usual grids; DDIM loses to each of them at every number here
CHOICE, FIT = "bench/adaptive", "bench/adaptive/fit"  # names of draws
LANES, SHORTLIST, FITTED, SOLVES = 128, 3, 48, 12
STD = 0.8  # of the digits, for the first step; 0.5 (EDM's of data) was tried and is no nearer


@dataclass(frozen=True)
class Fixed:
    """One schedule for all."""

    name: str
    solver: str
    times: list[float]

    @property
    def nfe(self) -> int:
        """Evaluations a sample."""
        return SOLVERS[self.solver].nfe(self.times)


class Bench:
    """A workspace's teacher and data, with one compiled batch shape."""

    def __init__(self, root: Path) -> None:
        """Open the outputs of a run."""
        self.place = Workspace(root)
        self.data = open_dataset(self.place.data)
        self.sampler = Sampler(read_model(root / "models" / "teacher"), LANES)
        self.schedules = root / "schedules" / "teacher"
        self.seed = int(self.place.quality()["reference"]["seeds"]["report"])

    def fine(self, start: Draw) -> Images:
        """The solution that distances are taken to, as in `evaluate`."""
        return self.sampler(start, FINE_SOLVER, grids.uniform_log_snr(FINE_STEPS, self.sampler.schedule))

    def fixed(self, start: Draw, schedule: Fixed) -> Images:
        """Samples of one schedule."""
        return self.sampler(start, schedule.solver, np.array(schedule.times))

    @cached_property
    def _fit_draw(self) -> tuple[Draw, Images, Sampler]:
        start = draw(self.seed, FIT, FITTED, self.data.split("selection"))
        return start, self.fine(start), Sampler(read_model(self.place.root / "models" / "teacher"), FITTED)

    def candidates(self, steps: int) -> list[Fixed]:
        """Learned knots; the usual grids; knots fitted for the adaptive sampler's solver."""
        learned = {entry["solver"]: entry["times"] for entry in read_knots(self.schedules) if entry["nfe"] == steps}
        found = [Fixed(f"{solver} learned", solver, times) for solver, times in learned.items()]
        usual = {name: baseline_grid(name, steps, self.sampler.schedule).tolist() for name in BASELINE_GRIDS}
        found += [Fixed(f"{solver} {name}", solver, times) for name, times in usual.items() for solver in USUAL]
        knots = {entry["nfe"]: entry["times"] for entry in read_knots(self.schedules) if entry["solver"] == "ipndm"}
        start = np.array(knots[min(knots, key=lambda nfe: abs(nfe - steps))])
        start = start if len(start) == steps + 1 else resampled(start, steps)
        noise, fine, sampler = self._fit_draw
        fit = fit_knots(lambda times: sampler(noise, OWN, times), fine, start, SOLVES)
        own = {f"{OWN} at ipndm's": start, f"{OWN} fitted": fit.times}
        return [*found, *(Fixed(name, OWN, times.tolist()) for name, times in own.items())]

    def profile(self, times: list[float], std: float) -> Profile:
        """What the fitted schedule errs in each step, on the noise that it was fitted on."""
        noise, _, sampler = self._fit_draw
        labels = None if noise.labels is None else mx.array(noise.labels)
        return error_profile(sampler.denoiser(labels), mx.array(noise.noise), times, sampler.schedule, std)


def errors_of(images: Images, fine: Images) -> np.ndarray:
    """Squared distance a pixel of each sample, (n,)."""
    return paired_distance(images, fine).values


def plain(interval: Interval) -> dict[str, float]:
    return asdict(interval)


def choose(root: Path, samples: int, out: Path) -> int:
    bench = Bench(root)
    part = bench.data.split("selection")
    start = draw(bench.seed, CHOICE, samples, part)
    fine = bench.fine(start)
    say("fine solution")
    fixed, errors = {}, {}
    for steps in NFES:
        fixed[steps], errors[steps] = _best_fixed(bench, steps, start, fine)
        say(f"{steps} evaluations: {fixed[steps]['chosen']['name']} {errors[steps].mean():.5f}")
    adaptive = {}
    for target in TARGETS:
        adaptive[target] = _controls(bench, target, start, fine, fixed[target]["fitted"])
        found = {name: f"{row['error']:.5f} at {row['mean_nfe']:.2f}" for name, row in adaptive[target].items()}
        say(f"adaptive, {target}: {found}")
    choice = {
        "samples": samples, "seed": bench.seed, "draw": CHOICE, "fixed": fixed, "adaptive": adaptive,
        **_by_class(bench, start, fine, np.stack([errors[steps] for steps in NFES], axis=1)),
    }  # fmt: skip
    write_json(out / "choice.json", choice)
    return 0


def _best_fixed(bench: Bench, steps: int, start: Draw, fine: Images) -> tuple[dict[str, Any], np.ndarray]:
    """The best schedule on the whole draw, of those that are best on its beginning."""
    few = start.first(LANES)
    rough = [(float(errors_of(bench.fixed(few, one), fine[:LANES]).mean()), one) for one in bench.candidates(steps)]
    rough.sort(key=lambda pair: pair[0])
    found = [(errors_of(bench.fixed(start, one), fine), one) for _, one in rough[:SHORTLIST]]
    errors, best = min(found, key=lambda pair: pair[0].mean())
    usual = next(one for _, one in rough if one.solver != OWN)
    fitted = next(one for _, one in rough if one.name == f"{OWN} fitted")
    return {
        "chosen": asdict(best), "error": float(errors.mean()), "best_other": asdict(usual), "fitted": fitted.times,
        "beginning": {one.name: error for error, one in rough},
    }, errors  # fmt: skip


def _controls(bench: Bench, target: int, start: Draw, fine: Images, fitted: list[float]) -> dict[str, Any]:
    """Two forms of step control, each at a tolerance whose mean is within the target, on the whole draw.

    "flat": one tolerance at all angles, started at t = 1 or where the fitted schedule starts, whichever ends nearer.
    "learned": the error profile of the fitted schedule, so that a mean sample takes that schedule's steps.
    """
    cap = 3 * target
    flat = [StepControl(0.02, max_nfe=cap, start=first, first_std=STD) for first in sorted({1.0, fitted[0]})]
    learned = StepControl(1.0, max_nfe=cap, start=fitted[0], first_std=STD, profile=bench.profile(fitted, STD))
    found = []
    for name, begun in [*(("flat", control) for control in flat), ("learned", learned)]:
        control = _tolerance_for(bench, target, start, begun)
        result = bench.sampler.adaptive(start, control)
        row = {"control": asdict(control), "mean_nfe": float(result.nfe.mean())}
        found.append((name, row | {"error": float(errors_of(result.images, fine).mean())}))
    found.sort(key=lambda pair: -pair[1]["error"])
    return dict(found)  # of the two flat ones the nearer is kept


def _tolerance_for(bench: Bench, target: float, start: Draw, control: StepControl) -> StepControl:
    """The control whose mean evaluations come nearest to the target from below; evaluations ∝ tolerance^−½."""
    best = None
    for _ in range(7):
        mean = float(bench.sampler.adaptive(start.first(2 * LANES), control).nfe.mean())
        if mean <= target and (best is None or mean > best[0]):
            best = mean, control
        if target * 0.995 <= mean <= target:
            break
        control = replace(control, atol=control.atol * (mean / (0.9975 * target)) ** 2)
    if best is None:
        raise SystemExit(f"no tolerance found for {target} evaluations")
    return best[1]


def _by_class(bench: Bench, start: Draw, fine: Images, errors: np.ndarray) -> dict[str, Any]:
    """Evaluations a class, and whether complexity predicts what is needed. Empty without classes."""
    if start.labels is None:
        return {"policy": {}, "complexity": {}}
    classes, labels = bench.data.num_classes, start.labels
    counts, nfe = np.bincount(labels, minlength=classes), np.array(NFES)
    table = class_errors(errors, labels, classes)
    each = np.ones(len(errors), np.int64)
    policies = {}
    for target in TARGETS:
        policy, one = (make(table, nfe, counts, target) for make in (best_policy, fixed_policy))
        bound = best_policy(errors, nfe, each, target)
        policies[target] = {
            "nfe": policy.nfe.tolist(), "mean_nfe": policy.mean_nfe, "error": policy.mean_error,
            "one_for_all": one.mean_error, "bound_if_each_error_were_known": bound.mean_error,
        }  # fmt: skip
    level = float(np.median(errors[:, NFES.index(5)]))
    needed = steps_needed(errors, nfe, level)
    by_class = class_errors(needed[:, None], labels, classes)[:, 0]
    of_class = class_complexity(bench.data.split("selection").index, classes)
    relation = {
        "level": level, "class_complexity": of_class.tolist(), "class_steps_needed": by_class.tolist(),
        "class_complexity_against_steps": plain(rank_correlation(of_class, by_class)),
        "own_complexity_against_steps": plain(rank_correlation(complexity(to_uint8(fine)), needed)),
        "variance_of_steps_between_classes": float(
            np.average((by_class - needed.mean()) ** 2, weights=counts) / needed.var()
        ),
    }  # fmt: skip
    return {"policy": policies, "complexity": relation}


def report(root: Path, samples: int | None, out: Path) -> int:
    bench, choice = Bench(root), read_json(out / "choice.json", "fixed", "adaptive", "policy", "complexity")
    quality = bench.place.quality()
    part = bench.data.split("report")
    start = draw(bench.seed, REPORT, quality["reference"]["n_generated"], part)
    start = start.first(samples or len(start))
    fine = bench.fine(start)
    say("fine solution")
    extractor = load_features(bench.place.features)
    features = lambda images: extractor.whitened(extractor.features(images))  # noqa: E731
    real = features(part.batch(np.arange(len(part))))
    rows, tests = [], []
    for target in TARGETS:
        drawn = _drawn(bench, choice, target, start)
        base = drawn["fixed"]
        for method, (images, nfe, detail) in drawn.items():
            distance = paired_distance(images, fine)
            row = {"target": target, "method": method, "detail": detail, "mean_nfe": float(np.mean(nfe)),
                   "nfe_range": [int(np.min(nfe)), int(np.max(nfe))], "paired": plain(distance.interval())}  # fmt: skip
            if method != "fixed":
                row["p"] = paired_less(distance.values, errors_of(base[0], fine))
                row["p_worse"] = paired_less(errors_of(base[0], fine), distance.values)
                row["ratio_to_fixed"] = distance.mean / float(errors_of(base[0], fine).mean())
                row["kid_minus_fixed"] = plain(kid_difference(features(images), features(base[0]), real))
                tests.append(row)
            row["kid_minus_fine"] = plain(kid_difference(features(images), features(fine), real))
            rows.append(row)
        say(f"{target} evaluations")
    for name in ("p", "p_worse"):
        for row, corrected in zip(tests, holm([row[name] for row in tests]), strict=True):
            row[f"{name}_holm"] = float(corrected)
    result = {
        "rows": rows,
        "n": len(start),
        "n_real": len(part),
        "choice": choice,
        "margin": quality["reference"]["anchor"]["margin"],
    }
    write_json(out / "adaptive.json", result)
    write_text(out / "adaptive.md", table(result))
    save_picture(out / "adaptive.png", rows)
    print(table(result))
    return 0


def _drawn(bench: Bench, choice: dict[str, Any], target: int, start: Draw) -> dict[str, tuple[Images, np.ndarray, str]]:
    """Samples, evaluations and a word on each method that is compared at this mean."""
    fixed = {int(nfe): Fixed(**found["chosen"]) for nfe, found in choice["fixed"].items()}
    known = Fixed(**choice["fixed"][str(target)]["best_other"])
    same = np.full(len(start), target)
    drawn = {"fixed": (bench.fixed(start, fixed[target]), same, fixed[target].name)}
    if known.name != fixed[target].name:
        drawn["fixed, other"] = (bench.fixed(start, known), same, known.name)
    if choice["policy"] and start.labels is not None:
        wanted = np.array(choice["policy"][str(target)]["nfe"])[start.labels]
        images = np.empty_like(start.noise)
        for nfe in np.unique(wanted):
            rows = wanted == nfe
            images[rows] = bench.fixed(Draw(start.noise[rows], start.labels[rows]), fixed[int(nfe)])
        drawn["policy"] = (images, wanted, "/".join(map(str, choice["policy"][str(target)]["nfe"])))
    for name, found in choice["adaptive"][str(target)].items():
        settings = found["control"] | {"profile": tuple(map(tuple, found["control"]["profile"]))}
        control = StepControl(**settings)
        result = bench.sampler.adaptive(start, control)
        idle = LANES * result.calls / result.nfe.sum() - 1
        detail = f"atol {control.atol:.3g}, idle lanes {idle:.0%}"
        drawn[f"adaptive, {name}"] = (result.images, result.nfe, detail)
    return drawn


def table(result: dict[str, Any]) -> str:
    lines = [
        "| mean NFE | method | what | NFE | paired ×10³ [95 %] | ratio | p better | p worse | KID − fixed [95 %] |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        paired = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**{k: 1e3 * v for k, v in row["paired"].items()})
        beside = "| | | | |"
        if "p_holm" in row:
            kid = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["kid_minus_fixed"])
            beside = f"| {row['ratio_to_fixed']:.2f} | {row['p_holm']:.2g} | {row['p_worse_holm']:.2g} | {kid} |"
        least, most = row["nfe_range"]
        spent = f"{row['mean_nfe']:.2f} [{least}, {most}]"
        lines.append(f"| {row['target']} | {row['method']} | {row['detail']} | {spent} | {paired} {beside}")
    relation = result["choice"]["complexity"]
    lines.append("")
    for name in ("class_complexity_against_steps", "own_complexity_against_steps"):
        if name in relation:
            lines.append(f"{name}: " + "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**relation[name]))
    return "\n".join(lines) + "\n"


def save_picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """Paired distance by mean evaluations, a line a method."""
    figure = Figure(figsize=(6.6, 4.0))
    axes = plain_axes(figure)
    colours = {"fixed": "#3274b5", "fixed, other": "#8a8f98", "policy": "#3a9d5d", "adaptive, flat": "#d9a441",
               "adaptive, learned": "#c8452f"}  # fmt: skip
    labels = {"fixed": "best fixed schedule", "fixed, other": "best fixed schedule of other solvers",
              "policy": "evaluations a class", "adaptive, flat": "evaluations a sample, one tolerance",
              "adaptive, learned": "evaluations a sample, learned tolerances"}  # fmt: skip
    for method, colour in colours.items():
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        ends = [[row["paired"]["value"] - row["paired"]["low"] for row in mine],
                [row["paired"]["high"] - row["paired"]["value"] for row in mine]]  # fmt: skip
        nfe, middle = [row["mean_nfe"] for row in mine], [row["paired"]["value"] for row in mine]
        axes.errorbar(nfe, middle, yerr=ends, marker="o", markersize=4, capsize=3, linewidth=1.2, color=colour,
                      label=labels[method])  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("mean network evaluations a sample")
    axes.set_ylabel("squared distance to the fine solution\n(same noise, a pixel; report draw)")
    axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


_STARTED_S = time.perf_counter()


def say(text: str) -> None:
    print(f"{time.perf_counter() - _STARTED_S:5.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Choose, or report."""
    parser = argparse.ArgumentParser(description="Adaptive steps against the best fixed schedule at equal mean cost.")
    parser.add_argument("phase", choices=("choose", "report"))
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--samples", type=int, help="of the draw; 384 to choose, all of the evaluation's to report")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; reports/adaptive of the workspace if not given"
    )
    options = parser.parse_args()
    out = options.out or options.workspace / "reports" / "adaptive"
    out.mkdir(parents=True, exist_ok=True)
    if options.phase == "choose":
        return choose(options.workspace, options.samples or 384, out)
    return report(options.workspace, options.samples, out)


if __name__ == "__main__":
    sys.exit(main())
