"""The shape of a `UNet2DModel`: what each level takes and gives, and whether the two halves fit. Numbers, no arrays.

Diffusers finds most misfits when an image first passes through the network, as a size error deep inside. Here the
passage is walked in numbers when the configuration is made.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ado_tasks.errors import ConfigError

if TYPE_CHECKING:
    from ado_tasks.models.unet_config import UNet2DConfig

IMAGE_CHANNELS = 3  # Diffusers writes 3 into the Skip blocks, whatever the model's in_channels
MOST_GROUPS = 32  # Diffusers' Skip blocks take min(channels // 4, 32) groups
SKIP_ATTENTION_GROUPS = 32  # and 32 in their attention
K_GROUP_WIDTH = 32  # channels a group in the K blocks; Diffusers' resnet_group_size

DOWN_KINDS = (
    "DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D",
    "KDownBlock2D", "KCrossAttnDownBlock2D",
)  # fmt: skip
UP_KINDS = (
    "UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D",
    "KUpBlock2D", "KCrossAttnUpBlock2D",
)  # fmt: skip
SKIP_KINDS = {"SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"}
K_KINDS = {"KDownBlock2D", "KCrossAttnDownBlock2D", "KUpBlock2D", "KCrossAttnUpBlock2D"}
OLD_PREFIX = "UNetRes"  # of block names in early Diffusers configurations


@dataclass(frozen=True)
class Level:
    """One level of the network, the same words for the way down and the way up."""

    in_channels: int  # down: what arrives; up: channels of the next level, which the last state has
    out_channels: int  # what leaves (of a KUpBlock2D in_channels leave)
    previous: int  # up only: what arrives from the block before
    layers: int  # residual blocks
    resize: bool  # all levels but the last halve or double the size
    groups: int  # of the group norms; 0 where only blocks with their own rule are used
    head_width: int  # of attention
    padding: int  # of the strided convolution


@dataclass(frozen=True)
class State:
    """What the way down hands to the way up."""

    channels: int | None  # none where it is withheld: by a KCrossAttnDownBlock2D that does not halve
    depth: int  # how often its height and width were halved


def block_kind(name: str) -> str:
    """The name of a block without the prefix of early Diffusers versions."""
    return name.removeprefix(OLD_PREFIX)


def down_levels(config: "UNet2DConfig") -> list[Level]:
    """The levels on the way down, first to last."""
    widths = config.block_out_channels
    return [
        Level(
            in_channels=widths[max(i - 1, 0)],
            out_channels=width,
            previous=0,
            layers=config.layers_per_block,
            resize=i < len(widths) - 1,
            groups=config.norm_num_groups or 0,
            head_width=config.attention_head_dim or width,
            padding=config.downsample_padding,
        )
        for i, width in enumerate(widths)
    ]


def up_levels(config: "UNet2DConfig") -> list[Level]:
    """The levels on the way up, deepest first."""
    widths = config.block_out_channels[::-1]
    levels: list[Level] = []
    for i, (width, name) in enumerate(zip(widths, config.up_block_types, strict=True)):
        levels.append(
            Level(
                in_channels=widths[min(i + 1, len(widths) - 1)],
                out_channels=width,
                previous=widths[max(i - 1, 0)],
                layers=config.layers_per_block + (block_kind(name) not in K_KINDS),
                resize=i < len(widths) - 1,
                groups=config.norm_num_groups or 0,
                head_width=config.attention_head_dim or width,
                padding=config.downsample_padding,
            )
        )
    return levels


def joined_widths(level: Level) -> list[int]:
    """Channels that arrive at each residual block of an up block, its state included."""
    last = level.layers - 1
    return [
        (level.previous if i == 0 else level.out_channels) + (level.in_channels if i == last else level.out_channels)
        for i in range(level.layers)
    ]


def k_up_alone(level: Level, embedding: int) -> bool:
    """Whether a KCrossAttnUpBlock2D joins no state and attends twice: Diffusers' is_first_block."""
    return level.in_channels == level.out_channels == embedding


def skip_groups(channels: int) -> int:
    """Groups of a norm in a Skip block."""
    return min(channels // 4, MOST_GROUPS)


def skip_up_groups(level: Level, attention: bool) -> list[int]:
    """Groups of the first norm of each residual block of a Skip up block.

    Diffusers' AttnSkipUpBlock2D computes min(previous + state // 4, 32), where brackets are surely missing; stored
    models depend on it, so it is kept.
    """
    last = level.layers - 1
    groups: list[int] = []
    for i, width in enumerate(joined_widths(level)):
        state = level.in_channels if i == last else level.out_channels
        groups.append(min(width - state + state // 4, MOST_GROUPS) if attention else skip_groups(width))
    return groups


def check_layout(config: "UNet2DConfig") -> None:
    """Walk down and up in numbers. Raises ConfigError that names the block where the network would not fit together."""
    states, depth = _walk_down(config)
    _walk_middle(config)
    _walk_up(config, states, depth)


def _walk_down(config: "UNet2DConfig") -> tuple[list[State], int]:
    """The states in the order they are made, and the number of halvings at the end."""
    states, depth, skip_depth = [State(config.block_out_channels[0], 0)], 0, 0
    for i, (name, level) in enumerate(zip(config.down_block_types, down_levels(config), strict=True)):
        kind, where = block_kind(name), f"down_block_types[{i}] ({name})"
        widths = [level.in_channels, *[level.out_channels] * level.layers]
        _check_block(kind, level, widths[:-1], where)
        withheld = kind == "KCrossAttnDownBlock2D" and not level.resize
        states += [State(None if withheld else level.out_channels, depth)] * level.layers
        if not level.resize:
            continue
        depth += 1
        if kind not in K_KINDS:
            states.append(State(level.out_channels, depth))
        if kind in SKIP_KINDS:
            skip_depth += 1
            if config.in_channels != IMAGE_CHANNELS:
                raise ConfigError(f"in_channels: {config.in_channels}, but {where} works on 3-channel images only")
            if skip_depth != depth:
                raise ConfigError(f"{where}: may not follow a level that is no Skip block; allowed: Skip first")
    return states, depth


def _walk_middle(config: "UNet2DConfig") -> None:
    if config.mid_block_type is None:
        return
    channels = config.block_out_channels[-1]
    groups = config.norm_num_groups or min(channels // 4, MOST_GROUPS)
    _check_groups(groups, channels, "mid_block (norm_num_groups)")
    if config.add_attention:
        _check_heads(config.attention_head_dim or channels, channels, "mid_block")
        if config.attn_norm_num_groups is not None:
            _check_groups(config.attn_norm_num_groups, channels, "mid_block (attn_norm_num_groups)")


def _walk_up(config: "UNet2DConfig", states: list[State], depth: int) -> None:
    arriving, skip_depth = config.block_out_channels[-1], None
    for i, (name, level) in enumerate(zip(config.up_block_types, up_levels(config), strict=True)):
        kind, where = block_kind(name), f"up_block_types[{i}] ({name})"
        taken, states = states[-level.layers :], states[: -level.layers]
        if kind in K_KINDS:
            attention = kind == "KCrossAttnUpBlock2D"
            alone = attention and k_up_alone(level, config.embedding_width)
            below = State(arriving, depth)
            arriving = _check_k_up(level, taken[-1], below, where, attention=attention, alone=alone)
        else:
            _check_states(level, taken[::-1], State(arriving, depth), where)
            _check_block(kind, level, joined_widths(level), where)
            arriving = level.out_channels
        if kind in SKIP_KINDS:
            if skip_depth is not None and skip_depth - 1 != depth:
                raise ConfigError(f"{where}: may not follow a block that drops the skip image; allowed: Skip last")
            skip_depth = depth if level.resize or skip_depth is not None else None
        depth -= level.resize
    if arriving != config.block_out_channels[0]:
        raise ConfigError(
            f"up_block_types: {arriving} channels leave the last block; allowed: block_out_channels[0] = "
            f"{config.block_out_channels[0]}"
        )
    if skip_depth is not None and (skip_depth != 0 or config.out_channels != IMAGE_CHANNELS):
        raise ConfigError(
            f"up_block_types: {config.up_block_types} paint a 3-channel image; allowed: out_channels 3 "
            f"(given: {config.out_channels}) and Skip blocks up to the last level"
        )


def _check_states(level: Level, taken: list[State], arriving: State, where: str) -> None:
    """A standard up block joins one state to each residual block, of the channels and the size it expects."""
    widths = [*[level.out_channels] * (level.layers - 1), level.in_channels]
    if taken != [State(width, arriving.depth) for width in widths] or arriving.channels != level.previous:
        raise ConfigError(f"{where}: does not fit the way down; allowed: K blocks only with K blocks on the other side")


def _check_k_up(level: Level, state: State, arriving: State, where: str, *, attention: bool, alone: bool) -> int:
    """A K up block joins the last state only, or (`alone`) none. Returns the channels that leave it."""
    following, out = level.in_channels, level.out_channels
    joined, expected = (arriving.channels or 0) + (state.channels or 0), out if alone else 2 * out
    if joined != expected or state.depth != arriving.depth:
        raise ConfigError(
            f"{where}: {joined} channels halved {state.depth} times arrive, {expected} halved {arriving.depth} times "
            "are expected; allowed: K blocks on both sides, and opposite a last KCrossAttnDownBlock2D a "
            "KCrossAttnUpBlock2D with time_embedding_dim = its channels = the next level's"
        )
    for width in {joined, out} if level.layers > 1 else {joined}:
        _check_groups(width // K_GROUP_WIDTH, width, where)
    _check_groups(out // K_GROUP_WIDTH, out if attention else following, where)
    if attention:
        for width in {following, out}:
            _check_heads(level.head_width, width, where)
            _check_groups(max(1, width // K_GROUP_WIDTH), width, where)
    return following


def _check_block(kind: str, level: Level, widths: list[int], where: str) -> None:
    """The norms and heads of one block, `widths` being the channels that arrive at each residual block."""
    out = level.out_channels
    if kind in SKIP_KINDS:
        up = kind.endswith("UpBlock2D")
        groups = skip_up_groups(level, kind.startswith("Attn")) if up else [skip_groups(width) for width in widths]
        out_groups, attention_groups = skip_groups(out), SKIP_ATTENTION_GROUPS
    elif kind in K_KINDS:
        groups = [width // K_GROUP_WIDTH for width in widths]
        out_groups, attention_groups = out // K_GROUP_WIDTH, max(1, out // K_GROUP_WIDTH)
    else:
        groups = [level.groups] * len(widths)
        out_groups, attention_groups = level.groups, level.groups
    for group, width in [*zip(groups, widths, strict=True), (out_groups, out)]:
        _check_groups(group, width, where)
    if "Attn" in kind:
        _check_groups(attention_groups, out, where)
        _check_heads(level.head_width, out, where)


def _check_groups(groups: int, channels: int, where: str) -> None:
    if groups < 1 or channels % groups:
        raise ConfigError(
            f"{where}: {groups} norm groups do not divide {channels} channels; allowed: a divisor of {channels}"
        )


def _check_heads(head_width: int, channels: int, where: str) -> None:
    if head_width > channels:
        raise ConfigError(
            f"attention_head_dim: {head_width} in {where} of {channels} channels; allowed: at most {channels}"
        )
