"""What a network costs without a clock: multiply-adds of one evaluation of one image, from its configuration alone."""

from collections.abc import Mapping
from math import prod
from typing import Any

from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters
from ado_tasks.optimise.cost import GRADIENT


def multiply_adds(network: UNet2DConfig, height: int, width: int) -> int:
    """Multiply-adds of all convolutions, linear layers and attention, for one image of this size.

    A convolution of p output pixels: p times the numbers of its weight. Attention over p pixels with n inner channels:
    2 p² n (logits, and their sum over values), besides its projections.
    """
    total, pixels = 0, height * width
    for name, weight in flat_parameters(UNet2D(network)).items():
        if not name.endswith(".weight") or weight.ndim < 2 or name == "class_embedding.weight":
            continue
        if "embedding" in name or ".time_emb_proj." in name:
            total += weight.size
            continue
        area = pixels // 4 ** _depth(name, network)
        total += area * prod(weight.shape)
        if name.endswith(".to_out.0.weight"):
            total += 2 * area**2 * weight.shape[-1]
    return total


def probe_multiply_adds(config: Mapping[str, Any], rung: int, candidate: int, teacher: int) -> int:
    """Multiply-adds that one lane of the race took: a gradient of the candidate and an answer of the teacher an image.

    In the lowest rung importance is measured first, with gradients of the teacher. Losses on the selection part are not
    counted, as nowhere (see optimise/cost.py).

    Args:
        config: of `probe`, as plain values.
        rung: of the lane.
        candidate: multiply-adds of one evaluation of one image.
        teacher: the same of the teacher.
    """
    images = config["race"]["steps"][rung] * config["tune"]["batch_size"]
    measured = config["importance_batches"] * config["importance_batch"] if rung == 0 else 0
    return images * (GRADIENT * candidate + teacher) + measured * GRADIENT * teacher


def _depth(name: str, network: UNet2DConfig) -> int:
    """How often the image was halved where a weight's output lies."""
    words, last = name.split("."), len(network.block_out_channels) - 1
    if words[0] == "mid_block":
        return last
    if words[0] not in {"down_blocks", "up_blocks"}:
        return 0
    level = int(words[1]) if words[0] == "down_blocks" else last - int(words[1])
    if words[2] == "downsamplers":
        return level + 1
    return level - 1 if words[2] == "upsamplers" else level
