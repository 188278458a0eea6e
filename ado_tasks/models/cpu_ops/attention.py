"""Attention with powers of two, its gradient written out, and self-attention whose q, k and v are one product."""

import math
from functools import lru_cache

from ado_tasks.backend import mx
from ado_tasks.models.cpu_ops.linear import linear
from ado_tasks.models.cpu_ops.pointwise import exp2_of_nonpositive, first

LOG2_E = 1.4426950408889634


def _attended(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """softmax₂(q kᵀ) v before its division, what it is to be multiplied with instead, and the weights."""
    scores = q @ k.swapaxes(-1, -2)
    weights = exp2_of_nonpositive(scores - mx.max(scores, axis=-1, keepdims=True))
    return weights @ v, 1 / mx.sum(weights, axis=-1, keepdims=True), weights


def _gradients(
    q: mx.array, k: mx.array, v: mx.array, weights: mx.array, gradient: mx.array, shared: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """With p the weights divided by their sums: dv = pᵀ do, ds = p (do vᵀ - Σ do o) ln 2, dq = ds k, dk = dsᵀ q.

    `gradient` is do, `shared` Σ do o, both divided by the sums of the weights.
    """
    scores = weights * (gradient @ v.swapaxes(-1, -2) - shared) * math.log(2.0)
    return scores @ k, scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ gradient


@mx.custom_function
def _attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """softmax₂(q kᵀ) v with powers of two: q carries the scale and log₂ e."""
    out, inverse, weights = _attended(q, k, v)
    return out * inverse, weights, inverse


@_attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    q, k, v = primals
    out, weights, inverse = outputs
    gradient = cotangents[0] * inverse
    return _gradients(q, k, v, weights, gradient, mx.sum(gradient * out, axis=-1, keepdims=True))


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for (B, heads, L, D)."""
    return first(_attend(q * (scale * LOG2_E), k, v))


def _thirds(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Views of x[0], x[1] and x[2], which are q, k and v; an index would copy."""
    q, k, v = (part.reshape(x.shape[1:]) for part in mx.split(x, 3))
    return q, k, v


@lru_cache(maxsize=64)
def _self_attend(heads: int):
    """Attention of (B, L, 3·heads·D), rows of q, k and v, to (B, L, heads·D): heads are moved in passes made anyway."""

    @mx.custom_function
    def attend(rows: mx.array, bias: mx.array) -> tuple[mx.array, ...]:
        b, length, width = rows.shape
        d = width // (3 * heads)
        apart = rows.reshape(b, length, 3, heads, d).transpose(2, 0, 3, 1, 4) + bias.reshape(3, 1, heads, 1, d)
        q, k, v = _thirds(apart)
        out, inverse, weights = _attended(q, k, v)
        out = out.transpose(0, 2, 1, 3) * inverse.transpose(0, 2, 1, 3)
        return out.reshape(b, length, heads * d), weights, inverse, apart

    @attend.vjp
    def attend_vjp(primals, cotangents, outputs):
        out, weights, inverse, apart = outputs
        b, length, width = out.shape
        apart_shape = (b, length, heads, width // heads)
        shared = mx.sum((cotangents[0] * out).reshape(apart_shape), axis=-1, keepdims=True)
        gradient = cotangents[0].reshape(apart_shape).transpose(0, 2, 1, 3) * inverse
        parts = _gradients(*_thirds(apart), weights, gradient, shared.transpose(0, 2, 1, 3) * inverse)
        joined = mx.concatenate([part.transpose(0, 2, 1, 3) for part in parts], axis=2).reshape(b, length, 3 * width)
        return joined, mx.sum(joined, axis=(0, 1))

    return attend


def self_attention(x: mx.array, weights: list[mx.array], biases: list[mx.array], heads: int, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for q, k, v = x W_iᵀ + b_i, x (B, L, C) and W (heads·D, C), to (B, L, heads·D)."""
    scale = scale * LOG2_E
    rows = linear(x, mx.concatenate([weights[0] * scale, *weights[1:]]), None)
    return first(_self_attend(heads)(rows, mx.concatenate([biases[0] * scale, *biases[1:]])))
