"""Where students should step: the same training on uniform times and on the knots that `calibrate` learned for DDIM.

    python bench/student_times.py WORKSPACE --stage-steps 300 --seeds 0 1

WORKSPACE is a folder in which the graph has run (`make preset NAME=shapes16`): its teacher and schedules/teacher are
read. Students of `distill.progressive`, without matching, are made under WORKSPACE/.ado/times: for uniform times, and
for each learned schedule of DDIM whose steps the most of `--students` divides (every so manyth of its knots, the first
moved to 1). What is there for the same settings is kept. Each is then sampled from the same noise, on the selection
part: the squared distance to the teacher's fine solution (50 steps of DPM-Solver++(2M)), and of drawn shapes how often
place and size are those of the teacher's 50 steps of DDIM. Beside them the teacher itself on the same times, and other
families of the workspace (`--family`). JSON in reports/student-times.json.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ado_tasks.config import as_plain, parse, section
from ado_tasks.datasets.shape_attributes import Tolerance, agree, read_shapes
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.distill import distill
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.registry.workspace import Workspace
from ado_tasks.report import Terminal
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import read_json, sha256_tree, write_json
from ado_tasks.variants import Variant, schedule_of, student_variants

FINE = 50
UNIFORM = "uniform"
COLUMNS = {"shape", "size", "cx", "cy"}  # of index.parquet, where images are drawn shapes


def learned_times(schedules: Path, steps: int, of: Sequence[int] = ()) -> dict[str, tuple[float, ...]]:
    """By name, times of so many steps: every so manyth knot of each schedule of DDIM, the first moved to 1.

    Args:
        schedules: folder made by `calibrate`.
        steps: of the students' chain, its most.
        of: only those learned for so many evaluations; all where there is none.

    Raises:
        ConfigError: there is none that the steps divide.
    """
    found = {}
    for path in sorted(schedules.glob("ddim-*.json")):
        knots = read_json(path, "times")["times"]
        every, rest = divmod(len(knots) - 1, steps)
        if not rest and (not of or len(knots) - 1 in of):
            found[f"knots of {path.stem}"] = (1.0, *knots[::every][1:])
    if not found:
        raise ConfigError(f"{schedules}: no schedule of DDIM whose steps {steps} divides; `calibrate` learns them")
    return found


def settings_of(given: Mapping[str, Any], times: Sequence[float] | None, options: argparse.Namespace) -> DistillConfig:
    """The workspace's section as these options have it. Raises ConfigError where they do not go with its other keys."""
    asked = {
        "student_steps": options.students, "stage_steps": options.stage_steps, "times": times,
        "learning_rate": options.learning_rate, "teacher_steps": options.teacher_steps, "matching": None,
        "stop": "never",
    }  # fmt: skip
    return parse(DistillConfig, {**given, **asked}, "distill.progressive, with this bench's options")


def taught(workspace: Workspace, settings: DistillConfig, seed: int, name: str) -> Path:
    """The folder of students with these settings; made where it is not there."""
    teacher = workspace.root / "models" / "teacher"
    told = json.dumps([as_plain(settings), sha256_tree(teacher), open_dataset(workspace.data).sha256, seed])
    folder = workspace.root / ".ado" / "times" / hashlib.sha256(told.encode()).hexdigest()[:12]
    if not folder.exists():
        distill(
            settings, teacher=teacher, dataset=workspace.data, out=folder, scratch=folder.parent / "scratch", seed=seed,
            report=Terminal(f"{name}, seed {seed}"),
        )  # fmt: skip
    return folder


def compared(workspace: Workspace, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a sampler: how near it comes to the teacher's own solution."""
    data, teacher = open_dataset(workspace.data), read_model(workspace.root / "models" / "teacher")
    start = draw(workspace.params["seed"], "student-times", options.n, data.split("selection"))
    sampler = Sampler(teacher, options.batch, options.shards)
    fine = np.clip(sampler(start, "dpmpp_2m", grids.uniform_log_snr(FINE, schedule_of(teacher))), -1, 1)
    drawn = set(data.index.columns) >= COLUMNS
    reference = np.clip(sampler(start, "ddim", grids.uniform_time(FINE)), -1, 1) if drawn else None
    read = None if reference is None else read_shapes(reference, options.shards)

    def row(name: str, seed: int | None, variant: Variant) -> dict[str, Any]:
        images = np.clip(Sampler(variant.model, options.batch, options.shards)(start, "ddim", variant.times), -1, 1)
        found = {"times": name, "seed": seed, "nfe": variant.nfe, "knots": variant.times.tolist()}
        found["paired_distance"] = float(np.mean((images - fine) ** 2))
        if read is not None:
            own = read_shapes(images, options.shards)
            found["agree"] = float(np.mean(agree(own, read, Tolerance(options.place, options.radius))))
        return found

    ways = {
        UNIFORM: None,
        **learned_times(workspace.root / "schedules" / "teacher", options.students[0], options.learned),
    }
    given = section(workspace.params, "distill.progressive")
    for name, times in ways.items():
        settings = settings_of(given, times, options)
        for seed in options.seeds:
            for variant in student_variants(taught(workspace, settings, seed, name)):
                if seed == options.seeds[0]:
                    yield row(f"{name}, not distilled", None, replace(variant, model=teacher))
                yield row(name, seed, variant)
    for family in options.family:
        for variant in student_variants(workspace.root / "models" / family):
            yield row(family, None, variant)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a sampler, of one number of steps together."""
    shown = Table(title="distance to the teacher's fine solution, selection part")
    for name in ("steps", "times", "seed", "paired ×10³", "agree"):
        shown.add_column(name, justify="left" if name == "times" else "right")
    for each in sorted(rows, key=lambda each: -each["nfe"]):
        share = f"{100 * each['agree']:.1f} %" if "agree" in each else ""
        seed = "" if each["seed"] is None else str(each["seed"])
        shown.add_row(str(each["nfe"]), each["times"], seed, f"{1e3 * each['paired_distance']:.3g}", share)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--students", type=int, nargs="+", default=[4, 2, 1], help="steps of the chain")
    parser.add_argument("--stage-steps", type=int, default=300, help="optimiser steps of each (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of each stage (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=32, help="that the first student replaces")
    parser.add_argument("--learned", type=int, nargs="*", default=[], help="schedules of so many evaluations only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--family", nargs="*", default=[], help="families of the workspace to show beside them")
    parser.add_argument("--n", type=int, default=1000, help="samples")
    parser.add_argument("--batch", type=int, default=100, help="samples at once")
    parser.add_argument("--shards", type=int, default=2, help="cores")
    parser.add_argument("--place", type=float, default=0.5, help="tolerance of the centre, pixels (default: of 16)")
    parser.add_argument("--radius", type=float, default=0.25, help="tolerance of the radius, pixels")
    options = parser.parse_args()
    workspace = Workspace(options.workspace)
    try:
        rows = list(compared(workspace, options))
    except AdoError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    settings = {name: value for name, value in vars(options).items() if name != "workspace"}
    write_json(workspace.reports / "student-times.json", {"settings": settings, "rows": rows})
    Console().print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
