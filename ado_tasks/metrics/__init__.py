"""Every figure that judges a model: distances between sets of features, paired distances, copying, accuracy, and their intervals."""
