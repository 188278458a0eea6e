"""The kernels of `cuda_norm.py` on a CPU: the same source through a C++ compiler, each CUDA thread a thread of its own.

Types are float32 throughout, so what a half would round is not seen; what is computed, and by which thread, is.
"""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.models import cuda_norm

HEADER = """
#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>
#define __global__
#define __shared__ static
#define __grid_constant__
using std::min;
using Shape = std::array<int, 10>;
struct dim { int x, y, z; };
static thread_local dim threadIdx, blockIdx;
static dim blockDim, gridDim;
static std::unique_ptr<std::barrier<>> gate;
static void __syncthreads() { gate->arrive_and_wait(); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename F> static void launch(dim grid, int threads, F body) {
  gridDim = grid;
  blockDim = {threads, 1, 1};
  gate = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> running;
  for (int t = 0; t < threads; t++)
    running.emplace_back([=] {
      for (int y = 0; y < grid.y; y++)
        for (int x = 0; x < grid.x; x++) {
          threadIdx = {t, 0, 0};
          blockIdx = {x, y, 0};
          body();
          gate->arrive_and_wait();  // shared memory is one block's at a time
        }
    });
  for (auto& each : running) each.join();
}
"""


def source(constants: dict[str, int]) -> str:
    """All kernels, each with a C function that launches it on (grid x, grid y, threads, pointers, shapes)."""
    fixed = "".join(f"  constexpr int {key} = {value};\n" for key, value in constants.items())
    return HEADER + "".join(_kernel(name, fixed) for name in cuda_norm.SOURCES)


def _kernel(name: str, fixed: str) -> str:
    inputs, output, body = cuda_norm.SOURCES[name]
    body = body.replace("__expf", "std::exp")  # glibc has a function of that name
    shaped = _shaped(name)
    arrays = ", ".join([*(f"const float* {each}" for each in inputs), f"float* {output}"])
    shapes = ", ".join(f"const Shape {each}_shape" for each in shaped)
    given = ", ".join(f"const int* {each}_given" for each in shaped)
    taken = " ".join(f"Shape {each}_shape; std::copy_n({each}_given, 10, {each}_shape.begin());" for each in shaped)
    passed = ", ".join([*inputs, output, *(f"{each}_shape" for each in shaped)])
    return f"""
__global__ void {name}({arrays}, {shapes}) {{
  using T = float;
{fixed}{body}
}}
extern "C" void run_{name}(int grid_x, int grid_y, int threads, {arrays}, {given}) {{
  {taken}
  launch({{grid_x, grid_y, 1}}, threads, [=] {{ {name}({passed}); }});
}}
"""


def _shaped(name: str) -> list[str]:
    """The inputs whose shapes the kernel reads."""
    inputs, _, body = cuda_norm.SOURCES[name]
    return [each for each in inputs if f"{each}_shape" in body]


class Emulated:
    """Stands in for `mx.fast.cuda_kernel`, for images of so many groups, with the SiLU or without."""

    def __init__(self, folder: Path, groups: int, silu: bool) -> None:
        """Built in `folder`: a second or two."""
        path = folder / f"norm_{groups}_{silu}.cpp"
        path.write_text(source({"GROUPS": groups, "SILU": int(silu)}))
        command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", str(path), "-o", f"{path}.so"]
        subprocess.run(command, check=True)
        self._constants = {"GROUPS": groups, "SILU": silu}
        self._library = ctypes.CDLL(f"{path}.so")

    def kernel(self, name: str) -> Any:
        """The kernel of this name as a callable that takes what MLX's takes."""

        def call(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            assert all(self._constants[key] == value for key, value in template[1:])
            arrays = [np.ascontiguousarray(np.array(each), dtype=np.float32) for each in inputs]
            out = np.full(output_shapes[0], np.nan, np.float32)
            by_name = dict(zip(cuda_norm.SOURCES[name][0], arrays, strict=True))
            shapes = [(ctypes.c_int * 10)(*by_name[each].shape) for each in _shaped(name)]
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in [*arrays, out]]
            blocks = (-(-grid[0] // threadgroup[0]), grid[1], threadgroup[0])
            getattr(self._library, f"run_{name}")(*blocks, *pointers, *shapes)
            return [mx.array(out).astype(output_dtypes[0])]

        return call
