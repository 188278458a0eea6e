"""Samplers of one signature, `(denoise, z, times, schedule, *, key, trajectory) → x`, one file each.

All take coefficients in float64 from the host and keep states in float32; the Python loop dispatches each step as it is
known. Nothing is compiled here: compile `denoise`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ado_tasks.backend import mx
from ado_tasks.diffusion.solvers.ancestral import ancestral
from ado_tasks.diffusion.solvers.angle_ab2 import angle_ab2
from ado_tasks.diffusion.solvers.common import Times
from ado_tasks.diffusion.solvers.consistency import consistency
from ado_tasks.diffusion.solvers.ddim import ddim, ddim_step
from ado_tasks.diffusion.solvers.dpmpp_2m import dpmpp_2m
from ado_tasks.diffusion.solvers.heun import heun
from ado_tasks.diffusion.solvers.ipndm import ipndm
from ado_tasks.errors import ConfigError

Sampler = Callable[..., mx.array | tuple[mx.array, list[mx.array]]]


@dataclass(frozen=True)
class Solver:
    """A sampler and what it costs. `order` is its measured order of convergence; 0 where it has none."""

    name: str
    sample: Sampler
    order: int
    evaluations_a_step: int = 1
    stochastic: bool = False

    def nfe(self, times: Times) -> int:
        """Network evaluations an image on this grid; a last step to t = 0 takes one whatever the solver."""
        steps = len(times) - 1
        return self.evaluations_a_step * steps - (self.evaluations_a_step - 1) * int(float(times[-1]) == 0)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", ddim, order=1),
        Solver("ancestral", ancestral, order=1, stochastic=True),
        Solver("heun", heun, order=2, evaluations_a_step=2),
        Solver("dpmpp_2m", dpmpp_2m, order=2),
        Solver("ipndm", ipndm, order=2),
        Solver("consistency", consistency, order=0, stochastic=True),
        Solver("angle_ab2", angle_ab2, order=2),
    )
}


def solver(name: str) -> Solver:
    """A solver by name. Raises ConfigError for a name that does not exist."""
    if name not in SOLVERS:
        raise ConfigError(f"solver: {name!r} is not allowed; allowed: {', '.join(SOLVERS)}")
    return SOLVERS[name]


__all__ = [
    "SOLVERS",
    "Sampler",
    "Solver",
    "ancestral",
    "angle_ab2",
    "consistency",
    "ddim",
    "ddim_step",
    "dpmpp_2m",
    "heun",
    "ipndm",
    "solver",
]
