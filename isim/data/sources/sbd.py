"""SBD's images and masks as VOC's trainaug split (spec 2)."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from isim import errors
from isim.data.files import write_label_map
from isim.data.problems import Problem
from isim.data.sources.devkit import read_entry
from isim.data.sources.download import Archive
from isim.data.sources.source import Source, check_labels
from isim.errors import UserError
from isim.runtime.helpers import in_threads
from isim.runtime.identity import sha256

ARCHIVE = Archive(
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    folder="benchmark_RELEASE/dataset",
)
# SHA-256 of the literature's 10,582 ids, sorted, without underscores, a line each, begins so.
OFFICIAL_TRAINAUG = "0164ccd16f5c5c8d"


def add_trainaug(source: Source, devkit: Path, dataset: Path, masks: Path) -> Source:
    """Add the split trainaug: VOC train and every SBD id in neither VOC train nor VOC val.

    SBD masks serve evaluation only; labels come from the devkit's XML. An image that a partial
    devkit lacks is taken from SBD, labelled with the classes of its mask where the XML is missing
    too. Unreadable masks are problems; a note and a figure tell whether the split is the official
    one. `source` is the devkit as `read_devkit` read it, `dataset` SBD's folder with img and cls;
    converted masks go to `masks`/<id>.png.

    Raises:
        UserError: `dataset` holds no masks, or `masks` cannot be written.
    """
    found = {path.stem: path for path in sorted((dataset / "cls").glob("*.mat"))}
    if not found:
        raise UserError(f"{dataset / 'cls'} holds no .mat masks; extract SBD there again")
    train = source.splits.get("train", ())
    known = {*train, *source.splits.get("val", ())}
    extra = [name for name in found if name not in known]
    entries, problems = dict(source.entries), list(source.problems)
    convert, paths = partial(_convert, masks), [found[name] for name in extra]
    converted = in_threads(convert, paths, "SBD masks")
    for name, path, shown in zip(extra, paths, converted, strict=True):
        if isinstance(shown, str):
            problems.append(Problem("unreadable mask", shown, str(path)))
            continue
        annotated = (devkit / "Annotations" / f"{name}.xml").exists()
        entry = read_entry(devkit, name, source.classes, labelled=annotated)
        if not annotated:
            labels = tuple(label for i, label in enumerate(source.classes, 1) if i in shown)
            faults = check_labels(labels, source.classes, str(path))
            entry = replace(entry, labels=labels, problems=faults)
        if not entry.image.exists():
            entry = replace(entry, image=dataset / "img" / f"{name}.jpg")
        entries[name] = replace(entry, mask=masks / f"{name}.png")
    trainaug = tuple(sorted({*train, *extra}))
    digest = sha256("\n".join(trainaug).replace("_", "").encode())
    official = digest.startswith(OFFICIAL_TRAINAUG)
    verb = "is" if official else "is a part or variant of, not"
    return replace(
        source,
        entries=entries,
        splits=source.splits | {"trainaug": trainaug},
        problems=tuple(problems),
        notes=(*source.notes, f"trainaug {verb} the official list of 10,582 images"),
        figures={"trainaug.official": int(official)},
    )


def _convert(masks: Path, path: Path) -> set[int] | str:
    """Write an SBD mask as PNG; return the values in it, or what is wrong with the file."""
    # Half of what importing the readers would take, and only SBD needs it.
    from scipy.io import loadmat

    try:
        mask: np.ndarray = loadmat(io.BytesIO(errors.contents(path)))["GTcls"][0]["Segmentation"][0]
        if mask.dtype != np.uint8 or mask.ndim != 2:
            raise ValueError(f"{mask.dtype} of {mask.ndim} dimensions")
    # scipy meets damage with whatever its parser stumbles over (zlib, struct, type errors ...).
    except Exception as error:
        return f"SBD mask {path} is unreadable ({errors.reason(error)}); extract it again"
    write_label_map(masks / f"{path.stem}.png", mask)
    return set(np.unique(mask).tolist())
