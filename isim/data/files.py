"""Images, label maps (palette PNG) and CAMs (npz) on disk. Torch-free."""

import hashlib
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from isim.atomic import atomic_path
from isim.errors import UserError

BACKGROUND = 0
IGNORE = 255
# Layout of data/prepared, and the prefix of paths that lie inside it.
FORMAT = 1
PREPARED = "prepared:"

# All that Pillow raises on damaged files, beyond OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def file_md5(path: Path) -> str:
    """Hex md5 of a file's contents.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def read_image(path: Path, least: Sequence[int] | None = None) -> np.ndarray:
    """Read an image as RGB; its EXIF orientation is ignored, as the VOC masks ignore it.

    Args:
        path: The file.
        least: (h, w) that will do: a JPEG at least twice as large is decoded at 1/2, 1/4 or
            1/8 of its size, not below `least`, in a fraction of the time.

    Returns:
        (H, W, 3) uint8. Grey and palette images become RGB.

    Raises:
        UserError: The file is missing, unreadable, truncated or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise UserError(f"{path} has more than 8 bits a channel; save it as 8-bit RGB")
            if least is not None:
                image.draft(None, (least[1], least[0]))
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except _DAMAGED as error:
        raise _unreadable("image", path, error) from error


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image in pixels, from its header alone.

    Raises:
        UserError: The file is missing or unreadable.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DAMAGED as error:
        raise _unreadable("image", path, error) from error


def read_label_map(path: Path) -> np.ndarray:
    """Read a label map: the class ids of an 8-bit palette or grey PNG.

    Returns:
        (H, W) uint8, 0 = background, 255 = ignore.

    Raises:
        UserError: The file is missing, unreadable or in colours instead of class ids.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(
                    f"label map {path} holds {image.mode} colours; save class ids as an 8-bit "
                    "palette or grey PNG"
                )
            return np.array(image)
    except _DAMAGED as error:
        raise _unreadable("label map", path, error) from error


def read_label_of(
    path: Path, image: Path, size: tuple[int, ...], num_labels: int, ignored: bool
) -> np.ndarray:
    """Read a label map that must be an image's: it may be of an earlier state of the data.

    Args:
        path: A label map that a stage made.
        image: Path of the image, for the message.
        size: (H, W) of the image in pixels.
        num_labels: L; values are 0..L-1.
        ignored: Whether 255 may occur, too.

    Returns:
        (H, W) uint8.

    Raises:
        UserError: It cannot be read, or has another size or other values.
    """
    label = read_label_map(path)
    if label.shape != tuple(size):
        raise UserError(
            f"label map {path} is {label.shape[1]}x{label.shape[0]} pixels but {image} "
            f"is {size[1]}x{size[0]}; delete the label maps and make them again"
        )
    # One more than the label, so that IGNORE, 255, wraps around to 0.
    highest = int((label + np.uint8(1)).max()) - 1 if ignored else int(label.max())
    if highest >= num_labels:
        raise UserError(
            f"label map {path} holds label {highest} of 0..{num_labels - 1}; it is of "
            "other classes: make the label maps again"
        )
    return label


def read_truth(path: Path, size: tuple[int, ...], num_labels: int) -> np.ndarray:
    """Read a ground truth that must fit an image: `isim prepare` checked it, it may have changed.

    Args:
        path: A label map.
        size: (H, W) of the image in pixels.
        num_labels: L; values are 0..L-1 or 255.

    Returns:
        (H, W) uint8.

    Raises:
        UserError: It cannot be read, or has another size or other values.
    """
    truth = read_label_map(path)
    again = "it has changed since; restore it or run `isim prepare` again"
    if truth.shape != tuple(size):
        raise UserError(
            f"mask {path} is {truth.shape[1]}x{truth.shape[0]} pixels, its image "
            f"{size[1]}x{size[0]}: {again}"
        )
    highest = truth[truth != IGNORE].max(initial=0)
    if highest >= num_labels:
        raise UserError(f"mask {path} holds label {highest} of 0..{num_labels - 1}: {again}")
    return truth


def _unreadable(what: str, path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{what} {path} does not exist; restore it or run `isim prepare` again")
    # Pillow's own text of an unidentified file repeats the path and the buffer's address.
    unidentified = isinstance(error, Image.UnidentifiedImageError)
    reason = "not an image" if unidentified else str(error).splitlines()[0]
    return UserError(f"{what} {path} is unreadable ({reason}); replace it")


def write_label_map(path: Path, label_map: np.ndarray) -> None:
    """Write a label map as an 8-bit PNG with the VOC palette, atomically.

    Args:
        path: Final path, suffix `.png`.
        label_map: (H, W) uint8.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    image = Image.fromarray(label_map)
    image.putpalette(voc_palette().tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def voc_palette() -> np.ndarray:
    """Colours of the VOC label maps: the bits of a class id, dealt to R, G, B in turn.

    Returns:
        (256, 3) uint8 RGB.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            value = (ids >> (3 * bit + channel)) & 1
            palette[:, channel] |= (value << (7 - bit)).astype(np.uint8)
    return palette


def write_cam(path: Path, cam: np.ndarray, class_ids: np.ndarray, size: tuple[int, int]) -> None:
    """Write the CAMs of an image's labelled classes as npz without pickle, atomically (spec 4).

    Args:
        path: Final path, suffix `.npz`.
        cam: (K', h, w) float in [0, 1]; stored as float16.
        class_ids: (K',) int, ids 1..K of the planes.
        size: (H, W) of the image in pixels.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            cam=cam.astype(np.float16),
            class_ids=class_ids.astype(np.int64),
            size=np.array(size, np.int64),
        )


def require_cams(folder: Path) -> None:
    """Check that the CAMs of a split are there; which ones is known when they are read.

    Args:
        folder: `data/cams/<split>`.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; add {folder.name} to export_cams.splits and run "
            "`isim export-cams`"
        )


def read_cam(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Read what `write_cam` wrote.

    Returns:
        cam (K', h, w) float32, class_ids (K',) int64, image size (H, W).

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
    """Read CAMs that must be an image's: they may be of an earlier state of the data.

    Args:
        path: A file of `write_cam`.
        image: Path of the image.
        class_ids: (K',) labels 1..K of the image's classes, ascending.

    Returns:
        cam (K', h, w) float32, image size (H, W).

    Raises:
        UserError: As `read_cam`; or the image is unreadable, or has another size or classes.
    """
    planes, ids, size = read_cam(path)
    if size != image_size(image) or not np.array_equal(ids, class_ids):
        raise UserError(
            f"CAM {path} is of another size or other classes than {image} now has; run "
            "`isim export-cams` again"
        )
    return planes, size
