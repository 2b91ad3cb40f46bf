"""Dense affinities of an image's patches, without training, and the walk along them."""
