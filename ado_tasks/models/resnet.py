"""Residual and attention blocks, on (B, H, W, C), conditioned on an embedding of timestep and class."""

from dataclasses import dataclass, replace
from typing import Literal

from ado_tasks.backend import mx, nn
from ado_tasks.models import ops
from ado_tasks.models.layers import ACTIVATIONS, Conv2d, DropoutKeys, GroupNorm, LayerNorm, Linear, check_groups
from ado_tasks.models.resample import average_pool, smooth_down, smooth_up

Resample = Literal["up", "down", "smooth_up", "smooth_down"]


@dataclass(frozen=True)
class Condition:
    """What every block of one forward pass is told."""

    embedding: mx.array  # (B, E): timestep plus class
    activated: mx.array  # (B, E): the same after the activation, computed once for all blocks
    dropout: DropoutKeys  # where the masks come from


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of one network have in common."""

    embedding: int  # width of the time embedding
    eps: float  # of the group norms
    act_fn: str  # a name in ACTIVATIONS
    scale_shift: bool  # the embedding scales and shifts after the second norm, instead of being added before it
    dropout: float  # probability, before the second convolution
    output_scale: float = 1.0  # the block's output is divided by this

    def scaled(self, output_scale: float) -> "BlockOptions":
        """The same with another divisor of the output."""
        return replace(self, output_scale=output_scale)


class ResnetBlock2D(nn.Module):
    """h = conv2(drop(act(norm2(conv1(act(norm1 x)) + W act(emb))))); (x or its 1x1 projection + h) / output_scale.

    With scale_shift the embedding gives s, b and norm2(·)(1 + s) + b replaces the sum (AdaGN, Dhariwal & Nichol 2021).
    A resampling block resizes both x and act(norm1 x) before the first convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        groups: int,
        *,
        groups_out: int | None = None,
        resample: Resample | None = None,
        project: bool | None = None,
    ) -> None:
        """`groups_out` are the second norm's, by default as the first's; `project` forces the 1x1 projection."""
        super().__init__()
        self.options = options
        self.resample: Resample | None = resample
        self.norm1 = GroupNorm(groups, in_channels, options.eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(options.embedding, out_channels * (2 if options.scale_shift else 1))
        self.norm2 = GroupNorm(groups_out or groups, out_channels, options.eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if project or (project is None and in_channels != out_channels):
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        """(B, H, W, in) to (B, H', W', out)."""
        activate = ACTIVATIONS[self.options.act_fn]
        hidden = self.norm1.activated(x, activate)
        if self.resample is not None:
            x, hidden = _resampled(x, self.resample), _resampled(hidden, self.resample)
        embedding = self.time_emb_proj(condition.activated)
        if self.options.scale_shift:
            scale, shift = mx.split(embedding[:, None, None, :], 2, axis=-1)
            hidden = activate(self.norm2(self.conv1(hidden)) * (1 + scale) + shift)
        else:
            # The norm takes both on its way: no pass over the image for them, in the gradient neither.
            shift = embedding + self.conv1.bias
            hidden = self.norm2.activated(self.conv1(hidden, biased=False), activate, shift)
        hidden = self.conv2(condition.dropout.drop(hidden, self.options.dropout))
        if "conv_shortcut" in self:
            x = self.conv_shortcut(x)
        return _rescaled(x + hidden, self.options.output_scale)


def _resampled(x: mx.array, how: Resample) -> mx.array:
    if how == "down":
        return average_pool(x)
    if how == "up":
        return ops.upsample_nearest(x)
    return smooth_down(x, "zero") if how == "smooth_down" else smooth_up(x, "zero")


def _rescaled(x: mx.array, divisor: float) -> mx.array:
    return x if divisor == 1 else x * (1 / divisor)


class Attention(nn.Module):
    """Every pixel attends to every pixel: x + W_o softmax(q kᵀ/√d) v of the normalised x, over heads of width d.

    Where d does not divide the channels the projections are narrower than x, as in Diffusers.
    """

    def __init__(
        self,
        channels: int,
        head_width: int,
        *,
        norm_groups: int | None,
        eps: float,
        output_scale: float = 1.0,
        residual: bool = True,
        stored_cross_norm: bool = False,
    ) -> None:
        """Without `norm_groups` there is no norm; `stored_cross_norm` adds the weights of one that is never applied."""
        super().__init__()
        self.heads, self.head_width = channels // head_width, head_width
        self.output_scale, self.residual = output_scale, residual
        inner = self.heads * head_width
        if norm_groups is not None:
            self.group_norm = GroupNorm(norm_groups, channels, eps)
        if stored_cross_norm:
            self.norm_cross = LayerNorm(channels)
        self.to_q = Linear(channels, inner)
        self.to_k = Linear(channels, inner)
        self.to_v = Linear(channels, inner)
        self.to_out = [Linear(inner, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) to the same shape."""
        b, h, w, c = x.shape
        hidden = x.reshape(b, h * w, c)
        if "group_norm" in self:
            hidden = self.group_norm(hidden)
        projections = (self.to_q, self.to_k, self.to_v)
        if isinstance(self.to_q, Linear):
            weights, biases = [each.weight for each in projections], [each.bias for each in projections]
            hidden = ops.self_attention(hidden, weights, biases, self.heads, self.head_width**-0.5)
        else:  # of few bits: each is a product of its own
            q, k, v = (each(hidden).reshape(b, h * w, self.heads, -1).swapaxes(1, 2) for each in projections)
            hidden = ops.attention(q, k, v, self.head_width**-0.5).swapaxes(1, 2).reshape(b, h * w, -1)
        hidden = self.to_out[0](hidden).reshape(b, h, w, c)
        return _rescaled(x + hidden if self.residual else hidden, self.output_scale)


class AdaGroupNorm(nn.Module):
    """Group norm without weights of its own, scaled and shifted by the embedding: norm(x)(1 + s) + b."""

    def __init__(self, embedding: int, channels: int, groups: int, eps: float) -> None:
        """`embedding` is the width of the embedding."""
        super().__init__()
        check_groups(groups, channels, "AdaGroupNorm")
        self.groups, self.eps = groups, eps
        self._one, self._zero = mx.ones((channels,)), mx.zeros((channels,))
        self.linear = Linear(embedding, 2 * channels)

    def __call__(self, x: mx.array, embedding: mx.array) -> mx.array:
        """Same shape as x (B, H, W, C)."""
        scale, shift = mx.split(self.linear(embedding)[:, None, None, :], 2, axis=-1)
        one, zero = self._one.astype(x.dtype), self._zero.astype(x.dtype)
        return ops.group_norm(x, self.groups, one, zero, self.eps) * (1 + scale) + shift


class ResnetBlockCondNorm2D(nn.Module):
    """The residual block of K-diffusion's U-Net: both norms are conditioned; the projection has no bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        *,
        groups: int,
        groups_out: int,
        last_channels: int | None = None,
    ) -> None:
        """`last_channels` leave the block, `out_channels` the first convolution; by default they are the same."""
        super().__init__()
        self.options = options
        last = last_channels or out_channels
        self.norm1 = AdaGroupNorm(options.embedding, in_channels, groups, options.eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = AdaGroupNorm(options.embedding, out_channels, groups_out, options.eps)
        self.conv2 = Conv2d(out_channels, last, 3, padding=1)
        if in_channels != last:
            self.conv_shortcut = Conv2d(in_channels, last, 1, bias=False)

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        """(B, H, W, in) to (B, H, W, out)."""
        activate = ACTIVATIONS[self.options.act_fn]
        hidden = self.conv1(activate(self.norm1(x, condition.embedding)))
        hidden = activate(self.norm2(hidden, condition.embedding))
        hidden = self.conv2(condition.dropout.drop(hidden, self.options.dropout))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + hidden
