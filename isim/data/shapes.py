"""The embedded data set: generated animals in a VOC devkit (spec 2, "Shapes").

Made for one purpose: the paper's effect must be visible, and measurable, without a download,
without pretrained weights, on two CPU cores. Four choices make it so.

- **A small part tells the class.** An animal wears the face of its class (a badger's stripes, a
  duck's bill and eye, a fox's ears and muzzle, a lizard's frill, a ram's horns) on a sixth of
  its area. A network that sees image-level labels alone looks for faces, and its CAM misses the
  rest of the animal, as CAMs of photographs do.
- **The body does not.** Colour and pattern of the coat, build, legs and tail are drawn from the
  same distributions for all classes, and most images show more than one animal. A body's class
  follows from its context only, the face on it: the segmentation loss teaches that, the
  classification loss hardly does.
- **The body is homogeneous, but not quite.** A coat is one colour with pattern, shading and noise
  over it. dCRF therefore fills a body that the seed covers by half and empties one that it
  covers by less: it decides for the single image, the network averages over all of them, and
  the bodies that it learnt raise the seeds of the next round. That is the paper's effect.
- **The background is no giveaway.** Boulders wear the coats of animals, flowers the colours of
  faces, some coats resemble the ground, and the scene (meadow, sand, water, wood, rock) is
  independent of the class.

Objects have a border of 255 in the masks, as in VOC. Everything follows from the seed; image `i`
of a split does not depend on how many images are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from isim.atomic import atomic_path, write_text
from isim.data.files import write_label_map

CLASSES: tuple[str, ...] = ("badger", "duck", "fox", "lizard", "ram")

_IGNORE = 255
# Images are drawn at twice their size and averaged down: no jagged edges.
_OVERSAMPLING = 2

_Array = np.ndarray

_COATS = np.array(
    [
        (122, 84, 52),
        (150, 118, 80),
        (96, 92, 90),
        (142, 138, 132),
        (104, 98, 60),
        (70, 62, 58),
        (176, 154, 118),
        (126, 70, 44),
    ],
    float,
)
# Two colours a scene, and how its texture is stretched (vertical, horizontal).
_SCENES: tuple[tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int]], ...] = (
    ((70, 104, 48), (126, 148, 74), (3, 1)),
    ((196, 172, 128), (164, 136, 96), (1, 1)),
    ((58, 96, 122), (112, 148, 160), (1, 4)),
    ((44, 58, 40), (88, 84, 58), (1, 1)),
    ((120, 116, 112), (88, 86, 90), (1, 2)),
)
_FLOWERS = np.array(
    [(232, 150, 40), (236, 232, 222), (50, 150, 160), (30, 28, 30), (214, 196, 140)], float
)


@dataclass(frozen=True)
class _Layer:
    """One thing on the canvas: how opaque it is (S, S) in [0, 1], and its colours (S, S, 3)."""

    alpha: _Array
    color: _Array


def _noise(rng: np.random.Generator, side: int, cells: int, stretch: tuple[int, int]) -> _Array:
    """Fractal noise (S, S), about zero mean and unit deviation, `cells` features a side."""
    total = np.zeros((side, side), np.float32)
    for octave in range(4):
        rows = max(2, (cells << octave) // stretch[0])
        columns = max(2, (cells << octave) // stretch[1])
        grid = rng.standard_normal((min(rows, side), min(columns, side))).astype(np.float32)
        total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return total


def _edge(distance: _Array, width: float) -> _Array:
    """1 inside (distance < 0), 0 outside, with a ramp of `width` between."""
    return np.clip(0.5 - distance / width, 0, 1)


def _capsule(u: _Array, v: _Array, start: tuple[float, float], end: tuple[float, float]) -> _Array:
    """Distance of each point (u, v) from a line segment."""
    du, dv = end[0] - start[0], end[1] - start[1]
    along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - start[0] - along * du, v - start[1] - along * dv)


def _paint(color: _Array, alpha: _Array, paint: tuple[float, float, float]) -> _Array:
    return color + alpha[..., None] * (np.array(paint, np.float32) - color)


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
    color = base[None, None] * light[..., None] + relief[..., None] * rng.uniform(3, 8)
    return color.astype(np.float32)


def _badger(color: _Array, p: _Array, q: _Array, w: float) -> tuple[_Array, _Array]:
    face = _edge(np.hypot(p, q) - 0.92, w)
    color = _paint(color, face, (232, 230, 224))
    for offset in (-0.48, 0.42):
        color = _paint(color, face * _edge(np.abs(q - offset - 0.1 * p) - 0.2, w), (24, 22, 26))
    return color, _edge(np.hypot(p, q) - 1.05, w)


def _duck(color: _Array, p: _Array, q: _Array, w: float) -> tuple[_Array, _Array]:
    bill = _edge(np.hypot((p - 1.15) / 0.85, (q - 0.15) / 0.34) - 1, w * 1.5)
    color = _paint(color, bill, (236, 150, 30))
    color = _paint(color, _edge(np.hypot(p - 0.25, q + 0.3) - 0.34, w), (240, 238, 230))
    color = _paint(color, _edge(np.hypot(p - 0.3, q + 0.3) - 0.17, w), (16, 14, 14))
    return color, np.maximum(_edge(np.hypot(p, q) - 1, w), bill)


def _fox(color: _Array, p: _Array, q: _Array, w: float) -> tuple[_Array, _Array]:
    ears = np.zeros_like(p)
    for centre in (-0.45, 0.5):
        height = q + 1.55
        ear = _edge(np.maximum(np.abs(p - centre) - 0.42 * height, q + 0.4), w)
        color = _paint(color, ear, (206, 92, 30))
        ears = np.maximum(ears, ear)
    color = _paint(color, _edge(np.hypot(p, q) - 0.95, w), (206, 96, 36))
    muzzle = _edge(np.hypot((p - 0.3) / 0.7, (q - 0.45) / 0.5) - 1, w)
    color = _paint(color, muzzle, (242, 236, 224))
    color = _paint(color, _edge(np.hypot(p - 0.75, q - 0.2) - 0.18, w), (20, 16, 16))
    return color, np.maximum(_edge(np.hypot(p, q) - 1, w), ears)


def _lizard(color: _Array, p: _Array, q: _Array, w: float) -> tuple[_Array, _Array]:
    angle = np.arctan2(q, p)
    frill = _edge(np.hypot(p, q) - 1.2 - 0.22 * np.sin(9 * angle), w)
    ribs = 0.5 + 0.5 * np.sin(18 * angle)
    color = _paint(color, frill, (40, 150, 158))
    color = _paint(color, frill * ribs * 0.6, (20, 84, 120))
    color = _paint(color, _edge(np.hypot(p - 0.25, q) - 0.62, w), (150, 168, 60))
    color = _paint(color, _edge(np.hypot(p - 0.4, q + 0.15) - 0.18, w), (14, 14, 14))
    return color, frill


def _ram(color: _Array, p: _Array, q: _Array, w: float) -> tuple[_Array, _Array]:
    radius = np.hypot(p + 0.25, q + 0.3)
    horn = _edge(np.abs(radius - 0.75) - 0.34, w)
    rings = 0.5 + 0.5 * np.sin(14 * np.arctan2(q + 0.3, p + 0.25))
    face = _edge(np.hypot((p - 0.45) / 0.7, (q - 0.25) / 0.6) - 1, w)
    color = _paint(color, face, (58, 44, 40))
    color = _paint(color, horn, (222, 200, 142))
    color = _paint(color, horn * rings * 0.5, (140, 108, 66))
    return color, np.maximum(np.maximum(face, horn), _edge(np.hypot(p, q) - 0.9, w))


_FACES: tuple[Callable[..., tuple[_Array, _Array]], ...] = (_badger, _duck, _fox, _lizard, _ram)


def _local(
    side: int, centre: tuple[float, float], scale: float, angle: float, mirror: bool
) -> tuple[_Array, _Array]:
    """Coordinates (u, v), each (S, S), of the canvas in the frame of an object."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    x, y = (x - centre[0]) / scale, (y - centre[1]) / scale
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    return (-u if mirror else u), v


def _blob(rng: np.random.Generator, u: _Array, v: _Array, height: float, rough: float) -> _Array:
    """Signed distance, roughly, of an ellipse of half axes 1 and `height` with a wavy outline."""
    angle = np.arctan2(v / height, u)
    outline = np.ones_like(u)
    for wave in (2, 3, 5):
        outline += rough / wave * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v / height) - outline


def _animal(
    rng: np.random.Generator, kind: int, side: int, centre: tuple[float, float], scale: float
) -> _Layer:
    """An animal of class `kind` (index into CLASSES); `scale` = half the body's length."""
    u, v = _local(side, centre, scale, rng.uniform(-0.3, 0.3), bool(rng.integers(2)))
    w = 2 / scale  # antialiasing: two oversampled pixels
    height = rng.uniform(0.58, 0.75)
    color = _coat(rng, side, u, v)
    alpha = _edge(_blob(rng, u, v, height, 0.1), w)
    for x in rng.uniform(-0.7, 0.6, rng.integers(2, 5)):
        foot = (x + rng.uniform(-0.15, 0.15), height + rng.uniform(0.15, 0.4))
        alpha = np.maximum(alpha, _edge(_capsule(u, v, (x, height * 0.4), foot) - 0.1, w))
    tip = (rng.uniform(-1.6, -1.2), rng.uniform(-0.6, 0.4))
    tail = _capsule(u, v, (-0.8, 0.0), tip) - rng.uniform(0.06, 0.16)
    alpha = np.maximum(alpha, _edge(tail, w))
    radius = rng.uniform(0.35, 0.43)
    p = (u - rng.uniform(0.0, 0.45)) / radius
    q = (v + height * rng.uniform(-0.1, 0.4)) / radius
    color, face = _FACES[kind](color, p, q, w / radius)
    return _Layer(np.maximum(alpha, face), color)


def _boulder(
    rng: np.random.Generator, side: int, centre: tuple[float, float], scale: float
) -> _Layer:
    """A distractor: a faceless lump in the coat of an animal."""
    u, v = _local(side, centre, scale, rng.uniform(-0.6, 0.6), bool(rng.integers(2)))
    alpha = _edge(_blob(rng, u, v, rng.uniform(0.45, 0.8), 0.16), 2 / scale)
    return _Layer(alpha, _coat(rng, side, u, v))


def _flower(rng: np.random.Generator, side: int) -> _Layer:
    """A distractor: a small blot in the colour of a face."""
    scale = side * rng.uniform(0.012, 0.03)
    u, v = _local(side, tuple(rng.uniform(0, side, 2)), scale, rng.uniform(0, 3), False)
    alpha = _edge(_blob(rng, u, v, rng.uniform(0.5, 1), 0.5), 2 / scale)
    paint = _FLOWERS[rng.integers(len(_FLOWERS))] + rng.normal(0, 10, 3)
    return _Layer(alpha, np.broadcast_to(paint.astype(np.float32), (side, side, 3)))


def _scene(rng: np.random.Generator, side: int) -> _Array:
    """The background (S, S, 3)."""
    near, far, stretch = _SCENES[rng.integers(len(_SCENES))]
    slope = np.linspace(rng.uniform(0, 0.4), rng.uniform(0.6, 1), side, dtype=np.float32)
    mix = np.clip(slope[:, None] + 0.22 * _noise(rng, side, 4, stretch), 0, 1)[..., None]
    color = mix * np.array(near, np.float32) + (1 - mix) * np.array(far, np.float32)
    fine = _noise(rng, side, 24, stretch) * rng.uniform(4, 11)
    return color * np.float32(rng.uniform(0.85, 1.15)) + fine[..., None]


def _shadow(canvas: _Array, alpha: _Array, shift: int) -> _Array:
    cast = cv2.GaussianBlur(np.roll(alpha, shift, axis=0), (0, 0), shift * 0.8)
    return canvas * (1 - 0.35 * cast * (1 - alpha))[..., None]


def _places(rng: np.random.Generator, count: int, side: int) -> list[tuple[float, float, float]]:
    """Centres and scales (x, y, half length) of objects that hardly overlap."""
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


def draw(rng: np.random.Generator, size: int) -> tuple[_Array, _Array]:
    """Draw one image.

    Args:
        rng: Source of everything random.
        size: Side in pixels.

    Returns:
        The image (size, size, 3) uint8 RGB, and its mask (size, size) uint8: 0 background, 1.. the
        classes in the order of CLASSES, 255 the border of objects.
    """
    side = size * _OVERSAMPLING
    canvas = _scene(rng, side)
    for _ in range(rng.integers(1, 4)):
        stone = _boulder(rng, side, tuple(rng.uniform(0, side, 2)), side * rng.uniform(0.06, 0.2))
        canvas = _shadow(canvas, stone.alpha, side // 40)
        canvas += stone.alpha[..., None] * (stone.color - canvas)
    for _ in range(rng.integers(2, 7)):
        flower = _flower(rng, side)
        canvas = canvas + flower.alpha[..., None] * (flower.color - canvas)
    mask = np.zeros((size, size), np.uint8)
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15]))
    for x, y, scale in _places(rng, count, side):
        kind = int(rng.integers(len(CLASSES)))
        animal = _animal(rng, kind, side, (x, y), scale)
        canvas = _shadow(canvas, animal.alpha, side // 40)
        canvas = canvas + animal.alpha[..., None] * (animal.color - canvas)
        share = cv2.resize(animal.alpha, (size, size), interpolation=cv2.INTER_AREA)
        inside = (share > 0.5).astype(np.uint8)
        border = cv2.dilate(inside, np.ones((3, 3), np.uint8)) - inside
        mask[border == 1] = _IGNORE
        mask[inside == 1] = kind + 1
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    image = image + rng.normal(0, 2.5, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask


def _annotation(name: str, mask: _Array) -> str:
    """VOC's XML of one image: an `object` for each class in the mask."""
    objects = []
    for kind in sorted(set(mask.ravel().tolist()) - {0, _IGNORE}):
        rows, columns = np.nonzero(mask == kind)
        box = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
        corners = "".join(
            f"<{tag}>{value}</{tag}>"
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        objects.append(
            f"  <object>\n    <name>{CLASSES[kind - 1]}</name>\n    <difficult>0</difficult>\n"
            f"    <bndbox>{corners}</bndbox>\n  </object>\n"
        )
    height, width = mask.shape
    return (
        f"<annotation>\n  <filename>{name}.jpg</filename>\n"
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
        f"{''.join(objects)}</annotation>\n"
    )


def generate(directory: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write the data set as `directory`/VOCdevkit/VOC2012.

    Args:
        directory: Parent of `VOCdevkit`; created when missing.
        train: Number of images in the list `train`.
        val: Number of images in the list `val`.
        size: Side of the square images in pixels.
        seed: The same seed gives the same files.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    devkit = directory / "VOCdevkit" / "VOC2012"
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        names = [f"{split}_{i:05d}" for i in range(count)]
        for i, name in enumerate(names):
            image, mask = draw(np.random.default_rng([seed, number, i]), size)
            with atomic_path(devkit / "JPEGImages" / f"{name}.jpg") as path:
                Image.fromarray(image).save(path, quality=95)
            write_label_map(devkit / "SegmentationClass" / f"{name}.png", mask)
            write_text(devkit / "Annotations" / f"{name}.xml", _annotation(name, mask))
        listing = "".join(f"{name}\n" for name in names)
        write_text(devkit / "ImageSets" / "Segmentation" / f"{split}.txt", listing)
