"""Sums over images that gradients of halves need, in float32: MLX on CUDA adds halves up in halves."""

from typing import cast

from ado_tasks.backend import mx
from ado_tasks.models import cuda_norm


def column_sums(x: mx.array) -> mx.array:
    """Σ over all but the last axis, (C,) float32."""
    if cuda_norm.fits(x):
        return cuda_norm.column_sums(x)
    return mx.sum(x.reshape(-1, x.shape[-1]).astype(mx.float32), axis=0)


def add_bias(x: mx.array, bias: mx.array) -> mx.array:
    """Add b (C,) to x (..., C)."""
    return cast("mx.array", _add_bias(x, bias))


def affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """X Wᵀ + b over the last axis; W is (out, in)."""
    return cast("mx.array", _affine(x, weight, bias))


@mx.custom_function
def _add_bias(x: mx.array, bias: mx.array) -> mx.array:
    return x + bias


@_add_bias.vjp
def _add_bias_vjp(primals, gradient, output):
    return gradient, column_sums(gradient).astype(primals[1].dtype)


@mx.custom_function
def _affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


@_affine.vjp
def _affine_vjp(primals, gradient, output):
    x, weight, bias = primals
    flat = gradient.reshape(-1, gradient.shape[-1])
    dw = flat.T @ x.reshape(-1, x.shape[-1])
    return gradient @ weight, dw, column_sums(flat).astype(bias.dtype)
