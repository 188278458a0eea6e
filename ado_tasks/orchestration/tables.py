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
    """What each stage of a run took, and the sum; energy only where a machine tells it."""
    rows = [
        (result["stage"], "restored" if result["cached"] else "ran", result["seconds"], result.get("joules"))
        for result in results
    ]
    energies = [joules for *_, joules in rows if joules is not None]
    rows.append(("all", "", sum(result["seconds"] for result in results), sum(energies)))
    columns = ("stage", "", "machine-seconds", "joules")[: 4 if energies else 3]
    cells = ((stage, how, f"{seconds:.1f}", _joules(joules)) for stage, how, seconds, joules in rows)
    return markdown(columns, [row[: len(columns)] for row in cells])


def pictures(results: Sequence[Mapping[str, Any]]) -> str:
    """Links to what the stages of a run drew, as a list in Markdown; several stages give their pictures one name."""
    return "\n".join(
        f"- [{result['stage']}: {_name(url)}]({url})" for result in results for url in result.get("pictures") or []
    )


def _name(picture: str) -> str:
    """A picture's file name, of its address in MLflow."""
    return picture.partition("path=")[2].partition("&")[0].rpartition("/")[2] or picture


def metrics(values: Mapping[str, Any]) -> str:
    """A stage's figures."""
    return markdown(("figure", "value"), values.items())


def _joules(value: float | None) -> str:
    return "not told" if value is None else f"{value:.0f}"


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
