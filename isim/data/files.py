"""Images, label maps (palette PNG) and CAMs (npz) on disk."""

import contextlib
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from isim.errors import UserError
from isim.runtime.atomic import atomic_path


@contextlib.contextmanager
def _opened(what: str, path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise UserError(
            f"{what} {path} does not exist; restore it or run `isim prepare` again"
        ) from error
    # All that Pillow raises on damaged files.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        # Its own text of an unidentified file repeats the path and the buffer's address.
        unidentified = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unidentified else str(error).splitlines()[0]
        raise UserError(f"{what} {path} is unreadable ({reason}); replace it") from error


def read_image(path: Path, least: Sequence[int] | None = None) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB, also a grey one or one with a palette.

    Its EXIF orientation is ignored, as the VOC masks ignore it. A JPEG at least twice as large as
    `least`, (h, w), is decoded at 1/2, 1/4 or 1/8 of its size, not below: that takes less time.

    Raises:
        UserError: The file is missing, unreadable, truncated or has more than 8 bits a channel.
    """
    with _opened("image", path) as image:
        if image.mode[0] in "IF":
            raise UserError(f"{path} has more than 8 bits a channel; save it as 8-bit RGB")
        if least is not None:
            image.draft(None, (least[1], least[0]))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Read height and width of an image in pixels from its header alone; errors as `read_image`."""
    with _opened("image", path) as image:
        return image.height, image.width


def read_label_map(path: Path) -> np.ndarray:
    """Read the (H, W) uint8 class ids of an 8-bit palette or grey PNG, 255 = ignore.

    Raises:
        UserError: The file is missing, unreadable or in colours instead of class ids.
    """
    with _opened("label map", path) as image:
        if image.mode not in ("P", "L"):
            advice = "save class ids as an 8-bit palette or grey PNG"
            raise UserError(f"label map {path} holds {image.mode} colours; {advice}")
        return np.array(image)


def read_label_of(
    path: Path, size: tuple[int, ...], num_labels: int, *, ignored: bool
) -> np.ndarray:
    """Read a label map that a stage made of an image: it may be of an earlier state of the data.

    It must have the image's (H, W) in pixels, and labels 0..L-1 or, if `ignored`, 255.

    Raises:
        UserError: It cannot be read, or has another size or other values.
    """
    label = read_label_map(path)
    if misfit := _misfit(label, size, num_labels, ignored):
        raise UserError(
            f"label map {path} {misfit}; it is of an earlier state of the data: delete the label "
            "maps and make them again"
        )
    return label


def read_truth(path: Path, size: tuple[int, ...], num_labels: int) -> np.ndarray:
    """Read a ground truth as `read_label_of`: `isim prepare` checked it, it may have changed."""
    truth = read_label_map(path)
    if misfit := _misfit(truth, size, num_labels, True):
        raise UserError(
            f"mask {path} {misfit}: it has changed since; restore it or run `isim prepare` again"
        )
    return truth


def _misfit(label: np.ndarray, size: tuple[int, ...], num_labels: int, ignored: bool) -> str | None:
    if label.shape != tuple(size):
        return f"is {label.shape[1]}x{label.shape[0]} pixels, its image {size[1]}x{size[0]}"
    # One more than the label, so that IGNORE, 255, wraps around to 0.
    highest = int((label + np.uint8(1)).max()) - 1 if ignored else int(label.max())
    return f"holds label {highest} of 0..{num_labels - 1}" if highest >= num_labels else None


def write_label_map(path: Path, label_map: np.ndarray) -> None:
    """Write (H, W) uint8 class ids as an 8-bit PNG with the VOC palette, atomically.

    Raises UserError as `atomic_path` does.
    """
    image = Image.fromarray(label_map)
    image.putpalette(voc_palette().tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def voc_palette() -> np.ndarray:
    """Make VOC's (256, 3) uint8 RGB colours: the bits of a class id, dealt to R, G, B in turn."""
    bits = (np.arange(256)[:, None] >> np.arange(24)) & 1
    weights = 128 >> np.arange(8)
    palette: np.ndarray = np.einsum("ibc,b->ic", bits.reshape(256, 8, 3), weights)
    return palette.astype(np.uint8)


def class_list(names: Sequence[str]) -> list[dict[str, Any]]:
    """Describe labels 0..L-1 for `classes.json`: id, name and colour (RGB) of each."""
    colours = voc_palette()[: len(names)].tolist()
    return [
        {"id": number, "name": name, "colour": colour}
        for number, (name, colour) in enumerate(zip(names, colours, strict=True))
    ]


def write_cam(path: Path, cam: np.ndarray, class_ids: np.ndarray, size: tuple[int, int]) -> None:
    """Write the CAMs of an image's labelled classes as npz without pickle, atomically (spec 4).

    `cam` is (K', h, w) float in [0, 1], stored as float16; `class_ids` are the (K',) ids 1..K of
    its planes, `size` is the image's (H, W) in pixels. Raises UserError as `atomic_path` does.
    """
    planes, ids = cam.astype(np.float16), class_ids.astype(np.int64)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, cam=planes, class_ids=ids, size=np.array(size, np.int64))


def require_cams(folder: Path) -> None:
    """Check that there are CAMs of a split; which ones is known when they are read.

    Raises:
        UserError: There is no `folder`, data/cams/<split>.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; add {folder.name} to export_cams.splits and run "
            "`isim export-cams`"
        )


def read_cam(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Read what `write_cam` wrote: cam (K', h, w) float32, class_ids (K',) int64, size (H, W).

    Raises:
        UserError: The file is missing or no CAM file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            height, width = (int(value) for value in arrays["size"])
            return arrays["cam"].astype(np.float32), arrays["class_ids"], (height, width)
    # np.load gives plain arrays (no context manager: TypeError) for a renamed .npy file.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "not a CAM file"
        raise UserError(f"CAM {path} is {reason}; run `isim export-cams` again") from error


def read_cam_of(
    path: Path, image: Path, class_ids: np.ndarray
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read cam (K', h, w) float32 and size (H, W) of an image that has the (K',) `class_ids`.

    Raises:
        UserError: As `read_cam`; or the image is unreadable, or has another size or classes by now.
    """
    planes, ids, size = read_cam(path)
    if size != image_size(image) or not np.array_equal(ids, class_ids):
        raise UserError(
            f"CAM {path} is of another size or other classes than {image} now has; run "
            "`isim export-cams` again"
        )
    return planes, size
