"""The configuration is Diffusers' config.json, and what it cannot mean is refused by name."""

import dataclasses

import pytest
from unet_cases import BASE, CASES

from ado_tasks.config import parse
from ado_tasks.errors import ConfigError
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

# google/ddpm-cifar10-32's config.json, as its authors stored it with Diffusers 0.0.4.
DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def test_defaults_are_diffusers():
    config = UNet2DConfig.from_dict({})
    assert config.block_out_channels == (224, 448, 672, 896)
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    assert config.up_block_types == ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert (config.attention_head_dim, config.norm_num_groups, config.norm_eps) == (8, 32, 1e-5)
    assert (config.flip_sin_to_cos, config.freq_shift, config.downsample_padding) == (True, 0, 1)


def test_a_stored_configuration_goes_in_and_comes_out_as_it_was():
    config = UNet2DConfig.from_dict(DDPM_CIFAR10)
    assert config.attention_head_dim is None and config.downsample_padding == 0 and config.freq_shift == 1
    written = config.to_dict()
    assert {key: written[key] for key in DDPM_CIFAR10} == DDPM_CIFAR10
    assert UNet2DConfig.from_dict(written) == config


def test_keys_that_begin_with_an_underscore_are_carried():
    config = UNet2DConfig.from_dict({**BASE, "_name_or_path": "somewhere", "_anything": [1]})
    assert config.to_dict()["_name_or_path"] == "somewhere"
    assert config.to_dict()["_anything"] == [1]
    assert config == UNet2DConfig.from_dict(BASE)  # they say nothing about the network


@pytest.mark.parametrize("name", CASES)
def test_every_case_survives_the_round_trip(name):
    config = UNet2DConfig.from_dict(CASES[name].config)
    assert UNet2DConfig.from_dict(config.to_dict()) == config


def test_it_is_a_section_of_params():
    config = parse(UNet2DConfig, BASE, "train.unet")
    assert config == UNet2DConfig.from_dict(BASE)
    with pytest.raises(ConfigError, match=r"train\.unet\.layers_per_block: 0 is not allowed"):
        parse(UNet2DConfig, {**BASE, "layers_per_block": 0}, "train.unet")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.in_channels = 4


REFUSED = {
    "unknown key": ({"layers": 2}, r"config\.json\.layers: unknown key; allowed here: sample_size, in_channels"),
    "a key of ours only": ({"carried": {}}, r"carried: unknown key"),
    "another class": ({"_class_name": "UNet2DConditionModel"}, r"_class_name: 'UNet2DConditionModel'.*'UNet2DModel'"),
    "wrong type": ({"layers_per_block": "2"}, r"layers_per_block: '2' is not allowed"),
    "true is no number": ({"layers_per_block": True}, r"layers_per_block: True is not allowed"),
    "out of range": ({"dropout": 1.5}, r"dropout: 1\.5 is not allowed.*less than or equal to 1"),
    "padding": ({"downsample_padding": 2}, r"downsample_padding: 2 is not allowed.*0 or 1"),
    "time embedding": (
        {"time_embedding_type": "sine"},
        r"time_embedding_type: 'sine'.*'positional', 'fourier' or 'learned'",
    ),
    "scale shift": (
        {"resnet_time_scale_shift": "spatial"},
        r"resnet_time_scale_shift: 'spatial'.*'default' or 'scale_shift'",
    ),
    "downsample type": ({"downsample_type": "fir"}, r"downsample_type: 'fir'.*'conv' or 'resnet'"),
    "mid block": ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, r"mid_block_type: .*'UNetMidBlock2D'"),
    "class embedding": (
        {"class_embed_type": "projection"},
        r"class_embed_type: 'projection'.*'timestep' or 'identity'",
    ),
    "activation": ({"act_fn": "tanh"}, r"act_fn: 'tanh' is not allowed; allowed: silu, swish, mish, gelu, relu"),
    "text blocks": (
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
        r"down_block_types: 'CrossAttnDownBlock2D' is not allowed; allowed: DownBlock2D, ",
    ),
    "encoder blocks": ({"up_block_types": ["UpDecoderBlock2D", "UpBlock2D"]}, r"up_block_types: 'UpDecoderBlock2D'"),
    "up before down": ({"down_block_types": ["UpBlock2D", "DownBlock2D"]}, r"down_block_types: 'UpBlock2D'"),
    "lengths": ({"down_block_types": ["DownBlock2D"]}, r"down_block_types: 1 given; allowed: 2"),
    "no level": (
        {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
        r"block_out_channels: \(\); allowed: at least one level",
    ),
    "sample size": ({"sample_size": 9}, r"sample_size: 9; allowed: multiples of 2"),
    "sample sizes": ({"sample_size": [8, 7]}, r"sample_size: \(8, 7\); allowed: multiples of 2"),
    "groups": ({"norm_num_groups": 3}, r"norm_num_groups: 3; allowed: a divisor of all block_out_channels \(8, 16\)"),
    "groups of another level": ({"block_out_channels": [8, 18]}, r"down_block_types\[1\].*4 norm groups.*18 channels"),
    "groups of the middle": ({"attn_norm_num_groups": 3}, r"attn_norm_num_groups\): 3 norm groups.*16 channels"),
    "no groups": ({"norm_num_groups": None}, r"down_block_types\[0\].*0 norm groups"),
    "heads": ({"attention_head_dim": 32}, r"attention_head_dim: 32 in .* of 16 channels; allowed: at most 16"),
    "learned without a count": ({"time_embedding_type": "learned"}, r"num_train_timesteps: none; allowed: a count"),
    "division by zero": ({"freq_shift": 4}, r"freq_shift: 4 is half of block_out_channels\[0\]"),
    "K with others": (
        {"block_out_channels": [32, 64], "down_block_types": ["KDownBlock2D", "KDownBlock2D"]},
        r"up_block_types\[0\] \(AttnUpBlock2D\): does not fit the way down; allowed: K blocks only with K blocks",
    ),
    "others with K": (
        {"block_out_channels": [32, 64], "up_block_types": ["KUpBlock2D", "KUpBlock2D"]},
        r"up_block_types\[1\] \(KUpBlock2D\): 64 channels halved 1 times arrive, 64 halved 0 .*K blocks on both sides",
    ),
    "Skip on grey images": (
        {"down_block_types": ["SkipDownBlock2D"] * 2, "in_channels": 1},
        r"in_channels: 1, but down_block_types\[0\] \(SkipDownBlock2D\) works on 3-channel images only",
    ),
    "Skip paints colour": (
        {"up_block_types": ["SkipUpBlock2D"] * 2, "out_channels": 1},
        r"up_block_types: .*allowed: out_channels 3 \(given: 1\)",
    ),
    "Skip given up": (
        {"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]},
        r"allowed: .*Skip blocks up to the last level",
    ),
    "Skip after another": (
        {
            "block_out_channels": [8, 8, 8],
            "down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D"] * 3,
            "sample_size": 8,
        },
        r"down_block_types\[1\] \(SkipDownBlock2D\): may not follow a level that is no Skip block",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused_by_name(why):
    changes, message = REFUSED[why]
    with pytest.raises(ConfigError, match=message) as caught:
        UNet2DConfig.from_dict({**BASE, **changes})
    assert str(caught.value).startswith("unet/config.json")


def test_derived_sizes():
    config = UNet2DConfig.from_dict(BASE)
    assert (config.embedding_width, config.size_multiple, config.has_classes) == (32, 2, False)
    assert UNet2DConfig.from_dict({**BASE, "time_embedding_dim": 20}).embedding_width == 20
    assert UNet2DConfig.from_dict({**BASE, "num_class_embeds": 3}).has_classes
    assert UNet2DConfig.from_dict({**BASE, "class_embed_type": "timestep"}).has_classes


def test_a_rectangle_is_a_size():
    assert UNet2DConfig.from_dict({**BASE, "sample_size": [8, 12]}).sample_size == (8, 12)
    assert UNet2D(UNet2DConfig.from_dict({**BASE, "sample_size": [8, 12]})).config.to_dict()["sample_size"] == [8, 12]


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({"num_class_embeds": 3}, 3),
        ({"num_class_embeds": 4}, 3),  # a row that is never used
        ({}, 0),
        ({"class_embed_type": "timestep"}, 3),  # read as a number: there is no table
        ({"sample_size": None}, 0),
        ({"sample_size": [8, 8]}, 0),
    ],
)
def test_data_that_fits(changes, classes):
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    UNet2DConfig.from_dict({**BASE, **sizes, **changes}).check_data((8, 8, 1), classes, "x")


@pytest.mark.parametrize(
    ("changes", "classes", "says"),
    [
        ({"num_class_embeds": 2}, 3, r"^x\.num_class_embeds: 2 does not fit the dataset; allowed: 3 or more"),
        ({}, 3, r"^x\.num_class_embeds: None .*3 or more"),
        ({"num_class_embeds": 2}, 0, r"^x\.num_class_embeds: 2 .*no labels"),
        ({"sample_size": [8, 12]}, 0, r"^x\.sample_size: \(8, 12\) .*\(8, 8\)"),
        ({"in_channels": 3}, 0, r"^x\.in_channels: 3 .*allowed: 1"),
    ],
)
def test_data_that_does_not_fit(changes, classes, says):
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    config = UNet2DConfig.from_dict({**BASE, **sizes, **changes})
    with pytest.raises(ConfigError, match=says):
        config.check_data((8, 8, 1), classes, "x")
