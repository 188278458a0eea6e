"""Datasets: where images come from, how they are stored, split and read back."""
