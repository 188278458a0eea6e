"""Which axis of which weight counts which channels: a table, from which slicing and importance both follow.

A *stream* is a set of tensors whose channels are added to each other, and so must be cut alike: one for each level on
the way down (with the middle in the last), one for each on the way up. The width inside a residual block, and the heads
of an attention block, are its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.unet_layout import Level, block_kind, down_levels, up_levels


@dataclass(frozen=True)
class Part:
    """A run of indices along an axis: `unit` of them for each member of `stream`."""

    stream: str
    unit: int = 1


Axis = tuple[Part, ...]  # in the order of the indices; () for an axis that is never cut
Axes = tuple[Axis, Axis]  # the first and the last axis of a weight; of a vector, the first counts


@dataclass(frozen=True)
class Table:
    """The axes of every weight, and how many members each stream has."""

    axes: dict[str, Axes]  # by parameter name
    sizes: dict[str, int]  # by stream


def down(level: int) -> str:
    """The stream of a level on the way down."""
    return f"down.{level}"


def up(level: int) -> str:
    """The stream of a level on the way up; levels count from the image's size, not as up_blocks does."""
    return f"up.{level}"


def table(network: UNet2DConfig, head_unit: int | None = None) -> Table:
    """The table of a network of plain and attention blocks.

    Args:
        network: its configuration.
        head_unit: channels of what counts as a head, where heads of another network are meant; default: its own.
    """
    made = _Builder(network, head_unit or network.attention_head_dim or 1)
    return Table(dict(made.rows()), made.sizes)


class _Builder:
    def __init__(self, network: UNet2DConfig, head_unit: int) -> None:
        self._network, self._unit = network, head_unit
        self._down, self._up = down_levels(network), up_levels(network)
        widths = network.block_out_channels
        self.sizes = {way(level): width for way in (down, up) for level, width in enumerate(widths)}

    def rows(self) -> Iterator[tuple[str, Axes]]:
        network, top, last = self._network, down(0), len(self._network.block_out_channels) - 1
        yield from _layer("conv_in", (), (Part(top),))
        for name in ("linear_1", "linear_2"):
            yield from _layer(f"time_embedding.{name}", (), ())
        if network.class_embed_type is None and network.num_class_embeds is not None:
            yield "class_embedding.weight", ((), ())
        if network.class_embed_type == "timestep":
            for name in ("linear_1", "linear_2"):
                yield from _layer(f"class_embedding.{name}", (), ())
        for level, shape in enumerate(self._down):
            yield from self._down_block(level, shape)
        if network.mid_block_type is not None:
            for index in range(2):
                yield from self._resnet(f"mid_block.resnets.{index}", (Part(down(last)),), down(last), False)
            if network.add_attention:
                normed = network.attn_norm_num_groups is not None or network.resnet_time_scale_shift == "default"
                yield from self._attention("mid_block.attentions.0", down(last), normed)
        for block, shape in enumerate(self._up):
            yield from self._up_block(block, last - block, shape)
        yield from _layer("conv_norm_out", None, (Part(up(0)),))
        yield from _layer("conv_out", (Part(up(0)),), ())

    def _down_block(self, level: int, shape: Level) -> Iterator[tuple[str, Axes]]:
        kind, where = block_kind(self._network.down_block_types[level]), f"down_blocks.{level}"
        for index in range(shape.layers):
            arriving = down(max(level - 1, 0)) if index == 0 else down(level)
            projected = index == 0 and shape.in_channels != shape.out_channels
            yield from self._resnet(f"{where}.resnets.{index}", (Part(arriving),), down(level), projected)
            if kind == "AttnDownBlock2D":
                yield from self._attention(f"{where}.attentions.{index}", down(level), True)
        if shape.resize:
            by_resnet = kind == "AttnDownBlock2D" and self._network.downsample_type == "resnet"
            yield from self._resize(f"{where}.downsamplers.0", down(level), by_resnet)

    def _up_block(self, block: int, level: int, shape: Level) -> Iterator[tuple[str, Axes]]:
        kind, where = block_kind(self._network.up_block_types[block]), f"up_blocks.{block}"
        last = len(self._network.block_out_channels) - 1
        for index in range(shape.layers):
            below = up(level + 1) if level < last else down(last)
            arriving = below if index == 0 else up(level)
            state = down(max(level - 1, 0)) if index == shape.layers - 1 else down(level)
            yield from self._resnet(f"{where}.resnets.{index}", (Part(arriving), Part(state)), up(level), True)
            if kind == "AttnUpBlock2D":
                yield from self._attention(f"{where}.attentions.{index}", up(level), True)
        if shape.resize:
            by_resnet = kind == "AttnUpBlock2D" and self._network.upsample_type == "resnet"
            yield from self._resize(f"{where}.upsamplers.0", up(level), by_resnet)

    def _resize(self, where: str, stream: str, by_resnet: bool) -> Iterator[tuple[str, Axes]]:
        if by_resnet:
            yield from self._resnet(where, (Part(stream),), stream, False)
        else:
            yield from _layer(f"{where}.conv", (Part(stream),), (Part(stream),))

    def _resnet(self, where: str, arriving: Axis, stream: str, projected: bool) -> Iterator[tuple[str, Axes]]:
        inner = Part(f"{where}.inner")
        self.sizes[inner.stream] = self.sizes[stream]
        both = self._network.resnet_time_scale_shift == "scale_shift"
        yield from _layer(f"{where}.norm1", None, arriving)
        yield from _layer(f"{where}.conv1", arriving, (inner,))
        yield from _layer(f"{where}.time_emb_proj", (), (inner, inner) if both else (inner,))
        yield from _layer(f"{where}.norm2", None, (inner,))
        yield from _layer(f"{where}.conv2", (inner,), (Part(stream),))
        if projected:
            yield from _layer(f"{where}.conv_shortcut", arriving, (Part(stream),))

    def _attention(self, where: str, stream: str, normed: bool) -> Iterator[tuple[str, Axes]]:
        channels = self.sizes[stream]
        width = self._network.attention_head_dim or channels
        inner = Part(f"{where}.heads", self._unit)
        self.sizes[inner.stream] = channels // width * width // self._unit
        if normed:
            yield from _layer(f"{where}.group_norm", None, (Part(stream),))
        for name in ("to_q", "to_k", "to_v"):
            yield from _layer(f"{where}.{name}", (Part(stream),), (inner,))
        yield from _layer(f"{where}.to_out.0", (inner,), (Part(stream),))


def _layer(name: str, arriving: Axis | None, leaving: Axis) -> Iterator[tuple[str, Axes]]:
    """A convolution or linear layer; without `arriving`, a norm, whose weight is a vector."""
    yield f"{name}.weight", (leaving, arriving or ())
    yield f"{name}.bias", (leaving, ())
