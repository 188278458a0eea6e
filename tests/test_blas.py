"""Which kernels are asked for, from what /proc/cpuinfo says; and that OpenBLAS then has them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ado_tasks import blas
from ado_tasks.backend import BLAS, numeric_fingerprint


@pytest.mark.parametrize(
    ("flags", "wanted"), [("fpu sse3 avx2 fma avx512f", "Haswell"), ("fpu sse3 avx", None), ("fma avx2x", None)]
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
