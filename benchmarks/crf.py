"""The compiled dCRF against pydensecrf, on one core, for 2 to 21 labels.

Both start from the same seeds (21 labels: probabilities): blurred ground truth with smooth noise,
about as coarse as CAMs. Timed are whole calls of `refine` and `refine_soft` by one thread, in turn.
Fidelity, over all images: share of pixels whose labels agree, in the mean and of the worst image,
and the largest difference of a probability.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import harness
import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.data.dataset import Item
from isim.labels import crf
from isim.params import Crf

# Spec 5, sets `labels` and `segmenter`; the second with the narrowest kernel there is, of a pixel.
LABELS = Crf(
    backend="compiled",
    steps=10,
    gt_prob=0.7,
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=50,
    bilateral_srgb=5,
    bilateral_compat=10,
)
SEGMENTER = LABELS.model_copy(
    update={
        "gaussian_sxy": 1,
        "bilateral_sxy": 67,
        "bilateral_srgb": 3,
        "bilateral_compat": 4,
    }
)
# Labels, kernels, what the ratio should be.
CASES = (
    (2, LABELS, ">= 4"),
    (3, LABELS, ">= 4"),
    (4, LABELS, ""),
    (6, LABELS, ""),
    (21, LABELS, ">= 2.5"),
    (21, SEGMENTER, ">= 2.5"),
)


@dataclass(frozen=True)
class Sample:
    """An image with probabilities (n, H, W), and the seed that they make of classes 0 .. n - 1."""

    image: NDArray[np.uint8]
    probabilities: NDArray[np.float32]

    @property
    def seed(self) -> NDArray[np.uint8]:
        """(H, W) most probable labels."""
        return self.probabilities.argmax(0).astype(np.uint8)


def sample(item: Item, count: int, number: int) -> Sample:
    """Make probabilities of `count` labels, its own first; `number` seeds the noise."""
    assert item.mask is not None
    rng = np.random.default_rng(number)
    image = files.read_image(item.image)
    truth = files.read_label_map(item.mask)
    present = np.setdiff1d(np.unique(truth), [0, files.IGNORE]).tolist()
    others = [label for label in range(1, 256) if label not in present]
    planes = []
    for label in [0, *(present + others)[: count - 1]]:
        coarse = rng.normal(0, 1, (8, 8)).astype(np.float32)
        noise = cv2.resize(coarse, truth.shape[::-1], interpolation=cv2.INTER_CUBIC)
        own = cv2.GaussianBlur((truth == label).astype(np.float32), (0, 0), 15)
        planes.append(6 * own + noise)
    scores = np.exp(np.stack(planes))
    return Sample(image, scores / scores.sum(0))


def refiner(samples: list[Sample], settings: Crf, backend: str) -> Callable[[], object]:
    """One pass over the samples by a backend."""
    settings = settings.model_copy(update={"backend": backend})
    count = len(samples[0].probabilities)
    classes = np.arange(1, count)
    seeds = [each.seed for each in samples]

    def run() -> None:
        for each, seed in zip(samples, seeds, strict=True):
            if count <= 6:
                crf.refine(each.image, seed, classes, settings)
            else:
                crf.refine_soft(each.image, each.probabilities, settings)

    return run


def fidelity(samples: list[Sample], settings: Crf) -> str:
    """How equal both backends' results are, in words."""
    agreement, worst = [], 0.0
    for each in samples:
        energies = -np.log(np.maximum(each.probabilities, 1e-5)).reshape(
            len(each.probabilities), -1
        )
        found, expected = (
            crf.marginals(each.image, energies, settings.model_copy(update={"backend": backend}))
            for backend in ("compiled", "pydensecrf")
        )
        agreement.append((found.argmax(0) == expected.argmax(0)).mean())
        worst = max(worst, float(np.abs(found - expected).max()))
    return (
        f"labels agree on {100 * np.mean(agreement):.4f} % (worst {100 * min(agreement):.4f} %), "
        f"max dQ {worst:.0e}"
    )


def main() -> None:
    """Print a row a number of labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = harness.items(options.images, Path(folder))
        # Largest first, as the stages take them: images of one size follow one another.
        chosen.sort(key=lambda item: files.image_size(item.image), reverse=True)
        for count, settings, goal in CASES:
            samples = [sample(item, count, number) for number, item in enumerate(chosen)]
            kernel = "" if settings is LABELS else ", sxy 1"
            rows.append(
                harness.compare(
                    f"dCRF, {count} labels{kernel}, one core",
                    harness.data_name(chosen),
                    refiner(samples, settings, "pydensecrf"),
                    refiner(samples, settings, "compiled"),
                    len(samples),
                    options.repeats,
                    goal,
                    fidelity(samples, settings),
                )
            )
    harness.report(rows)


if __name__ == "__main__":
    main()
