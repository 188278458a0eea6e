"""Matrix products over the last axis."""

from ado_tasks.backend import mx


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """X Wᵀ + b over the last axis. Flattened first, so that the weight's gradient is one product."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        flat = flat + bias
    return flat.reshape(*x.shape[:-1], weight.shape[0])
