"""Halving and doubling height and width of (B, H, W, C): strided or averaged, repeated, and with a smooth filter."""

from typing import Literal

from ado_tasks.backend import mx, nn
from ado_tasks.models import ops
from ado_tasks.models.layers import Conv2d

Edge = Literal["zero", "reflect"]


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2. Padding 0 means: one row below and one column to the right, as Diffusers has it."""

    def __init__(self, channels: int, padding: int) -> None:
        """`padding` is 0 or 1."""
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) to (B, H/2, W/2, C)."""
        return self.conv(x if self.padding else mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample2D(nn.Module):
    """Each pixel repeated, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        """The convolution keeps the number of channels."""
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) to (B, 2H, 2W, C)."""
        return ops.upsample_conv2d(x, self.conv.weight, self.conv.bias)


def average_pool(x: mx.array) -> mx.array:
    """Mean of each 2x2 square: (B, H, W, C) to (B, H/2, W/2, C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def smooth_down(x: mx.array, edge: Edge) -> mx.array:
    """Filter with (1, 3, 3, 1)/8 along both axes and keep every second pixel.

    y_i = (x_(2i−1) + 3 x_(2i) + 3 x_(2i+1) + x_(2i+2))/8: the FIR resampling of StyleGAN2 (Karras et al. 2020).
    Diffusers convolves a padded image; sums of shifted views are the same numbers without a strided convolution, whose
    input gradient is slow on a CPU.
    """
    return _halve(_halve(x, 1, edge), 2, edge)


def smooth_up(x: mx.array, edge: Edge) -> mx.array:
    """The transposed filter, times two an axis: y_(2i) = (x_(i−1) + 3 x_i)/4 and y_(2i+1) = (3 x_i + x_(i+1))/4."""
    return _double(_double(x, 1, edge), 2, edge)


def _padded(x: mx.array, axis: int, edge: Edge) -> mx.array:
    """One more row at either end of `axis`: zeros, or the second and the last but one (reflection without the edge)."""
    if edge == "zero":
        return mx.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)])
    size = x.shape[axis]
    return mx.concatenate([_part(x, axis, 1, 2), x, _part(x, axis, size - 2, size - 1)], axis=axis)


def _part(x: mx.array, axis: int, start: int, stop: int) -> mx.array:
    return x[(slice(None),) * axis + (slice(start, stop),)]


def _halve(x: mx.array, axis: int, edge: Edge) -> mx.array:
    padded = _padded(x, axis, edge)
    half = x.shape[axis] // 2
    pairs = padded.reshape(*x.shape[:axis], half + 1, 2, *x.shape[axis + 1 :])
    odd, even = mx.split(pairs, 2, axis=axis + 1)  # x_(2i−1) and x_(2i)
    odd, even = mx.squeeze(odd, axis + 1), mx.squeeze(even, axis + 1)
    outer = _part(odd, axis, 0, half) + _part(even, axis, 1, half + 1)
    inner = _part(even, axis, 0, half) + _part(odd, axis, 1, half + 1)
    return 0.125 * outer + 0.375 * inner


def _double(x: mx.array, axis: int, edge: Edge) -> mx.array:
    padded, size = _padded(x, axis, edge), x.shape[axis]
    before, after = _part(padded, axis, 0, size), _part(padded, axis, 2, size + 2)
    pairs = mx.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
