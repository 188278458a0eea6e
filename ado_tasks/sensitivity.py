"""Task `sensitivity`: what each block of the teacher is worth, and what it costs on this machine."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ado_tasks import rng
from ado_tasks.architecture.tuning import Lesson, TuneConfig
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.config import config
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.hardware.fingerprint import machine_of
from ado_tasks.hardware.latency import Spread, interleaved
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.models.layers import DropoutKeys
from ado_tasks.models.resnet import Attention, Condition, ResnetBlock2D
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.weights import flat_parameters
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import write_json

WHOLE = "whole network"
LEAST_SHOWN = 1e-9  # quality loss in the picture, whose axis is logarithmic


@config
class SensitivityConfig:
    """How losses and costs are taken."""

    images: Annotated[int, Field(ge=1)] = 256  # of the selection part
    batch_size: Annotated[int, Field(ge=1)] = 64  # images at once, where blocks are timed
    rounds: Annotated[int, Field(ge=3)] = 9  # each block once a round


@dataclass(frozen=True)
class SensitivityResult:
    """Where to cut first."""

    cheapest_cut: str  # the block that loses least for the time it takes
    quality_loss: float  # without it, untuned


def sensitivity(
    config: SensitivityConfig, *, teacher: Path, dataset: Path, profile: Path, out: Path, seed: int,
    report: Reporter = SILENT,
) -> SensitivityResult:  # fmt: skip
    """Leave out each residual and attention block alone, untuned, and write what is lost for what is saved.

    A measured task: blocks are timed here, each by itself, compiled, in turn with the whole network. A picture lies
    beside `out`, with the ending .png.

    Args:
        config: see SensitivityConfig.
        teacher: a Diffusers folder.
        dataset: folder made by `prepare`; its selection part is used.
        profile: file made by `profile`, on this machine.
        out: the JSON file.
        seed: of times and noises.
        report: where progress and figures go.

    Raises:
        ConfigError: the teacher makes other images than the dataset's.
        HardwareError: the profile is another machine's.
    """
    machine = machine_of(profile)
    stored, data = read_model(teacher), open_dataset(dataset)
    stored.unet.config.check_data(data.shape, data.num_classes, f"{teacher}/unet/config.json")
    lesson = Lesson(
        TuneConfig(validation_images=config.images), stored.unet, {}, schedule_from_diffusers(stored.scheduler_config),
        str(stored.scheduler_config.get("prediction_type", "epsilon")), rng.derive(seed, "sensitivity"),
    )  # fmt: skip
    blocks = blocks_of(stored.unet)
    losses = {}
    for name in blocks:
        losses[name] = lesson.quality_loss(without(stored.unet, name), data.split("selection"))
        report.progress(len(losses), len(blocks), quality_loss=losses[name])
    seconds = interleaved(_timed(stored.unet, blocks, config, data.shape, seed), config.rounds)
    per_image = {name: Spread.of(taken).scaled(1e3 / config.batch_size) for name, taken in seconds.items()}
    whole = per_image[WHOLE].median
    entries = [
        {
            "block": name, "quality_loss": loss, "latency_ms_per_image": asdict(per_image[name]),
            "share_of_latency": per_image[name].median / whole,
            "loss_per_share": loss * whole / per_image[name].median,
        }
        for name, loss in losses.items()
    ]  # fmt: skip
    plain = {"hardware": machine.as_plain(), "batch": config.batch_size, "blocks": entries,
             "latency_ms_per_image": asdict(per_image[WHOLE])}  # fmt: skip
    write_json(out, plain)
    _save_picture(out.with_suffix(".png"), entries)
    report.picture("sensitivity", out.with_suffix(".png"))
    first = min(entries, key=lambda entry: entry["loss_per_share"])
    return SensitivityResult(first["block"], first["quality_loss"])


def blocks_of(unet: UNet2D) -> dict[str, ResnetBlock2D | Attention]:
    """Every residual and attention block that can be passed by, by name. One that resizes cannot."""
    return {
        name: module
        for name, module in sorted(unet.named_modules())
        if isinstance(module, Attention) or (isinstance(module, ResnetBlock2D) and module.resample is None)
    }


def without(unet: UNet2D, block: str) -> UNet2D:
    """The network whose `block` adds nothing to what passes it: the last layer of its branch is zero."""
    last = ("conv2", "to_out.0")
    zero = {
        name: mx.zeros(value.shape)
        for name, value in flat_parameters(unet).items()
        if any(name.startswith(f"{block}.{layer}.") for layer in last)
    }
    made = UNet2D(unet.config)
    made.update(mlx_utils.tree_unflatten(list({**flat_parameters(unet), **zero}.items())))
    return made


def _timed(
    unet: UNet2D, blocks: dict[str, ResnetBlock2D | Attention], config: SensitivityConfig,
    shape: tuple[int, int, int], seed: int,
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    count, width = config.batch_size, unet.config.embedding_width
    generator = rng.generator(seed, "sensitivity", "timing")

    def noise(*size: int) -> mx.array:
        return mx.array(generator.standard_normal(size).astype(np.float32))

    embedding = noise(count, width)
    actions: dict[str, Callable[[], Any]] = {}
    for name, block in blocks.items():
        level = _level(name, unet)
        x = noise(count, shape[0] >> level, shape[1] >> level, _arriving(block))
        actions[name] = _action(block, x, embedding)
    labels = [mx.zeros(count, mx.int32)] if unet.config.num_class_embeds else []
    whole, given = mx.compile(unet), [noise(count, *shape), mx.full((count,), 500.0), *labels]
    return actions | {WHOLE: lambda: mx.eval(whole(*given))}


def _action(block: Any, x: mx.array, embedding: mx.array) -> Callable[[], None]:
    def run(x: mx.array, embedding: mx.array) -> mx.array:
        if isinstance(block, Attention):
            return block(x)
        return block(x, Condition(embedding, embedding, DropoutKeys(None, 0)))

    compiled = mx.compile(run)
    return lambda: mx.eval(compiled(x, embedding))


def _arriving(block: ResnetBlock2D | Attention) -> int:
    return block.to_q.weight.shape[-1] if isinstance(block, Attention) else block.conv1.weight.shape[-1]


def _level(name: str, unet: UNet2D) -> int:
    words, last = name.split("."), len(unet.config.block_out_channels) - 1
    if words[0] == "mid_block":
        return last
    return int(words[1]) if words[0] == "down_blocks" else last - int(words[1])


def _save_picture(path: Path, entries: list[dict[str, Any]]) -> None:
    entries = sorted(entries, key=lambda entry: -entry["loss_per_share"])  # the first to cut on top
    figure = Figure((9, 1.2 + 0.28 * len(entries)))
    worth, share = plain_axes(figure, (1, 2, 1)), plain_axes(figure, (1, 2, 2))
    places = np.arange(len(entries))
    # Dots: on a logarithmic axis the length of a bar says nothing.
    worth.scatter([max(entry["quality_loss"], LEAST_SHOWN) for entry in entries], places, color="C0", s=28)
    worth.set_xscale("log")
    worth.set_xlabel("quality loss without the block (the teacher: 0)")
    worth.set_yticks(places, [entry["block"] for entry in entries], fontsize=8)
    share.barh(places, [100 * entry["share_of_latency"] for entry in entries], color="C1", height=0.6)
    share.set_xlabel("its share of one evaluation's time, %")
    share.set_yticks(places, [])
    for axes in (worth, share):
        axes.set_ylim(-0.7, len(entries) - 0.3)  # rows of both lie on one line
    figure.suptitle("from the top: what loses least for the time that it takes", fontsize=10)
    save_figure(path, figure)
