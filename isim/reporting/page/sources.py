"""Files that the page shows of each image, wherever stages have left them."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from isim.data import label_sets
from isim.data.prepared import Item, Prepared
from isim.params import label_set_path

# Folders below the project that a page is made from; one that is missing is left out.
READ = (
    "data/prepared",
    "data/masks",
    "data/cams",
    "data/pseudo_labels",
    "data/random_walk",
    "data/predictions",
    "reports/prepare",
    "reports/train_cam",
    "reports/random_walk",
    "reports/train_segmenter",
    "reports/evaluate",
)
# Label maps of an image that the page shows one over the other; the first is what it judges.
LAYERS = ("mask", "pseudo-label", "segmenter", "ground truth")
# Label maps that are made from tags, and what the page calls them; the first that an image has is
# its pseudo-label.
FROM_TAGS = {
    "last_round": "last round",
    "random_walk_crf": "walk + dCRF",
    "random_walk": "random walk",
}
# All steps that `Places.steps` names, in order.
STEPS = (*FROM_TAGS.values(), "segmenter", "mask")


def images(data: Prepared) -> dict[str, tuple[Item, list[str]]]:
    """List every image once, by id, with the splits that it is in; the order is that of the splits.

    One that lies in several, as train in trainaug, is of all of them.
    """
    found: dict[str, tuple[Item, list[str]]] = {}
    for split, items in data.splits.items():
        for item in items:
            found.setdefault(item.id, (item, []))[1].append(split)
    return found


class Places:
    """Folders of a project in which label maps and CAMs of an image can lie."""

    def __init__(self, root: Path, splits: Iterable[str]) -> None:
        """Look which folders there are, once for all images."""
        self._root, self._splits = root, list(splits)

    @cached_property
    def _from_tags(self) -> dict[str, list[Path]]:
        found = {}
        for name, title in FROM_TAGS.items():
            base = self._root / str(label_set_path(name))
            folders = {label_sets.folder_of(name, split, base) for split in self._splits}
            found[title] = sorted(folder for folder in folders if folder.is_dir())
        return found

    @cached_property
    def _predicted(self) -> list[Path]:
        base = self._root / "data/predictions"
        sets = [path.name for path in base.iterdir()] if base.is_dir() else []
        # One that was trained on true masks comes last.
        sets.sort(key=lambda name: (name == "ground_truth", name))
        folders = [
            f"{name}/{s}{crf}" for name in sets for s in self._splits for crf in ("_crf", "")
        ]
        return [base / folder for folder in folders if (base / folder).is_dir()]

    def mask(self, item: Item) -> Path | None:
        """Find the final label map: of data/masks, else what comes nearest to it.

        That is its pseudo-label, else a segmenter's prediction.
        """
        final = _first(item, [self._root / "data/masks"])
        return final or self.pseudo_label(item) or self.segmenter(item)

    def pseudo_label(self, item: Item) -> Path | None:
        """Find the label map that is made from the image's tags."""
        return _first(item, [folder for found in self._from_tags.values() for folder in found])

    def segmenter(self, item: Item) -> Path | None:
        """Find a segmenter's prediction, after dCRF if there is one."""
        return _first(item, self._predicted)

    def cam(self, item: Item) -> Path | None:
        """Find the CAM file."""
        folders = [self._root / "data/cams" / split for split in self._splits]
        return _first(item, folders, ".npz")

    def steps(self, item: Item) -> Mapping[str, Path]:
        """Find the label map of every stage, by what the page calls it."""
        found = {title: _first(item, folders) for title, folders in self._from_tags.items()}
        found |= {"segmenter": self.segmenter(item)}
        found |= {"mask": _first(item, [self._root / "data/masks"])}
        return {title: path for title, path in found.items() if path is not None}


def _first(item: Item, folders: Iterable[Path], suffix: str = ".png") -> Path | None:
    paths = (folder / f"{item.id}{suffix}" for folder in folders)
    return next((path for path in paths if path.exists()), None)
