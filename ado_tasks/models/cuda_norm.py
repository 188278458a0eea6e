"""Group normalisation, and the SiLU behind it, as CUDA kernels: two passes over an image forward, four backward.

MLX adds halves up in halves there, and its fused kernels read rows of channels element by element. Here every sum is
float32, 16 bytes are read at once, and neither the normalised image nor the SiLU's input is kept for the gradient.
With c the channel's centre μ - shift, r = 1/σ, x̂ = (x - c) r, n = w x̂ + b and y = n or silu(n):

    forward    sums of x - p and (x - p)² a channel, p its first pixel (so that a large mean costs no digits); c and r
               of each group by Chan et al. 1979's update of variances; then y
    backward   g_n = dL/dn; sums of g_n and g_n x̂; with A, B the means over the group of w g_n and w g_n x̂:
               dx = r (w g_n - A - x̂ B), dw = Σ g_n x̂, db = Σ g_n, and of the shift dx summed over pixels
"""

import os
from functools import lru_cache
from typing import Any

from ado_tasks.backend import mx, on_cpu

BYTES = 16  # that a thread reads at once
THREADS = 256  # of a block
WIDEST = 2048  # channels: sums of a block lie in 16 KiB of shared memory
BLOCKS = 8 * 132  # that fill a Hopper GPU; the sums of an image are split among so many of them
LEAST_ROWS = 4  # pixels that a thread adds up at least

_VECTOR = """
  constexpr int V = 16 / sizeof(T);
  struct alignas(16) Vector { T of[V]; };
  const int N = x_shape[1], C = x_shape[2], lanes = C / V;
"""

# Σ over a split's pixels of a pair of numbers a channel, as (B, S, 2, C): each thread adds V channels of every
# `rows`-th pixel up, then the rows of a block are added.
_ADD_UP = """
  const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes, rows = blockDim.x / lanes;
  const int split = blockIdx.x, splits = gridDim.x, image = blockIdx.y;
  __shared__ float first[2048], second[2048];
  float one[V], two[V];
  for (int i = 0; i < V; i++) one[i] = two[i] = 0.0f;
  const int each = (N + splits - 1) / splits, stop = min(N, (split + 1) * each);
  const T* base = x + (size_t)image * N * C + lane * V;
  BEFORE
  for (int pixel = split * each + row; pixel < stop; pixel += rows) {
    const Vector a = *reinterpret_cast<const Vector*>(base + (size_t)pixel * C);
    EACH
  }
  for (int i = 0; i < V; i++) {
    first[row * C + lane * V + i] = one[i];
    second[row * C + lane * V + i] = two[i];
  }
  __syncthreads();
  float* out = sums + ((size_t)image * splits + split) * 2 * C;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    float a = 0.0f, b = 0.0f;
    for (int r = 0; r < rows; r++) {
      a += first[r * C + c];
      b += second[r * C + c];
    }
    out[c] = a;
    out[C + c] = b;
  }
"""


def _add_up(before: str, each: str) -> str:
    return _VECTOR + _ADD_UP.replace("BEFORE", before).replace("EACH", each)


_FORWARD_SUMS = _add_up(
    "const Vector pivot = *reinterpret_cast<const Vector*>(base);",
    """for (int i = 0; i < V; i++) {
      const float d = static_cast<float>(a.of[i]) - static_cast<float>(pivot.of[i]);
      one[i] += d;
      two[i] += d * d;
    }""",
)

_COLUMN_SUMS = _add_up("", "for (int i = 0; i < V; i++) one[i] += static_cast<float>(a.of[i]);")

# a and b: the two sums of a channel of an image, over all splits; the loop over channels stays open.
_OF_CHANNEL = """  const float* in = sums + (size_t)image * splits * 2 * C;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    float a = 0.0f, b = 0.0f;
    for (int s = 0; s < splits; s++) {
      a += in[(size_t)s * 2 * C + c];
      b += in[(size_t)s * 2 * C + C + c];
    }"""

# Rows (B, 3, C) of each image: the centre, 1/σ, and Σ x̂ over pixels.
_FORWARD_ROWS = (
    """
  const int N = x_shape[1], C = x_shape[2], splits = sums_shape[1], image = blockIdx.x;
  const int width = C / GROUPS;
  __shared__ float mean[2048], square[2048];
"""
    + _OF_CHANNEL
    + """
    mean[c] = static_cast<float>(x[(size_t)image * N * C + c]) + a / N + shift[image * C + c];
    square[c] = b - a * (a / N);
  }
  __syncthreads();
  float* out = rows + (size_t)image * 3 * C;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    const int start = c / width * width;
    float centre = 0.0f, spread = 0.0f;
    for (int k = start; k < start + width; k++) centre += mean[k];
    centre /= width;
    for (int k = start; k < start + width; k++) spread += square[k] + N * (mean[k] - centre) * (mean[k] - centre);
    const float scale = rsqrtf(spread / ((float)N * width) + eps[0]);
    out[c] = centre - shift[image * C + c];
    out[C + c] = scale;
    out[2 * C + c] = (mean[c] - centre) * scale * N;
  }
"""
)

_PLACE = """
  const size_t place = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (place >= (size_t)x_shape[0] * N * C) return;
  const int c = place % C;
  const float* own = rows + place / ((size_t)N * C) * 3 * C + c;
  const Vector a = *reinterpret_cast<const Vector*>(x + place);
  Vector out;
"""

_FORWARD = (
    _VECTOR
    + _PLACE
    + """
  for (int i = 0; i < V; i++) {
    const float n = (static_cast<float>(a.of[i]) - own[i]) * own[C + i] * weight[c + i] + bias[c + i];
    out.of[i] = static_cast<T>(SILU ? n / (1.0f + __expf(-n)) : n);
  }
  *reinterpret_cast<Vector*>(y + place) = out;
"""
)

# With x̂ and g_n of channel c in image row `own`.
_SLOPE = """
      const float h = (static_cast<float>(a.of[i]) - own[i]) * own[C + i];
      float slope = static_cast<float>(g.of[i]);
      if (SILU) {
        const float n = h * weight[c + i] + bias[c + i];
        const float s = 1.0f / (1.0f + __expf(-n));
        slope *= s * (1.0f + n * (1.0f - s));
      }
"""

_BACKWARD_SUMS = _add_up(
    """const int c = lane * V;
  const float* own = rows_of + (size_t)image * 3 * C + c;""",
    f"""const Vector g = *reinterpret_cast<const Vector*>(gradient + ((size_t)image * N + pixel) * C + c);
    for (int i = 0; i < V; i++) {{
      {_SLOPE}
      one[i] += slope;
      two[i] += slope * h;
    }}""",
)

# (B, 5, C) of each image: A, B, Σ g_n, Σ g_n x̂ and the gradient of the shift.
_BACKWARD_ROWS = (
    """
  const int N = x_shape[1], C = x_shape[2], splits = sums_shape[1], image = blockIdx.x;
  const int width = C / GROUPS;
  __shared__ float one[2048], two[2048];
"""
    + _OF_CHANNEL
    + """
    one[c] = a;
    two[c] = b;
  }
  __syncthreads();
  const float* own = rows + (size_t)image * 3 * C;
  float* out = slopes + (size_t)image * 5 * C;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    const int start = c / width * width;
    float a = 0.0f, b = 0.0f;
    for (int k = start; k < start + width; k++) {
      a += weight[k] * one[k];
      b += weight[k] * two[k];
    }
    a /= (float)N * width;
    b /= (float)N * width;
    out[c] = a;
    out[C + c] = b;
    out[2 * C + c] = one[c];
    out[3 * C + c] = two[c];
    out[4 * C + c] = own[C + c] * (weight[c] * one[c] - N * a - b * own[2 * C + c]);
  }
"""
)

_BACKWARD = (
    _VECTOR
    + _PLACE
    + f"""
  const float* means = slopes + place / ((size_t)N * C) * 5 * C + c;
  const Vector g = *reinterpret_cast<const Vector*>(gradient + place);
  for (int i = 0; i < V; i++) {{
      {_SLOPE}
      out.of[i] = static_cast<T>(own[C + i] * (slope * weight[c + i] - means[i] - h * means[C + i]));
  }}
  *reinterpret_cast<Vector*>(dx + place) = out;
"""
)

# Name: inputs, output, source.
SOURCES: dict[str, tuple[list[str], str, str]] = {
    "ado_column_sums": (["x"], "sums", _COLUMN_SUMS),
    "ado_norm_sums": (["x"], "sums", _FORWARD_SUMS),
    "ado_norm_rows": (["x", "sums", "shift", "eps"], "rows", _FORWARD_ROWS),
    "ado_norm": (["x", "rows", "weight", "bias"], "y", _FORWARD),
    "ado_norm_slope_sums": (["x", "gradient", "rows_of", "weight", "bias"], "sums", _BACKWARD_SUMS),
    "ado_norm_slope_rows": (["x", "sums", "rows", "weight"], "slopes", _BACKWARD_ROWS),
    "ado_norm_slope": (["x", "gradient", "rows", "slopes", "weight", "bias"], "dx", _BACKWARD),
}


def fits(x: mx.array, groups: int = 1) -> bool:
    """Whether these kernels take an image (B, ..., C) on the device at hand. ADO_CUDA_KERNELS=0 says no."""
    if on_cpu() or not mx.cuda.is_available() or os.environ.get("ADO_CUDA_KERNELS") == "0":
        return False
    channels = x.shape[-1]
    return channels <= WIDEST and channels % (BYTES // x.dtype.size) == 0 and channels % groups == 0


def group_norm(
    x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float, shift: mx.array | None, *, silu: bool
) -> mx.array:
    """Group normalisation of x + shift over the last axis of (B, ..., C), and its SiLU where that is asked for.

    The shift is (B, C). Statistics are float32; the result has the type of x, (B, ..., C).
    """
    shape = x.shape
    wide = [each.astype(mx.float32) for each in (weight, bias)]
    shift = mx.zeros((shape[0], shape[-1])) if shift is None else shift.astype(mx.float32)
    flat = x.reshape(shape[0], -1, shape[-1])
    return _group_norm(groups, eps, silu)(flat, *wide, shift)[0].reshape(shape)


@lru_cache(maxsize=64)
def _group_norm(groups: int, eps: float, silu: bool) -> Any:
    """The function of x (B, N, C), weight, bias (C,) and shift (B, C), with a gradient of its own."""

    @mx.custom_function
    def normalise(x: mx.array, weight: mx.array, bias: mx.array, shift: mx.array) -> tuple[mx.array, mx.array]:
        b, _, c = x.shape
        sums = _added_up("ado_norm_sums", [x], x)
        rows = _run("ado_norm_rows", [x, sums, shift, mx.array([eps])], x, (b, 3, c), blocks=b, GROUPS=groups)
        return _everywhere("ado_norm", [x, rows, weight, bias], x, silu), rows

    @normalise.vjp
    def normalise_vjp(primals, cotangents, outputs):
        x, weight, bias, _ = primals
        rows, gradient = outputs[1], cotangents[0]
        b, _, c = x.shape
        sums = _added_up("ado_norm_slope_sums", [x, gradient, rows, weight, bias], x, SILU=silu)
        slopes = _run("ado_norm_slope_rows", [x, sums, rows, weight], x, (b, 5, c), blocks=b, GROUPS=groups)
        dx = _everywhere("ado_norm_slope", [x, gradient, rows, slopes, weight, bias], x, silu)
        totals = mx.sum(slopes[:, 2:4], axis=0)
        return dx, totals[1], totals[0], slopes[:, 4]

    return normalise


def column_sums(x: mx.array) -> mx.array:
    """Σ over all but the last axis, (C,) float32. `fits` says whether it can."""
    flat = x.reshape(1, -1, x.shape[-1])
    return mx.sum(_added_up("ado_column_sums", [flat], flat)[0, :, 0], axis=0)


def _added_up(name: str, inputs: list[mx.array], x: mx.array, **constants: bool) -> mx.array:
    """(B, S, 2, C), float32."""
    b, n, c = x.shape
    lanes = c // (BYTES // x.dtype.size)
    rows = max(1, THREADS // lanes)
    splits = max(1, min(-(-BLOCKS // b), n // (rows * LEAST_ROWS)))
    grid = (splits, b, 1)
    return _launch(name, inputs, x, (b, splits, 2, c), mx.float32, grid, rows * lanes, constants)


def _run(
    name: str, inputs: list[mx.array], x: mx.array, shape: tuple[int, ...], *, blocks: int, **constants: int
) -> mx.array:
    return _launch(name, inputs, x, shape, mx.float32, (blocks, 1, 1), THREADS, constants)


def _everywhere(name: str, inputs: list[mx.array], x: mx.array, silu: bool) -> mx.array:
    """As x."""
    vectors = x.size // (BYTES // x.dtype.size)
    return _launch(name, inputs, x, x.shape, x.dtype, (-(-vectors // THREADS), 1, 1), THREADS, {"SILU": silu})


def _launch(
    name: str, inputs: list[mx.array], x: mx.array, shape: tuple[int, ...], kind: mx.Dtype, grid: tuple[int, int, int],
    threads: int, constants: dict[str, Any],
) -> mx.array:  # fmt: skip
    """`grid` counts blocks of `threads`."""
    return _kernel(name)(
        inputs=inputs, template=[("T", x.dtype), *constants.items()], grid=(grid[0] * threads, *grid[1:]),
        threadgroup=(threads, 1, 1), output_shapes=[shape], output_dtypes=[kind],
    )[0]  # fmt: skip


@lru_cache(maxsize=16)
def _kernel(name: str) -> Any:
    inputs, output, source = SOURCES[name]
    return mx.fast.cuda_kernel(name=name, input_names=inputs, output_names=[output], source=source)
