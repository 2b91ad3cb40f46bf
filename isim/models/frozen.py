"""Networks whose encoder is frozen: heads on features that are computed once an image.

Features f_p of patch p lie on a grid of h x w patches; an image is resized so that the grid covers
it exactly. Heads see them standardised, each channel by its mean and deviation over the training
images.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from isim.errors import UserError
from isim.labels.dense import batched as dense
from isim.models import common
from isim.models import encoder as encoders
from isim.models.common import normalize
from isim.models.vit import PlainViT

# A tag is known to be there: with a head, its plane rises at least so high somewhere.
_LEAST_PEAK = 0.75
# Pooling mil: the share of an image's patches whose mean is a class's score.
_MIL_SHARE = 0.1


class _FeatureConfig(Protocol):
    """Facts that features depend on, beside the encoder's weights."""

    @property
    def encoder(self) -> str: ...
    @property
    def output_stride(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def sides(self) -> tuple[int, ...]: ...
    @property
    def stages(self) -> int: ...


class _WalkConfig(Protocol):
    """Walk of planes along a dense affinity; `affinity` is none, or as in `labels.dense`."""

    @property
    def affinity(self) -> str: ...
    @property
    def tau(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def steps(self) -> int: ...


def views(images: Tensor, side: int, config: _FeatureConfig) -> Tensor:
    """Resize (B, 3, H, W) uint8 RGB so that the longer side is about `side`, and normalise.

    Both sides become the nearest multiples of the output stride: (B, 3, H', W') float32.
    """
    stride, factor = config.output_stride, side / max(images.shape[-2:])
    size = [max(1, round(length * factor / stride)) * stride for length in images.shape[-2:]]
    resized = TF.resize(images, size, antialias=True)
    return normalize(resized, config.mean, config.std)


# Normalised views (B, 3, H, W) to the encoder's maps.
_Encode = Callable[[Tensor], Sequence[Tensor]]


@torch.inference_mode()
def features(encoder: _Encode, config: _FeatureConfig, images: Tensor) -> Tensor:
    """Features (B, C, h, w) float32 of (B, 3, H, W) uint8 RGB images of one size.

    They are those of the image and of its mirror image, averaged; of several sides, resized to the
    grid of the largest, and joined. The channels of the last stage come last.
    """
    return _features([encoder] * len(config.sides), config, images)


@torch.inference_mode()
def features_with_attention(
    encoder: nn.Module, config: _FeatureConfig, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute both `features` and `attention`, in one pass of the largest side; errors as there."""
    heard: list[Tensor] = []
    transformer = require_attention(encoder, config)

    def listened(both: Tensor) -> Sequence[Tensor]:
        maps, found = transformer.with_attention(both)
        heard.append(found)
        return maps

    others: list[_Encode] = [encoder] * (len(config.sides) - 1)
    maps = _features([listened, *others], config, images)
    return maps, _of_both(heard[0], maps.shape[-2:])


def _features(encode: Sequence[_Encode], config: _FeatureConfig, images: Tensor) -> Tensor:
    """Features as of `features`; what encodes the views of each side, the largest first."""
    maps: list[list[Tensor]] = []
    for side, encoded in zip(sorted(config.sides, reverse=True), encode, strict=True):
        view = views(images, side, config)
        both = torch.cat([view, view.flip(-1)]).contiguous(memory_format=torch.channels_last)
        stages = encoded(both)[-config.stages :]
        averaged = [(m[: len(images)].float() + m[len(images) :].flip(-1)) / 2 for m in stages]
        grid = (maps[0] if maps else averaged)[-1].shape[-2:]
        maps.append([_resized(m.float(), grid) for m in averaged])
    return torch.cat([m for stage in zip(*maps, strict=True) for m in stage], 1)


def require_attention(encoder: nn.Module, config: _FeatureConfig) -> PlainViT:
    """Return an encoder that can be asked for its attention; UserError where it cannot."""
    if not isinstance(encoder, PlainViT):
        raise UserError(
            f"affinity attention needs a plain vision transformer, not {config.encoder}; use "
            "affinity: cosine, or an encoder such as vit_small_patch14_dinov2.lvd142m"
        )
    return encoder


@torch.inference_mode()
def attention(encoder: nn.Module, config: _FeatureConfig, images: Tensor) -> Tensor:
    """Attention (B, N, N) of the patches of (B, 3, H, W) uint8 RGB, on the grid of `features`.

    That of the image and of its mirror image are averaged. Raises UserError where the encoder is no
    plain vision transformer, or one that has no attention matrix.
    """
    transformer = require_attention(encoder, config)
    view = views(images, max(config.sides), config)
    found = transformer.attention(torch.cat([view, view.flip(-1)]))
    return _of_both(found, [side // config.output_stride for side in view.shape[-2:]])


def _of_both(found: Tensor, size: Sequence[int]) -> Tensor:
    """Average the attention (2B, N, N) of images and their mirror images, on a grid of `size`."""
    there = torch.arange(found.shape[-1], device=found.device).unflatten(0, tuple(size))
    mirrored = there.flip(-1).flatten()
    plain, other = found.float().chunk(2)
    return (plain + other[:, mirrored][:, :, mirrored]) / 2


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


class PatchHead(nn.Module):
    """Scores of patches: linear, or with one hidden layer."""

    def __init__(self, kind: str, channels: int, labels: int, *, width: int) -> None:
        """Build the layers; `kind` is linear or mlp."""
        super().__init__()
        hidden = kind == "mlp"
        self.hidden = nn.Linear(channels, width) if hidden else nn.Identity()
        self.scores = nn.Linear(width if hidden else channels, labels)

    def forward(self, patches: Tensor, dropout: float = 0.0) -> Tensor:
        """Turn patches (N, C) into scores (N, L), dropping features and hidden values at random."""
        given = F.dropout(patches, dropout) if dropout else patches
        if isinstance(self.hidden, nn.Identity):
            scores: Tensor = self.scores(given)
            return scores
        hidden = F.relu(self.hidden(given))
        scores = self.scores(F.dropout(hidden, dropout) if dropout else hidden)
        return scores


class FrozenNetwork(encoders.EncoderNetwork):
    """Encoder, classifier and head on its standardised features.

    The classifier, without a bias, sees the last stage alone: its map of scores is linear in the
    features, and its mean the image's logits. `head`, None before a first round, gives scores of
    L = K + 1 labels.
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self, encoder: nn.Module, channels: Sequence[int], *, classes: int, head: nn.Module | None
    ) -> None:
        """Hold the parts; `channels` are all features' and those of the last stage."""
        super().__init__(encoder, freeze_encoder_norm=True)
        total, last = channels
        self.classifier = nn.Conv2d(last, classes, 1, bias=False)
        self.head = head
        self.register_buffer("centre", torch.zeros(total))
        self.register_buffer("spread", torch.ones(total))

    def standardise(self, patches: Tensor) -> Tensor:
        """Standardise features (..., C) of any float type to float32."""
        standard: Tensor = (patches.float() - self.centre) / self.spread
        return standard

    def class_scores(self, patches: Tensor) -> Tensor:
        """Scores (N, K) of standardised patches (N, C); their mean is the image's logits."""
        weight = self.classifier.weight.flatten(1)
        return patches[:, -weight.shape[1] :] @ weight.T

    def label_scores(self, patches: Tensor) -> Tensor:
        """Scores (N, L) of standardised patches by the head, or of the classifier and 0 without."""
        if self.head is not None:
            scores: Tensor = self.head(patches)
            return scores
        return F.pad(self.class_scores(patches), (1, 0))

    def logits(self, patches: Tensor, pooling: str) -> Tensor:
        """Image logits (K,) of its standardised patches (N, C).

        Pooling `gap` is the mean of all patches' scores (paper 3.2), `mil` that of the highest
        tenth of each class's.
        """
        scores = self.class_scores(patches)
        if pooling == "mil":
            scores = scores.topk(max(1, round(_MIL_SHARE * len(scores))), dim=0).values
        return scores.mean(0)

    @torch.inference_mode()
    def planes(
        self, maps: Tensor, class_ids: Tensor, walk: _WalkConfig, attention: Tensor | None = None
    ) -> Tensor:
        """CAMs (K', h, w) float32 in [0, 1] of an image's features (C, h, w).

        With a head a plane is p_k / (p_k + p_0), p being the softmax over the background and the
        image's classes alone: above 0.5 the class is likelier than the background. Without one it
        is the class's score, ReLU, over its maximum. Then the planes walk. Without a head they are
        divided by their maxima again; with one, a plane that stays low has its log-odds raised
        until its maximum is 0.75, since the class is known to be there: small objects would else
        vanish from round to round.

        `class_ids` are (K',) int64 labels 1..K; `attention` is (N, N), for affinity `attention`.
        """
        patches = self.standardise(maps.flatten(1).T)  # (N, C)
        scores = self.label_scores(patches)
        ids = class_ids.to(maps.device)
        if self.head is None:
            planes = _over_maximum(scores[:, ids].T.relu())
        else:
            # The softmax over two labels, of which the other classes are no part.
            planes = (scores[:, ids] - scores[:, :1]).sigmoid().T
        if walk.affinity != "none" and walk.steps and len(ids):
            grid = planes.unflatten(1, maps.shape[1:])
            planes = _walked(grid, self.affinity(patches, scores, walk, attention), walk)
            planes = planes if self.head is not None else _over_maximum(planes)
        if self.head is not None:
            planes = _raised(planes)
        grown: Tensor = planes.unflatten(1, maps.shape[1:])
        return grown

    @torch.inference_mode()
    def mean(self, grids: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Average CAMs (K', h, w) of several scales at one size, as high as `planes` gives them.

        Peaks that lie apart at two scales are lower in their mean, where a tag would be lost.
        """
        found = averaged(grids, size)
        if len(grids) == 1:
            return found
        flat = found.flatten(1)
        return (_over_maximum(flat) if self.head is None else _raised(flat)).view_as(found)

    def affinity(
        self, patches: Tensor, scores: Tensor, walk: _WalkConfig, attention: Tensor | None
    ) -> Tensor:
        """Affinity (..., N, N) of standardised patches (..., N, C) with scores (..., N, L).

        The leading dimensions, if any, are of images of one size; `attention` is (..., N, N).
        """
        if walk.affinity == "attention":
            if attention is None:
                raise ValueError("affinity attention needs the attention of the image's patches")
            return dense.attention(attention)
        if walk.affinity == "class_distribution":
            return dense.class_distribution(scores, walk.temperature)
        return dense.cosine(patches, walk.tau, walk.beta)

    @torch.inference_mode()
    def probabilities(self, maps: Tensor) -> Tensor:
        """Probabilities (L, h, w) float32 of an image's features (C, h, w), its tags unknown."""
        scores = self.label_scores(self.standardise(maps.flatten(1).T))
        found: Tensor = scores.softmax(1).T.unflatten(1, maps.shape[1:])
        return found


@torch.inference_mode()
def averaged(grids: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Bring planes (C, h, w) of several grids, C maybe 0, to one size (bilinear), and average them.

    The memory does not grow with their number.
    """
    if not len(grids[0]):
        return grids[0].new_zeros(0, *size)
    total = _resized(grids[0][None], size)[0]
    for planes in grids[1:]:
        total = total + _resized(planes[None], size)[0]
    return total / len(grids) if len(grids) > 1 else total


def _over_maximum(planes: Tensor) -> Tensor:
    """Divide planes (K', N) by their maxima (+1e-5, spec 4)."""
    return planes / (planes.amax(1, keepdim=True) + 1e-5) if len(planes) else planes


def _walked(planes: Tensor, affinity: Tensor, walk: _WalkConfig) -> Tensor:
    """Walk planes (K', h, w) along an affinity (N, N): (K', N)."""
    inside = None
    if walk.affinity == "attention":
        # A plane of a head may stay low everywhere: it would have no box, and walk to nothing.
        inside = dense.boxes(_over_maximum(planes.flatten(1)).view_as(planes)).flatten(1)
    return dense.walk(planes.flatten(1), affinity, walk.steps, inside)


def _raised(planes: Tensor) -> Tensor:
    """Raise the log-odds of planes (K', N) in (0, 1) whose maximum is below `_LEAST_PEAK`."""
    if not len(planes):
        return planes
    odds = planes.clamp(1e-6, 1 - 1e-6).logit()
    least = torch.tensor(_LEAST_PEAK, device=planes.device).logit()
    return (odds + (least - odds.amax(1, keepdim=True)).clamp_min(0)).sigmoid()


class _Built(_FeatureConfig, Protocol):
    """Configuration that a network is built from."""

    stage: ClassVar[str]

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def head_kind(self) -> str: ...
    @property
    def head_width(self) -> int: ...


def build(config: _Built) -> FrozenNetwork:
    """Assemble the network of `config` with random weights; a head of kind none is none.

    Raises UserError where the encoder is unknown to timm, cannot have the output stride or does
    not take images of any size.
    """
    with encoders.must_serve(config):
        encoder = encoders.build(config)
        channels = [count * len(config.sides) for count in encoder.out_channels[-config.stages :]]
        network = FrozenNetwork(
            encoder, (sum(channels), channels[-1]), classes=len(config.classes), head=None
        )
        common.try_out(network, lambda images: network.encoder(images))
    if config.head_kind != "none":
        network.head = new_head(network, config)
    return network


def new_head(network: FrozenNetwork, config: _Built) -> PatchHead:
    """Make a head with random weights for a network's features."""
    labels = len(config.classes) + 1
    return PatchHead(config.head_kind, len(network.centre), labels, width=config.head_width)
