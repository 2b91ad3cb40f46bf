"""Masks and segmenters in the formats of other tools: `isim export`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from isim import errors
from isim.data import files, prepared
from isim.data.formats import labelled
from isim.data.formats.coco import DESCRIPTION, write_coco
from isim.data.formats.labelled import LabelledSet
from isim.data.formats.labelstudio import LOCAL, write_labelstudio
from isim.data.formats.overlay import write_overlays
from isim.data.formats.regions import Instances
from isim.data.formats.voc import write_voc
from isim.data.formats.yolo import write_yolo
from isim.errors import UserError
from isim.params import load
from isim.runtime import atomic

# Options that a format takes beside `source` and `images`.
TAKES = {
    "coco": {"polygons", "instances"},
    "yolo": {"copy", "instances"},
    "voc": {"copy"},
    "labelstudio": {"url", "instances"},
    "overlay": set[str](),
    "onnx": {"model"},
}


# Bytes at the beginning of the formats that are a file: COCO's description, ONNX's producer.
_MARKS = {"coco": DESCRIPTION.encode(), "onnx": b"\x12\x04isim"}


@dataclass(frozen=True)
class Options:
    """Options of all formats; the label maps' `source` and the `model` are needed where taken."""

    source: str | None = None
    images: Path | None = None
    polygons: bool = False
    instances: Instances = "parts"
    copy: bool = False
    url: str | None = None
    model: Path | None = None


def run(form: str, dest: Path, options: Options, root: Path) -> str:
    """Write label maps, or the segmenter, in a format; returns a line about what was written.

    Raises UserError for options that the format does not take, for a destination that is there and
    is not of this kind, and as the format's writer.
    """
    allowed = TAKES[form] | ({"images"} if form == "onnx" else {"source", "images"})
    for field in fields(options):
        if field.name not in allowed and getattr(options, field.name) != field.default:
            name = "from" if field.name == "source" else field.name
            raise UserError(f"--{name} means nothing for {form}; leave it out")
    is_file = form in _MARKS
    if is_file and not dest.suffix:
        raise UserError(
            f"{form} is a file; name one, such as {dest}.{form.replace('coco', 'json')}"
        )
    _require_own(form, dest)
    if not is_file and dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} exists and is no empty folder; name another or empty it")
    if form == "onnx":
        return _onnx(dest, options, root)
    data = labelled.collect(str(options.source), options.images, root, _shown(root))
    told = f"{dest}: {_writers(data, dest, options)[form]()} of {len(data.entries)} images"
    # Formats that bring the images along.
    anew = labelled.written_anew(data) if "copy" in TAKES[form] else ""
    return f"{told}; {anew}" if anew else told


def _require_own(form: str, dest: Path) -> None:
    """Check that a file that is there is an earlier export: another one would be lost."""
    if form not in _MARKS or not dest.exists():
        return
    own = False
    if dest.is_file():
        with errors.opened(dest) as stream:
            own = _MARKS[form] in stream.read(200)
    if not own:
        raise UserError(f"{dest} is there and was not written by this command; name another file")


def _shown(root: Path) -> tuple[float, float] | None:
    path = root / "params.yaml"
    wanted = load(path).prepare.sixteen_bit if path.exists() else "refuse"
    return None if wanted == "refuse" else wanted


def _writers(data: LabelledSet, dest: Path, options: Options) -> dict[str, Callable[[], str]]:
    instances = options.instances

    def coco() -> str:
        count = write_coco(data, dest, polygons=options.polygons, instances=instances)
        turned = sum(files.orientation(entry.image) > 1 for entry in data.entries)
        note = f" ({turned} images are turned by EXIF: read them so)" if turned else ""
        return f"{count} annotations{note}"

    def yolo() -> str:
        count = write_yolo(data, dest, copy=options.copy, instances=instances)
        note = "" if "val" in data.splits() else " (no split val: data.yaml names train for it)"
        return f"{count} objects{note}"

    def studio() -> str:
        with atomic.atomic_directory(dest) as building:
            url = options.url or LOCAL
            count = write_labelstudio(data, building, url=url, instances=instances)
        return f"{count} tasks to import"

    def overlays() -> str:
        with atomic.atomic_directory(dest) as building:
            return f"{write_overlays(data, building)} overlays"

    return {
        "coco": coco,
        "yolo": yolo,
        "voc": lambda: f"a devkit, {write_voc(data, dest, copy=options.copy)} masks",
        "labelstudio": studio,
        "overlay": overlays,
    }


def _onnx(dest: Path, options: Options, root: Path) -> str:
    # Its libraries are an extra.
    from isim.passes import onnx_file

    if options.images is not None:
        images = [*labelled.images_below(options.images).values()]
    else:
        splits = prepared.load(root).splits.values()
        images = [item.image for items in splits for item in items]
    return onnx_file.write(dest, Path(str(options.model)), images)
