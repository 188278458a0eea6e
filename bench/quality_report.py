"""What `bench/quality.py` found, as a picture, a table and words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

from ado_tasks.pictures import plain_axes, save_figure

HIGHEST = 5.0  # what is farther than this many times the farthest of ours is left out of the picture: it diverges
OURS = "ours"  # the side of a row; the other is Diffusers'


def save_picture(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Two panels: feature distance to the fine solution by evaluations, and by milliseconds an image; log axes.

    Samplers that diverge (Diffusers' Heun on a v network does) are not in it; the table has them.
    """
    figure = Figure(figsize=(12.5, 5.2))
    families = list(dict.fromkeys(row["family"] for row in rows))
    sides = {row["family"]: row["side"] for row in rows}
    farthest = max((row["paired_features"] or 0 for row in rows if row["side"] == OURS), default=0) or np.inf
    for column, (cost, label) in enumerate(
        (("nfe", "network evaluations an image"), ("ms", "milliseconds an image, this machine"))
    ):
        axes = plain_axes(figure, (1, 2, column + 1))
        for number, family in enumerate(families):
            points = sorted((row for row in rows if row["family"] == family), key=lambda row: row["nfe"])
            points = [row for row in points if 0 < (row["paired_features"] or 0) <= HIGHEST * farthest and row[cost]]
            if not points:
                continue
            ours = sides[family] == OURS
            axes.plot(
                [row[cost] for row in points], [row["paired_features"] for row in points],
                color=colormaps["tab20"](number % 20),
                marker="o" if ours else "x", linestyle="-" if ours else "--", linewidth=1.3, markersize=4,
                label=family if ours else f"Diffusers {family}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("squared distance to the fine solution\n(same noise, own features)")
        if cost == "nfe":
            ticks = [tick for tick in (1, 2, 3, 4, 5, 6, 8, 10, 16, 25, 50) if tick <= max(row["nfe"] for row in rows)]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(path, figure)


def show(report: Mapping[str, Any]) -> None:
    """The table, the sanity row and the verdicts."""
    table = Table(title=f"n = {report['n']}, {report['n_paired']} paired with {report['fine']['steps']} steps")
    for column in ("method", "NFE", "FD (own)", "KID", "pixels ×10³", "features ×10³", "ms/image [min, max]"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(report["rows"], key=lambda row: (row["nfe"], row["paired_features"] or np.inf)):
        where = row["family"] if row["side"] == OURS else f"Diffusers {row['family']}"
        if row["fd"] is None:
            table.add_row(where, str(row["nfe"]), "not finite", "", "", "", "")
            continue
        time = row["ms_spread"]
        table.add_row(
            where, str(row["nfe"]), f"{row['fd']:.3g}", f"{row['kid']:+.4f}", f"{1e3 * row['paired_pixels']:.3g}",
            f"{1e3 * row['paired_features']:.3g}", f"{time['median']:.3g} [{time['min']:.3g}, {time['max']:.3g}]",
        )  # fmt: skip
    Console(width=130).print(table)
    for one in report["sanity"]:
        word = "the same picture" if one["same"] else "NOT the same picture"
        print(f"DDIM, {one['nfe']} steps, here and in Diffusers: {word} (largest difference {one['difference']:.1e})")
    for one in report["failed"]:
        print(f"Diffusers {one['name']}, {one['asked']} NFE: fails there ({one['why']})")
    for one in report["verdicts"]:
        print(verdict_line(one))


def verdict_line(one: Mapping[str, Any]) -> str:
    """A verdict in words."""
    if one["met"] is None:
        return f"{one['nfe']} NFE: no verdict: {one['why']}"
    return (
        f"{one['nfe']} NFE: {one['ours']} stands at {one['ratio']:.2f} × the best of Diffusers, {one['best']}; bar "
        f"{one['bar']} ×: {'met' if one['met'] else 'MISSED'} (p of no gain {one.get('p', float('nan')):.1e})"
    )
