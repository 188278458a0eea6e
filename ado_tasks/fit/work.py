"""What one pass of a `UNet2DModel` does, layer by layer, from its configuration alone: numbers, no arrays.

Counts follow `models/`: a multiply and an add are two operations; elements are those that a layer must read and write
if each of its parts ran once over memory. Kinds are told apart because machines treat them differently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ado_tasks.errors import ConfigError
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.unet_layout import Level, block_kind, down_levels, joined_widths, up_levels

Kind = Literal["convolution", "upsampling", "linear", "attention", "norm", "pointwise"]
KINDS: tuple[Kind, ...] = ("convolution", "upsampling", "linear", "attention", "norm", "pointwise")
KNOWN = {
    "DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"
}  # fmt: skip


@dataclass(frozen=True)
class Op:
    """One layer, for a whole batch."""

    kind: Kind
    flops: float  # operations, forward
    elements: float  # read and written, weights included
    weights: int = 0  # parameters
    kept: float = 0.0  # elements kept for the gradient
    passing: float = 0.0  # elements that live only while it runs
    scores: float = 0.0  # of attention's, which `kept` and `passing` include; a fused or chunked form has none
    leaving: float = 0.0  # elements that leave a block, where this is its last layer
    positions: int = 0  # of attention
    head_width: int = 0  # of attention


@dataclass(frozen=True)
class Image:
    """What the layers work on: so many images of a height and width."""

    batch: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of the whole batch."""
        return self.batch * self.height * self.width

    def scaled(self, by: float) -> "Image":
        """Height and width times `by`."""
        return Image(self.batch, round(self.height * by), round(self.width * by))


def unet_work(config: UNet2DConfig, batch: int, size: tuple[int, int] | None = None) -> list[Op]:
    """The layers of one forward pass, first to last.

    Args:
        config: of the network.
        batch: images.
        size: height and width; none = the configuration's own.

    Raises:
        ConfigError: a block that this count does not know (Skip and K blocks), or no size.
    """
    for name in (*config.down_block_types, *config.up_block_types):
        if block_kind(name) not in KNOWN:
            raise ConfigError(f"work of {name}: not counted; allowed: {', '.join(sorted(KNOWN))}")
    image = Image(batch, *_size(config, size))
    return [*_ends(config, image), *_down(config, image), *_middle(config, image), *_up(config, image)]


def _size(config: UNet2DConfig, size: tuple[int, int] | None) -> tuple[int, int]:
    found = size or config.sample_size
    if found is None:
        raise ConfigError("sample_size: none, and no size given; allowed: height and width in pixels")
    return (found, found) if isinstance(found, int) else found


def totals(ops: list[Op]) -> dict[Kind, tuple[float, float, int]]:
    """Operations, elements and number of layers of each kind that occurs."""
    found: dict[Kind, tuple[float, float, int]] = {}
    for op in ops:
        flops, elements, count = found.get(op.kind, (0.0, 0.0, 0))
        found[op.kind] = (flops + op.flops, elements + op.elements, count + 1)
    return found


def parameters(ops: list[Op]) -> int:
    """Weights of the network."""
    return sum(op.weights for op in ops)


def _ends(config: UNet2DConfig, image: Image) -> Iterator[Op]:
    """What lies outside of the blocks: the embedding of time and class, the first and the last convolution."""
    first, width = config.block_out_channels[0], config.embedding_width
    projected = 2 * first if config.time_embedding_type == "fourier" else first
    embeddings = 2 if config.class_embed_type == "timestep" else 1
    for _ in range(embeddings):
        yield _linear(image.batch, projected, width)
        yield _linear(image.batch, width, width)
    if config.class_embed_type is None and config.num_class_embeds is not None:
        yield Op("pointwise", 0, 2 * image.batch * width, weights=config.num_class_embeds * width)
    rows = {"fourier": 1, "learned": config.num_train_timesteps or 0}.get(config.time_embedding_type, 0)
    yield Op("pointwise", 0, image.batch * projected, weights=rows * first)
    yield _convolution(image, config.in_channels, first)
    yield from _norm_and_silu(image, first)
    yield _convolution(image, first, config.out_channels)


def _down(config: UNet2DConfig, image: Image) -> Iterator[Op]:
    for name, level in zip(config.down_block_types, down_levels(config), strict=True):
        kind, attention = block_kind(name), block_kind(name).startswith("Attn")
        by_block = kind == "ResnetDownsampleBlock2D" or (attention and config.downsample_type == "resnet")
        for width in [level.in_channels, *[level.out_channels] * (level.layers - 1)]:
            yield from _resnet(config, image, width, level.out_channels)
            if attention:
                yield from _attention(image, level.out_channels, level.head_width)
        if level.resize:
            if by_block:
                yield from _resnet(config, image.scaled(0.5), level.out_channels, level.out_channels, resampled=4.0)
            else:
                yield _convolution(image, level.out_channels, level.out_channels, stride=2)
            image = image.scaled(0.5)


def _middle(config: UNet2DConfig, image: Image) -> Iterator[Op]:
    if config.mid_block_type is None:
        return
    width, image = config.block_out_channels[-1], image.scaled(1 / config.size_multiple)
    grouped = config.attn_norm_num_groups is not None or config.resnet_time_scale_shift == "default"
    yield from _resnet(config, image, width, width)
    if config.add_attention:
        yield from _attention(image, width, config.attention_head_dim or width, normed=grouped)
    yield from _resnet(config, image, width, width)


def _up(config: UNet2DConfig, image: Image) -> Iterator[Op]:
    image = image.scaled(1 / config.size_multiple)
    for name, level in zip(config.up_block_types, up_levels(config), strict=True):
        kind, attention = block_kind(name), block_kind(name).startswith("Attn")
        by_block = kind == "ResnetUpsampleBlock2D" or (attention and config.upsample_type == "resnet")
        yield from _up_layers(config, image, level, attention=attention)
        if level.resize:
            image = image.scaled(2)
            out = level.out_channels
            if by_block:
                yield from _resnet(config, image, out, out, resampled=0.25)
            else:
                yield _upsampling(image, out)


def _up_layers(config: UNet2DConfig, image: Image, level: Level, *, attention: bool) -> Iterator[Op]:
    for width in joined_widths(level):
        yield Op("pointwise", 0, 2 * image.pixels * width, kept=image.pixels * width)  # joined with a state: copied
        yield from _resnet(config, image, width, level.out_channels)
        if attention:
            yield from _attention(image, level.out_channels, level.head_width)


def _resnet(config: UNet2DConfig, image: Image, inner: int, out: int, resampled: float = 1.0) -> Iterator[Op]:
    """A residual block; its input has `resampled` times the pixels of `image`, which it leaves with."""
    arriving = Image(image.batch, round(image.height * resampled**0.5), round(image.width * resampled**0.5))
    yield from _norm_and_silu(arriving, inner)
    if resampled != 1:
        yield Op("pointwise", 2 * arriving.pixels * inner, 2 * (arriving.pixels + image.pixels) * inner)
    yield _convolution(image, inner, out)
    yield _linear(image.batch, config.embedding_width, out * (2 if config.resnet_time_scale_shift != "default" else 1))
    yield from _norm_and_silu(image, out)
    yield _convolution(image, out, out)
    if inner != out:
        yield _convolution(image, inner, out, kernel=1)
    yield _sum(image.pixels * out)


def _sum(size: int) -> Op:
    """The end of a block: what it made is added to what came."""
    return Op("pointwise", size, 3 * size, leaving=size)


def _norm_and_silu(image: Image, channels: int) -> Iterator[Op]:
    """Kept: the centred input, the sigmoid and the product, which is the next convolution's input."""
    size = image.pixels * channels
    yield Op("norm", 8 * size, 4 * size, weights=2 * channels, kept=size)
    yield Op("pointwise", 4 * size, 2 * size, kept=2 * size)


def _convolution(image: Image, inner: int, out: int, kernel: int = 3, stride: int = 1) -> Op:
    """Its input is kept by who made it, but for a projection's or a strided one's. Passing: the matrix of patches."""
    leaving = image.pixels // stride**2
    weights = out * inner * kernel**2
    copied = leaving * inner * kernel**2 if kernel > 1 else 0
    own_input = image.pixels * inner if stride > 1 or kernel == 1 else 0
    return Op(
        "convolution", 2 * leaving * weights, image.pixels * inner + 2 * copied + leaving * out + weights,
        weights=weights + out, kept=own_input, passing=leaving * kernel**2 * max(inner, out) if kernel > 1 else 0,
    )  # fmt: skip


def convolution_flops(image: Image, inner: int, out: int, kernel: int = 3) -> float:
    """Operations of a convolution that keeps the size of its image."""
    return _convolution(image, inner, out, kernel).flops


def _upsampling(image: Image, channels: int) -> Op:
    """A convolution of an image of twice the size, to `image`: 4 products an output pixel (see cpu_ops/upsampling)."""
    size, weights = image.pixels * channels, 9 * channels**2
    return Op("upsampling", 8 * size * channels, 4 * size, weights=weights + channels, kept=size // 4, passing=4 * size)


def _linear(rows: int, inner: int, out: int) -> Op:
    elements = rows * (inner + out)
    return Op("linear", 2 * rows * inner * out, elements + inner * out, weights=inner * out + out, kept=rows * inner)


def _attention(image: Image, channels: int, head_width: int, *, normed: bool = True) -> Iterator[Op]:
    heads = channels // head_width
    inner, length = heads * head_width, image.height * image.width
    size = image.pixels * channels
    if normed:
        yield Op("norm", 8 * size, 4 * size, weights=2 * channels, kept=size)
    for _ in range(3):
        yield _linear_over(image, channels, inner)
    scores = image.batch * heads * length**2
    rows = 4 * image.pixels * inner
    yield Op("attention", 4 * scores * head_width + 10 * scores, rows + 4 * scores, kept=rows + scores,
             passing=2 * scores, scores=scores, positions=length, head_width=head_width)  # fmt: skip
    yield _linear_over(image, inner, channels)
    yield _sum(size)


def _linear_over(image: Image, inner: int, out: int) -> Op:
    op = _linear(image.pixels, inner, out)
    return Op("linear", op.flops, op.elements, op.weights, kept=image.pixels * inner / 3)  # q, k, v share their input
