"""MLX's side of `mac.py` and `gpu_step.py`: the project's own training step and sampler, compiled or not."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_profile
import numpy as np
from mac_contender import MIB, Contender, Job, Unsupported

from ado_tasks.backend import HAS_CPU_COMPILER, mx, on_cpu
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.models.precision import in_precision, lowered
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.sampling import Draw, Sampler

Profiles = dict[str, Callable[[], dict[str, Any]]]


def contender(job: Job) -> Contender:
    """The form of a job: "mlx compiled" or "mlx uncompiled". Raises Unsupported."""
    if job["form"] == "mlx uncompiled":
        mx.disable_compile()
    elif on_cpu() and not HAS_CPU_COMPILER:
        raise Unsupported("MLX cannot compile on this CPU: there is no C++ compiler")
    make = training if job["part"] == "training" else sampling
    actions, check, profiles = make(job)
    device = "cpu" if on_cpu() else str(mx.device_info().get("device_name", "gpu"))
    return Contender(actions, device, {"mlx": version("mlx")}, check, peak_mib, "MLX's peak", mx.clear_cache, profiles)


def peak_mib(action: Callable[[], object]) -> float:
    mx.clear_cache()
    mx.reset_peak_memory()
    action()
    return mx.get_peak_memory() / MIB


def training(job: Job) -> tuple[dict[str, Callable[[], object]], list[float], Profiles]:
    """A whole step: forward, backward, clip, Adam, averaged weights. Checked: the losses before the first steps."""
    unet = read_model(Path(job["teacher"])).unet
    precision = job.get("precision", "float32")
    apply = in_precision(unet, precision)
    drawn = np.load(job["inputs"])
    batch = {name: mx.array(drawn[name]) for name in drawn.files}

    def loss(parameters: Any, part: Any) -> mx.array:
        unet.update(lowered(parameters, precision))
        return mx.mean((apply(part["images"], part["t"], part.get("labels")) - part["noise"]) ** 2)

    step = TrainStep(loss, unet.parameters(), clip=job["clip"], ema_decay=job["ema_decay"], shards=job["cores"])

    def run() -> float:
        value = step(batch, job["learning_rate"])
        mx.eval(value, step.parameters())
        return float(np.array(value))

    profiles = {"overhead": lambda: gpu_profile.overhead(step, batch, job["learning_rate"])}
    return {"step": run}, [run() for _ in range(job["checked_steps"])], profiles


def sampling(job: Job) -> tuple[dict[str, Callable[[], object]], list[float], Profiles]:
    """Whole samplings, from noise to image. Checked: the teacher's images."""
    drawn = np.load(job["inputs"])
    start = Draw(drawn["noise"], drawn["labels"].astype(np.int32) if "labels" in drawn.files else None)
    samplers: dict[str, Sampler] = {}
    actions: dict[str, Callable[[], object]] = {}
    for entry in job["samplings"]:
        folder = entry["model"]
        if folder not in samplers:
            stored: StoredModel = read_model(Path(folder))
            stored.unet.update(lowered(stored.unet.parameters(), job.get("precision", "float32")))
            samplers[folder] = Sampler(stored, len(start), job["cores"])
        actions[entry["name"]] = _sampling(samplers[folder], start, entry)
    images = np.asarray(actions[job["samplings"][0]["name"]]())
    return actions, images[: job["checked_images"]].ravel().tolist(), {}


def _sampling(sampler: Sampler, start: Draw, entry: dict[str, Any]) -> Callable[[], object]:
    told = None if entry["told"] is None else np.array(entry["told"])
    times = np.array(entry["times"])
    return lambda: sampler(start, entry["solver"], times, told=told)
