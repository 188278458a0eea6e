"""Changes of `params.yaml` that a run is triggered with: dotted names and plain values, comments and order kept."""

from collections.abc import Mapping, MutableMapping
from io import StringIO
from typing import Any

from ado_tasks.errors import ConfigError


def apply(text: str, overrides: Mapping[str, Any], where: str = "params.yaml") -> str:
    """The text of a params file with some values replaced.

    Args:
        text: of the file.
        overrides: `{"train.steps": 100}`; a value may be anything that JSON holds.
        where: its name, for messages.

    Raises:
        ConfigError: a name whose section is not in the file; it lists what there is. (A wrong key or value inside a
            section is for the task that reads it to name.)
    """
    from ruamel.yaml import YAML  # noqa: PLC0415  (it comes with DVC)

    if not overrides:
        return text
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # no line is folded that was not
    params = yaml.load(text)
    yaml.representer.add_representer(float, _represent_float)
    yaml.representer.add_representer(type(None), _represent_none)
    for name, value in overrides.items():
        _set(params, name, _quoted(value), where)
    stream = StringIO()
    yaml.dump(params, stream)
    return stream.getvalue()


def _represent_float(representer: Any, value: float) -> Any:
    """As every YAML reader reads it back: 1e-05 without a point is text to those of YAML 1.1."""
    mantissa, exponent, power = repr(value).partition("e")
    text = f"{mantissa}{'' if '.' in mantissa else '.0'}{exponent}{power}"
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_none(representer: Any, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _quoted(value: Any) -> Any:
    """Texts in quotes: `on`, `null` and `1:30` are no texts to readers of YAML 1.1. Lists and mappings on one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq  # noqa: PLC0415
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString  # noqa: PLC0415

    if isinstance(value, str):
        return DoubleQuotedScalarString(value)
    if isinstance(value, Mapping):
        made: Any = CommentedMap({_quoted(key): _quoted(inner) for key, inner in value.items()})
    elif isinstance(value, list):
        made = CommentedSeq(_quoted(inner) for inner in value)
    else:
        return value
    made.fa.set_flow_style()
    return made


def _set(params: Any, name: str, value: Any, where: str) -> None:
    *sections, key = name.split(".")
    found = params
    for depth, part in enumerate(sections):
        if not isinstance(found, Mapping) or part not in found:
            at = ".".join(sections[:depth]) or "the top"
            there = ", ".join(map(str, found)) if isinstance(found, Mapping) else "a single value"
            raise ConfigError(f"override {name!r}: {where} has no section {part!r} at {at}; there: {there}")
        found = found[part]
    if not isinstance(found, MutableMapping) or (not sections and key not in found):
        raise ConfigError(f"override {name!r}: not a key of {where}; at the top there: {', '.join(map(str, params))}")
    found[key] = value
