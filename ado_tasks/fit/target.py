"""What networks would cost on a chip that is not here: a cost model fitted on times taken here, carried to its figures.

The formula (`fit/cost.py`) keeps what was fitted here, the factors of the kinds and the cost c of a layer, and takes
the chip's published peak and bandwidth in the place of this machine's. So the chip's own kernels, caches and c are
unknown to it: what is asked of it is an order. Nobody has measured there, and every figure says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ado_tasks.config import config
from ado_tasks.errors import ConfigError, HardwareError
from ado_tasks.fit.cost import LEAST_MEASURED, CostModel, fit_cost_model, predict
from ado_tasks.fit.memory import Plan, needed
from ado_tasks.fit.settings import memory_budget
from ado_tasks.fit.work import Op, unet_work
from ado_tasks.hardware.capability import GIB, Capability, apple_chip
from ado_tasks.models.attention_choice import Form, attention_form
from ado_tasks.models.quantised import bits_of
from ado_tasks.models.unet import UNet2D

MIB = 2**20
PRECISION = "float32"  # of what is weighed


@config
class Target:
    """A chip whose costs are wanted, by its published figures."""

    chip: str  # "Apple M4": a name of hardware/apple_chips.json
    memory_gib: Annotated[int, Field(ge=1)] | None = None  # that it has; none = the least it is sold with

    def __post_init__(self) -> None:
        """Whether the chip is known, was sold with that memory, and has the figures that a prediction needs."""
        try:
            self.reference()
        except HardwareError as problem:
            raise ConfigError(f"weigh.target: {problem}") from None

    def reference(self) -> Capability:
        """Its published figures. Raises HardwareError, see `apple_chip`."""
        return apple_chip(self.chip, self.memory_gib)


@dataclass(frozen=True)
class Foreseen:
    """One network on the target."""

    predicted: bool  # always: such a figure never stands unmarked
    latency_ms_per_image: float
    speedup_vs_teacher: float
    peak_memory_mb: float  # of sampling, by `fit/memory.py`
    share_of_layers: float  # of the time: c · layers, which is this machine's and not the chip's


def works_of(networks: Mapping[str, UNet2D], batch: int) -> dict[str, list[Op]]:
    """What each does, for a batch of images.

    Raises:
        ConfigError: a network that the model cannot count, or too few different ones to fit it on.
    """
    works = {}
    for name, unet in networks.items():
        if (bits := bits_of(unet)) is not None:
            raise ConfigError(
                f"weigh.target: network {name} has linear layers of {bits} bits, which the cost model does not count; "
                "allowed: floats (no probe.space.linear_bits), or no target"
            )
        size = unet.config.sample_size or unet.config.size_multiple
        works[name] = unet_work(unet.config, batch, size if isinstance(size, tuple) else (size, size))
    different = len({tuple(work) for work in works.values()})
    if different < LEAST_MEASURED:
        raise ConfigError(
            f"weigh.target: {different} different networks, teacher included; allowed: at least {LEAST_MEASURED}, for "
            "the cost model to be fitted on (probe.race.sizes)"
        )
    return works


def calibrated(
    works: Mapping[str, Sequence[Op]], seconds: Mapping[str, Sequence[float]], here: Capability
) -> CostModel:
    """Fit on the measured networks. Those of equal work count as one, or it would stay when the other is left out.

    Args:
        works: of each network.
        seconds: of a forward pass of each, in each round.
        here: what the machine that took them can do.

    Raises:
        HardwareError: see `fit_cost_model`.
    """
    pooled: dict[tuple[Op, ...], list[float]] = {}
    for name, work in works.items():
        pooled.setdefault(tuple(work), []).extend(seconds[name])
    return fit_cost_model(list(pooled), [float(np.median(taken)) for taken in pooled.values()], here, PRECISION)


def foreseen(model: CostModel, works: Mapping[str, Sequence[Op]], chip: Capability, batch: int, reference: str) -> dict[
    str, Foreseen
]:  # fmt: skip
    """Each network on the chip; speed-ups are over the network named `reference`."""
    seconds = {name: model.seconds(work, chip) for name, work in works.items()}
    found = {}
    for name, work in works.items():
        without = replace(model, layer_us=0.0).seconds(work, chip)
        plan = Plan(chip.device, PRECISION, None, _form(work, chip), checkpointing=False)
        found[name] = Foreseen(
            True, 1e3 * seconds[name] / batch, seconds[reference] / seconds[name],
            round(needed(work, plan).sampling / MIB, 2), 1 - without / seconds[name],
        )  # fmt: skip
    return found


def described(model: CostModel, chip: Capability, reference: Sequence[Op]) -> dict[str, Any]:
    """Which chip is meant, from what, and how sure it is, as the report holds it."""
    return {
        "chip": chip.chip, "predicted": True, "error": predict(model, reference, chip).error,
        "relative_error": {"median": model.median_error, "worst": model.worst_error, "left_out": model.fitted_on},
        "memory_gib": chip.memory_gib, "memory_budget_mb": round(memory_budget(chip) * GIB / MIB, 2),
        "peak_gflops": chip.peak_gflops[PRECISION], "bandwidth_gb_s": chip.bandwidth_gb_s, "model": asdict(model),
    }  # fmt: skip


def _form(work: Sequence[Op], chip: Capability) -> Form | None:
    """That the attention with the most scores takes in sampling; none where there is none."""
    widest = max((op for op in work if op.scores), key=lambda op: op.scores, default=None)
    if widest is None:
        return None
    return attention_form(
        chip.device, half=False, head_width=widest.head_width, positions=widest.positions, gradient=False
    )
