"""Checkpoints of small networks as the stages write them, by the names of `support.networks`."""

import torch
from support.networks import config_of, frozen_network_of, network_of

from isim.models import common

SEGMENTERS = ("frozen_segmenter", "deeplabv2")
CAMS = ("frozen", "deeplabcam")


def save_all(folder):
    """Write all of them; returns their paths by name."""
    return {name: save(name, folder / name) for name in (*SEGMENTERS, *CAMS)}


def save(name, path):
    """Write a checkpoint of a network that tells classes apart."""
    is_frozen = name.startswith("frozen")
    network = frozen_network_of(name) if is_frozen else network_of(name).eval()
    generator = torch.Generator().manual_seed(1)
    if name == "deeplabv2":
        for branch in network.head.branches:
            branch.weight.data.normal_(std=0.1, generator=generator)
    if name == "deeplabcam":
        network.classifier.weight.data.normal_(generator=generator)
    scales = {"feature_scales": (0.75, 1.0)} if is_frozen else {}
    common.save(path, network, config_of(name, **scales))
    return path
