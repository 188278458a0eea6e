"""bench/gpu_step.py: what is compared with what, when it is over, and what counts as our own overhead."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ado_tasks.backend import mx
from ado_tasks.optimise.steps import TrainStep

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import gpu_profile
import gpu_report
import gpu_step
import mac_processes
from mac_processes import Turns, take_turns

# Stands in for a contender: warms up for a while, then takes so long for each action.
FAKE = """
import json, sys, time
job = json.loads(sys.stdin.readline())
open(job["log"], "a").write("<")
time.sleep(job["warm"])
open(job["log"], "a").write(">")
def answer(value): print(json.dumps(value), flush=True)
answer({"actions": ["step"], "device": "gpu", "versions": {}, "check": [1.0]})
for line in sys.stdin:
    order = json.loads(line)
    if "run" in order:
        time.sleep(job["seconds"]); answer({"seconds": 1.0})
    elif "profile" in order:
        answer({"of": order["profile"]})
    else:
        answer({"framework_mib": 1.0} if "memory" in order else {})
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(FAKE)
    monkeypatch.setattr(mac_processes, "SCRIPT", script)
    return lambda **more: {"warm": 0.0, "seconds": 0.0, "log": str(log), **more}, log


def turns_of(milliseconds: dict[str, list[float]], checks: dict[str, list[float]]) -> Turns:
    ready = {
        job: {"actions": ["step"], "device": "gpu", "versions": {}, "check": check} for job, check in checks.items()
    }
    skipped = {"training, pytorch eager, float32": "why"}
    return Turns(
        {(job, "step"): [[each / 1e3] for each in times] for job, times in milliseconds.items()},
        {(job, "step"): {"framework_mib": 1024.0} for job in checks}, ready, skipped,
    )  # fmt: skip


def test_best_meets_best_within_rounds() -> None:
    times = {
        "training, mlx compiled, float32": [40.0, 80.0], "training, mlx compiled, bfloat16": [20.0, 40.0],
        "training, pytorch compiled, float32": [30.0, 60.0], "training, pytorch compiled, bfloat16": [10.0, 20.0],
    }  # fmt: skip
    report = gpu_report.compared(turns_of(times, {job: [1.0] for job in times}), 8)
    best = report["best"]["training"]
    assert best["mlx"] == "mlx compiled, bfloat16" and "pytorch eager" not in best
    assert best["pytorch compiled"]["form"] == "pytorch compiled, bfloat16"
    assert best["pytorch compiled"]["mlx_is_quicker"] == {"median": 0.5, "quartiles": [0.5, 0.5]}
    entry = report["parts"]["training"]["mlx compiled, bfloat16"]
    assert entry["images_per_s"]["median"] == pytest.approx(300.0) and entry["agrees"]
    assert report["parts"]["training"]["pytorch eager, float32"] == {"skipped": "why"}


def test_who_computes_something_else_is_told(tmp_path: Path) -> None:
    times = {"training, mlx compiled, float32": [40.0], "training, mlx compiled, bfloat16": [20.0]}
    checks = {"training, mlx compiled, float32": [1.0], "training, mlx compiled, bfloat16": [1.3]}
    report = gpu_report.compared(turns_of(times, checks), 8)
    assert not report["parts"]["training"]["mlx compiled, bfloat16"]["agrees"]
    assert report["best"]["training"]["mlx"] == "mlx compiled, float32"  # the quickest of those that agree
    profile = {key: [1.0, 2.0] for key in ("loop_ms", "evaluation_ms", "build_ms", "call_ms", "overhead")}
    report |= {
        "machine": {"device": "a GPU"}, "parameters": 10**6, "batch": 8, "steps": 50,
        "profiles": {"training, mlx compiled, bfloat16": {**profile, "overhead_median": 0.05}},
    }  # fmt: skip
    said = "\n".join(gpu_report.lines(json.loads(json.dumps(report, allow_nan=False))))
    assert "its results differ (0.3)" in said and "skipped: why" in said and "ours 5.0 %" in said
    gpu_report.draw(tmp_path / "bars.png", report)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_forms_warm_up_together_and_no_round_begins_that_would_not_end(fake: Any) -> None:
    job, log = fake
    asked: list[str] = []
    jobs = {name: job(warm=0.5, seconds=0.3) for name in "ab"}
    began = time.monotonic()
    turns = take_turns(
        jobs, 50, lambda *_: None, at_once=2, deadline=began + 8,
        before=lambda name, process: asked.append(name + process.ask({"profile": "p"})["of"]),
    )  # fmt: skip
    assert time.monotonic() - began < 10
    assert log.read_text().startswith("<<") and asked == ["ap", "bp"]
    assert 1 <= len(turns.seconds["a", "step"]) == len(turns.seconds["b", "step"]) < 14


def test_who_is_not_ready_in_time_is_left_out(fake: Any) -> None:
    job, _ = fake
    turns = take_turns(
        {"slow": job(warm=60.0), "quick": job()}, 1, lambda *_: None, at_once=2, deadline=time.monotonic() + 6
    )
    assert "no answer" in turns.skipped["slow"] and list(turns.ready) == ["quick"]


def test_what_python_does_between_steps_counts_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_profile, "COUNT", 3)
    monkeypatch.setattr(gpu_profile, "ROUNDS", 2)
    batch = {"images": mx.zeros((2, 1, 1, 1)), "noise": mx.ones((2, 1, 1, 1)), "t": mx.zeros((2,))}

    def loss(tree: Any, part: Any) -> mx.array:
        return mx.mean((part["images"] * tree["w"] - part["noise"]) ** 2)

    class Slow(TrainStep):
        """Something of ours that takes long before every step."""

        def __call__(self, batch: Any, learning_rate: float) -> mx.array:
            time.sleep(0.2)
            return super().__call__(batch, learning_rate)

    found = gpu_profile.overhead(Slow(loss, {"w": mx.ones(1)}, clip=1.0, ema_decay=None), batch, 1e-3)
    assert found["overhead_median"] > 0.5 and min(found["loop_ms"]) > 200
    assert {"evaluation_ms", "build_ms", "call_ms"} <= set(found)


@pytest.mark.parametrize("option", [["--minutes", "0"], ["--rounds", "-1"], ["--batch", "0"]])
def test_options_that_make_no_sense_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_step.parse(option)
    assert option[0] in capsys.readouterr().err


def test_each_form_has_its_own_kernels_folder_and_the_trial_of_mlx_s_own_operations_is_one(tmp_path: Path) -> None:
    options = gpu_step.parse(["--quick"])
    jobs = gpu_step.jobs_of(options, tmp_path)
    assert next(iter(jobs)) == "training, mlx compiled, bfloat16" and len(jobs) == 13
    own = [name for name, job in jobs.items() if job["env"]["ADO_CUDA_KERNELS"] == "0"]
    assert own == ["training, mlx's own operations, bfloat16"]
    mlx = [job["env"]["MLX_PTX_CACHE_DIR"] for job in jobs.values() if job["form"].startswith("mlx")]
    assert len(set(mlx)) == len(mlx) == 5
    assert options.parameters > 10_000
