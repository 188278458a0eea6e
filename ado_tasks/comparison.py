"""Runs held against each other: every variant of the last evaluations in MLflow, by architecture and sampling method.

An evaluation's run names what it judged by DVC's hashes: the run that trained that teacher says its architecture, the
one that measured the same models their cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ado_tasks.errors import ArtifactError
from ado_tasks.evaluation.pictures import COLOURS, LABELS
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.registry.client import EXPERIMENT, connect, named_registry_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

REFERENCE = "teacher-50"
MARKERS = "osD^vP*X<>"
COLUMNS = {
    "run": "run", "started": "started", "architecture": "architecture", "variant": "variant", "method": "sampling",
    "kid": "KID − teacher", "fd": "FD (own)", "accuracy": "classes", "latency": "ms/image", "speedup": "speed-up",
    "features": "features",
}  # fmt: skip
_TEACHER, _JUDGED = "dvc.deps.models/teacher", ("dvc.deps.models/", "dvc.deps.schedules/")  # what is judged, by hash


@dataclass(frozen=True)
class Row:
    """One variant of one evaluation."""

    run: str  # MLflow's id
    started_ms: int
    architecture: str
    variant: str
    kid: float | None  # minus its own teacher's at 50 steps
    fd: float | None
    accuracy: float | None
    latency_ms: float | None
    speedup: float | None
    features: str  # hash of the feature network: figures of different ones cannot be compared

    @property
    def family(self) -> str:
        """Its name without the number."""
        return self.variant.rpartition("-")[0]

    def cells(self) -> dict[str, str]:
        """As the table shows it."""
        from datetime import UTC, datetime  # noqa: PLC0415

        return {
            "run": self.run[:8],
            "started": datetime.fromtimestamp(self.started_ms / 1e3, UTC).strftime("%Y-%m-%d %H:%M"),
            "architecture": self.architecture,
            "variant": self.variant,
            "method": LABELS.get(self.family, self.family),
            "kid": "–" if self.kid is None else f"{self.kid:+.3f}",
            "fd": "–" if self.fd is None else f"{self.fd:.3g}",
            "accuracy": "–" if self.accuracy is None else f"{100 * self.accuracy:.1f} %",
            "latency": "–" if self.latency_ms is None else f"{self.latency_ms:.3g}",
            "speedup": "–" if self.speedup is None else f"{self.speedup:.1f}×",
            "features": self.features[:8],
        }


def last_runs(uri: str, count: int) -> list[Row]:
    """Every variant of the last `count` evaluations, newest first.

    Raises:
        ArtifactError: MLflow knows no evaluation.
        RegistryError: MLflow cannot be reached.
    """
    with named_registry_errors(uri):
        client = connect(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        runs: list[Run] = []
        if experiment is not None:
            finished = "attributes.status = 'FINISHED'"
            runs = list(client.search_runs([experiment.experiment_id], finished, max_results=1000))
    evaluations = [run for run in runs if run.data.tags.get("task") == "evaluate"][:count]
    if not evaluations:
        raise ArtifactError(f"MLflow at {uri}: no finished evaluation is recorded; run `make demo`, then `ado sync`")
    return [row for run in evaluations for row in rows_of(run, runs)]


def rows_of(evaluation: "Run", runs: Sequence["Run"]) -> list[Row]:
    """The variants of one evaluation, with what other runs know of them."""
    tags, figures = evaluation.data.tags, evaluation.data.metrics
    trained = _find(runs, "train", {"dvc.outs.models/teacher": tags.get(_TEACHER)})
    judged = {name: value for name, value in tags.items() if name.startswith(_JUDGED)}
    measured = _find(runs, "measure", {_TEACHER: tags.get(_TEACHER), **judged})
    cost: Mapping[str, float] = {} if measured is None else measured.data.metrics
    hashes = [value for name, value in tags.items() if name.startswith("dvc.deps.features/")]
    reference = figures.get(f"{REFERENCE}.kid")
    rows = []
    for variant in sorted({name.rpartition(".")[0] for name in figures if "." in name}, key=_order):
        kid = figures.get(f"{variant}.kid")
        rows.append(
            Row(
                run=evaluation.info.run_id,
                started_ms=evaluation.info.start_time,
                architecture=_architecture(variant, trained),
                variant=variant,
                kid=None if kid is None or reference is None else kid - reference,
                fd=figures.get(f"{variant}.fd"),
                accuracy=figures.get(f"{variant}.class_accuracy"),
                latency_ms=cost.get(f"{variant}.latency_ms_per_image"),
                speedup=cost.get(f"{variant}.speedup"),
                features=hashes[0] if hashes else "unknown",
            )
        )
    return rows


def _architecture(variant: str, trained: "Run | None") -> str:
    """Of the teacher, whose network its students have; a network that a search chose is in its own record only."""
    if variant.startswith(("searched-", "architecture")):
        return "searched"
    return "unknown" if trained is None else architecture(trained.data.params)


def architecture(params: Mapping[str, Any]) -> str:
    """A U-Net's params in a few words: channels, layers a block, levels with attention."""
    channels = str(params.get("model.block_out_channels", "?")).strip("[]()").replace(", ", "-")
    attention = str(params.get("model.down_block_types", "")).count("Attn")
    return f"{channels} ×{params.get('model.layers_per_block', '?')}" + (f" attn {attention}" if attention else "")


def save_comparison(path: Path, rows: Sequence[Row]) -> None:
    """KID − teacher by speed-up: a colour a sampling method, a marker a run."""
    figure = Figure(figsize=(7.4, 4.2))
    axes = plain_axes(figure)
    runs = list(dict.fromkeys(row.run for row in rows))
    seen: set[str] = set()
    for row in rows:
        if row.kid is None or row.speedup is None:
            continue
        marker, label = MARKERS[runs.index(row.run) % len(MARKERS)], f"{row.architecture}, {row.family}"
        axes.plot(
            row.speedup, row.kid, marker=marker, markersize=6, linestyle="", color=COLOURS.get(row.family, "#555555"),
            label=None if label in seen else label,
        )  # fmt: skip
        seen.add(label)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.02)
    axes.margins(0.08)
    axes.set_xlabel("speed-up over the own teacher at 50 steps")
    axes.set_ylabel("KID − KID(own teacher, 50 steps)")
    axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def _find(runs: Sequence["Run"], task: str, tags: Mapping[str, str | None]) -> "Run | None":
    """The newest run of a task that has these tags; None where one of them is unknown."""
    if any(value is None for value in tags.values()):
        return None
    candidates = (run for run in runs if run.data.tags.get("task") == task)
    return next((run for run in candidates if all(run.data.tags.get(n) == v for n, v in tags.items())), None)


def _order(variant: str) -> tuple[int, str, int]:
    family, _, steps = variant.rpartition("-")
    known = list(COLOURS)
    return (known.index(family) if family in known else len(known), family, -int(steps) if steps.isdigit() else 0)
