"""The task `calibrate`: what it writes, that learned knots are nearer on other noise, what it costs, purity."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.calibrate import CalibrateConfig, _diffusers, calibrate
from ado_tasks.config import parse
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.denoiser import make_denoiser, told
from ado_tasks.diffusion.oracles import mixture_denoiser
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.diffusion.solvers import SOLVERS, ddim, ipndm
from ado_tasks.errors import ArtifactError, ConfigError, DivergenceError
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.interop.package import Package, read_package, write_package
from ado_tasks.metrics.paired import holm, paired_distance, paired_less
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.knots import Fit
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import Recorder
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import sha256_tree
from ado_tasks.variants import BASELINE_GRIDS, baseline_grid, calibrated_variants

SCHEDULE = Cosine()
TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 10,
}
SMALL = CalibrateConfig(nfe=(3, 2), samples=8, validation_samples=9, points=13, max_solves=7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareConfig(), out=out, seed=0)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A class-conditional network as it is initialised: an arbitrary smooth function of noise, time and label."""
    out = tmp_path_factory.mktemp("models") / "teacher"
    unet = UNet2D(UNet2DConfig.from_dict(TINY))
    initialise(unet, rng.key(0, "test"))
    write_model(out, unet, SCHEDULE.to_diffusers("v_prediction"), {"history": []})
    return out


@pytest.fixture(scope="module")
def schedules(model, dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("schedules") / "teacher"
    calibrate(SMALL, model=model, dataset=dataset, out=out, seed=0)
    return out


def test_the_files_say_where_to_step_and_what_that_was_chosen_on(schedules, model):
    assert sorted(path.name for path in schedules.iterdir()) == [
        "ddim-2.json", "ddim-3.json", "index.json", "ipndm-2.json", "ipndm-3.json", "schedules.png",
    ]  # fmt: skip
    index = json.loads((schedules / "index.json").read_text())
    assert [(entry["solver"], entry["nfe"]) for entry in index["schedules"]] == [
        ("ddim", 2), ("ddim", 3), ("ipndm", 2), ("ipndm", 3),
    ]  # fmt: skip
    for entry in index["schedules"]:
        stored = json.loads((schedules / f"{entry['solver']}-{entry['nfe']}.json").read_text())
        assert stored == entry | {"chosen_on": index["chosen_on"]}
        times = np.array(stored["times"])
        assert len(times) == entry["nfe"] + 1
        assert SOLVERS[entry["solver"]].nfe(times) == entry["nfe"]
        assert (np.diff(times) < 0).all()
        assert times[0] <= 1
        assert times[-1] == 0
        np.testing.assert_allclose((np.array(stored["timesteps"]) + 1) / 1000, times[:-1], atol=1e-12)
        assert stored["method"] == min(stored["chosen_by"], key=stored["chosen_by"].get)
        assert stored["distance"] == stored["candidates"][stored["method"]]
        assert stored["ratio_to_best"] == pytest.approx(
            stored["distance"] / stored["baselines"][stored["best_baseline"]]
        )
    assert index["chosen_on"]["model_sha256"] == sha256_tree(model)
    assert index["chosen_on"]["fit"]["draw"] != index["chosen_on"]["validation"]["draw"]
    assert "report" not in json.dumps(index["chosen_on"])


def test_the_same_arguments_give_the_same_bytes_and_leave_everything_else_alone(schedules, model, dataset, tmp_path):
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ), Path.cwd()  # noqa: NPY002
    calibrate(SMALL, model=model, dataset=dataset, out=tmp_path / "teacher", seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ), Path.cwd()) == before  # noqa: NPY002
    assert sha256_tree(tmp_path / "teacher") == sha256_tree(schedules)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_cost_is_the_number_of_images_that_went_through_the_network(model, dataset, tmp_path, monkeypatch):
    counted = []
    unwatched = Sampler.denoiser

    def watched(self, labels):
        denoise = unwatched(self, labels)

        def counting(z, t):
            counted.append(z.shape[0])
            return denoise(z, t)

        return counting

    monkeypatch.setattr(Sampler, "denoiser", watched)
    found = calibrate(SMALL, model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    assert found.evaluations == sum(counted)


def test_labels_of_a_conditional_model_reach_it(model, dataset, tmp_path, monkeypatch):
    seen = []
    unwatched = Sampler.denoiser

    def watched(self, labels):
        seen.append(np.array(labels))
        return unwatched(self, labels)

    monkeypatch.setattr(Sampler, "denoiser", watched)
    calibrate(SMALL, model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    assert {len(labels) for labels in seen} == {8, 9}
    assert all(set(labels) <= set(range(10)) for labels in seen)
    assert len(set(np.concatenate(seen))) > 4


@pytest.fixture(scope="module")
def oracle(dataset):
    """The best denoiser of blurred digits: a nonlinear model of real images that costs next to nothing."""
    images = open_dataset(dataset).split("train").batch(np.arange(300))
    return mixture_denoiser(SCHEDULE, images, 0.3)


@pytest.mark.bars
def test_learned_knots_are_nearer_than_every_usual_grid_on_other_noise(model, dataset, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "denoiser", lambda self, labels: oracle)
    found = calibrate(CalibrateConfig(), model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    assert len(found.learned) == 8

    noise = mx.random.normal((4000, 8, 8, 1), key=mx.random.key(99))
    # Not uniform in t: its last, first-order step would make up nearly all of the fine solution's own error.
    fine = np.array(ipndm(oracle, noise, grids.uniform_time(200) ** 1.5, SCHEDULE))
    p_values = []
    for name in found.learned:
        entry = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        sample, steps = SOLVERS[entry["solver"]].sample, entry["nfe"]

        def values(times, sample=sample):
            return paired_distance(np.array(sample(oracle, noise, times, SCHEDULE)), fine).values

        learned = values(entry["times"])
        for baseline in BASELINE_GRIDS:
            p_values.append(paired_less(learned, values(baseline_grid(baseline, steps, SCHEDULE))))
    assert max(holm(p_values)) < 0.05


def test_nothing_learned_is_kept_where_a_usual_grid_is_nearer(model, dataset, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "denoiser", lambda self, labels: oracle)
    clumped = np.append(1 - np.arange(8) / 1000, 0.0)
    monkeypatch.setattr("ado_tasks.calibrate.fit_knots", lambda *_, **__: Fit(clumped, 0.0, 0.0, 1))
    # A discount under which GITS cares for its last jump only.
    spoilt = CalibrateConfig(nfe=(8,), solvers=("ddim",), gamma=1e6, samples=8)
    calibrate(spoilt, model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    entry = json.loads((tmp_path / "out" / "ddim-8.json").read_text())
    assert entry["method"] == entry["best_baseline"]
    assert entry["chosen_by"][entry["method"]] < min(entry["chosen_by"]["fitted"], entry["chosen_by"]["gits"])
    assert entry["ratio_to_best"] == pytest.approx(1, abs=0.05)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch inside Diffusers
def test_learned_ddim_knots_run_in_diffusers(schedules):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    entry = json.loads((schedules / "ddim-3.json").read_text())
    scheduler = getattr(diffusers, entry["diffusers"]["scheduler"]).from_config(
        SCHEDULE.to_diffusers("v_prediction"), **entry["diffusers"]["fields"]
    )
    scheduler.set_timesteps(timesteps=entry["timesteps"])
    start = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    sample = torch.tensor(start)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.tanh(0.7 * sample + t / 1000), t, sample).prev_sample

    def network(z, timestep):
        return mx.tanh(0.7 * z + timestep[:, None, None, None] / 1000)

    ours = ddim(make_denoiser(network, SCHEDULE, "v_prediction"), mx.array(start), entry["times"], SCHEDULE)
    np.testing.assert_allclose(np.array(ours), sample.numpy(), atol=1e-5)


def test_what_is_found_is_reported(model, dataset, tmp_path):
    report = Recorder()
    config = CalibrateConfig(nfe=(2,), solvers=("ddim",), samples=8, validation_samples=8, points=13, max_solves=1)
    found = calibrate(config, model=model, dataset=dataset, out=tmp_path / "out", seed=1, report=report)
    metrics = {name: value for name, value, _ in report.metrics}
    assert metrics["ddim-2.ratio_to_best"] == found.ratio_to_best["ddim-2"]
    assert metrics["evaluations"] == found.evaluations
    assert report.pictures == [("schedules", tmp_path / "out" / "schedules.png")]
    assert report.pictures[0][1].stat().st_size > 1000
    assert report.steps == [(1, 1, {})]


def test_a_damaged_model_is_refused_and_nothing_is_left(model, dataset, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ArtifactError):
        calibrate(SMALL, model=tmp_path / "model", dataset=dataset, out=tmp_path / "out", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_with_fewer_classes_than_the_data_is_refused(dataset, tmp_path):
    unet = UNet2D(UNet2DConfig.from_dict({**TINY, "num_class_embeds": 9}))
    write_model(tmp_path / "teacher", unet, SCHEDULE.to_diffusers("v_prediction"), {"history": []})
    with pytest.raises(ConfigError, match=r"teacher/unet/config\.json\.num_class_embeds: 9 .*10 or more"):
        calibrate(SMALL, model=tmp_path / "teacher", dataset=dataset, out=tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_a_student_of_few_steps_is_refused(dataset, tmp_path):
    """What it makes in many steps is nothing that few should come near to."""
    done = {"task": "distill", "method": "progressive", "steps": 4}
    unet = UNet2D(UNet2DConfig.from_dict(TINY))
    write_model(tmp_path / "4", unet, SCHEDULE.to_diffusers("v_prediction"), {"history": [done]})
    with pytest.raises(ConfigError, match="a student of 4 steps, which knows no noise levels between"):
        calibrate(SMALL, model=tmp_path / "4", dataset=dataset, out=tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_a_model_that_diverges_is_named(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "denoiser", lambda self, labels: lambda z, t: z * float("nan"))
    with pytest.raises(DivergenceError, match="not finite"):
        calibrate(SMALL, model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"nfe": [1]}, "calibrate.teacher.nfe"),
        ({"solvers": ["heun"]}, "calibrate.teacher.solvers"),
        ({"samples": 1}, "calibrate.teacher.samples"),
        ({"knots": 4}, "calibrate.teacher.knots"),
    ],
)
def test_what_is_not_allowed_is_refused_by_key(values, key):
    with pytest.raises(ConfigError, match=key):
        parse(CalibrateConfig, values, "calibrate.teacher")


BOTH = CalibrateConfig(
    nfe=(3,), solvers=("ddim", "ipndm", "dpmpp_2m", "angle_ab2"), learner=("fitted", "ld3"), samples=8,
    validation_samples=9, points=13, max_solves=7, descent_evaluations=3 * 3 * 4 * 6, descent_batch=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def both(model, dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("schedules") / "both"
    calibrate(BOTH, model=model, dataset=dataset, out=out, seed=0)
    return out


def test_each_learner_is_a_candidate_and_says_what_it_was_chosen_on(both, model, dataset, tmp_path):
    index = json.loads((both / "index.json").read_text())
    assert [entry["solver"] for entry in index["schedules"]] == ["ddim", "ipndm", "dpmpp_2m", "angle_ab2"]
    for entry in index["schedules"]:
        assert {"fitted", "ld3", "gits"} < set(entry["candidates"])
        assert entry["method"] == min(entry["chosen_by"], key=entry["chosen_by"].get)
        assert ("told" in entry) == (entry["method"] == "ld3")
    with_told = [entry for entry in index["schedules"] if "told" in entry]
    assert with_told  # else nothing below was tried
    for entry in with_told:
        assert len(entry["told"]) == entry["nfe"]
        np.testing.assert_allclose((np.array(entry["told_timesteps"]) + 1) / 1000, entry["told"], atol=1e-12)
    draws = [index["chosen_on"][name]["draw"] for name in ("fit", "keep", "validation")]
    assert len(set(draws)) == 3
    calibrate(BOTH, model=model, dataset=dataset, out=tmp_path / "again", seed=0)
    assert sha256_tree(tmp_path / "again") == sha256_tree(both)


def test_what_each_schedule_cost_is_told_apart_from_the_reference(both, schedules):
    index = json.loads((both / "index.json").read_text())
    assert set(index["cost"]) == {"reference", "ddim-3", "ipndm-3", "dpmpp_2m-3", "angle_ab2-3"}
    assert sum(index["cost"].values()) == index["evaluations"]
    assert index["cost"]["reference"] == (8 + 9 + 8) * 12
    descent = BOTH.descent_evaluations
    # 6 steps of descent are validated at the start and at the end; 2 starts, 3 grids and 4 candidates are tried once.
    fixed = descent + 3 * (2 * 8 + 2 * 8 + (3 + 4) * 9)
    for name in ("ddim-3", "ipndm-3", "dpmpp_2m-3", "angle_ab2-3"):
        assert 3 * 8 < index["cost"][name] - fixed <= 2 * 3 * 8 * BOTH.max_solves  # one or two fits
    plain = json.loads((schedules / "index.json").read_text())
    assert plain["cost"]["reference"] == (8 + 9) * 12
    assert sum(plain["cost"].values()) == plain["evaluations"]
    assert plain["share_of_training"] is None  # of a teacher that was not trained here


def test_costs_are_told_as_shares_of_the_teachers_training(model, dataset, tmp_path):
    trained = read_model(model)
    done = {"task": "train", "config": {"steps": 100, "batch_size": 16}}
    write_model(tmp_path / "teacher", trained.unet, trained.scheduler_config, {"history": [done]})
    config = CalibrateConfig(nfe=(2,), solvers=("ddim",), samples=8, validation_samples=8, points=13, max_solves=1)
    calibrate(config, model=tmp_path / "teacher", dataset=dataset, out=tmp_path / "out", seed=1)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["share_of_training"] == {name: count / (3 * 100 * 16) for name, count in index["cost"].items()}


def test_only_ld3_can_be_asked_for(model, dataset, tmp_path):
    config = CalibrateConfig(
        nfe=(2, 3), solvers=("ddim",), learner=("ld3",), samples=8, validation_samples=8, points=13,
        descent_evaluations=100,
    )  # fmt: skip
    calibrate(config, model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    entry = json.loads((tmp_path / "out" / "ddim-3.json").read_text())
    assert set(entry["candidates"]) == {"ld3", "gits", entry["best_baseline"]}
    with pytest.raises(ConfigError, match="learner"):
        parse(CalibrateConfig, {"learner": []}, "calibrate.teacher")


def test_ld3_is_nearer_than_fitted_knots_on_other_noise(model, dataset, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "denoiser", lambda self, labels: oracle)
    monkeypatch.setattr(Sampler, "differentiable", lambda self, labels: oracle)
    config = CalibrateConfig(nfe=(4,), solvers=("dpmpp_2m",), learner=("fitted", "ld3"), descent_evaluations=8000)
    calibrate(config, model=model, dataset=dataset, out=tmp_path / "out", seed=0)
    entry = json.loads((tmp_path / "out" / "dpmpp_2m-4.json").read_text())
    assert entry["method"] == "ld3"
    assert entry["chosen_by"]["ld3"] < 0.9 * entry["chosen_by"]["fitted"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch inside Diffusers
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_told_times_run_in_diffusers(solver):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    times, heard = np.array([0.974, 0.739, 0.44, 0.058, 0.0]), np.array([0.87, 0.7218, 0.464, 0.0488])
    entry = _diffusers(solver, heard)
    scheduler = getattr(diffusers, entry["scheduler"]).from_config(
        SCHEDULE.to_diffusers("v_prediction"), **entry["fields"]
    )
    scheduler.set_timesteps(timesteps=[round(t) for t in SCHEDULE.timestep(times[:-1])])
    start = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    sample = torch.tensor(start)
    for t, at in zip(scheduler.timesteps, heard, strict=True):
        alpha, sigma = (float(c) for c in SCHEDULE.alpha_sigma(at))
        output = torch.tanh(0.7 * sample + (1000 * at - 1) / 1000)
        sample = scheduler.step(alpha * sample - sigma * output, t, sample).prev_sample

    def network(z, timestep):
        return mx.tanh(0.7 * z + timestep[:, None, None, None] / 1000)

    denoise = told(make_denoiser(network, SCHEDULE, "v_prediction"), heard)
    ours = SOLVERS[solver].sample(denoise, mx.array(start), times, SCHEDULE)
    np.testing.assert_allclose(np.array(ours), sample.numpy(), atol=1e-5)


def test_a_sampler_told_the_solvers_own_times_gives_the_same_bytes(model, dataset):
    sampler, start = Sampler(read_model(model), 8), draw(0, "test", 6, open_dataset(dataset).split("report"))
    times = np.array([1.0, 0.7, 0.3, 0.0])
    plain, same, other = (
        sampler(start, "ipndm", times, told=heard) for heard in (None, times[:-1], np.array([0.9, 0.7, 0.3]))
    )
    assert plain.tobytes() == same.tobytes()
    assert np.abs(plain - other).max() > 1e-4


def test_the_multistep_solver_that_was_nearer_is_the_calibrated_variant(both, schedules, model):
    teacher = read_model(model)
    index = json.loads((both / "index.json").read_text())
    multistep = {e["solver"]: e for e in index["schedules"] if e["solver"] != "ddim"}
    nearest = min(multistep.values(), key=lambda entry: entry["distance"])
    [variant] = calibrated_variants(teacher, both)
    assert (variant.name, variant.method) == ("calibrated-3", nearest["solver"])
    assert variant.solver == f"{nearest['solver']}+{'ld3' if nearest['method'] == 'ld3' else 'gits'}"
    assert (variant.told is None) == ("told" not in nearest)
    assert [v.solver for v in calibrated_variants(teacher, schedules)] == ["ipndm+gits", "ipndm+gits"]


def test_a_package_keeps_told_times_and_its_sum_covers_them(model, tmp_path):
    times, heard = (1.0, 0.4, 0.0), (0.9, 0.35)
    plain, with_told = (Package("calibrated-2", "ipndm", times, read_model(model), t) for t in (None, heard))
    assert write_package(tmp_path / "plain", plain) != write_package(tmp_path / "told", with_told)
    assert read_package(tmp_path / "told").told == heard
    assert read_package(tmp_path / "plain").told is None
    changed = json.loads((tmp_path / "told" / "sampler.json").read_text()) | {"told": [0.9, 0.36]}
    (tmp_path / "told" / "sampler.json").write_text(json.dumps(changed))
    with pytest.raises(ArtifactError, match="changed"):
        read_package(tmp_path / "told")
