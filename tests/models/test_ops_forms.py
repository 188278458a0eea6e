"""Which form of an operation is taken: the CPU's own in float32 on a CPU, MLX's everywhere else."""

import numpy as np
import pytest
from ops_checks import Function, draw, gradients, relative

from ado_tasks.backend import mx, on_cpu
from ado_tasks.models import cpu_ops, ops

pytestmark = pytest.mark.skipif(not on_cpu(), reason="compares the CPU forms")


def calls() -> list[tuple[Function, list[mx.array]]]:
    image, kernel = draw(2, 4, 4, 4), draw(4, 3, 3, 4, name="w")
    tokens = draw(2, 2, 6, 4)
    return [
        (ops.silu, [image]),
        (lambda x, w: ops.conv2d(x, w, None, 1, 1), [image, kernel]),
        (lambda x, w: ops.linear(x, w, None), [image, kernel[:, 0, 0]]),
        (lambda x: ops.group_norm(x, 2, mx.ones(4), mx.zeros(4), 1e-5), [image]),
        (lambda x: ops.attention(x, x, x, 0.5), [tokens]),
        (lambda x: ops.group_norm(x, 2, mx.ones(4), mx.zeros(4), 1e-5, x[:, 0, 0] * 3), [image]),
        (lambda x, w: ops.self_attention(x[:, 0], [w[:, 0, 0]] * 3, [mx.ones(4)] * 3, 2, 0.5), [image, kernel]),
        (lambda x, w: ops.upsample_conv2d(x, w, mx.ones(4)), [image, kernel]),
    ]


CPU_FORMS = ("silu", "conv2d", "linear", "group_norm", "attention", "self_attention", "upsample_conv2d")


@pytest.mark.parametrize("number", range(8))
def test_a_gpu_gets_mlx_s_own_operations(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = calls()[number]
    on_this_cpu = np.array(function(*arguments))
    monkeypatch.setattr(ops, "on_cpu", lambda: False)
    for name in CPU_FORMS:
        monkeypatch.setattr(cpu_ops, name, None)  # calling it would fail
    assert relative(function(*arguments), on_this_cpu) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_left_to_mlx(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the statistics of a norm, which are float32 and take its form."""
    for name in set(CPU_FORMS) - {"group_norm"}:
        monkeypatch.setattr(cpu_ops, name, None)
    x, w, tokens = (
        draw(2, 4, 4, 4).astype(dtype),
        draw(4, 3, 3, 4, name="w").astype(dtype),
        draw(2, 2, 6, 4).astype(dtype),
    )
    ones = mx.ones(4).astype(dtype)
    results = [
        ops.silu(x),
        ops.conv2d(x, w, None, 1, 1),
        ops.linear(x, w[:, 0, 0], None),
        ops.group_norm(x, 2, ones, ones, 1e-5),
        ops.attention(tokens, tokens, tokens, 0.5),
        ops.group_norm(x, 2, ones, ones, 1e-5, x[:, 0, 0]),
        ops.self_attention(x[:, 0], [w[:, 0, 0]] * 3, [ones] * 3, 2, 0.5),
        ops.upsample_conv2d(x, w, ones),
    ]
    assert all(result.dtype == dtype and np.isfinite(np.array(result.astype(mx.float32))).all() for result in results)


def test_equal_calls_give_equal_bytes() -> None:
    x, weight = draw(3, 8, 8, 5), draw(4, 3, 3, 5, name="w")

    def run() -> bytes:
        found = gradients(
            lambda x, w: ops.silu(ops.group_norm(ops.conv2d(x, w, None, 1, 1), 2, mx.ones(4), mx.zeros(4), 1e-5)),
            [x, weight],
        )
        return b"".join(np.array(each).tobytes() for each in found)

    assert run() == run()
