"""Task `weigh`: what one evaluation of the teacher, and of every probe, costs on this machine, all timed in turn.

With a target the same times fit a cost model, which predicts what each would cost on that chip.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.config import config
from ado_tasks.errors import ConfigError
from ado_tasks.fit.cost import CostModel
from ado_tasks.fit.probes import measure_capability
from ado_tasks.fit.target import Target, calibrated, described, foreseen, works_of
from ado_tasks.fit.work import Op
from ado_tasks.hardware.fingerprint import machine_of
from ado_tasks.hardware.latency import Spread, interleaved, speedups
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.models.unet import UNet2D
from ado_tasks.parallel import sharded_apply
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import write_json

TEACHER = "teacher"  # its name among the networks
TIMESTEP = 500.0  # told to every network; which one does not matter to its cost


@config
class WeighConfig:
    """How costs are taken."""

    batch_size: Annotated[int, Field(ge=1)] = 64  # images at once
    rounds: Annotated[int, Field(ge=3)] = 15  # each network once a round
    evaluations: Annotated[int, Field(ge=1)] = 4  # of it, one after another, each time
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU
    target: Target | None = None  # the chip that is meant: `search` chooses by what is predicted for it; none = this


@dataclass(frozen=True)
class WeighResult:
    """The span."""

    fastest: str  # network
    speedup: float  # of it over the teacher at one evaluation, median


def weigh(
    config: WeighConfig, *, teacher: Path, probes: tuple[Path, ...], profile: Path, out: Path, seed: int,
    report: Reporter = SILENT,
) -> WeighResult:  # fmt: skip
    """Time one evaluation of every network in turn, interleaved, and write reports/probes.json.

    A measured task: its output is this machine's. With a target it measures first what this machine can do (up to a
    minute), and the file says beside each time what is predicted for the target, with the error of networks left out.

    Args:
        config: see WeighConfig.
        teacher: a Diffusers folder.
        probes: folders made by `probe`.
        profile: file made by `profile`, on this machine.
        out: the JSON file.
        seed: of the noise (which does not matter to the figures).
        report: where progress and figures go.

    Raises:
        ConfigError: two networks of one name; with a target fewer than 8 different networks, or one of few bits.
        HardwareError: the profile is another machine's.
    """
    names = [TEACHER, *(folder.name for folder in probes)]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"probes: {', '.join(map(str, probes))}: two of one name, or one named {TEACHER}; allowed: different ones"
        )
    machine = machine_of(profile)
    networks = {TEACHER: read_model(teacher).unet} | {folder.name: read_model(folder).unet for folder in probes}
    target = config.target
    works = works_of(networks, config.batch_size) if target else {}
    here = measure_capability(report) if target else None
    actions = {name: _evaluation(unet, config, seed) for name, unet in networks.items()}
    memory = {name: _peak_memory_mb(action) for name, action in actions.items()}
    seconds = interleaved(actions, config.rounds, lambda done: report.progress(done, config.rounds), warm=True)
    gains = speedups(seconds, TEACHER)
    images = config.batch_size * config.evaluations
    entries = {
        name: {
            "latency_ms_per_image": asdict(Spread.of(taken).scaled(1e3 / images)),
            "speedup_vs_teacher": asdict(gains[name]),
            "peak_memory_mb": memory[name],
        }
        for name, taken in seconds.items()
    }
    told: dict[str, Any] = {"hardware": machine.as_plain(), "batch": config.batch_size, "networks": entries}
    if target and here:
        once = {name: [each / config.evaluations for each in taken] for name, taken in seconds.items()}
        model = calibrated(works, once, here)
        told = _with_target(told, target, works, model)
        report.metric("target.median_error", model.median_error)
        report.metric("target.worst_error", model.worst_error)
    write_json(out, told)
    fastest = max(gains, key=lambda name: gains[name].median)
    report.metric("fastest.speedup", gains[fastest].median)
    return WeighResult(fastest, gains[fastest].median)


def _with_target(
    told: Mapping[str, Any], target: Target, works: Mapping[str, Sequence[Op]], model: CostModel
) -> dict[str, Any]:
    """The file with what is predicted for the target beside what was measured here."""
    chip = target.reference()
    predicted = foreseen(model, works, chip, told["batch"], TEACHER)
    entries = {name: {**each, "predicted": asdict(predicted[name])} for name, each in told["networks"].items()}
    return {**told, "target": described(model, chip, works[TEACHER]), "networks": entries}


def _evaluation(unet: UNet2D, config: WeighConfig, seed: int) -> Callable[[], None]:
    network, count = unet.config, config.batch_size
    size = network.sample_size or network.size_multiple
    height, width = size if isinstance(size, tuple) else (size, size)
    noise = rng.generator(seed, "weigh").standard_normal((count, height, width, network.in_channels))
    given = [mx.array(noise.astype(np.float32)), mx.full((count,), TIMESTEP)]
    if network.num_class_embeds:
        given.append(mx.array(np.arange(count, dtype=np.int32) % network.num_class_embeds))
    apply = sharded_apply(unet, config.shards)

    def action() -> None:
        for _ in range(config.evaluations):
            mx.eval(apply(*given))

    return action


def _peak_memory_mb(action: Callable[[], object]) -> float | None:
    """The most MLX held at once; none on a CPU, where it keeps no such count and processes are not told apart."""
    mx.reset_peak_memory()
    action()
    peak = mx.get_peak_memory()
    return None if on_cpu() and not peak else round(peak / 2**20, 2)
