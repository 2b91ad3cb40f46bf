"""Typed parameters: one frozen section a stage.

There are no defaults: params.yaml has all values, and says beside them what each means.
"""

import difflib
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isim import errors
from isim.errors import UserError

# Bytes of a params.yaml: ruamel reads a megabyte in ten seconds.
_MOST_BYTES = 256 << 10


def _as_tuple(value: object) -> object:
    """Take a YAML list for a tuple, and nothing else: sections are strict."""
    return tuple(value) if isinstance(value, list) else value


def _whole(value: object) -> object:
    # To Python, and so to a Literal, True is 1 and 8.0 is 8.
    if isinstance(value, bool | float):
        raise ValueError(f"must be a whole number, got {value}")
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"'{value}' has control characters; take them out")
    return value


# Every number has bounds, which real use never meets: what is beyond is a slip of the keyboard, and
# would fill the memory, or the week, before anybody notices.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Few = Annotated[int, Field(ge=1, le=1000)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
MaybeEpochs = Annotated[int, Field(ge=0, le=100_000)]
Batch = Annotated[int, Field(ge=1, le=16384)]
Channels = Annotated[int, Field(ge=1, le=8192)]
Pictures = Annotated[int, Field(ge=0, le=1000)]
Crop = Annotated[int, Field(ge=32, le=4096)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
List = BeforeValidator(_as_tuple)
Whole = BeforeValidator(_whole)
Fraction = Annotated[float, Field(gt=0, lt=1)]
# Background plane of CAMs; auto is chosen without masks, see `passes.seeds.choose_threshold`.
Threshold = Literal["auto"] | Fraction
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[float, Field(ge=1e-4, le=10_000)]
Rate = Annotated[float, Field(ge=0, le=10_000)]
Level = Annotated[float, Field(ge=-1e9, le=1e9)]
Scale = Annotated[float, Field(ge=0.05, le=4)]


def _squares(of_what: str, most: float) -> AfterValidator:
    """Make a validator: the squares of a list's numbers, which are areas, sum to `most` at most."""

    def check(values: tuple[float, ...]) -> tuple[float, ...]:
        _require_area(values, of_what, most)
        return values

    return AfterValidator(check)


def _require_area(values: tuple[float, ...], of_what: str, most: float) -> None:
    if (area := sum(value**2 for value in values)) > most:
        raise ValueError(
            f"the squares of the {len(values)} {of_what} sum to {area:,.6g}, more than "
            f"{most:,}, which would fill the memory; use fewer or smaller ones"
        )


# Each may be as large as its bound says, but not all of them: images are held at all of them.
Scales = Annotated[
    tuple[Scale, ...], List, Field(min_length=1, max_length=32), _squares("scales", 64)
]
Splits = Annotated[tuple[Text, ...], List, Field(min_length=1, max_length=32)]
Norm = Literal["batch", "frozen"]
Precision = Literal["auto", "fp32", "bf16"]
# Longer side that images are resized to.
MOST_PIXELS = 4096
# The squares of all sides of an image.
MOST_AREA = 1 << 25
# Patches a side of a grid whose affinities are walked along: 1 GB of those of all pairs.
MOST_SIDE = 128


def chosen(threshold: str | float) -> float:
    """Return a threshold as a number; a stage has chosen one that was `auto` before."""
    if isinstance(threshold, str):
        raise ValueError("the threshold has not been chosen yet")
    return threshold


class Section(BaseModel):
    """Base of all sections: immutable, unknown names are errors, no defaults.

    Types are strict: `true` is no number, `"2"` none, and 2.0 no whole one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def _distinct(splits: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(splits)) < len(splits):
        raise ValueError("a split is named twice; name each once")
    return splits


def _ordered(low: str, high: str, unequal: str = "") -> Any:  # noqa: ANN401 - pydantic's
    """Make a validator: `low` is at most `high`, or below it where `unequal` says why."""

    def check(section: Section) -> Section:
        one, other = getattr(section, low), getattr(section, high)
        if one > other or (unequal and one == other):
            bound = "be below" if unequal else "not be above"
            raise ValueError(f"{low} ({one}) must {bound} {high} ({other}){unequal}")
        return section

    return model_validator(mode="after")(check)


def _together(names: tuple[str, ...], unit: str, most: int, amount: Callable[[Any], int]) -> Any:  # noqa: ANN401 - pydantic's
    """Make a validator: the `amount` that parameters have together is at most `most`.

    Each of them is within its own bounds, which are for itself; `names` are the first parameters of
    the product, those that a user would make smaller.
    """

    def check(section: Section) -> Section:
        if (found := amount(section)) > most:
            told = " and ".join(f"{name} ({getattr(section, name)})" for name in names)
            raise ValueError(
                f"{told} together mean {found:,} {unit}, more than {most:,}; make one of them "
                "smaller"
            )
        return section

    return model_validator(mode="after")(check)


class Shapes(Section):
    """Generated data set (spec 2): counts of images and their side in pixels."""

    train: Count
    val: Count
    size: Annotated[int, Field(ge=64, le=512)]

    _fit_the_disk = _together(
        ("train", "val", "size"), "pixels", 1 << 34, lambda own: (own.train + own.val) * own.size**2
    )


class Prepare(Section):
    """Source of the images."""

    source: Literal["shapes", "voc", "coco", "folder"]
    root: Text
    labels: Text
    download: bool
    sbd: bool
    val_fraction: BelowOne
    seed: Seed
    unreadable: Literal["error", "skip"]
    mask_values: Annotated[dict[Annotated[int, Field(ge=0, le=255)], Text], Field(max_length=256)]
    sixteen_bit: Literal["refuse"] | Annotated[tuple[Level, Level], List]
    shapes: Shapes

    @model_validator(mode="after")
    def _range_is_ascending(self) -> Self:
        if self.sixteen_bit != "refuse" and self.sixteen_bit[0] >= self.sixteen_bit[1]:
            raise ValueError(
                f"sixteen_bit: {list(self.sixteen_bit)} is no range; write [low, high], such as "
                "[0, 65535]"
            )
        return self


class Crf(Section):
    """Fully connected CRF (spec 5): sxy in pixels, srgb in 8-bit levels."""

    steps: Annotated[int, Field(ge=0, le=100)]
    gt_prob: Fraction
    gaussian_sxy: Width
    gaussian_compat: Rate
    bilateral_sxy: Width
    bilateral_srgb: Width
    bilateral_compat: Rate


class Features(Section):
    """Features of a frozen encoder, computed once an image and kept on disk.

    `sides` are lengths in pixels of the longer side that images are resized to, `stages` how many
    of the encoder's last maps the heads see. What learnt at `sides` answers at `scales` times them.
    """

    sides: Annotated[
        tuple[Annotated[int, Field(ge=32, le=MOST_PIXELS)], ...],
        List,
        Field(min_length=1, max_length=16),
        _squares("sides", MOST_AREA),
    ]
    scales: Annotated[
        tuple[Annotated[float, Field(ge=0.25, le=4)], ...],
        List,
        Field(min_length=1, max_length=16),
    ]
    stages: Annotated[int, Field(ge=1, le=3)]

    @field_validator("sides", "scales")
    @classmethod
    def _each_once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("one is named twice; name each once")
        return values

    @model_validator(mode="after")
    def _fit_the_memory(self) -> Self:
        largest = max(self.scales)
        if (side := max(self.sides) * largest) > MOST_PIXELS:
            raise ValueError(
                f"scales: {largest:g} times {max(self.sides)} px is {side:g}, more than "
                f"{MOST_PIXELS}; use a smaller one"
            )
        _require_area(tuple(side * largest for side in self.sides), "sides at scales", MOST_AREA)
        return self

    def facts(self) -> dict[str, Any]:
        """Return its values by their names in a network's configuration."""
        return {"sides": self.sides, "stages": self.stages, "feature_scales": self.scales}


class DenseWalk(Section):
    """Walk along affinities of all pairs of patches; `isim.labels.dense` has the equations."""

    tau: Annotated[float, Field(ge=-1, lt=1)]
    beta: Width
    temperature: Width
    steps: Annotated[int, Field(ge=0, le=100)]


DenseAffinity = Literal["cosine", "class_distribution", "attention"]
Affinity = Literal["net", DenseAffinity]


class Head(Section):
    """Head of a network whose encoder is frozen, trained by AdamW on patches of cached features."""

    kind: Literal["linear", "mlp"]
    width: Channels
    dropout: BelowOne
    batch: Annotated[int, Field(ge=1, le=1 << 20)]
    steps: Count
    rate: Rate
    weight_decay: Rate

    _fits_the_memory = _together(
        ("batch", "width"), "activations", 1 << 30, lambda own: own.batch * own.width
    )


class FrozenLoop(Section):
    """The loop of method `frozen`: a classifier, its walked CAMs, rounds of a head."""

    pooling: Literal["gap", "mil"]
    classifier_steps: Count
    classifier_rate: Rate
    affinity: Literal["none"] | DenseAffinity
    threshold: Threshold
    margin: BelowOne
    rounds: Annotated[int, Field(ge=0, le=20)]
    sure: BelowOne
    crf_every_round: bool
    head: Head


# Spec 3.4: the two profiles that results are named after.
_BOTH = {"weight_decay": 1e-4, "encoder_rate": 0.1, "classifier_rate": 1.0, "poly_power": 0.9}
PROFILES = {
    "paper": _BOTH | {"momentum": 0.9, "decoder_rate": 0.01, "poly_epochs": 0},
    "official": _BOTH | {"momentum": 1e-4, "decoder_rate": 0.1, "poly_epochs": 5},
}


class Optimizer(Section):
    """SGD with a poly schedule (paper 4.1); a profile other than `custom` means fixed values."""

    profile: Literal["paper", "official", "custom"]
    momentum: BelowOne
    weight_decay: Rate
    encoder_rate: Rate
    decoder_rate: Rate
    classifier_rate: Rate
    poly_power: Rate
    poly_epochs: MaybeEpochs

    @model_validator(mode="after")
    def _profile_names_its_values(self) -> Self:
        for name, value in PROFILES.get(self.profile, {}).items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"profile '{self.profile}' means {name}: {value}, but {name} is "
                    f"{getattr(self, name)}; write profile: custom, or {name}: {value}"
                )
        return self


class Sgd(Section):
    """SGD with a poly schedule over all epochs; the head learns at `head_factor` times `rate`."""

    momentum: BelowOne
    weight_decay: Rate
    rate: Rate
    head_factor: Rate
    poly_power: Rate


class Training(Section):
    """Parameters that all trainings have."""

    split: Text
    seed: Seed
    encoder: Text
    weights: Text
    output_stride: Annotated[Literal[8, 16, 32], Whole]
    input_norm: Literal["encoder", "unit"]
    crop: Crop
    batch: Batch
    epochs: Epochs
    precision: Precision
    compile: bool
    pictures: Pictures

    _fits_the_memory = _together(
        ("batch", "crop"), "pixels a step", 1 << 31, lambda own: own.batch * own.crop**2
    )


METHODS = ("frozen", "cam", "deeplabcam", "unetcam_learnable", "unetcam_bilinear")


# Which architectures smp has is known where networks are built: this module stays light.
def _known_method(method: str) -> str:
    if method not in METHODS and not re.fullmatch(r"smp:\w+", method):
        raise ValueError(
            f"there is no '{method}'; use {', '.join(METHODS)} or smp:<Name>, such as smp:FPN"
        )
    return method


Method = Annotated[Text, AfterValidator(_known_method)]


class Converged(Section):
    """Rule by which losses have converged; `isim.training.rounds.converged` states the rule."""

    patience: Epochs
    tolerance: BelowOne
    cap: Epochs


class TrainCam(Training):
    """The ISIM loop (spec 3)."""

    method: Method
    eval_split: Text
    encoder_norm: Norm
    atrous_rates: Annotated[tuple[Few, Few, Few], List]
    decoder_channels: Channels
    warmup_epochs: Epochs
    round_rule: Literal["frequency", "convergence"]
    round_every: Epochs
    convergence: Converged
    score_every: MaybeEpochs
    segmentation_weight: Rate
    optimizer: Optimizer
    scales: Scales
    flip: bool
    threshold: Threshold
    start: Text
    decoder_labels: bool
    frozen: FrozenLoop
    features: Features
    dense_walk: DenseWalk
    crf: Crf

    _warmup_ends = _ordered("warmup_epochs", "epochs", ", or no pseudo-label is ever made")

    @property
    def starts_from_labels(self) -> bool:
        """`start` is a folder of label maps."""
        return self.start not in ("none", "previous")

    @property
    def certain_rounds(self) -> int:
        """Number of rounds that there are at least, whatever the losses; by frequency, exactly.

        `isim.training.rounds.due` decides, a layer above this one: a test holds them together.
        """
        if self.method == "frozen":
            return max(self.frozen.rounds, 1)
        every = self.round_every if self.round_rule == "frequency" else self.convergence.cap
        return 1 + (self.epochs - 1 - self.warmup_epochs) // every

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stride = self.output_stride
        if self.method in ("frozen", "cam"):
            wanted = {"decoder_labels": self.decoder_labels, "start": self.starts_from_labels}
            for name in (name for name, is_on in wanted.items() if is_on):
                raise ValueError(
                    f"{name}: method {self.method} has no decoder; use deeplabcam or another"
                )
        if self.method == "frozen":
            side, scale = max(self.features.sides), max(1, *self.features.scales)
            if side * scale > MOST_SIDE * stride:
                times = f" times {scale:g} (scales)" if scale > 1 else ""
                raise ValueError(
                    f"features.sides: {side}{times} at output_stride {stride} is more than "
                    f"{MOST_SIDE} patches a side, whose affinities fill the memory; use "
                    f"{int(MOST_SIDE * stride / scale)} at most"
                )
            if self.start == "previous" and not self.frozen.rounds:
                raise ValueError("start: previous labels the first round; set frozen.rounds to 1")
            return self
        if PurePosixPath(self.start).parts[:2] == ("data", "pseudo_labels"):
            raise ValueError(
                f"start ({self.start}) is where this stage writes its own labels; copy the folder "
                "elsewhere and name that"
            )
        if self.method == "deeplabcam" and stride == 32:
            raise ValueError("output_stride 32 is too coarse for deeplabcam; use 16 or 8")
        if self.method != "cam" and self.crop % stride:
            raise ValueError(
                f"crop ({self.crop}) must be a multiple of output_stride ({stride}); "
                f"use {max(self.crop // stride, 1) * stride}"
            )
        if self.optimizer.profile == "official" and self.batch != 32:
            raise ValueError(
                f"optimizer profile 'official' means batch: 32, but batch is {self.batch}; "
                "write profile: custom, or batch: 32"
            )
        return self


class TrainSegmenter(Training):
    """A segmenter, trained on a label set and tested over scales (paper 4.1.7; spec 7)."""

    method: Literal["deeplabv2", "deeplabv3", "frozen"]
    eval_splits: Annotated[Splits, AfterValidator(_distinct)]
    allow_decoder_weights: bool
    output_stride: Annotated[Literal[8, 16], Whole]
    encoder_norm: Norm
    decoder_channels: Channels
    scale_min: Scale
    scale_max: Scale
    optimizer: Sgd
    threshold: Fraction
    trust_masks: bool
    head: Head
    features: Features
    test_scales: Scales
    test_flip: bool
    crf_after: bool
    crf: Crf

    _scales_are_a_range = _ordered("scale_min", "scale_max")


class ExportCams(Section):
    """CAMs of the final checkpoint, stored at a stride (spec 4)."""

    splits: Splits
    scales: Scales
    flip: bool
    stride: Annotated[Literal[1, 2, 4, 8], Whole]
    threshold: Threshold
    precision: Precision


class TrainAffinity(Sgd, Training):
    """AffinityNet (paper 4.1.6; spec 6). `affinity` is random_walk's: only `net` needs training."""

    stride: Annotated[Literal[4, 8], Whole]
    radius: Annotated[int, Field(ge=2, le=10)]
    foreground_threshold: Fraction
    background_threshold: Fraction
    affinity: Affinity
    crf: Crf

    _planes_differ = _ordered("background_threshold", "foreground_threshold", ": none is sure")


class RandomWalk(Section):
    """Random walk of the CAMs along affinities (paper 4.1.6; spec 6)."""

    splits: Splits
    affinity: Affinity
    dense_walk: DenseWalk
    beta: Few
    steps_log2: Annotated[int, Field(ge=0, le=12)]
    background: Literal["power", "constant"]
    alpha: Few
    threshold: Fraction
    crf_after: bool
    crf: Crf
    precision: Precision
    pictures: Pictures


class Masks(Section):
    """Final label map of every image, cleaned (stage masks).

    `side` bounds in pixels the longer side that images are worked on at; `least_area` and
    `fill_holes` are shares of an image. `scales` and `flip` are train_cam's, and
    `test_scales`, `test_flip` and `segmenter_crf` train_segmenter's.
    """

    labels: Text
    segmenter: Text
    crf_after: bool
    side: Annotated[int, Field(ge=64, le=8192)]
    least_area: BelowOne
    fill_holes: BelowOne
    scales: Scales
    flip: bool
    test_scales: Scales
    test_flip: bool
    segmenter_crf: Crf
    crf: Crf
    precision: Precision
    pictures: Pictures

    @field_validator("labels")
    @classmethod
    def _has_label_maps(cls, labels: str) -> str:
        if label_set_path(labels) is None or labels == "seeds":
            raise ValueError(
                f"'{labels}' is no label set with label maps; use ground_truth, last_round, "
                "round_NN, random_walk or random_walk_crf"
            )
        return labels


class Evaluate(Section):
    """Scores of CAMs, of CAM + dCRF and of every round's snapshot (spec 8)."""

    threshold: Threshold
    sweep_start: Fraction
    sweep_stop: Fraction
    sweep_step: Annotated[float, Field(ge=0.001, lt=1)]
    crf: Crf
    pictures: Pictures

    _sweep_is_a_range = _ordered("sweep_start", "sweep_stop")


class Report(Section):
    """Page about the data and the masks; `sheet` images are shown at each of `thresholds`."""

    thumbnail: Annotated[int, Field(ge=64, le=1024)]
    sheet: Pictures
    thresholds: Annotated[tuple[Fraction, ...], List, Field(min_length=1, max_length=9)]
    covering: Fraction

    _fits_a_page = _together(
        ("sheet", "thumbnail"),
        "pixels on a sheet",
        1 << 30,
        lambda own: own.sheet * own.thumbnail**2 * (1 + len(own.thresholds)),
    )


# Label sets and the folders of their maps, but for single rounds.
LABEL_SETS = {
    "ground_truth": "data/prepared",
    "seeds": "data/cams",
    "last_round": "data/pseudo_labels",
    "random_walk": "data/random_walk",
    "random_walk_crf": "data/random_walk",
}


def label_set_path(name: str) -> str | None:
    """Folder below the project that a label set's maps come from; None for an unknown name."""
    if re.fullmatch(r"round_(0[1-9]|[1-9][0-9]+)", name):
        return f"data/pseudo_labels/{name}"
    return LABEL_SETS.get(name)


class LabelSet(Section):
    """Labels that a segmenter is trained on.

    The path follows from the name, and is there for DVC: it is the dependency of a segmenter.
    """

    name: Text
    path: Text

    @model_validator(mode="after")
    def _path_is_the_name_s(self) -> Self:
        expected = label_set_path(self.name)
        if expected is None:
            raise ValueError(
                f"unknown label set '{self.name}'; known: {', '.join(LABEL_SETS)} and round_NN, "
                "such as round_02"
            )
        if self.path != expected:
            raise ValueError(f"{self.name} has path {self.path}; write path: {expected}")
        return self


# Blocks of the top level, and the sections that carry them; the `crf` of `train_segmenter` is its
# own.
SHARED = {
    "crf": ("train_cam", "train_affinity", "random_walk", "masks", "evaluate"),
    "dense_walk": ("train_cam", "random_walk"),
}

# Values of other sections that `masks` carries, as images are labelled by what was trained.
OF_MASKS = {
    **{name: ("train_cam", name) for name in ("scales", "flip")},
    **{name: ("train_segmenter", name) for name in ("test_scales", "test_flip")},
    "segmenter_crf": ("train_segmenter", "crf"),
}


class Params(Section):
    """Content of params.yaml. A stage is handed its own section only.

    The blocks of `SHARED` are no stage's (`crf` is spec 5's set `labels`), nor is `label_sets`, for
    which a segmenter is trained each.
    """

    prepare: Prepare
    # Before the sections that carry them: fields are checked in this order.
    crf: Crf
    dense_walk: DenseWalk
    train_cam: TrainCam
    export_cams: ExportCams
    # Before train_affinity, which carries its affinity.
    random_walk: RandomWalk
    train_affinity: TrainAffinity
    train_segmenter: TrainSegmenter
    # After the sections whose values it carries.
    masks: Masks
    evaluate: Evaluate
    report: Report
    label_sets: Annotated[tuple[LabelSet, ...], List, Field(max_length=100)]

    @field_validator(*dict.fromkeys(sum(SHARED.values(), ())), mode="before")
    @classmethod
    def _carries_shared_blocks(cls, section: object, info: ValidationInfo) -> object:
        if not isinstance(section, dict):
            return section
        for block, carriers in SHARED.items():
            if info.field_name not in carriers:
                continue
            if block in section:
                raise ValueError(
                    f"its {block} is the one at the top level of the file; remove "
                    f"{info.field_name}.{block}"
                )
            # One that is wrong was reported in its own place, once.
            kind: Any = cls.model_fields[block].annotation
            section = {**section, block: info.data.get(block, kind.model_construct())}
        return section

    @field_validator("train_affinity", mode="before")
    @classmethod
    def _carries_the_affinity(cls, section: object, info: ValidationInfo) -> object:
        if not isinstance(section, dict):
            return section
        if "affinity" in section:
            raise ValueError("its affinity is random_walk's; remove train_affinity.affinity")
        walk = info.data.get("random_walk")
        # One that is wrong was reported in its own place, once.
        return {**section, "affinity": "net" if walk is None else walk.affinity}

    @field_validator("masks", mode="before")
    @classmethod
    def _masks_carry_values(cls, section: object, info: ValidationInfo) -> object:
        if not isinstance(section, dict):
            return section
        for name, (other, key) in OF_MASKS.items():
            if name in section:
                raise ValueError(f"its {name} is {other}.{key}; remove masks.{name}")
            if other not in info.data:
                # One that is wrong was reported in its own place, once.
                return Masks.model_construct()
            section = {**section, name: getattr(info.data[other], key)}
        return section

    @model_validator(mode="after")
    def _label_sets_are_made(self) -> Self:
        # Found here, and not by DVC after all the training.
        names = [labels.name for labels in self.label_sets]
        rounds = self.train_cam.certain_rounds
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ValueError(f"label_sets lists {name} twice; list each label set once")
            if name.startswith("round_") and int(name[6:]) > rounds:
                sure = " for certain" if self.train_cam.round_rule == "convergence" else ""
                raise ValueError(
                    f"label_sets lists {name}, but the last round that train_cam makes{sure} is "
                    f"round_{rounds:02d}; list that, or last_round (path: data/pseudo_labels)"
                )
        if names and self.masks.segmenter not in names:
            raise ValueError(
                f"masks.segmenter is {self.masks.segmenter}, but label_sets lists "
                f"{', '.join(names)}; name one of these"
            )
        return self


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - a round-trip YAML tree
    """Read YAML as DVC does (ruamel, YAML 1.2), keeping comments for a later write.

    Raises:
        UserError: The file is missing, unreadable or no mapping.
    """
    return _tree(path, "rt")


def _tree(path: Path, kind: str) -> Any:  # noqa: ANN401 - a YAML tree
    """Read a YAML file with its comments (`rt`) or as plain values (`safe`)."""
    try:
        with errors.reading(path, "mend it, or write one by `isim preset demo`", "is no YAML"):
            tree = YAML(typ=kind).load(errors.text(path, _MOST_BYTES))
    except UserError as error:
        raise _mendable(path, error) from error.__cause__
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `train_cam:`, found none")
    return tree


def _mendable(path: Path, error: UserError) -> UserError:
    """Tell more of the usual faults than that the file is no YAML."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return UserError(f"{path} is not UTF-8 text; save it as UTF-8")
    names = (path.name, "dvc.yaml")
    above = (one for one in path.absolute().parents[1:] if all((one / n).exists() for n in names))
    if isinstance(cause, FileNotFoundError) and (project := next(above, None)):
        return UserError(f"{path} is not there, but the project {project} is above: run isim there")
    if isinstance(cause, OSError):
        return UserError(
            f"cannot read {path}: {cause.strerror}; run `isim preset demo` to write one"
        )
    if isinstance(cause, YAMLError):
        mark = getattr(cause, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(cause, "problem", None) or "not valid YAML"
        return UserError(f"{path}{where}: {problem}; mend that line")
    return error


def load(path: Path) -> Params:
    """Read and check `params.yaml`; errors are those of `read_yaml` and of `validate`."""
    return validate(_tree(path, "safe"), str(path))


def validate(tree: dict[str, Any], where: str) -> Params:
    """Check a plain parameter tree; `where` names its source in errors.

    Raises:
        UserError: One line that names the first wrong parameter, its value and the fix, and
            counts the others.
    """
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from error
    # Whatever a tree holds that pydantic stumbles over.
    except (RecursionError, OverflowError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is unusable ({errors.reason(error)}); compare it with that of `isim preset "
            "demo`"
        ) from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _explain(error: ValidationError, where: str) -> str:
    found = error.errors(include_url=False)
    # An unknown name is usually a misspelling of one reported missing: show it first.
    found.sort(key=lambda item: item["type"] != "extra_forbidden")
    first, *others = found
    if first["type"] == "extra_forbidden":
        known = _names(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        text = f"unknown parameter; {hint}"
    elif first["type"] == "missing":
        text = "missing; `isim preset demo` shows every parameter with a value"
    elif first["type"] == "value_error":
        text = first["msg"].removeprefix("Value error, ")
    else:
        text = f"{first['msg']}, got {reprlib.repr(first['input'])}"
    place = f": {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}{place}: {text}{more}"


def _names(place: tuple[int | str, ...]) -> list[str]:
    """Parameters of the section at `place`, in which numbers are places in a list."""
    section: Any = Params
    for name in (part for part in place if isinstance(part, str)):
        kind = section.model_fields[name].annotation
        section = (get_args(kind) or (kind,))[0]
    return list(section.model_fields)
