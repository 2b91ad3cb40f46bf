"""Gain of the random walk over the kind and quality of its seeds, training length and data.

AffinityNet learns from CAMs and then walks them. Here it is given CAMs made of the true masks, with
damage whose strength is found by bisection so that their seed at 0.3 has a stated mIoU:

- `part-M` covers too little: a blob is kept of each connected part of an object, nothing beside it;
- `context-M` covers the wrong places: an object's blob is displaced and blurred, so that it spills
  over into what surrounds it and misses a side of the object;
- `truth` are the masks themselves.

The stages `prepare`, `train_affinity` and `random_walk` then run as they are, with the parameters
of `voc-sample-mobilenetv2` on its data, in scratch projects below a work folder. `--learn` names
seeds that AffinityNet learns from while others are walked. What is there from an earlier call is
not computed again, and the tables show all of it; they are also written to WORKFOLDER/tables.md.

    python benchmarks/affinity_seeds.py WORKFOLDER --kinds part context --miou 40 50 60
    python benchmarks/affinity_seeds.py WORKFOLDER --kinds context --miou 40 --learn truth
"""

import argparse
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from isim import metrics, stage
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.experiments import overlay, preset
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.params import Crf
from isim.passes import counts, each
from isim.runtime import atomic
from isim.runtime import figures as reported
from isim.runtime.here import Here
from isim.runtime.paths import resolve_path

PRESET = "voc-sample-mobilenetv2"
STRIDE, THRESHOLD = 4, 0.3
# Points of mIoU between a seed and its target; strengths that it is looked for between.
TOLERANCE, MILDEST, WORST = 0.2, 0.03, 30.0
# Displacement of `context` in spreads of its blur: precision and recall are then about those of
# DeepLabCAM's seeds (51 and 70 % at an mIoU of 43).
DISPLACEMENT = 1.6
# Walks by name: the preset's, the paper's with the preset's background, the paper's.
WALKS: Mapping[str, Mapping[str, Any]] = {
    "beta 16, constant": {"beta": 16, "background": "constant", "crf_after": True},
    "beta 8, constant": {"beta": 8, "background": "constant", "crf_after": False},
    "beta 8, power 16": {"beta": 8, "background": "power", "alpha": 16, "crf_after": False},
}

Plane = NDArray[np.float32]
Figures = dict[str, Any]


def part(inside: Plane, damage: float, draws: np.random.Generator) -> Plane:
    """Keep a blob of each connected part of an object (h, w) in [0, 1], the smaller the worse.

    It is a Gaussian round a place drawn from the part's inner half.
    """
    count, regions = cv2.connectedComponents((inside > 0.5).astype(np.uint8))
    rows, columns = np.indices(inside.shape)
    blobs = np.zeros(inside.shape, np.float32)
    for region in (regions == number for number in range(1, count)):
        depth = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 3)
        places = np.argwhere(depth >= depth.max() / 2)
        row, column = places[draws.integers(len(places))]
        spread = region.sum() / damage**2  # squared
        distance = (rows - row) ** 2 + (columns - column) ** 2
        blobs = np.maximum(blobs, np.exp(-distance / (2 * spread)) * region)
    # Things thinner than a pixel of the map are kept.
    return np.asarray(blobs if count > 1 else inside, np.float32) * inside


def context(inside: Plane, damage: float, draws: np.random.Generator) -> Plane:
    """Displace an object (h, w) in [0, 1] in a drawn direction and blur it, both by its size."""
    angle, spread = draws.uniform(0, 2 * np.pi), damage * float(np.sqrt(inside.sum()))
    if not spread:
        return inside
    right, down = (DISPLACEMENT * spread * turn(angle) for turn in (np.cos, np.sin))
    moves = np.array([[1, 0, right], [0, 1, down]], np.float32)
    moved = cv2.warpAffine(inside, moves, inside.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    blob = cv2.GaussianBlur(moved, (0, 0), spread, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(blob / (blob.max() + 1e-5), np.float32)


KINDS: Mapping[str, Callable[[Plane, float, np.random.Generator], Plane]] = {
    "part": part,
    "context": context,
    "truth": lambda inside, damage, draws: inside,
}


def damaged(item: Item, kind: str, damage: float, seed: int) -> tuple[Plane, tuple[int, int]]:
    """Make an image's CAMs (K', h, w) of its mask, at `STRIDE`; return the mask's size, too."""
    assert item.mask is not None
    mask = files.read_label_map(item.mask)
    height, width = mask.shape
    small = -(-width // STRIDE), -(-height // STRIDE)
    draws = np.random.default_rng([seed, zlib.crc32(item.id.encode())])
    planes = [
        KINDS[kind](
            cv2.resize((mask == label).astype(np.float32), small, interpolation=cv2.INTER_AREA),
            damage,
            draws,
        )
        for label in item.class_ids
    ]
    # As they are stored.
    return np.stack(planes).astype(np.float16).astype(np.float32), (height, width)


def score(
    items: Sequence[Item], cams: Callable[[Item], tuple[Plane, tuple[int, int]]], refine: Crf | None
) -> Figures:
    """Score the seeds of CAMs over a split and, with `refine`, what the dCRF makes of them."""

    def finish(item: Item) -> Figures:
        planes, size = cams(item)
        labels = {"seed": seeds.seed(seeds.grow(planes, size), item.class_ids, THRESHOLD)}
        if refine is not None:
            image = files.read_image(item.image)
            labels["seed_crf"] = crf.refine(image, labels["seed"], item.class_ids, refine)
        return counts.scored(item, labels, num_labels)

    num_labels = len(items[0].known_label) + 1
    lines = each.image(Here(Path()), items, finish, name=None).lines
    found: Figures = {}
    for name in ("seed", "seed_crf") if refine else ("seed",):
        confusion = counts.total(lines, name, (num_labels, num_labels))
        found |= metrics.segmentation_figures(f"{name}_", confusion)
    return found


def strength(items: Sequence[Item], kind: str, target: float, seed: int) -> float:
    """Find the damage that gives the seed of a kind an mIoU of `target` percent."""
    low, high = MILDEST, WORST
    while high > 1.0001 * low:
        damage = float(np.sqrt(low * high))

        def cams(item: Item, damage: float = damage) -> tuple[Plane, tuple[int, int]]:
            return damaged(item, kind, damage, seed)

        miss = 100 * score(items, cams, None)["seed_miou"] - target
        if abs(miss) <= TOLERANCE:
            return damage
        low, high = (damage, high) if miss > 0 else (low, damage)
    raise SystemExit(f"no {kind} damage gives a seed of {target} mIoU; choose another")


def make_cams(work: Path, name: str, seed: int) -> tuple[Path, Figures]:
    """Make the CAMs of all images, once, in `cams/<name>-<seed>`; return their seeds' figures."""
    folder, record = work / "cams" / f"{name}-{seed}", work / "cams" / f"{name}-{seed}.json"
    if not record.exists():
        data, (kind, _, target) = prepared.load(work / "all"), name.partition("-")
        scored = data.split("val")
        damage = strength(scored, kind, float(target), seed) if target else 0.0
        with atomic.atomic_directory(folder) as out:
            for item in data.split("train"):
                planes, size = damaged(item, kind, damage, seed)
                files.write_cam(out / f"{item.id}.npz", planes, item.class_ids, size)
        found = score(
            scored,
            lambda item: files.read_cam_of(folder / f"{item.id}.npz", item.image, item.class_ids),
            preset.parameters(PRESET).random_walk.crf,
        )
        atomic.write_json(record, {"damage": damage, **found})
    figures: Figures = json.loads(record.read_text())
    return folder, figures


def set_parameters(root: Path, values: Mapping[str, Any]) -> None:
    """Write the preset's parameters with other values to a project."""
    tree = overlay.tree(PRESET)
    overlay.merge(tree, {"prepare": {"root": "devkit"}})
    overlay.merge(tree, values)
    atomic.write_text(root / "params.yaml", overlay.dump(tree))


def open_project(root: Path, images: int, every: int) -> None:
    """Prepare a project: `train` has so many images to learn from (0: all), `val` those scored."""
    record = root / "images.json"
    asked = {"images": images, "every": every}
    if (root / "data/prepared").exists():
        # A row would else be of other images than its call says.
        if json.loads(record.read_text()) != asked:
            raise SystemExit(f"{root} was made with {record.read_text()}; take another folder")
        return
    given = resolve_path(preset.parameters(PRESET).prepare.root, Path.cwd())
    source, devkit = given / "VOCdevkit/VOC2012", root / "devkit"
    lists = "ImageSets/Segmentation"
    shutil.rmtree(devkit, ignore_errors=True)
    (devkit / lists).mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass", "Annotations"):
        (devkit / name).symlink_to(source / name)
    ids = (source / lists / "train.txt").read_text().split()
    places = np.arange(images or len(ids)) * len(ids) // (images or len(ids))
    chosen = {"train": [ids[place] for place in places], "val": ids[::every]}
    for split, names in chosen.items():
        atomic.write_text(devkit / lists / f"{split}.txt", "\n".join(names) + "\n")
    atomic.write_json(record, asked)
    set_parameters(root, {})
    stage.start("prepare", root)


def lay(cams: Path, root: Path, split: str) -> None:
    """Give a project the CAMs of a split."""
    with atomic.atomic_directory(root / "data/cams" / split) as out:
        for item in prepared.load(root).split(split):
            shutil.copy(cams / f"{item.id}.npz", out)


def learn(root: Path, cams: Path, epochs: int, seed: int) -> Figures:
    """Train a project's AffinityNet, once; return its figures."""
    record = root / "learned.json"
    if not record.exists():
        lay(cams, root, "train")
        set_parameters(root, {"train_affinity": {"epochs": epochs, "seed": seed, "pictures": 0}})
        before = sum(os.times()[:4])
        stage.start("train_affinity", root)
        figures = reported.read(root / "reports/train_affinity")
        # The machine may be shared: seconds of its cores, not of the clock.
        figures["core_minutes"] = (sum(os.times()[:4]) - before) / 60
        atomic.write_json(record, figures)
    found: Figures = json.loads(record.read_text())
    return found


def walk(root: Path, cams: Path) -> dict[str, Figures]:
    """Walk the scored images' CAMs by a project's AffinityNet in each of `WALKS`."""
    lay(cams, root, "val")
    found = {}
    for name, values in WALKS.items():
        changed = {"splits": ["val"], "pictures": 0, **values}
        set_parameters(root, {"random_walk": changed})
        stage.start("random_walk", root)
        figures = reported.read(root / "reports/random_walk")
        found[name] = figures["val"]
    return found


def run(work: Path, name: str, seed: int, options: argparse.Namespace) -> None:
    """Learn from seeds and walk seeds, and record the row; nothing if it is recorded."""
    learned, epochs = options.learn or name, options.epochs
    net = f"{learned}-{options.images or 'all'}-{epochs}-{seed}"
    record = work / "rows" / f"{name}-by-{net}.json"
    if record.exists():
        return
    print(f"== {name} by {net}", flush=True)
    root = work / "nets" / net
    open_project(root, options.images, options.every)
    figures = learn(root, make_cams(work, learned, seed)[0], epochs, seed)
    cams, base = make_cams(work, name, seed)
    row = {"walked": name, "learned": learned, "seed": seed, "epochs": epochs, **figures}
    atomic.write_json(record, {**row, "seeds": base, "walks": walk(root, cams)})


def tables(work: Path) -> str:
    """Make two tables of all rows: by the preset's walk, and by the others."""
    rows = [json.loads(path.read_text()) for path in sorted((work / "rows").glob("*.json"))]
    batch = preset.parameters(PRESET).train_affinity.batch
    first, *others = WALKS
    about = ["seeds", "learned from", "rng", "images", "steps"]
    main = [*about, "seed", "precision", "recall", "+ dCRF", "sure", "of them right"]
    main += ["walk", "gain", "precision", "recall", "walk + dCRF", "core minutes"]
    lines, more = [[*main]], [[*about, "seed", first, *others]]
    for row in rows:
        images, base = row["images"], row["seeds"]
        steps = row["epochs"] * max(1, images // batch)
        told = [row["walked"], row["learned"], row["seed"], images, steps]
        walked, seed = row["walks"][first], base["seed_miou"]
        shares = [base[f"seed_{key}"] for key in ("miou", "precision", "recall")]
        shares += [base["seed_crf_miou"], row["sure_share"], row["sure_accuracy"]]
        shares += [walked["walk_miou"], walked["walk_miou"] - seed]
        shares += [walked[f"walk_{key}"] for key in ("precision", "recall")]
        shares += [walked["walk_crf_miou"]]
        cells = [f"{100 * value:.1f}" for value in shares]
        lines.append([*map(str, told), *cells, f"{row['core_minutes']:.1f}"])
        mious = [seed, *(row["walks"][name]["walk_miou"] for name in WALKS)]
        more.append([*map(str, told), *(f"{100 * value:.1f}" for value in mious)])
    texts = []
    for table in (lines, more):
        table.insert(1, ["---"] * len(table[0]))
        texts.append("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    return f"mIoU etc. in percent, walk: {first}\n\n{texts[0]}\n\nmIoU by walk\n\n{texts[1]}\n"


def main() -> None:
    """Run what is asked for; print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for projects and rows")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["part", "context"])
    parser.add_argument("--miou", type=float, nargs="+", default=[40, 50, 60], help="of the seed")
    parser.add_argument("--learn", help="seeds that AffinityNet learns from (default: the same)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of damage and training")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=0, help="learned from, evenly; 0: all")
    parser.add_argument("--every", type=int, default=1, help="walk and score every k-th image")
    options = parser.parse_args()
    names = [
        "-".join((kind, *target))
        for kind in options.kinds
        for target in ([()] if kind == "truth" else [(f"{miou:g}",) for miou in options.miou])
    ]
    work = options.work.resolve()
    # The user's own runs, and where they resume, are left alone.
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work / 'mlflow.db'}"
    os.environ.pop("DVC_ROOT", None)
    open_project(work / "all", 0, options.every)
    for seed in options.seeds:
        for name in names:
            run(work, name, seed, options)
    text = tables(work)
    atomic.write_text(work / "tables.md", text)
    print(text)


if __name__ == "__main__":
    main()
