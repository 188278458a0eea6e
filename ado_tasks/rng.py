"""Randomness that depends on names, never on order: every draw is derived from a seed and a path of names.

`key(seed, "train", "noise", step)` is the same whoever asks first, in whichever process, before or after a restart.
That is what makes a resumed run equal an unbroken one. No global generator is ever read or moved.
"""

import hashlib
import json

import numpy as np

from ado_tasks.backend import mx

Name = str | int


def derive(seed: int, *names: Name) -> int:
    """A 64-bit seed for this path of names: SHA-256 of them as JSON, in which no two paths look the same."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def key(seed: int, *names: Name) -> mx.array:
    """An MLX random key for this path of names."""
    return mx.random.key(derive(seed, *names))


def generator(seed: int, *names: Name) -> np.random.Generator:
    """A NumPy generator for this path of names."""
    return np.random.default_rng(derive(seed, *names))
