"""Linear layers of 8 or 4 bits: weights in groups along their rows, w ≈ s q + b with q of few bits (mx.quantize).

Networks are tuned and distilled in float32 and quantised behind it: nothing here has a gradient for the weights. What
is no linear layer (convolutions, norms, tables), or has rows that no group divides, stays as it is.
"""

from collections.abc import Mapping
from typing import TypeVar

from ado_tasks.backend import mlx_utils, mx, nn
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.models.layers import Linear
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.weights import flat_parameters

BITS = (4, 8)
GROUPS = (64, 32)  # numbers that share a scale: MLX's default, then the smallest that it knows; the first that divides
WORD = 32  # bits of the integers that MLX packs into
PARTS = ("weight", "scales", "biases")  # of a layer, as MLX names them; its own bias is a float as before
Layer = TypeVar("Layer", Linear, "QuantisedLinear")
NEAR = 1e-6  # of the largest weight: what devices may differ by in s q + b


class QuantisedLinear(nn.Module):
    """y = x Wᵀ + c with W (out, in) in few bits. Not MLX's own class: that draws from the global generator."""

    def __init__(self, weight: mx.array, scales: mx.array, biases: mx.array, bias: mx.array | None, bits: int) -> None:
        """Packed `weight` (out, in · bits/32) of uint32, `scales` and `biases` (out, in/group)."""
        super().__init__()
        self.weight, self.scales, self.biases, self.bits = weight, scales, biases, bits
        self.group = weight.shape[1] * WORD // bits // scales.shape[1]
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) to (..., out)."""
        y = mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=self.group, bits=self.bits
        )
        return y + self.bias if "bias" in self else y

    def floats(self) -> mx.array:
        """W as floats, (out, in)."""
        return mx.dequantize(self.weight, self.scales, self.biases, group_size=self.group, bits=self.bits)


def quantised(unet: UNet2D, bits: int | None) -> UNet2D:
    """A network with the same weights whose linear layers have `bits`; for None the network itself.

    Raises:
        ConfigError: MLX has no such number of bits here, or the network is quantised already.
    """
    if bits is None:
        return unet
    if bits not in BITS or bits_of(unet) is not None:
        raise ConfigError(f"linear_bits: {bits} of a network of {bits_of(unet) or 'float'}; allowed: {BITS} of float")
    made = _copy(unet)
    _put(made, {name: _quantise(layer, bits) for name, layer in _eligible(made).items()})
    return made


def floating(unet: UNet2D) -> UNet2D:
    """A network with the same weights in floats, which can be trained; the network itself where it has no others."""
    layers = _layers(unet, QuantisedLinear)
    if not layers:
        return unet
    made = UNet2D(unet.config)
    kept = {
        name: value for name, value in flat_parameters(unet).items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }  # fmt: skip
    weights = {f"{name}.weight": layer.floats() for name, layer in layers.items()}
    made.update(mlx_utils.tree_unflatten(list({**kept, **weights}.items())))
    mx.eval(made.parameters())
    return made


def bits_of(unet: UNet2D) -> int | None:
    """Bits of its linear layers; None where all are floats."""
    return next((layer.bits for layer in _layers(unet, QuantisedLinear).values()), None)


def check_floating(unet: UNet2D, where: str) -> None:
    """Raise ConfigError where a network has layers of few bits, whose weights have no gradient."""
    if bits := bits_of(unet):
        raise ConfigError(f"{where}: has linear layers of {bits} bits, which cannot be trained; allowed: floats")


def packed(unet: UNet2D) -> dict[str, mx.array]:
    """What its quantised layers hold besides floats, by name; empty where it has none."""
    return {
        f"{name}.{part}": layer[part] for name, layer in _layers(unet, QuantisedLinear).items() for part in PARTS
    }  # fmt: skip


def load_packed(unet: UNet2D, tensors: Mapping[str, mx.array], bits: int, where: str) -> UNet2D:
    """The network of floats with the layers of `packed` in the place of its own.

    Args:
        unet: the network in floats.
        tensors: as `packed` gives them.
        bits: of the layers.
        where: the file they come from, for messages.

    Raises:
        ArtifactError: a tensor is missing, unexpected, of another shape, or not what the floats are: names it.
    """
    if bits not in BITS:
        raise ArtifactError(f"{where}: layers of {bits} bits; allowed: {BITS}")
    made = _copy(unet)
    expected = {name: _quantise(layer, bits) for name, layer in _eligible(made).items()}
    names = {f"{name}.{part}" for name in expected for part in PARTS}
    problems = [f"{name}: missing" for name in sorted(names - tensors.keys())]
    problems += [f"{name}: unexpected; no layer is quantised there" for name in sorted(tensors.keys() - names)]
    for name in sorted(names & tensors.keys()):
        layer, _, part = name.rpartition(".")
        wanted, found = expected[layer][part], tensors[name]
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            problems.append(f"{name}: {found.dtype} {found.shape}, expected {wanted.dtype} {wanted.shape}")
    if not problems:
        layers = {
            name: QuantisedLinear(*_parts(tensors, name), layer.get("bias"), bits) for name, layer in expected.items()
        }
        problems = [
            f"{name}: other weights than the floats beside it" for name, layer in layers.items()
            if not _near(layer.floats(), _eligible(made)[name].weight)
        ]  # fmt: skip
    if problems:
        raise ArtifactError("\n".join(f"{where}: {problem}" for problem in problems))
    _put(made, layers)
    return made


def _parts(tensors: Mapping[str, mx.array], layer: str) -> tuple[mx.array, mx.array, mx.array]:
    weight, scales, biases = (tensors[f"{layer}.{part}"] for part in PARTS)
    return weight, scales, biases


def _near(one: mx.array, other: mx.array) -> bool:
    return bool(mx.max(mx.abs(one - other)) <= NEAR * mx.max(mx.abs(other)))


def _quantise(layer: Linear, bits: int) -> QuantisedLinear:
    group = next(size for size in GROUPS if layer.weight.shape[1] % size == 0)
    weight, scales, biases = mx.quantize(layer.weight, group_size=group, bits=bits)
    return QuantisedLinear(weight, scales, biases, layer.get("bias"), bits)


def _eligible(unet: UNet2D) -> dict[str, Linear]:
    return {name: layer for name, layer in _layers(unet, Linear).items() if layer.weight.shape[1] % GROUPS[-1] == 0}


def _layers(unet: UNet2D, kind: type[Layer]) -> dict[str, Layer]:
    return {name: module for name, module in sorted(unet.named_modules()) if isinstance(module, kind)}


def _copy(unet: UNet2D) -> UNet2D:
    made = UNet2D(unet.config)
    made.update(unet.parameters())
    return made


def _put(unet: UNet2D, layers: Mapping[str, QuantisedLinear]) -> None:
    unet.update_modules(mlx_utils.tree_unflatten(list(layers.items())))
    mx.eval(unet.parameters())
