"""The array operations a U-Net is made of, each in the form that is fast on the device at hand. Images are NHWC."""

from ado_tasks.backend import mx


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x)."""
    return x * mx.sigmoid(x)


def conv2d(x: mx.array, weight: mx.array, bias: mx.array | None, stride: int = 1, padding: int = 0) -> mx.array:
    """Convolution of (B, H, W, C) with (O, kH, kW, C)."""
    y = mx.conv2d(x, weight, stride=stride, padding=padding)
    return y if bias is None else y + bias


def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalisation over the last axis as PyTorch defines it: contiguous channels form a group. x is (B, ..., C)."""
    shape = x.shape
    y = x.reshape(shape[0], -1, groups, shape[-1] // groups)
    mean = mx.mean(y, axis=(1, 3), keepdims=True)
    var = mx.var(y, axis=(1, 3), keepdims=True)
    return ((y - mean) * mx.rsqrt(var + eps)).reshape(shape) * weight + bias


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for (B, heads, L, D)."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


def upsample_nearest(x: mx.array) -> mx.array:
    """Twice the height and width of (B, H, W, C), each pixel repeated."""
    b, h, w, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
