"""What `evaluate` is made of: the scores of one variant, the comparison of step grids, and the pictures of both."""
