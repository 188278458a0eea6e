"""The operations of `ops.py` in the form that is fast on MLX's CPU backend, each with its gradient written out.

What that backend is slow at, and what stands here instead (262,144 elements, one core): `exp` and `sigmoid` go element
by element (5 ms: polynomials take 1); `where` and `floor` branch (1.5 ms: arithmetic takes 0.1); the gradients
of a convolution gather through general strides (a patch matrix and one matrix product instead). Every operation costs
about 8 μs to hand out, views too, so there are few. Nothing here runs on a GPU. These forms are meant for `mx.compile`,
which fuses their arithmetic; without it they are right and slower.
"""

from ado_tasks.models.cpu_ops.attention import attention, self_attention
from ado_tasks.models.cpu_ops.convolution import conv2d
from ado_tasks.models.cpu_ops.linear import linear
from ado_tasks.models.cpu_ops.normalisation import group_norm
from ado_tasks.models.cpu_ops.pointwise import exp2_of_nonpositive, sigmoid, silu
from ado_tasks.models.cpu_ops.upsampling import upsample_conv2d

__all__ = [
    "attention",
    "conv2d",
    "exp2_of_nonpositive",
    "group_norm",
    "linear",
    "self_attention",
    "sigmoid",
    "silu",
    "upsample_conv2d",
]
