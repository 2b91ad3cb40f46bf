"""AffinityNet: how alike two near pixels are, whatever their class (paper 4.1.6; spec 6)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isim.errors import UserError
from isim.labels.walk.pairs import half_disc, overlap
from isim.metrics import IGNORE
from isim.models import cam, common, vit
from isim.models import encoder as encoders
from isim.models.common import normalize
from isim.params import TrainAffinity
from isim.runtime import processes

# Channels that the last three encoder stages are reduced to (PSA).
TAP_CHANNELS = (64, 128, 256)


@dataclass(frozen=True)
class AffinityConfig(common.Config):
    """Facts that an AffinityNet is rebuilt from.

    `map_stride` is that of the affinities, `radius` the reach of a pair in pixels of that map;
    `mean` and `std` are what images in [0, 1] are normalised by.
    """

    key: ClassVar[str] = "affinity_config"
    stage: ClassVar[str] = "train_affinity"

    encoder: str
    output_stride: int
    map_stride: int
    radius: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class AffinityHead(nn.Module):
    """The new layers: three stages reduced, brought to one size, concatenated and mixed."""

    def __init__(self, channels: Sequence[int]) -> None:
        """Start as PSA does; the high gain lets affinities begin well below 1."""
        super().__init__()
        self.taps = nn.ModuleList(
            nn.Conv2d(given, wanted, 1, bias=False)
            for given, wanted in zip(channels, TAP_CHANNELS, strict=True)
        )
        for weight in self.taps.parameters():
            nn.init.kaiming_normal_(weight)
        self.mix = nn.Conv2d(sum(TAP_CHANNELS), sum(TAP_CHANNELS), 1, bias=False)
        nn.init.xavier_uniform_(self.mix.weight, gain=4)

    def forward(self, stages: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Turn three maps (B, C_i, h_i, w_i) into features (B, 448, h, w), `size` = (h, w)."""
        maps = [
            F.interpolate(F.elu(tap(stage)), size, mode="bilinear", align_corners=False)
            for tap, stage in zip(self.taps, stages, strict=True)
        ]
        return F.elu(self.mix(torch.cat(maps, 1)))


class AffinityNet(encoders.EncoderNetwork):
    """Encoder and head; learning rates differ between the two (new layers x10, spec 6).

    What computes the encoder's first strided feature map, its stem, does not learn, and the
    encoder's normalisation keeps its running statistics. `map_stride` and `radius` are those of
    the configuration.
    """

    def __init__(
        self, encoder: nn.Module, head: AffinityHead, map_stride: int, radius: int
    ) -> None:
        """Hold the parts and freeze the stem; `build` makes them."""
        super().__init__(encoder, freeze_encoder_norm=True)
        self.head = head
        self.map_stride = map_stride
        self.radius = radius
        for name in _stem(encoder):
            encoder.get_parameter(name).requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 448, ceil(H / map_stride), ceil(W / map_stride)) float32 to compare.

        Images are (B, 3, H, W), normalised, of any size.
        """
        stages = self.encoder(images)[-3:]
        height, width = (-(-side // self.map_stride) for side in images.shape[-2:])
        features: Tensor = self.head(stages, (height, width))
        return features.float()

    def forward(self, images: Tensor) -> Tensor:
        """Affinities (B, P, h, w) float32 of all pairs of the map; see `pair_affinity`."""
        return pair_affinity(self.features(images), self.radius)


class _PairDistance(torch.autograd.Function):
    """Mean absolute difference of the features of each pair; infinite outside the map.

    Written by hand because autograd would keep a difference as large as the features for each
    of the 34 offsets (4 GB at batch 16, crop 512). Here the features alone are kept, and forward
    and backward hold one difference at a time.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, radius: int) -> Tensor:  # noqa: ANN401 - torch's own
        """Turn (B, C, h, w) into (B, P, h, w)."""
        batch, _, height, width = features.shape
        offsets = half_disc(radius)
        distance = features.new_full((batch, len(offsets), height, width), torch.inf)
        for plane, offset in enumerate(offsets):
            here, there = overlap(offset, height, width)
            difference = features[:, :, *here] - features[:, :, *there]
            distance[:, plane, *here] = difference.abs_().mean(1)
        ctx.save_for_backward(features)
        ctx.radius = radius
        return distance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        """Turn gradients (B, P, h, w) into (B, C, h, w); what is outside the map is not read."""
        (features,) = ctx.saved_tensors
        channels, height, width = features.shape[1:]
        gradient = gradient / channels
        total = torch.zeros_like(features)
        for plane, offset in enumerate(half_disc(ctx.radius)):
            here, there = overlap(offset, height, width)
            sign = (features[:, :, *here] - features[:, :, *there]).sign_()
            sign *= gradient[:, plane, None, *here]
            total[:, :, *here] += sign
            total[:, :, *there] -= sign
        return total, None


def pair_affinity(features: Tensor, radius: int) -> Tensor:
    """Affinity exp(-mean |difference|) of each pixel and its neighbours in the half disc.

    Features (B, C, h, w) float32 become (B, P, h, w) in [0, 1]: plane p at (y, x) is the affinity
    of that pixel and its neighbour at the p-th offset of `half_disc(radius)`, a radius in pixels
    of the map; 0 where that is outside the map.
    """
    # exp(-inf) is 0, and so is its gradient.
    distance: Tensor = _PairDistance.apply(features, radius)  # type: ignore[no-untyped-call]
    return torch.exp(-distance)


@torch.inference_mode()
def of_image(network: AffinityNet, config: AffinityConfig, image: Tensor) -> Tensor:
    """Affinities (P, h, w) float32 of an image (3, H, W) uint8, by a network in evaluation mode."""
    views = normalize(image[None], config.mean, config.std)
    affinities: Tensor = network(views.contiguous(memory_format=torch.channels_last))
    return affinities[0]


class AffinityLoss(NamedTuple):
    """The loss that is minimised and its three means, scalars each."""

    total: Tensor
    background: Tensor
    foreground: Tensor
    negative: Tensor


def affinity_loss(affinity: Tensor, labels: Tensor, radius: int) -> AffinityLoss:
    """Three-term loss of PSA: background / 4 + foreground / 4 + negative / 2.

    Pairs of equal labels should have affinity 1, background and classes averaged apart because
    background pairs outnumber the others; pairs of unequal labels should have affinity 0. Each
    term is a mean of -log(. + 1e-5) over its pairs in the whole batch, 0 without any. Pairs that
    touch IGNORE are left out. Each of several processes returns its part, as with all losses.

    Affinities are (B, P, h, w) of `pair_affinity`, labels (B, h, w) integers at the map's stride,
    0 background, 255 ignored.
    """
    height, width = labels.shape[1:]
    neighbours = labels.new_full(affinity.shape, IGNORE)  # (B, P, h, w)
    for plane, offset in enumerate(half_disc(radius)):
        here, there = overlap(offset, height, width)
        neighbours[:, plane, *here] = labels[:, *there]
    own = labels[:, None]  # (B, 1, h, w)
    counts = (own != IGNORE) & (neighbours != IGNORE)
    same = counts & (own == neighbours)
    attract, repel = -torch.log(affinity + 1e-5), -torch.log(1 - affinity + 1e-5)
    background = _mean(attract, same & (own == 0))
    foreground = _mean(attract, same & (own > 0))
    negative = _mean(repel, counts & ~same)
    total = background / 4 + foreground / 4 + negative / 2
    return AffinityLoss(total, background, foreground, negative)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / processes.total(mask.sum()).clamp(min=1)


def build(config: AffinityConfig) -> AffinityNet:
    """Assemble the network of `config` with random weights.

    Raises UserError where the encoder is unknown to timm, cannot have the output stride or does
    not take images of any size.
    """
    with encoders.must_serve(config):
        encoder = encoders.build(config)
        head = AffinityHead(encoder.out_channels[-3:])
        network = AffinityNet(encoder, head, config.map_stride, config.radius)
        common.try_out(network, network.features)
    return network


def _stem(encoder: nn.Module) -> list[str]:
    """Names of the parameters that the first feature map of an encoder depends on.

    Encoders name their layers as they like, so that this asks autograd, on the meta device:
    nothing is computed and no state is touched. A plain vision transformer's first map comes
    after a third of its blocks: there it is what precedes them.
    """
    if isinstance(encoder, vit.PlainViT):
        return encoder.stem
    twin = copy.deepcopy(encoder).to("meta")
    stages = twin(torch.empty(2, 3, 64, 64, device="meta"))
    # The list may begin with the image itself or an empty map, which depend on nothing.
    next(stage for stage in stages if stage.requires_grad).sum().backward()
    return [name for name, weight in twin.named_parameters() if weight.grad is not None]


def configure(params: TrainAffinity) -> AffinityConfig:
    """Describe the network that a section asks for; errors as of `encoder.configure`."""
    return encoders.configure(AffinityConfig, params, map_stride=params.stride)


def copy_encoder(network: AffinityNet, config: AffinityConfig, checkpoint: Path) -> None:
    """Start from the encoder of a checkpoint of train_cam, which has seen image labels only.

    Raises UserError where there is none, or one of another encoder or normalisation.
    """
    trained, source = cam.load(checkpoint)
    if source.encoder != config.encoder:
        raise UserError(
            f"train_affinity.weights: {checkpoint} has the encoder {source.encoder}, not "
            f"{config.encoder}; set train_affinity.encoder to it, or weights to imagenet"
        )
    if (source.mean, source.std) != (config.mean, config.std):
        raise UserError(
            f"train_affinity.input_norm: {checkpoint} was trained on images normalised "
            "otherwise; set it to what train_cam.input_norm is, or weights to imagenet"
        )
    network.encoder.load_state_dict(trained.encoder.state_dict())


def load(path: Path) -> tuple[AffinityNet, AffinityConfig]:
    """Rebuild a network from a checkpoint of `train_affinity`; see `common.load`."""
    return common.load(path, AffinityConfig, build)
