"""What the dCRF is tried on: settings, images, seeds, energies; and pydensecrf's answers."""

import cv2
import numpy as np
import pydensecrf.densecrf as densecrf
import torch
import torch.nn.functional as F

from isim.experiments import preset
from isim.labels.crf import batched

# Spec 5, sets `labels` and `segmenter`.
DEMO = preset.parameters("demo")
LABELS, SEGMENTER = DEMO.train_cam.crf, DEMO.train_segmenter.crf


def changed(**values):
    return LABELS.model_copy(update=values)


def photo(size, seed=0):
    """(H, W, 3): a few smooth regions with noise, as photographs are."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width] / 20
    planes = [np.sin(x * rng.uniform(0.3, 2) + y * rng.uniform(0.3, 2)) for _ in range(3)]
    image = 120 + 60 * np.sign(planes[0])[..., None] + 30 * np.stack(planes, -1)
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def coarse(size, labels, seed=0):
    """(H, W) uint8: some of the labels, in blocks of 8 pixels."""
    blocks = np.random.default_rng(seed).choice(labels, [-(-side // 8) for side in size])
    return np.kron(blocks, np.ones((8, 8), int))[: size[0], : size[1]].astype(np.uint8)


def softmax(size, count, seed=0):
    """(count, H, W): smooth over the image, certain in its first rows."""
    scores = np.random.default_rng(seed).normal(0, 3, (count, 5, 7)).astype(np.float32)
    scores = np.stack([cv2.resize(plane, size[::-1]) for plane in scores])
    scores[0, :3] += 200
    exponentials = np.exp(scores - scores.max(0))
    return exponentials / exponentials.sum(0)


def energies(size, count, seed=0):
    """(count, H * W)."""
    return -np.log(np.maximum(softmax(size, count, seed), 1e-5)).reshape(count, -1)


def expected(image, unary, settings):
    """(L, H * W) of pydensecrf."""
    field = densecrf.DenseCRF2D(image.shape[1], image.shape[0], len(unary))
    field.setUnaryEnergy(unary)
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=image,
        compat=settings.bilateral_compat,
    )
    return np.array(field.inference(settings.steps))


@torch.no_grad()
def marginals(images, unaries, settings):
    """(n, H, W) probabilities each, as the tensors' labels come from; n may differ."""
    results = [torch.ones(1, *image.shape[1:], device=image.device) for image in images]
    for batch in batched._batches(images, [len(unary) for unary in unaries], settings):
        scores = -torch.cat([unaries[place] for place in batch.places], 1).T
        logits = batched._infer(batch, scores, settings)
        batch.hand_out(F.pad(logits, (0, 1)).softmax(1), results)
    return results
