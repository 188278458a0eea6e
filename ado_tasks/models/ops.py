"""The array operations a U-Net is made of, each in the form that is fast on the device at hand. Images are NHWC.

On Metal and CUDA these are MLX's own, but for norms on CUDA (`cuda_norm.py`); on the CPU, in float32, those of
`cpu_ops`. Attention between many positions goes in blocks wherever no fused kernel has a gradient.
"""

from ado_tasks.backend import mx, on_cpu
from ado_tasks.models import cpu_ops, cuda_norm, half_ops
from ado_tasks.models.attention_choice import WHOLE_POSITIONS, cuda_fuses
from ado_tasks.models.chunked_attention import chunked_attention


def _in_cpu_form(x: mx.array) -> bool:
    return x.dtype == mx.float32 and on_cpu()


def _in_blocks(q: mx.array) -> bool:
    """Whether queries (B, heads, L, D) are too many for one block, and no fused kernel has a gradient."""
    _, _, length, width = q.shape
    if length <= WHOLE_POSITIONS:
        return False
    fused = mx.cuda.is_available() and cuda_fuses(half=q.dtype != mx.float32, head_width=width, positions=length)
    return on_cpu() or not fused


def silu(x: mx.array) -> mx.array:
    """X · sigmoid(x)."""
    return cpu_ops.silu(x) if _in_cpu_form(x) else x * mx.sigmoid(x)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """X Wᵀ + b over the last axis; W is (out, in)."""
    if _in_cpu_form(x):
        return cpu_ops.linear(x, weight, bias)
    if bias is not None and x.dtype == weight.dtype == bias.dtype != mx.float32:
        return half_ops.affine(x, weight, bias)
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def conv2d(x: mx.array, weight: mx.array, bias: mx.array | None, stride: int = 1, padding: int = 0) -> mx.array:
    """Convolution of (B, H, W, C) with (O, kH, kW, C)."""
    if _in_cpu_form(x):
        y = cpu_ops.conv2d(x, weight, stride, padding)
    else:
        y = mx.conv2d(x, weight, stride=stride, padding=padding)
    if bias is not None and y.dtype == bias.dtype != mx.float32:
        return half_ops.add_bias(y, bias)
    return y if bias is None else y + bias


def group_norm(
    x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float, shift: mx.array | None = None
) -> mx.array:
    """Group normalisation over the last axis of (B, ..., C); contiguous channels form a group, as in PyTorch.

    A `shift` (B, C) is added to every pixel of its image before.
    """
    if _in_cpu_form(x):
        return cpu_ops.group_norm(x, groups, weight, bias, eps, shift)
    if cuda_norm.fits(x, groups):
        return cuda_norm.group_norm(x, groups, weight, bias, eps, shift, silu=False)
    if x.dtype != mx.float32:  # statistics of halves are sums that a half cannot hold
        wide, weight, bias = (each.astype(mx.float32) for each in (x, weight, bias))
        shift = None if shift is None else shift.astype(mx.float32)
        return group_norm(wide, groups, weight, bias, eps, shift).astype(x.dtype)
    shape = x.shape
    if shift is not None:
        x = x + shift.reshape(shape[0], *[1] * (x.ndim - 2), shape[-1])
    y = x.reshape(shape[0], -1, groups, shape[-1] // groups)
    mean = mx.mean(y, axis=(1, 3), keepdims=True)
    var = mx.var(y, axis=(1, 3), keepdims=True)
    return ((y - mean) * mx.rsqrt(var + eps)).reshape(shape) * weight + bias


def group_norm_silu(
    x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float, shift: mx.array | None = None
) -> mx.array:
    """The SiLU of a group norm: one operation where there is one."""
    if cuda_norm.fits(x, groups):
        return cuda_norm.group_norm(x, groups, weight, bias, eps, shift, silu=True)
    return silu(group_norm(x, groups, weight, bias, eps, shift))


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for (B, heads, L, D). Memory is linear in L beyond WHOLE_POSITIONS."""
    if _in_blocks(q):
        return chunked_attention(q, k, v, scale)
    if _in_cpu_form(q):
        return cpu_ops.attention(q, k, v, scale)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


def self_attention(x: mx.array, weights: list[mx.array], biases: list[mx.array], heads: int, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for q, k, v = x W_iᵀ + b_i, x (B, L, C) and W (heads·D, C), to (B, L, heads·D)."""
    if _in_cpu_form(x) and x.shape[1] <= WHOLE_POSITIONS:
        return cpu_ops.self_attention(x, weights, biases, heads, scale)
    b, length, _ = x.shape
    q, k, v = (
        linear(x, weight, bias).reshape(b, length, heads, -1).transpose(0, 2, 1, 3)
        for weight, bias in zip(weights, biases, strict=True)
    )
    return attention(q, k, v, scale).transpose(0, 2, 1, 3).reshape(b, length, -1)


def upsample_nearest(x: mx.array) -> mx.array:
    """Twice the height and width of (B, H, W, C), each pixel repeated."""
    b, h, w, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def upsample_conv2d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Twice the height and width, each pixel repeated, then a convolution with (O, 3, 3, C) and padding 1."""
    if _in_cpu_form(x):
        return cpu_ops.upsample_conv2d(x, weight, bias)
    return conv2d(upsample_nearest(x), weight, bias, padding=1)
