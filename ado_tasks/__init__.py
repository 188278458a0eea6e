"""The Adaptive Diffusion Optimizer: verbs are tasks, nouns are library."""

import os

# One BLAS thread, in MLX and in NumPy: parallelism comes from MLX streams (see parallel.py), a result's bytes do not
# depend on how many cores a machine has, and two threads that wait for each other on busy cores are slower than one. It
# is read when a BLAS is loaded, so it stands before every import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
