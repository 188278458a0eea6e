"""How much of a student's quality is the luck of its seed: the same teacher, students of several seeds, one evaluation.

    python bench/student_seeds.py WORKSPACE --seeds 1 2

WORKSPACE is a folder in which the graph has run (`make demo`, `make preset`). Students of its own seed are there
already (models/<family>); those of the seeds given are made as params.yaml says, under WORKSPACE/.ado/seeds. What is
there for the same teacher and settings is kept: an interrupted run goes on. All are then held against the same samples
of the teacher, on the report part: reports/seeds/evaluate.json, and the spread in reports/seeds/seeds.json and on the
screen.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ado_tasks.config import as_plain, parse, section
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.distill import distill
from ado_tasks.errors import AdoError
from ado_tasks.evaluate import EvaluateConfig, evaluate
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.registry.workspace import Workspace
from ado_tasks.report import Terminal
from ado_tasks.storage import read_json, sha256_tree, write_json

METHODS: Any = DistillConfig | ConsistencyConfig


def students_of(workspace: Workspace, family: str, seed: int) -> Path:
    """The folder of a family taught with another seed; made where it is not there for this teacher and settings."""
    settings = parse(METHODS, section(workspace.params, f"distill.{family}"), "distill")
    teacher = workspace.root / "models" / "teacher"
    told = json.dumps([settings.method, as_plain(settings), sha256_tree(teacher), open_dataset(workspace.data).sha256])
    folder = workspace.root / ".ado" / "seeds" / hashlib.sha256(told.encode()).hexdigest()[:12] / f"{family}-s{seed}"
    if not folder.exists():
        distill(
            settings, teacher=teacher, dataset=workspace.data, features=workspace.features,
            anchor=workspace.root / "anchor", out=folder, scratch=folder.parent / "scratch" / folder.name, seed=seed,
            report=Terminal(f"seed {seed}"),
        )  # fmt: skip
    return folder


def compared(workspace: Workspace, students: Sequence[Path]) -> Mapping[str, Any]:
    """The report of `evaluate` over all of them."""
    root, out = workspace.root, workspace.reports / "seeds"
    evaluate(
        parse(EvaluateConfig, section(workspace.params, "evaluate"), "evaluate"), dataset=workspace.data,
        features=workspace.features, anchor=root / "anchor", teacher=root / "models" / "teacher",
        students=tuple(students), schedules=root / "schedules" / "teacher", out=out, seed=workspace.params["seed"],
        report=Terminal("evaluate"),
    )  # fmt: skip
    return read_json(out / "evaluate.json", "variants", "reference")


def spread(found: Mapping[str, Any], families: Sequence[str]) -> list[dict[str, Any]]:
    """One row a number of steps: each seed's figures."""
    floor = found["reference"]["floor_fd"]["mean"]
    rows = defaultdict(list)
    for entry in found["variants"]:
        family = entry["name"].rpartition("-")[0]
        if family in families:
            rows[entry["nfe"]].append(entry)
    return [
        {
            "nfe": nfe,
            "students": [entry["name"] for entry in entries],
            "kid_minus_teacher": [entry["kid_minus_teacher"]["value"] for entry in entries],
            "upper_end": [entry["kid_minus_teacher"]["ci"][1] for entry in entries],
            "margin": entries[0]["kid_minus_teacher"]["margin"],
            "fd_excess_over_floor": [entry["fd_over_train"]["value"] / floor for entry in entries],
            "paired_ratio": [entry["paired_ratio_to_ddim"] for entry in entries],
            "class_accuracy": [entry["class_accuracy"] for entry in entries],
        }
        for nfe, entries in sorted(rows.items(), reverse=True)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each figure as all its values, smallest first."""
    shown = Table(title=f"{len(rows[0]['students'])} seeds, each figure from least to most")
    for name in ("steps", "KID − teacher", "upper end, margin", "FD excess / floor", "paired ratio", "class accuracy"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            str(row["nfe"]), _values(row["kid_minus_teacher"]), f"{_values(row['upper_end'])}, {row['margin']:.4f}",
            _values(row["fd_excess_over_floor"]), _values(row["paired_ratio"]), _values(row["class_accuracy"]),
        )  # fmt: skip
    return shown


def _values(given: Sequence[float | None]) -> str:
    known = sorted(value for value in given if value is not None)
    return " ".join(np.format_float_positional(value, precision=4, trim="0") for value in known) or "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--family", default="progressive", help="a section under distill (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    workspace = Workspace(options.workspace)
    try:
        given = workspace.root / "models" / options.family
        students = [given, *(students_of(workspace, options.family, seed) for seed in options.seeds)]
        found = compared(workspace, students)
    except AdoError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 1
    rows = spread(found, [folder.name for folder in students])
    write_json(workspace.reports / "seeds" / "seeds.json", rows)
    Console().print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
