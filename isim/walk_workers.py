"""What runs in workers for the random walk: walk, dCRF, scoring, writing (no torch)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.labels import crf, random_walk
from isim.params import RandomWalk
from isim.workers import Counts, score_and_write


@dataclass(frozen=True)
class WalkTask:
    """One image's CAMs on their way to a pseudo-label by random walk.

    `cam` is a file of `files.write_cam`, `class_ids` (K',) int64 labels 1..K, `affinity` (P, h, w)
    float32 within `radius`, `mask` the ground truth if there is one, `out` the path of the label
    map and `refined` of the one after dCRF (None: without), `num_labels` L. Where a GPU has
    walked, `walked` are its planes and the size of the image; where none has, it is None and
    `affinity` is there.
    """

    id: str
    image: Path
    cam: Path
    class_ids: NDArray[np.int64]
    affinity: NDArray[np.float32] | None
    walked: tuple[NDArray[np.float32], tuple[int, int]] | None
    radius: int
    settings: RandomWalk
    mask: Path | None
    out: Path
    refined: Path | None
    num_labels: int


@dataclass(frozen=True)
class WalkResult:
    """Scores of one image before and after dCRF; counts are (row, column, pixels)."""

    id: str
    walk_counts: Counts
    crf_counts: Counts


def planes_to_walk(
    task: WalkTask, map_size: tuple[int, int]
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Read an image's CAMs at the size of its affinities, after the background if that walks.

    Returns:
        (M, h, w), and (H, W) of the image.

    Raises:
        UserError: The file is missing, unreadable or of another image.
    """
    planes, size = files.read_cam_of(task.cam, task.image, task.class_ids)
    planes = random_walk.resize(planes, map_size)
    if task.settings.background == "power":
        background = random_walk.background_plane(planes, task.settings.alpha)
        planes = np.concatenate([background[None], planes])
    return planes, size


def walk_image(task: WalkTask) -> WalkResult:
    """Walk an image's CAMs, write the label maps before and after dCRF, and score both.

    Raises:
        UserError: A file is missing, unreadable or of another image, or cannot be written.
    """
    settings = task.settings
    if task.walked is not None:
        walked, size = task.walked
    else:
        assert task.affinity is not None
        planes, size = planes_to_walk(task, task.affinity.shape[1:])
        moves = random_walk.transition(task.affinity, task.radius, settings.beta)
        walked = random_walk.walk(planes, moves, settings.steps_log2)
    if settings.background == "power":
        label = random_walk.label_map(walked[1:], task.class_ids, size, walked[0])
    else:
        label = random_walk.label_map(walked, task.class_ids, size, settings.threshold)
    maps = [(task.out, label)]
    if task.refined is not None:
        image = files.read_image(task.image)
        maps.append((task.refined, crf.refine(image, label, task.class_ids, settings.crf)))
    counts = score_and_write(maps, task.mask, task.num_labels)
    return WalkResult(task.id, counts[0], counts[1] if len(counts) > 1 else [])
