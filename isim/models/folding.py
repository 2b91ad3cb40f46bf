"""Networks for inference: batch normalisation and activations taken into the convolutions."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.hooks import RemovableHandle

from isim.models.cam import CamNetwork
from isim.models.common import PROBE

_Network = TypeVar("_Network", bound=nn.Module)
# A convolution, its normalisation and, perhaps, the activation that follows.
_Chain = tuple[Any, ...]

# What oneDNN computes while it writes a convolution's result: name and numbers of the operator.
_FUSED: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
# An identity is not watched: what it returns is what it was given.
_ACTIVATIONS = tuple(kind for kind in _FUSED if kind is not nn.Identity)
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
    them at every call. Where the classifier of CAMs reads a convolution's result as it is, both
    become one, in full precision, and the encoder's last map holds the scores of the classes: of
    MobileNetV2 that saves a twelfth of the time.

    What feeds what is seen by running the network once on a small random image, and the copy
    must give the same there; where it does not (a result that is used twice, say), the copy is
    left as the network is.

    `run` is what inference calls: a network and normalised images (1, 3, H, W) to a map. `dtype`
    is float32, or bfloat16 for a copy that will run under autocast to it. The copy is in
    evaluation mode; the network, which is on `device`, stays as it is.
    """
    plain = copy.deepcopy(network).eval()
    folded = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 3, *PROBE, generator=generator).to(device)
    probe = probe.contiguous(memory_format=torch.channels_last)
    # Not inference mode, whose tensors do not count what changes them.
    with torch.no_grad():
        chains, last = _chains(folded, lambda: run(folded, probe))
    fuses = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if dtype != torch.float32:
        fuses = fuses and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    places: dict[nn.Module, nn.Module] = {}
    for chain in chains:
        places |= _folded(*chain, fuses=fuses)
    scoring = _scoring(folded, last, places) if fuses else None
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if child in places:
                setattr(parent, name, places[child])
    with torch.inference_mode():
        expected, found = run(plain, probe), run(folded, probe)
    if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        return plain
    for convolution, *_ in chains:
        if places[convolution] is not scoring:
            places[convolution].to(dtype)
    return folded


def _chains(network: nn.Module, run: Callable[[], Tensor]) -> tuple[list[_Chain], _Chain]:
    """Find the modules that feed each other in a run, each run once.

    The second is the one of them that makes the last map of the network's encoder, or nothing.
    """
    runs: Counter[nn.Module] = Counter()
    given: dict[nn.Module, _Chain] = {}
    # Tensors by their id, and how often each had been changed in place, to what has made them.
    makers: dict[tuple[int, int], _Chain] = {}
    kept: list[Tensor] = []  # so that no tensor's id comes twice
    chains: dict[nn.Module, _Chain] = {}

    def start(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        given[module] = makers.get((id(inputs[0]), inputs[0]._version), ())

    def end(module: nn.Module, _: tuple[Tensor, ...], made: Tensor) -> None:
        chain: _Chain = ()
        if type(module) is nn.Conv2d:
            chain = (module,)
        elif len(given[module]) == (1 if isinstance(module, _BatchNorm) else 2):
            chain = (*given[module], module)
            chains[chain[0]] = chain
        makers[id(made), made._version] = chain
        kept.append(made)

    ends: list[_Chain] = []

    def leave(_: nn.Module, __: tuple[Tensor, ...], maps: Sequence[Tensor]) -> None:
        ends.append(makers.get((id(maps[-1]), maps[-1]._version), ()))

    hooks: list[RemovableHandle] = []
    if isinstance(network, CamNetwork):
        hooks.append(network.encoder.register_forward_hook(leave))
    for module in network.modules():
        if isinstance(module, _BatchNorm) or type(module) in (nn.Conv2d, *_ACTIVATIONS):
            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(end)]
    run()
    for hook in hooks:
        hook.remove()
    once = (tuple(takewhile(lambda m: runs[m] == 1, chain)) for chain in chains.values())
    found = [chain for chain in once if len(chain) > 1]
    return found, ends[0] if ends and ends[0] in found else ()


def _scoring(
    network: nn.Module, last: _Chain, places: dict[nn.Module, nn.Module]
) -> nn.Module | None:
    """Let the convolution of the chain `last` compute the classes' scores, where it can.

    Without a decoder nothing but the classifier reads the encoder's last map. Returns what stands
    in the convolution's place.
    """
    if not last or not isinstance(network, CamNetwork) or network.decoder is not None:
        return None
    convolution, *others = last
    linear = all(type(places[module]) is nn.Identity for module in others)
    classes = len(network.classifier.weight)
    fused = places[convolution]
    if not isinstance(fused, FusedConv) or fused.bias is None or fused.activates or not linear:
        return None
    if convolution.groups > 1 or classes >= convolution.out_channels:
        return None
    with torch.no_grad():
        weight = network.classifier.weight.flatten(1)  # (K, C)
        scores = torch.einsum("kc,cdij->kdij", weight, fused.weight)
        fused.weight, fused.bias = nn.Parameter(scores), nn.Parameter(weight @ fused.bias)
        network.classifier.weight = nn.Parameter(torch.eye(classes)[..., None, None])
    return fused


def _folded(
    convolution: nn.Conv2d, norm: _BatchNorm, *activations: nn.Module, fuses: bool
) -> dict[nn.Module, nn.Module]:
    """Modules for the places of a chain's."""
    first: Any = fuse_conv_bn_eval(convolution, norm)
    # timm's normalisation may hold an activation of its own.
    after = [getattr(norm, "act", nn.Identity()), *activations]
    plain = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    # The first that does something; the other one, if there is one, follows.
    place = 1 if activations and type(after[0]) is nn.Identity else 0
    if fuses and plain and type(after[place]) in _FUSED:
        first = FusedConv(first, *_FUSED[type(after[place])])
        after[place] = nn.Identity()
    return dict(zip((convolution, norm, *activations), (first, *after), strict=True))


class FusedConv(nn.Module):
    """A convolution with zero padding, on the CPU, with the activation that follows it.

    `activation` is oneDNN's name; `numbers` belong to it, such as its bounds.
    """

    def __init__(self, convolution: nn.Conv2d, activation: str, numbers: list[float]) -> None:
        """Take the weights over."""
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        geometry = (convolution.padding, convolution.stride, convolution.dilation)
        self._geometry = (*map(list, geometry), convolution.groups)
        self._activation = (activation, numbers, "")
        self.activates = activation != "none"

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, C, H, W) into (B, C', H', W') in the weights' dtype."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = convolve(
            images.to(self.weight.dtype), self.weight, self.bias, *self._geometry, *self._activation
        )
        return result
