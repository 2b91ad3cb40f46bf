"""Small images of several sizes with masks and labels, and results that are nearly right."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.crf import coarse, photo

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.seeds import seeds

# (H, W); some follow one another when sorted by size, none is a multiple of every stride.
SIZES = ((48, 64), (37, 53), (64, 48), (48, 64), (40, 40), (48, 64), (37, 53))


def make(folder, sizes=SIZES):
    """Write images and masks of two neighbours of the classes 1..3, the third of none at all."""
    items = []
    for number, size in enumerate(sizes):
        label = np.zeros(3, np.float32)
        label[[number % 3, (number + 1) % 3]] = number != 2
        item = Item(f"{number:02d}", folder / f"{number:02d}.png", folder / f"m{number}.png", label)
        Image.fromarray(photo(size, number)).save(item.image)
        mask = coarse(size, [0, *item.class_ids, *item.class_ids], number)
        mask[-1] = 255
        files.write_label_map(item.mask, mask)
        items.append(item)
    return tuple(items)


def put_results(folder, items, stride=4):
    """Write label maps and CAMs at a stride; return the folder."""
    for number, item in enumerate(items):
        truth = opened(item)[2]
        files.write_label_map(folder / f"{item.id}.png", np.roll(truth % 255, 3))
        planes = 0.7 * (truth[::stride, ::stride] == item.class_ids[:, None, None])
        planes += np.random.default_rng(number).uniform(0, 0.3, planes.shape)
        files.write_cam(folder / f"{item.id}.npz", planes, item.class_ids, truth.shape)
    return folder


def opened(item):
    """An image (H, W, 3), as a tensor (1, 3, H, W), and its mask (H, W)."""
    image = files.read_image(item.image)
    return image, torch.from_numpy(image).permute(2, 0, 1)[None], files.read_label_map(item.mask)


def seeded(item, folder, threshold):
    """Seed of the CAMs that a folder has of an item."""
    planes, ids, size = files.read_cam(folder / f"{item.id}.npz")
    return seeds.seed(seeds.grow(planes, size), ids, threshold)


def counted(items, labels):
    """(4, 4) confusion matrix of label maps: one for each item, or files in a folder."""
    if isinstance(labels, Path):
        labels = [files.read_label_map(labels / f"{item.id}.png") for item in items]
    truths = [opened(item)[2] for item in items]
    return sum(map(metrics.confusion_matrix, truths, labels, [4] * len(items)))
