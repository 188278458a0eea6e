"""Every figure that judges a model: distances of feature sets, paired distances, copying, accuracy; with intervals."""
