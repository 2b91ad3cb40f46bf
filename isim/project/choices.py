"""Parameters of a new project: the data are looked at first, and each choice has its reason."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isim.data.files import image_size
from isim.data.sources import readers
from isim.data.sources.source import Source
from isim.errors import UserError, cut, one_line
from isim.experiments import cells, overlay, preset
from isim.params import Params, Prepare, flatten, validate
from isim.project.growth import FEW_IMAGES
from isim.runtime.paths import resolve_path

# Longer sides of the images that were measured on VOC (docs/frozen.md): 768 px gave 2 to 3 points
# more for 2.25 times the pixels, which matters on a CPU.
SIDES = {"cpu": 512, "cuda": 768}
# Scales that CAMs are averaged over: those measured with 512 px, and from 768 px on those with 768.
SCALES = {512: [1.0, 1.25], 768: [0.75, 1.0]}
# Fewer patches a side than 16 tell little of where an object is; not measured.
LEAST_SIDE = 256
# A step's patches: at most a quarter of all that there are, and this many at least; not measured.
BATCH_SHARE, LEAST_BATCH = 4, 256
# Steps of networks that are trained, not frozen: those of preset voc-sample-mobilenetv2, whose 562
# images are 35 steps an epoch (docs/results.md); and the bounds of their epochs, not measured.
STEPS = {"train_cam": 700, "train_segmenter": 420}
EPOCHS = (10, 100)
# Folders of masks below the root, as the source `folder` looks for them: the first counts.
MASKS = ("masks", "SegmentationClass")
# Images whose sizes are looked at.
SAMPLE = 200
# Dots in the name of a parameter.
_DEEPEST = 9


@dataclass(frozen=True)
class Wishes:
    """Options of `isim init`; None: to be chosen. `settings` are NAME=VALUE."""

    images: Path | None
    labels: Path | None = None
    masks: Path | None = None
    weights: str | None = None
    encoder: str | None = None
    preset: str = "own-images"
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """A parameter by its dotted name, its value, and the reason for it in a few words."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Chosen:
    """Parameters of a project, as YAML with comments and checked, and how they came about."""

    yaml: str
    params: Params
    found: list[str]
    choices: list[Choice]

    def lines(self) -> list[str]:
        """Tell what was found and what was chosen, and why."""
        width = max(len(choice.name) for choice in self.choices) if self.choices else 0
        rows = [f"  {c.name:<{width}}  {_shown(c.value)}: {c.why}" for c in self.choices]
        return [*self.found, "chosen, in params.yaml:", *rows]


def make(wishes: Wishes, folder: Path) -> Chosen:
    """Choose the parameters of a project in `folder`, after a look at the data.

    Raises UserError when the data cannot be read, or for a wish that cannot be granted.
    """
    tree = YAML(typ="rt").load(preset.text(wishes.preset))
    # What is chosen depends on them, and they count last.
    given = [_setting(text) for text in wishes.settings]
    choices = [] if wishes.images is None else _data(wishes)
    params = _merged(tree, [*choices, *given])
    source = look(params.prepare, folder)
    if wishes.images is not None and wishes.labels is None:
        choices += _labels_beside(source, Path(params.prepare.root))
    if wishes.images is not None and len(source.entries) < FEW_IMAGES:
        choices.append(Choice("prepare.val_fraction", 0.0, "too few images to hold some out"))
        params = _merged(tree, [*choices, *given])
        source = look(params.prepare, folder)
    if wishes.images is not None:
        _require_labelled(source)
        choices += _splits(source)
    sizes = _sizes(source)
    choices += _networks(wishes, params, sizes, folder)
    choices += _thresholds(params) if wishes.preset == Wishes.preset else []
    params = _merged(tree, [*choices, *given])
    images = len(source.splits.get("train", ()))
    choices += _scales(params) if wishes.preset == Wishes.preset else []
    choices += _batches(params, images)
    # The epochs of another preset are a part of what it is.
    choices += _epochs(params, images) if wishes.preset == Wishes.preset else []
    choices += given
    params = _merged(tree, choices)
    # The last choice of a parameter is the one that counts.
    choices = [*{choice.name: choice for choice in choices}.values()]
    return Chosen(overlay.dump(tree), params, _found(params.prepare, source, sizes), choices)


def look(params: Prepare, folder: Path) -> Source:
    """Read the lists of the data of a project; no image is opened. Errors are the reader's."""
    with tempfile.TemporaryDirectory(prefix="isim-") as made:
        out = Path(made)
        data = out if params.source in readers.GENERATED else resolve_path(params.root, folder)
        return readers.read(params, data, out)


def _merged(tree: Any, choices: Sequence[Choice]) -> Params:  # noqa: ANN401 - a YAML tree
    overlay.merge(tree, cells.nest({choice.name: choice.value for choice in choices}))
    return validate(overlay.plain(overlay.dump(tree)), "the parameters of the new project")


def _data(wishes: Wishes) -> list[Choice]:
    """Say where the data are. Raises UserError for a path that is not there, or masks not read."""
    given = {"images": wishes.images, "labels": wishes.labels, "masks": wishes.masks}
    there = {}
    for name, path in given.items():
        if path is not None:
            there[name] = path.expanduser().resolve()
            if not there[name].exists():
                raise UserError(f"--{name}: {path} does not exist; mend the path")
    root = there["images"]
    if not root.is_dir():
        raise UserError(f"--images: {wishes.images} is no folder; name the folder of the images")
    if "masks" in there:
        _require_read(there["masks"], root)
    labels = there.get("labels")
    told = "given" if labels else "found in the folder of the images"
    return [
        Choice("prepare.source", "folder", "your own images"),
        Choice("prepare.root", str(root), "read where they are; none is copied"),
        Choice("prepare.download", False, "nothing is to be fetched"),
        Choice("prepare.sbd", False, "a part of VOC"),
        Choice("prepare.labels", _below(labels, root) if labels else "auto", told),
    ]


def _require_read(masks: Path, root: Path) -> None:
    """Check that the masks that are read are those of this folder. Raises UserError if not."""
    places = [root / name for name in MASKS]
    taken = next((place for place in places if place.is_dir()), None)
    link = f"ln -s {masks} {places[0]}"
    if taken is None:
        raise UserError(
            f"--masks: masks are read from {places[0]}; move them there, or link them: {link}"
        )
    if taken.resolve() != masks:
        then = "" if masks in places else f", and link yours: {link}"
        raise UserError(
            f"--masks: masks are read from {taken}, not from {masks}; move {taken.name} away{then}"
        )


def _labels_beside(source: Source, root: Path) -> list[Choice]:
    """Name the label file that was found beside the root: it is a dependency of its own."""
    path = source.labels
    if path is None or path.resolve().is_relative_to(root.resolve()):
        return []
    return [Choice("prepare.labels", str(path), "found beside the folder of the images")]


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _require_labelled(source: Source) -> None:
    """Check that there are images to learn from. Raises UserError with the reason why not."""
    if source.splits.get("train") or source.splits.get("val"):
        return
    found = [problem for problem in source.problems if problem.error]
    # That there are no classes follows from the others.
    told = [problem.what for problem in found if problem.kind != "number of classes"]
    why = one_line(told[0], 200) if told else "the label file names none of them"
    raise UserError(f"no image has labels that can be used, of {len(source.entries)}: {why}")


def _splits(source: Source) -> list[Choice]:
    """Name the splits that there are, in all stages, and the label sets."""
    there = [name for name in ("train", "val") if source.splits.get(name)]
    unlabelled = ["unlabelled"] if source.splits.get("unlabelled") else []
    held_out = "val" in there
    tested = there[1:] + unlabelled or there
    masks = any(source.entries[id_].mask for id_ in source.splits.get("train", ()))
    sets = [{"name": "last_round", "path": "data/pseudo_labels"}]
    why = "no masks to compare with"
    if masks:
        sets.append({"name": "ground_truth", "path": "data/prepared"})
        why = "there are masks: how good full supervision is"
    none = "no image is held out"
    return [
        Choice(
            "train_cam.eval_split", "val" if held_out else "none", "held out" if held_out else none
        ),
        Choice("export_cams.splits", there, "those with tags"),
        Choice(
            "train_segmenter.eval_splits",
            tested,
            "not trained on; with train, too, the page orders better and takes longer"
            if held_out
            else none,
        ),
        Choice("label_sets", sets, why),
    ]


def _networks(
    wishes: Wishes, params: Params, sizes: Sequence[tuple[int, int]], folder: Path
) -> list[Choice]:
    """Choose encoder, weights and, for method frozen, the size of the images."""
    from isim.runtime import devices

    device = devices.default().type
    if wishes.encoder:
        why = "given"
    elif device == "cpu":
        why = "no GPU: the best that was measured on a CPU"
    else:
        why = f"{device}: the best that was measured; larger ones were not"
    found = []
    for section in ("train_cam", "train_segmenter"):
        given: Any = getattr(params, section)
        frozen, encoder = given.method == "frozen", wishes.encoder or given.encoder
        if not (frozen or wishes.encoder or wishes.weights or given.weights == "imagenet"):
            continue
        weights, reason = _weights(wishes, encoder, given.weights, folder)
        if frozen or wishes.encoder:
            found += [Choice(f"{section}.encoder", encoder, why)]
        found += [Choice(f"{section}.weights", weights, reason)]
        if frozen and sizes:
            side, told = _side(sizes, device)
            found.append(Choice(f"{section}.features.sides", [side], told))
    return found


def _thresholds(params: Params) -> list[Choice]:
    """Choose those of a network that is trained: the preset's belong to frozen heads."""
    if params.train_cam.method == "frozen":
        return []
    why = "of trained CAMs, chosen without masks"
    sections = ("train_cam", "export_cams", "evaluate")
    walked = preset.parameters("voc-sample-mobilenetv2").random_walk.threshold
    return [
        *(Choice(f"{section}.threshold", "auto", why) for section in sections),
        Choice("random_walk.threshold", walked, "of trained CAMs, as measured on photographs"),
    ]


def _scales(params: Params) -> list[Choice]:
    """Choose the scales that CAMs are averaged over, by the side that counts."""
    given = params.train_cam
    if given.method != "frozen":
        return []
    scales = SCALES[768 if max(given.features.sides) >= 768 else 512]
    why = "CAMs are the mean of those at so many times the side"
    return [Choice("train_cam.features.scales", scales, why)]


def _batches(params: Params, images: int) -> list[Choice]:
    """Make batches smaller where few images have few patches: each step would see all of them."""
    found = []
    for section, head in (("train_cam", "frozen.head"), ("train_segmenter", "head")):
        given: Any = getattr(params, section)
        batch = given.frozen.head.batch if section == "train_cam" else given.head.batch
        # Images are longer than wide, 4:3 as cameras have them.
        patches = images * 0.75 * (max(given.features.sides) / given.output_stride) ** 2
        fitting = max(LEAST_BATCH, 2 ** int(math.log2(max(1, patches / BATCH_SHARE))))
        if given.method == "frozen" and fitting < batch:
            why = f"{images} images to learn from have few patches"
            found.append(Choice(f"{section}.{head}.batch", fitting, why))
    return found


def _epochs(params: Params, images: int) -> list[Choice]:
    """Choose the epochs of networks that are trained, and what is counted in them."""
    found = []
    low, high = EPOCHS
    for section, steps in STEPS.items():
        given: Any = getattr(params, section)
        if given.method == "frozen":
            continue
        each = max(1, images // given.batch)
        epochs = min(max(round(steps / each), low), high)
        why = (
            f"{images} images, {each} steps an epoch: {steps} steps as on the VOC sample, but "
            f"{low} to {high} epochs"
        )
        found.append(Choice(f"{section}.epochs", epochs, why))
        # In the same shares of the training as before: the rounds stay as many.
        for name in ("warmup_epochs", "round_every", "score_every"):
            if section == "train_cam" and (value := getattr(given, name)):
                fitting = max(1, round(value * epochs / given.epochs))
                found.append(Choice(f"{section}.{name}", fitting, f"of {epochs} epochs"))
    return found


def _weights(wishes: Wishes, encoder: str, preset_s: str, folder: Path) -> tuple[str, str]:
    if wishes.weights in ("imagenet", "none"):
        return wishes.weights, "given"
    if wishes.weights is not None:
        path = Path(wishes.weights).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"--weights: no file {path}; name a safetensors file, imagenet or none")
        return str(path), "given"
    if preset_s == "none" and not wishes.encoder:
        return preset_s, "the preset's"
    path = resolve_path(f"$ISIM_SHARED/weights/{encoder}.safetensors", folder)
    if path.is_file():
        return str(path), "the file is there"
    return "imagenet", f"timm fetches them when they are needed; {without_network(encoder)}"


def without_network(encoder: str) -> str:
    """Tell what to do about the weights of an encoder where there is no network."""
    return (
        f"without a network fetch {encoder} elsewhere, and give its safetensors file as --weights, "
        "or put it into $ISIM_SHARED/weights"
    )


def _side(sizes: Sequence[tuple[int, int]], device: str) -> tuple[int, str]:
    most = SIDES.get(device, SIDES["cuda"])
    longer = sorted(max(size) for size in sizes)[len(sizes) // 2]
    # A multiple of every stride.
    fitting = -(-longer // 32) * 32
    if fitting >= most:
        return most, f"px of the longer side, as measured; the images have {longer}"
    if fitting < LEAST_SIDE:
        return LEAST_SIDE, f"px of the longer side; the images have {longer}, too few to see parts"
    return fitting, "px of the longer side, as the images have"


def _setting(text: str) -> Choice:
    """Parse NAME=VALUE; the value is YAML, as `dvc exp run -S` takes it."""
    name, equals, value = text.partition("=")
    try:
        parsed = YAML(typ="safe").load(value)
    # Also values that ruamel finds no number, or no date, in.
    except (YAMLError, ValueError, RecursionError):
        equals = ""
    if not equals or not name or name.count(".") > _DEEPEST:
        raise UserError(f"{text}: write NAME=VALUE, such as train_cam.seed=1")
    return Choice(name, parsed, "given")


def _sizes(source: Source) -> list[tuple[int, int]]:
    """Read (H, W) of some images, spread over the list; `prepare` tells what cannot be read."""
    entries = [source.entries[id_] for id_ in sorted(source.entries)]
    found = []
    for entry in entries[:: max(1, -(-len(entries) // SAMPLE))]:
        try:
            found.append(image_size(entry.image))
        except UserError:
            continue
    return found


def _found(params: Prepare, source: Source, sizes: Sequence[tuple[int, int]]) -> list[str]:
    entries = source.entries.values()
    classes = ", ".join(cut(name, 40) for name in source.classes[:8]) + (
        ", ..." if len(source.classes) > 8 else ""
    )
    counts = ", ".join(f"{len(ids)} {name}" for name, ids in source.splits.items())
    none = sum(entry.labels == () for entry in entries)
    unknown = sum(entry.labels is None for entry in entries)
    masks = sum(entry.mask is not None for entry in entries)
    where = "made" if params.source in readers.GENERATED else f"in {params.root}"
    parts = [f"{len(source.entries)} images {where} ({counts})", f"{masks} masks"]
    parts.append(f"{len(source.classes)} classes ({classes})")
    parts += [f"{none} of the images show none of them"] if none else []
    parts += [f"what {unknown} of the images show is unknown"] if unknown else []
    if sizes:
        small, large = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
        parts.append(f"{small[1]}x{small[0]} to {large[1]}x{large[0]} pixels")
    lines = [f"found: {'; '.join(parts)}"]
    problems = [*source.problems, *(p for entry in entries for p in entry.problems)]
    errors = [problem.what for problem in problems if problem.error]
    if errors:
        lines.append(
            f"the lists have {len(errors)} problem{'s' if len(errors) > 1 else ''}, such as: "
            f"{errors[0]}; `dvc repro` lists all of them"
        )
    return lines


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return str(value.get("name", flatten(value)))
    return (
        {True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )
