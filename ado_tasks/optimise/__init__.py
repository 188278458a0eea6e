"""Ways to make a diffusion model cheaper: progressive distillation, learned knots, and the training they share."""
