"""Our U-Net against `diffusers.UNet2DModel` in PyTorch, live: every branch of the configuration, gradients included."""

import warnings

import numpy as np
import pytest
from unet_cases import CASES, Case, call, is_close, weight
from unet_run import build, run

from ado_tasks.errors import ConfigError
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters, to_diffusers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

torch.set_num_threads(1)  # tiny models: threads would only wait for one another
pytestmark = pytest.mark.filterwarnings("ignore")


def torch_model(case: Case):
    model = diffusers.UNet2DModel(**case.config).eval()
    state = {name: torch.from_numpy(weight(name, tuple(value.shape))) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def torch_run(case: Case):
    model = torch_model(case)
    x, timestep, labels, direction = (None if part is None else torch.from_numpy(part) for part in call(case))
    if case.config.get("time_embedding_type") == "learned":
        timestep = timestep.long()
    x = x.permute(0, 3, 1, 2).requires_grad_()
    output = model(x, timestep, labels).sample.permute(0, 2, 3, 1)
    (output * direction).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach().numpy(), x.grad.permute(0, 2, 3, 1).numpy(), gradients


@pytest.mark.parametrize("name", CASES)
def test_same_output_and_gradients(name):
    expected_output, expected_by_input, expected_gradients = torch_run(CASES[name])
    output, by_input, gradients = run(CASES[name])
    assert np.std(expected_output) > 0.05  # the case says something
    np.testing.assert_allclose(output, expected_output, rtol=0, atol=1e-4)
    assert not is_close({"x": by_input}, {"x": expected_by_input}, 1e-3)
    assert not is_close(gradients, expected_gradients, 1e-3)
    for unused in gradients.keys() - expected_gradients.keys():  # weights that Diffusers stores and never uses
        assert not gradients[unused].any()
    if CASES[name].config.get("time_embedding_type") == "fourier":
        assert "time_proj.weight" not in gradients


def test_every_weight_has_the_same_name_and_shape():
    for case in CASES.values():
        ours = {name: tuple(value.shape) for name, value in to_diffusers(flat_parameters(build(case))).items()}
        theirs = {name: tuple(value.shape) for name, value in torch_model(case).state_dict().items()}
        assert ours == theirs


KINDS = (
    "DownBlock2D ResnetDownsampleBlock2D AttnDownBlock2D SkipDownBlock2D KDownBlock2D DownEncoderBlock2D".split(),
    "UpBlock2D ResnetUpsampleBlock2D AttnUpBlock2D SkipUpBlock2D KUpBlock2D UpDecoderBlock2D".split(),
)


def test_what_diffusers_cannot_run_is_refused_and_nothing_else():
    """Random layouts: the configuration is accepted exactly where UNet2DModel runs and gives an image of its size."""
    rng = np.random.default_rng(0)
    agreed = {True: 0, False: 0}
    for _ in range(60):
        levels = int(rng.integers(1, 3))
        family = [rng.choice(KINDS[0], levels), rng.choice(KINDS[1], levels)]
        if rng.random() < 0.6:  # else most layouts would not fit
            family = [np.repeat(kinds[rng.integers(0, 4)], levels) for kinds in KINDS]
        config = {
            "sample_size": 4,
            "in_channels": int(rng.choice([3, 3, 1])),
            "out_channels": int(rng.choice([3, 3, 1])),
            "block_out_channels": [int(c) for c in rng.choice([32, 36, 64], levels)],
            "down_block_types": [str(kind) for kind in family[0]],
            "up_block_types": [str(kind) for kind in family[1]],
            "layers_per_block": int(rng.integers(1, 3)),
            "norm_num_groups": [4, 4, 9, None][rng.integers(0, 4)],
            "attention_head_dim": [8, 64, None][rng.integers(0, 3)],
            "attn_norm_num_groups": [None, None, 5][rng.integers(0, 3)],
        }
        try:
            UNet2DConfig.from_dict(config)
            accepted = True
        except ConfigError:
            accepted = False
        try:
            with torch.no_grad(), torch.device("meta"):  # shapes without numbers
                model = diffusers.UNet2DModel(**config)
                shape = model(torch.zeros(3, config["in_channels"], 4, 4), torch.zeros(3)).sample.shape
            runs = tuple(shape) == (3, config["out_channels"], 4, 4)
        except Exception:  # whatever way it fails in
            runs = False
        assert accepted == runs, config
        agreed[runs] += 1
    assert min(agreed.values()) >= 10, agreed  # both happened, often
