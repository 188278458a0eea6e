"""Which form attention takes: all scores at once, MLX's fused kernel, or blocks. Numbers, no arrays."""

from typing import Literal

Device = Literal["cpu", "metal", "cuda"]
Form = Literal["whole", "fused", "chunked"]

# Up to so many positions (32×32 pixels) the scores of a head take 4 MiB at most.
WHOLE_POSITIONS = 1024
# Head widths of MLX 0.32's fused kernels: on Metal for many queries, without a gradient; on CUDA (cuDNN) in halves,
# with a gradient for lengths of whole tiles.
METAL_WIDTHS = (64, 72, 80, 96, 128)
CUDA_WIDEST, CUDA_WIDTH_STEP, CUDA_TILE = 128, 8, 128


def attention_form(device: Device, *, half: bool, head_width: int, positions: int, gradient: bool) -> Form:
    """The form that `ops.attention` takes.

    Args:
        device: what MLX computes on.
        half: float16 or bfloat16.
        head_width: channels a head.
        positions: queries, as many as keys.
        gradient: whether it is trained through.
    """
    if device == "metal" and head_width in METAL_WIDTHS and not gradient:
        return "fused"
    if device == "cuda" and cuda_fuses(half=half, head_width=head_width, positions=positions):
        return "fused"
    return "whole" if positions <= WHOLE_POSITIONS else "chunked"


def cuda_fuses(*, half: bool, head_width: int, positions: int) -> bool:
    """Whether cuDNN's kernel takes it, with its gradient."""
    fits = head_width % CUDA_WIDTH_STEP == 0 and head_width <= CUDA_WIDEST
    return half and fits and positions % CUDA_TILE == 0
