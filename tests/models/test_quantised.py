"""Linear layers of few bits: against mx.dequantize and NumPy, through a folder, and what a damaged folder is told."""

from pathlib import Path

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.quantised import bits_of, check_floating, floating, packed, quantised
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters, to_diffusers
from ado_tasks.storage import load_arrays, load_arrays_and_metadata, read_json, save_arrays, sha256_tree, write_json


def network() -> UNet2D:
    """Levels of 16 and 32 channels, time embedding of 64: rows of 16, which no group divides, of 32 and of 64."""
    unet = UNet2D(UNet2DConfig(
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=10, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
    ))  # fmt: skip
    initialise(unet, rng.key(0, "quantised"))
    return unet


def output(unet: UNet2D) -> mx.array:
    x = mx.random.normal((4, 8, 8, 1), key=rng.key(1))
    return unet(x, mx.array([1.0, 300.0, 600.0, 999.0]), mx.arange(4))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_network_computes_with_what_dequantize_says(bits: int) -> None:
    unet = network()
    made = quantised(unet, bits)
    held = packed(made)
    layers = {name.rpartition(".")[0] for name in held}
    assert bits_of(made) == bits and bits_of(unet) is None
    # 1 of the time embedding, 6 residual blocks and the middle's 2, 4 projections in each of 4 attention blocks
    assert len(layers) == 25 and "time_embedding.linear_1" not in layers
    weights, back = flat_parameters(unet), flat_parameters(floating(made))
    for name in layers:
        group = weights[f"{name}.weight"].shape[1] // held[f"{name}.scales"].shape[1]
        assert group == (64 if ".time_emb_proj" in name or "time_embedding" in name else 32)
        parts = (held[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        exact = mx.dequantize(*parts, group_size=group, bits=bits)
        assert mx.array_equal(back[f"{name}.weight"], exact)
        # Rounded to the nearest of 2^bits levels: off by at most half a step, 1.001 for float32's rounding.
        step = np.abs(np.array(held[f"{name}.scales"], np.float64)).repeat(group, axis=1)
        error = np.abs(np.array(weights[f"{name}.weight"], np.float64) - np.array(exact, np.float64))
        assert (error <= 1.001 * step).all() and np.median(error / step) < 0.5
    assert all(mx.array_equal(back[name], weights[name]) for name in weights if name.rpartition(".")[0] not in layers)
    np.testing.assert_allclose(output(made), output(floating(made)), atol=5e-6)
    assert float(mx.max(mx.abs(output(made) - output(unet)))) > 1e-4


def test_more_bits_are_nearer_and_nothing_is_quantised_twice() -> None:
    unet = network()
    apart = {bits: float(mx.max(mx.abs(output(quantised(unet, bits)) - output(unet)))) for bits in (4, 8)}
    assert apart[8] < apart[4] / 4
    assert quantised(unet, None) is unet and floating(unet) is unet
    with pytest.raises(ConfigError, match=r"linear_bits: 4 of a network of 8"):
        quantised(quantised(unet, 8), 4)
    with pytest.raises(ConfigError, match=r"linear_bits: 3 of a network of float; allowed: \(4, 8\)"):
        quantised(unet, 3)
    with pytest.raises(ConfigError, match="teacher: has linear layers of 4 bits"):
        check_floating(quantised(unet, 4), "teacher")


def write(folder: Path, unet: UNet2D) -> Path:
    write_model(folder, unet, Cosine().to_diffusers("v_prediction"), {"history": []})
    return folder


def test_a_folder_keeps_the_bits_and_is_diffusers_own_otherwise(tmp_path: Path) -> None:
    made = quantised(network(), 4)
    folder = write(tmp_path / "a", made)
    read = read_model(folder).unet
    assert bits_of(read) == 4
    assert mx.array_equal(output(read), output(made))
    assert sha256_tree(write(tmp_path / "b", read)) == sha256_tree(folder)
    weights = load_arrays(folder / "unet/diffusion_pytorch_model.safetensors")
    expected = to_diffusers(flat_parameters(floating(made)))
    assert weights.keys() == expected.keys()
    assert all(mx.array_equal(weights[name], value) for name, value in expected.items())
    plain = write(tmp_path / "plain", network())
    assert not (plain / "unet/quantised.safetensors").exists()


def test_a_folder_whose_bits_are_not_what_it_says_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", quantised(network(), 8))
    path = folder / "unet/quantised.safetensors"
    tensors, header = load_arrays_and_metadata(path)
    record = read_json(folder / "ado.json")
    del record["sha256"]["unet/quantised.safetensors"]
    write_json(folder / "ado.json", record)
    name = "mid_block.attentions.0.to_q"
    for changed, said, message in (
        ({key: value for key, value in tensors.items() if key != f"{name}.scales"}, header, "to_q.scales: missing"),
        (tensors | {"conv_in.weight": mx.zeros(3)}, header, "conv_in.weight: unexpected"),
        (tensors | {f"{name}.scales": mx.zeros((32, 2))}, header, r"to_q.scales: .*\(32, 2\), expected .*\(32, 1\)"),
        (tensors | {f"{name}.scales": 1.01 * tensors[f"{name}.scales"]}, header, "to_q: other weights than the floats"),
        (tensors, {"bits": "4"}, "expected"),
        (tensors, {"bits": "16"}, r"layers of 16 bits; allowed: \(4, 8\)"),
        (tensors, {}, "its header says '' bits"),
    ):
        save_arrays(path, changed, said)
        with pytest.raises(ArtifactError, match=message):
            read_model(folder)
    save_arrays(path, tensors, header)
    assert bits_of(read_model(folder).unet) == 8
