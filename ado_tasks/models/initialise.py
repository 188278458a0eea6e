"""First weights, as PyTorch and Diffusers draw them: each parameter from a key of its own name, so order is nothing."""

import hashlib
import math

from ado_tasks.backend import mlx_utils, mx, nn
from ado_tasks.models.embeddings import GaussianFourierProjection
from ado_tasks.models.layers import Conv2d, Embedding, GroupNorm, LayerNorm

FOURIER_SCALE = 16.0  # NCSN++ (Song et al. 2021), and written so in Diffusers' UNet2DModel


def initialise(model: nn.Module, key: mx.array) -> None:
    """Fill every parameter of a model in place.

    Linear layers and convolutions: U(±1/√fan_in), weight and bias (PyTorch's default, He et al. 2015 with a = √5).
    Embeddings: N(0, 1). Fourier frequencies: N(0, 16²). Norms: 1 and 0.

    Raises:
        TypeError: the model has a layer whose first weights are not defined here.
    """
    drawn: list[tuple[str, mx.array]] = []
    for path, layer in model.named_modules():
        for name, value in layer.items():
            if isinstance(value, mx.array) and not name.startswith("_"):
                full = f"{path}.{name}" if path else name
                drawn.append((full, _draw(layer, name, value, key_of(key, full))))
    model.update(mlx_utils.tree_unflatten(drawn))
    mx.eval(model.parameters())


def key_of(key: mx.array, name: str) -> mx.array:
    """The random key of a name under a key: drawn from the key mixed with the name's SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    return mx.random.split(mx.bitwise_xor(key, mx.array(words, dtype=mx.uint32)))[0]


def _draw(layer: nn.Module, name: str, value: mx.array, key: mx.array) -> mx.array:
    if isinstance(layer, GroupNorm | LayerNorm):
        return mx.ones(value.shape) if name == "weight" else mx.zeros(value.shape)
    if isinstance(layer, Embedding):
        return mx.random.normal(value.shape, key=key)
    if isinstance(layer, GaussianFourierProjection):
        return FOURIER_SCALE * mx.random.normal(value.shape, key=key)
    if isinstance(layer, nn.Linear | Conv2d):
        bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
        return mx.random.uniform(-bound, bound, value.shape, key=key)
    raise TypeError(f"no first weights are defined for {type(layer).__name__}.{name}")
