"""What tells the network which step it is at: embeddings of the timestep and of the class, always from float32."""

import math

import numpy as np

from ado_tasks.backend import mx, nn
from ado_tasks.errors import ConfigError
from ado_tasks.models import ops
from ado_tasks.models.layers import Embedding, Linear

WEIGHT_OCTAVES = 2  # x̂ is affine in w (diffusion/guidance.py): nothing quicker than a period of the range is wanted
LONGEST_PERIOD = 10_000  # Vaswani et al. 2017, section 3.5; Diffusers' max_period


class Timesteps(nn.Module):
    """Sines and cosines of t·f_k, f_k = 10000^(−k / (d/2 − freq_shift)), k < d/2 (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, width: int, flip_sin_to_cos: bool, freq_shift: int) -> None:
        """`width` is d. An odd one is filled up with a zero, as in Diffusers."""
        super().__init__()
        half = width // 2
        # In float32 and in this order: what PyTorch computes, so that t near 1000 turns by the same angle.
        exponent = np.float32(-math.log(LONGEST_PERIOD)) * np.arange(half, dtype=np.float32)
        self._frequencies = mx.array(np.exp(exponent / np.float32(half - freq_shift)))
        self._flip, self._odd = flip_sin_to_cos, width % 2 == 1

    def __call__(self, timestep: mx.array) -> mx.array:
        """(B,) to (B, width), float32."""
        angle = timestep.astype(mx.float32)[:, None] * self._frequencies
        sine, cosine = mx.sin(angle), mx.cos(angle)
        embedding = mx.concatenate([cosine, sine] if self._flip else [sine, cosine], axis=-1)
        return mx.pad(embedding, [(0, 0), (0, 1)]) if self._odd else embedding


class GaussianFourierProjection(nn.Module):
    """Sines and cosines of 2π w log(t) with fixed random w ~ N(0, 16²) (Song et al. 2021, NCSN++)."""

    def __init__(self, width: int) -> None:
        """Zero frequencies, until initialised or loaded."""
        super().__init__()
        self.weight = mx.zeros((width,))
        self.freeze()

    def __call__(self, timestep: mx.array) -> mx.array:
        """(B,) to (B, 2·width), float32. t must be positive."""
        # Drawn once and never trained: no gradient either, for those who differentiate in all parameters.
        frequencies = mx.stop_gradient(self.weight.astype(mx.float32))
        angle = mx.log(timestep.astype(mx.float32))[:, None] * frequencies * 2 * math.pi
        return mx.concatenate([mx.sin(angle), mx.cos(angle)], axis=-1)


class LearnedTimesteps(Embedding):
    """A table with one row a timestep. A fractional timestep takes the nearest row."""

    def __call__(self, timestep: mx.array) -> mx.array:
        """(B,) to (B, width)."""
        return super().__call__(mx.round(timestep).astype(mx.int32))


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_features: int, width: int) -> None:
        """`width` is that of the hidden layer and of the result."""
        super().__init__()
        self.linear_1 = Linear(in_features, width)
        self.linear_2 = Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, in) to (B, width), in the type of the weights."""
        first = self.linear_1
        return self.linear_2(ops.silu(first(x.astype(first.get("scales", first.weight).dtype))))  # scales: of few bits


class WeightEmbedding(nn.Module):
    """What a guidance weight adds to the embedding of a timestep (Meng et al. 2023, §3.1: Fourier features of w).

    Features u, sin(2ᵏ π u), cos(2ᵏ π u), k < WEIGHT_OCTAVES, of u = (w − low)/(high − low); then linear, SiLU, linear.
    The last layer begins as zeros: a network begins as it was without.
    """

    def __init__(self, width: int, low: float, high: float) -> None:
        """`width` of the embedding that it is added to; weights from `low` to `high`."""
        super().__init__()
        self.low, self.high = low, high
        self._angles = math.pi * 2.0 ** mx.arange(WEIGHT_OCTAVES)
        self.layers = TimestepEmbedding(1 + 2 * WEIGHT_OCTAVES, width)

    def __call__(self, weight: mx.array) -> mx.array:
        """(B,) to (B, width)."""
        share = ((weight.astype(mx.float32) - self.low) / (self.high - self.low))[:, None]
        return self.layers(mx.concatenate([share, mx.sin(share * self._angles), mx.cos(share * self._angles)], axis=-1))

    def at(self, weight: float) -> mx.array:
        """e(w) of one weight, (width,). Raises ConfigError outside of low to high: it would be a guess."""
        if not self.low <= weight <= self.high:
            raise ConfigError(f"guidance weight: {weight} is not allowed: {self.low:g} to {self.high:g}")
        return self(mx.array([weight]))[0]
