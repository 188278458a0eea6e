"""The one place where MLX is imported from, so that it is always set up the same way.

`from ado_tasks.backend import mx, nn` everywhere else: on Linux the CPU wheel of MLX carries reference BLAS
(3.7 GFLOP/s in a matrix product); OpenBLAS loaded before it brings 40 to 90. macOS uses Accelerate and Metal and needs
nothing.
"""

import ctypes
import os
import platform
import shutil
import sys
import warnings
from importlib.metadata import version

OPENBLAS_INSTALL = "apt-get install libopenblas0-pthread"
COMPILER_INSTALL = "apt-get install g++"


def _preload_openblas() -> str:
    """Load OpenBLAS ahead of MLX and return the name of the BLAS in use."""
    if sys.platform != "linux":
        return "accelerate"
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        warnings.warn(
            f"OpenBLAS is missing: MLX will be about ten times slower on this CPU. Install it with: {OPENBLAS_INSTALL}",
            stacklevel=2,
        )
        return "reference"
    return "openblas"


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # names of mallopt(3)


def _keep_freed_memory() -> bool:
    """Let glibc keep what MLX's CPU backend frees, for its next array; False where the C library is another one.

    By default an array above 128 KiB is mapped anew each time, and every page of it comes as a fault of its own:
    sampling from the demo's network takes 1.15 times as long (bench/memory_kept.py), with the same bytes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, 2**30) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


BLAS = _preload_openblas()
KEEPS_MEMORY = os.environ.get("ADO_KEEP_MEMORY", "1") != "0" and _keep_freed_memory()

# MLX keeps plans of cuDNN's convolutions by shape, alignment and direction: 128 by default, and a U-Net needs about as
# many, each of which takes milliseconds to make anew. Read at MLX's first convolution.
os.environ.setdefault("MLX_CUDA_CONV_CACHE_SIZE", "1024")

# MLX hands kernels to CUDA in graphs that it builds anew for each hundred of them. Launched one by one, those of U-Nets
# take less of the host's time: a training step of 7 million parameters 0.73 of it, sampling 0.56 to 0.69 (H200).
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")

import mlx.core as mx  # noqa: E402  (after the preload, on purpose)
import mlx.optimizers as optim  # noqa: E402
import mlx.utils as mlx_utils  # noqa: E402
from mlx import nn  # noqa: E402


def on_cpu() -> bool:
    """True where MLX computes on the CPU (its default device is neither Metal nor CUDA)."""
    return mx.default_device().type == mx.DeviceType.cpu


# MLX compiles fused CPU kernels with the system's C++ compiler; without one it would fail at the first compiled step.
HAS_CPU_COMPILER = shutil.which("g++") is not None or shutil.which("c++") is not None
if on_cpu() and not HAS_CPU_COMPILER:
    mx.disable_compile()
    warnings.warn(
        f"no C++ compiler: MLX cannot fuse CPU kernels and will be slower. Install: {COMPILER_INSTALL}", stacklevel=2
    )


def numeric_fingerprint() -> dict[str, str]:
    """What decides the last bit of a result: equal fingerprints give equal bytes for equal inputs."""
    return {
        "device": "cpu" if on_cpu() else str(mx.device_info().get("device_name", "gpu")),
        "machine": platform.machine(),
        "blas": BLAS,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "blas_kernels": os.environ.get("OPENBLAS_CORETYPE", "default"),
        "compiled": str(HAS_CPU_COMPILER or not on_cpu()),
        "mlx": version("mlx"),
    }


__all__ = [
    "BLAS",
    "HAS_CPU_COMPILER",
    "KEEPS_MEMORY",
    "mlx_utils",
    "mx",
    "nn",
    "numeric_fingerprint",
    "on_cpu",
    "optim",
]
