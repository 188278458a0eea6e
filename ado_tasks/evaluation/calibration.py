"""Do learned knots beat the usual grids? Paired, on noise that the knots were not chosen on, with Holm's correction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.metrics.paired import holm, paired_distance, paired_less
from ado_tasks.sampling import Images
from ado_tasks.variants import BASELINE_GRIDS, baseline_grid, read_knots


def compare_grids(
    sample: Callable[..., Images], schedule: NoiseSchedule, schedules: Path, fine: Images
) -> list[dict[str, Any]]:
    """For each learned schedule: its mean squared distance to the fine solution beside each baseline grid's.

    `sample` takes a solver, its times and, as `told`, those its network is told, or None; it starts from the noise that
    `fine` is the solution of.
    `p` is one-sided and paired by noise, corrected after Holm over all schedules and grids together.
    """
    found = []
    for entry in read_knots(schedules):
        told = np.array(entry["told"]) if "told" in entry else None
        learned = paired_distance(sample(entry["solver"], np.array(entry["times"]), told=told), fine)
        row = {"solver": entry["solver"], "nfe": entry["nfe"], "learned": learned.mean, "baselines": {}}
        for name in BASELINE_GRIDS:
            times = baseline_grid(name, len(entry["times"]) - 1, schedule)
            baseline = paired_distance(sample(entry["solver"], times), fine)
            p = paired_less(learned.values, baseline.values)
            row["baselines"][name] = {"value": baseline.mean, "p": p}
        found.append(row)
    tests = [test for row in found for test in row["baselines"].values()]
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = float(corrected)
    for row in found:
        best = min(row["baselines"], key=lambda name: row["baselines"][name]["value"])
        row["best_baseline"] = best
        row["ratio_to_best"] = row["learned"] / row["baselines"][best]["value"]
        row["better"] = bool(row["ratio_to_best"] < 1 and all(t["p_holm"] < 0.05 for t in row["baselines"].values()))
    return found
