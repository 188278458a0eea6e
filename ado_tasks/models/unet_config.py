"""The configuration of a U-Net: field for field the `config.json` of Diffusers' `UNet2DModel` (0.37)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ado_tasks.config import config, parse
from ado_tasks.errors import ConfigError
from ado_tasks.models.unet_layout import DOWN_KINDS, UP_KINDS, block_kind, check_layout

CLASS_NAME = "UNet2DModel"
ACTIVATION_NAMES = ("silu", "swish", "mish", "gelu", "relu")  # Diffusers' activations.ACT2CLS

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@config
class UNet2DConfig:
    """What a U-Net looks like. Names, meanings and defaults are Diffusers'."""

    sample_size: Positive | tuple[Positive, Positive] | None = None  # height and width; others work too
    in_channels: Positive = 3  # of the image that comes in
    out_channels: Positive = 3  # of the prediction
    center_input_sample: bool = False  # take 2x − 1 first
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"  # how the timestep is read
    time_embedding_dim: Positive | None = None  # width of the time embedding; none = 4 × the first channels
    freq_shift: int = 0  # taken off the count of frequencies in their spacing
    flip_sin_to_cos: bool = True  # cosines before sines
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)  # one a level
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"  # none leaves the middle out
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")  # one a level, deepest first
    block_out_channels: tuple[Positive, ...] = (224, 448, 672, 896)  # channels of each level
    layers_per_block: Positive = 2  # residual blocks a level (one more on the way up)
    mid_block_scale_factor: Annotated[float, Field(gt=0)] = 1.0  # the middle's outputs are divided by it
    downsample_padding: Literal[0, 1] = 1  # of the strided convolution; 0 pads below and to the right
    downsample_type: Literal["conv", "resnet"] = "conv"  # how AttnDownBlock2D halves
    upsample_type: Literal["conv", "resnet"] = "conv"  # how AttnUpBlock2D doubles
    dropout: Fraction = 0.0  # in each residual block, in training
    act_fn: str = "silu"  # silu, swish, mish, gelu or relu
    attention_head_dim: Positive | None = 8  # channels a head; none = one head
    norm_num_groups: Positive | None = 32  # of the group norms; none only where all blocks have their own rule
    attn_norm_num_groups: Positive | None = None  # of the middle's attention
    norm_eps: Annotated[float, Field(ge=0)] = 1e-5  # of the group norms
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"  # the embedding adds, or scales and shifts
    add_attention: bool = True  # in the middle
    class_embed_type: Literal["timestep", "identity"] | None = None  # how a class is read; none = from a table, if any
    num_class_embeds: Positive | None = None  # rows of the table of classes
    num_train_timesteps: Positive | None = None  # rows of a learned table of timesteps
    carried: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # `_` keys of a config.json

    def __post_init__(self) -> None:
        """Check what concerns several fields. Raises ConfigError."""
        self._check_names()
        self._check_lengths()
        self._check_time()
        if self.norm_num_groups is not None and self.block_out_channels[0] % self.norm_num_groups:
            raise ConfigError(
                f"norm_num_groups: {self.norm_num_groups}; allowed: a divisor of all block_out_channels "
                f"{self.block_out_channels}"
            )
        check_layout(self)

    def _check_names(self) -> None:
        for field, names, kinds in (
            ("down_block_types", self.down_block_types, DOWN_KINDS),
            ("up_block_types", self.up_block_types, UP_KINDS),
        ):
            for name in names:
                if block_kind(name) not in kinds:
                    raise ConfigError(f"{field}: {name!r} is not allowed; allowed: {', '.join(kinds)}")
        if self.act_fn.lower() not in ACTIVATION_NAMES:
            raise ConfigError(f"act_fn: {self.act_fn!r} is not allowed; allowed: {', '.join(ACTIVATION_NAMES)}")

    def _check_lengths(self) -> None:
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ConfigError("block_out_channels: (); allowed: at least one level")
        for field, names in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            if len(names) != levels:
                raise ConfigError(f"{field}: {len(names)} given; allowed: {levels}, as many as block_out_channels")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size or self.size_multiple,)
        if any(size % self.size_multiple for size in sizes):
            raise ConfigError(f"sample_size: {self.sample_size}; allowed: multiples of {self.size_multiple}")

    def _check_time(self) -> None:
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ConfigError("num_train_timesteps: none; allowed: a count, with time_embedding_type 'learned'")
        if self.time_embedding_type == "positional" and self.block_out_channels[0] // 2 == self.freq_shift:
            raise ConfigError(
                f"freq_shift: {self.freq_shift} is half of block_out_channels[0], a division by zero; allowed: another"
            )

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def groups_out(self) -> int:
        """Groups of the last norm."""
        return self.norm_num_groups or min(self.block_out_channels[0] // 4, 32)

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this: each level but the last halves them."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def has_classes(self) -> bool:
        """Whether the model is told a class."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    def check_data(self, shape: tuple[int, int, int], classes: int, where: str) -> None:
        """Whether images (height, width, channels) of so many classes (0: without labels) can be this network's.

        A table of classes may have unused rows. A label beyond it must be refused here: on a CPU, MLX reads and, in the
        gradient, writes outside of the table.

        Raises:
            ConfigError: names the key, its value and what is allowed.
        """
        size = (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size
        allowed = {
            "in_channels": (self.in_channels, shape[2], self.in_channels == shape[2]),
            "out_channels": (self.out_channels, shape[2], self.out_channels == shape[2]),
            "sample_size": (self.sample_size, shape[:2], size in (None, shape[:2])),
        }
        if self.class_embed_type is None:
            rows = self.num_class_embeds or 0
            needed = f"{classes} or more" if classes else "none: the images have no labels"
            allowed["num_class_embeds"] = (
                self.num_class_embeds,
                needed,
                rows >= classes and bool(rows) == bool(classes),
            )
        for key, (value, wanted, fits) in allowed.items():
            if not fits:
                raise ConfigError(f"{where}.{key}: {value} does not fit the dataset; allowed: {wanted}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "unet/config.json") -> "UNet2DConfig":
        """Read what `config.json` holds. Absent keys take Diffusers' defaults; keys that start with `_` are kept.

        Raises:
            ConfigError: an unknown key, or a value that is not allowed: names the key, the value and what is allowed.
        """
        if values.get("_class_name", CLASS_NAME) != CLASS_NAME:
            raise ConfigError(f"{where}._class_name: {values['_class_name']!r} is not allowed; allowed: {CLASS_NAME!r}")
        unknown = [name for name in values if name not in FIELDS and not name.startswith("_")]
        if unknown:
            raise ConfigError(f"{where}.{unknown[0]}: unknown key; allowed here: {', '.join(FIELDS)}")
        plain = {name: value for name, value in values.items() if not name.startswith("_")}
        kept = {name: value for name, value in values.items() if name.startswith("_")}
        try:
            return dataclasses.replace(parse(cls, plain, where), carried=kept)
        except ConfigError as problem:
            text = str(problem)
            raise ConfigError(text if text.startswith(where) else f"{where}.{text}") from None

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: every field, tuples as lists, kept keys first."""
        fields = {name: getattr(self, name) for name in FIELDS}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"_class_name": CLASS_NAME, **self.carried, **plain}


FIELDS = tuple(field.name for field in dataclasses.fields(UNet2DConfig) if field.name != "carried")
