"""SGD with a rate for each part of a network, and its schedule (paper 4.1; spec 3.4)."""

from collections.abc import Sequence

import torch
from torch import nn

from isim.runtime import processes


def poly_factor(step: int, horizon: int, power: float) -> float:
    """Return the factor of the learning rate at a step from 0, (1 - step/horizon)^power (spec 3.4).

    From the horizon's last step on it stays.
    """
    return float((1 - min(step, horizon - 1) / horizon) ** power)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its `initial_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def sgd(
    groups: Sequence[tuple[nn.Module, float]], momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """Return SGD over modules with a rate each, which groups keep as `initial_lr`.

    A step goes by the gradients' sums over all processes.
    """
    given = [
        {"params": [*part.parameters()], "lr": rate, "initial_lr": rate} for part, rate in groups
    ]
    optimizer = torch.optim.SGD(given, lr=0.0, momentum=momentum, weight_decay=weight_decay)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.register_step_pre_hook(lambda *_: processes.sum_gradients(parameters))
    return optimizer
