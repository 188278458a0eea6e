"""Convolutions as a patch matrix and one product, in both directions; MLX's own gather through general strides."""

from functools import lru_cache
from typing import cast

from ado_tasks.backend import mx
from ado_tasks.models.cpu_ops.linear import linear


def patches(x: mx.array, kernel: tuple[int, int], stride: int) -> mx.array:
    """The patch under each output pixel as a row: (B, H, W, C), already padded, to (B·H'·W', kH·kW·C)."""
    b, h, w, c = x.shape
    (kh, kw), row = kernel, w * c
    out_h, out_w = (h - kh) // stride + 1, (w - kw) // stride + 1
    # One row of a patch is contiguous in memory: kW·C elements are copied at once.
    view = mx.as_strided(x, (b, out_h, out_w, kh, kw * c), (h * row, stride * row, stride * c, row, 1))
    # A sum with zero goes through MLX's vectorised loop; a plain copy of a strided view takes twice as long.
    return (view + 0.0).reshape(b * out_h * out_w, kh * kw * c)


def padded(x: mx.array, low: int, high: int) -> mx.array:
    """`low` rows and columns of zeros before and `high` after, on both axes of (B, H, W, C); contiguous."""
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
        columns = patches(padded(x, padding, padding), (kh, kw), stride)
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
    """Both from the patches of the output's gradient: dx = patches · W flipped, dW = patchesᵀ · x, flipped."""
    o, kh, kw, c = weight.shape
    columns = patches(padded(gradient, kh - 1 - padding, kh - 1 - padding), (kh, kw), 1)
    if 2 * c < o:  # few channels, and often no need for dx: an image that enters the network
        rows = patches(padded(x, padding, padding), (kh, kw), 1)
        dw = (gradient.reshape(-1, o).T @ rows).reshape(weight.shape)
    else:
        dw = (columns.T @ x.reshape(-1, c)).reshape(kh, kw, o, c)[::-1, ::-1].transpose(2, 0, 1, 3)
    flipped = weight[:, ::-1, ::-1, :].transpose(1, 2, 0, 3).reshape(kh * kw * o, c)
    dx = (columns @ flipped).reshape(x.shape)
    return dx, dw


def _stride_2_vjp(x: mx.array, weight: mx.array, gradient: mx.array, padding: int) -> tuple[mx.array, mx.array]:
    """A 3x3 kernel of stride 2 is a 2x2 kernel of stride 1 on squares of 2x2 pixels; so is its gradient."""
    o, _, _, c = weight.shape
    b, h, w, _ = x.shape
    _, out_h, out_w, _ = gradient.shape
    columns = patches(padded(x, padding, padding), (3, 3), 2)
    dw = (gradient.reshape(-1, o).T @ columns).reshape(weight.shape)
    # Row 2j of the padded input meets kernel row 0 of output j and row 2 of output j - 1; row 2j + 1 meets row 1 of j.
    taps = mx.pad(weight, [(0, 0), (0, 1), (0, 1), (0, 0)]).reshape(
        o, 2, 2, 2, 2, c
    )  # (o, i', a, j', b, c): row 2i' + a
    taps = taps[:, ::-1, :, ::-1].transpose(1, 3, 0, 2, 4, 5).reshape(4 * o, 4 * c)
    squares = patches(padded(gradient, 1, 1), (2, 2), 1) @ taps
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
