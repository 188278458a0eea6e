"""One case through our U-Net: its output and its gradients in the input and in every weight, by Diffusers' names."""

import numpy as np
from unet_cases import Case, call, weight

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters, load_weights, to_diffusers


def build(case: Case) -> UNet2D:
    """The U-Net of a case with the weights of the formula."""
    unet = UNet2D(UNet2DConfig.from_dict(case.config))
    there = to_diffusers(flat_parameters(unet))
    load_weights(unet, {name: mx.array(weight(name, tuple(value.shape))) for name, value in there.items()}, "formula")
    return unet


def run(case: Case) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Output (B, H, W, C), gradient in the input, gradients in the weights (laid out as Diffusers lays them out)."""
    unet = build(case)
    x, timestep, labels, direction = (None if part is None else mx.array(part) for part in call(case))

    def projected(parameters: dict, x: mx.array) -> mx.array:
        unet.update(parameters)
        return (unet(x, timestep, labels) * direction).sum()

    output = unet(x, timestep, labels)
    by_weight, by_input = mx.grad(projected, argnums=(0, 1))(unet.trainable_parameters(), x)
    gradients = to_diffusers(dict(mlx_utils.tree_flatten(by_weight)))
    return np.array(output), np.array(by_input), {name: np.array(value) for name, value in gradients.items()}
