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

# Queries and keys of a block: on a CPU 1 MiB of scores a head, which stays in a core's second-level cache; a GPU wants
# fewer and larger ones. Of all rows together at most so many scores: 16 MiB and 256 MiB in float32.
CPU_BLOCK, CPU_BLOCK_SCORES = (256, 1024), 2**22
GPU_BLOCK, GPU_BLOCK_SCORES = (1024, 1024), 2**26
LEAST_BLOCK = 32
FUSED_LEAST = 128  # fewer queries at a time would leave a fused kernel idle


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


def block_sizes(rows: int, *, cpu: bool) -> tuple[int, int]:
    """Queries and keys of a block of attention, for so many images times heads: the longer is halved while it is large.

    So a block's scores stay within BLOCK_SCORES for up to BLOCK_SCORES / LEAST_BLOCK² rows.
    """
    queries, keys = CPU_BLOCK if cpu else GPU_BLOCK
    limit = CPU_BLOCK_SCORES if cpu else GPU_BLOCK_SCORES
    while rows * queries * keys > limit and max(queries, keys) > LEAST_BLOCK:
        queries, keys = (queries // 2, keys) if queries > keys else (queries, keys // 2)
    return queries, keys


def fused_queries(rows: int, keys: int) -> int:
    """Queries that go through a GPU's fused kernel at once: many, while scores with all keys would be few enough."""
    return max(FUSED_LEAST, min(GPU_BLOCK[0], GPU_BLOCK_SCORES // (rows * keys)))


def cuda_fuses(*, half: bool, head_width: int, positions: int) -> bool:
    """Whether cuDNN's kernel takes it, with its gradient."""
    fits = head_width % CUDA_WIDTH_STEP == 0 and head_width <= CUDA_WIDEST
    return half and fits and positions % CUDA_TILE == 0
