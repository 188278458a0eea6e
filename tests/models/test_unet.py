"""What a U-Net does besides agreeing with Diffusers: conditions matter, nothing random happens unasked, it compiles."""

import numpy as np
import pytest
from unet_cases import CASES, Case, call
from unet_run import build

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.errors import ConfigError
from ado_tasks.models.initialise import initialise
from ado_tasks.models.layers import DropoutKeys
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters

X = mx.array(call(CASES["base"])[0])
T = mx.array([3.0, 960.0])


def test_every_timestep_gives_another_output():
    unet = build(CASES["base"])
    one = mx.broadcast_to(X[:1], (4, *X.shape[1:]))
    y = np.array(unet(one, mx.array([0.0, 1.0, 1.5, 999.0])))
    for i in range(4):
        for j in range(i):
            assert np.abs(y[i] - y[j]).max() > 1e-3, (i, j)


def test_every_class_gives_another_output():
    unet = build(CASES["classes"])
    one, t = mx.broadcast_to(X[:1], (3, *X.shape[1:])), mx.full((3,), 100.0)
    y = np.array(unet(one, t, mx.array([0, 1, 4])))
    assert min(np.abs(y[0] - y[1]).max(), np.abs(y[1] - y[2]).max(), np.abs(y[0] - y[2]).max()) > 1e-3


def test_an_image_does_not_depend_on_those_beside_it():
    unet = build(CASES["base"])
    np.testing.assert_allclose(unet(X, T)[1:], unet(X[1:], T[1:]), rtol=0, atol=1e-5)


def test_any_multiple_of_the_size_works():
    unet = build(CASES["base"])
    assert unet(mx.zeros((1, 4, 12, 3)), T[:1]).shape == (1, 4, 12, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((mx.zeros((2, 9, 8, 3)), T), r"input of shape \(2, 9, 8, 3\); allowed: .*multiples of 2"),
        ((mx.zeros((2, 3, 8, 8)), T), r"allowed: \(batch, height, width, 3\)"),
        ((mx.zeros((8, 8, 3)), T), r"input of shape \(8, 8, 3\)"),
        ((X, T[:1]), r"timestep of shape \(1,\); allowed: \(2,\)"),
        ((X, mx.array(3.0)), r"timestep of shape \(\); allowed: \(2,\)"),
        ((X, T, mx.array([0, 1])), r"class_labels given, but the model has no classes"),
    ],
)
def test_calls_that_have_no_meaning_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(CASES["base"])(*arguments)


def test_a_missing_class_is_refused():
    with pytest.raises(ConfigError, match="class_labels must be given"):
        build(CASES["classes"])(X, T)


def test_building_moves_no_random_state_and_repeats_itself():
    config = UNet2DConfig.from_dict(CASES["classes"].config)
    before = [np.array(state) for state in mx.random.state]
    first, second = UNet2D(config), UNet2D(config)
    initialise(first, mx.random.key(7))
    initialise(second, mx.random.key(7))
    first(X, T, mx.array([0, 1]), dropout_key=mx.random.key(1))
    after = [np.array(state) for state in mx.random.state]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    ours, theirs = flat_parameters(first), flat_parameters(second)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["base", "k_cross_up", "attn_skip", "fourier"])
def test_before_initialisation_there_is_nothing_random(name):
    for path, value in flat_parameters(UNet2D(UNet2DConfig.from_dict(CASES[name].config))).items():
        expected = 1.0 if "norm" in path and path.endswith("weight") and "linear" not in path else 0.0
        assert (np.array(value) == expected).all(), path


class TestDropout:
    unet = build(Case({"dropout": 0.5}))

    def test_without_a_key_nothing_is_dropped(self):
        np.testing.assert_array_equal(self.unet(X, T), build(CASES["base"])(X, T))

    def test_one_key_drops_the_same_twice_and_another_key_drops_differently(self):
        one = np.array(self.unet(X, T, dropout_key=mx.random.key(1)))
        np.testing.assert_array_equal(one, self.unet(X, T, dropout_key=mx.random.key(1)))
        assert np.abs(one - np.array(self.unet(X, T, dropout_key=mx.random.key(2)))).max() > 1e-2
        assert np.abs(one - np.array(self.unet(X, T))).max() > 1e-2

    def test_the_mean_over_masks_is_the_input(self):
        x = mx.ones((400, 500))
        kept = np.array(DropoutKeys(mx.random.key(0), 1).drop(x, 0.25))
        assert set(np.unique(kept)) == {0, np.float32(4 / 3)}
        assert abs(kept.mean() - 1) < 6 * np.sqrt(1 / 3 / kept.size)  # variance p/(1-p) an element
        assert not np.array(DropoutKeys(mx.random.key(0), 1).drop(x, 1.0)).any()

    def test_each_block_has_masks_of_its_own(self):
        keys = DropoutKeys(mx.random.key(0), 2)
        first, second = (np.array(keys.drop(mx.ones((50, 50)), 0.5)) for _ in range(2))
        assert 0.3 < (first != second).mean() < 0.7

    def test_a_probability_of_zero_needs_no_key_of_its_own(self):
        plain = build(CASES["base"])
        np.testing.assert_array_equal(plain(X, T, dropout_key=mx.random.key(1)), plain(X, T))

    @pytest.mark.parametrize("name", ["k_cross_up", "attn_skip", "resnet_resize"])
    def test_every_residual_block_drops_once_with_a_key_of_its_own(self, name, monkeypatch):
        used = []

        class Recording(DropoutKeys):
            def drop(self, x, probability):
                dropped = super().drop(x, probability)
                used.append((probability, np.array(dropped == 0).mean()))
                return dropped

        monkeypatch.setattr("ado_tasks.models.unet.DropoutKeys", Recording)
        unet = build(Case({**CASES[name].changes, "dropout": 0.3}))
        y = np.array(unet(X, T, dropout_key=mx.random.key(3)))
        blocks = {path.rsplit(".", 2)[0] for path in flat_parameters(unet) if path.endswith("conv2.weight")}
        assert len(used) == len(blocks) >= 6
        assert all(probability == 0.3 and 0.1 < share < 0.5 for probability, share in used)
        assert np.isfinite(y).all() and np.abs(y - np.array(build(CASES[name])(X, T))).max() > 1e-3


def test_compiled_it_says_the_same():
    unet = build(Case({**CASES["classes"].changes, "dropout": 0.2}))
    arguments = [X, T, mx.array([4, 0])]

    def projected(parameters, key, *arguments):
        unet.update(parameters)
        return (unet(*arguments, dropout_key=key) ** 2).mean()

    parameters, key = unet.parameters(), mx.random.key(5)
    plain, plain_gradient = mx.value_and_grad(projected)(parameters, key, *arguments)
    compiled, gradient = mx.compile(mx.value_and_grad(projected))(parameters, key, *arguments)
    np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    for (path, a), (_, b) in zip(mlx_utils.tree_flatten(gradient), mlx_utils.tree_flatten(plain_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 + 1e-4 * float(mx.abs(b).max()), err_msg=path)


def test_half_precision_weights_keep_the_timestep_exact_and_answer_in_float32():
    """Bfloat16 turns 999 into 1000: the embedding must be computed before anything is rounded."""
    unet = build(CASES["base"])
    exact = np.array(unet.time_proj(mx.array([999.0])))
    unet.set_dtype(mx.bfloat16)
    np.testing.assert_array_equal(unet.time_proj(mx.array([999.0])), exact)
    y = unet(X, T)
    assert y.dtype == mx.float32
    reference = np.array(build(CASES["base"])(X, T))
    assert np.abs(np.array(y) - reference).max() < 0.1 * np.abs(reference).max()


def test_a_learned_table_takes_the_nearest_row():
    unet = build(CASES["learned"])
    y = np.array(unet(X, mx.array([2.6, 959.5])))  # halves go to the even row
    np.testing.assert_array_equal(y, unet(X, mx.array([3.0, 960.0])))


def test_fourier_frequencies_are_never_trained():
    unet = build(CASES["fourier"])
    assert "time_proj.weight" in flat_parameters(unet)
    assert "time_proj" not in unet.trainable_parameters() or not unet.trainable_parameters()["time_proj"]

    def projected(parameters):
        unet.update(parameters)
        return unet(X, T).sum()

    gradient = mx.grad(projected)(unet.parameters())  # by someone who asks for all parameters
    assert not np.array(gradient["time_proj"]["weight"]).any()
    assert np.array(gradient["conv_in"]["weight"]).any()
