"""Configurations: frozen dataclasses that are checked when they are made, read from one section of `params.yaml`.

A field is declared with its type, its bounds and its default on one line; pydantic checks it. Whatever is wrong becomes
a `ConfigError` that names the key, the value and what is allowed.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass

from ado_tasks.errors import ConfigError

C = TypeVar("C")

MAX_VALUES = 100_000  # in a params file, aliases followed: a thousand times the largest preset


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def config(cls: type[C]) -> type[C]:
    """Make a class a frozen dataclass whose unknown keys, wrong types and out-of-range values are errors."""
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return _pydantic_dataclass(frozen=True, config=rules)(cls)  # pyright: ignore[reportReturnType]


def parse(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build a config of type `cls` from plain values.

    Args:
        cls: a class made with `@config`, or a union of such: the key `method` says which (see `methods`).
        values: as read from YAML: numbers, strings, booleans, lists and mappings.
        where: the name of the section, for messages.

    Raises:
        ConfigError: names every offending key, its value and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, got {values!r}")
    if isinstance(cls, UnionType):
        kinds = methods(cls)
        method = values.get("method", next(iter(kinds)))
        if not isinstance(method, str) or method not in kinds:
            raise ConfigError(f"{where}.method: {method!r} is not allowed; allowed: {', '.join(kinds)}")
        return parse(kinds[method], {name: value for name, value in values.items() if name != "method"}, where)
    try:
        # YAML has lists where a config has tuples: lax on containers, strict on scalars through validate_json's rules.
        return TypeAdapter(cls).validate_json(_to_json(dict(values), where))
    except ValidationError as problem:
        raise ConfigError("\n".join(_explain(error, cls, where) for error in problem.errors())) from None


def methods(cls: Any) -> dict[str, type]:
    """The classes of a union by the name that each has as `method`; the first is meant where a section names none."""
    return {each.method: each for each in get_args(cls)} if isinstance(cls, UnionType) else {"": cls}


def _to_json(values: Mapping[str, Any], where: str) -> str:
    for key, value in _leaves(values, where):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: {value!r} is not allowed: Input should be a finite number")
        if value is not None and not isinstance(value, str | int | float):
            raise ConfigError(f"{key}: {value!r} is not allowed: a number, text, true, false, null, list or mapping")
    try:
        return json.dumps(values)
    except (TypeError, ValueError, RecursionError) as problem:  # of keys that JSON lacks
        raise ConfigError(f"{where}: {problem}") from None


def _leaves(values: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value that holds no others, with its dotted key.

    Raises:
        ConfigError: there are too many. A few lines of YAML aliases can stand for billions of values, and a mapping
            that holds itself for infinitely many.
    """
    waiting, count = [(where, values)], 0
    while waiting:
        key, value = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            raise ConfigError(f"{where}: more than {MAX_VALUES} values, or a mapping that holds itself")
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{key}.{index}", inner) for index, inner in enumerate(value)]
        else:
            yield key, value


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice: the last one would win unseen. (`<<` may be overridden: that is its use.)"""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """See Composer. Raises MarkedYAMLError at the second of two equal keys."""
        node: Any = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _explain(error: Any, cls: type, where: str) -> str:
    key = ".".join([where, *(str(part) for part in error["loc"])])
    if error["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        allowed = ", ".join(getattr(_nested(cls, error["loc"][:-1]), "__dataclass_fields__", {}))
        return f"{key}: unknown key; allowed here: {allowed}"
    if error["type"] in {"missing", "missing_argument"}:
        return f"{key}: a value is required and none was given"
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):  # keys that do not fit together
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['input']!r} is not allowed: {error['msg']}"


def _nested(cls: Any, location: Sequence[Any]) -> Any:
    """The config class that a location within one of type `cls` leads to, as far as names of fields lead to one."""
    for name in location:
        declared = get_type_hints(cls).get(name) if hasattr(cls, "__dataclass_fields__") else None
        inner = [each for each in (declared, *get_args(declared)) if hasattr(each, "__dataclass_fields__")]
        cls = inner[0] if inner else cls
    return cls


def read_params(path: Path) -> dict[str, Any]:
    """Read a params file. Raises ConfigError where it is missing, is no mapping in YAML, or has a key twice."""
    try:
        params = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read ({problem.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: not UTF-8
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(params).__name__}")
    return params


def section(params: Mapping[str, Any], name: str, where: str = "params.yaml") -> Mapping[str, Any]:
    """The section of a params file at a dotted name (`distill.progressive`). Raises ConfigError where it is absent."""
    found: Any = params
    for depth, part in enumerate(name.split(".")):
        if not isinstance(found, Mapping) or part not in found:
            at = ".".join(name.split(".")[:depth]) or "the top"
            allowed = ", ".join(map(str, found)) if isinstance(found, Mapping) else "nothing"
            raise ConfigError(f"{where}: no section {part!r} at {at}; there: {allowed}")
        found = found[part]
    return found


def as_plain(settings: Any) -> dict[str, Any]:
    """A config as nested plain values (for records and checkpoint keys)."""
    return asdict(settings)


def as_recorded(settings: Any, **unsaid: Any) -> dict[str, Any]:
    """The same without each key that has its value in `unsaid`: what a record that lacks the key means.

    For keys that came later: a model that one of them does not concern keeps its bytes.
    """
    return {name: value for name, value in as_plain(settings).items() if name not in unsaid or value != unsaid[name]}
