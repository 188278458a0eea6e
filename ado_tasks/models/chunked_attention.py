"""Exact attention whose memory grows with the positions, not with their square, its gradient included.

Rabe & Staats 2021, "Self-attention does not need O(n²) memory"; the gradient from recomputed weights: Dao et al. 2022,
"FlashAttention", appendix B. A block of queries meets one block of keys after another; a running maximum m and sum l
(Milakov & Gimelshein 2018, algorithm 3) make the softmax exact:

    m' = max(m, max s),   l' = l 2^(m - m') + Σ 2^(s - m'),   o' = o 2^(m - m') + 2^(s - m') v,   o = o_last / l_last

Only o and m + log₂ l are kept for the gradient, which computes each block of weights anew.
"""

from collections.abc import Callable, Iterator

from ado_tasks.backend import mx, on_cpu
from ado_tasks.models.attention_choice import METAL_WIDTHS, block_sizes, fused_queries
from ado_tasks.models.cpu_ops.attention import LOG2_E
from ado_tasks.models.cpu_ops.pointwise import exp2_of_nonpositive, first

LN_2 = 0.6931471805599453


def _exp2(z: mx.array) -> mx.array:
    """2^z for z <= 0 (or above it by a rounding error)."""
    return exp2_of_nonpositive(z) if on_cpu() else mx.exp(z * LN_2)


def _sizes(q: mx.array) -> tuple[int, int]:
    """Queries and keys of a block."""
    return block_sizes(q.shape[0] * q.shape[1], cpu=on_cpu())


def _starts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _after(x: mx.array, done: mx.array | None) -> mx.array:
    """X, not before `done` is computed: MLX may otherwise compute all blocks first and then use them."""
    return x if done is None else mx.depends([x], [done])[0]


def _scores(q: mx.array, k: mx.array) -> mx.array:
    """Float32, whatever the type of q: a sum of many weights is not exact in a half."""
    return (q @ k.swapaxes(-1, -2)).astype(mx.float32)


def _block(q: mx.array, k: mx.array, v: mx.array | None, size: int) -> tuple[mx.array | None, mx.array]:
    """One block of queries, all keys, `size` at a time: softmax₂(q kᵀ) v, without v none; and log₂ Σ 2^(q kᵀ)."""
    out = None
    peak = total = mx.array(0.0)
    for number, at in enumerate(_starts(k.shape[2], size)):
        scores = _scores(_after(q, total if number else None), k[:, :, at])
        high = mx.max(scores, axis=-1, keepdims=True)
        high = mx.maximum(peak, high) if number else high
        weights = _exp2(scores - high)
        former = _exp2(peak - high) if number else None
        part = mx.sum(weights, axis=-1, keepdims=True)
        total = part if former is None else total * former + part
        if v is not None:
            part = (weights.astype(v.dtype) @ v[:, :, at]).astype(mx.float32)
            out = part if out is None or former is None else out * former + part
        peak = high
    return None if out is None else out / total, peak + mx.log2(total)


def _forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    outs: list[mx.array] = []
    logs: list[mx.array] = []
    queries, keys = _sizes(q)
    for at in _starts(q.shape[2], queries):
        out, log = _block(_after(q[:, :, at], outs[-1] if outs else None), k, v, keys)
        assert out is not None
        outs.append(out.astype(q.dtype))
        logs.append(log)
    return mx.concatenate(outs, axis=2), mx.concatenate(logs, axis=2)


def _backward(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, log: mx.array | None, gradient: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """With p = 2^(q kᵀ - log): dv = pᵀ do, ds = p (do vᵀ - Σ do o) ln 2, dq = ds k, dk = dsᵀ q, block by block."""
    size, of_keys = _sizes(q)
    keys = list(_starts(k.shape[2], of_keys))
    dk: list[mx.array | None] = [None] * len(keys)
    dv: list[mx.array | None] = [None] * len(keys)
    dq: list[mx.array] = []
    done: mx.array | None = None
    for at in _starts(q.shape[2], size):
        queries, do = _after(q[:, :, at], done), gradient[:, :, at]
        lowered = log[:, :, at] if log is not None else _block(queries, k, None, of_keys)[1]
        shared = mx.sum(do.astype(mx.float32) * out[:, :, at], axis=-1, keepdims=True)
        own: mx.array | None = None
        for number, of in enumerate(keys):
            block_k, block_v, block_q = k[:, :, of], v[:, :, of], _after(queries, done)
            weights = _exp2(_scores(block_q, block_k) - lowered)
            slopes = (weights * (_scores(do, block_v) - shared) * LN_2).astype(q.dtype)
            own = _sum(own, slopes @ block_k)
            dk[number] = _sum(dk[number], slopes.swapaxes(-1, -2) @ block_q)
            dv[number] = done = _sum(dv[number], weights.astype(q.dtype).swapaxes(-1, -2) @ do)
            # What comes next waits for all three: else one of them may be left for the end, and its weights be kept.
            done = mx.depends([done], [each for each in (own, dk[number]) if each is not None])[0]
        assert own is not None
        dq.append(own)
    return tuple(mx.concatenate(parts, axis=2).astype(q.dtype) for parts in (dq, dk, dv))  # pyright: ignore


def _sum(former: mx.array | None, part: mx.array) -> mx.array:
    """Float32 sums over blocks."""
    part = part.astype(mx.float32)
    return part if former is None else former + part


@mx.custom_function
def _chunked(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    return _forward(q, k, v)


@_chunked.vjp
def _chunked_vjp(primals, cotangents, outputs):
    q, k, v = primals
    return _backward(q, k, v, outputs[0], outputs[1], cotangents[0])


@mx.custom_function
def _fused_forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Blocks of queries through Metal's fused kernel, which is not taken while gradients are traced.

    MLX then makes the scores of one block with all keys, and of no more.
    """
    outs: list[mx.array] = []
    for at in _starts(q.shape[2], fused_queries(q.shape[0] * q.shape[1], k.shape[2])):
        queries = _after(q[:, :, at], outs[-1] if outs else None)
        outs.append(mx.fast.scaled_dot_product_attention(queries, k, v, scale=LN_2))
    return mx.concatenate(outs, axis=2)


@_fused_forward.vjp
def _fused_forward_vjp(primals, gradient, output):
    q, k, v = primals
    return _backward(q, k, v, output, None, gradient)


def chunked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q kᵀ · scale) v for (B, heads, L, D) in blocks of positions (`block_sizes`).

    Equal to the softmax over all keys at once up to rounding (tests: 1e-5 relative in float32, values and gradients).
    """
    q = q * (scale * LOG2_E)
    if on_cpu() or mx.cuda.is_available() or q.shape[-1] not in METAL_WIDTHS:
        return first(_chunked(q, k, v))
    whole: Callable[..., mx.array] = _fused_forward  # pyright: ignore[reportAssignmentType]
    return whole(q, k, v)
