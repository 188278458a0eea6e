"""Do learned knots beat every usual grid, for more solvers than `params.yaml` names? On the report draw, after Holm.

    python bench/usual_grids.py [WORKSPACE] [--solvers ddim ipndm dpmpp_2m angle_ab2] [--samples 512]

WORKSPACE is a folder in which the graph has run (`make demo`): its teacher's knots are learned by `calibrate` as
params.yaml says, but for the solvers, into WORKSPACE/.ado/usual_grids, and compared as `evaluate` does. Exit status 1
where one is not better than every grid (p < 0.05 after Holm over all).
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ado_tasks.calibrate import CalibrateConfig, calibrate
from ado_tasks.config import parse, section
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.errors import AdoError
from ado_tasks.evaluate import FINE_SOLVER, FINE_STEPS, REPORT
from ado_tasks.evaluation.calibration import compare_grids
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.registry.workspace import Workspace
from ado_tasks.report import Terminal
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import write_json


def compared(place: Workspace, solvers: list[str], samples: int) -> list[dict[str, Any]]:
    """Rows of `compare_grids`, one a solver and number of evaluations."""
    teacher, out, seed = place.root / "models" / "teacher", place.root / ".ado" / "usual_grids", place.params["seed"]
    values = {**section(place.params, "calibrate.teacher"), "solvers": solvers}
    config = parse(CalibrateConfig, values, "calibrate.teacher")
    calibrate(config, model=teacher, dataset=place.data, out=out, seed=seed, report=Terminal("calibrate"))
    sampler = Sampler(read_model(teacher))
    start = draw(seed, REPORT, samples, open_dataset(place.data).split("report"))
    fine = sampler(start, FINE_SOLVER, grids.uniform_log_snr(FINE_STEPS, sampler.schedule))
    return compare_grids(partial(sampler, start), sampler.schedule, out, fine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, nargs="?", default=Path())
    parser.add_argument("--solvers", nargs="+", default=["ddim", "ipndm", "dpmpp_2m", "angle_ab2"])
    parser.add_argument("--samples", type=int, default=512, help="noises")
    options = parser.parse_args()
    if options.samples < 2:
        parser.error(f"--samples: {options.samples} is not allowed; allowed: 2 and more")
    place = Workspace(options.workspace)
    try:
        rows = compared(place, options.solvers, options.samples)
    except AdoError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 2
    for row in rows:
        worst = max(test["p_holm"] for test in row["baselines"].values())
        print(
            f"{row['solver']:10} {row['nfe']:3}  {row['ratio_to_best']:.2f} of {row['best_baseline']:16} "
            f"p ≤ {worst:.2g}  {'better' if row['better'] else 'NOT better'}"
        )
    write_json(place.reports / "usual_grids.json", rows)
    print(f"better than every usual grid: {sum(row['better'] for row in rows)} of {len(rows)}")
    return 0 if all(row["better"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
