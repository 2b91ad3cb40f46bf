"""Label sets that segmenters train on: the file that holds an image's label map (spec 7)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from isim.data.prepared import Item
from isim.errors import UserError
from isim.params import label_set_path

# Stages that make the folders of `label_set_path`; train_cam makes the others.
_MAKERS = {"data/cams": "export-cams", "data/random_walk": "random-walk"}


def sources(name: str, split: str, items: Sequence[Item], root: Path) -> dict[str, Path]:
    """Find the file of each image's label map, by id: a PNG or, for `seeds`, a CAM file.

    `name` is one that `params.label_set_path` knows, `split` the one that `items` are of. Images
    without a label map are left out.

    Raises:
        UserError: The label set is not there, or has nothing for any of the items.
    """
    if name == "ground_truth":
        found = {item.id: item.mask for item in items if item.mask is not None}
        remedy = "give the images masks, or train on another label set"
    else:
        maker = _MAKERS.get(str(label_set_path(name)), "train-cam")
        crf = ", with crf_after: true" if name.endswith("_crf") else ""
        remedy = f"run `isim {maker}` first, for split '{split}'{crf}"
        folder = folder_of(name, split, root / str(label_set_path(name)))
        if not folder.is_dir():
            raise UserError(f"label set '{name}': {folder} is missing; {remedy}")
        suffix = ".npz" if name == "seeds" else ".png"
        there = {path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}")}
        found = {i.id: folder / f"{i.id}{suffix}" for i in items if f"{i.id}{suffix}" in there}
    if not found:
        raise UserError(
            f"label set '{name}': none of the {len(items)} images of split '{split}' has a label "
            f"map; {remedy}"
        )
    return found


def available(name: str, splits: Mapping[str, Sequence[Item]], root: Path) -> dict[str, Path]:
    """Find the label maps that a label set has of images of any split, by id; some have none.

    Raises:
        UserError: There is none at all; the error is that of the first split.
    """
    found: dict[str, Path] = {}
    errors: list[UserError] = []
    for split, items in splits.items():
        try:
            found |= sources(name, split, items, root)
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def folder_of(name: str, split: str, base: Path) -> Path:
    """Name the folder, below a label set's `base`, of a split's label maps or CAMs."""
    # A round is of one split, the others have a folder a split.
    if name.startswith("round_"):
        return base
    if name == "last_round":
        # By number: as text, round_100 comes before round_99.
        numbers = [int(path.name[6:]) for path in base.glob("round_*") if path.name[6:].isdigit()]
        return base / f"round_{max(numbers, default=1):02d}"
    return base / (f"{split}_crf" if name.endswith("_crf") else split)


def require_maps(folder: Path, items: Sequence[Item]) -> None:
    """Check that a folder has a label map of each item, for `train_cam.start`. UserError if not."""
    missing = [item.id for item in items if not (folder / f"{item.id}.png").is_file()]
    if missing:
        raise UserError(
            f"train_cam.start: {folder} has no label map of {len(missing)} of {len(items)} images, "
            f"such as {missing[0]}.png; give a folder with one of each, or none"
        )
