"""Random walk along affinities, and the pixel pairs that affinity is about."""
