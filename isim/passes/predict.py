"""Masks of any image files by a trained network: `isim predict`."""

import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.data.formats import labelled, labels, listing, overlay
from isim.data.formats.listing import Listing, Names
from isim.data.formats.tagged import NONE_NAME, Tagged
from isim.errors import UserError
from isim.experiments import preset
from isim.labels.clean.clean import clean
from isim.metrics import IGNORE
from isim.models import cam, segmenter
from isim.params import Params, load
from isim.passes.photographs import Answer, BySegmenter, ByTags
from isim.runtime import atomic, progress
from isim.runtime.here import Here

# The classes of an image where they are known, None where they are not.
Known = NDArray[np.int64] | None
Answers = Callable[[NDArray[np.uint8], Known], Answer]


@dataclass(frozen=True)
class Options:
    """Wishes of one who predicts; those that are None are the project's, or the package's own.

    `model` is a checkpoint of train_segmenter or, `by_cam`, of train_cam.
    """

    model: Path
    by_cam: bool = False
    crf: bool = False
    overlay: bool = False
    probabilities: bool = False
    tags: Path | None = None
    min_confidence: float = 0.0
    threshold: float | None = None
    side: int | None = None
    cleaned: bool = True


def run(paths: Sequence[Path], out: Path, options: Options, root: Path) -> int:
    """Predict files, and those below folders, to `<out>/<id>.png`; returns how many it could not.

    An id is the path relative to the folder that was given, without suffix, in one Unicode form
    (NFC). A file of more than 8 bits is shown by `prepare.sixteen_bit`. A file that cannot be
    read, or has no tags where they are needed, is told and left out.

    Raises UserError for options that do not go together, no images, an `out` in which masks would
    lie beside images, no such model, or a failed write.
    """
    if options.by_cam and options.tags is None:
        raise UserError("--cam needs --tags FILE: a CAM is that of a tag")
    if options.threshold is not None and not options.by_cam:
        raise UserError("--threshold is of --cam: a segmenter has none; leave it out")
    if options.by_cam and not options.crf and (options.min_confidence or options.probabilities):
        raise UserError("CAMs are no probabilities; add --crf, whose result has them")
    params = _parameters(root)
    chosen = _images(paths, out)
    answer, classes = _network(options, params, root)
    tags = None if options.tags is None else _known(options.tags, chosen, classes)
    names = ("background", *classes)
    wanted = params.prepare.sixteen_bit
    shown = None if wanted == "refuse" else wanted
    atomic.write_json(out / "classes.json", files.class_list(names))
    left_out = 0
    for id_, path in progress.track(chosen.items(), "masks"):
        try:
            image = files.read_photograph(path, shown)
            if options.by_cam and tags is not None and id_ not in tags:
                raise UserError(f"{path} has no row in {options.tags}")
        except UserError as error:
            print(f"isim: left out: {error}", file=sys.stderr)
            left_out += 1
            continue
        found = answer(image, None if tags is None else tags.get(id_))
        _write(found, image, out / id_, options, params=params, names=names)
    print(f"{out}: {len(chosen) - left_out} masks", file=sys.stderr)
    if left_out:
        print(f"isim: {left_out} of {len(chosen)} files were left out", file=sys.stderr)
    return left_out


def _parameters(root: Path) -> Params:
    """Return the project's parameters; outside one those of the preset `demo`."""
    path = root / "params.yaml"
    return load(path) if path.exists() else preset.parameters("demo")


def _images(paths: Sequence[Path], out: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            # What an earlier run wrote is no image to predict.
            given = labelled.images_below(path, [out])
        elif path.exists():
            given = {unicodedata.normalize("NFC", path.stem): path}
        else:
            raise UserError(f"{path} does not exist; name image files or folders of them")
        for id_, image in given.items():
            other = found.setdefault(id_, image)
            if other is not image and other.resolve() != image.resolve():
                raise UserError(f"{other} and {image} would have one mask; rename one of them")
    if not found:
        raise UserError(f"no images in {', '.join(map(str, paths))}; name files or other folders")
    _require_apart(found, out, [path for path in paths if path.is_dir()])
    return found


def _require_apart(images: Mapping[str, Path], out: Path, folders: Sequence[Path]) -> None:
    """Check that no mask would lie beside images: a later run would take it for one, too.

    A folder of masks below that of the images is passed over, if it holds nothing else.
    """
    place, given = out.resolve(), [folder.resolve() for folder in folders]
    beside = {path.parent.resolve() for path in images.values()}
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    own = (out / "classes.json").exists() or not any(map(place.is_relative_to, given))
    if (
        any(folder.is_relative_to(place) for folder in given)
        or beside & {(out / id_).parent.resolve() for id_ in images}
        or (not own and out.is_dir() and listing.images(out).images)
    ):
        raise UserError(
            f"--out {out}: masks would lie beside images, and be taken for some later; name a "
            f"folder of their own, such as {out / 'masks'}"
        )


def _network(options: Options, params: Params, root: Path) -> tuple[Answers, tuple[str, ...]]:
    """Load the network and tell how it answers."""
    given, here = params.masks, Here(root / ".isim", params.masks.precision)
    side = options.side or given.side
    if not options.by_cam:
        network, config = segmenter.load(options.model)
        scales, flip = given.test_scales, given.test_flip
        answers = BySegmenter(here, network, config, side=side, scales=scales, flip=flip)
        return answers, config.classes
    model, about = cam.load(options.model)
    by_tags = ByTags(here, model, about, side=side, scales=given.scales, flip=given.flip)

    def answer(image: NDArray[np.uint8], known: Known) -> Answer:
        return by_tags(image, np.zeros(0, np.int64) if known is None else known, options.threshold)

    return answer, about.classes


def _known(
    path: Path, images: Mapping[str, Path], classes: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Find the classes of images in a file of tags, by id; tells how many have none.

    Raises UserError for a tag that is no class, and a name that several images have.
    """
    given = labels.of_file(path).tags
    for problem in given.problems:
        if problem.error:
            raise UserError(problem.what)
    names, nothing, unmatched = Names(Listing(images, {})), 0, 0
    rows: dict[str, list[Tagged]] = {}
    for row in given.rows:
        ids = names.find(row.image) or names.find(row.otherwise)
        if len(ids) > 1:
            raise UserError(
                f"{row.where}: {row.image} is the name of several images; write its folder"
            )
        unmatched += not ids
        for id_ in ids:
            rows.setdefault(id_, []).append(row)
    tags: dict[str, set[str]] = {}
    for id_, found in rows.items():
        own = _own(found, id_, images[id_])
        unmatched += len(found) - len(own)
        for row in own:
            if row.labels is None:
                continue
            said = [name.lower() for name in row.labels if name not in classes]
            # As in the data that were learnt from.
            none = said == [NONE_NAME] and len(row.labels) == 1
            nothing += none
            tags.setdefault(id_, set()).update(() if none else row.labels)
    unknown = sorted(set().union(*tags.values()) - set(classes))
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} tags are no classes of the model, such as '{unknown[0]}'; it "
            f"knows {', '.join(classes)[:120]}"
        )
    known = {
        id_: np.array(sorted(classes.index(tag) + 1 for tag in some), np.int64)
        for id_, some in tags.items()
    }
    if nothing:
        told = f"`{NONE_NAME}`, none of the classes, in {nothing} rows of {path}"
        print(f"isim: {told}", file=sys.stderr)
    if unmatched:
        print(f"isim: {unmatched} rows of {path} are of no image given", file=sys.stderr)
    without = len(images) - len(known)
    if without:
        print(f"isim: {without} of {len(images)} images have no row in {path}", file=sys.stderr)
    return known


def _own(rows: Sequence[Tagged], id_: str, path: Path) -> Sequence[Tagged]:
    """Choose the rows of an image: those with its path, where the table has more folders.

    Raises UserError where none has, and two name different images.
    """
    if len(rows) == 1:
        return rows
    place = path.absolute()
    # The folder that was listed: before its name a row's path may be that of another machine.
    folder = place.parents[id_.count("/")].name
    for real in (place, place.resolve()):
        if own := [row for row in rows if listing.may_be_one(row.image, str(real), folder)]:
            return own
    first = rows[0]
    for row in rows:
        if not listing.may_be_one(first.image, row.image, folder):
            raise UserError(
                f"{row.where}: {first.image} and {row.image} would both be image {id_}; take the "
                "rows of other images out"
            )
    return rows


def _write(
    found: Answer,
    image: NDArray[np.uint8],
    place: Path,
    options: Options,
    *,
    params: Params,
    names: Sequence[str],
) -> None:
    """Write an image's mask, last, and what else is wanted beside it."""
    if options.crf:
        found = found.refined(params.crf if options.by_cam else params.masks.segmenter_crf)
    label = found.label()
    if options.cleaned:
        label = clean(label, params.masks.least_area, params.masks.fill_holes)
    if options.min_confidence:
        label[found.label(options.min_confidence) == IGNORE] = IGNORE
    if options.probabilities:
        with atomic.atomic_path(place.with_name(f"{place.name}.npz")) as temporary:
            planes = found.planes.astype(np.float16)
            np.savez_compressed(
                temporary, probabilities=planes, labels=found.labels, size=found.size
            )
    if options.overlay:
        picture = overlay.drawn(image, label, names)
        overlay.write_jpeg(place.with_name(f"{place.name}_overlay.jpg"), picture)
    files.write_label_map(place.with_name(f"{place.name}.png"), label)
