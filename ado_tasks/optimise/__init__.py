"""Ways to make a diffusion model cheaper: distillation, consistency, learned knots, and the training they share."""
