"""Diffusers' own schedulers on an exported model, in PyTorch: the other side of bench/quality.py."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.sampling import Draw, Images
from ado_tasks.storage import read_json


@dataclass(frozen=True)
class Scheduler:
    """One of Diffusers' schedulers, made from the model's own scheduler config with these fields changed."""

    class_name: str
    fields: dict[str, Any] = field(default_factory=dict)
    steps_of: Callable[[int], int] = lambda nfe: nfe  # most steps within so many network evaluations


_DPM, _UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SCHEDULERS: dict[str, Scheduler] = {
    "DDIM": Scheduler("DDIMScheduler"),
    "DPM++ 2M": Scheduler(_DPM, {"solver_order": 2}),
    "DPM++ 2M Karras": Scheduler(_DPM, {"solver_order": 2, "use_karras_sigmas": True}),
    "DPM++ 2M log-SNR": Scheduler(_DPM, {"solver_order": 2, "use_lu_lambdas": True}),
    "UniPC": Scheduler(_UNIPC, {"solver_order": 2}),
    "UniPC Karras": Scheduler(_UNIPC, {"solver_order": 2, "use_karras_sigmas": True}),
    # Two evaluations a step but one in the last: 2 n − 1.
    "Heun": Scheduler("HeunDiscreteScheduler", steps_of=lambda nfe: (nfe + 1) // 2),
    "Heun Karras": Scheduler("HeunDiscreteScheduler", {"use_karras_sigmas": True}, lambda nfe: (nfe + 1) // 2),
}
LCM = Scheduler("LCMScheduler")  # for consistency models only: it draws noise between steps


def available() -> bool:
    """Whether PyTorch and Diffusers can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch  # noqa: F401
            from diffusers.utils import logging
    except ImportError:
        return False
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return True


class Model:
    """An exported model in PyTorch, on a GPU where PyTorch has one."""

    def __init__(self, folder: Path, threads: int, batch_size: int = 256) -> None:
        """`threads` of a CPU are used; `batch_size` images go through the network at a time.

        Raises:
            ArtifactError: there is no such folder, or it is not a model.
            ConfigError: its noise schedule is not variance preserving, so that DDIM has no meaning.
        """
        import torch
        from diffusers.models.unets.unet_2d import UNet2DModel

        self._config = read_json(folder / "scheduler" / "scheduler_config.json", "_class_name")
        if str(self._config["_class_name"]).startswith("EDM"):
            raise ConfigError(f"{folder}: its scheduler is {self._config['_class_name']}; allowed: one with betas")
        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            unet: Any = UNet2DModel.from_pretrained(folder, subfolder="unet")
        except (OSError, ValueError) as problem:
            raise ArtifactError(f"{folder}: Diffusers cannot load it ({problem})") from None
        self._unet = unet.to(self._device).eval()
        self._batch_size = batch_size

    def sample(self, scheduler: Scheduler, nfe: int, start: Draw) -> tuple[Images, int]:
        """Samples (n, H, W, C) from `start`, not clipped, and the network evaluations an image that were made."""
        import torch

        batches, evaluations = [], 0
        for first in range(0, len(start), self._batch_size):
            rows = slice(first, first + self._batch_size)
            noise = torch.from_numpy(start.noise[rows]).permute(0, 3, 1, 2).to(self._device)
            labels = None if start.labels is None else torch.from_numpy(start.labels[rows]).long().to(self._device)
            with torch.inference_mode():
                found, evaluations = self._solve(scheduler, scheduler.steps_of(nfe), noise, labels, first)
            batches.append(found.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(batches), evaluations

    def _solve(self, scheduler: Scheduler, steps: int, noise: Any, labels: Any, seed: int) -> tuple[Any, int]:
        import diffusers
        import torch

        kind = getattr(diffusers, scheduler.class_name)
        solver = kind.from_config(self._config, **scheduler.fields)
        solver.set_timesteps(steps)
        # Only what draws noise takes a generator.
        chance = {"generator": torch.Generator().manual_seed(seed)} if scheduler is LCM else {}
        sample = noise * solver.init_noise_sigma
        for t in solver.timesteps:
            output = self._unet(solver.scale_model_input(sample, t), t, class_labels=labels).sample
            sample = solver.step(output, t, sample, **chance).prev_sample
        return sample, len(solver.timesteps)
