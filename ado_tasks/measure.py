"""Task `measure`: what every variant costs on this machine, all timed in turn."""

import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.config import config
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.solvers import SOLVERS
from ado_tasks.hardware.fingerprint import machine_of
from ado_tasks.hardware.latency import Spread, interleaved, speedups
from ado_tasks.hardware.steps import FEW, MANY, line
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.report import SILENT, Reporter
from ado_tasks.sampling import Draw, Sampler
from ado_tasks.storage import write_json
from ado_tasks.variants import Variant, all_variants, read_architecture, read_knots

REFERENCE = "teacher-50"  # speed-ups are against it: same batch, device and precision


@config
class MeasureConfig:
    """How costs are taken."""

    batch_size: Annotated[int, Field(ge=1)] = 64  # images sampled at once
    rounds: Annotated[int, Field(ge=3)] = 3  # each variant once a round
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    precision: Literal["float32"] = "float32"  # of weights and activations
    step_batches: tuple[Annotated[int, Field(ge=1)], ...] = ()  # sizes that one step is timed at, for `ado choose`


@dataclass(frozen=True)
class MeasureResult:
    """The span."""

    fastest: str  # variant
    speedup: float  # of it over the teacher's 50 steps, median


def measure(
    config: MeasureConfig, *, teacher: Path, students: tuple[Path, ...], schedules: Path, profile: Path, out: Path,
    seed: int, architecture: Path | None = None, architecture_schedules: Path | None = None, report: Reporter = SILENT,
) -> MeasureResult:  # fmt: skip
    """Time every variant in turn, interleaved, and write reports/measure.json.

    A measured task: its output is this machine's. Whole samplings are timed, from noise to image, by wall clock.

    Args:
        config: see MeasureConfig.
        teacher: a Diffusers folder.
        students: folders of students, one a family.
        schedules: folder made by `calibrate` for the teacher.
        profile: file made by `profile`, on this machine.
        out: the JSON file.
        seed: of the noise (which does not matter to the figures).
        architecture: folder made by `search`: its network is timed too, unless it is the teacher.
        architecture_schedules: folder made by `calibrate` for that network.
        report: where progress and figures go.

    Raises:
        ConfigError: schedules of an architecture without the architecture.
        HardwareError: the profile is another machine's.
    """
    machine = machine_of(profile)
    stored = read_model(teacher)
    searched = read_architecture(architecture, stored)
    variants = all_variants(stored, students, schedules, searched, architecture_schedules)
    start = _start(variants[0], config.batch_size, seed)
    samplers = {id(v.model): Sampler(v.model, config.batch_size, config.shards) for v in variants}
    actions = {variant.name: _sampling(samplers[id(variant.model)], variant, start) for variant in variants}
    memory = {name: _peak_memory_mb(action) for name, action in actions.items()}
    rounds = config.rounds * (2 if config.step_batches else 1)
    seconds = interleaved(actions, config.rounds, lambda done: report.progress(done, rounds), warm=True)
    steps = _steps(
        config, _networks(variants, schedules), seed, lambda done: report.progress(config.rounds + done, rounds)
    )
    gains = speedups(seconds, REFERENCE)
    entries = []
    for variant in variants:
        taken = Spread.of(seconds[variant.name])
        entries.append(
            {
                "name": variant.name, "nfe": variant.nfe, "batch": config.batch_size, "precision": config.precision,
                "latency_ms_per_image": asdict(taken.scaled(1e3 / config.batch_size)),
                "images_per_s": asdict(Spread.of([config.batch_size / value for value in seconds[variant.name]])),
                "peak_memory_mb": memory[variant.name],
                "speedup_vs_teacher": asdict(gains[variant.name]),
            }
        )  # fmt: skip
        report.metric(f"{variant.name}.latency_ms_per_image", entries[-1]["latency_ms_per_image"]["median"])
        report.metric(f"{variant.name}.speedup", gains[variant.name].median)
    write_json(
        out,
        {
            "hardware": machine.as_plain(), "reference": REFERENCE, "rounds": config.rounds, "variants": entries,
            **({"steps": steps} if steps else {}),
        },
    )  # fmt: skip
    fastest = max(gains, key=lambda name: gains[name].median)
    return MeasureResult(fastest, gains[fastest].median)


@dataclass
class _Network:
    """Variants whose networks cost the same: one configuration, whatever the weights."""

    first: Variant
    families: set[str]
    solvers: set[str]


def _networks(variants: list[Variant], schedules: Path) -> list[_Network]:
    """Each configuration once, with the solvers that are used on it, those of learned schedules on the teacher's."""
    found: dict[str, _Network] = {}
    for variant in variants:
        network = found.setdefault(repr(variant.model.unet.config), _Network(variant, set(), set()))
        network.families.add(variant.family)
        network.solvers.add(variant.method)
    found[repr(variants[0].model.unet.config)].solvers.update(entry["solver"] for entry in read_knots(schedules))
    return list(found.values())


def _steps(
    config: MeasureConfig, networks: list[_Network], seed: int, on_round: Callable[[int], None]
) -> list[dict[str, Any]]:
    """What one evaluation of a batch costs, by network, solver and batch size, all timed in turn."""
    actions: dict[str, Callable[[], Any]] = {}
    wanted = []
    for number, network in enumerate(networks):
        for batch in sorted(set(config.step_batches)):
            sampler = Sampler(network.first.model, batch, config.shards)
            start = _start(network.first, batch, seed)
            for solver in sorted(network.solvers):
                wanted.append((network, solver, batch, f"{number} {solver} {batch}"))
                for nfe in (FEW, MANY):
                    times = uniform_time(nfe)
                    assert SOLVERS[solver].nfe(times) == nfe  # of one evaluation a step, as all that are chosen from
                    actions[f"{wanted[-1][-1]} {nfe}"] = partial(sampler, start, solver, times)
    seconds = interleaved(actions, config.rounds, on_round) if actions else {}
    entries = []
    for network, solver, batch, name in wanted:
        fixed, step = line(seconds[f"{name} {FEW}"], seconds[f"{name} {MANY}"])
        entries.append(
            {
                "families": sorted(network.families), "solver": solver, "batch": batch,
                "precision": config.precision, "fixed_ms": asdict(fixed), "step_ms": asdict(step),
            }
        )  # fmt: skip
    return entries


def _start(variant: Variant, count: int, seed: int) -> Draw:
    model = variant.model.unet.config
    size, classes = model.sample_size or model.size_multiple, model.num_class_embeds
    height, width = size if isinstance(size, tuple) else (size, size)
    noise = rng.generator(seed, "measure").standard_normal((count, height, width, model.in_channels)).astype(np.float32)
    return Draw(noise, np.arange(count, dtype=np.int32) % classes if classes else None)


def _sampling(sampler: Sampler, variant: Variant, start: Draw) -> Callable[[], Any]:
    return lambda: sampler(start, variant.method, variant.times, told=variant.told)


def _peak_memory_mb(action: Callable[[], object]) -> float:
    """The most MLX held at once; on a CPU, where MLX keeps no such count, the process's own peak so far."""
    mx.reset_peak_memory()
    action()
    peak = mx.get_peak_memory()
    if peak or not on_cpu():
        return round(peak / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
