"""Which kernels are asked for, from what /proc/cpuinfo says; and that OpenBLAS then has them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ado_tasks import blas
from ado_tasks.backend import BLAS, mx, numeric_fingerprint


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("fpu avx2 fma avx512f avx512cd avx512bw avx512dq avx512vl amx_tile", "SkylakeX"),
        ("fpu avx2 fma avx512f", "Haswell"),  # a part of AVX-512 is not enough
        ("fpu sse3 avx", None),
        ("fma avx2x", None),
    ],
)
def test_kernels_follow_the_flags(flags: str, wanted: str | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: new\nflags\t\t: {flags}\n")
    assert blas.kernels(file) == wanted


def test_elsewhere_openblas_decides(tmp_path: Path, monkeypatch) -> None:
    assert blas.kernels(tmp_path / "missing") is None
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert blas.kernels() is None


@pytest.mark.skipif(BLAS != "openblas" or blas.kernels() is None, reason="another BLAS, or an old processor")
def test_openblas_has_the_kernels_that_were_asked_for() -> None:
    """In a process of its own, without what this one's environment already says."""
    code = (
        "import ctypes, ado_tasks.backend\n"
        "library = ctypes.CDLL('libopenblas.so.0')\n"
        "library.openblas_get_corename.restype = ctypes.c_char_p\n"
        "print(library.openblas_get_corename().decode())\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    said = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert said.split()[-1] == blas.kernels()


def test_the_fingerprint_names_them() -> None:
    assert numeric_fingerprint()["blas_kernels"] == os.environ.get("OPENBLAS_CORETYPE", "default")


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 3, 5), (64, 72, 16), (513, 129, 33), (4096, 288, 32), (33, 4096, 288)]
)
@pytest.mark.parametrize("turned", ["nn", "tn", "nt"])
def test_products_are_right(shape: tuple[int, int, int], turned: str) -> None:
    """Old versions had kernels that were wrong on some processors."""
    m, k, n = shape
    draw = np.random.default_rng(0)
    a = draw.standard_normal((k, m) if turned[0] == "t" else (m, k)).astype(np.float32)
    b = draw.standard_normal((n, k) if turned[1] == "t" else (k, n)).astype(np.float32)
    left, right = (a.T if turned[0] == "t" else a), (b.T if turned[1] == "t" else b)
    in_mlx = [mx.array(each).T if turn == "t" else mx.array(each) for each, turn in zip((a, b), turned, strict=True)]
    found = np.array(in_mlx[0] @ in_mlx[1])
    expected = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.sqrt(k), rtol=0)
