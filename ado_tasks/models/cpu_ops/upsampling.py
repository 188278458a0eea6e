"""A 3x3 convolution of an image of twice the size, from the small image: 16 products a small pixel instead of 36.

Along one axis y_p = Σ_u w_u x_⌊(p+u-1)/2⌋, so that x_i reaches four outputs: y_(2i-1+s) += k_s x_i with
k = (w2, w1 + w2, w0 + w1, w0). In two dimensions k = F w Fᵀ for each pair of channels.
"""

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.models.cpu_ops.convolution import padded, patches

# (4, 3): k = F w along one axis.
_SPREAD = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=np.float32)
# (16, 9): both axes, rows (s, t).
_BOTH = np.kron(_SPREAD, _SPREAD)
# The same rows in the order (a, b, r, q): row r of a window, x_(i-1) or x_i, meets output 2i - 1 + a by s = 2(1-r) + a.
_BY_WINDOW = _BOTH.reshape(2, 2, 2, 2, 9)[::-1, :, ::-1].transpose(1, 3, 0, 2, 4).reshape(16, 9).copy()


def _taps(weight: mx.array) -> mx.array:
    """(O, 3, 3, C) as (9, O·C)."""
    return weight.transpose(1, 2, 0, 3).reshape(9, -1)


@mx.custom_function
def _upsample_convolve(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    (b, h, w, c), o = x.shape, weight.shape[0]
    kernel = (mx.array(_BY_WINDOW) @ _taps(weight)).reshape(4, 4, o, c).transpose(0, 2, 1, 3).reshape(4 * o, 4 * c)
    # (B·(H+1)·(W+1), 4·O): what the 2x2 window (i, j) gives to outputs 2i - 1 + a, 2j - 1 + b.
    squares = patches(padded(x, 1, 1), (2, 2), 1) @ kernel.T
    # Output 2i + a' is a = 1 of window i or a = 0 of window i + 1: one stride, since both grow together.
    across, down = 4 * o, (w + 1) * 4 * o
    strides = ((h + 1) * down, down, down - 2 * o, across, across - o, 1)
    view = mx.as_strided(squares, (b, h, 2, w, 2, o), strides, 3 * o)
    return (view + bias).reshape(b, 2 * h, 2 * w, o)


@_upsample_convolve.vjp
def _upsample_convolve_vjp(primals, gradient, output):
    """The small image meets 4x4 patches of g: dx = patches(g, stride 2) k, dk = patchesᵀ x, dw = Fᵀ dk F."""
    x, weight, _ = primals
    o, c = weight.shape[0], x.shape[-1]
    columns = patches(padded(gradient, 1, 1), (4, 4), 2)  # (B·H·W, 16·O)
    kernel = (mx.array(_BOTH) @ _taps(weight)).reshape(16 * o, c)
    dx = (columns @ kernel).reshape(x.shape)
    dk = (columns.T @ x.reshape(-1, c)).reshape(16, o * c)
    dw = (mx.array(_BOTH.T.copy()) @ dk).reshape(3, 3, o, c).transpose(2, 0, 1, 3)
    dx = mx.depends([dx], [dw])[0]  # as in convolution.py
    return dx, dw, mx.sum(gradient, axis=(0, 1, 2))


def upsample_conv2d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """(B, H, W, C), each pixel repeated to 2x2, convolved with (O, 3, 3, C) and padding 1, to (B, 2H, 2W, O)."""
    return _upsample_convolve(x, weight, bias)  # pyright: ignore[reportReturnType]
