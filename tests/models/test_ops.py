"""Each operation in both of its forms: against float64 NumPy, gradients against MLX's own of the plain formula."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.models import cpu_ops, ops

pytestmark = pytest.mark.skipif(not on_cpu(), reason="compares the CPU forms")

Function = Callable[..., mx.array]


def draw(*shape: int, name: str = "x", scale: float = 1.0, offset: float = 0.0) -> mx.array:
    return mx.random.normal(shape, key=rng.key(0, "ops", name, *shape)) * scale + offset


def relative(found: mx.array, wanted: mx.array | np.ndarray) -> float:
    wanted = np.asarray(wanted, dtype=np.float64)
    return float(np.abs(np.asarray(found, dtype=np.float64) - wanted).max() / np.abs(wanted).max())


def gradients(function: Function, arguments: Sequence[mx.array]) -> list[mx.array]:
    """Of Σ r · function with a fixed random r, for each argument."""
    weights = draw(*function(*arguments).shape, name="cotangent")
    places = list(range(len(arguments)))
    found = mx.grad(lambda *a: mx.sum(weights * function(*a)), argnums=places)(*arguments)
    return list(found) if isinstance(found, tuple | list) else [found]


def agree(fast: Function, plain: Function, arguments: Sequence[mx.array], tolerance: float = 3e-6) -> None:
    """Value and every gradient, plain and inside `mx.compile`."""
    wanted, wanted_gradients = plain(*arguments), gradients(plain, arguments)
    for how in (lambda f: f, mx.compile):
        assert relative(how(fast)(*arguments), wanted) < tolerance
        found = how(lambda *a: gradients(fast, a))(*arguments)
        for place, (one, other) in enumerate(zip(found, wanted_gradients, strict=True)):
            assert one.shape == arguments[place].shape
            assert relative(one, other) < tolerance, f"gradient {place}"


# --- silu, exponential


@pytest.mark.parametrize("how", [lambda f: f, mx.compile], ids=["plain", "compiled"])
def test_silu_is_exact_to_float32_everywhere(how: Callable) -> None:
    x = np.concatenate([np.linspace(-30, 30, 600_001), [0, 1e-40, -1e-40, 1e-20, 300, -300, 1e6, -1e6, 3e38, -3e38]])
    x = x.astype(np.float32)
    exact = x.astype(np.float64)
    exact = np.where(exact < -700, 0.0, exact / (1 + np.exp(-np.clip(exact, -700, 700))))
    error = np.abs(np.asarray(how(ops.silu)(mx.array(x)), dtype=np.float64) - exact)
    assert (error / np.maximum(1, np.abs(x))).max() < 3e-7
    assert error[x <= -1000].max() == 0  # a sigmoid that is not quite 0 would make a large number of a huge one


@pytest.mark.parametrize("how", [lambda f: f, mx.compile], ids=["plain", "compiled"])
def test_nothing_hides_a_nan_or_an_infinity(how: Callable) -> None:
    x = mx.array([np.nan, np.inf, -np.inf, 1.0])
    assert np.isfinite(np.array(how(ops.silu)(x))).tolist() == [False, False, False, True]
    assert np.isnan(np.array(how(cpu_ops.exp2_of_nonpositive)(mx.array([np.nan]))))
    image = mx.zeros((1, 4, 4, 2))
    image[0, 1, 1, 0] = np.nan
    kernel = mx.ones((2, 3, 3, 2))
    assert np.isnan(np.array(how(lambda x: ops.conv2d(x, kernel, None, 1, 1))(image))).any()
    assert np.isnan(np.array(how(lambda x: ops.group_norm(x, 1, mx.ones(2), mx.zeros(2), 1e-5))(image))).all()
    tokens = image.reshape(1, 1, 16, 2)
    assert np.isnan(np.array(how(lambda x: ops.attention(x, x, x, 1.0))(tokens))).all()


def test_silu_gradient() -> None:
    agree(ops.silu, lambda x: x * mx.sigmoid(x), [draw(3, 5, 7, 4, scale=5)])


def test_power_of_two() -> None:
    z = -np.linspace(0, 125, 500_001).astype(np.float32)
    for how in (lambda f: f, mx.compile):
        found = np.asarray(how(cpu_ops.exp2_of_nonpositive)(mx.array(z)), dtype=np.float64)
        assert np.abs(found / np.exp2(z.astype(np.float64)) - 1).max() < 3e-7
        deep = np.array(how(cpu_ops.exp2_of_nonpositive)(mx.array([-126.0, -200.0, -1e30, -np.inf])))
        assert (deep == np.float32(2.0**-126)).all()


# --- convolution


def convolved(x: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """y[b, i, j, o] = Σ_{u, v, c} x[b, s i + u - p, s j + v - p, c] w[o, u, v, c], in float64."""
    x = np.pad(x.astype(np.float64), [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    kernel = weight.shape[1]
    height, width = ((size - kernel) // stride + 1 for size in x.shape[1:3])
    y = np.zeros((x.shape[0], height, width, weight.shape[0]))
    for u in range(kernel):
        for v in range(kernel):
            part = x[:, u : u + stride * (height - 1) + 1 : stride, v : v + stride * (width - 1) + 1 : stride]
            y += part @ weight[:, u, v].astype(np.float64).T
    return y


CONVOLUTIONS = [  # kernel, stride, padding, height, width
    (3, 1, 1, 8, 8),
    (3, 1, 1, 5, 7),
    (3, 1, 1, 1, 1),
    (3, 1, 0, 6, 5),
    (3, 1, 2, 4, 6),
    (5, 1, 2, 6, 8),
    (1, 1, 0, 8, 4),
    (3, 2, 1, 8, 8),
    (3, 2, 1, 7, 9),
    (3, 2, 1, 2, 2),
    (3, 2, 0, 9, 7),
    (3, 2, 0, 8, 6),
    (1, 2, 0, 6, 6),  # the rest have no form of their own
    (3, 3, 1, 9, 9),
    (2, 2, 0, 8, 8),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(case: tuple[int, ...]) -> None:
    kernel, stride, padding, height, width = case
    x, weight = draw(3, height, width, 5), draw(4, kernel, kernel, 5, name="w")
    found = ops.conv2d(x, weight, None, stride, padding)
    assert relative(found, convolved(np.array(x), np.array(weight), stride, padding)) < 2e-6
    agree(
        lambda x, weight: ops.conv2d(x, weight, None, stride, padding),
        lambda x, weight: mx.conv2d(x, weight, stride=stride, padding=padding),
        [x, weight],
    )


def test_convolution_adds_its_bias() -> None:
    x, weight, bias = draw(2, 4, 4, 3), draw(6, 3, 3, 3, name="w"), draw(6, name="b")
    agree(
        lambda *a: ops.conv2d(*a, 1, 1),
        lambda x, weight, bias: mx.conv2d(x, weight, padding=1) + bias,
        [x, weight, bias],
    )


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 4, 5)], ids=str)
def test_linear(shape: tuple[int, ...]) -> None:
    x, weight, bias = draw(*shape), draw(7, 5, name="w"), draw(7, name="b")
    agree(ops.linear, lambda x, weight, bias: x @ weight.T + bias, [x, weight, bias])
    agree(lambda x, w: ops.linear(x, w, None), lambda x, weight: x @ weight.T, [x, weight])


# --- group norm, attention, upsampling


def normalised(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """As torch.nn.GroupNorm says, in float64."""
    y = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    y = (y - y.mean(axis=(1, 3), keepdims=True)) / np.sqrt(y.var(axis=(1, 3), keepdims=True) + eps)
    return y.reshape(x.shape) * weight + bias


def plain_group_norm(x: mx.array, weight: mx.array, bias: mx.array, groups: int, eps: float) -> mx.array:
    y = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    y = (y - mx.mean(y, axis=(1, 3), keepdims=True)) * mx.rsqrt(mx.var(y, axis=(1, 3), keepdims=True) + eps)
    return y.reshape(x.shape) * weight + bias


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("shape", [(4, 6, 5, 12), (4, 9, 12), (4, 12)], ids=str)
def test_group_norm(shape: tuple[int, ...], groups: int) -> None:
    if groups == shape[-1] and len(shape) == 2:
        pytest.skip("one number a group: its variance is 0")
    x, weight, bias = draw(*shape, scale=3, offset=2), draw(12, name="w"), draw(12, name="b")
    found = ops.group_norm(x, groups, weight, bias, 1e-5)
    assert relative(found, normalised(np.array(x), groups, np.array(weight), np.array(bias), 1e-5)) < 2e-6
    agree(
        lambda *a: ops.group_norm(a[0], groups, a[1], a[2], 1e-3),
        lambda *a: plain_group_norm(*a, groups, 1e-3),
        [x, weight, bias],
        tolerance=1e-5,
    )


def test_group_norm_keeps_its_digits_where_the_mean_is_large() -> None:
    x = draw(2, 8, 8, 8, offset=300)  # E x² - (E x)² in float32 would be off by 300² · 6e-8 = 0.5 %
    found = ops.group_norm(x, 2, mx.ones(8), mx.zeros(8), 1e-5)
    assert relative(found, normalised(np.array(x), 2, np.ones(8), np.zeros(8), 1e-5)) < 5e-5


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    scores = np.einsum("bhid,bhjd->bhij", q.astype(np.float64), k) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhij,bhjd->bhid", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["ordinary", "peaked"])
def test_attention(spread: float) -> None:
    q, k, v = (draw(2, 3, 10, 4, name=name, scale=spread if name == "q" else 1) for name in "qkv")
    assert relative(ops.attention(q, k, v, 0.5), attended(*map(np.array, (q, k, v)), 0.5)) < 5e-6  # pyright: ignore
    agree(
        lambda *a: ops.attention(*a, 0.5),
        lambda q, k, v: mx.softmax(q @ k.swapaxes(-1, -2) * 0.5, axis=-1) @ v,
        [q, k, v],
        tolerance=3e-5,
    )


def test_attention_from_fewer_or_more_queries_than_keys() -> None:
    q, k, v = draw(2, 3, 5, 4, name="q"), draw(2, 3, 11, 4, name="k"), draw(2, 3, 11, 6, name="v")
    assert relative(ops.attention(q, k, v, 0.7), attended(*map(np.array, (q, k, v)), 0.7)) < 5e-6  # pyright: ignore


def test_upsampling_repeats_each_pixel() -> None:
    x = draw(2, 3, 4, 5)
    assert (np.array(ops.upsample_nearest(x)) == np.repeat(np.repeat(np.array(x), 2, axis=1), 2, axis=2)).all()


# --- which form


def calls() -> list[tuple[Function, list[mx.array]]]:
    image, kernel = draw(2, 4, 4, 4), draw(4, 3, 3, 4, name="w")
    tokens = draw(2, 2, 6, 4)
    return [
        (ops.silu, [image]),
        (lambda x, w: ops.conv2d(x, w, None, 1, 1), [image, kernel]),
        (lambda x, w: ops.linear(x, w, None), [image, kernel[:, 0, 0]]),
        (lambda x: ops.group_norm(x, 2, mx.ones(4), mx.zeros(4), 1e-5), [image]),
        (lambda x: ops.attention(x, x, x, 0.5), [tokens]),
    ]


@pytest.mark.parametrize("number", range(5), ids=["silu", "conv2d", "linear", "group_norm", "attention"])
def test_a_gpu_gets_mlx_s_own_operations(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = calls()[number]
    on_this_cpu = np.array(function(*arguments))
    monkeypatch.setattr(ops, "on_cpu", lambda: False)
    for name in ("silu", "conv2d", "linear", "group_norm", "attention"):
        monkeypatch.setattr(cpu_ops, name, None)  # calling it would fail
    assert relative(function(*arguments), on_this_cpu) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_left_to_mlx(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("silu", "conv2d", "linear", "group_norm", "attention"):
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
