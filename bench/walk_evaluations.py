"""How far a teacher's walk strays where it is asked at fewer steps than it takes: `distill`'s `walk_evaluations`.

    python bench/walk_evaluations.py WORKSPACE --steps 50 --evaluations 25 16 12

WORKSPACE is a folder with models/teacher and data. From the same noise and labels, a draw that no stage makes, the
teacher walks once asked at each of `--steps` steps of DDIM; then, for each number of evaluations, in as many steps but
asked that often, and in that many steps of DDIM. Ends are compared with those of the first: squared distance a pixel,
and of drawn shapes how often place and size are the same. JSON in reports/walk-evaluations.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ado_tasks.backend import mx
from ado_tasks.datasets.shape_attributes import Tolerance, agree, read_shapes
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.paired import paired_distance
from ado_tasks.optimise.progressive import states_on_the_way
from ado_tasks.registry.workspace import Workspace
from ado_tasks.report import Terminal
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import named_storage_errors, write_json

DRAW = "walk-evaluations"  # name of the noise: no stage draws by it
COLUMNS = {"shape", "size", "cx", "cy"}  # of index.parquet, where images are drawn shapes


def ends(
    sampler: Sampler, start: Draw, steps: int, evaluations: int | None, batch: int,
    ready: Callable[[int], None] = lambda _: None,
) -> Images:  # fmt: skip
    """Where walks of so many steps of DDIM end, asked so often: (n, H, W, C), clipped to [-1, 1].

    `ready` hears of each batch, in network evaluations of an image.
    """
    found = []
    for first in range(0, len(start), batch):
        noise = mx.array(start.noise[first : first + batch])
        labels = None if start.labels is None else mx.array(start.labels[first : first + batch])
        denoise = sampler.denoiser(labels)
        (end,) = states_on_the_way(
            denoise, noise, uniform_time(steps), (0.0,), sampler.schedule, evaluations=evaluations
        )
        found.append(np.clip(np.array(end), -1, 1))
        ready(len(noise) * (evaluations or steps))
    return np.concatenate(found)


def compared(options: argparse.Namespace, progress: Terminal) -> Iterator[dict[str, Any]]:
    """A row a way to walk."""
    workspace = Workspace(options.workspace)
    folder = workspace.root / "models" / "teacher"
    data, teacher = open_dataset(workspace.data), read_model(folder)
    teacher.unet.config.check_data(data.shape, data.num_classes, f"{folder}/unet/config.json")
    start = draw(options.seed, DRAW, options.n, data.split("selection"))
    sampler = Sampler(teacher, options.batch, options.shards)
    done, total = 0, len(start) * (options.steps + 2 * sum(options.evaluations))

    def ready(more: int) -> None:
        nonlocal done
        done += more
        progress.progress(done, total)

    whole = ends(sampler, start, options.steps, None, options.batch, ready)
    read = read_shapes(whole, options.shards) if set(data.index.columns) >= COLUMNS else None
    tolerance = Tolerance()
    tighter = Tolerance(tolerance.place / 2, tolerance.radius / 2)
    for evaluations in options.evaluations:
        for steps, asked in ((options.steps, evaluations), (evaluations, None)):
            images = ends(sampler, start, steps, asked, options.batch, ready)
            distance = paired_distance(images, whole)
            interval = distance.interval()
            row = {"steps": steps, "evaluations": evaluations, "distance": distance.mean}
            row["distance_ci"] = [interval.low, interval.high]
            if read is not None:
                own = read_shapes(images, options.shards)
                row["agreement"] = float(np.mean(agree(own, read, tolerance)))
                row["agreement_at_half_tolerance"] = float(np.mean(agree(own, read, tighter)))
            yield row


def table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> Table:
    """A line a way to walk."""
    shown = Table(title=f"ends of walks, held against {options.steps} steps of DDIM; n = {options.n}, selection part")
    for name in ("steps", "evaluations", "distance ×10³ [95 %]", "agree", "at half tolerance"):
        shown.add_column(name, justify="right")
    for row in rows:
        low, high = (1e3 * end for end in row["distance_ci"])
        shares = [f"{100 * row[name]:.1f} %" for name in ("agreement", "agreement_at_half_tolerance") if name in row]
        distance = f"{1e3 * row['distance']:.3g} [{low:.3g}, {high:.3g}]"
        shown.add_row(str(row["steps"]), str(row["evaluations"]), distance, *shares)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="folder with the outputs of the stages")
    parser.add_argument("--steps", type=int, default=50, help="of the walk that others are held against")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[25, 16, 12], help="of the others")
    parser.add_argument("--n", type=int, default=256, help="noises")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", type=int, default=64, help="walks at a time")
    parser.add_argument(
        "--shards", type=int, default=2, help="parts of a batch at the same time, on a CPU; and threads"
    )
    parser.add_argument("--out", type=Path, help="report (default: reports/walk-evaluations.json in WORKSPACE)")
    options = parser.parse_args(arguments)
    out: Path = options.out or Workspace(options.workspace).reports / "walk-evaluations.json"
    try:
        if min(options.n - 1, options.batch, options.shards) < 1:
            raise ConfigError("--n: at least 2 are allowed; --batch, --shards: at least 1")
        if not 2 <= min(options.evaluations) <= max(options.evaluations) < options.steps:
            raise ConfigError(f"--evaluations: {options.evaluations}; allowed: from 2 to under --steps {options.steps}")
        if options.out:
            with named_storage_errors(out):  # before the work, not after it
                out.parent.mkdir(parents=True, exist_ok=True)
        with closing(Terminal("walk-evaluations")) as progress:
            rows = list(compared(options, progress))
        settings = {name: getattr(options, name) for name in ("steps", "n", "seed", "batch", "shards")}
        write_json(out, {"draw": DRAW, "part": "selection", **settings, "rows": rows})
    except AdoError as problem:
        print(f"walk-evaluations: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 2
    Console().print(table(rows, options))
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
