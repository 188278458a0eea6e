"""A config is checked when it is made: the error names the key, the value and what is allowed."""

from dataclasses import FrozenInstanceError
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, model_validator

from ado_tasks.config import config, parse, read_params, section
from ado_tasks.errors import ConfigError


@config
class Inner:
    depth: Annotated[int, Field(ge=1)] = 3


@config
class Settings:
    steps: Annotated[int, Field(ge=1, le=10)]
    rate: float = 1e-3
    kind: Literal["a", "b"] = "a"
    stages: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()


@config
class Span:
    first: int
    last: int

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.first >= self.last:
            raise ValueError(f"first: {self.first} does not lie before last: {self.last}")
        return self


def test_values_arrive_with_their_types() -> None:
    made = parse(Settings, {"steps": 3, "stages": [8, 4], "rate": 1, "inner": {"depth": 2}}, "train")
    assert made == Settings(steps=3, rate=1.0, stages=(8, 4), inner=Inner(depth=2))


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings(steps=3).steps = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 3, "stpes": 4}, ["train.stpes", "unknown key", "steps, rate, kind"]),
        ({"steps": 0}, ["train.steps", "0", "greater than or equal to 1"]),
        ({"steps": 11}, ["train.steps", "11", "less than or equal to 10"]),
        ({"steps": "3"}, ["train.steps", "'3'", "integer"]),
        ({"steps": True}, ["train.steps", "True", "integer"]),
        ({"steps": 2.5}, ["train.steps", "2.5", "integer"]),
        ({"steps": 1, "kind": "c"}, ["train.kind", "'c'", "'a' or 'b'"]),
        ({"steps": 1, "inner": {"depth": 0}}, ["train.inner.depth", "0"]),
        ({"steps": 1, "inner": {"breadth": 1}}, ["train.inner.breadth", "unknown key; allowed here: depth"]),
        ({}, ["train.steps", "required"]),
        ([1], ["train", "mapping"]),
    ],
)
def test_what_is_wrong_is_named(values: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as problem:
        parse(Settings, values, "train")  # pyright: ignore[reportArgumentType]
    for word in words:
        assert word in str(problem.value)


def test_keys_that_do_not_fit_together_are_said_without_the_whole_section() -> None:
    with pytest.raises(ConfigError) as problem:
        parse(Span, {"first": 3, "last": 2}, "train")
    assert str(problem.value) == "train: first: 3 does not lie before last: 2"


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as problem:
        parse(Settings, {"steps": 0, "kind": "c"}, "train")
    assert "train.steps" in str(problem.value)
    assert "train.kind" in str(problem.value)


def test_sections_are_found_by_dotted_name(tmp_path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("seed: 1\ndistill:\n  progressive: {steps: 3}\n")
    params = read_params(path)
    assert section(params, "distill.progressive") == {"steps": 3}
    with pytest.raises(ConfigError, match=r"no section 'consistency' at distill; there: progressive"):
        section(params, "distill.consistency")


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2\n",
        "a: {b: 1, c: 2, b: 1}\n",
        "a:\n- b: 1\n  b: 2\n",
        "x: &x {b: 1}\na: {<<: *x, c: 1, c: 2}\n",
    ],
)
def test_a_key_that_is_given_twice_is_named_with_its_line(tmp_path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"params\.yaml: not valid YAML: the key '(seed|b|c)' is given twice\n.*line \d"
    ):
        read_params(path)


def test_what_is_merged_in_may_be_overridden(tmp_path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("y: &y {b: 0}\nx: {deep: &x {<<: *y, b: 1, c: 1}}\na: {<<: *x, c: 2}\n")
    assert read_params(path) == {"y": {"b": 0}, "x": {"deep": {"b": 1, "c": 1}}, "a": {"b": 1, "c": 2}}


@config
class Open:
    model: dict[str, Any]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("2020-01-01", r"train\.model\.x: datetime\.date.* is not allowed"),
        (".nan", r"train\.model\.x: nan is not allowed: .*finite"),
        ("[1, {y: -.inf}]", r"train\.model\.x\.1\.y: -inf is not allowed"),
        ("!!binary aGk=", r"train\.model\.x: b'hi' is not allowed"),
        ("&x {y: *x}", "more than 100000 values, or a mapping that holds itself"),
    ],
)
def test_values_that_no_config_has_are_named_in_sections_of_any_keys(tmp_path, value: str, says: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"train: {{model: {{x: {value}}}}}\n")
    with pytest.raises(ConfigError, match=says):
        parse(Open, read_params(path)["train"], "train")


def test_a_few_lines_of_aliases_are_not_unrolled(tmp_path) -> None:
    """Ten to the ninth values in nine lines: refused at once."""
    rows = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 9))
    path = tmp_path / "params.yaml"
    path.write_text(f"l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n{rows}train: {{model: {{x: *l8}}}}\n")
    with pytest.raises(ConfigError, match="more than 100000 values"):
        parse(Open, read_params(path)["train"], "train")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "3"])
def test_a_params_file_that_is_not_one(tmp_path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        read_params(path)


def test_a_params_file_that_is_absent(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_params(tmp_path / "none.yaml")
