"""Batch normalisation over the batches of all processes of a run."""

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from isim.errors import UserError
from isim.runtime import processes


def synchronise(network: nn.Module) -> None:
    """Let several processes train a network as one would; alone do nothing.

    All start from the weights of rank 0, and layers in training mode take their statistics from
    the batches of all processes. Layers are changed in place: names, parameters and references
    stay. The network must be on the device that it is trained on. Raises UserError where it has a
    kind of batch normalisation that cannot be shared.
    """
    if processes.world() == 1:
        return
    processes.equalise(network.state_dict().values())
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
        return processes.total(values)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        return processes.total(gradients[0])


class SharedNorm(nn.SyncBatchNorm):
    """Batch normalisation of (B, C, H, W) over all processes, of CPU tensors, too."""

    # No network has layers without these.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training mode by the statistics of all processes."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = processes.total(torch.tensor(float(values[:, 0].numel())))
        # Twice around instead of a mean of squares, which would cancel.
        mean = self._sum(values) / count  # (1, C, 1, 1)
        centred = values - mean
        variance = self._sum(centred.square()) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(unbiased.flatten(), self.momentum)
        normalised = centred * torch.rsqrt(variance + self.eps)
        weight, bias = (each.view(1, -1, 1, 1) for each in (self.weight, self.bias))
        return (normalised * weight + bias).to(input.dtype)

    @staticmethod
    def _sum(values: Tensor) -> Tensor:
        total: Tensor = _Total.apply(values.sum((0, 2, 3), keepdim=True))  # type: ignore[no-untyped-call]
        return total


class SharedNormAct(SharedNorm):
    """Shared normalisation in the place of timm's layer that goes on with an activation."""

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
