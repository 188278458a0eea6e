"""Attention in blocks: the same numbers and gradients as all at once, in memory that grows with the positions."""

from collections.abc import Callable

import numpy as np
import pytest
from ops_checks import agree, draw, relative

from ado_tasks import rng
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.models import chunked_attention as chunked
from ado_tasks.models import cpu_ops, ops
from ado_tasks.models.attention_choice import (
    CPU_BLOCK,
    CPU_BLOCK_SCORES,
    GPU_BLOCK,
    GPU_BLOCK_SCORES,
    LEAST_BLOCK,
    WHOLE_POSITIONS,
    attention_form,
    block_sizes,
)
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

Attention = Callable[[mx.array, mx.array, mx.array], mx.array]


def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.softmax(0.5 * (q @ k.swapaxes(-1, -2)), axis=-1) @ v


def blocks(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return chunked.chunked_attention(q, k, v, 0.5)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "block_sizes", lambda rows, cpu: (4, 6))


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("lengths", [(4, 6), (12, 12), (13, 17), (3, 20)], ids=str)
def test_values_and_gradients(lengths: tuple[int, int], spread: float, small_blocks: None) -> None:
    """Blocks that divide the lengths or don't, one or several; scores up to hundreds, too much for exp alone."""
    queries, keys = lengths
    q, k = draw(2, 3, queries, 4, name="q", scale=spread), draw(2, 3, keys, 4, name="k", scale=spread)
    agree(blocks, plain, [q, k, draw(2, 3, keys, 4, name="v")], 1e-5)


def test_on_a_gpu_blocks_go_through_mlx_s_kernel(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "on_cpu", lambda: False)
    monkeypatch.setattr(chunked, "METAL_WIDTHS", (4,))
    monkeypatch.setattr(chunked, "fused_queries", lambda rows, keys: 4)
    called: list[int] = []
    kernel = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda q, *a, **k: called.append(q.shape[2]) or kernel(q, *a, **k)
    )
    agree(blocks, plain, [draw(2, 3, 13, 4, name=name) for name in "qkv"], 1e-5)
    assert set(called) == {4, 1}
    called.clear()
    agree(blocks, plain, [draw(2, 3, 13, 5, name=name) for name in "qkv"], 1e-5)  # a width without a kernel
    assert not called


def test_halves(small_blocks: None) -> None:
    """Sums are kept in float32: as near to float32's result as the inputs' own rounding."""
    q, k, v = (draw(1, 2, 40, 4, name=name).astype(mx.bfloat16) for name in "qkv")
    found, wanted = blocks(q, k, v), plain(*(x.astype(mx.float32) for x in (q, k, v)))
    assert found.dtype == mx.bfloat16
    assert relative(found.astype(mx.float32), wanted) < 0.01


def test_a_nan_is_seen(small_blocks: None) -> None:
    q = draw(1, 1, 10, 4)
    q[0, 0, 7] = float("nan")
    assert np.isnan(np.array(blocks(q, q, q))).all()


def test_few_positions_keep_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of networks up to 32×32 positions are those of before; one position more goes in blocks."""
    monkeypatch.setattr(ops, "WHOLE_POSITIONS", 16)
    called: list[str] = []
    monkeypatch.setattr(ops, "chunked_attention", lambda q, k, v, scale: called.append("blocks") or q)
    monkeypatch.setattr(cpu_ops, "self_attention", lambda x, *rest: called.append("joined") or x)
    monkeypatch.setattr(cpu_ops, "attention", lambda q, *rest: called.append("whole") or q)
    for length in (16, 17):
        x, w = draw(1, length, 4), draw(4, 4, name="w")
        ops.attention(x[None], x[None], x[None], 0.5)
        ops.self_attention(x, [w] * 3, [mx.zeros(4)] * 3, 2, 0.5)
    assert called == ["whole", "joined", "blocks", "blocks"]


def peak(function: Attention, positions: int) -> int:
    """Bytes that a gradient needs on top of its inputs: the least of a few, for MLX runs ahead by as much as it can."""
    q, k, v = (draw(1, 1, positions, 8, name=name) for name in "qkv")
    step = mx.compile(mx.grad(lambda *a: mx.sum(function(*a) ** 2), argnums=[0, 1, 2]))
    mx.eval(q, k, v)
    found = []
    for _ in range(5):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(q, k, v))
        found.append(mx.get_peak_memory() - before)
    return min(found)


def test_memory_is_linear_in_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "block_sizes", lambda rows, cpu: (32, 64))
    assert peak(blocks, 2048) / peak(blocks, 512) < 6  # four times the positions: 4 if linear, 16 if square
    assert peak(plain, 2048) / peak(plain, 512) > 8, "the measure would not see a square"


def test_blocks_shrink_with_the_rows() -> None:
    """All rows together hold no more scores than allowed; few rows take whole blocks."""
    assert block_sizes(1, cpu=True) == block_sizes(16, cpu=True) == CPU_BLOCK
    for rows in (1, 17, 100, 1000, 4096):
        for cpu, limit in ((True, CPU_BLOCK_SCORES), (False, GPU_BLOCK_SCORES)):
            queries, keys = block_sizes(rows, cpu=cpu)
            assert rows * queries * keys <= limit
            assert rows * queries * keys > limit / 4 or (queries, keys) == (CPU_BLOCK if cpu else GPU_BLOCK)
    assert block_sizes(10**6, cpu=True) == (LEAST_BLOCK, LEAST_BLOCK)


@pytest.mark.parametrize(
    ("device", "half", "width", "positions", "gradient", "form"),
    [
        ("cpu", False, 8, WHOLE_POSITIONS, True, "whole"),
        ("cpu", False, 64, WHOLE_POSITIONS + 1, False, "chunked"),
        ("metal", True, 64, 4096, False, "fused"),
        ("metal", True, 64, 4096, True, "chunked"),
        ("metal", True, 8, 4096, False, "chunked"),
        ("cuda", True, 64, 4096, True, "fused"),
        ("cuda", True, 256, 4096, True, "chunked"),
        ("cuda", False, 64, 4096, True, "chunked"),
        ("cuda", True, 64, 4000, True, "chunked"),
    ],
)
def test_the_form_on_each_device(device, half, width, positions, gradient, form) -> None:
    found = attention_form(device, half=half, head_width=width, positions=positions, gradient=gradient)
    assert found == form


def test_a_network_trains_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """36×36 pixels, attention at full size: its 1,296 positions go in blocks; every gradient is that of all at once."""
    config = UNet2DConfig.from_dict(
        {
            "sample_size": 36, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        }
    )  # fmt: skip
    unet = UNet2D(config)
    initialise(unet, rng.key(0, "chunked"))
    start = unet.parameters()
    x, t = draw(1, 36, 36, 3), mx.array([500.0])

    def gradients() -> dict[str, np.ndarray]:
        def loss(weights) -> mx.array:
            unet.update(weights)
            return mx.mean((unet(x, t) - x) ** 2)

        return {name: np.array(value) for name, value in mlx_utils.tree_flatten(mx.grad(loss)(start))}

    called: list[int] = []
    in_blocks = ops.chunked_attention
    monkeypatch.setattr(ops, "chunked_attention", lambda q, *rest: called.append(q.shape[2]) or in_blocks(q, *rest))
    ours = gradients()
    assert set(called) == {36 * 36}
    monkeypatch.setattr(ops, "WHOLE_POSITIONS", 36 * 36)
    theirs = gradients()
    largest = max(np.abs(value).max() for value in theirs.values())
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() < 1e-4 * max(np.abs(value).max(), 1e-3 * largest), name
