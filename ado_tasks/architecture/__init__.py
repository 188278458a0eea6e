"""The search for a smaller U-Net: the space, what a candidate inherits, how it is tuned, raced and chosen."""
