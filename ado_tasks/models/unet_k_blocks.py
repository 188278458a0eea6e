"""The K blocks of `UNet2DModel` (k-diffusion's upscaler): conditioned norms, smooth resizing, one state a level.

"Cross" attention attends to the image itself here: `UNet2DModel` passes no text.
"""

from ado_tasks.backend import mx, nn
from ado_tasks.models.resample import smooth_down, smooth_up
from ado_tasks.models.resnet import AdaGroupNorm, Attention, BlockOptions, Condition, ResnetBlockCondNorm2D
from ado_tasks.models.unet_layout import K_GROUP_WIDTH, Level, k_up_alone

NORM_EPS = 1e-5  # of the attention blocks' norms, which norm_eps does not reach; Diffusers' AdaGroupNorm default

KStates = tuple[mx.array | None, ...]


class KAttentionBlock(nn.Module):
    """x + attention(norm(x, emb)), once or (with `twice`) two times over."""

    def __init__(self, channels: int, head_width: int, embedding: int, *, twice: bool) -> None:
        """`embedding` is the width of the embedding."""
        super().__init__()
        groups = max(1, channels // K_GROUP_WIDTH)
        if twice:
            self.norm1 = AdaGroupNorm(embedding, channels, groups, NORM_EPS)
            self.attn1 = Attention(channels, head_width, norm_groups=None, eps=NORM_EPS, residual=False)
        self.norm2 = AdaGroupNorm(embedding, channels, groups, NORM_EPS)
        self.attn2 = Attention(
            channels, head_width, norm_groups=None, eps=NORM_EPS, residual=False, stored_cross_norm=True
        )

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        """(B, H, W, C) to the same shape."""
        if "attn1" in self:
            x = x + self.attn1(self.norm1(x, condition.embedding))
        return x + self.attn2(self.norm2(x, condition.embedding))


class KDownBlock2D(nn.Module):
    """Residual blocks, then half the size. The resized image is not among the states."""

    def __init__(self, level: Level, options: BlockOptions, *, attention: bool) -> None:
        """`attention` makes it Diffusers' KCrossAttn block."""
        super().__init__()
        out = level.out_channels
        widths = [level.in_channels, *[out] * level.layers]
        self.resnets = [
            ResnetBlockCondNorm2D(
                widths[i], out, options, groups=widths[i] // K_GROUP_WIDTH, groups_out=out // K_GROUP_WIDTH
            )
            for i in range(level.layers)
        ]
        if attention:
            # Diffusers: a block that does not resize attends twice, and withholds its states.
            self.attentions = [
                KAttentionBlock(out, level.head_width, options.embedding, twice=not level.resize) for _ in self.resnets
            ]
        self.resize = level.resize

    def __call__(self, x: mx.array, skip: mx.array, condition: Condition) -> tuple[mx.array, KStates, mx.array]:
        """(B, H, W, in) to (B, H/2, W/2, out) and the states."""
        states: list[mx.array | None] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, condition)
            if "attentions" in self:
                x = self.attentions[index](x, condition)
            states.append(x if self.resize or "attentions" not in self else None)
        return (smooth_down(x, "reflect") if self.resize else x), tuple(states), skip


class KUpBlock2D(nn.Module):
    """The last state joined in, residual blocks (the last one to the next level's channels), then twice the size."""

    def __init__(self, level: Level, options: BlockOptions, *, attention: bool) -> None:
        """`attention` makes it Diffusers' KCrossAttn block."""
        super().__init__()
        following, out, last = level.in_channels, level.out_channels, level.layers - 1
        alone = attention and k_up_alone(level, options.embedding)
        widths = [out if alone else 2 * out, *[out] * last]
        self.resnets = [
            _k_up_resnet(widths[i], out, following if i == last else out, options, attention)
            for i in range(level.layers)
        ]
        if attention:
            self.attentions = [
                KAttentionBlock(following if i == last else out, level.head_width, options.embedding, twice=alone)
                for i in range(level.layers)
            ]
        self.resize = level.resize

    def __call__(
        self, x: mx.array, states: KStates, skip: mx.array | None, condition: Condition
    ) -> tuple[mx.array, mx.array | None]:
        """(B, H, W, out) to (B, 2H, 2W, the next level's channels)."""
        if states[-1] is not None:
            x = mx.concatenate([x, states[-1]], axis=-1)
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, condition)
            if "attentions" in self:
                x = self.attentions[index](x, condition)
        return (smooth_up(x, "reflect") if self.resize else x), skip


def _k_up_resnet(width: int, out: int, following: int, options: BlockOptions, attention: bool) -> ResnetBlockCondNorm2D:
    """With attention only the second convolution changes the channels; without, both do. The norm's groups stay."""
    return ResnetBlockCondNorm2D(
        width,
        out if attention else following,
        options,
        groups=width // K_GROUP_WIDTH,
        groups_out=out // K_GROUP_WIDTH,
        last_channels=following,
    )
