"""Networks for inference: batch normalisation and activations taken into the convolutions."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
# Bytes of a strip's largest map between convolutions: what stays in a core's caches.
STRIP_BYTES = 4 << 20
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
    the CPU an activation that follows is computed as the convolution's result is written, and
    convolutions of which each reads the one before go through an image in strips (`Strips`). With a
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
    _put(folded, places)
    with torch.inference_mode():
        expected = run(plain, probe)
        if not _agree(run(folded, probe), expected):
            return plain
        if fuses:
            strips = _strips(folded, lambda: run(folded, probe))
            _put(folded, strips)
            if not _agree(run(folded, probe), expected):
                _put(folded, {made: replaced for replaced, made in strips.items()})
    for convolution, *_ in chains:
        if places[convolution] is not scoring:
            places[convolution].to(dtype)
    return folded


def _put(network: nn.Module, places: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules into the places of others."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in places:
                setattr(parent, name, places[child])


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


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


class _Uses(TorchDispatchMode):
    """Count of the operators that read each tensor, by its id; one that returns it does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        _: object,
        args: tuple[object, ...] = (),
        given: Mapping[str, object] | None = None,
    ) -> object:
        made = function(*args, **(given or {}))
        self.counts.update(id(leaf) for leaf in tree_leaves((args, given)) if leaf is not made)
        return made


def _strips(network: nn.Module, run: Callable[[], Tensor]) -> dict[nn.Module, nn.Module]:
    """Modules for the places of fused convolutions of which each alone reads the one before."""
    runs: Counter[nn.Module] = Counter()
    makers: dict[int, FusedConv] = {}
    kept: list[Tensor] = []  # so that no tensor's id comes twice
    before: dict[FusedConv, tuple[FusedConv, int]] = {}

    def start(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        if isinstance(module, FusedConv) and (given := id(inputs[0])) in makers:
            before[module] = makers[given], given

    def end(module: nn.Module, _: tuple[Tensor, ...], made: Tensor) -> None:
        if isinstance(module, FusedConv):
            makers[id(made)] = module
            kept.append(made)

    hooks: list[RemovableHandle] = []
    for module in network.modules():
        if isinstance(module, FusedConv):
            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(end)]
    with _Uses() as uses:
        run()
    for hook in hooks:
        hook.remove()
    after = {
        first: then
        for then, (first, made) in before.items()
        if uses.counts[made] == runs[first] == runs[then] == 1
    }
    places: dict[nn.Module, nn.Module] = {}
    for first in after.keys() - set(after.values()):
        chain = [first]
        while chain[-1] in after:
            chain.append(after[chain[-1]])
        places |= {first: Strips(chain), **{other: nn.Identity() for other in chain[1:]}}
    return places


class FusedConv(nn.Module):
    """A convolution with zero padding, on the CPU, with the activation that follows it.

    `activation` is oneDNN's name; `numbers` belong to it, such as its bounds.
    """

    def __init__(self, convolution: nn.Conv2d, activation: str, numbers: list[float]) -> None:
        """Take the weights over."""
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        # `_folded` leaves convolutions alone whose padding is a word.
        self._padding: Any = convolution.padding
        self._stride, self._dilation = convolution.stride, convolution.dilation
        self._geometry = (list(self._stride), list(self._dilation), convolution.groups)
        self._activation = (activation, numbers, "")
        self.activates = activation != "none"

    def forward(self, images: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """Turn (B, C, H, W) into (B, C', H', W') in the weights' dtype.

        With `rows`, so many rows of zeros above and below, instead of the padding there.
        """
        above, sides = self._padding
        if rows is not None:
            images, above = F.pad(images, (0, 0, *rows)) if any(rows) else images, 0
        convolve = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = convolve(
            images.to(self.weight.dtype),
            self.weight,
            self.bias,
            [above, sides],
            *self._geometry,
            *self._activation,
        )
        return result

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """First row, which may be in the padding, and end of what gives rows start to stop."""
        first = start * self._stride[0] - self._padding[0]
        return first, first + (stop - start - 1) * self._stride[0] + self._reach(0)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result of a map."""
        sides = [
            (side + 2 * self._padding[axis] - self._reach(axis)) // self._stride[axis] + 1
            for axis, side in enumerate((height, width))
        ]
        return sides[0], sides[1]

    def _reach(self, axis: int) -> int:
        return self._dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1


class Strips(nn.Module):
    """Convolutions of which each reads the one before, a strip of rows after the other.

    What lies between them stays in the processor's cache, where whole maps of a large image would
    go through memory. The results are the same bits.
    """

    def __init__(self, convolutions: Sequence[FusedConv]) -> None:
        """Hold the convolutions."""
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, C, H, W) into (B, C', H', W')."""
        chain: list[FusedConv] = list(self.convolutions)  # type: ignore[arg-type]
        sizes = [(images.shape[2], images.shape[3])]
        for convolution in chain:
            sizes.append(convolution.size(*sizes[-1]))
        between = zip(chain[:-1], sizes[1:], strict=False)
        largest = max(h * w * c.weight.shape[0] * c.weight.element_size() for c, (h, w) in between)
        if largest <= STRIP_BYTES:
            for convolution in chain:
                images = convolution(images)
            return images
        height, width = sizes[-1]
        rows = math.ceil(height / math.ceil(largest / STRIP_BYTES))
        shape = (len(images), chain[-1].weight.shape[0], height, width)
        result = torch.empty(shape, dtype=chain[-1].weight.dtype, memory_format=torch.channels_last)
        # Image by image: the rows of one lie in memory without a gap.
        for image, made in zip(images.split(1), result.split(1), strict=True):
            for start in range(0, height, rows):
                stop = min(start + rows, height)
                made[:, :, start:stop] = _strip(chain, image, start, stop)
        return result


def _strip(chain: Sequence[FusedConv], image: Tensor, start: int, stop: int) -> Tensor:
    """Compute rows start to stop of what a chain makes of (1, C, H, W)."""
    heights = [image.shape[2]]
    for convolution in chain[:-1]:
        heights.append(convolution.size(heights[-1], image.shape[3])[0])
    paddings = []
    for convolution, height in zip(reversed(chain), reversed(heights), strict=True):
        low, high = convolution.needed(start, stop)
        start, stop = max(low, 0), min(high, height)
        paddings.append((start - low, high - stop))
    rows = image[:, :, start:stop]
    for convolution, padding in zip(chain, reversed(paddings), strict=True):
        rows = convolution(rows, padding)
    return rows
