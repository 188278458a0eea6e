"""Networks in MLX."""
