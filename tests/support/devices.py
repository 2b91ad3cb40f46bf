"""Devices that tests of tensors run on."""

import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def tensor(array, device):
    """Copy an array, also a view, to a device."""
    return torch.from_numpy(array.copy()).to(device)
