"""Ways to make a diffusion model cheaper: progressive distillation, learned schedules, and the training step they share."""
