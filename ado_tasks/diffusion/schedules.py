"""Noise schedules in continuous time, with Diffusers' discrete grids as the values at integer timesteps.

A noisy sample is z_t = α_t x + σ_t ε (Kingma et al. 2021, eq. 1). Time t runs over [0, 1]: t = 0 is clean (α = 1 and
σ = 0 exactly), t = 1 is noisiest. λ = log SNR = 2 log(α/σ) falls with t. What a network is told is the *timestep*:
t N − 1 for N training timesteps, so that t = (i + 1)/N is Diffusers' timestep i, and t = 0 is its "timestep −1" with
ᾱ = 1 (`set_alpha_to_one`).

Every method takes a number or a NumPy array and computes in float64 on the host (solver coefficients), or an MLX array
and computes in float32 on the device (training). Never less than float32: bf16 turns timestep 999 into 1000.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.errors import ConfigError

TRAIN_TIMESTEPS = 1000  # Ho et al. 2020, §4; every Diffusers scheduler's default

# Nichol & Dhariwal 2021, §3.3: the offset that keeps β from vanishing near t = 0, and the cap on the last β.
COSINE_OFFSET = 0.008
COSINE_BETA_CAP = 0.999


@runtime_checkable
class NoiseSchedule(Protocol):
    """What every noise schedule can say. Arrays come back in the kind (NumPy or MLX) and shape they were given in."""

    @property
    def t_min(self) -> float:
        """The least time above 0 that a network on this schedule is trained at: timestep 0, or EDM's σ_min."""
        ...

    @overload
    def alpha_sigma(self, t: mx.array) -> tuple[mx.array, mx.array]: ...
    @overload
    def alpha_sigma(self, t: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def alpha_sigma(self, t: Any) -> Any:
        """(α_t, σ_t) for t in [0, 1]."""
        ...

    @overload
    def log_snr(self, t: mx.array) -> mx.array: ...
    @overload
    def log_snr(self, t: float | np.ndarray) -> np.ndarray: ...
    def log_snr(self, t: Any) -> Any:
        """λ_t = 2 log(α_t/σ_t); +∞ at t = 0."""
        ...

    @overload
    def time(self, log_snr: mx.array) -> mx.array: ...
    @overload
    def time(self, log_snr: float | np.ndarray) -> np.ndarray: ...
    def time(self, log_snr: Any) -> Any:
        """The inverse of `log_snr`, clipped to [0, 1]."""
        ...

    @overload
    def timestep(self, t: mx.array) -> mx.array: ...
    @overload
    def timestep(self, t: float | np.ndarray) -> np.ndarray: ...
    def timestep(self, t: Any) -> Any:
        """What the network is conditioned on at time t, a real number."""
        ...

    def to_diffusers(self, prediction_type: str) -> dict[str, Any]:
        """The `scheduler_config.json` that describes this schedule."""
        ...


def _prepare(value: Any) -> tuple[Any, Any]:
    """The namespace to compute in (mx or np) and the value there, at no less than float32 or at float64."""
    if isinstance(value, mx.array):
        return mx, value if value.dtype == mx.float64 else value.astype(mx.float32)
    return np, np.asarray(value, dtype=np.float64)


def _discrete_config(prediction_type: str, steps: int, **fields: Any) -> dict[str, Any]:
    """A DDIMScheduler config under which Diffusers takes our DDIM steps: nothing clipped, last step to ᾱ = 1."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": steps,
        **fields,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": prediction_type,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": False,
    }


@dataclass(frozen=True)
class Cosine:
    """Variance-preserving, ᾱ(t) = f(t)/f(0), f(t) = cos²(π/2 · (t + 0.008)/1.008) (Nichol & Dhariwal 2021, eq. 17).

    Diffusers' `squaredcos_cap_v2`. Its cap β ≤ 0.999 acts on the last step only: there ᾱ(1) = 0.001 ᾱ(1 − 1/N), and
    log ᾱ is linear between the two.
    """

    num_train_timesteps: int = TRAIN_TIMESTEPS

    @property
    def t_min(self) -> float:
        """Timestep 0."""
        return 1 / self.num_train_timesteps

    @property
    def _start(self) -> float:
        return math.pi / 2 * COSINE_OFFSET / (1 + COSINE_OFFSET)

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + COSINE_OFFSET)

    @property
    def _capped_from(self) -> float:
        return 1 - 1 / self.num_train_timesteps

    def _log_alpha_bar_capped(self) -> tuple[float, float]:
        """Log ᾱ at the start of the capped step, and its slope there."""
        # cos(π/2 · (t + o)/(1 + o)) = sin(rate · (1 − t)): no cancellation near t = 1.
        start = 2 * math.log(math.sin(self._rate / self.num_train_timesteps) / math.cos(self._start))
        return start, self.num_train_timesteps * math.log(1 - COSINE_BETA_CAP)

    def alpha_sigma(self, t: Any) -> Any:
        """(α_t, σ_t); σ² = sin(u − u₀) sin(u + u₀)/cos² u₀ with u = rate·t + u₀, exact as t → 0."""
        xp, t = _prepare(t)
        smooth = xp.minimum(t, self._capped_from)
        angle = self._rate * smooth
        alpha = xp.sin(self._rate * (1 - smooth)) / math.cos(self._start)
        variance = xp.sin(angle) * xp.sin(angle + 2 * self._start) / math.cos(self._start) ** 2
        start, slope = self._log_alpha_bar_capped()
        log_alpha_bar = start + slope * (xp.maximum(t, self._capped_from) - self._capped_from)
        capped = t > self._capped_from
        alpha = xp.where(capped, xp.exp(log_alpha_bar / 2), xp.where(t <= 0, 1.0, alpha))
        sigma = xp.where(capped, xp.sqrt(-xp.expm1(log_alpha_bar)), xp.sqrt(xp.maximum(variance, 0.0)))
        return alpha, sigma

    def log_snr(self, t: Any) -> Any:
        """λ_t = 2 log(α_t/σ_t)."""
        return _log_ratio(*self.alpha_sigma(t))

    def time(self, log_snr: Any) -> Any:
        """The t with λ_t = `log_snr`; the angle comes from arctan2, well conditioned at both ends."""
        xp, log_snr = _prepare(log_snr)
        alpha_bar, variance = _vp_variances(xp, log_snr)
        cos2, sin2 = math.cos(self._start) ** 2, math.sin(self._start) ** 2
        angle = xp.arctan2(xp.sqrt(sin2 + variance * cos2), xp.sqrt(alpha_bar * cos2))
        smooth = (angle - self._start) / self._rate
        start, slope = self._log_alpha_bar_capped()
        log_alpha_bar = -xp.logaddexp(xp.zeros_like(log_snr), -log_snr)
        capped = self._capped_from + (log_alpha_bar - start) / slope
        return xp.clip(xp.where(log_alpha_bar < start, capped, smooth), 0.0, 1.0)

    def timestep(self, t: Any) -> Any:
        """The timestep t N − 1."""
        return _prepare(t)[1] * self.num_train_timesteps - 1

    def to_diffusers(self, prediction_type: str) -> dict[str, Any]:
        """A DDIMScheduler config."""
        return _discrete_config(prediction_type, self.num_train_timesteps, beta_schedule="squaredcos_cap_v2")


@dataclass(frozen=True)
class LinearBeta:
    """Variance-preserving with given β_i, ᾱ(i/N) = Π_{j<i}(1 − β_j) (Ho et al. 2020, eq. 4); log ᾱ linear in between.

    `linear`: β rises linearly (Ho et al. 2020, §4). `scaled_linear`: √β does (Rombach et al. 2022, latent diffusion).
    """

    kind: Literal["linear", "scaled_linear"] = "linear"
    beta_start: float = 1e-4  # Ho et al. 2020, §4
    beta_end: float = 0.02  # Ho et al. 2020, §4
    num_train_timesteps: int = TRAIN_TIMESTEPS

    def __post_init__(self) -> None:
        """Check the kind and the range of β."""
        if self.kind not in {"linear", "scaled_linear"}:
            raise ConfigError(f"beta_schedule: {self.kind!r} is not allowed: linear or scaled_linear")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"beta_start, beta_end: {self.beta_start}, {self.beta_end}: 0 < start ≤ end < 1 is required"
            )

    @property
    def t_min(self) -> float:
        """Timestep 0."""
        return 1 / self.num_train_timesteps

    @cached_property
    def _log_alpha_bar(self) -> np.ndarray:
        """Log ᾱ at t = 0, 1/N, …, 1: float64, (N + 1,)."""
        power = 0.5 if self.kind == "scaled_linear" else 1.0
        betas = np.linspace(self.beta_start**power, self.beta_end**power, self.num_train_timesteps) ** (1 / power)
        return np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])

    def alpha_sigma(self, t: Any) -> Any:
        """(α_t, σ_t) from log ᾱ, through expm1 so that σ is exact as t → 0."""
        xp, t = _prepare(t)
        log_alpha_bar = _interpolate(xp, t * self.num_train_timesteps, self._log_alpha_bar)
        return xp.exp(log_alpha_bar / 2), xp.sqrt(abs(xp.expm1(log_alpha_bar)))

    def log_snr(self, t: Any) -> Any:
        """λ_t = 2 log(α_t/σ_t)."""
        return _log_ratio(*self.alpha_sigma(t))

    def time(self, log_snr: Any) -> Any:
        """The t with λ_t = `log_snr`: the step is found in the table, then log ᾱ = −softplus(−λ) is interpolated."""
        xp, log_snr = _prepare(log_snr)
        rising = np.maximum(-self._log_alpha_bar, 0.0)
        wanted = xp.logaddexp(xp.zeros_like(log_snr), -log_snr)
        if xp is np:
            return np.interp(wanted, rising, np.linspace(0, 1, self.num_train_timesteps + 1))
        table = mx.array(rising, dtype=wanted.dtype)
        left = mx.clip(
            mx.searchsorted(table, wanted, side="right").astype(mx.int32) - 1, 0, self.num_train_timesteps - 1
        )
        fraction = (wanted - table[left]) / (table[left + 1] - table[left])
        return mx.clip((left + fraction) / self.num_train_timesteps, 0.0, 1.0)

    def timestep(self, t: Any) -> Any:
        """The timestep t N − 1."""
        return _prepare(t)[1] * self.num_train_timesteps - 1

    def to_diffusers(self, prediction_type: str) -> dict[str, Any]:
        """A DDIMScheduler config."""
        fields = {"beta_schedule": self.kind, "beta_start": self.beta_start, "beta_end": self.beta_end}
        return _discrete_config(prediction_type, self.num_train_timesteps, **fields)


@dataclass(frozen=True)
class Edm:
    """Variance-exploding, α = 1, σ(t) = σ_max t^ρ (Karras et al. 2022).

    The power makes equal steps of t equal steps of σ^(1/ρ), as in their eq. 5, and σ(0) = 0 exactly; `sigma_min` is
    where their grid stops before its last step to 0. The network is conditioned on ln(σ)/4 (Table 1, c_noise).
    """

    sigma_min: float = 0.002  # Karras et al. 2022, Table 1
    sigma_max: float = 80.0  # Karras et al. 2022, Table 1
    rho: float = 7.0  # Karras et al. 2022, Table 1
    sigma_data: float = 0.5  # Karras et al. 2022, Table 1

    def __post_init__(self) -> None:
        """Check the range of σ."""
        if not 0 < self.sigma_min < self.sigma_max or self.rho <= 0 or self.sigma_data <= 0:
            raise ConfigError(f"{self}: 0 < sigma_min < sigma_max, rho > 0 and sigma_data > 0 are required")

    @property
    def t_min(self) -> float:
        """The time of σ_min."""
        return (self.sigma_min / self.sigma_max) ** (1 / self.rho)

    def alpha_sigma(self, t: Any) -> Any:
        """(1, σ_max t^ρ)."""
        xp, t = _prepare(t)
        return xp.ones_like(t), self.sigma_max * t**self.rho

    def log_snr(self, t: Any) -> Any:
        """λ_t = −2 log σ_t."""
        return _log_ratio(*self.alpha_sigma(t))

    def time(self, log_snr: Any) -> Any:
        """The inverse, t = (σ/σ_max)^(1/ρ) with σ = e^(−λ/2)."""
        xp, log_snr = _prepare(log_snr)
        return xp.clip(xp.exp((-log_snr / 2 - math.log(self.sigma_max)) / self.rho), 0.0, 1.0)

    def timestep(self, t: Any) -> Any:
        """ln(σ)/4; −∞ at t = 0, where no network is ever evaluated."""
        return -self.log_snr(t) / 8

    def to_diffusers(self, prediction_type: str) -> dict[str, Any]:
        """An EDMEulerScheduler config: Diffusers applies the same preconditioning for `epsilon`."""
        return {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": TRAIN_TIMESTEPS,
            "prediction_type": "epsilon" if prediction_type == "edm" else prediction_type,
            "rho": self.rho,
            "sigma_data": self.sigma_data,
            "sigma_max": self.sigma_max,
            "sigma_min": self.sigma_min,
        }


def schedule_from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule that a Diffusers `scheduler_config.json` describes.

    Raises:
        ConfigError: the schedule is one of those that cannot be represented exactly: given betas, betas rescaled to
            zero SNR, an unknown `beta_schedule` or sigma schedule.
    """
    if str(config.get("_class_name", "")).startswith("EDM"):
        return _edm_from_diffusers(config)
    if config.get("trained_betas") is not None:
        raise ConfigError("trained_betas: a table of betas is not supported; allowed: null")
    if config.get("rescale_betas_zero_snr", False):
        raise ConfigError("rescale_betas_zero_snr: true is not supported (λ would be −∞ at t = 1); allowed: false")
    kind = config.get("beta_schedule", "linear")
    steps = int(config.get("num_train_timesteps", TRAIN_TIMESTEPS))
    if kind == "squaredcos_cap_v2":
        return Cosine(steps)
    if kind in {"linear", "scaled_linear"}:
        # 1e-4 and 0.02 are DDIMScheduler's and DDPMScheduler's own defaults, which they may leave out of the file.
        return LinearBeta(kind, float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02)), steps)
    raise ConfigError(f"beta_schedule: {kind!r} is not supported; allowed: squaredcos_cap_v2, linear, scaled_linear")


def _edm_from_diffusers(config: Mapping[str, Any]) -> Edm:
    if config.get("sigma_schedule", "karras") != "karras":
        raise ConfigError(f"sigma_schedule: {config['sigma_schedule']!r} is not supported; allowed: karras")
    fields = ("sigma_min", "sigma_max", "rho", "sigma_data")
    return Edm(**{name: float(config[name]) for name in fields if name in config})


def _log_ratio(alpha: Any, sigma: Any) -> Any:
    if isinstance(alpha, mx.array):
        return 2 * (mx.log(alpha) - mx.log(sigma))
    with np.errstate(divide="ignore"):  # σ = 0 at t = 0: λ = +∞ is the right answer
        return 2 * (np.log(alpha) - np.log(sigma))


def _vp_variances(xp: Any, log_snr: Any) -> tuple[Any, Any]:
    """(ᾱ, 1 − ᾱ) = (sigmoid(λ), sigmoid(−λ)), each to full relative precision."""
    zero = xp.zeros_like(log_snr)
    return xp.exp(-xp.logaddexp(zero, -log_snr)), xp.exp(-xp.logaddexp(zero, log_snr))


def _interpolate(xp: Any, position: Any, table: np.ndarray) -> Any:
    """Linear interpolation of `table` at a real index."""
    last = len(table) - 1
    if xp is np:
        return np.interp(position, np.arange(last + 1), table)
    values = mx.array(table, dtype=position.dtype)
    left = mx.clip(mx.floor(position), 0, last - 1).astype(mx.int32)
    return values[left] + (position - left) * (values[left + 1] - values[left])
