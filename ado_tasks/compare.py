"""`ado compare`: the reports as one table: every variant, its quality with intervals, its cost and speed-up.

With --stages, a picture of how far distillation may go. With --runs, the last evaluations in MLflow side by side:
architectures and sampling methods, as table and picture.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ado_tasks.errors import ConfigError
from ado_tasks.gate import named_report_errors
from ado_tasks.optimise.stages import stages_of, stopping_point
from ado_tasks.storage import read_json

WIDTH = 150  # characters, where no terminal says: all columns in full
CHAINS = ("progressive",)  # families whose students are each made from the one before
COLUMNS = {
    "variant": "variant",
    "solver": "solver",
    "nfe": "NFE",
    "fd": "FD (own)",
    "kid": "KID − teacher [95 %]",
    "verdict": "non-inferior",
    "paired": "paired ×10³",
    "accuracy": "classes",
    "latency": "ms/image",
    "speedup": "speed-up",
}


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="ado compare", description=__doc__)
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="folder (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="as Markdown, for a README")
    parser.add_argument("--stages", type=Path, metavar="PNG", help="also write quality against compression there")
    parser.add_argument("--runs", type=int, metavar="N", help="instead: the last N evaluations in MLflow, side by side")
    parser.add_argument("--out", type=Path, default=Path("reports/runs.png"), help="with --runs: the picture")
    options = parser.parse_args(arguments)
    if options.runs is not None:
        return _across_runs(options.runs, options.out, options.markdown)
    quality = read_json(options.reports / "evaluate.json", "variants", "reference", "chosen")
    cost_file = options.reports / "measure.json"
    with named_report_errors(f"{options.reports}/evaluate.json or measure.json"):
        measured = read_json(cost_file, "variants")["variants"] if cost_file.exists() else []
        cost = {row["name"]: row for row in measured}
        rows = [row_of(entry, cost.get(entry["name"])) for entry in quality["variants"]]
        closing = closing_lines(quality, cost, options.reports)
    if options.markdown:
        print(as_markdown(rows, COLUMNS))
    else:
        _print(rows)
    for line in closing:
        print(line)
    if options.stages:
        from ado_tasks.evaluation.pictures import save_stages  # noqa: PLC0415  (matplotlib)

        save_stages(options.stages, quality["variants"], quality["reference"]["anchor"]["margin"])
        print(f"picture: {options.stages}")
    return 0


def row_of(entry: dict[str, Any], cost: dict[str, Any] | None) -> dict[str, str]:
    """One variant's cells."""
    difference = entry["kid_minus_teacher"]
    low, high = difference["ci"]
    reference = entry["name"].startswith("teacher-") and difference["value"] == 0.0
    speedup = cost and cost["speedup_vs_teacher"]
    return {
        "variant": entry["name"],
        "solver": entry["solver"],
        "nfe": str(entry["nfe"]),
        "fd": f"{entry['fd']:.3g}",
        "kid": "reference" if reference else f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]",
        "verdict": "" if reference else "yes" if difference["non_inferior"] else "no",
        "paired": f"{1e3 * entry['paired_distance']:.3g}",
        "accuracy": "–" if entry["class_accuracy"] is None else f"{100 * entry['class_accuracy']:.1f} %",
        "latency": f"{cost['latency_ms_per_image']['median']:.3g}" if cost else "–",
        "speedup": f"{speedup['median']:.1f}× [{speedup['min']:.1f}, {speedup['max']:.1f}]" if speedup else "–",
    }


def as_markdown(rows: Sequence[dict[str, str]], columns: Mapping[str, str]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in columns) + " |" for row in rows)])


def _across_runs(count: int, picture: Path, markdown: bool) -> int:
    """Print the variants of several runs as one table, and save their picture."""
    from ado_tasks import comparison  # noqa: PLC0415  (MLflow: 4 s)
    from ado_tasks.endpoints import endpoints  # noqa: PLC0415

    if count < 1:
        raise ConfigError(f"--runs: {count} is not allowed: a whole number from 1")
    rows = comparison.last_runs(endpoints().mlflow_uri, count)
    cells = [row.cells() for row in rows]
    if markdown:
        print(as_markdown(cells, comparison.COLUMNS))
    else:
        _table(cells, comparison.COLUMNS, "run")
    comparison.save_comparison(picture, rows)
    if len({row.features for row in rows}) > 1:
        print(
            "\nKID and FD of rows with different features were measured by different networks: compare speed-ups only."
        )
    print(f"picture: {picture}")
    return 0


def closing_lines(quality: dict[str, Any], cost: dict[str, Any], reports: Path) -> list[str]:
    """What the table does not say: the floor, the choice, the pictures."""
    reference, floor = quality["reference"], quality["reference"]["floor_fd"]
    chosen = quality["chosen"]
    speedup = cost.get(chosen, {}).get("speedup_vs_teacher")
    gain = f", {speedup['median']:.1f}× faster than 50 steps" if speedup else ""
    margin = reference["anchor"]["margin"]
    return [
        "",
        f"FD is in own features, at n = {floor['n']}; real against real it is {floor['mean']:.3g} "
        f"[{floor['range'][0]:.3g}, {floor['range'][1]:.3g}]. Never compare it with an FID.",
        f"non-inferior: the upper end of the interval lies under the margin of {margin:.3g}, "
        "which was frozen before any student existed.",
        *_stops(quality["variants"], margin),
        f"chosen (on the selection part): {chosen}{gain}.",
        f"pictures: {', '.join(str(reports / f'{name}.png') for name in ('samples', 'quality', 'paired'))}",
    ]


def _stops(entries: Sequence[Mapping[str, Any]], margin: float) -> list[str]:
    """How far each chain of students goes, on the report part."""
    chains = {family: stages_of(entries, family) for family in CHAINS}
    return [f"{family} distillation {stopping_point(c, margin).reason}." for family, c in chains.items() if c]


def _print(rows: Sequence[dict[str, str]]) -> None:
    _table([{**row, "family": row["variant"].rpartition("-")[0]} for row in rows], COLUMNS, "family")


def _table(rows: Sequence[dict[str, str]], columns: Mapping[str, str], group: str) -> None:
    """Print rows as a table; a line between rows whose cell `group` differs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(box=None, header_style="bold", pad_edge=False)
    words = {"variant", "solver", "run", "started", "architecture", "method", "features"}
    for name, title in columns.items():
        table.add_column(title, justify="left" if name in words else "right", no_wrap=name in {"variant", "run"})
    last = None
    for row in rows:
        if last not in {None, row[group]}:
            table.add_section()
        last = row[group]
        table.add_row(*(row[name] for name in columns), style="green" if row.get("verdict") == "yes" else None)
    console.print(table)
