"""What a network's output means, and exact conversions between the meanings.

With z = α x + σ ε (science: Salimans & Ho 2022, §4 and appendix D):

| kind           | the output is          | x̂                           |
|----------------|------------------------|------------------------------|
| `epsilon`      | ε                      | (z − σ ε)/α                  |
| `sample`       | x                      | x                            |
| `v_prediction` | v = α ε − σ x          | (α z − σ v)/(α² + σ²)        |
| `edm`          | F of Karras et al. 2022| c_skip z + c_out F           |

The first three names are Diffusers' `prediction_type`. α² + σ² is 1 for variance-preserving schedules; keeping it
makes the v formulae exact for every schedule. `edm` is written in z rather than z/α, so it too serves every schedule
and never divides by α; with σ_data = 1 and a variance-preserving schedule, F = −v.

α and σ broadcast against the arrays: use `expand` for coefficients of shape (B,).
"""

from typing import Literal, get_args

from ado_tasks.backend import mx
from ado_tasks.errors import ConfigError

Kind = Literal["epsilon", "sample", "v_prediction", "edm"]
KINDS: tuple[str, ...] = get_args(Kind)
SIGMA_DATA = 0.5  # Karras et al. 2022, Table 1

Coefficient = mx.array | float


def expand(coefficient: mx.array, like: mx.array) -> mx.array:
    """A coefficient a sample, (B,), shaped (B, 1, …, 1) to broadcast against `like`, (B, …)."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def check_kind(kind: str) -> None:
    """Raise ConfigError for a prediction type that does not exist."""
    if kind not in KINDS:
        raise ConfigError(f"prediction_type: {kind!r} is not allowed; allowed: {', '.join(KINDS)}")


def _edm_scale(alpha: Coefficient, sigma: Coefficient, sigma_data: float) -> Coefficient:
    """√(σ² + α² σ_data²): the standard deviation of z."""
    return (sigma**2 + (alpha * sigma_data) ** 2) ** 0.5


def network_input(
    z: mx.array, alpha: Coefficient, sigma: Coefficient, kind: str, sigma_data: float = SIGMA_DATA
) -> mx.array:
    """What the network sees: z itself, or c_in z scaled to unit variance for `edm` (Karras et al. 2022, eq. 7)."""
    return z / _edm_scale(alpha, sigma, sigma_data) if kind == "edm" else z


def to_x(
    output: mx.array, z: mx.array, alpha: Coefficient, sigma: Coefficient, kind: str, sigma_data: float = SIGMA_DATA
) -> mx.array:
    """x̂ from a network output. `epsilon` divides by α and is unusable as α → 0; the other kinds are exact there."""
    if kind == "epsilon":
        return (z - sigma * output) / alpha
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return (alpha * z - sigma * output) / (alpha**2 + sigma**2)
    check_kind(kind)
    scale = _edm_scale(alpha, sigma, sigma_data)
    return alpha * (sigma_data / scale) ** 2 * z + sigma * sigma_data / scale * output


def to_epsilon(
    output: mx.array, z: mx.array, alpha: Coefficient, sigma: Coefficient, kind: str, sigma_data: float = SIGMA_DATA
) -> mx.array:
    """ε̂ from a network output. `sample` and `edm` divide by σ and are undefined at t = 0."""
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return (sigma * z + alpha * output) / (alpha**2 + sigma**2)
    return (z - alpha * to_x(output, z, alpha, sigma, kind, sigma_data)) / sigma


def target(
    x: mx.array, epsilon: mx.array, alpha: Coefficient, sigma: Coefficient, kind: str, sigma_data: float = SIGMA_DATA
) -> mx.array:
    """What the network should say for z = α x + σ ε, so that `to_x` gives x back (for `edm` where σ > 0)."""
    if kind == "epsilon":
        return epsilon
    if kind == "sample":
        return x
    if kind == "v_prediction":
        return alpha * epsilon - sigma * x
    check_kind(kind)
    # (x − c_skip z)/c_out, with the σ of numerator and denominator cancelled: x − c_skip (α x + σ ε) = σ (…)/scale².
    scale = _edm_scale(alpha, sigma, sigma_data)
    return (sigma * x - alpha * sigma_data**2 * epsilon) / (sigma_data * scale)
