"""Tiny U-Nets, one for each branch of the configuration, with weights and inputs from a formula, not from a generator.

The live tests give them to PyTorch; `tests/golden/make_unet_golden.py` stores what PyTorch answered.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
BATCH, SIZE = 2, 8
WIDE = {"block_out_channels": [32, 64], "norm_num_groups": 8}  # K and AttnSkip blocks count in groups of 32
EMBEDDING = 4 * BASE["block_out_channels"][0]  # width of the time embedding of BASE


@dataclass(frozen=True)
class Case:
    """A configuration and how it is called."""

    changes: dict[str, Any] = field(default_factory=dict)  # over BASE
    labels: tuple[Any, ...] | None = None  # class labels; "embedding" stands for vectors from the formula
    timesteps: tuple[float, ...] = (3.0, 960.0)

    @property
    def config(self) -> dict[str, Any]:
        """What goes into config.json."""
        return {**BASE, **self.changes}


def _both(down: str, up: str, **changes: Any) -> dict[str, Any]:
    return {"down_block_types": [down] * 2, "up_block_types": [up] * 2, **changes}


CASES: dict[str, Case] = {
    "base": Case(),
    "two_layers": Case({"layers_per_block": 2}),
    "one_level": Case(
        {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    ),
    "three_levels": Case(
        {
            "block_out_channels": [8, 8, 16],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        }
    ),
    "grey_to_rgb": Case({"in_channels": 1}),
    "resnet_blocks": Case(_both("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")),
    "resnet_resize": Case(
        _both("AttnDownBlock2D", "AttnUpBlock2D", downsample_type="resnet", upsample_type="resnet")
    ),
    "skip": Case(_both("SkipDownBlock2D", "SkipUpBlock2D")),
    "skip_own_groups": Case(_both("SkipDownBlock2D", "SkipUpBlock2D", norm_num_groups=None)),
    "skip_down_only": Case(_both("SkipDownBlock2D", "UpBlock2D")),
    "skip_up_only": Case(_both("DownBlock2D", "SkipUpBlock2D")),
    "attn_skip": Case(_both("AttnSkipDownBlock2D", "AttnSkipUpBlock2D", **WIDE)),
    "k": Case(_both("KDownBlock2D", "KUpBlock2D", **WIDE)),
    "k_two_layers": Case(_both("KDownBlock2D", "KUpBlock2D", layers_per_block=2, **WIDE)),
    "k_cross_up": Case(_both("KDownBlock2D", "KCrossAttnUpBlock2D", **WIDE)),
    "k_cross": Case(
        {
            "block_out_channels": [32, 32],
            "time_embedding_dim": 32,
            "down_block_types": ["KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"],
            "up_block_types": ["KCrossAttnUpBlock2D", "KUpBlock2D"],
        }
    ),
    "old_block_names": Case({"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}),
    "one_head": Case({"attention_head_dim": None}),
    "heads_that_do_not_divide": Case({"attention_head_dim": 6}),
    "pads_right_and_bottom": Case({"downsample_padding": 0}),
    "sines_first": Case({"flip_sin_to_cos": False}),
    "freq_shift": Case({"freq_shift": 1}),
    "odd_channels": Case({"block_out_channels": [9, 18], "norm_num_groups": 3, "attention_head_dim": 9}),
    "norm_eps": Case({"norm_eps": 0.1}),
    "scale_shift": Case({"resnet_time_scale_shift": "scale_shift"}),
    "scale_shift_mid_norm": Case({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2}),
    "mid_norm": Case({"attn_norm_num_groups": 2}),
    "mid_scale": Case({"mid_block_scale_factor": 1.7}),
    "no_mid": Case({"mid_block_type": None}),
    "no_mid_attention": Case({"add_attention": False}),
    "swish": Case({"act_fn": "swish"}),
    "mish": Case({"act_fn": "mish"}),
    "gelu": Case({"act_fn": "gelu"}),
    "relu": Case({"act_fn": "relu"}),
    "centred": Case({"center_input_sample": True}),
    "fourier": Case({"time_embedding_type": "fourier"}, timesteps=(0.7, 12.5)),
    "learned": Case({"time_embedding_type": "learned", "num_train_timesteps": 1000}),
    "time_width": Case({"time_embedding_dim": 20}),
    "fractional_timesteps": Case(timesteps=(0.25, 499.5)),
    "classes": Case({"num_class_embeds": 5}, labels=(4, 0)),
    "class_as_timestep": Case({"class_embed_type": "timestep"}, labels=(4, 700)),
    "class_as_fourier": Case(
        {"class_embed_type": "timestep", "time_embedding_type": "fourier"}, labels=(0.5, 3.0), timesteps=(0.7, 12.5)
    ),
    "class_as_embedding": Case({"class_embed_type": "identity"}, labels=("embedding",)),
}  # fmt: skip


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1), float32, from a name: SplitMix64 of a counter (Steele et al. 2014), in exact integers."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        count = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(start) + count * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight by Diffusers' name and shape, of a size that keeps the signal's: norms about 1, matrices by fan-in."""
    drawn = numbers(name, shape)
    if len(shape) > 1:
        return drawn * np.float32(np.sqrt(3 / np.prod(shape[1:])))
    if name.endswith("weight"):
        return 1 + np.float32(0.3) * drawn
    return np.float32(0.3) * drawn


def call(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """The input (B, H, W, C), timesteps, class labels, and the direction that the outputs are differentiated in."""
    channels = case.config.get("in_channels", 3), case.config.get("out_channels", 3)
    x = np.float32(1.5) * numbers("input", (BATCH, SIZE, SIZE, channels[0]))
    direction = numbers("direction", (BATCH, SIZE, SIZE, channels[1]))
    labels = None
    if case.labels is not None:
        embedded = case.labels == ("embedding",)
        labels = numbers("labels", (BATCH, EMBEDDING)) if embedded else np.array(case.labels)
        labels = labels.astype(np.int32 if labels.dtype.kind == "i" else np.float32)
    return x, np.array(case.timesteps, dtype=np.float32), labels, direction


def is_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], relative: float) -> list[str]:
    """Names of the tensors whose difference is longer than `relative` of the expected one.

    Some gradients are zero but for rounding (a bias of keys moves no attention): lengths under a thousandth of the
    longest count as that.
    """
    lengths = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    least = 1e-3 * max(lengths.values())
    return [
        name
        for name, value in expected.items()
        if not np.linalg.norm(found[name] - value) <= relative * max(lengths[name], least)
    ]


def summary(gradients: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Names, and for each its gradient's length and its product with a fixed direction: (n, 2) float32."""
    names = sorted(gradients)
    figures = [
        [np.linalg.norm(gradients[name]), (gradients[name] * numbers(f"gradient {name}", gradients[name].shape)).sum()]
        for name in names
    ]
    return names, np.array(figures, dtype=np.float32)
