"""Task `probe`: one candidate architecture, with its teacher's weights, tuned as far as its place in the race goes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ado_tasks import rng
from ado_tasks.architecture.choice import Measured
from ado_tasks.architecture.cost import multiply_adds
from ado_tasks.architecture.importance import measure_importance
from ado_tasks.architecture.inherit import Rows, inherit
from ado_tasks.architecture.race import Lane, RaceConfig, survivors
from ado_tasks.architecture.space import Point, Space, SpaceConfig
from ado_tasks.architecture.tuning import Lesson, TuneConfig, denoising_loss, gradient_batches, tune
from ado_tasks.config import as_plain, config
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import StoredModel, check_teacher, extended, read_model, write_model
from ado_tasks.models.quantised import bits_of, check_floating, floating, quantised
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters, parameter_count
from ado_tasks.optimise.checkpoints import Checkpoints, run_key
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, read_json, sha256_tree, write_json

FIGURES = "probe.json"
WEIGHTS_MB = "weights_mb"  # key: where the space has linear layers of few bits, which multiply-adds do not tell apart


@config
class ProbeConfig:
    """The space, the race and the lesson."""

    space: SpaceConfig = field(default_factory=SpaceConfig)
    race: RaceConfig = field(default_factory=RaceConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    importance_batches: Annotated[int, Field(ge=1)] = 16  # gradients that importance is averaged over
    importance_batch: Annotated[int, Field(ge=1)] = 16  # images in each


@dataclass(frozen=True)
class ProbeResult:
    """What came out."""

    quality_loss: float  # see Lesson.quality_loss
    multiply_adds: int  # of one evaluation of one image
    parameters: int


def probe(
    config: ProbeConfig, *, teacher: Path, dataset: Path, out: Path, scratch: Path, seed: int,
    before: tuple[Path, ...] = (), report: Reporter = SILENT,
) -> ProbeResult:  # fmt: skip
    """Tune one candidate. `out/` is a Diffusers folder; `out/probe.json` says what it is, and how near to its teacher.

    The number at the end of `out` is the lane: the race's lanes are counted from its lowest rung. A lane of the lowest
    takes a point of the space: the first `unguided` in a seeded order, the others as Optuna proposes by what came of
    those. One above goes on with a survivor of the rung below.

    Args:
        config: see ProbeConfig.
        teacher: a Diffusers folder.
        dataset: folder made by `prepare`. Tuned on the train part, judged on the selection part.
        out: models/probes/<lane>.
        scratch: checkpoints.
        seed: of the proposals, and of images, times and noises, of which all candidates see the same.
        before: all folders of the rung below; in the lowest rung the unguided ones, and for these none.
        report: where progress and losses go.

    Raises:
        ConfigError: the lane is none of the race's, `before` is not what it goes by, the space does not fit, or the
            teacher is a student of few steps.
        ArtifactError: the teacher, the dataset or a probe is damaged.
        DivergenceError: a loss is not finite.
    """
    lane = _lane(out, config.race)
    stored, data = read_model(teacher), open_dataset(dataset)
    check_floating(stored.unet, str(teacher))
    check_teacher(stored, str(teacher))
    stored.unet.config.check_data(data.shape, data.num_classes, f"{teacher}/unet/config.json")
    part, held_out = data.split("train"), data.split("selection")
    kind = str(stored.scheduler_config.get("prediction_type", "epsilon"))
    schedule = schedule_from_diffusers(stored.scheduler_config)
    lesson = Lesson(config.tune, stored.unet, {}, schedule, kind, rng.derive(seed, "probe"))
    if lane.rung == 0:
        space = Space.around(stored.unet.config, config.space)
        point = _proposal(space, lane, before, config.race, data.shape, seed)
        found = measure_importance(
            stored.unet, denoising_loss(lesson),
            gradient_batches(lesson, part, config.importance_batches, config.importance_batch),
        )  # fmt: skip
        inherited = inherit(stored.unet, space.candidate(point), found)
        unet, kept, record, bits = inherited.unet, inherited.kept, stored.record, space.bits(point)
    else:
        point, unet, kept, record = _goes_on(before, lane, config.race)
        unet, bits = floating(unet), bits_of(unet)
    inputs = {"dataset": data.sha256, "teacher": sha256_tree(teacher), "start": str(out.name)}
    inputs |= {str(each.name): sha256_tree(each) for each in before}
    checkpoints = Checkpoints.under(scratch, run_key(__name__, as_plain(config), inputs, seed))
    lesson = Lesson(config.tune, stored.unet, kept, schedule, kind, lesson.seed)
    first, steps = sum(config.race.steps[: lane.rung]), config.race.steps[lane.rung]
    curve = tune(lesson, unet, part, first, steps, checkpoints, report)
    parameters = parameter_count(unet)
    unet = quantised(unet, bits)
    result = ProbeResult(lesson.quality_loss(unet, held_out), multiply_adds(unet.config, *data.shape[:2]), parameters)
    with atomic_folder(out) as folder:
        event = {"task": "probe", "lane": int(out.name), "point": list(point), "rung": lane.rung, "seed": seed}
        write_model(folder, unet, stored.scheduler_config, extended(record, event | {"config": as_plain(config)}))
        figures = _figures(result, point, lane, unet.config, kept, curve)
        if config.space.linear_bits:
            figures |= {"linear_bits": bits, WEIGHTS_MB: sum(a.nbytes for a in flat_parameters(unet).values()) / 2**20}
        write_json(folder / FIGURES, figures)
    report.metric("quality_loss", result.quality_loss)
    checkpoints.clear()
    return result


def _proposal(
    space: Space, lane: Lane, before: Sequence[Path], race: RaceConfig, shape: tuple[int, int, int], seed: int
) -> Point:
    """The point of a lane in the lowest rung. A small space may have fewer points than the rung has lanes."""
    points = list(space.points())
    if not points:
        raise ConfigError("probe.space: no combination of its choices is a network; allowed: at least one")
    expected = race.unguided if lane.place >= race.unguided else 0
    said = list(_told(before).values())
    if len(said) != expected or any(each["rung"] for each in said):
        raise ConfigError(f"--before: {len(said)} probes; allowed with lane {lane.place}: the {expected} unguided ones")
    order = rng.generator(seed, "probe", "proposals").permutation(len(points))
    if not expected:
        return points[order[lane.place % len(points)]]
    from ado_tasks.architecture.propose import Tried, propose  # noqa: PLC0415  (scipy: only lanes that are guided wait)

    tried = {tuple(each["point"]): _measured(str(each["point"]), each) for each in said}
    cost = {point: float(multiply_adds(space.candidate(point), *shape[:2])) for point in points}
    history = [Tried(point, figures) for point, figures in tried.items()]
    found = propose(space, points, cost, history, None, race.sizes[0] - race.unguided, seed)
    return (found or points)[(lane.place - race.unguided) % len(found or points)]


def _measured(name: str, said: dict[str, Any]) -> Measured:
    return Measured(name, said["quality_loss"], float(said["multiply_adds"]), said.get(WEIGHTS_MB, 0.0))


def read_probe(folder: Path) -> dict[str, Any]:
    """What a probe says of itself. Raises ArtifactError where it is damaged."""
    return read_json(folder / FIGURES, "point", "rung", "quality_loss", "multiply_adds", "parameters", "kept")


def _told(before: Sequence[Path]) -> dict[int, dict[str, Any]]:
    """What probes say of themselves, by lane. Raises ConfigError: names that are no lanes, or one lane twice."""
    numbers = [folder.name for folder in before]
    if not all(map(str.isdecimal, numbers)) or len(set(map(int, numbers))) < len(numbers):
        raise ConfigError(f"--before {' '.join(map(str, before))}: allowed: different folders named by their lanes")
    return {int(folder.name): read_probe(folder) for folder in sorted(before, key=lambda each: int(each.name))}


def _lane(out: Path, race: RaceConfig) -> Lane:
    if not out.name.isdecimal():
        raise ConfigError(f"--out {out}: allowed: a folder named by the number of a lane")
    try:
        return Lane.of(int(out.name), race)
    except ValueError as problem:
        raise ConfigError(f"--out {out}: {problem}") from None


def _goes_on(
    before: Sequence[Path], lane: Lane, race: RaceConfig
) -> tuple[Point, UNet2D, dict[str, Rows], dict[str, Any]]:
    """The survivor that this lane goes on with: its point, network, channels and record."""
    said = _told(before)
    if len(said) != race.sizes[lane.rung - 1] or any(each["rung"] != lane.rung - 1 for each in said.values()):
        raise ConfigError(f"--before: {len(before)} probes; allowed: all {race.sizes[lane.rung - 1]} of the rung below")
    folders = {int(folder.name): folder for folder in before}
    # Two lanes of one point are one candidate; the lower number speaks for both.
    by_point = {tuple(said[number]["point"]): number for number in sorted(said, reverse=True)}
    candidates = [_measured(f"{number:06d}", said[number]) for number in by_point.values()]
    going = survivors(candidates, race.sizes[lane.rung], race.good_enough)
    if not going:
        raise ArtifactError(f"{before[0].parent}: no probe of rung {lane.rung - 1} has a finite quality loss")
    number = int(going[lane.place % len(going)].name)
    stored: StoredModel = read_model(folders[number])
    kept = {stream: np.array(rows, np.intp) for stream, rows in said[number]["kept"].items()}
    return tuple(said[number]["point"]), stored.unet, kept, stored.record


def _figures(
    result: ProbeResult, point: Point, lane: Lane, network: UNet2DConfig, kept: dict[str, Rows], curve: Any
) -> dict[str, Any]:
    return {
        "point": list(point), "rung": lane.rung, "quality_loss": result.quality_loss,
        "multiply_adds": result.multiply_adds, "parameters": result.parameters,
        "channels": list(network.block_out_channels), "layers_per_block": network.layers_per_block,
        "attention": ["Attn" in name for name in network.down_block_types],
        "attention_head_dim": network.attention_head_dim,
        "middle": "none" if network.mid_block_type is None else "attention" if network.add_attention else "plain",
        "kept": {stream: rows.tolist() for stream, rows in kept.items()}, "curve": curve,
    }  # fmt: skip
