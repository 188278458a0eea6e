"""MLX against PyTorch on one GPU, each at its best precision: a training step and a sampling of a U-Net at 64×64.

    python bench/gpu_step.py --minutes 6 --out reports/bench-gpu.json --picture reports/bench-gpu.png
    python bench/gpu_step.py --quick --out /tmp/bench-gpu.json                  # a tiny network: a trial, on a CPU too
    python bench/gpu_step.py --draw reports/bench-gpu.json --picture reports/bench-gpu.png

The network is that of docs/hardware.md: 43 million parameters, 128, 256 and 384 channels, attention in two levels with
heads of 64, random weights. A training step is forward, backward, clip, Adam and averaged weights; a sampling is 50
steps of DDIM. MLX is compiled (in training once more without our own CUDA kernels), PyTorch eager and through
`torch.compile`; each in float32 (with TF32) and in bfloat16 (PyTorch: autocast in training, bfloat16 weights in
sampling, channels last, cuDNN's search). Each form is a process of its own; all warm up at once and then take turns,
one at a time. Figures are medians and quartiles of ratios within rounds. How much of MLX's step is our own work:
gpu_profile.py.

It is over after --minutes, whatever is then done: what is not ready is left out, and the report says so.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_report
import mac
from mac_processes import Process, take_turns

from ado_tasks import rng
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.errors import AdoError
from ado_tasks.hardware.fingerprint import usable_cores
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import parameter_count
from ado_tasks.storage import read_json, write_json

LARGE = {
    "sample_size": 64, "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 384],
    "layers_per_block": 2, "attention_head_dim": 64,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TINY = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
PARTS = ("training", "sampling")
FORMS = ("mlx compiled", "pytorch compiled", "pytorch eager", "mlx's own operations")
PRECISIONS = ("bfloat16", "float32")  # in the order in which they are warmed up


def jobs_of(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the network and what it begins with; a job for each part, form and precision, by its name."""
    config = UNet2DConfig.from_dict(TINY if options.quick else LARGE)
    unet = UNet2D(config)
    initialise(unet, rng.key(mac.SEED, "bench-gpu"))
    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    write_model(folder / "model", unet, schedule.to_diffusers("v_prediction"), {})
    options.parameters = parameter_count(unet)
    common = {
        "teacher": str(folder / "model"), "cores": min(16, usable_cores()), "kind": "v_prediction",
        "samplings": [mac.teacher_sampling(folder / "model", options.steps)], "checked_images": mac.CHECKED_IMAGES,
        "inputs": mac.inputs(folder / "inputs.npz", config, options.batch),
        "tf32": mac.tf32(), **mac.TRAINING,
    }  # fmt: skip
    jobs = {
        gpu_report.name(part, form, precision): {
            **common,
            "part": part,
            "form": form,
            "precision": precision,
            "env": {"ADO_CUDA_KERNELS": "0" if form == FORMS[3] else "1"},
        }
        for precision in options.precisions
        for form in options.forms
        for part in options.parts
        if form != FORMS[3] or (part, precision) == ("training", options.precisions[0])
    }
    mac.own_kernels(jobs, folder, "bench-gpu")
    return jobs


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    report: dict[str, Any] = {
        "kind": "bench-gpu", "format": 1, "machine": mac.machine(), "batch": options.batch, "steps": options.steps,
        "config": TINY if options.quick else LARGE, "load_before": os.getloadavg(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        jobs = jobs_of(options, Path(folder))
        report["parameters"] = options.parameters
        profiles: dict[str, Any] = {}

        def profiled(name: str, process: Process) -> None:
            """In the quiet after the warm-up: nobody else computes."""
            if name == gpu_report.name("training", FORMS[0], options.precisions[0]):
                profiles[name] = process.ask({"profile": "overhead"})

        turns = take_turns(
            jobs, options.rounds, lambda done, total, name: _say(began, f"{done}/{total} {name}"),
            at_once=options.at_once, deadline=began + 60 * options.minutes, before=profiled,
        )  # fmt: skip
    report |= {"profiles": profiles, "seconds": round(time.monotonic() - began), "load_after": os.getloadavg()}
    report["versions"] = {k: v for ready in turns.ready.values() for k, v in ready["versions"].items()}
    report["versions"]["python"] = sys.version.split()[0]
    return report | gpu_report.compared(turns, options.batch)


def _say(began: float, text: str) -> None:
    print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny network, 3 steps, 2 rounds")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which it is over")
    parser.add_argument("--rounds", type=int, help="turns of each form, at most (default: 9)")
    parser.add_argument("--steps", type=int, help="of DDIM (default: 50)")
    parser.add_argument("--batch", type=int, help="images (default: 32)")
    parser.add_argument("--at-once", type=int, default=8, help="forms that warm up at the same time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--precisions", nargs="+", choices=(*PRECISIONS, "float16"), default=list(PRECISIONS))
    parser.add_argument("--out", type=Path, default=Path("reports/bench-gpu.json"))
    parser.add_argument("--picture", type=Path, help="bars, where Matplotlib is installed")
    parser.add_argument("--draw", type=Path, help="draw the picture of this report, and measure nothing")
    options = parser.parse_args(arguments)
    for key, usual, quick in (("rounds", 9, 2), ("steps", 50, 3), ("batch", 32, 4)):
        if getattr(options, key) is None:
            setattr(options, key, quick if options.quick else usual)
    for key in ("rounds", "steps", "batch", "at_once", "minutes"):
        if getattr(options, key) <= 0:
            parser.error(f"--{key.replace('_', '-')}: {getattr(options, key)} is not allowed; allowed: above 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.draw:
            report = read_json(options.draw, "parts")
        else:
            report = report_of(options)
            write_json(options.out, report)
    except AdoError as problem:
        print(f"bench-gpu: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    print("\n".join(gpu_report.lines(report)))
    if options.picture:
        try:
            gpu_report.draw(options.picture, report)
        except ImportError as absent:
            print(f"no picture here ({absent}); elsewhere: python bench/gpu_step.py --draw {options.out} --picture …")
    return 0 if any("ms" in entry for part in report["parts"].values() for entry in part.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
