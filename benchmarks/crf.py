"""The compiled dCRF against pydensecrf, on one core, for 2 to 21 labels.

Both start from the same seeds (21 labels: probabilities): blurred ground truth with smooth noise,
about as coarse as CAMs. Timed are whole calls of `refine` and `refine_soft` by one thread, in turn.
Fidelity, over all images: share of pixels whose labels agree, in the mean and of the worst image,
and the largest difference of a probability.

Printed besides: which share of a core's rates the steps' pixels need at least. The blur, which
depends on the image, and the lattices are not counted, but their time is.

    python benchmarks/crf.py
    ISIM_BENCH_AVX512=0 python benchmarks/crf.py    # as on a CPU with AVX2 alone
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import harness
import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.data.prepared import Item
from isim.experiments import preset
from isim.labels.crf import refine as crf
from isim.metrics import BACKGROUND, IGNORE
from isim.params import Crf

PAPER = preset.parameters("voc-deeplabcam-resnet50")
# Labels, kernels, what the ratio should be. The segmenter's dCRF has the narrowest kernel there
# is, of a pixel.
CASES = (
    (2, PAPER.crf, ">= 4"),
    (3, PAPER.crf, ">= 4"),
    (4, PAPER.crf, ""),
    (6, PAPER.crf, ""),
    (21, PAPER.crf, ">= 2.5"),
    (21, PAPER.train_segmenter.crf, ">= 2.5"),
)


@dataclass(frozen=True)
class Sample:
    """An image with probabilities (n, H, W), and the seed that they make of classes 0 .. n - 1."""

    image: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    seed: NDArray[np.uint8]


def sample(item: Item, count: int, number: int) -> Sample:
    """Make probabilities of `count` labels, its own first; `number` seeds the noise."""
    assert item.mask is not None
    rng = np.random.default_rng(number)
    truth = files.read_label_map(item.mask)
    present = np.setdiff1d(np.unique(truth), [BACKGROUND, IGNORE]).tolist()
    others = [label for label in range(1, 256) if label not in present]
    planes = []
    for label in [BACKGROUND, *(present + others)[: count - 1]]:
        coarse = rng.normal(0, 1, (8, 8)).astype(np.float32)
        noise = cv2.resize(coarse, truth.shape[::-1], interpolation=cv2.INTER_CUBIC)
        own = cv2.GaussianBlur((truth == label).astype(np.float32), (0, 0), 15)
        planes.append(6 * own + noise)
    scores = np.exp(np.stack(planes))
    probabilities = scores / scores.sum(0)
    return Sample(
        files.read_image(item.image), probabilities, probabilities.argmax(0).astype(np.uint8)
    )


def refine(samples: list[Sample], settings: Crf, backend: str) -> None:
    """Refine all samples by a backend."""
    count = len(samples[0].probabilities)
    classes = np.arange(1, count)
    with harness.crf_backend(backend):
        for each in samples:
            if count <= 6:
                crf.refine(each.image, each.seed, classes, settings)
            else:
                crf.refine_soft(each.image, each.probabilities, settings)


def marginals(each: Sample, settings: Crf, backend: str) -> NDArray[np.float32]:
    """Compute a sample's (n, H * W) probabilities by a backend."""
    energies = -np.log(np.maximum(each.probabilities, crf.LEAST_PROBABILITY))
    with harness.crf_backend(backend):
        return crf.marginals(each.image, energies.reshape(len(energies), -1), settings)


def fidelity(samples: list[Sample], settings: Crf) -> str:
    """Say in words how equal both backends' results are."""
    agreement, worst = [], 0.0
    for each in samples:
        found, expected = (marginals(each, settings, name) for name in ("compiled", "pydensecrf"))
        agreement.append((found.argmax(0) == expected.argmax(0)).mean())
        worst = max(worst, float(np.abs(found - expected).max()))
    return (
        f"labels agree on {100 * np.mean(agreement):.4f} % (worst {100 * min(agreement):.4f} %), "
        f"max dQ {worst:.0e}"
    )


def shares(samples: list[Sample], settings: Crf) -> str:
    """Say in words which share of a core's rates the pixels of all samples need.

    A pixel has three vertices in one lattice and six in the other, with a number and a weight
    each. A step reads and writes one number a label at each, one less where they sum to one.
    """
    vertices = settings.steps * sum(each.seed.size for each in samples) * (3 + 6)
    numbers = len(samples[0].probabilities) - 1
    action = partial(refine, samples, settings, "compiled")
    return harness.shares(action, vertices * numbers * 2 * 2, vertices * 8)


def main() -> None:
    """Print a row a number of labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    flops, moved = harness.peak()
    print(harness.machine())
    print(f"a core: {flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.1f} GB/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = harness.items(options.images, Path(folder))
        # Largest first, as the stages take them: images of one size follow one another.
        chosen.sort(key=lambda item: files.image_size(item.image), reverse=True)
        for count, settings, goal in CASES:
            samples = [sample(item, count, number) for number, item in enumerate(chosen)]
            kernel = "" if settings is PAPER.crf else ", sxy 1"
            case = harness.Case(
                f"dCRF, {count} labels{kernel}, one core",
                harness.data_name(chosen),
                goal,
                fidelity(samples, settings),
            )
            sides = (partial(refine, samples, settings, by) for by in ("pydensecrf", "compiled"))
            found = harness.compare(case, *sides, units=len(samples), repeats=options.repeats)
            print(f"{case.part}: {shares(samples, settings)}", flush=True)
            rows.append(found)
    harness.report(rows)


if __name__ == "__main__":
    main()
