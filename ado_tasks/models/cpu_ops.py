"""The operations of `ops.py` in the form that is fast on MLX's CPU backend, each with its gradient written out.

What that backend is slow at, and what stands here instead (262,144 elements, one core): `exp` and `sigmoid` go element
by element (5 ms: polynomials take 1); `where` and `floor` branch (1.5 ms: arithmetic takes 0.1); the gradients
of a convolution gather through general strides (a patch matrix and one matrix product instead). Nothing here runs on a
GPU. These forms are meant for `mx.compile`, which fuses their arithmetic; without it they are right and slower.
"""

import math
from functools import lru_cache
from typing import Any, cast

import numpy as np

from ado_tasks.backend import mx

LOG2_E = 1.4426950408889634
# Adding 1.5·2^23 gives a float32 whose spacing is 1: the sum is rounded to an integer, which sits in its lowest bits.
ROUND = 12582912.0
# Taylor coefficients of 2^f, (ln 2)^k / k!. At |f| <= 1/2 what is left out is (ln 2 / 2)^7 / 7! = 1.2e-7.
EXP2 = tuple(math.log(2.0) ** k / math.factorial(k) for k in range(7))

# sigmoid(x) = 1/2 + x P(x²)/Q(x²) for |x| <= 18, where float32's sigmoid has become 0 or 1. Fitted by iterated
# weighted least squares to tanh(x/2)/2x in float64 (largest error 9e-9; 2.2e-7 when evaluated in float32).
SATURATED = 18.0
SIGMOID_P = (0.249999977, 0.00835824554, 5.4477754e-05, 7.9967741e-08, 1.2875106e-11)
SIGMOID_Q = (1.0, 0.116766224, 0.00161512234, 5.11152552e-06, 3.00883384e-09)
ALMOST_HALF = (
    0.5 - 2.0**-24
)  # so that rounding never leaves a positive sigmoid beyond -18, which a huge x would blow up


def _quartic(c: tuple[float, ...], t: mx.array) -> mx.array:
    """c_0 + c_1 t + ... + c_4 t⁴ by Estrin's scheme: few operations deep, so that MLX fuses it into one kernel."""
    square = t * t
    return (c[0] + c[1] * t) + square * ((c[2] + c[3] * t) + square * c[4])


def _first(outputs: Any) -> mx.array:
    """The value of a custom function; the other outputs are what its gradient saves."""
    return outputs[0]


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x) with an absolute error below 3e-7. NaN stays NaN."""
    t = mx.minimum(x * x, SATURATED**2)
    # Beyond ±18 the quotient stays and x grows: the result leaves [0, 1] and is cut.
    return mx.minimum(mx.maximum(x * _quartic(SIGMOID_P, t) / _quartic(SIGMOID_Q, t) + ALMOST_HALF, 0.0), 1.0)


@mx.custom_function
def _silu(x: mx.array) -> tuple[mx.array, mx.array]:
    s = sigmoid(x)
    return x * s, s


@_silu.vjp
def _silu_vjp(primal, cotangents, outputs):
    """d(x s)/dx = s + x s (1 - s), from the saved sigmoid: no second polynomial."""
    y, s = outputs
    return cotangents[0] * (s + y * (1 - s))


def silu(x: mx.array) -> mx.array:
    """The product x · sigmoid(x), error below 3e-7 · max(|x|, 1)."""
    return _first(_silu(x))


def exp2_of_nonpositive(z: mx.array) -> mx.array:
    """2^z for z <= 0, relative error below 3e-7; below 2^-126 it stays 2^-126 (denormals are slow). NaN stays NaN."""
    z = mx.maximum(z, -126.0)
    rounded = z + ROUND
    power = ((rounded.view(mx.int32) << 23) + (127 << 23)).view(mx.float32)  # n in the exponent's bits is 2^n
    f = z - (rounded - ROUND)
    f2 = f * f
    high = (EXP2[4] + EXP2[5] * f) + f2 * EXP2[6]
    return ((EXP2[0] + EXP2[1] * f) + f2 * ((EXP2[2] + EXP2[3] * f) + f2 * high)) * power


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """X Wᵀ + b over the last axis. Flattened first, so that the weight's gradient is one product."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        flat = flat + bias
    return flat.reshape(*x.shape[:-1], weight.shape[0])


# --- convolution


def _patches(x: mx.array, kernel: tuple[int, int], stride: int) -> mx.array:
    """The patch under each output pixel as a row: (B, H, W, C), already padded, to (B·H'·W', kH·kW·C)."""
    b, h, w, c = x.shape
    (kh, kw), row = kernel, w * c
    out_h, out_w = (h - kh) // stride + 1, (w - kw) // stride + 1
    # One row of a patch is contiguous in memory: kW·C elements are copied at once.
    view = mx.as_strided(x, (b, out_h, out_w, kh, kw * c), (h * row, stride * row, stride * c, row, 1))
    # A sum with zero goes through MLX's vectorised loop; a plain copy of a strided view takes twice as long.
    return (view + 0.0).reshape(b * out_h * out_w, kh * kw * c)


def _padded(x: mx.array, low: int, high: int) -> mx.array:
    return mx.pad(x, [(0, 0), (low, high), (low, high), (0, 0)]) if low or high else mx.contiguous(x)


def _rows(weight: mx.array) -> mx.array:
    """(O, kH, kW, C) as the matrix that patches are multiplied with: (kH·kW·C, O)."""
    return weight.reshape(weight.shape[0], -1).T


@lru_cache(maxsize=64)
def _convolution(stride: int, padding: int):
    """The convolution of this stride and padding, as a function with a gradient of its own."""

    @mx.custom_function
    def convolve(x: mx.array, weight: mx.array) -> mx.array:
        o, kh, kw, _ = weight.shape
        b, h, w, _ = x.shape
        columns = _patches(_padded(x, padding, padding), (kh, kw), stride)
        out_h, out_w = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
        return (columns @ _rows(weight)).reshape(b, out_h, out_w, o)

    @convolve.vjp
    def convolve_vjp(primals, gradient, output):
        x, weight = primals
        dx, dw = (_stride_1_vjp if stride == 1 else _stride_2_vjp)(x, weight, gradient, padding)
        # Where nothing ties them, MLX may leave all dW for the end and keep every patch matrix until then.
        return mx.depends([dx], [dw])[0], dw

    return convolve


def _stride_1_vjp(x: mx.array, weight: mx.array, gradient: mx.array, padding: int) -> tuple[mx.array, mx.array]:
    """Both from the patches of the output's gradient: dx = patches · W flipped, dW = xᵀ · patches."""
    o, kh, kw, c = weight.shape
    columns = _patches(_padded(gradient, kh - 1 - padding, kh - 1 - padding), (kh, kw), 1)
    flipped = weight[:, ::-1, ::-1, :].transpose(1, 2, 0, 3).reshape(kh * kw * o, c)
    dx = (columns @ flipped).reshape(x.shape)
    dw = (x.reshape(-1, c).T @ columns).reshape(c, kh, kw, o)
    return dx, dw[:, ::-1, ::-1, :].transpose(3, 1, 2, 0)


def _stride_2_vjp(x: mx.array, weight: mx.array, gradient: mx.array, padding: int) -> tuple[mx.array, mx.array]:
    """A 3x3 kernel of stride 2 is a 2x2 kernel of stride 1 on squares of 2x2 pixels; so is its gradient."""
    o, _, _, c = weight.shape
    b, h, w, _ = x.shape
    _, out_h, out_w, _ = gradient.shape
    columns = _patches(_padded(x, padding, padding), (3, 3), 2)
    dw = (gradient.reshape(-1, o).T @ columns).reshape(weight.shape)
    # Row 2j of the padded input meets kernel row 0 of output j and row 2 of output j - 1; row 2j + 1 meets row 1 of j.
    taps = mx.pad(weight, [(0, 0), (0, 1), (0, 1), (0, 0)]).reshape(
        o, 2, 2, 2, 2, c
    )  # (o, i', a, j', b, c): row 2i' + a
    taps = taps[:, ::-1, :, ::-1].transpose(1, 3, 0, 2, 4, 5).reshape(4 * o, 4 * c)
    squares = _patches(_padded(gradient, 1, 1), (2, 2), 1) @ taps
    squares = squares.reshape(b, out_h + 1, out_w + 1, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    dx = squares.reshape(b, 2 * out_h + 2, 2 * out_w + 2, c)
    return dx[:, padding : padding + h, padding : padding + w], dw


def conv2d(x: mx.array, weight: mx.array, stride: int, padding: int) -> mx.array:
    """Convolution of (B, H, W, C) with (O, k, k, C), without bias, for the kernels that U-Nets have."""
    o, kh, kw, c = weight.shape
    if kh == kw == 1 and stride == 1 and padding == 0:
        return linear(x, weight.reshape(o, c), None)
    if kh == kw and ((stride == 1 and padding < kh) or (stride == 2 and kh == 3 and padding <= 1)):
        return cast("mx.array", _convolution(stride, padding)(x, weight))
    return mx.conv2d(x, weight, stride=stride, padding=padding)


# --- normalisation


@lru_cache(maxsize=64)
def _group_mean(channels: int, groups: int, pixels: int) -> np.ndarray:
    """(C, C): a row of sums over pixels, one a channel, times this is, for each channel, the mean over its group."""
    width = channels // groups
    return np.kron(np.eye(groups), np.full((width, width), 1 / (width * pixels))).astype(np.float32)


@lru_cache(maxsize=64)
def _group_norm(groups: int, eps: float):
    """Group normalisation of (B, N, C), as a function with a gradient of its own. Sums over pixels are (B, 1, C)."""

    @mx.custom_function
    def normalise(x: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        mean_of_group = mx.array(_group_mean(x.shape[2], groups, x.shape[1]))
        # The mean is taken off before squares are summed: E x² - (E x)² would lose digits where the mean is large.
        centred = x - mx.sum(x, axis=1, keepdims=True) @ mean_of_group
        scale = mx.rsqrt(mx.sum(centred * centred, axis=1, keepdims=True) @ mean_of_group + eps)
        return centred * (_apart(scale) * weight) + bias, centred, scale

    @normalise.vjp
    def normalise_vjp(primals, cotangents, outputs):
        """With c = x - μ, r = 1/σ, g = dL/dy: dx = r (g w - mean(g w) - c r² mean(g w c))."""
        _, weight, _ = primals
        gradient, (_, centred, scale) = cotangents[0], outputs
        weighted_mean = weight[:, None] * mx.array(_group_mean(weight.shape[0], groups, centred.shape[1]))
        total = mx.sum(gradient, axis=1, keepdims=True)
        moment = mx.sum(gradient * centred, axis=1, keepdims=True)
        by_one, by_centred = total @ weighted_mean, moment @ weighted_mean
        dx = scale * (gradient * weight - by_one - centred * (by_centred * scale * scale))
        return dx, mx.sum(moment * scale, axis=(0, 1)), mx.sum(total, axis=(0, 1))

    return normalise


def _apart(x: mx.array) -> mx.array:
    """The same array, behind an operation that MLX does not fuse: what makes x is done once, not a pixel."""
    return x.reshape(x.shape[0], -1).reshape(x.shape)


def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalisation over the last axis of (B, ..., C)."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return _first(_group_norm(groups, eps)(flat, weight, bias)).reshape(x.shape)


# --- attention


@mx.custom_function
def _attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """softmax₂(q kᵀ) v with powers of two: q carries the scale and log₂ e."""
    scores = q @ k.swapaxes(-1, -2)
    weights = exp2_of_nonpositive(scores - mx.max(scores, axis=-1, keepdims=True))
    inverse = 1 / mx.sum(weights, axis=-1, keepdims=True)
    return (weights @ v) * inverse, weights, inverse


@_attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    """With p = weights · inverse: dv = pᵀ do, ds = p (do vᵀ - Σ do o) ln 2, dq = ds k, dk = dsᵀ q."""
    q, k, v = primals
    out, weights, inverse = outputs
    gradient = cotangents[0] * inverse
    shared = mx.sum(gradient * out, axis=-1, keepdims=True)
    scores = weights * (gradient @ v.swapaxes(-1, -2) - shared) * math.log(2.0)
    return scores @ k, scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ gradient


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for (B, heads, L, D)."""
    return _first(_attend(q * (scale * LOG2_E), k, v))
