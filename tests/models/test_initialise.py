"""First weights: PyTorch's distributions, a key of its own for each parameter."""

import numpy as np
import pytest
from unet_cases import CASES

from ado_tasks.backend import mx, nn
from ado_tasks.models.initialise import initialise, key_of
from ado_tasks.models.layers import Conv2d, Embedding, GroupNorm, Linear
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters


class _Layers(nn.Module):
    def __init__(self, *names: str):
        super().__init__()
        make = {
            "linear": lambda: Linear(100, 300),
            "conv": lambda: Conv2d(32, 64, 3),
            "table": lambda: Embedding(200, 50),
            "norm": lambda: GroupNorm(4, 16, 1e-5),
        }
        for name in names:
            self[name] = make[name]()


ALL = ("linear", "conv", "table", "norm")


def _drawn(*names: str, seed: int = 0) -> dict[str, np.ndarray]:
    layers = _Layers(*names)
    initialise(layers, mx.random.key(seed))
    return {name: np.array(value) for name, value in flat_parameters(layers).items()}


def _is_uniform(values: np.ndarray, bound: float) -> None:
    """Kolmogorov–Smirnov at a level of 1e-6 against U(−bound, bound)."""
    ordered = np.sort(values.ravel())
    empirical = np.arange(1, values.size + 1) / values.size
    distance = np.abs(empirical - (ordered + bound) / (2 * bound)).max()
    assert distance < 2.7 / np.sqrt(values.size)


def test_linear_and_convolution_are_uniform_with_the_bound_of_their_fan_in():
    drawn = _drawn(*ALL)
    _is_uniform(drawn["linear.weight"], 1 / np.sqrt(100))
    _is_uniform(drawn["linear.bias"], 1 / np.sqrt(100))
    _is_uniform(drawn["conv.weight"], 1 / np.sqrt(32 * 9))
    _is_uniform(drawn["conv.bias"], 1 / np.sqrt(32 * 9))


def test_tables_are_normal_and_norms_are_one_and_zero():
    drawn = _drawn(*ALL)
    table = drawn["table.weight"]
    assert abs(table.mean()) < 5 / np.sqrt(table.size)
    assert abs(table.std() - 1) < 5 / np.sqrt(2 * table.size)
    assert (drawn["norm.weight"] == 1).all() and (drawn["norm.bias"] == 0).all()


def test_fourier_frequencies_have_a_spread_of_16():
    unet = UNet2D(
        UNet2DConfig.from_dict({**CASES["fourier"].config, "block_out_channels": [512, 8], "attention_head_dim": 8})
    )
    initialise(unet, mx.random.key(0))
    frequencies = np.array(unet.time_proj.weight)
    assert abs(frequencies.std() / 16 - 1) < 5 / np.sqrt(2 * 512)


def test_a_parameter_depends_on_its_name_and_the_key_only():
    alone, together = _drawn("conv"), _drawn(*reversed(ALL))
    np.testing.assert_array_equal(alone["conv.weight"], together["conv.weight"])
    np.testing.assert_array_equal(alone["conv.bias"], together["conv.bias"])
    assert not np.array_equal(alone["conv.weight"], _drawn("conv", seed=1)["conv.weight"])


def test_no_two_parameters_share_their_draws():
    unet = UNet2D(UNet2DConfig.from_dict(CASES["base"].config))
    initialise(unet, mx.random.key(0))
    firsts = [
        np.array(value).ravel()[:4].tobytes() for name, value in flat_parameters(unet).items() if "norm" not in name
    ]
    assert len(set(firsts)) == len(firsts)


def test_keys_of_names_differ():
    names = [f"blocks.{i}.weight" for i in range(200)]
    assert len({np.array(key_of(mx.random.key(0), name)).tobytes() for name in names}) == 200


def test_an_unknown_layer_is_refused_by_name():
    with pytest.raises(TypeError, match=r"LSTM\.\w+"):
        initialise(nn.LSTM(2, 2), mx.random.key(0))


def test_it_equals_what_pytorch_does_by_default():
    """The same ranges as a fresh `diffusers.UNet2DModel`, parameter by parameter."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        config = {**CASES["classes"].config, "block_out_channels": [32, 64], "num_class_embeds": 100}
        theirs = diffusers.UNet2DModel(**config).state_dict()
    unet = UNet2D(UNet2DConfig.from_dict(config))
    initialise(unet, mx.random.key(0))
    for name, value in flat_parameters(unet).items():
        ours, other = np.array(value), theirs[name].numpy()
        if other.std() == 0:
            np.testing.assert_array_equal(ours, other.reshape(ours.shape))
        else:
            tolerance = 6 / np.sqrt(ours.size)
            assert abs(ours.std() / other.std() - 1) < tolerance, name
            assert abs(ours.mean()) < tolerance * ours.std(), name
