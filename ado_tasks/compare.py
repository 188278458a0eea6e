"""`ado compare`: the reports as one table: every variant, its quality with intervals, its cost and speed-up.

With --stages, a picture of how far distillation may go. With --runs, the last evaluations in MLflow side by side:
architectures and sampling methods, as table and picture.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.metrics.memorisation import NO_COPYING
from ado_tasks.optimise.stages import stages_of, stopping_point
from ado_tasks.storage import read_json
from ado_tasks.verdict import named_report_errors

WIDTH = 150  # characters, where no terminal says: all columns in full
CALIBRATION_SHARE, DISTILLATION_RATIO = 0.10, 3.0  # of the teacher's training, at most, on digits: bars set beforehand
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
    "speedup": "speed-up [least, most]",
}
TWO_LINES = {  # titles where the terminal is narrow
    "FD (own)": "FD\n(own)",
    "KID − teacher [95 %]": "KID − teacher\n[95 %]",
    "non-inferior": "non-\ninferior",
    "paired ×10³": "paired\n×10³",
    "ms/image": "ms/\nimage",
    "speed-up [least, most]": "speed-up\n[least, most]",
}
# Left out one after another where even those do not fit, of both tables: first what other columns say nearly as well.
DISPENSABLE = ("solver", "latency", "started", "features", "method", "accuracy", "paired")


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
    if not (options.reports / "evaluate.json").exists():
        raise ArtifactError(f"{options.reports}/evaluate.json: not there; `dvc repro` makes it, or `make demo`")
    quality = read_json(options.reports / "evaluate.json", "variants", "reference", "chosen")
    cost_file = options.reports / "measure.json"
    with named_report_errors(f"{options.reports}/evaluate.json or measure.json"):
        measured = read_json(cost_file, "variants")["variants"] if cost_file.exists() else []
        cost = {row["name"]: row for row in measured}
        rows = [row_of(entry, cost.get(entry["name"])) for entry in quality["variants"]]
        closing = closing_lines(quality, cost, options.reports)
        families = {entry["name"].rpartition("-")[0] for entry in quality["variants"]}
    if options.stages and "progressive" not in families:
        raise ConfigError(
            f"--stages draws the family progressive, which the report has not; there: {', '.join(sorted(families))}"
        )
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
    """What the table does not say: the floor, copying, how near samples come, the choice, the pictures."""
    reference, floor = quality["reference"], quality["reference"]["floor_fd"]
    chosen = quality["chosen"]
    speedup = cost.get(chosen, {}).get("speedup_vs_teacher")
    gain = f", {speedup['median']:.1f}× faster than 50 steps" if speedup else ""
    margin = reference["anchor"]["margin"]
    teacher: dict[str, Any] = next((entry for entry in quality["variants"] if entry["name"] == "teacher-50"), {})
    return [
        "",
        f"FD is in own features, at n = {floor['n']}; real against real it is {floor['mean']:.3g} "
        f"[{floor['range'][0]:.3g}, {floor['range'][1]:.3g}]. Never compare it with an FID.",
        *_beyond_training_images(teacher),
        *_copying(teacher),
        f"non-inferior: the upper end of the interval lies under the margin of {margin:.3g}, "
        "which was frozen before any student existed.",
        *_stops(quality["variants"], margin),
        *_spent(quality.get("compute")),
        *(
            f"{family}, while it was trained (selection part): {found['reason']}."
            for family, found in quality.get("stopped", {}).items()
        ),
        *_nearness(quality["variants"], quality.get("calibration", [])),
        *_architecture(quality.get("architecture")),
        *(["speed-up: the median over the rounds of `measure`; in brackets the least and the most."] if cost else []),
        f"chosen (on the selection part): {chosen}{gain}.",
        f"pictures: {', '.join(str(reports / f'{name}.png') for name in ('samples', 'quality', 'paired'))}",
    ]


def _beyond_training_images(teacher: Mapping[str, Any]) -> list[str]:
    """How much farther the teacher's samples are than training images, and what share of the floor that is."""
    beyond = teacher.get("fd_over_train")
    if not beyond:
        return []
    low, high = beyond["range"]
    return [
        f"teacher: its FD is {beyond['value']:+.3g} [{low:+.3g}, {high:+.3g}] over that of training images, "
        f"{100 * beyond['ratio_to_floor']:.0f} % of the floor (real against real)."
    ]


def _copying(teacher: Mapping[str, Any]) -> list[str]:
    """Whether the teacher copies its training images."""
    found = teacher.get("memorisation")
    if not found:
        return []
    verdict = (
        f"no copying: the lower end is at least {NO_COPYING}"
        if found["low"] >= NO_COPYING
        else f"copying is not ruled out: the lower end is under {NO_COPYING}"
    )
    return [
        "teacher: its samples' distance to training images is "
        f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of held-out images'; {verdict}."
    ]


def _nearness(entries: Sequence[Mapping[str, Any]], calibration: Sequence[Mapping[str, Any]]) -> list[str]:
    """How near to the fine solution students come beside DDIM, and learned knots beside the usual grids."""
    ratios = [(entry["name"], entry.get("paired_ratio_to_ddim")) for entry in entries]
    said = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios if ratio is not None)
    return [
        *([f"paired distance over that of the teacher's DDIM at the same steps: {said}."] if said else []),
        *([_nearer("learned knots: nearer to the fine solution", calibration)] if calibration else []),
    ]


def _spent(compute: Mapping[str, Any] | None) -> list[str]:
    """What calibration and distillation cost beside the teacher's training, in network evaluations."""
    if not compute or not compute["training"]:
        return []
    training = compute["training"]
    known = {family: count for family, count in compute["distillation"].items() if count is not None}
    lines = _spent_on_schedules("calibration", compute["calibration"], training)
    lines += _spent_on_schedules(
        "calibration of the searched network, each of its evaluations counted as one of the teacher's",
        compute.get("architecture_calibration"), training,
    )  # fmt: skip
    if known:
        said = ", ".join(f"{family} {count / training:.2f}×" for family, count in known.items())
        lines.append(
            f"distillation: {said} the teacher's training, all stages together (bar on digits: "
            f"{DISTILLATION_RATIO:g}×); it is {training:,} network evaluations, a backward pass as two forward passes."
        )
    return lines


def _spent_on_schedules(what: str, cost: Mapping[str, int] | None, training: int) -> list[str]:
    spent = dict(cost or {})
    reference = spent.pop("reference", 0)
    if not spent:
        return []
    most = max(spent, key=lambda name: spent[name])
    return [
        f"{what}: at most {100 * spent[most] / training:.1f} % of the teacher's training for a schedule "
        f"({most}), and {100 * reference / training:.1f} % once for the fine trajectories "
        f"(bar on digits: {100 * CALIBRATION_SHARE:.0f} %)."
    ]


def _architecture(said: Mapping[str, Any] | None) -> list[str]:
    """What the table cannot say of the network that a search chose."""
    if not said:
        return []
    if said["is_teacher"]:
        return [
            "architecture: the search left the teacher as it is (models/architecture/search.json says why); it is "
            "shown once, as the teacher, and students named searched are students of the teacher."
        ]
    rows = said.get("calibration", [])
    return [_nearer("learned knots of the searched network: nearer to its own fine solution", rows)] if rows else []


def _nearer(what: str, rows: Sequence[Mapping[str, Any]]) -> str:
    nearer = sum(row["better"] for row in rows)
    return (
        f"{what} than every usual grid in {nearer} of {len(rows)} cases (solver and steps; each p < 0.05 after Holm)."
    )


def _stops(entries: Sequence[Mapping[str, Any]], margin: float) -> list[str]:
    """How far each chain of students goes, on the report part."""
    chains = {family: stages_of(entries, family) for family in CHAINS}
    return [f"{family} distillation {stopping_point(c, margin).reason}." for family, c in chains.items() if c]


def _print(rows: Sequence[dict[str, str]]) -> None:
    _table([{**row, "family": row["variant"].rpartition("-")[0]} for row in rows], COLUMNS, "family")


def _table(rows: Sequence[dict[str, str]], columns: Mapping[str, str], group: str) -> None:
    """Print rows as a table; a line between rows whose cell `group` differs.

    Where the terminal is narrow its titles take two lines, then columns are left out, and said to be. No cell is cut.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table, left_out, needed = fitted(rows, columns, group, console.width)
    Console(width=max(console.width, needed)).print(table)  # wider than the terminal, which wraps, rather than cut
    if left_out:
        print(f"\nleft out, for the terminal is narrow: {', '.join(left_out)} (--markdown shows all)")


def fitted(
    rows: Sequence[dict[str, str]], columns: Mapping[str, str], group: str, width: int
) -> tuple[Table, list[str], int]:
    """The table in its fullest form that is at most `width` wide, the titles left out, and how wide it is."""
    folded = {name: TWO_LINES.get(title, title) for name, title in columns.items()}
    forms = [(columns, False), (folded, False), (folded, True)]
    for name in DISPENSABLE:
        if name in columns:
            forms.append(({key: title for key, title in forms[-1][0].items() if key != name}, True))
    for titles, tight in forms:
        table, left_out = _made(rows, titles, group, tight), [columns[n] for n in columns if n not in titles]
        ruler = Console(width=10_000)
        needed = Measurement.get(ruler, ruler.options, table).maximum
        if needed <= width:
            break
    return table, left_out, needed


def _made(rows: Sequence[dict[str, str]], titles: Mapping[str, str], group: str, tight: bool) -> Table:
    """The table with these columns; with one space between them, not two, where it is `tight`."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=tight)
    # Text, not str: rich takes words in brackets for its markup.
    words = {"variant", "solver", "run", "started", "architecture", "method", "features"}
    for name, title in titles.items():
        table.add_column(Text(title), justify="left" if name in words else "right", no_wrap=True)
    last = None
    for row in rows:
        if last not in {None, row[group]}:
            table.add_section()
        last = row[group]
        table.add_row(*(Text(row[name]) for name in titles), style="green" if row.get("verdict") == "yes" else None)
    return table
