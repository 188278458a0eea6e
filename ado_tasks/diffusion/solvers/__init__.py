"""Samplers of one signature: `(denoise, z, times, schedule, *, key, trajectory) → x`, one file each."""

from ado_tasks.diffusion.solvers.ddim import ddim, ddim_step

__all__ = ["ddim", "ddim_step"]
