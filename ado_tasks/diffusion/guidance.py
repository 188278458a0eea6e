"""Classifier-free guidance: two denoisers, with and without the class, combined into one that leans towards the class.

    x̂_w = x̂_u + w (x̂_c − x̂_u)

(Ho & Salimans 2022, eq. 6, in x̂ for ε̂; their w is this one less 1). w = 1 is the conditional model, 0 the other. In
scores: ∇ log p_u(z) + w ∇ log p(c | z), so the class is asked for w times. A step costs two evaluations an image.
Guided distillation (Meng et al. 2023) folds both into one network that is told w too, here by regression on
`guided` at weights drawn by `draw_weights`.

The unconditional denoiser is the same network with a label of its own, learned by dropping labels at random
(`drop_labels`).
"""

from collections.abc import Callable

from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.parameterisation import expand
from ado_tasks.errors import ConfigError

EVALUATIONS_A_STEP = 2
DROP = 0.1  # of labels; Ho & Salimans 2022, §4: 0.1 and 0.2 do equally well

Weights = mx.array | float
Conditional = Callable[[mx.array, mx.array, mx.array], mx.array]  # (z, t, labels) → x̂


def guided(conditional: Denoiser, unconditional: Denoiser, weights: Weights) -> Denoiser:
    """x̂_u + w (x̂_c − x̂_u), from two denoisers; `weights` is one w, or one a sample, (B,)."""

    def denoise(z: mx.array, t: mx.array) -> mx.array:
        return combine(conditional(z, t), unconditional(z, t), weights)

    return denoise


def guided_in_one_batch(denoise: Conditional, labels: mx.array, null_label: int, weights: Weights) -> Denoiser:
    """The same from one network, both evaluations in one batch of twice the size.

    Args:
        denoise: (z, t, labels) → x̂.
        labels: (B,), the class of each sample.
        null_label: the label that was trained in the place of dropped ones.
        weights: one w, or one a sample, (B,).

    Raises:
        ConfigError: a weight for each sample is wanted, and there are not as many as labels.
    """
    if isinstance(weights, mx.array) and weights.ndim and weights.shape != labels.shape:
        raise ConfigError(f"weights: {weights.shape} for {labels.shape[0]} samples; one, or one a sample, is required")
    both_labels = mx.concatenate([labels, mx.full(labels.shape, null_label, dtype=labels.dtype)])

    def both(z: mx.array, t: mx.array) -> mx.array:
        x_hat = denoise(mx.concatenate([z, z]), mx.concatenate([t, t]), both_labels)
        return combine(x_hat[: z.shape[0]], x_hat[z.shape[0] :], weights)

    return both


def combine(conditional: mx.array, unconditional: mx.array, weights: Weights) -> mx.array:
    """x̂_u + w (x̂_c − x̂_u) for x̂ of shape (B, …)."""
    if isinstance(weights, mx.array) and weights.ndim:
        weights = expand(weights, conditional)
    return unconditional + weights * (conditional - unconditional)


def drop_labels(labels: mx.array, null_label: int, key: mx.array, probability: float = DROP) -> mx.array:
    """Labels, (B,), each replaced by `null_label` with this probability.

    Raises:
        ConfigError: the probability is not in [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"probability: {probability} is not allowed: 0 to 1")
    dropped = mx.random.uniform(shape=labels.shape, key=key) < probability
    return mx.where(dropped, mx.array(null_label, dtype=labels.dtype), labels)


def draw_weights(count: int, low: float, high: float, key: mx.array) -> mx.array:
    """Weights that a folded network is trained at, uniform in [low, high), (count,) (Meng et al. 2023).

    Raises:
        ConfigError: the range is empty.
    """
    if not low < high:
        raise ConfigError(f"low, high: {low}, {high} are not allowed: low < high is required")
    return mx.random.uniform(low, high, (count,), key=key)
