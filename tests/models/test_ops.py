"""Each operation in both of its forms: against float64 NumPy, gradients against MLX's own of the plain formula."""

from collections.abc import Callable

import numpy as np
import pytest
from ops_checks import Function, agree, draw, gradients, relative

from ado_tasks.backend import mx, on_cpu
from ado_tasks.models import cpu_ops, ops

pytestmark = pytest.mark.skipif(not on_cpu(), reason="compares the CPU forms")

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


@pytest.mark.parametrize("case", [(3, 1, 8, 8), (3, 0, 6, 5), (3, 2, 4, 3), (5, 2, 6, 8), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("channels", [1, 2])
def test_convolution_of_few_channels(case: tuple[int, ...], channels: int) -> None:
    kernel, padding, height, width = case
    x, weight = draw(3, height, width, channels), draw(7, kernel, kernel, channels, name="w")
    agree(
        lambda x, weight: ops.conv2d(x, weight, None, 1, padding),
        lambda x, weight: mx.conv2d(x, weight, padding=padding),
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


def shifted_group_norm(groups: int) -> Function:
    def plain(x: mx.array, weight: mx.array, bias: mx.array, shift: mx.array) -> mx.array:
        spread = shift.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        return plain_group_norm(x + spread, weight, bias, groups, 1e-3)

    return plain


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("shape", [(4, 6, 5, 12), (3, 9, 12), (2, 12), (1, 1, 3, 12)], ids=str)
def test_group_norm_of_a_shifted_image(shape: tuple[int, ...], groups: int) -> None:
    x, shift = draw(*shape, scale=3, offset=2), draw(shape[0], 12, name="s", scale=5)
    weight, bias = draw(12, name="w"), draw(12, name="b")
    wide = np.array(x) + np.array(shift).reshape(shape[0], *[1] * (len(shape) - 2), 12)
    found = ops.group_norm(x, groups, weight, bias, 1e-3, shift)
    assert relative(found, normalised(wide, groups, np.array(weight), np.array(bias), 1e-3)) < 3e-6
    agree(
        lambda x, weight, bias, shift: ops.group_norm(x, groups, weight, bias, 1e-3, shift),
        shifted_group_norm(groups),
        [x, weight, bias, shift],
        tolerance=2e-5,
    )


def test_a_shift_changes_nothing_that_a_mean_of_one_group_takes_off() -> None:
    """One group and the same shift everywhere: the mean takes it off, and no gradient comes back."""
    x, shift = draw(2, 4, 4, 6), mx.ones((2, 6)) * 7
    weight, bias = draw(6, name="w"), draw(6, name="b")
    assert relative(ops.group_norm(x, 1, weight, bias, 1e-5, shift), ops.group_norm(x, 1, weight, bias, 1e-5)) < 1e-5
    found = gradients(lambda shift: ops.group_norm(x, 1, weight, bias, 1e-5, shift), [shift])[0]
    assert np.abs(np.array(found).sum(axis=1)).max() < 1e-4


@pytest.mark.parametrize("spread", [1.0, 8.0], ids=["ordinary", "peaked"])
@pytest.mark.parametrize("shape", [(2, 10, 6, 3, 4), (3, 4, 5, 1, 4), (3, 7, 5, 2, 2)], ids=str)
def test_self_attention(shape: tuple[int, ...], spread: float) -> None:
    b, length, c, heads, d = shape
    x = draw(b, length, c)
    weights = [draw(heads * d, c, name=name, scale=spread if name == "q" else 1) for name in "qkv"]
    biases = [draw(heads * d, name=f"{name} bias") for name in "qkv"]

    def plain(x: mx.array, *rest: mx.array) -> mx.array:
        q, k, v = (
            (x @ w.T + bias).reshape(b, length, heads, d).transpose(0, 2, 1, 3)
            for w, bias in zip(rest[:3], rest[3:], strict=True)
        )
        out = mx.softmax(q @ k.swapaxes(-1, -2) * 0.5, axis=-1) @ v
        return out.transpose(0, 2, 1, 3).reshape(b, length, -1)

    def fast(x: mx.array, *rest: mx.array) -> mx.array:
        return ops.self_attention(x, list(rest[:3]), list(rest[3:]), heads, 0.5)

    def exact(x: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        q, k, v = (
            (x.astype(np.float64) @ w.T + bias).reshape(b, length, heads, d).transpose(0, 2, 1, 3)
            for w, bias in zip(rest[:3], rest[3:], strict=True)
        )
        return attended(q, k, v, 0.5).transpose(0, 2, 1, 3).reshape(b, length, -1)

    arguments = [x, *weights, *biases]
    assert relative(fast(*arguments), exact(*map(np.array, arguments))) < 1e-5 * spread**0.5
    # A bias of k moves all scores of a query alike: its gradient is 0 but for rounding, and is held against the others.
    others = [x, *weights, biases[0], biases[2]]
    agree(
        lambda *a: fast(*a[:5], biases[1], a[5]),
        lambda *a: plain(*a[:5], biases[1], a[5]),
        others,
        tolerance=2e-5 * spread,
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 5), (6, 2)], ids=str)
def test_convolution_of_a_doubled_image(size: tuple[int, int]) -> None:
    x, weight, bias = draw(3, *size, 5), draw(4, 3, 3, 5, name="w"), draw(4, name="b")
    doubled = np.repeat(np.repeat(np.array(x), 2, axis=1), 2, axis=2)
    found = ops.upsample_conv2d(x, weight, bias)
    assert relative(found, convolved(doubled, np.array(weight), 1, 1) + np.array(bias)) < 2e-6
    agree(
        ops.upsample_conv2d,
        lambda x, weight, bias: mx.conv2d(ops.upsample_nearest(x), weight, padding=1) + bias,
        [x, weight, bias],
    )
