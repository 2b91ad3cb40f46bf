"""Plain vision transformers of timm as encoders: DINOv2, DINOv3, CLIP, SigLIP and their kind."""

from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isim.errors import UserError
from isim.models import common

# timm's families of one class of network each, whose position embeddings or rotations follow the
# size of the image. Others (BEiT, relative positions, ...) are of one size, or have other parts.
FAMILIES = ("vision_transformer", "eva", "deit")
# Why a decoder that joins maps of several strides is refused.
ONE_STRIDE = "a plain vision transformer has maps of one stride, for cam and deeplabcam alone"


def is_plain(name: str) -> bool:
    """Tell whether timm's encoder `name`, with or without a tag, is a plain vision transformer."""
    return timm.models.is_model_in_modules(name, FAMILIES)


class PlainViT(nn.Module):
    """A plain vision transformer that looks like the other encoders, of any stride.

    A patch of P x P pixels covers `stride` x `stride` pixels of the image: the image is extended
    at the right and bottom to a multiple of the stride, by its last column and row, and resized
    by P / stride (bilinear). The grid is so ceil(H / stride) x ceil(W / stride), and a network of
    one stride works on it unchanged. `stride` P leaves the pixels as they are.

    `model` has timm's names, without the classifier; `out_channels` are those of the six maps.
    """

    model: Any  # timm's classes have one interface, but no common one

    def __init__(self, name: str, stride: int) -> None:
        """Build timm's model `name` with random weights; whatever timm raises passes."""
        super().__init__()
        model: Any = timm.create_model(name, dynamic_img_size=True)
        model.reset_classifier(0, "")
        for module in model.modules():
            # Also where TIMM_FUSED_ATTN switches it off: `attention` listens there.
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
        self.model, self.name, self.stride = model, name, stride
        depth = len(model.blocks)
        self._taps = [depth // 3 - 1, 2 * depth // 3 - 1, depth - 1]
        self.out_channels: list[int] = [3, 0, 0, *[model.embed_dim] * 3]

    @property
    def stem(self) -> list[str]:
        """Names of the parameters before the first block: patches, positions and other tokens."""
        behind = ("model.blocks.", "model.norm.", "model.fc_norm.")
        return [name for name, _ in self.named_parameters() if not name.startswith(behind)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn normalised images (B, 3, H, W) of any size into six maps.

        They are the images, two maps (B, 0, h, w) without channels, and (B, C, h, w) after a
        third, two thirds and all of the blocks, each normalised by the model's last norm, with
        h = ceil(H / stride), w = ceil(W / stride).
        """
        pixels, size = self._patches(images)
        tokens = self.model.forward_intermediates(
            pixels, indices=self._taps, norm=True, output_fmt="NLC", intermediates_only=True
        )
        # Models that pool by the mean have the last norm behind it, under another name.
        maps = [self.model.fc_norm(each).mT.unflatten(-1, size).contiguous() for each in tokens]
        blank = images.new_empty(len(images), 0, *size)
        return [images, blank, blank, *maps]

    def _patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Extend and resize images to whole patches; returns these and their grid's size."""
        height, width = images.shape[-2:]
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        below, beside = rows * self.stride - height, columns * self.stride - width
        if below or beside:
            images = F.pad(images, (0, beside, 0, below), mode="replicate")
        patch = self.model.patch_embed.patch_size
        size = (rows * patch[0], columns * patch[1])
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return images, (rows, columns)

    @torch.no_grad()
    def attention(self, images: Tensor, last: int = 8) -> Tensor:
        """Attention (B, N, N) float32 that each patch (row) pays the others, N = h * w.

        Mean over the heads and the last blocks, all if there are fewer (CLIP-ES,
        arXiv 2212.09506, takes 8), of the softmax over all tokens. Rows and columns of class and
        register tokens are dropped, so that a row's sum is at most 1. Images are as in `forward`.

        Raises UserError where a block computes attention more than once or otherwise.
        """
        return self.with_attention(images, last)[1]

    @torch.no_grad()
    def with_attention(self, images: Tensor, last: int = 8) -> tuple[list[Tensor], Tensor]:
        """Compute both `forward` and `attention` in one pass."""
        depth = len(self.model.blocks)
        count = min(last, depth)
        with _Listener(depth - count, self.model.num_prefix_tokens) as heard:
            maps = self(images)
        if heard.calls != depth:
            raise UserError(
                f"encoder '{self.name}' has {depth} blocks and computes attention {heard.calls} "
                "times, not once a block; choose another affinity than attention, or an encoder "
                "such as vit_base_patch14_dinov2.lvd142m"
            )
        return maps, heard.total / count


class _Listener(TorchFunctionMode):
    """Sum of what the calls of fused attention from number `first` on weigh patches by.

    Queries and keys are seen as the call gets them, after norms and rotations; `prefix` tokens
    precede the patches.
    """

    def __init__(self, first: int, prefix: int) -> None:
        super().__init__()
        self.first, self.prefix = first, prefix
        self.calls = 0
        self.total = torch.zeros(())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function gives
        """Call the function, and listen to it if it is attention."""
        if func is F.scaled_dot_product_attention:
            if self.calls >= self.first:
                self.total = self.total + self._weights(args[0], args[1])
            self.calls += 1
        return func(*args, **(kwargs or {}))

    def _weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Weights (B, N, N) float32 of queries and keys (B, heads, tokens, D), the heads' mean."""
        heads, width = queries.shape[1], queries.shape[-1]
        total = torch.zeros(())
        with common.full_precision(queries.device):
            # One head after the other, as N x N numbers are many.
            for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True):
                weights = (query.float() * width**-0.5 @ key.float().mT).softmax(-1)
                total = total + weights[:, self.prefix :, self.prefix :]
        return total / heads
