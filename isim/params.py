"""Typed parameters: one frozen section a stage, no defaults (they live in params.yaml)."""

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isim.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "fp32", "bf16"]
Scales = Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown names are errors, no defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shapes(Section):
    """The generated data set (spec 2): counts of images and their side in pixels."""

    train: Positive
    val: Positive
    size: Annotated[int, Field(ge=64, le=512)]


class Prepare(Section):
    """Where the images come from."""

    source: Literal["shapes", "voc", "folder"]
    root: str
    download: bool
    sbd: bool
    val_fraction: Fraction
    seed: NonNegative
    shapes: Shapes


class Crf(Section):
    """Fully connected CRF (spec 5, set `labels`); sxy in pixels, srgb in 8-bit levels.

    `backend` is what computes it; `auto`: the fastest that there is.
    """

    backend: Literal["auto", "pydensecrf", "compiled", "torch"]
    steps: Annotated[int, Field(ge=0, le=100)]
    gt_prob: Fraction
    gaussian_sxy: Annotated[float, Field(gt=0)]
    gaussian_compat: Rate
    bilateral_sxy: Annotated[float, Field(gt=0)]
    bilateral_srgb: Annotated[float, Field(gt=0)]
    bilateral_compat: Rate


class Optimizer(Section):
    """SGD with a poly schedule (paper 4.1). `poly_epochs` 0 means all epochs.

    `profile` names a set of values; any other combination must be called `custom`.
    """

    profile: Literal["paper", "official", "custom"]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Rate
    encoder_rate: Rate
    decoder_rate: Rate
    classifier_rate: Rate
    poly_power: Annotated[float, Field(ge=0)]
    poly_epochs: NonNegative

    @model_validator(mode="after")
    def _profile_names_its_values(self) -> Self:
        expected = PROFILES.get(self.profile, {})
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"profile '{self.profile}' means {name}: {value}, but {name} is "
                    f"{getattr(self, name)}; write profile: custom, or {name}: {value}"
                )
        return self


# Spec 3.4: the two profiles that results are named after.
PROFILES: dict[str, dict[str, float]] = {
    "paper": {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "encoder_rate": 0.1,
        "decoder_rate": 0.01,
        "classifier_rate": 1.0,
        "poly_power": 0.9,
        "poly_epochs": 0,
    },
    "official": {
        "momentum": 1e-4,
        "weight_decay": 1e-4,
        "encoder_rate": 0.1,
        "decoder_rate": 0.1,
        "classifier_rate": 1.0,
        "poly_power": 0.9,
        "poly_epochs": 5,
    },
}


METHODS = ("cam", "deeplabcam", "unetcam_learnable", "unetcam_bilinear")


def _known_method(method: str) -> str:
    # Which architectures there are is known where networks are built: this module stays light.
    if method not in METHODS and not re.fullmatch(r"smp:\w+", method):
        raise ValueError(
            f"there is no '{method}'; use {', '.join(METHODS)} or smp:<Name>, such as smp:FPN"
        )
    return method


class Converged(Section):
    """When losses have converged; `isim.rounds.Convergence` states the rule."""

    patience: Positive
    tolerance: Annotated[float, Field(ge=0, lt=1)]
    cap: Positive


class TrainCam(Section):
    """The ISIM loop (spec 3).

    `method` is `cam` (no decoder), `deeplabcam`, `unetcam_learnable` (transposed convolutions),
    `unetcam_bilinear`, or `smp:<Name>`, an architecture of segmentation-models-pytorch.
    `encoder` is any timm encoder that has maps at strides 2 (or 4) to `output_stride` and takes
    images of any size. `decoder_channels` is the width of the decoder's widest map (ASPP; first
    of the U-Net's steps, each half the one before); `atrous_rates` serve the DeepLabs only.
    `score_every` counts epochs; 0 stands for never.
    """

    method: Annotated[str, AfterValidator(_known_method)]
    split: str
    eval_split: str
    seed: NonNegative
    encoder: str
    weights: str
    output_stride: Literal[8, 16, 32]
    encoder_norm: Literal["batch", "frozen"]
    input_norm: Literal["encoder", "unit"]
    atrous_rates: tuple[Positive, Positive, Positive]
    decoder_channels: Positive
    crop: Annotated[int, Field(ge=32)]
    batch: Positive
    epochs: Positive
    warmup_epochs: Positive
    round_rule: Literal["frequency", "convergence"]
    round_every: Positive
    convergence: Converged
    score_every: NonNegative
    segmentation_weight: Rate
    optimizer: Optimizer
    precision: Precision
    compile: bool
    scales: Scales
    flip: bool
    threshold: Fraction
    crf: Crf
    pictures: NonNegative

    @property
    def certain_rounds(self) -> int:
        """How many rounds there are at least, whatever the losses; by frequency, exactly.

        The first follows `warmup_epochs`, the next at the latest `round_every` epochs later
        (`cap` with convergence), none the last epoch. `isim.rounds.due` is what decides, a
        layer above this one; a test holds the count against it.
        """
        every = self.round_every if self.round_rule == "frequency" else self.convergence.cap
        return 1 + (self.epochs - 1 - self.warmup_epochs) // every

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs}), "
                "or no pseudo-label is ever made"
            )
        if self.method == "deeplabcam" and self.output_stride == 32:
            raise ValueError("output_stride 32 is too coarse for deeplabcam; use 16 or 8")
        if self.method != "cam" and self.crop % self.output_stride:
            raise ValueError(
                f"crop ({self.crop}) must be a multiple of output_stride ({self.output_stride}); "
                f"use {self.crop // self.output_stride * self.output_stride or self.output_stride}"
            )
        if self.optimizer.profile == "official" and self.batch != 32:
            raise ValueError(
                f"optimizer profile 'official' means batch: 32, but batch is {self.batch}; "
                "write profile: custom, or batch: 32"
            )
        return self


class SegmenterOptimizer(Section):
    """SGD with a poly schedule over all epochs; the head's rate is `head_factor` times `rate`."""

    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Rate
    rate: Rate
    head_factor: Rate
    poly_power: Annotated[float, Field(ge=0)]


class TrainSegmenter(Section):
    """A segmenter, trained on a label set and tested over scales (paper 4.1.7; spec 7).

    `threshold` makes label maps of the label set `seeds`. `crf` are the values of spec 5's set
    `segmenter`, whose unary comes from probabilities: `gt_prob` is not used.
    """

    method: Literal["deeplabv2", "deeplabv3"]
    split: str
    eval_splits: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: NonNegative
    encoder: str
    weights: str
    allow_decoder_weights: bool
    output_stride: Literal[8, 16]
    encoder_norm: Literal["batch", "frozen"]
    input_norm: Literal["encoder", "unit"]
    decoder_channels: Positive
    crop: Annotated[int, Field(ge=32)]
    batch: Positive
    epochs: Positive
    scale_min: Annotated[float, Field(gt=0, le=4)]
    scale_max: Annotated[float, Field(gt=0, le=4)]
    optimizer: SegmenterOptimizer
    precision: Precision
    compile: bool
    threshold: Fraction
    test_scales: Scales
    test_flip: bool
    crf_after: bool
    crf: Crf
    pictures: NonNegative

    @model_validator(mode="after")
    def _scales_are_a_range(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(
                f"scale_min ({self.scale_min}) must not be above scale_max ({self.scale_max})"
            )
        return self

    @model_validator(mode="after")
    def _splits_differ(self) -> Self:
        if len(set(self.eval_splits)) < len(self.eval_splits):
            raise ValueError("eval_splits names a split twice; name each once")
        return self


class ExportCams(Section):
    """CAMs of the final checkpoint, stored at a stride (spec 4).

    At `threshold` the stage reports what storing at the stride changes.
    """

    splits: Annotated[tuple[str, ...], Field(min_length=1)]
    scales: Scales
    flip: bool
    stride: Literal[1, 2, 4, 8]
    threshold: Fraction
    precision: Precision


class TrainAffinity(Section):
    """AffinityNet (paper 4.1.6; spec 6).

    Its labels are what the dCRF results of the split's CAMs against the two background planes
    agree on. `stride` is that of its map, in whose pixels `radius` is; `output_stride` that of
    its encoder. The layers after the encoder learn at `head_factor` times `rate`.
    """

    split: str
    seed: NonNegative
    encoder: str
    weights: str
    output_stride: Literal[8, 16, 32]
    input_norm: Literal["encoder", "unit"]
    stride: Literal[4, 8]
    radius: Annotated[int, Field(ge=2, le=10)]
    foreground_threshold: Fraction
    background_threshold: Fraction
    crf: Crf
    crop: Annotated[int, Field(ge=32)]
    batch: Positive
    epochs: Positive
    rate: Rate
    head_factor: Rate
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Rate
    poly_power: Annotated[float, Field(ge=0)]
    precision: Precision
    compile: bool
    pictures: NonNegative

    @model_validator(mode="after")
    def _planes_leave_a_doubt(self) -> Self:
        if self.foreground_threshold <= self.background_threshold:
            raise ValueError(
                f"foreground_threshold ({self.foreground_threshold}) must be above "
                f"background_threshold ({self.background_threshold}): between them neither is sure"
            )
        return self


class RandomWalk(Section):
    """Random walk of the CAMs along affinities (paper 4.1.6; spec 6).

    2^`steps_log2` steps with affinity^`beta`. The background is a plane that is walked, too,
    (1 - max CAM)^`alpha` (`power`), or the constant `threshold` (`constant`).
    """

    splits: Annotated[tuple[str, ...], Field(min_length=1)]
    beta: Positive
    steps_log2: Annotated[int, Field(ge=0, le=12)]
    background: Literal["power", "constant"]
    alpha: Positive
    threshold: Fraction
    crf_after: bool
    crf: Crf
    precision: Precision
    pictures: NonNegative


class Evaluate(Section):
    """Scores of CAMs, of CAM + dCRF and of every round's snapshot (spec 8)."""

    threshold: Fraction
    sweep_start: Fraction
    sweep_stop: Fraction
    sweep_step: Fraction
    crf: Crf
    pictures: NonNegative

    @model_validator(mode="after")
    def _sweep_is_a_range(self) -> Self:
        if self.sweep_start > self.sweep_stop:
            raise ValueError(
                f"sweep_start ({self.sweep_start}) must not be above sweep_stop ({self.sweep_stop})"
            )
        return self


# Label sets and the folder that their maps are found in; those of a round are found by its number.
LABEL_SETS = {
    "ground_truth": "data/prepared",
    "seeds": "data/cams",
    # Of the highest number that there is, which round_rule and round_every decide.
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
    """What a segmenter is trained on.

    The path follows from the name. It is written out because DVC, which knows of no rules, takes
    the dependency of a segmenter from it.
    """

    name: str
    path: str

    @model_validator(mode="after")
    def _path_is_the_name_s(self) -> Self:
        expected = label_set_path(self.name)
        if expected is None:
            raise ValueError(
                f"unknown label set '{self.name}'; known: {', '.join(LABEL_SETS)} and round_NN, "
                "such as round_02"
            )
        if self.path != expected:
            raise ValueError(
                f"label set '{self.name}' has path {self.path}; write path: {expected}"
            )
        return self


class Params(Section):
    """All of params.yaml. A stage is handed its own section only.

    `label_sets` is no section: it lists what `train_segmenter` runs for, once each.
    """

    prepare: Prepare
    train_cam: TrainCam
    export_cams: ExportCams
    train_affinity: TrainAffinity
    random_walk: RandomWalk
    train_segmenter: TrainSegmenter
    evaluate: Evaluate
    label_sets: tuple[LabelSet, ...]

    @model_validator(mode="after")
    def _label_sets_differ(self) -> Self:
        names = [labels.name for labels in self.label_sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"label_sets lists {twice[0]} twice; list each label set once")
        return self

    @model_validator(mode="after")
    def _rounds_are_made(self) -> Self:
        # Found here, and not by DVC after all the training.
        rounds = self.train_cam.certain_rounds
        for name in (labels.name for labels in self.label_sets):
            if name.startswith("round_") and int(name[6:]) > rounds:
                sure = " for certain" if self.train_cam.round_rule == "convergence" else ""
                raise ValueError(
                    f"label_sets lists {name}, but the last round that train_cam makes{sure} is "
                    f"round_{rounds:02d}; list that, or last_round (path: data/pseudo_labels)"
                )
        return self


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - a round-trip YAML tree
    """Read YAML as DVC does (ruamel, YAML 1.2), keeping comments for a later write.

    Raises:
        UserError: The file is missing, unreadable or no mapping.
    """
    try:
        tree = YAML(typ="rt").load(path.read_text())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; run `isim preset demo` to write one"
        ) from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{path}{where}: {problem}; mend that line") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `train_cam:`, found none")
    return tree


def load(path: Path) -> Params:
    """Read and check `params.yaml`.

    Raises:
        UserError: One line that names the first wrong parameter, its value and the fix, and
            counts the others.
    """
    plain = YAML(typ="safe").load(path.read_text()) if read_yaml(path) else {}
    return validate(plain, str(path))


def validate(tree: dict[str, Any], where: str) -> Params:
    """Check a plain parameter tree; `where` names its source in errors.

    Raises:
        UserError: As `load`.
    """
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from error


def _explain(error: ValidationError, where: str) -> str:
    errors = error.errors(include_url=False)
    # An unknown name is usually a misspelling of one reported missing: show it first.
    errors.sort(key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _names(Params, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        text = f"unknown parameter; {hint}"
    elif first["type"] == "missing":
        text = "missing; `isim preset demo` shows every parameter with a value"
    elif first["type"] == "value_error":
        text = first["msg"].removeprefix("Value error, ")
    else:
        text = f"{first['msg']}, got {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    place = f"{where}: {name}" if name else where
    return f"{place}: {text}{more}"


def _names(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    # A number is a place in a list.
    for part in (part for part in loc if isinstance(part, str)):
        field = model.model_fields.get(part)
        if field is None:
            return []
        inner = (get_args(field.annotation) or (field.annotation,))[0]
        if not isinstance(inner, type) or not issubclass(inner, BaseModel):
            return []
        model = inner
    return list(model.model_fields)


def digest(section: BaseModel) -> str:
    """SHA-256 (first 12 hex digits) of a section's canonical JSON."""
    text = json.dumps(section.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def home(root: Path) -> Path:
    """The folder that state outside DVC is anchored on: `$DVC_ROOT`, else `root`.

    `dvc exp run --temp` works in a copy that is deleted; DVC_ROOT still names the repository.
    """
    return Path(os.environ.get("DVC_ROOT", root)).resolve()


def resolve_path(text: str, root: Path) -> Path:
    """Expand `$ISIM_DATA` and `$ISIM_SHARED` (and any other variable) in a path parameter.

    Args:
        text: A path as written in params.yaml.
        root: The project folder, used when `$DVC_ROOT` is unset.

    Returns:
        An absolute path; relative ones are taken from `home(root)`.

    Raises:
        UserError: A variable without a value.
    """
    defaults = {"ISIM_DATA": "data/raw", "ISIM_SHARED": "../shared"}
    for name, value in defaults.items():
        used = os.environ.get(name, value)
        text = text.replace(f"${{{name}}}", used).replace(f"${name}", used)
    expanded = os.path.expanduser(os.path.expandvars(text))
    if "$" in expanded:
        raise UserError(f"the path {text} uses a variable that is not set; export it or edit it")
    return (home(root) / expanded).resolve()
