"""AffinityNet: how alike two near pixels are, whatever their class (paper 4.1.6; spec 6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from isim import distributed
from isim.errors import UserError
from isim.models import common
from isim.models.inference import normalize
from isim.models.losses import IGNORE
from isim.pairs import half_disc, overlap

# Channels that the last three encoder stages are reduced to (PSA).
TAP_CHANNELS = (64, 128, 256)


@dataclass(frozen=True)
class AffinityConfig(common.Config):
    """All that is needed to rebuild an AffinityNet from its checkpoint.

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
    """The new layers: three stages reduced, brought to one size, concatenated and mixed.

    Args:
        channels: Of the last three encoder stages, shallowest first.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        """Start as PSA does; the high gain lets affinities begin well below 1."""
        super().__init__()
        taps = [
            nn.Conv2d(given, wanted, 1, bias=False)
            for given, wanted in zip(channels, TAP_CHANNELS, strict=True)
        ]
        for tap in taps:
            nn.init.kaiming_normal_(tap.weight)
        self.taps = nn.ModuleList(taps)
        self.mix = nn.Conv2d(sum(TAP_CHANNELS), sum(TAP_CHANNELS), 1, bias=False)
        nn.init.xavier_uniform_(self.mix.weight, gain=4)

    def forward(self, stages: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Turn three maps (B, C_i, h_i, w_i) into features (B, 448, h, w), `size` = (h, w)."""
        maps = [
            F.interpolate(F.elu(tap(stage)), size, mode="bilinear", align_corners=False)
            for tap, stage in zip(self.taps, stages, strict=True)
        ]
        return F.elu(self.mix(torch.cat(maps, 1)))


class AffinityNet(nn.Module):
    """Encoder and head; learning rates differ between the two (new layers x10, spec 6).

    What computes the encoder's first strided feature map, its stem, does not learn, and the
    encoder's normalisation keeps its running statistics.

    Args:
        encoder: Images (B, 3, H, W) to a list of feature maps, of at least three stages.
        head: The last three maps to features.
        map_stride: Of the features and affinities, in pixels of the image.
        radius: Reach of a pair, in pixels of the map.
    """

    def __init__(
        self, encoder: nn.Module, head: AffinityHead, map_stride: int, radius: int
    ) -> None:
        """Hold the parts and freeze the stem; `build` makes them."""
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.map_stride = map_stride
        self.radius = radius
        for name in _stem(encoder):
            encoder.get_parameter(name).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; normalisation layers stay in evaluation mode."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Features whose distance is what affinity is made of.

        Args:
            images: (B, 3, H, W), normalised, any size.

        Returns:
            (B, 448, ceil(H / map_stride), ceil(W / map_stride)) float32.
        """
        stages = self.encoder(images)[-3:]
        height, width = (-(-side // self.map_stride) for side in images.shape[-2:])
        return self.head(stages, (height, width)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Affinities of all pairs of the map.

        Args:
            images: (B, 3, H, W), normalised, any size.

        Returns:
            (B, P, h, w) float32 of `pair_affinity`.
        """
        return pair_affinity(self.features(images), self.radius)


class _PairDistance(torch.autograd.Function):
    """Mean absolute difference of the features of each pair; infinite outside the map.

    Written by hand because autograd would keep a difference as large as the features for each
    of the 34 offsets (4 GB at batch 16, crop 512). Here the features alone are kept, and forward
    and backward hold one difference at a time.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, radius: int) -> Tensor:  # noqa: ANN401 - torch's own
        """(B, C, h, w) to (B, P, h, w)."""
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        """Gradient (B, P, h, w) to (B, C, h, w); what is outside the map is not read."""
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

    Args:
        features: (B, C, h, w) float32.
        radius: In pixels of the map.

    Returns:
        (B, P, h, w) in [0, 1]: plane p at (y, x) is the affinity of that pixel and its neighbour
        at the p-th offset of `half_disc(radius)`; 0 where that is outside the map.
    """
    # exp(-inf) is 0, and so is its gradient.
    return torch.exp(-_PairDistance.apply(features, radius))


@torch.inference_mode()
def of_image(network: AffinityNet, config: AffinityConfig, image: Tensor) -> Tensor:
    """Affinities of one image at its full size, unpadded.

    Args:
        network: In evaluation mode.
        config: Its configuration.
        image: (3, H, W) uint8 on the network's device.

    Returns:
        (P, h, w) float32 of `pair_affinity`.
    """
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
    touch IGNORE are left out. Of several processes each returns its part, as all losses do.

    Args:
        affinity: (B, P, h, w) of `pair_affinity`.
        labels: (B, h, w) integers at the map's stride, 0 background, 255 ignored.
        radius: In pixels of the map.

    Returns:
        The loss and its terms.
    """
    height, width = labels.shape[1:]
    neighbours = labels.new_full(affinity.shape, IGNORE)  # (B, P, h, w)
    for plane, offset in enumerate(half_disc(radius)):
        here, there = overlap(offset, height, width)
        neighbours[:, plane, *here] = labels[:, *there]
    own = labels[:, None]  # (B, 1, h, w)
    counts = (own != IGNORE) & (neighbours != IGNORE)
    same = counts & (own == neighbours)
    attract = -torch.log(affinity + 1e-5)
    repel = -torch.log(1 - affinity + 1e-5)
    background = _mean(attract, same & (own == 0))
    foreground = _mean(attract, same & (own > 0))
    negative = _mean(repel, counts & ~same)
    return AffinityLoss(
        background / 4 + foreground / 4 + negative / 2, background, foreground, negative
    )


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / distributed.total(mask.sum()).clamp(min=1)


def build(config: AffinityConfig) -> AffinityNet:
    """Assemble the network of `config` with random weights.

    Raises:
        UserError: The encoder is unknown to timm, cannot have the output stride or does not take
            images of any size.
    """
    try:
        encoder = smp.encoders.get_encoder(
            f"tu-{config.encoder}", weights=None, output_stride=config.output_stride
        )
        head = AffinityHead(encoder.out_channels[-3:])
        network = AffinityNet(encoder, head, config.map_stride, config.radius)
        common.try_out(network, network.features)
    except Exception as error:  # timm and smp raise whatever their code meets
        raise UserError(
            f"train_affinity.encoder: timm encoder '{config.encoder}' at output_stride "
            f"{config.output_stride} cannot be built or does not take images of any size "
            f"({common.reason(error)}); choose one that has strided features, such as "
            "resnet50.tv_in1k or mobilenetv2_100"
        ) from error
    return network


def _stem(encoder: nn.Module) -> list[str]:
    """Names of the parameters that the first feature map of an encoder depends on.

    Encoders name their layers as they like, so that this asks autograd, on the meta device:
    nothing is computed and no state is touched.
    """
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    twins = [torch.empty_like(p, device="meta", requires_grad=True) for p in parameters]
    buffers = {name: buffer.to("meta") for name, buffer in encoder.named_buffers()}
    state = buffers | dict(zip(names, twins, strict=True))
    image = torch.empty(2, 3, 64, 64, device="meta")
    stages = torch.func.functional_call(encoder, state, (image,))
    # The list may begin with the image itself or an empty map, which depend on nothing.
    first = next(stage for stage in stages if stage.requires_grad)
    reached = torch.autograd.grad(first.sum(), twins, allow_unused=True)
    return [name for name, gradient in zip(names, reached, strict=True) if gradient is not None]


def load(path: Path) -> tuple[AffinityNet, AffinityConfig]:
    """Rebuild a network from a checkpoint of `train_affinity`.

    Returns:
        The network in evaluation mode and its configuration.

    Raises:
        UserError: The file is missing or of another kind.
    """
    return common.load(path, AffinityConfig, build)
