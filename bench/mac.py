"""MLX compiled against MLX uncompiled and PyTorch (eager, torch.compile), and the whole chain against its teacher.

    make bench-mac                              # on a Mac; here on the CPU, elsewhere on CUDA: whatever there is
    python bench/mac.py --quick                 # the demo's network only
    python bench/mac.py --full --rounds 9       # and one of 32×32 pixels
    python bench/mac.py --networks shapes32 --batch 256 --minutes 4 --at-once 4     # on a GPU that is lent for minutes

Per network: a training step (forward, backward, clip, Adam, averaged weights) and whole samplings of the teacher (50
steps of DDIM) in each form, and every optimised variant in MLX against that teacher. Each form is a process of its own;
they take turns, and figures are medians and quartiles of ratios within a round. All forms have the same weights, noise
and labels, and are compared only where their losses and their images agree. A form that cannot run here is skipped, and
the report says why. What a workspace has made (`make demo`) is used; without one, random weights of the same shapes:
speed does not depend on weights.

Everything is float32, with products rounded to TF32 on both sides where MLX does so (CUDA; MLX_ENABLE_TF32=0 forbids
it to both), and without dropout. On Metal this has not been run yet: nobody has verified it there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mac_report
import numpy as np
from mac_processes import take_turns
from mac_report import FORMAT

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.config import read_params
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.errors import AdoError, ArtifactError
from ado_tasks.hardware.fingerprint import this_machine, usable_cores
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import parameter_count
from ado_tasks.report import Terminal
from ado_tasks.storage import write_json
from ado_tasks.variants import Variant, calibrated_variants, student_folders, student_variants

ROOT = Path(__file__).parents[1]
FORMS = ("mlx compiled", "mlx uncompiled", "pytorch eager", "pytorch compiled")
STUDENTS = (8, 4, 2, 1)  # steps, where no students are at hand
SEED = 0
# The optimiser of all forms; train.py's clip, and a rate at which nothing that is checked runs away.
TRAINING = {"learning_rate": 1e-4, "clip": 1.0, "ema_decay": 0.999, "checked_steps": 3}
CHECKED_IMAGES = 4
SYSCTL = (
    "hw.model", "kern.osproductversion", "hw.perflevel0.physicalcpu", "hw.perflevel1.physicalcpu",
)  # of a Mac: model, macOS, fast and slow cores  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network that is timed, as its preset has it."""

    params: str  # file
    workspace: str  # folder, where its models are looked for
    data: dict[str, int]  # what the dataset decides of UNet2DModel's config
    on_a_cpu: tuple[int, int]  # images in training, in sampling
    elsewhere: tuple[int, int]


NETWORKS = {
    "digits": Network(
        "params.yaml", ".", {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10},
        (64, 64), (64, 64),
    ),
    "shapes32": Network(
        "params.shapes32.yaml", ".ado/presets/shapes32",
        {"sample_size": 32, "in_channels": 3, "out_channels": 3, "num_class_embeds": 18},
        (8, 4), (64, 64),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Models on disk, and the ways to sample them. The first is the teacher's."""

    teacher: Path
    samplings: list[dict[str, Any]]
    weights: str  # where they are from


def stored_chain(workspace: Path, steps: int) -> Chain | None:
    """The models of a finished workspace; None where there is no teacher."""
    folder = workspace / "models" / "teacher"
    if not (folder / "model_index.json").exists():
        return None
    teacher = read_model(folder)
    samplings = [teacher_sampling(folder, steps)]
    for family in student_folders(folder.parent):
        for variant in student_variants(family):
            samplings.append(_sampling(variant, family / str(int(variant.name.rpartition("-")[2]))))
    if any((workspace / "schedules" / "teacher").glob("*-*.json")):
        known = calibrated_variants(teacher, workspace / "schedules" / "teacher")
        samplings += [_sampling(variant, folder) for variant in known]
    return Chain(folder, samplings, "trained, of a workspace")


def random_chain(name: str, folder: Path, steps: int) -> Chain:
    """A network of a preset with first weights, and few-step samplings of it as its students would take."""
    network = NETWORKS[name]
    model = read_params(ROOT / network.params)["train"]["model"]
    unet = UNet2D(UNet2DConfig.from_dict({**network.data, **model}, where=f"{network.params} train.model"))
    initialise(unet, rng.key(SEED, "bench-mac", name))
    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    write_model(folder, unet, schedule.to_diffusers("v_prediction"), {})
    samplings = [teacher_sampling(folder, steps)]
    samplings += [{**teacher_sampling(folder, n), "name": f"student-{n}"} for n in STUDENTS if n < steps]
    return Chain(folder, samplings, "random weights of the same shapes (speed does not depend on weights)")


def teacher_sampling(folder: Path, steps: int) -> dict[str, Any]:
    """Plain DDIM, also as PyTorch needs it: (α, σ, timestep) at each time, worked out in float64."""
    times = uniform_time(steps)
    schedule = schedule_from_diffusers(
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    )
    columns = [np.asarray(column) for column in (*schedule.alpha_sigma(times), schedule.timestep(times))]
    return {
        "name": f"teacher-{steps}", "model": str(folder), "solver": "ddim", "times": times.tolist(), "told": None,
        "nfe": steps, "levels": np.stack(columns, axis=1).tolist(),
    }  # fmt: skip


def _sampling(variant: Variant, folder: Path) -> dict[str, Any]:
    return {
        "name": variant.name, "model": str(folder), "solver": variant.method, "times": variant.times.tolist(),
        "told": None if variant.told is None else variant.told.tolist(), "nfe": variant.nfe,
    }  # fmt: skip


def inputs(path: Path, config: UNet2DConfig, count: int) -> str:
    """Images, noise, times and labels that all forms begin with, as a file."""
    size = config.sample_size or config.size_multiple
    height, width = size if isinstance(size, tuple) else (size, size)
    draw = rng.generator(SEED, "bench-mac", "inputs")
    shape = (count, height, width, config.in_channels)
    arrays: dict[str, np.ndarray] = {
        name: draw.standard_normal(shape).astype(np.float32) for name in ("images", "noise")
    }
    arrays["t"] = draw.uniform(0, 999, count).astype(np.float32)
    if config.num_class_embeds:
        arrays["labels"] = np.arange(count, dtype=np.int32) % config.num_class_embeds
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def own_kernels(jobs: Mapping[str, dict[str, Any]], folder: Path, name: str) -> None:
    """Give each job a folder of its own for the kernels that MLX compiles on CUDA.

    MLX writes such a file in place, and another process might read half of it. With MLX_PTX_CACHE_DIR set they are
    kept there for the next run, else in `folder`.
    """
    for number, job in enumerate(jobs.values()):
        kernels = Path(os.environ.get("MLX_PTX_CACHE_DIR", str(folder))) / f"{name}-{number}"
        kernels.mkdir(parents=True, exist_ok=True)
        job.setdefault("env", {})["MLX_PTX_CACHE_DIR"] = str(kernels)


def shares(minutes: float | None, parts: int) -> Iterator[float | None]:
    """When each part has to be over (of time.monotonic): an equal share of what is then left, or never."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for done in range(parts):
        now = time.monotonic()
        yield None if end is None else now + max(0.0, end - now) / (parts - done)


def tf32() -> bool:
    """Whether products of float32 may be rounded to TF32, on both sides: as MLX does on CUDA by default."""
    return os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def bench(name: str, options: argparse.Namespace, folder: Path, ends: Iterator[float | None]) -> dict[str, Any]:
    """Time one network: training, then sampling and the chain, each over at the next of `ends` (see `shares`)."""
    network = NETWORKS[name]
    workspace = options.workspace or Path(network.workspace)
    if options.workspace and not (workspace / "models" / "teacher" / "model_index.json").exists():
        raise ArtifactError(f"--workspace {workspace}: no models/teacher in it; allowed: where `make demo` has run")
    chain = stored_chain(workspace, options.steps) or random_chain(name, folder / name, options.steps)
    stored = read_model(chain.teacher)
    training, sampling = network.on_a_cpu if on_cpu() else network.elsewhere
    counts = {"training": options.batch or training, "sampling": options.batch or sampling}
    common = {
        "teacher": str(chain.teacher), "cores": min(16, usable_cores()), "samplings": chain.samplings,
        "kind": str(stored.scheduler_config.get("prediction_type", "epsilon")), "checked_images": CHECKED_IMAGES,
        "tf32": tf32(), **TRAINING,
    }  # fmt: skip
    result: dict[str, Any] = {
        "parameters": parameter_count(stored.unet), "config": stored.unet.config.to_dict(), "weights": chain.weights,
    }  # fmt: skip
    for part, count in counts.items():
        job = {**common, "part": part, "inputs": inputs(folder / f"{name}-{part}.npz", stored.unet.config, count)}
        jobs = {form: {**job, "form": form} for form in options.forms}
        if options.at_once > 1:
            own_kernels(jobs, folder, f"bench-mac-{name}")
        terminal = Terminal(f"{name}, {part}")
        try:
            turns = take_turns(
                jobs, options.rounds, lambda done, total, _, terminal=terminal: terminal.progress(done, total),
                at_once=options.at_once, deadline=next(ends),
            )  # fmt: skip
        finally:
            terminal.close()
        action = "step" if part == "training" else chain.samplings[0]["name"]
        one = "one step" if part == "training" else f"one sampling of {action}"
        forms = mac_report.compared(turns, action, count)
        in_order = {form: forms[form] for form in options.forms if form in forms}
        result[part] = {"batch": count, "one": one, "forms": in_order}
        result.setdefault("versions", {}).update(
            {k: v for ready in turns.ready.values() for k, v in ready["versions"].items()}
        )
        if part == "sampling":
            result["chain"] = mac_report.chain(turns, chain.samplings, count)
    return result


def machine() -> dict[str, Any]:
    """Which machine, as far as its figures depend on it; nothing that names its owner."""
    known = {**this_machine().as_plain(), "os": platform.system(), "os_release": platform.release()}
    if platform.system() == "Darwin":  # unverified: no Mac has run this yet
        known["sysctl"] = {name: _said(["sysctl", "-n", name]) for name in SYSCTL}
        known["on_battery"] = "Battery Power" in _said(["pmset", "-g", "batt"])
        limit = mx.device_info().get("max_recommended_working_set_size", 0)
        known["recommended_working_set_mib"] = round(int(limit) / 2**20)
    return known


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the demo's network only (the default on a CPU)")
    size.add_argument("--full", action="store_true", help="and one of 32×32 pixels (the default elsewhere)")
    size.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="which")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each form, at most")
    parser.add_argument("--minutes", type=float, help="after which it is over, whatever is done (default: as it takes)")
    parser.add_argument("--at-once", type=int, default=1, help="forms that warm up at the same time")
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--batch", type=int, default=0, help="images, in place of the preset's")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--workspace", type=Path, default=None, help="whose models are taken, for every network")
    parser.add_argument("--out", type=Path, default=Path("reports/bench-mac.json"))
    parser.add_argument("--picture", type=Path, default=Path("reports/bench-mac.png"))
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("steps", 1), ("batch", 0), ("at_once", 1)):
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option}: {getattr(options, name)} is not allowed; allowed: {least} and more")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes: {options.minutes} is not allowed; allowed: above 0")
    return options


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick or (on_cpu() and not options.full)
    networks = options.networks or (["digits"] if quick else list(NETWORKS))
    ends = shares(options.minutes, 2 * len(networks))
    report: dict[str, Any] = {
        "kind": "bench-mac", "format": FORMAT, "machine": machine(), "precision": "float32",
        "tf32": not on_cpu() and mx.cuda.is_available() and tf32(),  # whether products are rounded to it, on both sides
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "mlx")}},
        "settings": {
            "networks": networks, "rounds": options.rounds, "steps": options.steps,
            "forms": options.forms, "minutes": options.minutes,
        },
        "load_before": os.getloadavg(), "networks": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in networks:
            report["networks"][name] = bench(name, options, Path(folder), ends)
            report["versions"].update(report["networks"][name].pop("versions"))
    report["load_after"] = os.getloadavg()
    return report


def failed(report: Mapping[str, Any]) -> bool:
    """Whether MLX itself could not be timed, in any form, where one was asked for."""
    asked = [form for form in report["settings"]["forms"] if form.startswith("mlx")]
    return any(
        asked and all("skipped" in network[part]["forms"][form] for form in asked)
        for network in report["networks"].values()
        for part in ("training", "sampling")
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        report = report_of(options)
        write_json(options.out, report)
    except AdoError as problem:
        print(f"bench-mac: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    mac_report.draw(options.picture, report)
    print("\n".join(mac_report.lines(report)))
    print(f"report: {options.out}   picture: {options.picture}")
    print(f"to contribute it: python bench/mac_table.py --add {options.out}")
    return 1 if failed(report) else 0


if __name__ == "__main__":
    raise SystemExit(main())
