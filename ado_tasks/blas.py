"""Which of OpenBLAS's kernels to ask for.

OpenBLAS picks kernels by the processor's model number, and takes those of 2004 (SSE3) for one that it does not know:
0.3.21 (Debian 12) does on Xeons since 2023, and a training step then takes 2.3 times as long. It also sums in another
order for each family that it knows. So the kernels for AVX2 and FMA are asked for by name wherever the processor has
both: they run everywhere, are as fast here as those for AVX-512 (products are small), and give the same bytes.
"""

import platform
import sys
from pathlib import Path

AVX2_KERNELS = "Haswell"  # OpenBLAS's name for them, in its variable OPENBLAS_CORETYPE
_NEEDED = frozenset({"avx2", "fma"})
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
    return AVX2_KERNELS if _NEEDED.issubset(flags) else None
