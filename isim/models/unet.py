"""U-Net decoder with an injected upsampling (paper 3.2.1, Table 3)."""

from collections.abc import Callable, Sequence

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.base.modules import Conv2dReLU
from torch import Tensor, nn

# Makes the module that doubles the sides of a map with so many channels.
Upsampling = Callable[[int], nn.Module]


def bilinear(channels: int) -> nn.Module:
    """Doubling without parameters: the non-learnable UNetCAM."""
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)


def transposed(channels: int) -> nn.Module:
    """Doubling by a transposed 2x2 convolution of stride 2: the learnable UNetCAM.

    It starts as a repetition of every pixel, as an interpolation would, and learns from there.
    Nothing random is drawn, so that with one seed all other weights equal those of `bilinear`.
    """
    layer: nn.Module = nn.utils.skip_init(
        nn.ConvTranspose2d, channels, channels, 2, stride=2, device=torch.get_default_device()
    )
    repeating = torch.eye(channels)[:, :, None, None].expand(-1, -1, 2, 2)
    layer.load_state_dict({"weight": repeating, "bias": torch.zeros(channels)})
    return layer


class UNetBlock(nn.Module):
    """One step up: upsample by s = 1 or 2, join the encoder's map, two 3x3 convolutions."""

    def __init__(
        self, upsampling: nn.Module, in_channels: int, skip_channels: int, out_channels: int
    ) -> None:
        """Hold the upsampling and make the convolutions."""
        super().__init__()
        self.upsampling = upsampling
        self.conv1 = Conv2dReLU(in_channels + skip_channels, out_channels, 3, padding=1)
        self.conv2 = Conv2dReLU(out_channels, out_channels, 3, padding=1)

    def forward(self, feature: Tensor, skip: Tensor | None) -> Tensor:
        """Turn (B, C, h, w) and its skip (B, C', s·h, s·w), or None, into (B, C", s·h, s·w)."""
        feature = self.upsampling(feature)
        if skip is not None:
            feature = torch.cat([feature, skip], dim=1)
        joined: Tensor = self.conv2(self.conv1(feature))
        return joined


class UNetDecoder(nn.Module):
    """U-Net decoder over the maps of an encoder of any output stride.

    A dilated encoder has neighbouring maps of one size: the step between them joins the skip
    and does not upsample, so that at output stride 16 the CAM is as large as DeepLabCAM's.

    Args:
        encoder_channels: C_i of the maps, from the image itself to the last one.
        reductions: Their strides r_i, each 1 or 2 times the one before; the first is 1.
        decoder_channels: Result of each step, one fewer than there are maps.
        upsampling: Makes the doubling; the only difference between the two UNetCAMs.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        reductions: Sequence[int],
        decoder_channels: Sequence[int],
        upsampling: Upsampling,
    ) -> None:
        """Make one block a step."""
        super().__init__()
        # The image itself is no skip: the last step has none.
        skips = [*encoder_channels[-2:0:-1], 0]
        inputs = [encoder_channels[-1], *decoder_channels[:-1]]
        strides = zip(reductions[:0:-1], reductions[-2::-1], strict=True)
        doubles = [coarse > fine for coarse, fine in strides]
        steps = zip(doubles, inputs, skips, decoder_channels, strict=True)
        self.blocks = nn.ModuleList(
            UNetBlock(upsampling(channels) if double else nn.Identity(), channels, skip, out)
            for double, channels, skip, out in steps
        )
        initialize_decoder(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Turn maps (B, C_i, H / r_i, W / r_i), the first the image, into (B, C, H, W)."""
        decoded = features[-1]
        skips = [*features[-2:0:-1], None]
        for block, skip in zip(self.blocks, skips, strict=True):
            decoded = block(decoded, skip)
        return decoded
