"""Folders to and from `diffusers` itself: the same outputs, and the same picture for the same noise."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from test_diffusers_folder import CONFIG, RECORD, SCHEDULER

from ado_tasks.backend import mx
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.denoiser import make_denoiser
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.diffusion.solvers import SOLVERS, ddim
from ado_tasks.diffusion.solvers.common import keys_of_steps, noise_like
from ado_tasks.interop.diffusers_folder import StoredModel, read_model, read_unet, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

torch.set_num_threads(1)
diffusers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")

UNCONDITIONAL = {**CONFIG, "num_class_embeds": None}
SCHEDULES = [("squaredcos_cap_v2", "v_prediction"), ("linear", "epsilon"), ("scaled_linear", "sample")]
PICTURES = [(*schedule, steps) for schedule in SCHEDULES for steps in (1, 4)] + [(*SCHEDULES[0], 50)]
X = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
T = np.array([7, 903])


def _unet(config: dict) -> UNet2D:
    unet = UNet2D(UNet2DConfig.from_dict(config))
    initialise(unet, mx.random.key(1))
    return unet


def _to_torch(images: np.ndarray):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _ours(unet: UNet2D, labels: np.ndarray | None = None) -> np.ndarray:
    return np.array(unet(mx.array(X), mx.array(T.astype(np.float32)), None if labels is None else mx.array(labels)))


def _theirs(unet, labels: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        y = unet(_to_torch(X), torch.from_numpy(T), None if labels is None else torch.from_numpy(labels)).sample
    return y.permute(0, 2, 3, 1).numpy()


def _picture(stored: StoredModel, noise: np.ndarray, steps: int) -> np.ndarray:
    """Our DDIM, as samples (B, H, W, C) in [0, 1] as Diffusers' pipelines give them."""
    schedule = schedule_from_diffusers(stored.scheduler_config)
    denoise = make_denoiser(stored.unet, schedule, stored.scheduler_config["prediction_type"])
    return np.clip(np.array(ddim(denoise, mx.array(noise), grids.uniform_time(steps), schedule)) / 2 + 0.5, 0, 1)


def _their_picture(pipeline, noise: np.ndarray, steps: int, monkeypatch) -> np.ndarray:
    """DDIMPipeline draws its own noise; it is given ours instead."""
    module = "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: _to_torch(noise))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=len(noise), num_inference_steps=steps, eta=0.0, output_type="np").images


def test_our_folder_in_diffusers(tmp_path: Path):
    unet = _unet(CONFIG)
    write_model(tmp_path / "model", unet, SCHEDULER, RECORD)
    labels = np.array([2, 0])
    alone = diffusers.UNet2DModel.from_pretrained(tmp_path / "model", subfolder="unet")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(_theirs(alone, labels), _ours(unet, labels), rtol=0, atol=1e-5)
    np.testing.assert_allclose(_theirs(pipeline.unet, labels), _ours(unet, labels), rtol=0, atol=1e-5)
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)
    assert {key: pipeline.scheduler.config[key] for key in SCHEDULER if key[0] != "_"} == {
        key: value for key, value in SCHEDULER.items() if key[0] != "_"
    }


@pytest.mark.parametrize(("beta_schedule", "prediction_type", "steps"), PICTURES)
def test_the_same_noise_gives_the_same_picture(tmp_path, monkeypatch, beta_schedule, prediction_type, steps):
    scheduler = schedule_from_diffusers({"beta_schedule": beta_schedule}).to_diffusers(prediction_type)
    assert scheduler["timestep_spacing"] == "trailing" and not scheduler["clip_sample"]
    write_model(tmp_path / "model", _unet(UNCONDITIONAL), scheduler, RECORD)
    noise = np.random.default_rng(steps).standard_normal((2, 8, 8, 3)).astype(np.float32)
    ours = _picture(read_model(tmp_path / "model"), noise, steps)
    theirs = _their_picture(diffusers.DDIMPipeline.from_pretrained(tmp_path / "model"), noise, steps, monkeypatch)
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_a_folder_of_diffusers_here(tmp_path, monkeypatch):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**UNCONDITIONAL)
    scheduler = diffusers.DDIMScheduler(**{key: value for key, value in SCHEDULER.items() if key[0] != "_"})
    diffusers.DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "model")
    stored = read_model(tmp_path / "model")
    assert stored.record == {}
    np.testing.assert_allclose(_ours(stored.unet), _theirs(unet), rtol=0, atol=1e-5)
    noise = np.random.default_rng(9).standard_normal((2, 8, 8, 3)).astype(np.float32)
    theirs = _their_picture(diffusers.DDIMPipeline.from_pretrained(tmp_path / "model"), noise, 5, monkeypatch)
    np.testing.assert_allclose(_picture(stored, noise, 5), theirs, rtol=0, atol=1e-3)


def test_half_precision_and_several_files_of_diffusers_here(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**UNCONDITIONAL)
    unet.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(_ours(read_unet(tmp_path / "parts")), _theirs(unet), rtol=0, atol=1e-5)
    unet.half().save_pretrained(tmp_path / "half", variant="fp16")
    np.testing.assert_allclose(_ours(read_unet(tmp_path / "half")), _theirs(unet.float()), rtol=0, atol=1e-5)


def test_pickled_weights_of_diffusers_are_refused(tmp_path):
    from ado_tasks.errors import ArtifactError

    diffusers.UNet2DModel(**UNCONDITIONAL).save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(ArtifactError, match="pickled weights are never opened"):
        read_unet(tmp_path / "model")


def test_a_scheduler_that_is_not_ddim_stays_what_it_is(tmp_path):
    scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "epsilon"}
    write_model(tmp_path / "model", _unet(UNCONDITIONAL), scheduler, RECORD)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(pipeline.scheduler, diffusers.DDPMScheduler)


@pytest.mark.parametrize("timesteps", [[991], [991, 424], [991, 700, 55]], ids=len)
def test_a_consistency_students_snippet_makes_our_images_there(tmp_path, monkeypatch, timesteps):
    """The words of ado.json, run as they stand. Diffusers' LCMScheduler at the same timesteps comes to the same."""
    from ado_tasks.distillation import consistency

    schedule, labels = schedule_from_diffusers(SCHEDULER), np.array([2, 0])
    unet = _unet(CONFIG)
    write_model(tmp_path / "model", unet, SCHEDULER, RECORD)
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    between = [noise_like(mx.array(noise), key) for key in keys_of_steps(mx.random.key(0), len(timesteps))]
    between = [_to_torch(np.array(each)) for each in between]
    denoise = make_denoiser(lambda z, t: unet(z, t, mx.array(labels)), schedule, "v_prediction")
    times = np.append((np.array(timesteps) + 1) / 1000, 0.0)
    ours = np.array(SOLVERS["consistency"].sample(denoise, mx.array(noise), times, schedule, key=mx.random.key(0)))

    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "model", subfolder="unet")
    given = {
        "folder": tmp_path / "model", "timesteps": timesteps, "unet": theirs, "labels": torch.from_numpy(labels),
        "x": _to_torch(noise), "torch": torch, "DDIMScheduler": diffusers.DDIMScheduler,
    }  # fmt: skip
    drawn = iter(between)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
    with torch.no_grad():
        exec(consistency.SNIPPET, given)
    assert given["x"].std() > 0.05
    np.testing.assert_allclose(given["x"].permute(0, 2, 3, 1).numpy(), ours, rtol=0, atol=1e-4)

    drawn = iter(between)
    scheduler = getattr(diffusers, consistency.SCHEDULER).from_pretrained(tmp_path / "model", subfolder="scheduler")
    scheduler.set_timesteps(timesteps=timesteps)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(drawn))
    x = _to_torch(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            said = theirs(x, t, class_labels=torch.from_numpy(labels)).sample
            x, denoised = scheduler.step(said, t, x, return_dict=False)
    np.testing.assert_allclose(denoised.permute(0, 2, 3, 1).numpy(), ours, rtol=0, atol=1e-4)
