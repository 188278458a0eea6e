"""Weights travel without loss, and a file that does not fit is refused with everything that is wrong with it."""

import numpy as np
import pytest
from unet_cases import CASES
from unet_run import build

from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters, load_weights, to_diffusers


def _empty(name: str = "base") -> UNet2D:
    return UNet2D(UNet2DConfig.from_dict(CASES[name].config))


def _state(name: str = "base") -> dict[str, mx.array]:
    return to_diffusers(flat_parameters(build(CASES[name])))


def _same(model: UNet2D, other: UNet2D) -> bool:
    ours, theirs = flat_parameters(model), flat_parameters(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["base", "classes", "k_cross", "attn_skip", "fourier", "class_as_timestep"])
def test_out_and_in_again(name):
    model = _empty(name)
    load_weights(model, _state(name), "file")
    assert _same(model, build(CASES[name]))


def test_kernels_change_their_axes_and_nothing_else_does():
    state, ours = _state(), flat_parameters(build(CASES["base"]))
    assert state["conv_in.weight"].shape == (8, 3, 3, 3)
    kernel = ours["up_blocks.1.resnets.0.conv1.weight"]  # (8, 3, 3, 24): all axes differ in what they hold
    np.testing.assert_array_equal(state["up_blocks.1.resnets.0.conv1.weight"], np.moveaxis(np.array(kernel), 3, 1))
    for name, value in state.items():
        if value.ndim != 4:
            np.testing.assert_array_equal(value, ours[name])


def test_old_names_of_attention_weights_are_read():
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = _state()
    for new, old in new_to_old.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert "mid_block.attentions.0.proj_attn.bias" in state
    model = _empty()
    load_weights(model, state, "file")
    assert _same(model, build(CASES["base"]))
    state["mid_block.attentions.0.to_q.bias"] = state["mid_block.attentions.0.query.bias"]
    with pytest.raises(ArtifactError, match=r"to_q\.bias: the same weight is there twice|query\.bias: the same weight"):
        load_weights(_empty(), state, "file")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_read_as_float32(dtype):
    model = _empty()
    state = {name: value.astype(dtype) for name, value in _state().items()}
    load_weights(model, state, "file")
    exact = flat_parameters(build(CASES["base"]))
    for name, value in flat_parameters(model).items():
        assert value.dtype == mx.float32
        expected = exact[name].astype(dtype).astype(mx.float32)
        np.testing.assert_array_equal(value, expected)


def test_everything_that_is_wrong_is_named_at_once():
    state = _state()
    del state["conv_in.bias"]
    state["conv_out.extra"] = mx.zeros((2, 3))
    state["conv_out.weight"] = state["conv_out.weight"].transpose(0, 2, 3, 1)
    state["conv_norm_out.bias"] = mx.zeros((8,), dtype=mx.int32)
    model = _empty()
    with pytest.raises(ArtifactError) as caught:
        load_weights(model, state, "a.safetensors")
    assert str(caught.value).splitlines() == [
        "a.safetensors: conv_in.bias: missing, expected (8,)",
        "a.safetensors: conv_norm_out.bias: type mlx.core.int32, expected float32, float16 or bfloat16",
        "a.safetensors: conv_out.extra: unexpected, found (2, 3); the configuration has no such weight",
        "a.safetensors: conv_out.weight: shape (3, 3, 3, 8), expected (3, 8, 3, 3)",
    ]
    assert _same(model, _empty())  # nothing was taken from it


def test_a_norm_that_is_stored_and_never_applied_may_be_absent():
    state = {name: value for name, value in _state("k_cross").items() if ".norm_cross." not in name}
    assert len(state) < len(_state("k_cross"))
    model = _empty("k_cross")
    load_weights(model, state, "file")
    x, t = mx.ones((2, 8, 8, 3)), mx.array([1.0, 2.0])
    np.testing.assert_array_equal(model(x, t), build(CASES["k_cross"])(x, t))
