"""Figures as text tables, for task logs and for the page on which a person approves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown whose columns are also aligned as plain text."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def stages(results: Sequence[Mapping[str, Any]]) -> str:
    """What each stage of a run took, and the sum."""
    rows = [
        (
            result["stage"],
            "restored" if result["cached"] else "ran",
            f"{result['seconds']:.1f}",
            _joules(result.get("joules")),
        )
        for result in results
    ]
    energies = [result["joules"] for result in results if result.get("joules") is not None]
    total = ("all", "", f"{sum(r['seconds'] for r in results):.1f}", _joules(sum(energies) if energies else None))
    return markdown(("stage", "", "machine-seconds", "joules"), [*rows, total])


def metrics(values: Mapping[str, Any]) -> str:
    """A stage's figures."""
    return markdown(("figure", "value"), values.items())


def _joules(value: float | None) -> str:
    return "not told" if value is None else f"{value:.0f}"


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
