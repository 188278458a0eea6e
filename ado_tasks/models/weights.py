"""Weights between Diffusers and here: equal names, convolution kernels in another order in memory. Strict both ways."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ado_tasks.backend import mlx_utils, mx, nn
from ado_tasks.errors import ArtifactError

Transform = Literal["same", "kernel"]  # kernel: (out, in, height, width) there, (out, height, width, in) here
TO_OURS = {"same": None, "kernel": (0, 2, 3, 1)}
TO_DIFFUSERS = {"same": None, "kernel": (0, 3, 1, 2)}
FLOATS = {mx.float16, mx.bfloat16, mx.float32}


@dataclass(frozen=True)
class Rule:
    """How the weights whose whole name matches a pattern travel. The first rule that matches holds."""

    pattern: str  # regular expression on the name, which is the same on both sides
    transform: Transform  # what happens to the axes
    required: bool = True  # whether a file without it is refused


RULES = (
    Rule(r"(.*\.)?(conv_in|conv_out|conv1|conv2|conv_shortcut|skip_conv|conv)\.weight", "kernel"),
    # Diffusers stores it in K attention blocks, where UNet2DModel never applies it.
    Rule(r".*\.norm_cross\.(weight|bias)", "same", required=False),
    Rule(r".*\.(weight|bias)", "same"),
)

# So the four projections were called in Diffusers' former AttentionBlock; stored models still have these names.
OLD_NAMES = (
    (re.compile(r"(.*attentions\.\d+)\.query\.(weight|bias)"), r"\1.to_q.\2"),
    (re.compile(r"(.*attentions\.\d+)\.key\.(weight|bias)"), r"\1.to_k.\2"),
    (re.compile(r"(.*attentions\.\d+)\.value\.(weight|bias)"), r"\1.to_v.\2"),
    (re.compile(r"(.*attentions\.\d+)\.proj_attn\.(weight|bias)"), r"\1.to_out.0.\2"),
)


def flat_parameters(model: nn.Module) -> dict[str, mx.array]:
    """All parameters of a model by their dotted names, frozen ones included."""
    return dict(mlx_utils.tree_flatten(model.parameters()))


def to_diffusers(parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Our parameters as Diffusers' state dict."""
    return {name: _moved(value, TO_DIFFUSERS[_rule(name).transform]) for name, value in parameters.items()}


def load_weights(model: nn.Module, tensors: Mapping[str, mx.array], where: str) -> None:
    """Put Diffusers' tensors into a model, as float32.

    Args:
        model: takes exactly these weights.
        tensors: by Diffusers' names, old ones included; float16, bfloat16 or float32.
        where: the file they come from, for messages.

    Raises:
        ArtifactError: a tensor is missing, unexpected, twice there, of the wrong shape or not of floats: names each.
    """
    expected = flat_parameters(model)
    found = _renamed(tensors, where)
    problems = [*_absent(expected, found), *_unexpected(expected, found)]
    loaded: dict[str, mx.array] = {}
    for name in expected.keys() & found.keys():
        there, shape = found[name], _shape_there(name, expected[name])
        if there.dtype not in FLOATS:
            problems.append(f"{name}: type {there.dtype}, expected float32, float16 or bfloat16")
        elif tuple(there.shape) != shape:
            problems.append(f"{name}: shape {tuple(there.shape)}, expected {shape}")
        else:
            loaded[name] = _moved(there.astype(mx.float32), TO_OURS[_rule(name).transform])
    if problems:
        raise ArtifactError("\n".join(f"{where}: {problem}" for problem in sorted(problems)))
    model.update(mlx_utils.tree_unflatten(list(loaded.items())))
    mx.eval(model.parameters())


def _rule(name: str) -> Rule:
    return next(rule for rule in RULES if re.fullmatch(rule.pattern, name))


def _moved(value: mx.array, axes: tuple[int, ...] | None) -> mx.array:
    return value if axes is None else mx.contiguous(value.transpose(axes))


def _shape_there(name: str, ours: mx.array) -> tuple[int, ...]:
    axes = TO_DIFFUSERS[_rule(name).transform]
    return tuple(ours.shape) if axes is None else tuple(ours.shape[axis] for axis in axes)


def _renamed(tensors: Mapping[str, mx.array], where: str) -> dict[str, mx.array]:
    renamed: dict[str, mx.array] = {}
    for name, value in tensors.items():
        new = name
        for pattern, replacement in OLD_NAMES:
            new = pattern.sub(replacement, new) if pattern.fullmatch(new) else new
        if new in renamed:
            raise ArtifactError(f"{where}: {name}: the same weight is there twice, under its old and its new name")
        renamed[new] = value
    return renamed


def _absent(expected: Mapping[str, mx.array], found: Mapping[str, mx.array]) -> list[str]:
    return [
        f"{name}: missing, expected {_shape_there(name, expected[name])}"
        for name in expected.keys() - found.keys()
        if _rule(name).required
    ]


def _unexpected(expected: Mapping[str, mx.array], found: Mapping[str, mx.array]) -> list[str]:
    return [
        f"{name}: unexpected, found {tuple(found[name].shape)}; the configuration has no such weight"
        for name in found.keys() - expected.keys()
    ]


def parameter_count(model: nn.Module) -> int:
    """Numbers in a network's weights."""
    return sum(array.size for array in flat_parameters(model).values())
