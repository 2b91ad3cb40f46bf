"""Affinities that the random walk is tried on."""

import numpy as np

from isim.labels.walk.pairs import half_disc, overlap


def affinities(size, radius, value):
    """(P, h, w): values of index pairs; what is outside must not be read, and is no number."""
    affinity = np.full((len(half_disc(radius)), *size), np.nan, np.float32)
    for plane, offset in zip(affinity, half_disc(radius), strict=True):
        here, there = overlap(offset, *size)
        plane[here] = value(here, there)
    return affinity


def random_affinities(size, radius=5, seed=0, low=0.0):
    """(P, h, w) in low .. 1."""
    rng = np.random.default_rng(seed)
    pixels = np.empty(size)
    return affinities(size, radius, lambda here, _: rng.uniform(low, 1, pixels[here].shape))


def regional_affinities(regions, alike, unlike):
    """(34, h, w): one value between pixels of a region, one between those of two."""
    return affinities(
        regions.shape,
        5,
        lambda here, there: np.where(regions[here] == regions[there], alike, unlike),
    )
