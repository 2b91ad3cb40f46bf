"""SBD's images and masks as VOC's trainaug split (spec 2)."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from isim.data.download import Archive, obtain
from isim.data.files import write_label_map
from isim.data.source import Source, check_labels
from isim.data.threads import in_threads
from isim.data.voc import read_entry
from isim.errors import UserError

ARCHIVE = Archive(
    url=(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
        "semantic_contours/benchmark.tgz"
    ),
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    folder="benchmark_RELEASE/dataset",
)
# SHA-256 of the 10,582 sorted ids without underscores, joined by newlines, begins with this.
OFFICIAL_TRAINAUG = "0164ccd16f5c5c8d"


def find_sbd(root: Path, download: bool) -> Path:
    """Locate SBD's folder `dataset` (with img and cls) below `root`, or get the archive.

    Raises:
        UserError: There is none and none can be fetched; see `download.obtain`.
    """
    return obtain(ARCHIVE, root, download)


def is_official(ids: tuple[str, ...]) -> bool:
    """Whether `ids` are the 10,582 of trainaug that the literature uses."""
    text = "\n".join(sorted(ids)).replace("_", "")
    return hashlib.sha256(text.encode()).hexdigest().startswith(OFFICIAL_TRAINAUG)


def add_trainaug(source: Source, devkit: Path, dataset: Path, masks: Path) -> Source:
    """Add the split trainaug: VOC train and every SBD id in neither VOC train nor VOC val.

    SBD masks serve evaluation only; labels come from the devkit's XML. An image that a partial
    devkit lacks is taken from SBD, labelled with the classes of its mask where the XML is missing
    too.

    Args:
        source: The devkit as `voc.read_devkit` read it.
        devkit: Folder VOC2012.
        dataset: SBD's folder with img and cls.
        masks: Where converted masks go, as `<id>.png`.

    Returns:
        `source` with the further split, entries and problems (unreadable masks).

    Raises:
        UserError: `dataset` holds no masks, or `masks` cannot be written.
    """
    found = {path.stem: path for path in sorted((dataset / "cls").glob("*.mat"))}
    if not found:
        raise UserError(f"{dataset / 'cls'} holds no .mat masks; extract SBD there again")
    train = source.splits.get("train", ())
    known = {*train, *source.splits.get("val", ())}
    extra = [name for name in found if name not in known]
    convert = partial(_convert, masks)
    entries, problems = dict(source.entries), list(source.problems)
    converted = in_threads(convert, [found[name] for name in extra], "SBD masks")
    for name, result in zip(extra, converted, strict=True):
        if isinstance(result, UserError):
            problems.append(str(result))
            continue
        annotated = (devkit / "Annotations" / f"{name}.xml").exists()
        entry = read_entry(devkit, name, source.classes, labelled=annotated)
        if not annotated:
            labels = tuple(label for i, label in enumerate(source.classes, 1) if i in result)
            entry = replace(
                entry,
                labels=labels,
                problems=check_labels(labels, source.classes, str(found[name])),
            )
        if not entry.image.exists():
            entry = replace(entry, image=dataset / "img" / f"{name}.jpg")
        entries[name] = replace(entry, mask=masks / f"{name}.png")
    splits = source.splits | {"trainaug": tuple(sorted({*train, *extra}))}
    return replace(source, entries=entries, splits=splits, problems=tuple(problems))


def read_mat(path: Path) -> np.ndarray:
    """Read a mask of SBD.

    Returns:
        (H, W) uint8 class ids.

    Raises:
        UserError: The file is not what SBD's masks are.
    """
    try:
        mask = loadmat(path)["GTcls"][0]["Segmentation"][0]
        if mask.dtype != np.uint8 or mask.ndim != 2:
            raise ValueError(f"{mask.dtype} of {mask.ndim} dimensions")
    # scipy meets damage with whatever its parser stumbles over (zlib, struct, type errors ...).
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"SBD mask {path} is unreadable ({reason}); extract it again") from error
    return mask


def _convert(masks: Path, path: Path) -> set[int] | UserError:
    """Write the mask as PNG; the values in it, or the error to be listed with others."""
    try:
        mask = read_mat(path)
    except UserError as error:
        return error
    write_label_map(masks / f"{path.stem}.png", mask)
    return set(np.unique(mask).tolist())
