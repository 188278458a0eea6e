"""Help of a task's keys says what pydantic checks and what the source's comments say."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from ado_tasks import usage
from ado_tasks.config import config
from ado_tasks.distill import distill
from ado_tasks.optimise.distill_config import DistillConfig

Count = Annotated[int, Field(ge=1)]


@config
class Inner:
    """Inside."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of all


@config
class Outer:
    """All kinds of fields."""

    method: ClassVar[str] = "none"  # no key
    model: dict[str, Any]  # fields # of a network
    steps: Count = 4000  # optimiser steps
    source: Literal["digits", "shapes"] = "digits"
    label: Annotated[str, Field(pattern="^a")] = "a"
    rates: Count | tuple[Count, ...] = (8, 4)
    kinds: Annotated[tuple[Literal["x", "y"], ...], Field(min_length=1)] = ("x",)
    side: tuple[int, int] | None = None
    wide: Annotated[float, Field(ge=0)] = 3e-3  # beside the value
    # Above it,
    # in two lines.
    above: bool = True
    inner: Inner | None = None  # nested
    always: Inner = Inner()


def keys(width: int = 200) -> dict[str, str]:
    lines = usage.describe_keys(Outer, width)
    return {line.strip().partition(":")[0]: line for line in lines}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model", "mapping, required"),
        ("steps", "int ≥ 1, default 4000"),
        ("source", "digits | shapes, default digits"),
        ("label", "str like ^a, default a"),
        ("rates", "int ≥ 1 or list of int ≥ 1, default [8, 4]"),
        ("kinds", "list of (x | y), at least 1 long, default [x]"),
        ("side", "list of 2 int, default null"),
        ("wide", "float ≥ 0, default 0.003"),
        ("above", "bool, default true"),
        ("inner", "mapping, default null"),
        ("share", "float > 0 and < 1, default 0.5"),
        ("always", "mapping, default as below"),
    ],
)
def test_a_key_says_its_type_bounds_and_default(key: str, said: str) -> None:
    line = keys()[key]
    assert line.lstrip().startswith(f"{key}: {said}")
    assert line.lstrip().removeprefix(f"{key}: {said}")[:1] in {"", " "}


def test_comments_come_from_the_source() -> None:
    assert usage.comments(Outer) == {
        "method": "no key", "model": "fields # of a network", "steps": "optimiser steps", "wide": "beside the value",
        "above": "Above it, in two lines.", "inner": "nested",
    }  # fmt: skip


def test_keys_and_texts_stand_side_by_side_and_nested_ones_are_indented() -> None:
    lines = usage.describe_keys(Outer, 100)
    assert "  steps: int ≥ 1, default 4000        optimiser steps" in lines
    inner = lines.index("  inner: mapping, default null".ljust(usage.COLUMN) + "nested")
    assert lines[inner + 1] == "      share: float > 0 and < 1, default 0.5"  # too long for its text to stand beside it
    assert lines[inner + 2] == " " * (usage.COLUMN + 4) + "of all"
    assert not any("method" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_are_as_wide_as_the_terminal_and_lose_nothing(width: int) -> None:
    lines = usage.describe_keys(DistillConfig, width)
    assert max(map(len, lines)) <= max(
        width, usage.COLUMN + 10 + usage.LEAST
    )  # keys of a config in a config in a config
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(usage.describe_keys(DistillConfig, 1000)).split())


def test_a_docstrings_arguments_are_taken_out_of_it() -> None:
    said = usage.arguments(distill)
    assert said["dataset"] == "folder made by `prepare`; the train part is used."
    assert said["start"].endswith("such as what a search chose: the teacher teaches that.")
    text = usage.description(distill)
    assert text.startswith("Make students")
    assert "Raises:" in text
    assert "Args:" not in text
    assert "see DistillConfig" not in text


def test_arguments_that_go_on_are_one_line_and_no_section_is_none() -> None:
    def task(out: Path) -> None:
        """Do.

        Args:
            out: a folder
                of results: whole.
            seed: of noise.
        """

    def bare(out: Path) -> None:
        pass

    assert usage.arguments(task) == {"out": "a folder of results: whole.", "seed": "of noise."}
    assert usage.description(task) == "Do."
    assert (usage.arguments(bare), usage.description(bare)) == ({}, "")
