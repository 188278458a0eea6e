"""`kill -9` at any moment: the same command goes on, and ends with the bytes of a run that was never stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ado_tasks.storage import sha256_tree

ROOT = Path(__file__).resolve().parent.parent

PARAMS = """\
seed: 3
prepare: {name: digits, source: digits}
train:
  model: {block_out_channels: [8, 8], down_block_types: [DownBlock2D, DownBlock2D],
          up_block_types: [UpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 4, attention_head_dim: 8}
  steps: 60
  batch_size: 16
  warmup_steps: 10
  validate_every: 20
  checkpoint_every: 10
distill:
  progressive: {teacher_steps: 4, student_steps: [2, 1], stage_steps: 30, batch_size: 16, checkpoint_every: 10,
                matching: {steps: [0, 30], batch_size: 8}}
  consistency: {method: consistency, steps: 60, batch_size: 16, warmup_steps: 5, checkpoint_every: 10,
                search_samples: 50, search_levels: 3}
"""
COMMANDS = {
    "train": ["train", "--dataset", "data", "--out", "models/teacher", "--scratch", "scratch"],
    "distill": ["distill", "--section", "distill.progressive", "--teacher", "models/teacher", "--dataset", "data",
                "--out", "models/progressive", "--scratch", "scratch"],
    "tune": ["distill", "--section", "distill.consistency", "--teacher", "models/teacher", "--dataset", "data",
             "--out", "models/consistency", "--scratch", "scratch"],
}  # fmt: skip
OUTPUT = {"train": "models/teacher", "distill": "models/progressive", "tune": "models/consistency"}


def start(workspace: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "ADO_SYNC": "manual", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "ado_tasks", *arguments], cwd=workspace, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(workspace: Path, *arguments: str) -> None:
    process = start(workspace, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, float]]:
    """A run that nothing stopped: its workspace, the hash of each output, and how long each task took."""
    workspace = tmp_path_factory.mktemp("unbroken")
    (workspace / "params.yaml").write_text(PARAMS)
    finish(workspace, "prepare", "--out", "data")
    sums, seconds = {}, {}
    for task, command in COMMANDS.items():
        finish(workspace, *command)  # fused kernels are compiled and cached on the way
        first = sha256_tree(workspace / OUTPUT[task])
        began = time.monotonic()
        finish(workspace, *command)
        seconds[task] = time.monotonic() - began
        sums[task] = sha256_tree(workspace / OUTPUT[task])
        assert sums[task] == first  # and the task is pure
    return workspace, sums, seconds


def check_kills(
    unbroken: tuple[Path, dict[str, str], dict[str, float]], tmp_path: Path, task: str, times: int, seed: int
) -> None:
    source, sums, seconds = unbroken
    moments = random.Random(seed)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "data").symlink_to(source / "data")
    (tmp_path / "models").mkdir()
    if task != "train":
        (tmp_path / "models" / "teacher").symlink_to(source / "models" / "teacher")
    out = tmp_path / OUTPUT[task]
    killed = 0
    while killed < times:
        process = start(tmp_path, *COMMANDS[task])
        time.sleep(moments.uniform(0.2, 1.0) * seconds[task])
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it was quicker than the signal: take its work away and start anew
            assert sha256_tree(out) == sums[task]
            subprocess.run(["rm", "-rf", str(out)], check=True)
        else:
            killed += 1
            assert not out.exists() or sha256_tree(out) == sums[task], "something half-written has the final name"
    finish(tmp_path, *COMMANDS[task])
    assert sha256_tree(out) == sums[task]
    left = [path.name for path in tmp_path.rglob("*tmp-*") if ".ado" not in path.parts and "scratch" not in path.parts]
    assert left == []


@pytest.mark.parametrize("task", list(COMMANDS))
def test_three_kills(unbroken, tmp_path: Path, task: str) -> None:
    check_kills(unbroken, tmp_path, task, times=3, seed=0)


@pytest.mark.bars
@pytest.mark.parametrize("task", list(COMMANDS))
def test_twenty_kills(unbroken, tmp_path: Path, task: str) -> None:
    check_kills(unbroken, tmp_path, task, times=20, seed=1)


def test_sigterm_keeps_the_step_that_was_reached(tmp_path: Path) -> None:
    sums = {}
    for name in ("unbroken", "stopped"):
        workspace = tmp_path / name
        workspace.mkdir()
        rarely = PARAMS.replace("steps: 60", "steps: 200").replace("checkpoint_every: 10", "checkpoint_every: 1000")
        (workspace / "params.yaml").write_text(rarely)
        finish(workspace, "prepare", "--out", "data")
        if name == "stopped":
            process = start(workspace, *COMMANDS["train"])
            while not any("training_loss" in said.read_text() for said in workspace.glob(".ado/runs/*/events.jsonl")):
                assert process.poll() is None
                time.sleep(0.02)
            process.terminate()
            _, errors = process.communicate()
            assert process.returncode == 130, errors.decode()
            (kept,) = workspace.glob("scratch/*/step-*.safetensors")
            assert 25 <= int(kept.stem.removeprefix("step-")) < 200
        finish(workspace, *COMMANDS["train"])
        sums[name] = sha256_tree(workspace / OUTPUT["train"])
    assert sums["stopped"] == sums["unbroken"]
