"""Python interface: a few stable names for notebooks and programs (docs/python.md).

from isim import CamModel, Project, Segmenter, dense_crf
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from isim.data import files, label_sets, prepared
from isim.data.prepared import Item
from isim.errors import UserError
from isim.labels.crf import refine as crf
from isim.metrics import IGNORE
from isim.models import cam, segmenter
from isim.params import LABEL_SETS, Crf, load
from isim.passes.photographs import BySegmenter, ByTags
from isim.runtime import figures
from isim.runtime.here import Here

# Longer side, in pixels, that images are worked on at if nothing else is said.
SIDE = 1024
# Settings of `dense_crf`: those by which pseudo-labels are made (IRN, PuzzleCAM).
USUAL: dict[str, float] = {
    "steps": 10,
    "gt_prob": 0.7,
    "gaussian_sxy": 3,
    "gaussian_compat": 3,
    "bilateral_sxy": 50,
    "bilateral_srgb": 5,
    "bilateral_compat": 10,
}
Image = NDArray[np.uint8] | str | Path


@dataclass(frozen=True)
class Prediction:
    """Answer of a segmenter for an image.

    Attributes:
        label: (H, W) uint8 label map: places in `classes`.
        probabilities: (L, h, w) float32 at the size that was worked at, the image's own unless its
            longer side is above the segmenter's `side`.
        classes: Names of the L labels, the background's first.
    """

    label: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    classes: tuple[str, ...]


class Segmenter:
    """A trained segmenter."""

    def __init__(self, answers: BySegmenter) -> None:
        """Hold the network; `load` makes it."""
        self._answers = answers
        self.classes = ("background", *answers.config.classes)

    @classmethod
    def load(cls, path: str | Path, *, side: int = SIDE, precision: str = "auto") -> Self:
        """Load a checkpoint, `models/train_segmenter/<label set>/model.safetensors`.

        Images with a longer side than `side` are worked on at that. Raises UserError where the file
        is no such checkpoint.
        """
        here = Here(Path(), precision)
        return cls(BySegmenter(here, *segmenter.load(Path(path)), side=side))

    def predict(
        self,
        image: Image,
        tags: Sequence[str] | None = None,
        *,
        sixteen_bit: Sequence[float] | None = None,
    ) -> Prediction:
        """Predict an image: (H, W, 3) uint8 RGB or a file's path; with `tags` no other classes.

        `sixteen_bit`, (low, high), is the range that is shown of a file of more than 8 bits a
        channel, as the parameter `prepare.sixteen_bit`; without it such a file is refused.
        Raises UserError for an unreadable file or an unknown tag.
        """
        pixels = _pixels(image, sixteen_bit)
        ids = None if tags is None else _class_ids(tags, self.classes[1:])
        found = self._answers(pixels, ids)
        probabilities = np.zeros((len(self.classes), *found.planes.shape[1:]), np.float32)
        probabilities[found.labels] = found.planes
        return Prediction(found.label(), probabilities, self.classes)


class CamModel:
    """A trained CAM network."""

    def __init__(self, answers: ByTags) -> None:
        """Hold the network; `load` makes it."""
        self._answers = answers
        self.classes = answers.config.classes

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        scales: Sequence[float] = (1.0,),
        side: int = SIDE,
        precision: str = "auto",
    ) -> Self:
        """Load a checkpoint, `models/train_cam/model.safetensors`; arguments as for `Segmenter`.

        CAMs are summed over `scales` of the image and of its mirror image (not by method frozen).
        """
        here = Here(Path(), precision)
        network, config = cam.load(Path(path))
        return cls(ByTags(here, network, config, side=side, scales=scales, flip=True))

    def cam(
        self, image: Image, tags: Sequence[str], *, sixteen_bit: Sequence[float] | None = None
    ) -> NDArray[np.float32]:
        """CAMs (K', h, w) float32 in [0, 1] of tags, in their order; h, w as for `Prediction`.

        `sixteen_bit` is as for `Segmenter.predict`.
        Raises UserError for an unreadable file or an unknown tag.
        """
        ids = _class_ids(tags, self.classes)
        planes = self._answers.cams(_pixels(image, sixteen_bit), ids)
        places = [int(np.searchsorted(ids, self.classes.index(tag) + 1)) for tag in tags]
        return planes[places]


def dense_crf(
    image: Image,
    labels_or_probabilities: NDArray[Any],
    *,
    probabilities: bool = False,
    sixteen_bit: Sequence[float] | None = None,
    **settings: float,
) -> NDArray[Any]:
    """Refine a label map or probabilities along the edges of an image by a fully connected CRF.

    Args:
        image: (H, W, 3) uint8 RGB or a file's path.
        labels_or_probabilities: (H, W) labels 0..254, 255 = not known; or (L, H, W) floats, a
            softmax over L.
        probabilities: Return (L, H, W) float32 probabilities instead of labels; the planes are of
            the labels that occur, ascending.
        sixteen_bit: Range of an image's file, as for `Segmenter.predict`.
        settings: Values that differ from the usual ones: steps (10), gt_prob (0.7, how sure labels
            are), gaussian_sxy (3), gaussian_compat (3), bilateral_sxy (50), bilateral_srgb (5) and
            bilateral_compat (10). sxy are in pixels, srgb in levels of 8 bits.

    Returns:
        (H, W) uint8 labels.

    Raises:
        UserError: An unreadable file, an unknown setting, or shapes that do not go together.
    """
    pixels, given = _pixels(image, sixteen_bit), np.asarray(labels_or_probabilities)
    if given.shape[-2:] != pixels.shape[:2] or given.ndim not in (2, 3):
        raise UserError(
            f"the image is {pixels.shape[:2]}, what is to be refined {given.shape}; give labels "
            "(H, W) or probabilities (L, H, W) of its size"
        )
    if wrong := settings.keys() - USUAL.keys():
        raise UserError(f"no setting '{min(wrong)}'; there are {', '.join(USUAL)}")
    chosen = Crf.model_validate(USUAL | settings)
    if given.ndim == 3:
        labels = np.arange(len(given), dtype=np.uint8)
        unary = -np.log(np.maximum(given, crf.LEAST_PROBABILITY)).astype(np.float32)
    else:
        values = np.unique(given)
        labels = values[values != IGNORE].astype(np.uint8)
        places = np.full(256, IGNORE, np.uint8)
        places[labels] = np.arange(len(labels))
        unary = crf.label_energies(places[given.astype(np.uint8)], len(labels), chosen.gt_prob)
    planes = np.ones((len(labels), *pixels.shape[:2]), np.float32)
    if len(labels) > 1:
        found = crf.marginals(pixels, unary.reshape(len(labels), -1), chosen)
        planes = found.reshape(planes.shape)
    return planes if probabilities else labels[planes.argmax(0)]


class Project:
    """A project folder: what its stages have made so far."""

    def __init__(self, path: str | Path = ".") -> None:
        """Read the lists of `isim prepare`. Raises UserError where it has not run."""
        self.root = Path(path)
        self._data = prepared.load(self.root)
        self._items = {i.id: i for items in self._data.splits.values() for i in items}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes, without the background."""
        return self._data.classes

    @property
    def images(self) -> dict[str, Path]:
        """Files of all images by id."""
        return {id_: item.image for id_, item in self._items.items()}

    @property
    def sixteen_bit(self) -> tuple[float, float] | None:
        """Range shown of files of more than 8 bits (`prepare.sixteen_bit`); None: refused."""
        path = self.root / "params.yaml"
        shown = load(path).prepare.sixteen_bit if path.exists() else "refuse"
        return None if shown == "refuse" else shown

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """Ids of the images of each split."""
        return {k: tuple(item.id for item in items) for k, items in self._data.splits.items()}

    @property
    def tags(self) -> dict[str, tuple[str, ...] | None]:
        """Tags of all images by id: none at all for (), not known for None."""
        return {id_: self._tags(item) for id_, item in self._items.items()}

    @property
    def masks(self) -> dict[str, Path]:
        """Files of the final masks (`isim masks`) by id; only those that are there."""
        paths = {id_: self.root / f"data/masks/{id_}.png" for id_ in self._items}
        return {id_: path for id_, path in paths.items() if path.exists()}

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Figures of the stages that have run, `reports/<stage>/figures.csv`, by stage."""
        folder = self.root / "reports"
        there = {p.parent for name in (figures.FILE, figures.OLD) for p in folder.rglob(name)}
        return {p.relative_to(folder).as_posix(): figures.read(p) for p in sorted(there)}

    @property
    def label_sets(self) -> tuple[str, ...]:
        """Names of the label sets that there are, rounds included."""
        rounds = sorted(path.name for path in self.root.glob("data/pseudo_labels/round_*"))
        return tuple(name for name in (*LABEL_SETS, *rounds) if self._stored(name))

    def label(self, id_: str, label_set: str | None = None) -> NDArray[np.uint8]:
        """Read an image's (H, W) uint8 label map: its final mask, or that of a label set.

        Raises UserError where there is none.
        """
        stored = self.masks if label_set is None else self._stored(label_set)
        if id_ not in stored:
            what = "mask" if label_set is None else f"label map of {label_set}"
            raise UserError(f"image {id_} has no {what} in {self.root}")
        return files.read_label_map(stored[id_])

    def _tags(self, item: Item) -> tuple[str, ...] | None:
        if item.image_label is None:
            return None
        return tuple(self.classes[place - 1] for place in item.class_ids)

    def _stored(self, name: str) -> Mapping[str, Path]:
        try:
            return label_sets.available(name, self._data.splits, self.root)
        except UserError:
            return {}


def trained(root: Path, *, by_cam: bool = False) -> Path:
    """Find a project's segmenter (`masks.segmenter`), or its CAM network.

    Raises UserError where there is none.
    """
    place = "train_cam"
    if not by_cam:
        path = root / "params.yaml"
        name = load(path).masks.segmenter if path.exists() else "*"
        place = f"train_segmenter/{name}"
    path = root / "models" / place / "model.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; run `dvc repro` in the project, or give --model PATH")
    return path


def _pixels(image: Image, shown: Sequence[float] | None) -> NDArray[np.uint8]:
    if shown is not None and not (len(shown) == 2 and shown[0] < shown[1]):
        raise UserError(f"sixteen_bit: {shown} is no range; give (low, high), such as (0, 65535)")
    if isinstance(image, str | Path):
        return files.read_photograph(Path(image), shown)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"give (H, W, 3) uint8 RGB, not {image.dtype} of shape {image.shape}")
    return image


def _class_ids(tags: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    if isinstance(tags, str):
        raise UserError(f"give a list of tags, such as ['{tags}']")
    for tag in tags:
        if tag not in classes:
            raise UserError(f"the model knows no '{tag}'; it knows {', '.join(classes)[:200]}")
    return np.array(sorted({classes.index(tag) + 1 for tag in tags}), np.int64)
