"""The search space: what may change of a teacher's `UNet2DModel` configuration, and which combinations are networks.

A candidate is a point: the number of one choice for each of `DIMENSIONS`. Its fields are the teacher's but for those.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ado_tasks.config import config
from ado_tasks.errors import ConfigError
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.unet_layout import block_kind

Positive = Annotated[int, Field(ge=1)]
Level = Annotated[int, Field(ge=0)]
Middle = Literal["attention", "plain", "none"]
Resampling = Literal["conv", "resnet"]
Point = tuple[int, ...]  # a choice's number for each of DIMENSIONS

FLOAT_BITS = 32
KINDS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}  # whose weights can be inherited


@config
class SpaceConfig:
    """The choices. What is left empty stays as the teacher has it."""

    channels: tuple[tuple[Positive, ...], ...] = ()  # block_out_channels: choices for each level
    layers_per_block: tuple[Positive, ...] = ()  # residual blocks a level
    attention: tuple[tuple[Level, ...], ...] = ()  # levels that attend, both ways: (1,) or () or …
    attention_head_dim: tuple[Positive, ...] = ()  # channels a head; heads can be joined, not split
    middle: tuple[Middle, ...] = ()  # with attention, its two residual blocks alone, or no middle
    resampling: tuple[Resampling, ...] = ()  # downsample_type and upsample_type, of levels that attend
    linear_bits: tuple[Literal[4, 8, 32], ...] = ()  # of linear layers, after tuning; 32: floats


@dataclass(frozen=True)
class Space:
    """The space around one teacher."""

    teacher: UNet2DConfig
    dimensions: dict[str, tuple[Any, ...]]  # by name: the choices

    @staticmethod
    def around(teacher: UNet2DConfig, settings: SpaceConfig) -> "Space":
        """The space of these choices.

        Raises:
            ConfigError: the teacher has blocks whose weights cannot be inherited, or the choices do not fit its levels.
        """
        others = {block_kind(name) for name in (*teacher.down_block_types, *teacher.up_block_types)} - KINDS
        if others:
            raise ConfigError(f"teacher: {', '.join(sorted(others))} cannot be searched; allowed: {', '.join(KINDS)}")
        levels = len(teacher.block_out_channels)
        channels = settings.channels or tuple((width,) for width in teacher.block_out_channels)
        if len(channels) != levels or not all(channels):
            raise ConfigError(f"space.channels: {channels} is not allowed: choices for each of {levels} levels")
        beyond = [sites for sites in settings.attention if any(level >= levels for level in sites)]
        if beyond:
            raise ConfigError(f"space.attention: {beyond[0]} is not allowed: levels from 0 to {levels - 1}")
        return Space(
            teacher,
            {
                **{f"channels.{level}": choices for level, choices in enumerate(channels)},
                "layers_per_block": settings.layers_per_block or (teacher.layers_per_block,),
                "attention": settings.attention or (_attention_of(teacher),),
                "attention_head_dim": settings.attention_head_dim or (teacher.attention_head_dim,),
                "middle": settings.middle or (_middle_of(teacher),),
                **({"resampling": settings.resampling} if settings.resampling else {}),
                **({"linear_bits": settings.linear_bits} if settings.linear_bits else {}),
            },
        )

    def values(self, point: Point) -> dict[str, Any]:
        """The choices of a point, by dimension. Raises ConfigError where there is no such choice."""
        if len(point) != len(self.dimensions):
            raise ConfigError(
                f"point {point}: allowed: {len(self.dimensions)} numbers, for {', '.join(self.dimensions)}"
            )
        values = {}
        for number, (name, choices) in zip(point, self.dimensions.items(), strict=True):
            if not 0 <= number < len(choices):
                raise ConfigError(f"point {point}: {name}: choice {number}; allowed: 0 to {len(choices) - 1}")
            values[name] = choices[number]
        return values

    def candidate(self, point: Point) -> UNet2DConfig:
        """The configuration at a point.

        Raises:
            ConfigError: it is no network, or one that cannot inherit: names the rule, the value and what is allowed.
        """
        values = self.values(point)
        widths = tuple(values[name] for name in values if name.startswith("channels."))
        sites, levels, middle = values["attention"], len(widths), values["middle"]
        made = replace(
            self.teacher,
            block_out_channels=widths,
            layers_per_block=values["layers_per_block"],
            down_block_types=tuple("AttnDownBlock2D" if level in sites else "DownBlock2D" for level in range(levels)),
            up_block_types=tuple(
                "AttnUpBlock2D" if level in sites else "UpBlock2D" for level in reversed(range(levels))
            ),
            attention_head_dim=values["attention_head_dim"],
            downsample_type=values.get("resampling", self.teacher.downsample_type),
            upsample_type=values.get("resampling", self.teacher.upsample_type),
            mid_block_type=None if middle == "none" else "UNetMidBlock2D",
            add_attention=middle == "attention",
            time_embedding_dim=self.teacher.embedding_width,  # shared by all blocks, and cheap: never cut
        )
        check_inheritance(self.teacher, made)
        return made

    def bits(self, point: Point) -> int | None:
        """Bits of a point's linear layers; None where they are floats."""
        bits = self.values(point).get("linear_bits", FLOAT_BITS)
        return None if bits == FLOAT_BITS else bits

    def points(self) -> Iterator[Point]:
        """Every point that is a network, in the order of the choices, the last dimension fastest."""
        for point in itertools.product(*(range(len(choices)) for choices in self.dimensions.values())):
            if self.allows(point):
                yield point

    def allows(self, point: Point) -> bool:
        """Whether there is a candidate at a point."""
        try:
            self.candidate(point)
        except ConfigError:
            return False
        return True


def check_inheritance(teacher: UNet2DConfig, candidate: UNet2DConfig) -> None:
    """Whether a candidate's weights can all come from this teacher. (That it is a network its own config checks.)

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    for rule in RULES:
        problem = rule(teacher, candidate)
        if problem:
            raise ConfigError(problem)


def _no_wider(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    pairs = zip(candidate.block_out_channels, teacher.block_out_channels, strict=True)
    if all(mine <= theirs for mine, theirs in pairs):
        return None
    return (
        f"block_out_channels: {candidate.block_out_channels}; allowed: up to the teacher's {teacher.block_out_channels}"
    )


def _no_deeper(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    if candidate.layers_per_block <= teacher.layers_per_block:
        return None
    return f"layers_per_block: {candidate.layers_per_block}; allowed: up to the teacher's {teacher.layers_per_block}"


def _same_projections(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    """A level that narrows to the width of the one above loses the projection which the teacher has there."""
    for level in range(1, len(teacher.block_out_channels)):
        mine, theirs = candidate.block_out_channels, teacher.block_out_channels
        if mine[level] == mine[level - 1] and theirs[level] != theirs[level - 1]:
            return (
                f"block_out_channels: {mine}: levels {level - 1} and {level} are equally wide, so that nothing would "
                f"take the place of the teacher's projection between {theirs[level - 1]} and {theirs[level]} channels; "
                "allowed: different widths"
            )
    return None


def _frequencies_fit(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    if candidate.block_out_channels[0] == teacher.block_out_channels[0] or teacher.time_embedding_type == "positional":
        return None
    return (
        f"block_out_channels[0]: {candidate.block_out_channels[0]} with time_embedding_type "
        f"{teacher.time_embedding_type!r}; allowed: the teacher's {teacher.block_out_channels[0]}"
    )


def _attends_where_taught(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    beyond = set(_attention_of(candidate)) - set(_attention_of(teacher))
    if beyond:
        return f"attention: level {min(beyond)}; allowed: the teacher's levels {_attention_of(teacher)}"
    if _middle_of(candidate) == "attention" and _middle_of(teacher) != "attention":
        return "add_attention: true; allowed: false, as the teacher's middle has none"
    if candidate.mid_block_type is not None and teacher.mid_block_type is None:
        return f"mid_block_type: {candidate.mid_block_type!r}; allowed: none, as the teacher has none"
    return None


def _joins_heads(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    mine, theirs = candidate.attention_head_dim, teacher.attention_head_dim
    if mine == theirs or (mine is not None and theirs is not None and mine % theirs == 0):
        return None
    return f"attention_head_dim: {mine}; allowed: a multiple of the teacher's {theirs}"


def _resamples_as_taught_or_less(teacher: UNet2DConfig, candidate: UNet2DConfig) -> str | None:
    """A residual block can be left out, which leaves a convolution that averages or repeats; not the other way."""
    mine, theirs = ((each.downsample_type, each.upsample_type) for each in (candidate, teacher))
    if mine == theirs:
        return None
    if not _attention_of(candidate) or len(candidate.block_out_channels) == 1:  # the same network twice
        return f"downsample_type, upsample_type: {mine} where no level that resamples attends; allowed: {theirs}"
    gained = any(one == "resnet" != other for one, other in zip(mine, theirs, strict=True))
    return f"downsample_type, upsample_type: {mine}; allowed: conv, or the teacher's {theirs}" if gained else None


Rule = Callable[[UNet2DConfig, UNet2DConfig], str | None]  # (teacher, candidate) to what is wrong
RULES: tuple[Rule, ...] = (
    _no_wider, _no_deeper, _same_projections, _frequencies_fit, _attends_where_taught, _joins_heads,
    _resamples_as_taught_or_less,
)  # fmt: skip


def _attention_of(network: UNet2DConfig) -> tuple[int, ...]:
    """Levels that attend on the way down. Raises ConfigError where the way up attends elsewhere."""
    down = tuple(level for level, name in enumerate(network.down_block_types) if "Attn" in name)
    up = tuple(level for level, name in enumerate(reversed(network.up_block_types)) if "Attn" in name)
    if down != up:
        raise ConfigError(f"attention at levels {down} on the way down and {up} on the way up; allowed: the same")
    return down


def _middle_of(network: UNet2DConfig) -> Middle:
    if network.mid_block_type is None:
        return "none"
    return "attention" if network.add_attention else "plain"
