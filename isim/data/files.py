"""Images, label maps (palette PNG) and CAMs (npz) on disk."""

import contextlib
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from isim import errors
from isim.errors import UserError
from isim.runtime.atomic import atomic_path

# What Pillow says of odd headers helps nobody: what cannot be used is told as an error.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Suffixes of photographs that Pillow reads with a further package alone.
HEIF = {".heic", ".heif", ".hif"}
# EXIF orientations and what turns a stored image as viewers show it; sides change from 5 on.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _SIDEWAYS = 0x0112, 5
# Formats that every program reads, and the suffixes by which it knows them.
_USUAL = {
    "JPEG": {".jpg", ".jpeg"},
    "MPO": {".jpg", ".jpeg"},
    "PNG": {".png"},
    "BMP": {".bmp"},
    "TIFF": {".tif", ".tiff"},
    "WEBP": {".webp"},
}
# Pillow opens them, but they are no photographs: documents, films, grids of a weather service.
NO_IMAGES = {"EPS", "HDF5", "GRIB", "BUFR", "WMF", "MPEG", "FLI", "IPTC", "SPIDER", "MCIDAS"}
# What a header may ask for: a file of a few bytes can stand for all the memory there is.
MOST_PIXELS, _MOST_BYTES = 100_000_000, 1 << 30
# Bytes of a CAM file's arrays: 254 classes of 100 million pixels are not stored at stride 1.
_MOST_OF_CAMS = 4 << 30
_LOSSY = {"JPEG", "MPO", "HEIF", "AVIF", "WEBP"}
# What a PNG's header may hold that tells an orientation.
_PNG_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


@contextlib.contextmanager
def _opened(what: str, path: Path) -> Iterator[Image.Image]:
    try:
        if path.suffix.lower() in HEIF:
            _require_heif(what, path)
        with (
            errors.opened(path, _MOST_BYTES) as stream,
            Image.open(stream, "r", _formats()) as image,
        ):
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{what} {path} has {image.width}x{image.height} pixels, more than the "
                    f"{MOST_PIXELS:,} that are read; save it smaller, or in parts"
                )
            yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{what} {path} does not exist; restore it or run `isim prepare` again"
        ) from error
    # Pillow's readers of many formats meet damage with whatever their parsers stumble over.
    except Exception as error:
        # Its own text of an unidentified file repeats the path and the buffer's address.
        unidentified = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unidentified else errors.reason(error)
        raise UserError(f"{what} {path} is unreadable ({reason}); replace it") from error


def _formats() -> tuple[str, ...]:
    """Formats that are opened, whatever the suffix says: no document, for which a program runs."""
    return (*_usual_formats(), *({"HEIF"} & Image.OPEN.keys()))


@cache
def _usual_formats() -> tuple[str, ...]:
    # Those of most files first: they are tried in this order.
    Image.preinit()
    first = list(Image.OPEN)
    Image.init()
    return tuple(dict.fromkeys(name for name in (*first, *Image.OPEN) if name not in NO_IMAGES))


def _require_heif(what: str, path: Path) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(
            f"{what} {path} is HEIC, which needs a further package: run `pip install isim[heic]`, "
            "or save it as JPEG"
        ) from error
    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that is left to apply, 1 for none."""
    # Pillow turns a TIFF itself. It would decode a PNG to look for what may follow the pixels.
    png = image.format == "PNG" and not _PNG_EXIF & {str(key) for key in image.info}
    if image.format == "TIFF" or png:
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    # Damaged EXIF is no reason to refuse the pixels.
    except Exception:
        return 1
    return int(found) if found in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _is_deep(image: Image.Image) -> bool:
    """Tell whether an image has more than 8 bits a channel, of which Pillow may drop half."""
    modes = [str(getattr(tile, "args", "")) for tile in getattr(image, "tile", ())]
    return image.mode[0] in "IF" or any(";16" in mode for mode in modes)


def read_image(path: Path, least: Sequence[int] | None = None) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB, also a grey one, one with a palette, or an animation.

    It is turned by its EXIF orientation, as every viewer shows it; of an animation the first frame
    is read, and transparency is dropped. A JPEG at least twice as large as `least`, (h, w), is
    decoded at 1/2, 1/4 or 1/8 of its size, not below: that takes less time.

    Raises:
        UserError: The file is missing, unreadable, truncated or has more than 8 bits a channel.
    """
    with _opened("image", path) as image:
        if _is_deep(image):
            raise UserError(
                f"{path} has more than 8 bits a channel; set prepare.sixteen_bit to the range that "
                "is shown, such as [0, 65535], or save it as 8-bit RGB"
            )
        orientation = _orientation(image)
        if least is not None:
            height, width = least if orientation < _SIDEWAYS else least[::-1]
            image.draft(None, (width, height))
        pixels = image if image.mode == "RGB" else image.convert("RGB")
        return np.array(_turned(pixels, orientation))


def is_deep(path: Path) -> bool:
    """Tell whether an image has more than 8 bits a channel; errors as `read_image`."""
    with _opened("image", path) as image:
        return _is_deep(image)


def read_deep_image(path: Path, shown: Sequence[float]) -> np.ndarray:
    """Read an image of more than 8 bits a channel as `read_image`: (H, W, 3) uint8 RGB.

    `shown`, (low, high), becomes 0..255; values outside are cut. Errors are those of `read_image`.
    """
    low, high = shown
    with _opened("image", path) as image:
        orientation = _orientation(image)
        if image.mode[0] in "IF":
            values = np.array(image).astype(np.float32)[..., None]
        else:
            # Pillow keeps 8 bits of a colour.
            data = np.frombuffer(errors.contents(path, _MOST_BYTES), np.uint8)
            decoded = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            if decoded is None or decoded.ndim != 3 or decoded.dtype != np.uint16:
                raise UserError(
                    f"{path} has a form of 16-bit colour that is not read; save it as PNG"
                )
            values = decoded[..., 2::-1].astype(np.float32)  # BGR, and maybe alpha
        levels = np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1) * 255
        pixels = np.broadcast_to(np.rint(levels).astype(np.uint8), (*levels.shape[:2], 3))
        return np.array(_turned(Image.fromarray(np.ascontiguousarray(pixels)), orientation))


def read_photograph(path: Path, shown: Sequence[float] | None) -> np.ndarray:
    """Read an image as `read_image`; one of more than 8 bits by the range `shown`, if there is one.

    Errors are those of `read_image`.
    """
    if shown is None or not is_deep(path):
        return read_image(path)
    return read_deep_image(path, shown)


def image_size(path: Path) -> tuple[int, int]:
    """Read height and width of an image in pixels from its header alone; errors as `read_image`."""
    with _opened("image", path) as image:
        turned = _orientation(image) >= _SIDEWAYS
        return (image.width, image.height) if turned else (image.height, image.width)


def orientation(path: Path) -> int:
    """Read the EXIF orientation that `read_image` applies, 1 for none; errors as `read_image`."""
    with _opened("image", path) as image:
        return _orientation(image)


def unusual(path: Path) -> str:
    """Say why other programs may not read an image as `read_image` does; empty: they do.

    Errors are those of `read_image`.
    """
    with _opened("image", path) as image:
        form, suffix = str(image.format), path.suffix.lower()
        if _is_deep(image):
            return "more than 8 bits"
        # Pillow turns a TIFF itself, and its tag is still there.
        turned = form == "TIFF" and image.getexif().get(_ORIENTATION, 1) != 1
        if turned or _orientation(image) > 1:
            return "turned by EXIF"
        if suffix not in _USUAL.get(form, ()):
            return form if form not in _USUAL else f"{form} named {suffix or 'without suffix'}"
        # The further pictures of a JPEG or a TIFF disturb nobody.
        moving = form in ("PNG", "WEBP") and getattr(image, "is_animated", False)
        return "animation" if moving else ""


def is_lossy(path: Path) -> bool:
    """Tell whether an image's format loses detail, as photographs have it."""
    with _opened("image", path) as image:
        return image.format in _LOSSY


class RawMask(NamedTuple):
    """A mask as its file has it: values (H, W) uint8, or colours (H, W, 3) uint8, or both.

    `simple` tells that `read_label_map` finds the values in it.
    """

    values: np.ndarray | None
    colors: np.ndarray | None
    simple: bool


def read_raw_mask(path: Path) -> RawMask:
    """Read a mask of any usual form, turned as an image is: a PNG with a palette has both.

    Black and white becomes 0 and 255, 16-bit values those of their 8 lower bits if they fit, and
    what is transparent black. Raises UserError when it is missing, unreadable, or has other values.
    """
    with _opened("mask", path) as image:
        orientation = _orientation(image)
        plain = image.format == "PNG" and image.mode in ("P", "L") and orientation == 1
        turned = _turned(image, orientation)
        if image.mode == "P":
            # Whoever writes a GIF numbers its colours anew.
            values = None if image.format == "GIF" else np.array(turned)
            return RawMask(values, np.array(turned.convert("RGB")), plain)
        if image.mode in ("L", "1"):
            return RawMask(np.array(turned.convert("L")), None, plain)
        if image.mode[0] in "IF":
            deep = np.array(turned)
            highest = np.iinfo(deep.dtype).max if deep.dtype.kind in "iu" else -1
            deep = np.where(deep == highest, 255, deep)
            if deep.min() < 0 or deep.max() > 255 or (deep != np.rint(deep)).any():
                raise UserError(f"mask {path} has values above 255; save class ids as 8-bit PNG")
            return RawMask(deep.astype(np.uint8), None, False)
        colors = np.array(turned.convert("RGBA"))
        colors[colors[..., 3] == 0] = 0
        return RawMask(None, colors[..., :3], False)


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


def read_threshold(folder: Path) -> float:
    """Read the background plane of the CAMs below `folder`, as `isim export-cams` left it.

    Raises:
        UserError: There is none.
    """
    path = folder / "threshold.json"
    with errors.reading(path, "run `isim export-cams` again", "is damaged"):
        threshold = float(errors.json_of(path)["threshold"])
        if not 0 < threshold < 1:
            raise ValueError(f"a threshold of {threshold}")
        return threshold


def read_cam(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Read what `write_cam` wrote: cam (K', h, w) float32, class_ids (K',) int64, size (H, W).

    Raises:
        UserError: The file is missing or no CAM file: damaged, of another form, or with values
            outside [0, 1].
    """
    remedy = "run `isim export-cams` again"
    with (
        errors.reading(f"CAM {path}", remedy, "is not a CAM file"),
        errors.opened(path) as stream,
        zipfile.ZipFile(stream) as archive,
    ):
        cam, class_ids, size = (_array(archive, name) for name in ("cam", "class_ids", "size"))
        if cam.dtype != np.float16 or cam.ndim != 3 or 0 in cam.shape[1:]:
            raise ValueError(f"planes {cam.dtype} {cam.shape}")
        if class_ids.dtype != np.int64 or class_ids.shape != cam.shape[:1]:
            raise ValueError(f"{len(cam)} planes for classes {class_ids.shape}")
        if size.dtype != np.int64 or size.shape != (2,) or (size < 1).any():
            raise ValueError("no size of an image")
        planes = cam.astype(np.float32)
        # NaN is in no range.
        if planes.size and not (planes.min() >= 0 and planes.max() <= 1):
            raise ValueError("values outside [0, 1]")
        return planes, class_ids, (int(size[0]), int(size[1]))


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of an npz, whose header may ask for no more than there is."""
    about = archive.getinfo(f"{name}.npy")
    if about.compress_type != zipfile.ZIP_STORED or about.file_size > _MOST_OF_CAMS:
        raise ValueError(f"{name} is packed, or too large")
    with archive.open(about) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{name} is of npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        data = stream.read()
        if dtype.hasobject or fortran or dtype.itemsize * math.prod(shape) != len(data):
            raise ValueError(f"{name} is not as its header tells")
    return np.frombuffer(data, dtype).reshape(shape)


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
    if not _is_reduced(size, planes.shape[1:]):
        raise UserError(
            f"CAM {path} has planes of {planes.shape[1]}x{planes.shape[2]}, which at no stride are "
            f"those of {size[0]}x{size[1]} pixels; run `isim export-cams` again"
        )
    return planes, size


def _is_reduced(size: tuple[int, int], small: tuple[int, ...]) -> bool:
    """Tell whether a grid is that of an image at some whole stride, rounded up."""
    # The smallest stride that gives so many rows.
    stride = -(-size[0] // small[0])
    while stride <= max(size) and -(-size[0] // stride) == small[0]:
        if -(-size[1] // stride) == small[1]:
            return True
        stride += 1
    return False
