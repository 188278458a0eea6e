"""Exponential moving averages of weights: pure functions on trees of parameters, usable inside a compiled step."""

from typing import Any

from ado_tasks.backend import mlx_utils, mx

Tree = Any  # nested dicts and lists of arrays, as `Module.parameters()` gives


def ema_update(average: Tree, params: Tree, decay: mx.array | float) -> Tree:
    """Leaf by leaf decay · average + (1 − decay) · params. The two trees must have the same shape."""
    return mlx_utils.tree_map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def warmed_decay(step: mx.array | int, decay: float) -> mx.array:
    """The average follows quickly at first: min(decay, (1 + step)/(10 + step)), `step` counting the updates before.

    As TensorFlow's ExponentialMovingAverage with num_updates and Diffusers' EMAModel have it.
    """
    step = mx.array(step, dtype=mx.float32)
    return mx.minimum((1 + step) / (10 + step), decay)


def edm_decay(step: mx.array | int, batch: int, halflife_images: float, rampup: float = 0.05) -> mx.array:
    """2^(−batch / halflife) with the halflife no longer than `rampup` of the images seen so far.

    Karras et al. 2022 (EDM), training_loop.py: halflife 500,000 images, rampup 0.05. `step` counts the updates before;
    at step 0 the decay is 0, so the average starts as the first weights it is given.
    """
    seen = mx.array(step, dtype=mx.float32) * batch
    halflife = mx.maximum(mx.minimum(seen * rampup, halflife_images), 1e-8)
    return mx.power(0.5, batch / halflife)
