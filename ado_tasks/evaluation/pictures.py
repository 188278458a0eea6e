"""Pictures of an evaluation: quality against cost, and distance to the teacher's fine solution against cost."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ado_tasks.optimise.stages import stages_of, stopping_point
from ado_tasks.pictures import plain_axes, save_figure

COLOURS = {
    "teacher": "#8a8f98", "calibrated": "#3274b5", "progressive": "#c8452f", "consistency": "#7a4fb0",
    "architecture": "#3b3f46", "architecture_calibrated": "#1d9a94", "searched": "#e0922f",
}  # fmt: skip
OTHERS = ("#b5478a", "#7d6a2c", "#5c7f2f", "#56617f")  # of families that are not named above, in turn
LABELS = {
    "teacher": "teacher, plain DDIM", "calibrated": "teacher, learned steps", "progressive": "distilled",
    "consistency": "tuned to consistency", "architecture": "searched network, plain DDIM",
    "architecture_calibrated": "searched network, learned steps", "searched": "searched network, distilled",
}  # fmt: skip
MARKERS = {"architecture": "s", "architecture_calibrated": "s", "searched": "s"}  # of the network that a search chose

SOLVER_COLOURS = {"ddim": "#8a8f98", "ipndm": "#3274b5", "dpmpp_2m": "#c8452f", "angle_ab2": "#3a9d5d"}


def save_quality(path: Path, entries: Sequence[Mapping[str, Any]], margin: float) -> None:
    """KID − KID(teacher at 50 steps) with its interval, by evaluations an image; the margin as a band."""
    figure = Figure(figsize=(6.6, 4.0))
    axes = plain_axes(figure)
    families = _families(entries)
    colours = colours_of(families)
    for family, rows in families.items():
        named = family in COLOURS  # the others are seen through where they cover one of these
        values = [row["kid_minus_teacher"] for row in rows]
        middle = [value["value"] for value in values]
        errors = [
            [value["value"] - value["ci"][0] for value in values],
            [value["ci"][1] - value["value"] for value in values],
        ]
        axes.errorbar(
            [row["nfe"] for row in rows], middle, yerr=errors, marker=MARKERS.get(family, "o"), markersize=5, capsize=3,
            linewidth=1.2, color=colours[family], label=LABELS.get(family, family),
            linestyle="-" if named else "--", markerfacecolor=colours[family] if named else "none",
        )  # fmt: skip
    axes.axhspan(-margin, margin, color="#3a9d5d", alpha=0.15, linewidth=0, label="margin of non-inferiority")
    axes.set_yscale("symlog", linthresh=max(margin, 1e-6) * 2)
    axes.set_ylabel("KID − KID(teacher, 50 steps)\n(own features, report part; linear near 0)")
    _cost_axis(axes)
    save_figure(path, figure)


def save_paired(path: Path, entries: Sequence[Mapping[str, Any]], calibration: Sequence[Mapping[str, Any]]) -> None:
    """Mean squared pixel distance to the teacher's fine solution at the same noise, by evaluations an image."""
    figure = Figure(figsize=(11.0, 4.0))
    left = plain_axes(figure, (1, 2, 1))
    families = _families(entries)
    colours = colours_of(families)
    for family, rows in families.items():
        left.plot(
            [row["nfe"] for row in rows], [row["paired_distance"] for row in rows], marker=MARKERS.get(family, "o"),
            markersize=5, linewidth=1.2, color=colours[family], label=LABELS.get(family, family),
        )  # fmt: skip
    left.set_title("every variant", fontsize=9)
    axes = plain_axes(figure, (1, 2, 2))
    axes.sharex(left)
    axes.sharey(left)
    for solver, colour in SOLVER_COLOURS.items():
        rows = sorted((row for row in calibration if row["solver"] == solver), key=lambda row: row["nfe"])
        if not rows:
            continue
        nfe = [row["nfe"] for row in rows]
        best = [row["baselines"][row["best_baseline"]]["value"] for row in rows]
        axes.plot(nfe, best, linestyle="--", marker="s", markersize=4, color=colour, label=f"{solver}, best usual grid")
        axes.plot(nfe, [row["learned"] for row in rows], marker="o", color=colour, label=f"{solver}, learned steps")
    axes.set_title("the teacher's learned steps, beside the usual ones", fontsize=9)
    for each in (left, axes):
        each.set_yscale("log")
        each.set_ylabel("squared distance to the fine solution\n(same noise, a pixel)")
        _cost_axis(each)
    save_figure(path, figure)


def save_stages(path: Path, entries: Sequence[Mapping[str, Any]], margin: float, family: str = "progressive") -> None:
    """Quality lost by how many times fewer evaluations: a chain of students beside the teacher, and where it stops."""
    whole = max(entry["nfe"] for entry in entries)
    stages = stages_of(entries, family)
    stop = stopping_point(stages, margin)
    figure = Figure(figsize=(6.6, 4.0))
    axes = plain_axes(figure)
    for name, chain in {"teacher": stages_of(entries, "teacher"), family: stages}.items():
        middle = [stage.difference.value for stage in chain]
        errors = [
            [stage.difference.value - stage.difference.low for stage in chain],
            [stage.difference.high - stage.difference.value for stage in chain],
        ]
        axes.errorbar(
            [whole / stage.steps for stage in chain], middle, yerr=errors, marker="o", markersize=5, capsize=3,
            linewidth=1.2, color=COLOURS.get(name), label=LABELS.get(name, name),
        )  # fmt: skip
    axes.axhspan(-margin, margin, color="#3a9d5d", alpha=0.15, linewidth=0, label="margin of non-inferiority")
    if stop.steps is not None:
        axes.axvline(whole / stop.steps, color=COLOURS.get(family), linestyle=":", linewidth=1)
    axes.set_title("\n".join(wrap(f"{family} {stop.reason}", 90)), fontsize=8)
    axes.set_yscale("symlog", linthresh=max(margin, 1e-6) * 2)
    axes.set_ylabel("KID − KID(teacher, 50 steps)\n(own features, report part; linear near 0)")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(int(whole).bit_length())]
    axes.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes.set_xlabel(f"compression: times fewer evaluations than the teacher's {whole}")
    axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def colours_of(families: Iterable[str]) -> dict[str, str]:
    """A colour for each family. One without a name above has none that stands for another (up to four of them)."""
    others = cycle(OTHERS)
    return {family: COLOURS.get(family) or next(others) for family in families}


def _families(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: entry["nfe"]):
        found.setdefault(entry["name"].rpartition("-")[0], []).append(entry)
    return found


def _cost_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_xlabel("network evaluations an image")
    axes.legend(frameon=False, fontsize=8)
