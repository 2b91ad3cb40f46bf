"""The embedded data set: generated animals in a VOC devkit (spec 2, "Shapes").

It makes the paper's effect visible, and measurable, offline, without pretrained weights, on two
CPU cores. A small part of an animal, its face, tells the class: the CAM of a network that sees
image-level labels alone misses the rest. Bodies are drawn alike for all classes, several to an
image: the segmentation loss teaches their class, the classification loss hardly does. A coat is
homogeneous, but not quite: dCRF fills a body that the seed covers by half and empties one that it
covers by less, the network averages over all images, and the bodies that it learnt raise the seeds
of the next round. Boulders that wear coats, flowers in the colours of faces and scenes that are
independent of the class make the background no giveaway.

Objects have a border of 255 in the masks, as in VOC. Everything follows from the seed; image `i`
of a split does not depend on how many images are asked for.
"""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isim.data.files import write_label_map
from isim.data.sources.devkit import read_devkit
from isim.data.sources.source import Source
from isim.metrics import IGNORE
from isim.params import Prepare, Shapes
from isim.runtime.atomic import atomic_path, write_text

CLASSES: tuple[str, ...] = ("badger", "duck", "fox", "lizard", "ram")

_Array = NDArray[np.floating]
_Paint = tuple[int, int, int]

_COATS = np.array(
    [
        (122, 84, 52), (150, 118, 80), (96, 92, 90), (142, 138, 132),
        (104, 98, 60), (70, 62, 58), (176, 154, 118), (126, 70, 44),
    ],
    float,
)  # fmt: skip
# Two colours of a meadow, sand, water, a wood or rock, and how its texture is stretched
# (vertical, horizontal).
_SCENES: tuple[tuple[_Paint, _Paint, tuple[int, int]], ...] = (
    ((70, 104, 48), (126, 148, 74), (3, 1)),
    ((196, 172, 128), (164, 136, 96), (1, 1)),
    ((58, 96, 122), (112, 148, 160), (1, 4)),
    ((44, 58, 40), (88, 84, 58), (1, 1)),
    ((120, 116, 112), (88, 86, 90), (1, 2)),
)
_FLOWERS = np.array(
    [(232, 150, 40), (236, 232, 222), (50, 150, 160), (30, 28, 30), (214, 196, 140)], float
)


def _noise(rng: np.random.Generator, side: int, cells: int, stretch: tuple[int, int]) -> _Array:
    """Fractal noise (S, S), about zero mean and unit deviation, `cells` features a side."""
    total = np.zeros((side, side), np.float32)
    for octave in range(4):
        rows, columns = (min(side, max(2, (cells << octave) // factor)) for factor in stretch)
        grid = rng.standard_normal((rows, columns)).astype(np.float32)
        total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return total


def _edge(distance: _Array, width: float) -> _Array:
    """Opacity: 1 inside (distance < 0), 0 outside, with a ramp of `width` between."""
    opacity: _Array = np.clip(0.5 - distance / width, 0, 1)
    return opacity


def _over(below: _Array, opacity: _Array, color: _Array) -> _Array:
    """Paint colours, or one, over an image (S, S, 3)."""
    return below + opacity[..., None] * (color - below)


def _coat(rng: np.random.Generator, side: int, u: _Array, v: _Array) -> _Array:
    """Colours (S, S, 3) of fur, feathers or scales: a pattern shared by all classes."""
    base = _COATS[rng.integers(len(_COATS))] * rng.uniform(0.85, 1.15) + rng.normal(0, 6, 3)
    pattern = rng.integers(5)
    warp = _noise(rng, side, 6, (1, 1)) * 0.12
    if pattern == 0:
        relief = _noise(rng, side, 24, (1, 3)) * 0.5
    elif pattern == 1:
        relief = np.sin((u + warp) * rng.uniform(14, 22)) * 0.9
    elif pattern == 2:
        relief = np.sin((u + warp) * 16) * np.sin((v + warp) * 16) * 1.3
    elif pattern == 3:
        relief = np.clip(_noise(rng, side, 12, (1, 1)), -0.3, 1.2)
    else:
        relief = np.sin((v + warp) * rng.uniform(14, 22)) * 0.9
    light = 1 - 0.16 * np.clip(v, -1.2, 1.2) + 0.02 * _noise(rng, side, 40, (1, 1))
    color: _Array = base[None, None] * light[..., None] + relief[..., None] * rng.uniform(3, 8)
    return color.astype(np.float32)


def _face(kind: int, p: _Array, q: _Array, w: float) -> tuple[list[tuple[_Array, _Paint]], _Array]:
    """Draw a class' face in its frame (p, q), about 1 in radius; edges are `w` wide.

    Returns:
        Opacities (S, S) and paints, the lowest first; the face's opacity.
    """

    def disc(x: float, y: float, radius: float) -> _Array:
        return _edge(np.hypot(p - x, q - y) - radius, w)

    def ellipse(x: float, y: float, a: float, b: float, *, soft: float = 1) -> _Array:
        return _edge(np.hypot((p - x) / a, (q - y) / b) - 1, w * soft)

    name = CLASSES[kind]
    if name == "badger":
        face, dark = disc(0, 0, 0.92), (24, 22, 26)
        left, right = (face * _edge(np.abs(q - c - 0.1 * p) - 0.2, w) for c in (-0.48, 0.42))
        return [(face, (232, 230, 224)), (left, dark), (right, dark)], disc(0, 0, 1.05)
    if name == "duck":
        bill = ellipse(1.15, 0.15, 0.85, 0.34, soft=1.5)
        eye, pupil = disc(0.25, -0.3, 0.34), disc(0.3, -0.3, 0.17)
        strokes = [(bill, (236, 150, 30)), (eye, (240, 238, 230)), (pupil, (16, 14, 14))]
        return strokes, np.maximum(disc(0, 0, 1), bill)
    if name == "fox":
        cones = (np.abs(p - c) - 0.42 * (q + 1.55) for c in (-0.45, 0.5))
        ears = [_edge(np.maximum(cone, q + 0.4), w) for cone in cones]
        muzzle, nose = ellipse(0.3, 0.45, 0.7, 0.5), disc(0.75, 0.2, 0.18)
        strokes = [*((ear, (206, 92, 30)) for ear in ears), (disc(0, 0, 0.95), (206, 96, 36))]
        strokes += [(muzzle, (242, 236, 224)), (nose, (20, 16, 16))]
        return strokes, np.maximum(disc(0, 0, 1), np.maximum(*ears))
    if name == "lizard":
        angle = np.arctan2(q, p)
        frill = _edge(np.hypot(p, q) - 1.2 - 0.22 * np.sin(9 * angle), w)
        ribs = frill * (0.5 + 0.5 * np.sin(18 * angle)) * 0.6
        head, eye = disc(0.25, 0, 0.62), disc(0.4, -0.15, 0.18)
        strokes = [(frill, (40, 150, 158)), (ribs, (20, 84, 120))]
        return [*strokes, (head, (150, 168, 60)), (eye, (14, 14, 14))], frill
    horn = _edge(np.abs(np.hypot(p + 0.25, q + 0.3) - 0.75) - 0.34, w)
    rings = horn * (0.5 + 0.5 * np.sin(14 * np.arctan2(q + 0.3, p + 0.25))) * 0.5
    face = ellipse(0.45, 0.25, 0.7, 0.6)
    strokes = [(face, (58, 44, 40)), (horn, (222, 200, 142)), (rings, (140, 108, 66))]
    return strokes, np.maximum(np.maximum(face, horn), disc(0, 0, 0.9))


def _local(
    side: int, centre: tuple[float, float], scale: float, angle: float, *, mirror: bool
) -> tuple[_Array, _Array]:
    """Coordinates (u, v), each (S, S), of the canvas in the frame of an object."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    x, y = (x - centre[0]) / scale, (y - centre[1]) / scale
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    return (-u if mirror else u), v


def _blob(rng: np.random.Generator, u: _Array, v: _Array, height: float, *, rough: float) -> _Array:
    """Signed distance, roughly, of an ellipse of half axes 1 and `height` with a wavy outline."""
    angle = np.arctan2(v / height, u)
    outline = np.ones_like(u)
    for wave in (2, 3, 5):
        outline += rough / wave * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    distance: _Array = np.hypot(u, v / height) - outline
    return distance


def _limb(u: _Array, v: _Array, start: tuple[float, float], end: tuple[float, float]) -> _Array:
    """Distance of each point (u, v) from a line segment."""
    du, dv = end[0] - start[0], end[1] - start[1]
    along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - start[0] - along * du, v - start[1] - along * dv)


def _animal(
    rng: np.random.Generator, kind: int, side: int, centre: tuple[float, float], *, scale: float
) -> tuple[_Array, _Array]:
    """Draw class `kind`, `scale` long to each side: opacity (S, S), colours (S, S, 3)."""
    u, v = _local(side, centre, scale, rng.uniform(-0.3, 0.3), mirror=bool(rng.integers(2)))
    w = 2 / scale  # antialiasing: two oversampled pixels
    height = rng.uniform(0.58, 0.75)
    color = _coat(rng, side, u, v)
    opacity = _edge(_blob(rng, u, v, height, rough=0.1), w)
    for x in rng.uniform(-0.7, 0.6, rng.integers(2, 5)):
        foot = (x + rng.uniform(-0.15, 0.15), height + rng.uniform(0.15, 0.4))
        opacity = np.maximum(opacity, _edge(_limb(u, v, (x, height * 0.4), foot) - 0.1, w))
    tip = (rng.uniform(-1.6, -1.2), rng.uniform(-0.6, 0.4))
    tail = _limb(u, v, (-0.8, 0.0), tip) - rng.uniform(0.06, 0.16)
    opacity = np.maximum(opacity, _edge(tail, w))
    radius = rng.uniform(0.35, 0.43)
    p = (u - rng.uniform(0.0, 0.45)) / radius
    q = (v + height * rng.uniform(-0.1, 0.4)) / radius
    strokes, face = _face(kind, p, q, w / radius)
    for place, paint in strokes:
        color = _over(color, place, np.array(paint, np.float32))
    return np.maximum(opacity, face), color


def _boulder(rng: np.random.Generator, side: int) -> tuple[_Array, _Array]:
    """Draw a distractor as `_animal` does: a faceless lump in the coat of an animal."""
    centre, scale = tuple(rng.uniform(0, side, 2)), side * rng.uniform(0.06, 0.2)
    u, v = _local(side, centre, scale, rng.uniform(-0.6, 0.6), mirror=bool(rng.integers(2)))
    opacity = _edge(_blob(rng, u, v, rng.uniform(0.45, 0.8), rough=0.16), 2 / scale)
    return opacity, _coat(rng, side, u, v)


def _flower(rng: np.random.Generator, side: int) -> tuple[_Array, _Array]:
    """Draw a distractor: a small blot, (S, S), in one colour of a face, (3,)."""
    scale = side * rng.uniform(0.012, 0.03)
    centre = tuple(rng.uniform(0, side, 2))
    u, v = _local(side, centre, scale, rng.uniform(0, 3), mirror=False)
    opacity = _edge(_blob(rng, u, v, rng.uniform(0.5, 1), rough=0.5), 2 / scale)
    paint = _FLOWERS[rng.integers(len(_FLOWERS))] + rng.normal(0, 10, 3)
    return opacity, paint.astype(np.float32)


def _scene(rng: np.random.Generator, side: int) -> _Array:
    """Draw the background (S, S, 3)."""
    near, far, stretch = _SCENES[rng.integers(len(_SCENES))]
    slope = np.linspace(rng.uniform(0, 0.4), rng.uniform(0.6, 1), side, dtype=np.float32)
    mix = np.clip(slope[:, None] + 0.22 * _noise(rng, side, 4, stretch), 0, 1)[..., None]
    color: _Array = mix * np.array(near, np.float32) + (1 - mix) * np.array(far, np.float32)
    fine = _noise(rng, side, 24, stretch) * rng.uniform(4, 11)
    return color * np.float32(rng.uniform(0.85, 1.15)) + fine[..., None]


def _place(canvas: _Array, opacity: _Array, color: _Array) -> _Array:
    """Put an object with its shadow on the canvas (S, S, 3)."""
    shift = len(canvas) // 40
    cast = cv2.GaussianBlur(np.roll(opacity, shift, axis=0), (0, 0), shift * 0.8)
    light: _Array = 1 - 0.35 * cast * (1 - opacity)
    return _over(canvas * light[..., None], opacity, color)


def _places(rng: np.random.Generator, count: int, side: int) -> list[tuple[float, float, float]]:
    """Draw centres and scales (x, y, half length) of objects that hardly overlap."""
    low, high = ((0.27, 0.36), (0.2, 0.25), (0.17, 0.2))[count - 1]
    found: list[tuple[float, float, float]] = []
    while len(found) < count:
        scale = side * rng.uniform(low, high)
        x = rng.uniform(scale * 1.2, side - scale * 1.2)
        y = rng.uniform(scale * 0.9, side - scale)
        if all(np.hypot(x - a, 1.5 * (y - b)) > 1.15 * (scale + c) for a, b, c in found):
            found.append((x, y, scale))
        elif rng.random() < 0.02:
            found.clear()  # a first choice that leaves no room for the others
    return found


def draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw an image (size, size, 3) uint8 RGB and its mask (size, size) uint8.

    In the mask, 0 is the background, 1.. are the CLASSES in order, 255 the border of objects.
    """
    # Drawn at twice the size and averaged down: no jagged edges.
    side = 2 * size
    canvas = _scene(rng, side)
    for _ in range(rng.integers(1, 4)):
        canvas = _place(canvas, *_boulder(rng, side))
    for _ in range(rng.integers(2, 7)):
        canvas = _over(canvas, *_flower(rng, side))
    mask = np.zeros((size, size), np.uint8)
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15]))
    for x, y, scale in _places(rng, count, side):
        kind = int(rng.integers(len(CLASSES)))
        opacity, color = _animal(rng, kind, side, (x, y), scale=scale)
        canvas = _place(canvas, opacity, color)
        share = cv2.resize(opacity, (size, size), interpolation=cv2.INTER_AREA)
        inside = (share > 0.5).astype(np.uint8)
        border = cv2.dilate(inside, np.ones((3, 3), np.uint8)) - inside
        mask[border == 1] = IGNORE
        mask[inside == 1] = kind + 1
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    image = image + rng.normal(0, 2.5, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask


def _annotation(name: str, mask: NDArray[np.uint8]) -> str:
    """VOC's XML of one image: an `object` for each class in the mask."""
    height, width = mask.shape
    size = f"<width>{width}</width><height>{height}</height><depth>3</depth>"
    lines = [f"<annotation>\n  <filename>{name}.jpg</filename>\n  <size>{size}</size>"]
    for kind in sorted(set(mask.ravel().tolist()) - {0, IGNORE}):
        rows, columns = (places + 1 for places in np.nonzero(mask == kind))
        box = f"<xmin>{columns.min()}</xmin><ymin>{rows.min()}</ymin>"
        box += f"<xmax>{columns.max()}</xmax><ymax>{rows.max()}</ymax>"
        head = f"  <object>\n    <name>{CLASSES[kind - 1]}</name>\n    <difficult>0</difficult>"
        lines.append(f"{head}\n    <bndbox>{box}</bndbox>\n  </object>")
    return "\n".join([*lines, "</annotation>\n"])


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Generate the data set in `out` and read it. Raises UserError as `generate` does."""
    return read_devkit(generate(out, params.shapes, params.seed), CLASSES)


def generate(directory: Path, shapes: Shapes, seed: int) -> Path:
    """Write the data set as a devkit, `directory`/VOCdevkit/VOC2012, and return that folder.

    Raises UserError as `atomic_path` does.
    """
    devkit = directory / "VOCdevkit" / "VOC2012"
    for number, (split, count) in enumerate((("train", shapes.train), ("val", shapes.val))):
        names = [f"{split}_{i:05d}" for i in range(count)]
        for i, name in enumerate(names):
            image, mask = draw(np.random.default_rng([seed, number, i]), shapes.size)
            with atomic_path(devkit / "JPEGImages" / f"{name}.jpg") as path:
                Image.fromarray(image).save(path, quality=95)
            write_label_map(devkit / "SegmentationClass" / f"{name}.png", mask)
            write_text(devkit / "Annotations" / f"{name}.xml", _annotation(name, mask))
        listing = "".join(f"{name}\n" for name in names)
        write_text(devkit / "ImageSets" / "Segmentation" / f"{split}.txt", listing)
    return devkit
