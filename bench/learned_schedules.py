"""Fitted knots against LD3 on a Gaussian mixture: 48 noises to learn on, 48 to keep by, 2,000 others to report on.

Mean distance to the fine solution a pixel, in brackets mean squared distance × 10³. `python bench/learned_schedules.py`

With folders that `calibrate` has made of a workspace's teacher, instead: each schedule in them on noise of the report
draw, which nothing was chosen on, beside the fine solution of `evaluate`, with the standard error of the squares.

    python bench/learned_schedules.py --workspace . --schedules schedules/teacher … --samples 192
"""

import argparse
from pathlib import Path

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import denoiser, grids
from ado_tasks.diffusion.oracles import mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.diffusion.solvers import SOLVERS
from ado_tasks.evaluate import FINE_SOLVER, FINE_STEPS, REPORT
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.paired import paired_distance
from ado_tasks.optimise import ld3
from ado_tasks.optimise.knots import fit_knots
from ado_tasks.registry.workspace import Workspace
from ado_tasks.sampling import Sampler, draw
from ado_tasks.variants import BASELINE_GRIDS, baseline_grid, read_knots

SCHEDULE = Cosine()
MIXTURE = mixture_denoiser(SCHEDULE, np.random.default_rng(0).uniform(-1, 1, (20, 3, 3, 1)), 0.3)
BATCH = 128  # images through a network at a time
EVALUATIONS = 24_000  # of a descent, as `calibrate`'s default
FINE = grids.uniform_log_snr(300, SCHEDULE)


def examples(count: int, seed: int) -> ld3.Examples:
    noise = mx.random.normal((count, 3, 3, 1), key=mx.random.key(seed))
    return ld3.Examples(np.array(noise), None, np.array(SOLVERS["dpmpp_2m"].sample(MIXTURE, noise, FINE, SCHEDULE)))


def squared(on: ld3.Examples, solver: str, found: ld3.Discretisation) -> np.ndarray:
    denoise = MIXTURE if found.told is None else denoiser.told(MIXTURE, found.told)
    sample = np.array(SOLVERS[solver].sample(denoise, mx.array(on.noise), found.times, SCHEDULE))
    return np.square(sample - on.fine).mean(axis=(1, 2, 3))


def distance(on: ld3.Examples, solver: str, found: ld3.Discretisation) -> float:
    return float(np.sqrt(squared(on, solver, found)).mean())


def line(solver: str, nfe: int, gradient: ld3.Gradient, on: tuple[ld3.Examples, ...]) -> str:
    """One solver at one number of evaluations: the best usual grid, fitted knots, LD3 from these."""
    learned_on, kept_by, others = on
    usual = [ld3.Discretisation(baseline_grid(name, nfe, SCHEDULE)) for name in BASELINE_GRIDS]
    fit = fit_knots(
        lambda times: np.array(SOLVERS[solver].sample(MIXTURE, mx.array(learned_on.noise), times, SCHEDULE)),
        learned_on.fine, grids.uniform_time(nfe), max_solves=12,
    )  # fmt: skip
    descent = ld3.learn(
        gradient, solver, SCHEDULE, learned_on, fit.times, lambda found: distance(kept_by, solver, found),
        ld3.Settings(steps=EVALUATIONS // (3 * 16 * nfe)), seed=0,
    )  # fmt: skip
    best = min(usual, key=lambda found: distance(others, solver, found))
    cells = [
        f"{distance(others, solver, one):.4f} ({1e3 * squared(others, solver, one).mean():.2f})"
        for one in (best, ld3.Discretisation(fit.times), descent.found)
    ]
    return f"{solver:10} {nfe:3}  {cells[0]:16} {cells[1]:16} {cells[2]}"


def held_out(workspace: Path, folders: list[Path], samples: int) -> None:
    """Print how far each learned schedule in the folders ends from the fine solution."""
    place = Workspace(workspace)
    sampler = Sampler(read_model(workspace / "models" / "teacher"), min(BATCH, samples))
    reference = place.quality()["reference"]
    part = open_dataset(place.data).split("report")
    start = draw(int(reference["seeds"]["report"]), REPORT, reference["n_generated"], part).first(samples)
    fine = sampler(start, FINE_SOLVER, grids.uniform_log_snr(FINE_STEPS, sampler.schedule))
    for folder in folders:
        for entry in sorted(read_knots(folder), key=lambda entry: (entry["solver"], entry["nfe"])):
            told = np.array(entry["told"]) if "told" in entry else None
            images = sampler(start, entry["solver"], np.array(entry["times"]), told=told)
            values = paired_distance(images, fine).values
            error = values.std(ddof=1) / np.sqrt(samples)
            print(
                f"{entry['solver']:10} {entry['nfe']:3}  {entry['method']:16} {np.sqrt(values).mean():.4f} "
                f"({1e3 * values.mean():.2f} ± {1e3 * error:.2f})  {folder}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--solvers", nargs="+", default=["ddim", "ipndm", "dpmpp_2m", "angle_ab2"])
    parser.add_argument("--workspace", type=Path, default=Path(), help="folder with the outputs of the stages")
    parser.add_argument("--schedules", type=Path, nargs="+", help="folders made by `calibrate` of its teacher")
    parser.add_argument("--samples", type=int, default=192, help="with --schedules: noises")
    options = parser.parse_args()
    if options.schedules:
        held_out(options.workspace, options.schedules, options.samples)
        return
    on = (examples(48, 1), examples(48, 2), examples(2000, 3))
    gradient = ld3.Gradient(lambda _: MIXTURE, shards=1)
    print(f"{'solver':10} NFE  {'best usual':16} {'fitted':16} ld3")
    for solver in options.solvers:
        for nfe in options.nfe:
            print(line(solver, nfe, gradient, on), flush=True)


if __name__ == "__main__":
    main()
