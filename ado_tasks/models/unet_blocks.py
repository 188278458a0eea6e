"""The levels of `UNet2DModel`: blocks that go down, the middle, and blocks that go up.

A down block is called as (x, skip, condition) and returns (x, states, skip); an up block as (x, states, skip,
condition) and returns (x, skip). `skip` is the small image that the Skip blocks (NCSN++, Song et al. 2021) pass along
beside the features; the others leave it as it is.
"""

import math

from ado_tasks.backend import mx, nn
from ado_tasks.models import ops
from ado_tasks.models.layers import Conv2d, GroupNorm
from ado_tasks.models.resample import Downsample2D, Upsample2D, smooth_down, smooth_up
from ado_tasks.models.resnet import Attention, BlockOptions, Condition, ResnetBlock2D
from ado_tasks.models.unet_layout import (
    IMAGE_CHANNELS,
    SKIP_ATTENTION_GROUPS,
    Level,
    joined_widths,
    skip_groups,
    skip_up_groups,
)

SKIP_SCALE = math.sqrt(2.0)  # Song et al. 2021, appendix H: sums of two branches keep their variance

States = tuple[mx.array, ...]


class DownBlock2D(nn.Module):
    """Residual blocks, each with attention or not, then a strided convolution or a residual block that averages."""

    def __init__(self, level: Level, options: BlockOptions, *, attention: bool, resize_by: str) -> None:
        """`resize_by` is "conv" or "resnet"."""
        super().__init__()
        widths = [level.in_channels, *[level.out_channels] * level.layers]
        out, groups = level.out_channels, level.groups
        self.resnets = [ResnetBlock2D(widths[i], out, options, groups) for i in range(level.layers)]
        if attention:
            self.attentions = [_attention(level, options, groups) for _ in self.resnets]
        if level.resize:
            if resize_by == "resnet":
                self.downsamplers = [ResnetBlock2D(out, out, options, groups, resample="down")]
            else:
                self.downsamplers = [Downsample2D(out, level.padding)]

    def __call__(self, x: mx.array, skip: mx.array, condition: Condition) -> tuple[mx.array, States, mx.array]:
        """(B, H, W, in) to (B, H/2, W/2, out) and the states the way up will need."""
        states: list[mx.array] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, condition)
            if "attentions" in self:
                x = self.attentions[index](x)
            states.append(x)
        for resize in self.get("downsamplers", []):
            x = _resize(resize, x, condition)
            states.append(x)
        return x, tuple(states), skip


class UpBlock2D(nn.Module):
    """The states of the way down joined in, residual blocks with attention or not, then twice the size."""

    def __init__(self, level: Level, options: BlockOptions, *, attention: bool, resize_by: str) -> None:
        """`resize_by` is "conv" or "resnet"."""
        super().__init__()
        out, groups = level.out_channels, level.groups
        self.resnets = [ResnetBlock2D(width, out, options, groups) for width in joined_widths(level)]
        if attention:
            self.attentions = [_attention(level, options, groups) for _ in self.resnets]
        if level.resize:
            if resize_by == "resnet":
                self.upsamplers = [ResnetBlock2D(out, out, options, groups, resample="up")]
            else:
                self.upsamplers = [Upsample2D(out)]

    def __call__(
        self, x: mx.array, states: States, skip: mx.array | None, condition: Condition
    ) -> tuple[mx.array, mx.array | None]:
        """(B, H, W, previous) to (B, 2H, 2W, out)."""
        for index, (resnet, state) in enumerate(zip(self.resnets, reversed(states), strict=True)):
            x = resnet(mx.concatenate([x, state], axis=-1), condition)
            if "attentions" in self:
                x = self.attentions[index](x)
        for resize in self.get("upsamplers", []):
            x = _resize(resize, x, condition)
        return x, skip


class UNetMidBlock2D(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(
        self,
        channels: int,
        options: BlockOptions,
        *,
        groups: int,
        attention: bool,
        attention_groups: int | None,
        head_width: int,
    ) -> None:
        """`attention_groups` none leaves out the norm of the attention."""
        super().__init__()
        self.resnets = [ResnetBlock2D(channels, channels, options, groups) for _ in range(2)]
        if attention:
            scale = options.output_scale
            self.attentions = [
                Attention(channels, head_width, norm_groups=attention_groups, eps=options.eps, output_scale=scale)
            ]

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        """(B, H, W, C) to the same shape."""
        x = self.resnets[0](x, condition)
        for attention in self.get("attentions", []):
            x = attention(x)
        return self.resnets[1](x, condition)


class SkipDownBlock2D(nn.Module):
    """As DownBlock2D, beside a smoothly halved copy of the image whose projection is added in (NCSN++)."""

    def __init__(self, level: Level, options: BlockOptions, *, attention: bool) -> None:
        """`attention` makes it Diffusers' AttnSkip block."""
        super().__init__()
        options = options.scaled(SKIP_SCALE)
        widths = [level.in_channels, *[level.out_channels] * level.layers]
        out = level.out_channels
        self.resnets = [
            ResnetBlock2D(widths[i], out, options, skip_groups(widths[i]), groups_out=skip_groups(out))
            for i in range(level.layers)
        ]
        if attention:
            self.attentions = [_attention(level, options, SKIP_ATTENTION_GROUPS) for _ in self.resnets]
        if level.resize:
            self.resnet_down = ResnetBlock2D(out, out, options, skip_groups(out), resample="smooth_down", project=True)
            self.skip_conv = Conv2d(IMAGE_CHANNELS, out, 1)

    def __call__(self, x: mx.array, skip: mx.array, condition: Condition) -> tuple[mx.array, States, mx.array]:
        """(B, H, W, in) to (B, H/2, W/2, out), the states, and the halved image."""
        states: list[mx.array] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, condition)
            if "attentions" in self:
                x = self.attentions[index](x)
            states.append(x)
        if "resnet_down" in self:
            skip = smooth_down(skip, "zero")
            x = self.skip_conv(skip) + self.resnet_down(x, condition)
            states.append(x)
        return x, tuple(states), skip


class SkipUpBlock2D(nn.Module):
    """As UpBlock2D, beside an image that is smoothly doubled at each level and painted upon (NCSN++).

    With attention there is one after the last residual block, not one after each.
    """

    def __init__(self, level: Level, options: BlockOptions, *, attention: bool) -> None:
        """`attention` makes it Diffusers' AttnSkip block."""
        super().__init__()
        options = options.scaled(SKIP_SCALE)
        out = level.out_channels
        self.resnets = [
            ResnetBlock2D(width, out, options, groups, groups_out=skip_groups(out))
            for width, groups in zip(joined_widths(level), skip_up_groups(level, attention), strict=True)
        ]
        if attention:
            self.attentions = [_attention(level, options, SKIP_ATTENTION_GROUPS)]
        if level.resize:
            self.resnet_up = ResnetBlock2D(out, out, options, skip_groups(out), resample="smooth_up", project=True)
            self.skip_conv = Conv2d(out, IMAGE_CHANNELS, 3, padding=1)
            self.skip_norm = GroupNorm(skip_groups(out), out, options.eps)

    def __call__(
        self, x: mx.array, states: States, skip: mx.array | None, condition: Condition
    ) -> tuple[mx.array, mx.array | None]:
        """(B, H, W, previous) to (B, 2H, 2W, out), and the image so far at the size x had on the way in."""
        for resnet, state in zip(self.resnets, reversed(states), strict=True):
            x = resnet(mx.concatenate([x, state], axis=-1), condition)
        for attention in self.get("attentions", []):
            x = attention(x)
        skip = None if skip is None else smooth_up(skip, "zero")
        if "resnet_up" in self:
            painted = self.skip_conv(ops.silu(self.skip_norm(x)))
            skip = painted if skip is None else skip + painted
            x = self.resnet_up(x, condition)
        return x, skip


def _attention(level: Level, options: BlockOptions, groups: int) -> Attention:
    return Attention(
        level.out_channels, level.head_width, norm_groups=groups, eps=options.eps, output_scale=options.output_scale
    )


def _resize(layer: nn.Module, x: mx.array, condition: Condition) -> mx.array:
    return layer(x, condition) if isinstance(layer, ResnetBlock2D) else layer(x)
