"""Which of OpenBLAS's kernels to ask for.

OpenBLAS picks kernels by the processor's model number, and takes those of 2004 (SSE3) for one that it does not know:
0.3.21 (Debian 12) does on Xeons since 2023, and a training step then takes 2.3 times as long. So kernels are asked for
by name, from what the processor says it can do. Each family sums in an order of its own: bytes are equal between
machines that have the same one (`backend.numeric_fingerprint` names it).
"""

import platform
import sys
from pathlib import Path

# OpenBLAS's names (its variable OPENBLAS_CORETYPE) and what each needs; the first that fits is taken. Those for AVX-512
# take 0.82 to 0.9 of the time of those for AVX2 in a training step.
FAMILIES = {
    "SkylakeX": frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}),
    "Haswell": frozenset({"avx2", "fma"}),
}
_CPUINFO = Path("/proc/cpuinfo")


def kernels(cpuinfo: Path = _CPUINFO) -> str | None:
    """The name to give in OPENBLAS_CORETYPE; None where OpenBLAS decides: not Linux on x86-64, or an old processor."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return next((family for family, needed in FAMILIES.items() if needed.issubset(flags)), None)
