"""Group normalisation with its gradient written out: sums over pixels once, everything else in rows of channels."""

from functools import lru_cache

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.models.cpu_ops.pointwise import first


@lru_cache(maxsize=64)
def _group_mean(channels: int, groups: int, pixels: int) -> np.ndarray:
    """(C, C): a row of sums over pixels, one a channel, times this is, for each channel, the mean over its group."""
    width = channels // groups
    return np.kron(np.eye(groups), np.full((width, width), 1 / (width * pixels))).astype(np.float32)


def _over_pixels(x: mx.array) -> mx.array:
    """(B, ..., C) to sums (B, C)."""
    return mx.sum(x, axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


@lru_cache(maxsize=64)
def _group_norm(groups: int, eps: float):
    """Group normalisation of x + shift, as a function with a gradient of its own.

    x is (B, ..., C), the shift (B, C) or left out. Rows are (B, C).
    """

    @mx.custom_function
    def normalise(x: mx.array, weight: mx.array, bias: mx.array, *shift: mx.array) -> tuple[mx.array, ...]:
        spread = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])  # a row of channels beside its pixels
        pixels = x.size // (x.shape[0] * x.shape[-1])
        mean_of_group = mx.array(_group_mean(x.shape[-1], groups, pixels))
        sums = _over_pixels(x)
        if shift:
            # x + shift is never formed: its sums and its distance from the mean follow from those of x.
            offset = (sums + pixels * shift[0]) @ mean_of_group - shift[0]
        else:
            offset = sums @ mean_of_group
        # The mean is taken off before squares are summed: E x² - (E x)² would lose digits where the mean is large.
        centred = x - offset.reshape(spread)
        scale = mx.rsqrt(_over_pixels(centred * centred) @ mean_of_group + eps)
        # Rows are multiplied before the reshape, which MLX does not fuse: once a row, not once a pixel.
        y = centred * (scale * weight).reshape(spread) + bias
        return (y, centred, scale, sums - pixels * offset) if shift else (y, centred, scale)

    @normalise.vjp
    def normalise_vjp(primals, cotangents, outputs):
        """With c = x - μ, r = 1/σ, g = dL/dy: dx = r (g w - mean(g w) - c r² mean(g w c)).

        The gradient of the shift is dx summed over pixels, which the sums of g and of c give.
        """
        _, weight, _, *shift = primals
        gradient, (_, centred, scale, *of_centred) = cotangents[0], outputs
        spread = (centred.shape[0], *[1] * (centred.ndim - 2), centred.shape[-1])
        pixels = centred.size // (centred.shape[0] * centred.shape[-1])
        weighted_mean = weight[:, None] * mx.array(_group_mean(weight.shape[0], groups, pixels))
        total, moment = _over_pixels(gradient), _over_pixels(gradient * centred)
        by_one, by_centred = (total @ weighted_mean) * scale, (moment @ weighted_mean) * (scale * scale * scale)
        of_gradient = scale * weight
        dx = gradient * of_gradient.reshape(spread) - by_one.reshape(spread) - centred * by_centred.reshape(spread)
        result = (dx, mx.sum(moment * scale, axis=0), mx.sum(total, axis=0))
        if not shift:
            return result
        return (*result, of_gradient * total - pixels * by_one - by_centred * of_centred[0])

    return normalise


def group_norm(
    x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float, shift: mx.array | None = None
) -> mx.array:
    """Group normalisation of x + shift over the last axis of (B, ..., C); the shift is (B, C)."""
    return first(_group_norm(groups, eps)(x, weight, bias, *([] if shift is None else [shift])))
