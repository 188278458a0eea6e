"""What a task's help says, read from its source: the keys of its config, and what its docstring says of each option.

A field's type, bounds and default are pydantic's; its text is the comment beside it, or else the lines of comment
directly above it. So help cannot say other than what is checked.
"""

import ast
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of", "pattern": "like"}
LENGTHS = {"min_length": "at least", "max_length": "at most"}
COLUMN = 38  # characters before a key's text
LEAST = 24  # characters that a text has, however narrow the terminal


def describe_keys(config_type: type, width: int, indent: int = 2) -> list[str]:
    """One entry a key, `steps: int ≥ 1, default 4000   optimiser steps`, in lines of at most `width` where it can be.

    Keys of a config inside are indented below its own.
    """
    said, lines = comments(config_type), []
    fields: Mapping[str, Any] = vars(config_type)["__pydantic_fields__"]
    for name, field in fields.items():
        value = field.get_default(call_default_factory=True)
        kind = _with_bounds(_kind(field.annotation), field.metadata)
        default = "required" if field.is_required() else f"default {_plain(value)}"
        head = f"{' ' * indent}{name}: {kind}, {default}"
        lines += _entry(head, said.get(name, ""), width, indent)
        for inner in _configs(field.annotation):
            lines += describe_keys(inner, width, indent + 4)
    return lines


def comments(cls: type) -> dict[str, str]:
    """The comment of each annotated field of a class, from its source; a field without one is left out."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # installed without sources
        return {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            beside[token.start[0]] = token.string.lstrip("# ")
    own_line = {n for n in beside if source.splitlines()[n - 1].lstrip().startswith("#")}
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            rows = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in beside]
            if not rows:
                first = node.lineno
                while first - 1 in own_line:
                    first -= 1
                rows = list(range(first, node.lineno))
            if rows:
                found[node.target.id] = " ".join(beside[n] for n in rows)
    return found


def arguments(function: Any) -> dict[str, str]:
    """What a docstring's `Args:` says of each parameter, on one line each."""
    found: dict[str, str] = {}
    name = ""
    for line in _sections(function)[1]:
        if line.startswith("        "):  # goes on
            found[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return found


def description(function: Any) -> str:
    """A docstring without its `Args:`, which the options say."""
    before, _, after = _sections(function)
    return "\n".join([*before, *after]).strip()


def _sections(function: Any) -> tuple[list[str], list[str], list[str]]:
    """The lines of a docstring before, in and after its `Args:`."""
    lines = (inspect.getdoc(function) or "").splitlines()
    if "Args:" not in lines:
        return lines, [], []
    first = lines.index("Args:")
    last = next((n for n in range(first + 1, len(lines)) if not lines[n].startswith(" ")), len(lines))
    return lines[:first], lines[first + 1 : last], lines[last + 1 :]


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_bounds(_kind(inner[0]), [rule for field in inner[1:] for rule in getattr(field, "metadata", [])])
    if origin is Literal:
        return " | ".join(_plain(choice) for choice in inner)
    if origin in {Union, UnionType}:
        return " or ".join(_kind(each) for each in inner if each is not NoneType)  # the default says null
    if origin is tuple:
        count = "" if ... in inner else f"{len(inner)} "
        each = " or ".join(dict.fromkeys(_kind(part) for part in inner if part is not ...))
        return f"list of {count}({each})" if " | " in each or " or " in each else f"list of {count}{each}"
    if origin is dict or is_dataclass(annotation):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def _with_bounds(kind: str, rules: Any) -> str:
    """`kind` with pydantic's rules of it: `int ≥ 1 and ≤ 16`."""
    given = [(name, getattr(rule, name, None)) for rule in rules for name in (*SIGNS, *LENGTHS)]
    bounds = [f"{SIGNS[name]} {_plain(value)}" for name, value in given if name in SIGNS and value is not None]
    lengths = [f"{LENGTHS[name]} {value} long" for name, value in given if name in LENGTHS and value is not None]
    return ", ".join([" ".join([kind, *filter(None, [" and ".join(bounds)])]), *lengths])


def _configs(annotation: Any) -> Iterator[type]:
    """The configs that a field may hold."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        yield annotation
    for inner in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _configs(inner)


def _plain(value: Any) -> str:
    """A value as YAML has it; a default that is a config shows at its own keys."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    return "as below" if is_dataclass(value) else json.dumps(value)


def _entry(head: str, text: str, width: int, indent: int) -> list[str]:
    """A key and its text side by side; the text begins on the next line where the key is too long."""
    column = COLUMN + indent - 2
    wrapped = textwrap.wrap(text, max(LEAST, width - column))
    if len(head) + 2 > column or not wrapped:
        keys = textwrap.wrap(head, max(LEAST, width), subsequent_indent=" " * (indent + 4), break_on_hyphens=False)
        return [*keys, *(f"{'':{column}}{line}" for line in wrapped)]
    return [f"{head:<{column}}{wrapped[0]}", *(f"{'':{column}}{line}" for line in wrapped[1:])]
