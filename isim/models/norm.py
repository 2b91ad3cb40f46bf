"""Batch normalisation over the batches of all processes of a run."""

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from isim import distributed
from isim.errors import UserError


def synchronise(network: nn.Module) -> None:
    """Let several processes train a network as one would; alone do nothing.

    All start from the weights of rank 0, and layers in training mode take their statistics from
    the batches of all processes. Layers are changed in place: names, parameters and references
    stay.

    Args:
        network: On the device that it is trained on.

    Raises:
        UserError: It has a kind of batch normalisation that cannot be shared.
    """
    if distributed.world() == 1:
        return
    distributed.equalise(network.state_dict().values())
    for module in network.modules():
        if type(module) in _SHARED:
            module.__class__ = _SHARED[type(module)]
            module.process_group = None  # type: ignore[assignment]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"this network normalises by {type(module).__name__}, which processes cannot "
                "share; choose another encoder, or unset ISIM_PROCESSES"
            )


class _Total(torch.autograd.Function):
    """Sum over the processes, of the values and of their gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        return distributed.total(values)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return distributed.total(gradients[0])


class SharedNorm(nn.SyncBatchNorm):
    """Batch normalisation of (B, C, ...) over all processes, of CPU tensors, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training mode by the statistics of all processes."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [axis for axis in range(values.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(values.ndim)]
        count = distributed.total(torch.tensor(float(values.numel() // values.shape[1])))
        # Twice around instead of a mean of squares, which would cancel.
        mean = _Total.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _Total.apply(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps).view(shape)
        normalised = centred * scale
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics (C,) towards those of a batch."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class SharedNormAct(SharedNorm):
    """The same for timm's layer that goes on with an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and activate."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


_SHARED: dict[type[nn.Module], type[SharedNorm]] = {
    nn.BatchNorm2d: SharedNorm,
    BatchNormAct2d: SharedNormAct,
}
