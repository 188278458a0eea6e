"""`ado compare`: the reports as one table: every variant, its quality with intervals, its cost and speed-up."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ado_tasks.storage import read_json

WIDTH = 150  # characters, where no terminal says: all columns in full
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
    options = parser.parse_args(arguments)
    quality = read_json(options.reports / "evaluate.json")
    cost_file = options.reports / "measure.json"
    cost = {row["name"]: row for row in read_json(cost_file)["variants"]} if cost_file.exists() else {}
    rows = [row_of(entry, cost.get(entry["name"])) for entry in quality["variants"]]
    if options.markdown:
        print(as_markdown(rows))
    else:
        _print(rows)
    for line in closing_lines(quality, cost, options.reports):
        print(line)
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


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in COLUMNS) + " |" for row in rows)])


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
        f"chosen (on the selection part): {chosen}{gain}.",
        f"pictures: {', '.join(str(reports / f'{name}.png') for name in ('samples', 'quality', 'paired'))}",
    ]


def _print(rows: Sequence[dict[str, str]]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, title in COLUMNS.items():
        table.add_column(title, justify="left" if name in {"variant", "solver"} else "right", no_wrap=name == "variant")
    family = None
    for row in rows:
        if family not in {None, row["variant"].rpartition("-")[0]}:
            table.add_section()
        family = row["variant"].rpartition("-")[0]
        style = "green" if row["verdict"] == "yes" else None
        table.add_row(*(row[name] for name in COLUMNS), style=style)
    console.print(table)
