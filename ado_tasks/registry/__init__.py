"""Registered models: what a version holds, which one is the champion, and how MLflow is told."""
