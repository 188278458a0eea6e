"""How long a forward pass takes: a roofline with one fitted factor for each kind of layer.

    seconds = Σ_kind f_kind Σ_layers max(operations/peak, bytes/bandwidth) + c · layers

Roofline: Williams, Waterman & Patterson 2009. Factors say how far from its roof a kind of layer stays; they are fitted
by non-negative least squares on relative errors, with a weak pull to one common factor.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ado_tasks.config import config
from ado_tasks.errors import ArtifactError, HardwareError
from ado_tasks.fit.work import KINDS, Kind, Op
from ado_tasks.hardware.capability import Capability, Precision, stored

BYTES: dict[Precision, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
PULL = 0.05  # weight of the pull to the common factor, in relative errors: it decides where measurements do not
LEAST_MEASURED = 8  # networks, for as many numbers


@config
class CostModel:
    """Fitted on one machine for one precision."""

    precision: Precision
    factors: dict[Kind, float]
    layer_us: float  # c
    fitted_on: int  # networks
    median_error: float  # relative, each network predicted by a fit without it
    worst_error: float
    machine: str  # that it was fitted on

    def seconds(self, work: Sequence[Op], capability: Capability) -> float:
        """Predicted time of one forward pass, on the machine of the fit or, far less surely, on another."""
        row = _features(work, capability, self.precision)
        return float(row @ np.array([*(self.factors[kind] for kind in KINDS), 1e-6 * self.layer_us]))

    def as_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: dict[str, Any], where: str) -> "CostModel":
        """Back from JSON. Raises ArtifactError where keys are missing, unknown or of another kind."""
        found = stored(CostModel, plain, where, "`bench/cost_model.py`")
        if set(found.factors) != set(KINDS):
            raise ArtifactError(f"{where}.factors: {', '.join(found.factors)}; allowed: {', '.join(KINDS)}")
        return found


@dataclass(frozen=True)
class Prediction:
    """A time that nobody measured."""

    milliseconds: float
    predicted: bool  # always: such a figure never stands unmarked
    error: str  # how sure it is


def predict(model: CostModel, work: Sequence[Op], capability: Capability) -> Prediction:
    """With the error that goes with it: of the fit on its own machine, and a warning for any other."""
    own = capability.id == model.machine
    error = f"median {model.median_error:.0%}, worst {model.worst_error:.0%} on {model.fitted_on} networks left out"
    if not own:
        error = f"not measured on {capability.chip}; on machine {model.machine}, where it was fitted: {error}"
    return Prediction(1e3 * model.seconds(work, capability), True, error)


def fit_cost_model(
    works: Sequence[Sequence[Op]], seconds: Sequence[float], capability: Capability, precision: Precision = "float32"
) -> CostModel:
    """Fit on measured networks, and judge by leaving each of them out in turn.

    Raises:
        HardwareError: fewer than LEAST_MEASURED networks, or no peak for this precision.
    """
    if len(works) < LEAST_MEASURED or len(works) != len(seconds):
        given = f"{len(works)} networks, {len(seconds)} times"
        raise HardwareError(f"cost model: {given}; allowed: at least {LEAST_MEASURED}, as many of each")
    if capability.peak_gflops.get(precision, 0) <= 0:
        raise HardwareError(f"cost model: no {precision} peak of {capability.chip}; allowed: a measured precision")
    rows = np.array([_features(work, capability, precision) for work in works])
    taken = np.array(seconds)
    errors = []
    for place in range(len(taken)):
        kept = np.arange(len(taken)) != place
        errors.append(abs(float(rows[place] @ _fitted(rows[kept], taken[kept])) / taken[place] - 1))
    numbers = _fitted(rows, taken)
    return CostModel(
        precision, dict(zip(KINDS, numbers[:-1].tolist(), strict=True)), 1e6 * float(numbers[-1]), len(taken),
        float(np.median(errors)), float(np.max(errors)), capability.id,
    )  # fmt: skip


def _features(work: Sequence[Op], capability: Capability, precision: Precision) -> np.ndarray:
    """Seconds at the roof for each kind, and the number of layers."""
    peak, bandwidth = 1e9 * capability.peak_gflops[precision], 1e9 * capability.bandwidth_gb_s
    row = dict.fromkeys(KINDS, 0.0)
    for op in work:
        row[op.kind] += max(op.flops / peak, BYTES[precision] * op.elements / bandwidth)
    return np.array([*row.values(), float(len(work))])


def _fitted(rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Non-negative numbers that minimise Σ (row · x / taken - 1)² + PULL² Σ (share · (x/x₀ - 1))².

    `share` is how much of the time a column makes up at the common factor x₀: columns that hardly count are not pulled.
    """
    relative = rows / taken[:, None]
    roofs = relative[:, :-1].sum(axis=1)
    common = float(roofs.sum() / (roofs @ roofs))
    start = np.array([*[common] * (rows.shape[1] - 1), 0.0])
    share = relative.mean(axis=0) * common
    pull = PULL * np.sqrt(len(taken)) * np.diag(np.where(start > 0, share / common, 0.0))
    target = np.concatenate([np.ones(len(taken)), pull @ start])
    return nnls(np.concatenate([relative, pull]), target)[0]
