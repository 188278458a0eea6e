"""The Adaptive Diffusion Optimizer: verbs are tasks, nouns are library."""

import os

from ado_tasks.blas import kernels

# Both are read when a BLAS is loaded, so they stand before every import.
#
# One BLAS thread, in MLX and in NumPy: parallelism comes from MLX streams (see parallel.py), a result's bytes do not
# depend on how many cores a machine has, and two threads that wait for each other on busy cores are slower than one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Kernels that the processor can run, where OpenBLAS would not know it.
if (_kernels := kernels()) is not None:
    os.environ.setdefault("OPENBLAS_CORETYPE", _kernels)
