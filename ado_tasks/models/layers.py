"""The smallest parts of a U-Net: layers made of zeros and ones (never of random numbers), named as PyTorch names them.

`nn.Linear` and `nn.Conv2d` of MLX draw their first weights from the global generator; these do not, so building a
network moves no random state. `initialise.py` fills them. The arithmetic is in `ops.py`.
"""

from collections.abc import Callable

from ado_tasks.backend import mx, nn
from ado_tasks.errors import ConfigError
from ado_tasks.models import ops


class Linear(nn.Linear):
    """y = x Wᵀ + b with W (out, in); zeros until initialised."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        """Zeros. Not by nn.Linear's own constructor, which draws from the global generator."""
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_features, in_features))
        if bias:
            self.bias = mx.zeros((out_features,))

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) to (..., out)."""
        return ops.linear(x, self.weight, self.get("bias"))


class Conv2d(nn.Module):
    """Convolution of (B, H, W, in) with a square kernel (out, k, k, in); zeros until initialised."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        """Zeros. `kernel` is the side of the square, `padding` the zeros on each of the four sides."""
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = mx.zeros((out_channels, kernel, kernel, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array, *, biased: bool = True) -> mx.array:
        """(B, H, W, in) to (B, H', W', out). Not `biased`: the bias is left to who adds more (see GroupNorm)."""
        bias = self.get("bias") if biased else None
        return ops.conv2d(x, self.weight, bias, stride=self.stride, padding=self.padding)


class GroupNorm(nn.Module):
    """Group normalisation as PyTorch defines it, over the last axis of (B, ..., C)."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        """Weight one, bias zero. Raises ConfigError where the groups do not divide the channels."""
        super().__init__()
        check_groups(groups, channels, "GroupNorm")
        self.groups, self.eps = groups, eps
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array, shift: mx.array | None = None) -> mx.array:
        """Same shape as x; a `shift` (B, C) is added to every pixel of its image before."""
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps, shift)

    def activated(
        self, x: mx.array, activate: Callable[[mx.array], mx.array], shift: mx.array | None = None
    ) -> mx.array:
        """The activation of a call."""
        if activate is ops.silu:
            return ops.group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, shift)
        return activate(self(x, shift))


class LayerNorm(nn.Module):
    """Holds the weight and bias of a layer norm that Diffusers stores and, without a text encoder, never applies."""

    def __init__(self, channels: int) -> None:
        """Weight one, bias zero."""
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))


class Embedding(nn.Module):
    """Rows of a table (count, width) chosen by integers (B,); zeros until initialised."""

    def __init__(self, count: int, width: int) -> None:
        """Zeros, (count, width)."""
        super().__init__()
        self.weight = mx.zeros((count, width))

    def __call__(self, index: mx.array) -> mx.array:
        """(B,) to (B, width)."""
        return self.weight[index]


def check_groups(groups: int, channels: int, where: str) -> None:
    """Raise ConfigError where `channels` cannot be split into `groups` equal parts."""
    if groups < 1 or channels % groups:
        raise ConfigError(
            f"{where}: {groups} norm groups do not divide {channels} channels; allowed: a divisor of {channels}"
        )


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": ops.silu,
    "swish": ops.silu,
    "mish": nn.mish,
    "gelu": nn.gelu,  # the exact one, with erf, as torch.nn.GELU's default
    "relu": nn.relu,
}


class DropoutKeys:
    """Hands out one random key for each dropout of a forward pass, in the order they are met.

    Without a key nothing is dropped. The same key gives the same masks, which consistency training relies on.
    """

    def __init__(self, key: mx.array | None, count: int) -> None:
        """`count` is how often a forward pass may drop."""
        self._keys = None if key is None or count == 0 else mx.random.split(key, count)
        self._next = 0

    def cut(self, count: int) -> mx.array | None:
        """The next `count` keys, for who hands them out elsewhere (`given`)."""
        if self._keys is None:
            return None
        self._next += count
        return self._keys[self._next - count : self._next]

    @classmethod
    def given(cls, keys: mx.array | None) -> "DropoutKeys":
        """Hand out these, in order."""
        made = cls(None, 0)
        made._keys = keys
        return made

    def drop(self, x: mx.array, probability: float) -> mx.array:
        """Each element of x zeroed with `probability`, the others scaled to keep the mean."""
        if self._keys is None or probability == 0:
            return x
        key = self._keys[self._next]
        self._next += 1
        if probability == 1:
            return mx.zeros_like(x)
        keep = mx.random.bernoulli(1 - probability, x.shape, key=key)
        return mx.where(keep, x * (1 / (1 - probability)), 0)
