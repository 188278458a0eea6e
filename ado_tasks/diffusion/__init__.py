"""Noise schedules, parameterisations, losses and solvers: mathematics on arrays, no files."""
