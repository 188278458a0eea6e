"""The count of a network's work against the network itself: weights, and what its layers are called with."""

from typing import Any

import pytest

from ado_tasks.backend import mx
from ado_tasks.errors import ConfigError
from ado_tasks.fit.calibration import drawn_configs
from ado_tasks.fit.work import parameters, totals, unet_work
from ado_tasks.models import ops
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import parameter_count

OTHERS: list[dict[str, Any]] = [
    {"num_class_embeds": 10, "resnet_time_scale_shift": "scale_shift"},
    {"class_embed_type": "timestep", "time_embedding_type": "fourier", "downsample_padding": 0},
    {"time_embedding_type": "learned", "num_train_timesteps": 100, "attention_head_dim": None},
    {"downsample_type": "resnet", "upsample_type": "resnet", "attn_norm_num_groups": 4, "time_embedding_dim": 20},
    {"attention_head_dim": 6, "in_channels": 1, "out_channels": 2},
]
BASE = {
    "sample_size": [16, 8], "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
}  # fmt: skip
CONFIGS = [*drawn_configs(0, "test", 8, 16), *(UNet2DConfig.from_dict({**BASE, **each}) for each in OTHERS)]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_weights_are_those_of_the_network(config: UNet2DConfig) -> None:
    assert parameters(unet_work(config, 3)) == parameter_count(UNet2D(config))


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_operations_are_those_of_the_calls(config: UNet2DConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of the network passes `ops`: seen there, by the shapes of its arguments."""
    seen = {"convolution": 0, "linear": 0, "attention": 0, "upsampling": 0}
    plain = {name: getattr(ops, name) for name in ("conv2d", "linear", "self_attention", "upsample_conv2d")}

    def conv2d(x: mx.array, weight: mx.array, bias: mx.array | None, stride: int = 1, padding: int = 0) -> mx.array:
        y = plain["conv2d"](x, weight, bias, stride=stride, padding=padding)
        seen["convolution"] += 2 * y.size * weight.size // weight.shape[0]
        return y

    def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
        seen["linear"] += 2 * x.size * weight.shape[0]
        return plain["linear"](x, weight, bias)

    def self_attention(x: mx.array, weights: list[mx.array], biases: list[mx.array], heads: int, scale: float):
        b, length, c = x.shape
        seen["linear"] += 2 * b * length * c * sum(each.shape[0] for each in weights)
        inner = weights[0].shape[0]
        seen["attention"] += 4 * b * length**2 * inner + 10 * b * heads * length**2
        return plain["self_attention"](x, weights, biases, heads, scale)

    def upsample_conv2d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        seen["upsampling"] += 2 * 16 * x.size * weight.shape[0]
        return plain["upsample_conv2d"](x, weight, bias)

    for function in (conv2d, linear, self_attention, upsample_conv2d):
        monkeypatch.setattr(ops, function.__name__, function)
    labels = mx.zeros((2,), mx.int32) if config.has_classes else None
    height, width = config.sample_size if isinstance(config.sample_size, tuple) else (16, 16)
    UNet2D(config)(mx.zeros((2, height, width, config.in_channels)), mx.zeros((2,)), labels)  # traced, not computed
    found = totals(unet_work(config, 2))
    assert {kind: found.get(kind, (0,))[0] for kind in seen} == seen


def test_work_grows_with_the_batch_and_the_pixels() -> None:
    config = CONFIGS[0]
    small, large = totals(unet_work(config, 1, (16, 16))), totals(unet_work(config, 4, (32, 16)))
    assert large["convolution"][0] == 8 * small["convolution"][0]
    assert large["convolution"][2] == small["convolution"][2]


def test_blocks_that_are_not_counted_are_refused() -> None:
    skip = {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}
    config = UNet2DConfig.from_dict({**BASE, **skip, "block_out_channels": [32, 32], "norm_num_groups": 8})
    with pytest.raises(ConfigError, match="SkipDownBlock2D: not counted; allowed: AttnDownBlock2D"):
        unet_work(config, 1)
    with pytest.raises(ConfigError, match="no size given"):
        unet_work(UNet2DConfig.from_dict({**BASE, "sample_size": None}), 1)
