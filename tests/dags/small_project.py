"""A project that the DAGs run in seconds: its stages write outputs of the real form, made for the purpose.

Two stages in place of training and evaluation; the gate, the registry and the promotion that follow are the real ones.
"""

import shutil
import subprocess
from pathlib import Path

DAGS = Path(__file__).parent.parent.parent / "dags"

PARAMS = """\
seed: 0        # of the weights
dataset: none
kid: 0.001     # by which the student is worse than its teacher; the margin is 0.02
steps: 1       # of half a second; each leaves a checkpoint
"""

GRAPH = """\
stages:
  train:
    cmd: python make.py model
    deps: [make.py]
    params: [seed, steps]
    outs: [models/progressive/8]
  evaluate:
    cmd: python make.py reports
    deps: [make.py, models/progressive/8]
    params: [kid]
    outs: [reports/evaluate.json, reports/measure.json]
"""

DVC_CONFIG = """\
[core]
    analytics = false
    remote = local
['remote "local"']
    url = ../.ado/remote
"""

MAKE = '''\
"""Writes what the project's own stages would write."""

import json
import sys
import time
from pathlib import Path

import yaml

params = yaml.safe_load(Path("params.yaml").read_text())


def model():
    from ado_tasks import rng
    from ado_tasks.interop.diffusers_folder import write_model
    from ado_tasks.models.initialise import initialise
    from ado_tasks.models.unet import UNet2D
    from ado_tasks.models.unet_config import UNet2DConfig

    train()
    config = UNet2DConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=4, attention_head_dim=8, num_class_embeds=10,
    )
    unet = UNet2D(config)
    initialise(unet, rng.key(params["seed"], "weights"))
    scheduler = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    write_model(Path("models/progressive/8"), unet, scheduler, {"history": [{"task": "train"}]})


def train():
    checkpoint = Path(".ado/scratch/train/step")
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print("begins at step", done, flush=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for step in range(done, params["steps"]):
        time.sleep(0.5)
        checkpoint.with_suffix(".part").write_text(str(step + 1))
        checkpoint.with_suffix(".part").rename(checkpoint)


def reports():
    kid = params["kid"]
    difference = {"value": kid, "ci": [kid - 0.002, kid + 0.002], "margin": 0.02, "non_inferior": kid < 0.018}
    far = {"value": 1.1, "low": 1.0, "high": 1.2}
    trained = {"value": 0.2, "ratio_to_floor": 0.2}
    common = {"params": 1, "recall": 0.6, "class_accuracy": 0.9, "memorisation": far, "fd_over_train": trained}
    same = {"value": 0.0, "ci": [0.0, 0.0], "margin": 0.02, "non_inferior": True}
    quality = [
        {"name": "teacher-50", "solver": "ddim", "nfe": 50, "kid_minus_teacher": same, **common},
        {"name": "progressive-8", "solver": "ddim", "nfe": 8, "kid_minus_teacher": difference, **common},
    ]
    reference = {"n_generated": 10, "features_sha256": "", "seeds": {"report": 0, "draw": "report"}}
    config = {"batch_size": 10, "shards": 1}
    save("evaluate", {"variants": quality, "reference": reference, "config": config, "chosen": "progressive-8"})
    cost = [{**cost_of("teacher-50", 50, 8.0), **speedup(1.0)}, {**cost_of("progressive-8", 8, 1.0), **speedup(8.0)}]
    save("measure", {"hardware": {"id": "none"}, "variants": cost})


def cost_of(name, nfe, latency):
    latencies = {"median": latency, "min": latency, "max": latency}
    return {"name": name, "nfe": nfe, "batch": 1, "precision": "float32", "latency_ms_per_image": latencies,
            "peak_memory_mb": 1.0}


def speedup(value):
    return {"speedup_vs_teacher": {"median": value, "min": value, "max": value}}


def save(name, report):
    Path("reports").mkdir(exist_ok=True)
    Path("reports", name + ".json").write_text(json.dumps(report))


globals()[sys.argv[1]]()
'''


def make_small_project(folder: Path) -> Path:
    """A git repository with the project and the DAG files in it; returns its folder."""
    folder.mkdir(parents=True)
    shutil.copytree(DAGS, folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    files = {
        "params.yaml": PARAMS,
        "dvc.yaml": GRAPH,
        "make.py": MAKE,
        ".gitignore": ".ado/\n__pycache__/\n/models\n/reports\n",
        ".dvc/config": DVC_CONFIG,
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=True)
    commit(folder, "as it is")
    return folder


def commit(folder: Path, message: str) -> None:
    """Everything in the folder."""
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["add", "-A"], ["commit", "-q", "-m", message]):
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
