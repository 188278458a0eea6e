"""Hugging Face Diffusers' `UNet2DModel` in MLX: the same configuration, the same names of weights, the same outputs."""

from typing import Any

from ado_tasks.backend import mx, nn
from ado_tasks.errors import ConfigError
from ado_tasks.models import ops
from ado_tasks.models.embeddings import GaussianFourierProjection, LearnedTimesteps, TimestepEmbedding, Timesteps
from ado_tasks.models.layers import ACTIVATIONS, Conv2d, DropoutKeys, Embedding, GroupNorm
from ado_tasks.models.recompute import recomputed
from ado_tasks.models.resnet import BlockOptions, Condition, ResnetBlock2D, ResnetBlockCondNorm2D
from ado_tasks.models.unet_blocks import DownBlock2D, SkipDownBlock2D, SkipUpBlock2D, UNetMidBlock2D, UpBlock2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.unet_k_blocks import KDownBlock2D, KUpBlock2D
from ado_tasks.models.unet_layout import K_KINDS, Level, block_kind, down_levels, up_levels


class UNet2D(nn.Module):
    """A network (x_t, t, class) -> prediction, made of zeros and ones until weights are loaded or initialised.

    Compilable: it branches on its configuration only. Positions that the configuration leaves out (attention, skip
    convolutions, class embedding) do not exist, so the parameters are exactly those of Diffusers' model.
    """

    def __init__(self, config: UNet2DConfig) -> None:
        """Build what the configuration says."""
        super().__init__()
        self.config = config
        first = config.block_out_channels[0]
        width = config.embedding_width
        self.conv_in = Conv2d(config.in_channels, first, 3, padding=1)
        self.time_proj, projected = _time_projection(config)
        self.time_embedding = TimestepEmbedding(projected, width)
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(projected, width)
        elif config.class_embed_type is None and config.num_class_embeds is not None:
            self.class_embedding = Embedding(config.num_class_embeds, width)
        options = BlockOptions(
            embedding=width,
            eps=config.norm_eps,
            act_fn=config.act_fn.lower(),
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dropout=config.dropout,
        )
        self.down_blocks = [
            _down_block(config, kind, level, options)
            for kind, level in zip(map(block_kind, config.down_block_types), down_levels(config), strict=True)
        ]
        if config.mid_block_type is not None:
            self.mid_block = _mid_block(config, options.scaled(config.mid_block_scale_factor))
        self.up_blocks = [
            _up_block(config, kind, level, options)
            for kind, level in zip(map(block_kind, config.up_block_types), up_levels(config), strict=True)
        ]
        self._taken = tuple(level.layers for level in up_levels(config))  # states each up block takes
        self.conv_norm_out = GroupNorm(config.groups_out, first, config.norm_eps)
        self.conv_out = Conv2d(first, config.out_channels, 3, padding=1)
        self._dropouts = _dropouts(self)
        self.checkpointing = False  # the inner arrays of a block computed anew in the gradient (recompute.py)

    def __call__(
        self,
        x: mx.array,
        timestep: mx.array,
        class_labels: mx.array | None = None,
        *,
        dropout_key: mx.array | None = None,
        added: mx.array | None = None,
        leaving: list[mx.array] | None = None,
    ) -> mx.array:
        """Predict.

        Args:
            x: (B, H, W, in_channels) float32; H and W multiples of `config.size_multiple`.
            timestep: (B,) float32; fractions are allowed (a learned table rounds to its nearest row).
            class_labels: (B,) integers, where the model has classes. With class_embed_type "timestep" they are read as
                timesteps; with "identity" they are embeddings (B, embedding_width).
            dropout_key: where dropout masks are drawn from; without one nothing is dropped.
            added: (B, embedding_width), a further condition: added to the embedding of timestep and class.
            leaving: takes what leaves each block, all the way down and up (not the middle), for who learns from it.

        Returns:
            (B, H, W, out_channels) float32, whatever the type of the weights.

        Raises:
            ConfigError: x has a shape, or the class labels a presence, that this model has no place for.
        """
        return self.with_middle(x, timestep, class_labels, dropout_key=dropout_key, added=added, leaving=leaving)[0]

    def with_middle(
        self,
        x: mx.array,
        timestep: mx.array,
        class_labels: mx.array | None = None,
        *,
        dropout_key: mx.array | None = None,
        added: mx.array | None = None,
        leaving: list[mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """What the network predicts, and its features where it is narrowest: (B, h, w, channels of the last level).

        Arguments and errors as for a call. Nothing of the second half is computed where only the features are used.
        """
        self._check(x, timestep, class_labels)
        x = x.astype(self.conv_in.weight.dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        embedding = self._embedding(timestep, class_labels)
        if added is not None:
            embedding = embedding + added.astype(embedding.dtype)
        activate = ACTIVATIONS[self.config.act_fn.lower()]
        condition = Condition(embedding, activate(embedding), DropoutKeys(dropout_key, self._dropouts))
        hidden, painted, middle = self._blocks(x, condition, [] if leaving is None else leaving)
        y = self.conv_out(self.conv_norm_out.activated(hidden, ops.silu))
        if painted is not None:
            y = y + painted
        y = y.astype(mx.float32)
        if self.config.time_embedding_type == "fourier":
            y = y / timestep.astype(mx.float32)[:, None, None, None]
        return y, middle

    def _check(self, x: mx.array, timestep: mx.array, class_labels: mx.array | None) -> None:
        multiple = self.config.size_multiple
        if x.ndim != 4 or x.shape[-1] != self.config.in_channels or x.shape[1] % multiple or x.shape[2] % multiple:
            raise ConfigError(
                f"UNet2D: input of shape {tuple(x.shape)}; allowed: (batch, height, width, {self.config.in_channels}) "
                f"with height and width multiples of {multiple}"
            )
        if tuple(timestep.shape) != (x.shape[0],):
            raise ConfigError(f"UNet2D: timestep of shape {tuple(timestep.shape)}; allowed: ({x.shape[0]},)")
        if self.config.has_classes != (class_labels is not None):
            raise ConfigError(
                "UNet2D: class_labels must be given: the model has classes"
                if self.config.has_classes
                else "UNet2D: class_labels given, but the model has no classes (num_class_embeds, class_embed_type)"
            )

    def _embedding(self, timestep: mx.array, class_labels: mx.array | None) -> mx.array:
        embedding = self.time_embedding(self.time_proj(timestep))
        if class_labels is None:
            return embedding
        if self.config.class_embed_type == "identity":
            return embedding + class_labels.astype(embedding.dtype)
        if self.config.class_embed_type == "timestep":
            return embedding + self.class_embedding(self.time_proj(class_labels))
        return embedding + self.class_embedding(class_labels)

    def _blocks(
        self, x: mx.array, condition: Condition, leaving: list[mx.array]
    ) -> tuple[mx.array, mx.array | None, mx.array]:
        """Down, middle and up. Returns the features, from Skip blocks the painted image, and the middle's features."""
        hidden, skip = self.conv_in(x), x
        states: tuple[mx.array | None, ...] = (hidden,)
        run = _recomputed if self.checkpointing else _run
        for block in self.down_blocks:
            hidden, more, skip = run(block, condition, hidden, skip)
            states += more
            leaving.append(hidden)
        if "mid_block" in self:
            hidden, _, _ = run(self.mid_block, condition, hidden)
        middle, painted = hidden, None
        for block, count in zip(self.up_blocks, self._taken, strict=True):
            hidden, _, painted = run(block, condition, hidden, painted, states[-count:])
            states = states[:-count]
            leaving.append(hidden)
        return hidden, painted, middle


Passed = tuple[mx.array, tuple[mx.array | None, ...], Any]  # features, states, the image that Skip blocks pass along


def _run(
    block: nn.Module,
    condition: Condition,
    hidden: mx.array,
    skip: mx.array | None = None,
    states: tuple[mx.array | None, ...] | None = None,
) -> Passed:
    """A down block (no states), the middle (neither), or an up block."""
    if isinstance(block, UNetMidBlock2D):
        return block(hidden, condition), (), None
    if states is None:
        return block(hidden, skip, condition)
    hidden, skip = block(hidden, states, skip, condition)
    return hidden, (), skip


def _recomputed(
    block: nn.Module,
    condition: Condition,
    hidden: mx.array,
    skip: mx.array | None = None,
    states: tuple[mx.array | None, ...] | None = None,
) -> Passed:
    """The same, with the block's inner arrays computed anew in the gradient."""
    keys = condition.dropout.cut(_dropouts(block))

    def call(*arrays: Any) -> list[mx.array | None]:
        # The keys are no input: MLX would look for a gradient in them.
        hidden, skip, embedding, activated, *states_given = arrays
        condition = Condition(embedding, activated, DropoutKeys.given(keys))
        hidden, more, skip = _run(block, condition, hidden, skip, None if states is None else tuple(states_given))
        return [hidden, skip, *more]

    given = [hidden, skip, condition.embedding, condition.activated, *(states or ())]
    result, skip, *more = recomputed(block, call, given)
    assert result is not None
    return result, tuple(more), skip


def _dropouts(module: nn.Module) -> int:
    """How often a pass through it may drop."""
    return sum(isinstance(each, ResnetBlock2D | ResnetBlockCondNorm2D) for each in module.modules())


def _time_projection(config: UNet2DConfig) -> tuple[nn.Module, int]:
    """The layer that reads the timestep, and the width of what it gives."""
    first = config.block_out_channels[0]
    if config.time_embedding_type == "fourier":
        return GaussianFourierProjection(first), 2 * first
    if config.time_embedding_type == "learned":
        assert config.num_train_timesteps is not None  # UNet2DConfig refuses it
        return LearnedTimesteps(config.num_train_timesteps, first), first
    return Timesteps(first, config.flip_sin_to_cos, config.freq_shift), first


def _down_block(config: UNet2DConfig, kind: str, level: Level, options: BlockOptions) -> nn.Module:
    if kind in K_KINDS:
        return KDownBlock2D(level, options, attention=kind == "KCrossAttnDownBlock2D")
    if kind in {"SkipDownBlock2D", "AttnSkipDownBlock2D"}:
        return SkipDownBlock2D(level, options, attention=kind == "AttnSkipDownBlock2D")
    attention = kind == "AttnDownBlock2D"
    resize_by = config.downsample_type if attention else "resnet" if kind == "ResnetDownsampleBlock2D" else "conv"
    return DownBlock2D(level, options, attention=attention, resize_by=resize_by)


def _up_block(config: UNet2DConfig, kind: str, level: Level, options: BlockOptions) -> nn.Module:
    if kind in K_KINDS:
        return KUpBlock2D(level, options, attention=kind == "KCrossAttnUpBlock2D")
    if kind in {"SkipUpBlock2D", "AttnSkipUpBlock2D"}:
        return SkipUpBlock2D(level, options, attention=kind == "AttnSkipUpBlock2D")
    attention = kind == "AttnUpBlock2D"
    resize_by = config.upsample_type if attention else "resnet" if kind == "ResnetUpsampleBlock2D" else "conv"
    return UpBlock2D(level, options, attention=attention, resize_by=resize_by)


def _mid_block(config: UNet2DConfig, options: BlockOptions) -> UNetMidBlock2D:
    channels = config.block_out_channels[-1]
    groups = config.norm_num_groups if config.norm_num_groups is not None else min(channels // 4, 32)
    attention_groups = config.attn_norm_num_groups
    if attention_groups is None and config.resnet_time_scale_shift == "default":
        attention_groups = groups
    return UNetMidBlock2D(
        channels,
        options,
        groups=groups,
        attention=config.add_attention,
        attention_groups=attention_groups,
        head_width=config.attention_head_dim or channels,
    )
