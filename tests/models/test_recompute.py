"""Checkpointed blocks: the same gradients for less memory, dropout masks included."""

from typing import Any

import numpy as np
import pytest
from ops_checks import draw

from ado_tasks import rng
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.models.initialise import initialise
from ado_tasks.models.precision import in_precision, lowered
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

PLAIN = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 2,
    "norm_num_groups": 4, "attention_head_dim": 8, "dropout": 0.3,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
SKIP = {
    **PLAIN, "norm_num_groups": 32, "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"], "block_out_channels": [32, 64],
}  # fmt: skip


def gradients(config: dict[str, Any], *, checkpointing: bool, precision: Any = "float32") -> tuple[np.ndarray, int]:
    """In every weight and in the image, as one vector; and the peak of memory in bytes, by MLX's count."""
    unet = UNet2D(UNet2DConfig.from_dict(config))
    initialise(unet, rng.key(0, "recompute"))
    unet.checkpointing = checkpointing
    size = config["sample_size"]
    x, t, key = draw(4, size, size, 3), mx.array([1.0, 30.0, 500.0, 999.0]), rng.key(0, "dropout")

    def loss(parameters: Any, x: mx.array) -> mx.array:
        unet.update(lowered(parameters, precision))
        return mx.mean(in_precision(unet, precision)(x, t, dropout_key=key) ** 2)

    parameters = unet.parameters()
    mx.eval(parameters, x)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = mx.grad(loss, argnums=(0, 1))(parameters, x)
    mx.eval(found)
    peak = mx.get_peak_memory() - before
    return np.concatenate([np.array(each).ravel() for _, each in mlx_utils.tree_flatten(found)]), peak


@pytest.mark.parametrize("config", [PLAIN, SKIP], ids=["plain", "skip"])
def test_gradients_are_the_same(config: dict[str, Any]) -> None:
    kept, _ = gradients(config, checkpointing=False)
    anew, _ = gradients(config, checkpointing=True)
    assert np.abs(anew - kept).max() <= 1e-6 * np.abs(kept).max()
    other, _ = gradients({**config, "dropout": 0.0}, checkpointing=True)
    assert np.abs(other - kept).max() > 1e-3 * np.abs(kept).max()  # dropout did something


def test_in_halves_too() -> None:
    kept, _ = gradients(PLAIN, checkpointing=False, precision="float16")
    anew, _ = gradients(PLAIN, checkpointing=True, precision="float16")
    assert np.abs(anew - kept).max() <= 1e-3 * np.abs(kept).max()


def test_less_memory_is_needed() -> None:
    deep = {
        **PLAIN, "sample_size": 32, "layers_per_block": 4, "dropout": 0.0, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False,
    }  # fmt: skip
    peaks = [gradients(deep, checkpointing=checkpointing)[1] for checkpointing in (False, True)]
    assert peaks[1] < 0.8 * peaks[0]
