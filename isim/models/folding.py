"""Networks for inference: batch normalisation and activations taken into the convolutions."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from isim.models.common import PROBE

_Network = TypeVar("_Network", bound=nn.Module)

# What oneDNN computes while it writes a convolution's result: name and numbers of the operator.
_FUSED: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
# An identity is not watched: what it returns is what it was given.
_ACTIVATES = tuple(kind for kind in _FUSED if kind is not nn.Identity)
# Largest difference, as a share of the largest value, that rounding explains (TF32 on GPUs).
_TOLERANCE = 1e-2


def for_inference(
    network: _Network,
    run: Callable[[_Network, Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> _Network:
    """Copy a network for inference: the same function, computed faster.

    A batch normalisation whose input is a convolution's output becomes part of its weights. On
    the CPU an activation that follows is computed as the convolution's result is written. With a
    reduced `dtype` the weights of these convolutions are stored in it, as autocast would cast
    them at every call.

    What feeds what is seen by running the network once on a small random image, and the copy
    must give the same there; where it does not (a result that is used twice, say), the copy is
    left as the network is.

    Args:
        network: Its mode and weights stay as they are.
        run: What inference calls: network and normalised images (1, 3, H, W) to a map.
        device: Where the network is.
        dtype: float32, or that of the autocast which the copy will be run under.

    Returns:
        A copy in evaluation mode, to be run under autocast as the network would be.
    """
    plain = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 3, *PROBE, generator=generator).to(device)
    probe = probe.contiguous(memory_format=torch.channels_last)
    # Not inference mode, whose tensors do not count what changes them.
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        watch = _watch(plain, lambda: run(plain, probe))
    folded = copy.deepcopy(plain)
    chains = [_Chain(*(folded.get_submodule(name) for name in names)) for names in watch.chains]
    for chain, names in zip(chains, watch.chains, strict=True):
        _replace(folded, names, chain.folded(_fuses(device, dtype)))
    with torch.inference_mode():
        expected, found = run(plain, probe), run(folded, probe)
    if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        return plain
    for names in watch.chains:
        if watch.dtypes[names[0]] == dtype:
            folded.get_submodule(names[0]).to(dtype)
    return folded


@dataclass
class _Watch:
    """What a run showed: names of the modules that follow one another, dtypes of the outputs."""

    chains: list[tuple[str, ...]] = field(default_factory=list)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def _watch(network: nn.Module, run: Callable[[], Tensor]) -> _Watch:
    """Find chains of convolution, normalisation and, perhaps, activation, each run once."""
    modules = dict(network.named_modules())
    # Name, input and how often that had been changed in place, output. All are kept, so that no
    # tensor's id comes twice.
    calls: list[tuple[str, Tensor, int, Tensor, int]] = []
    changes: dict[str, int] = {}

    def note(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def start(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            changes[name] = inputs[0]._version

        def end(_: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> None:
            calls.append((name, inputs[0], changes[name], made, made._version))

        return start, end

    hooks = []
    for name, module in modules.items():
        if isinstance(module, _BatchNorm) or type(module) in (nn.Conv2d, *_ACTIVATES):
            start, end = note(name)
            hooks += [
                module.register_forward_pre_hook(start),
                module.register_forward_hook(end),
            ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, *_ in calls]
    watch = _Watch()
    makers: dict[tuple[int, int], tuple[str, ...]] = {}
    for name, given, given_changes, made, made_changes in calls:
        kind = type(modules[name])
        before = makers.get((id(given), given_changes), ())
        kinds = [type(modules[each]) for each in before]
        chain: tuple[str, ...] = ()
        if names.count(name) > 1:
            pass
        elif kind is nn.Conv2d:
            chain = (name,)
            watch.dtypes[name] = made.dtype
        elif issubclass(kind, _BatchNorm) and kinds == [nn.Conv2d]:
            chain = (*before, name)
            watch.chains.append(chain)
        elif kind in _ACTIVATES and len(before) == 2 and before in watch.chains:
            chain = (*before, name)
            watch.chains[watch.chains.index(before)] = chain
        makers[id(made), made_changes] = chain
    return watch


@dataclass
class _Chain:
    """Modules that follow one another."""

    convolution: nn.Module
    normalisation: nn.Module
    activation: nn.Module = field(default_factory=nn.Identity)

    def folded(self, fuse: bool) -> list[nn.Module]:
        """Return the modules that take the places of these."""
        assert isinstance(self.convolution, nn.Conv2d)
        assert isinstance(self.normalisation, _BatchNorm)
        convolution = fuse_conv_bn_eval(self.convolution, self.normalisation)
        # timm's normalisation may hold an activation of its own.
        inner = getattr(self.normalisation, "act", nn.Identity())
        after = [inner, self.activation]
        plain = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
        if fuse and plain:
            # The first that does something; the other one, if there is one, follows.
            place = 1 if type(inner) is nn.Identity else 0
            if type(after[place]) in _FUSED:
                fused = FusedConv(convolution, *_FUSED[type(after[place])])
                after[place] = nn.Identity()
                return [fused, *after]
        return [convolution, *after]


def _replace(network: nn.Module, names: tuple[str, ...], modules: list[nn.Module]) -> None:
    # Without a module of its own the activation is the normalisation's.
    for name, module in zip(names, modules, strict=False):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)


def _fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolutions with an activation are there for the device and dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class FusedConv(nn.Module):
    """A convolution on the CPU with the activation that follows it, in its weights' dtype.

    Args:
        convolution: With zero padding; its weights are taken over.
        activation: oneDNN's name.
        numbers: Of the activation, such as its bounds.
    """

    def __init__(self, convolution: nn.Conv2d, activation: str, numbers: list[float]) -> None:
        """Take the weights over."""
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        assert not isinstance(convolution.padding, str)
        self._geometry = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        self._activation = (activation, numbers, "")

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W') in the weights' dtype."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = convolve(
            images.to(self.weight.dtype), self.weight, self.bias, *self._geometry, *self._activation
        )
        return result
