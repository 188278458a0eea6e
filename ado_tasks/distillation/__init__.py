"""Whole families of students, from a stored model to stored models: what `distill` calls by method."""
