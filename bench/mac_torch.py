"""PyTorch's side of `mac.py` and `gpu_step.py`: Diffusers' network, the same weights, eager or `torch.compile`d.

Nothing of this project is imported, and no MLX: the process is what a user of PyTorch has. On MPS (Apple's GPU)
nothing here has been run yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from mac_contender import MIB, Contender, Job

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Device:
    """Where PyTorch computes, and what differs from one device to another."""

    kind: str  # "cuda", "mps" or "cpu"
    name: str
    wait: Callable[[], None]  # until all that was handed out is done
    rest: Callable[[], None]  # give cached memory back


def device_of(cores: int) -> Device:
    """The accelerator that there is, else the CPU with `cores` threads."""
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), torch.cuda.synchronize, torch.cuda.empty_cache)
    if torch.backends.mps.is_available():
        return Device("mps", "mps", torch.mps.synchronize, torch.mps.empty_cache)
    torch.set_num_threads(cores)
    return Device("cpu", "cpu", lambda: None, lambda: None)


def peak(device: Device) -> tuple[Callable[[Callable[[], object]], float | None], str]:
    """How this device counts memory, and what the count is."""

    def on_cuda(action: Callable[[], object]) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() / MIB

    def on_mps(action: Callable[[], object]) -> float:
        torch.mps.empty_cache()
        action()
        return torch.mps.driver_allocated_memory() / MIB  # MPS keeps no peak; its cache does not shrink by itself

    def on_cpu(action: Callable[[], object]) -> None:
        action()

    counts = {
        "cuda": (on_cuda, "PyTorch's peak"),
        "mps": (on_mps, "what Metal's driver holds for PyTorch afterwards"),
        "cpu": (on_cpu, "PyTorch counts nothing on a CPU"),
    }
    return counts[device.kind]


def contender(job: Job) -> Contender:
    """The form of a job: "pytorch eager" or "pytorch compiled". Whatever PyTorch raises is the reason it is skipped."""
    device = device_of(job["cores"])
    # MLX multiplies in TF32 on CUDA unless told not to: the same on this side.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job["tf32"]
    unet: Any = UNet2DModel.from_pretrained(job["teacher"], subfolder="unet", local_files_only=True)
    unet = unet.to(device.kind)
    if job.get("precision", "float32") != "float32":
        # What is quickest on an NVIDIA GPU: images and kernels channels last, the quickest convolution looked for.
        torch.backends.cudnn.benchmark = True
        unet = unet.to(memory_format=torch.channels_last)
        if job["part"] == "sampling":
            unet = unet.to(KINDS[job["precision"]])
    # The compiler is asked in the first call, below: where there is none, that call raises.
    apply = torch.compile(unet) if job["form"] == "pytorch compiled" else unet
    drawn = np.load(job["inputs"])
    inputs = {name: torch.from_numpy(drawn[name]).to(device.kind) for name in drawn.files}
    make = training if job["part"] == "training" else sampling
    actions, check = make(job, unet, apply, inputs, device)
    versions = {name: version(name) for name in ("torch", "diffusers")}
    return Contender(actions, device.name, versions, check, *peak(device), device.rest)


def laid_out(job: Job, images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) as Diffusers takes it, (B, C, H, W); in a half with channels last in memory."""
    last = job.get("precision", "float32") != "float32"
    layout = torch.channels_last if last else torch.contiguous_format
    return images.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def labels_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"class_labels": inputs["labels"].long()} if "labels" in inputs else {}


def training(
    job: Job, unet: Any, apply: Any, inputs: dict[str, torch.Tensor], device: Device
) -> tuple[dict[str, Callable[[], object]], list[float]]:
    """The same step as MLX's: forward, backward, clip, Adam (fused where there is one), averaged weights.

    Without dropout on both sides: no two frameworks draw the same masks, and the losses are compared.
    """
    images, noise, t = laid_out(job, inputs["images"]), laid_out(job, inputs["noise"]), inputs["t"]
    labels, weights = labels_of(inputs), list(unet.parameters())
    average = [weight.detach().clone() for weight in weights]
    try:
        optimiser = torch.optim.Adam(weights, lr=job["learning_rate"], fused=True)
    except RuntimeError:  # this device has no fused Adam
        optimiser = torch.optim.Adam(weights, lr=job["learning_rate"])
    unet.eval()  # Dropout is the only layer that asks
    precision = job.get("precision", "float32")

    def forward() -> torch.Tensor:
        if precision == "float32":
            return apply(images, t, **labels).sample
        with torch.autocast(device.kind, KINDS[precision]):
            return apply(images, t, **labels).sample.float()

    # Float16 alone needs a scale: the same as on MLX's side (models/precision.py), and divided out again.
    scale = 1024.0 if precision == "float16" else 1.0

    def run() -> float:
        optimiser.zero_grad()
        loss = ((forward() - noise) ** 2).mean()
        (loss * scale).backward()
        if scale != 1:
            torch._foreach_div_([weight.grad for weight in weights], scale)  # pyright: ignore
        torch.nn.utils.clip_grad_norm_(weights, job["clip"])
        optimiser.step()
        torch._foreach_lerp_(average, weights, 1 - job["ema_decay"])  # pyright: ignore[reportPrivateImportUsage]
        value = loss.item()
        device.wait()
        return value

    return {"step": run}, [run() for _ in range(job["checked_steps"])]


def sampling(
    job: Job, unet: Any, apply: Any, inputs: dict[str, torch.Tensor], device: Device
) -> tuple[dict[str, Callable[[], object]], list[float]]:
    """The teacher's DDIM, written out: quicker than through a scheduler object, and the same numbers."""
    noise, labels = laid_out(job, inputs["noise"]), labels_of(inputs)
    teacher = job["samplings"][0]
    unet.eval()

    kind = KINDS[job.get("precision", "float32")]

    def run() -> np.ndarray:
        z = noise
        with torch.inference_mode():
            for (alpha, sigma, timestep), (next_alpha, next_sigma, _) in zip(
                teacher["levels"][:-1], teacher["levels"][1:], strict=True
            ):
                t = torch.full((len(z),), timestep, device=z.device)
                x = to_x(apply(z.to(kind), t, **labels).sample.float(), z, alpha, sigma, job["kind"])
                z = next_alpha * x + next_sigma / sigma * (z - alpha * x)
            images = z.permute(0, 2, 3, 1).cpu().numpy()
        device.wait()
        return images

    images = run()
    return {teacher["name"]: run}, images[: job["checked_images"]].ravel().tolist()


def to_x(output: torch.Tensor, z: torch.Tensor, alpha: float, sigma: float, kind: str) -> torch.Tensor:
    """The clean image that a network's output means (as diffusion/parameterisation.py)."""
    if kind == "epsilon":
        return (z - sigma * output) / alpha
    return output if kind == "sample" else alpha * z - sigma * output  # v of a variance-preserving schedule
