"""The CUDA kernels of group normalisation, run on a CPU: against MLX's own operations, values and every gradient."""

import shutil
from pathlib import Path

import pytest
from cuda_on_a_cpu import Emulated
from ops_checks import draw, gradients, relative

from ado_tasks.backend import mx, on_cpu
from ado_tasks.models import cuda_norm, ops

pytestmark = [
    pytest.mark.skipif(not on_cpu(), reason="runs the kernels on a CPU"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


GROUPS = 4


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Emulated]:
    """With the SiLU and without."""
    folder = Path(tmp_path_factory.mktemp("cuda"))
    return {silu: Emulated(folder, GROUPS, silu) for silu in (False, True)}


@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm and SiLU"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 8), (2, 4, 4, 24), (1, 300, 12)], ids=["odd pixels", "wide groups", "several splits"]
)
def test_kernels_compute_a_group_norm_and_its_gradient(
    shape: tuple[int, ...], silu: bool, emulated: dict[bool, Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_norm, "_kernel", emulated[silu].kernel)
    monkeypatch.setattr(cuda_norm, "THREADS", 12)  # each of them is a thread of this machine
    x, channels = draw(*shape, offset=3.0), shape[-1]
    weight, bias, shift = (draw(n, channels, name=str(n)) for n in (1, 2, shape[0]))
    weight, bias = 1 + 0.3 * weight[0], bias[0]

    def kernels(*a: mx.array) -> mx.array:
        return cuda_norm.group_norm(a[0], GROUPS, a[1], a[2], 1e-5, a[3], silu=silu)

    def plain(*a: mx.array) -> mx.array:
        normal = ops.group_norm(a[0], GROUPS, a[1], a[2], 1e-5, a[3])
        return normal * mx.sigmoid(normal) if silu else normal

    arguments = [x, weight, bias, shift]
    assert relative(kernels(*arguments), plain(*arguments)) < 1e-5
    for place, (one, other) in enumerate(zip(gradients(kernels, arguments), gradients(plain, arguments), strict=True)):
        assert relative(one, other) < 1e-5, f"gradient {place}"


def test_a_large_mean_costs_no_digits(emulated: dict[bool, Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_norm, "_kernel", emulated[False].kernel)
    monkeypatch.setattr(cuda_norm, "THREADS", 12)
    x, one, zero = draw(1, 64, 8, offset=1000.0), mx.ones(8), mx.zeros(8)
    found = cuda_norm.group_norm(x, GROUPS, one, zero, 1e-5, None, silu=False)
    assert relative(found, ops.group_norm(x, GROUPS, one, zero, 1e-5)) < 1e-3


@pytest.mark.parametrize("shape", [(7, 8), (2, 9, 11, 12)])
def test_column_sums(shape: tuple[int, ...], emulated: dict[bool, Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_norm, "_kernel", emulated[False].kernel)
    monkeypatch.setattr(cuda_norm, "THREADS", 12)
    x = draw(*shape)
    assert relative(cuda_norm.column_sums(x), mx.sum(x, axis=tuple(range(x.ndim - 1)))) < 1e-5


def test_a_cpu_never_gets_them() -> None:
    assert not cuda_norm.fits(mx.zeros((1, 4, 8)), 2)
