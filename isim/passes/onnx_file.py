"""ONNX files of segmenters: an image of any size in, label map and probabilities out.

The network alone is traced; what is before and after it, whose sizes depend on the image's, is
written as ONNX operators here. A file is compared with torch on real images before it is written.
"""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isim.data import files
from isim.errors import UserError
from isim.models import frozen, segmenter
from isim.models.common import reason
from isim.models.frozen import FrozenNetwork
from isim.models.segmenter import Segmenter, SegmenterConfig
from isim.passes import features
from isim.passes.photographs import BySegmenter
from isim.runtime import atomic
from isim.runtime.here import Here

OPSET = 18
# Share of pixels whose labels must be those of torch.
LEAST_EQUAL = 0.999
# Longer side that images are worked on at, and images that are compared.
SIDE, COMPARED = 1024, 10
_EXTRA = "export onnx needs the extra: pip install 'isim[onnx]'"


def write(path: Path, model: Path, images: Sequence[Path]) -> str:
    """Write a segmenter as ONNX; returns a line about the file.

    Input `image` is (H, W, 3) uint8 RGB, outputs are `label` (H, W) uint8 and `probabilities`
    (L, H, W) float32. Names of classes are in the metadata as JSON, the background's first.

    Args:
        path: File to write.
        model: Checkpoint of train_segmenter.
        images: Real images; ten of them, of several sizes, are compared.

    Raises:
        UserError: The extra is not installed, no images, a network that cannot be traced, labels
            that are not those of torch, a failed write.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(_EXTRA) from error
    network, config = segmenter.load(model)
    chosen = _chosen(images)
    made = _model(network, config)
    data = made.SerializeToString()
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    answers = BySegmenter(Here(Path(), "fp32"), network, config, side=SIDE)

    def computed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        label: NDArray[np.uint8] = session.run(["label"], {"image": image})[0]
        return label

    equal = _equality(computed, lambda image: answers(image).label(), chosen)
    if equal < LEAST_EQUAL:
        raise UserError(
            f"onnx: only {100 * equal:.2f} % of the labels of {len(chosen)} images are those of "
            f"torch, {100 * LEAST_EQUAL:.1f} % are wanted; no file was written. {config.encoder} "
            "cannot be exported for images of any size"
        )
    atomic.write_bytes(path, data)
    return (
        f"{path}: opset {OPSET}, {len(data) / 1e6:.1f} MB, {len(config.classes) + 1} labels; "
        f"{100 * equal:.3f} % of the labels of {len(chosen)} images are those of torch"
    )


def _chosen(images: Sequence[Path]) -> list[Path]:
    """Choose images, of as many sizes as there are."""
    some = [images[k] for k in np.linspace(0, len(images) - 1, min(200, len(images))).astype(int)]
    by_size: dict[tuple[int, int], list[Path]] = {}
    for path in some:
        by_size.setdefault(files.image_size(path), []).append(path)
    if not by_size:
        raise UserError("onnx: no images to compare on; name a folder of some by --images")
    rounds = range(max(map(len, by_size.values())))
    ordered = [paths[k] for k in rounds for paths in by_size.values() if k < len(paths)]
    return ordered[:COMPARED]


def _equality(
    one: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    other: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    images: Sequence[Path],
) -> float:
    """Share of pixels of all images that have the same label."""
    same = count = 0
    for path in images:
        image = files.read_image(path)
        same += int((one(image) == other(image)).sum())
        count += image.shape[0] * image.shape[1]
    return same / count


class _Grid(nn.Module):
    """Probabilities (1, L, h, w) of a frozen network, of both mirror images at all its sides."""

    def __init__(self, network: FrozenNetwork, config: SegmenterConfig) -> None:
        super().__init__()
        self.network, self.stages = network, config.stages

    def forward(self, *views: Tensor) -> Tensor:
        maps: list[list[Tensor]] = []
        for view in views:
            stages = self.network.encoder(view)[-self.stages :]
            averaged = [(m[:1] + m[1:].flip(-1)) / 2 for m in stages]
            grid = (maps[0] if maps else averaged)[-1].shape[-2:]
            maps.append([frozen._resized(m, grid) for m in averaged])
        joined = torch.cat([m for stage in zip(*maps, strict=True) for m in stage], 1)
        patches = self.network.standardise(joined[0].flatten(1).T)
        scores = self.network.label_scores(patches).softmax(1)
        return scores.T.reshape(1, -1, joined.shape[2], joined.shape[3])


class _Logits(nn.Module):
    """Logits (2, L, h, w) of both mirror images, which have been padded."""

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, views: Tensor) -> Tensor:
        logits: Tensor = self.network.head(self.network.encoder(views)[-1])
        return logits


def _traced(core: nn.Module, count: int, stride: int) -> Any:  # noqa: ANN401 - onnx's
    """Trace a network on `count` pairs of views of any multiple of the stride."""
    import onnx

    names = [f"view_{number}" for number in range(count)]
    views = tuple(torch.randn(2, 3, 6 * stride, 8 * stride) for _ in names)
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                core.eval(),
                views,
                stream,  # type: ignore[arg-type] # this exporter takes streams, too
                input_names=names,
                output_names=["scores"],
                dynamic_axes={name: {2: f"{name}_h", 3: f"{name}_w"} for name in names}
                | {"scores": {2: "h", 3: "w"}},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # the exporter raises whatever it meets
        raise UserError(f"onnx: this network cannot be traced ({reason(error)[:150]})") from error
    return onnx.load_from_string(stream.getvalue())


class _Graph:
    """ONNX operators, written one after the other; a value is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.half, self.one = (self.value([number], np.float64) for number in (0.5, 1))

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 - onnx's
        from onnx import helper

        name = f"isim_{len(self.nodes)}_{kind}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def value(self, value: Any, dtype: type) -> str:  # noqa: ANN401 - a number or list
        from onnx import numpy_helper

        name = f"isim_value_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def numbers(self, *values: int) -> str:
        return self.value(list(values), np.int64)

    def part(self, size: str, place: int) -> str:
        return self.add("Slice", size, self.numbers(place), self.numbers(place + 1))

    def mirrored(self, image: str) -> str:
        ends = self.numbers(-1), self.numbers(np.iinfo(np.int64).min)
        return self.add("Slice", image, *ends, self.numbers(3), self.numbers(-1))

    def resized(self, image: str, front: str, size: str) -> str:
        """Resize (B, C, h, w) bilinearly; `front` names (2,) int64, B and C."""
        sizes = self.add("Concat", front, size, axis=0)
        given = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return self.add("Resize", image, "", "", sizes, **given)

    def antialiased(self, pixels: str, size: str, wanted: str) -> str:
        """Resize (3, H, W) whole numbers as torch does 8-bit images: columns first, then rows.

        The runtimes' own antialiasing differs by several levels at some pixels.
        """
        columns = self._filter(self.part(size, 1), self.part(wanted, 1))
        pixels = self._whole(
            self.add("MatMul", pixels, self.add("Transpose", columns, perm=[1, 0]))
        )
        rows = self._filter(self.part(size, 0), self.part(wanted, 0))
        return self._whole(self.add("MatMul", rows, pixels))

    def _whole(self, pixels: str) -> str:
        return self.add("Floor", self.add("Add", pixels, self.value(0.5, np.float32)))

    def _filter(self, before: str, after: str) -> str:
        """Weights (after, before) float32 of a triangle filter; its lengths are (1,) int64."""
        length, number = (self.add("Cast", each, to=11) for each in (before, after))
        scale, half, one = self.add("Div", length, number), self.half, self.one
        place, given = (self.add("Add", self._range(each), half) for each in (number, length))
        centre = self.add("Unsqueeze", self.add("Mul", place, scale), self.numbers(1))
        away = self.add("Abs", self.add("Sub", given, centre))
        away = self.add("Div", away, self.add("Max", scale, one))
        weight = self.add("Max", self.add("Sub", one, away), self.value([0], np.float64))
        total = self.add("ReduceSum", weight, self.numbers(1), keepdims=1)
        return self.add("Cast", self.add("Div", weight, total), to=1)

    def _range(self, count: str) -> str:
        start, step = (self.value(number, np.float64) for number in (0, 1))
        return self.add("Range", start, self.add("Squeeze", count, self.numbers(0)), step)

    def rounded(self, size: str, factor: str, stride: int = 1) -> str:
        """(2,) int64 of (2,) float64 times a factor: the nearest multiples of a stride, not 0."""
        length = self.add("Mul", size, factor)
        if stride > 1:
            length = self.add("Div", length, self.value([stride], np.float64))
        whole = self.add("Max", self.add("Round", length), self.value([1], np.float64))
        return self.add("Mul", self.add("Cast", whole, to=7), self.numbers(stride))


def _model(network: Segmenter | FrozenNetwork, config: SegmenterConfig) -> Any:  # noqa: ANN401 - onnx's
    """Assemble the file: before the network, the network, and after it."""
    from onnx import TensorProto, helper

    is_frozen, labels = isinstance(network, FrozenNetwork), len(config.classes) + 1
    core = _Grid(network, config) if isinstance(network, FrozenNetwork) else _Logits(network)
    scales = features.at_scales(config) if is_frozen else [replace(config, sides=(0,))]
    traced = _traced(core, len(scales[0].sides), config.output_stride)
    graph = _Graph()
    size = graph.add("Slice", graph.add("Shape", "image"), graph.numbers(0), graph.numbers(2))
    exact = graph.add("Cast", size, to=TensorProto.DOUBLE)
    longer = graph.add("ReduceMax", exact, keepdims=1)
    share = graph.add("Div", graph.value([SIDE], np.float64), longer)
    working = graph.rounded(exact, graph.add("Min", share, graph.value([1], np.float64)))
    channels = graph.add("Transpose", "image", perm=[2, 0, 1])
    pixels = graph.add("Cast", channels, to=TensorProto.FLOAT)
    found = []
    for place, at in enumerate(scales):
        net = f"net{place}_"
        for number, side in enumerate(sorted(at.sides, reverse=True)):
            wanted = working
            if is_frozen:
                share = graph.add("Div", graph.value([side], np.float64), longer)
                wanted = graph.rounded(exact, share, config.output_stride)
            view = _view(graph, pixels, size, wanted, config=config)
            if not is_frozen:
                view = _padded(graph, view, wanted, config.output_stride)
            graph.nodes.append(helper.make_node("Identity", [view], [f"{net}view_{number}"]))
        graph.nodes += _prefixed(traced, net)
        given = (graph, f"{net}scores", working, labels)
        stride = config.output_stride
        found.append(_of_grid(*given) if is_frozen else _of_logits(*given, stride=stride))
    probabilities = graph.add("Mean", *found)
    grown = graph.resized(probabilities, graph.numbers(1, labels), size)
    grown = graph.add("Squeeze", grown, graph.numbers(0))
    label = graph.add("Cast", graph.add("ArgMax", grown, axis=0, keepdims=0), to=TensorProto.UINT8)
    for name, made in (("label", label), ("probabilities", grown)):
        graph.nodes.append(helper.make_node("Identity", [made], [name]))
    return _packed(graph, traced, config)


def _prefixed(traced: Any, prefix: str) -> list[Any]:  # noqa: ANN401 - onnx's
    """Copy a network's nodes with all names prefixed but those of weights, which copies share."""
    from onnx import NodeProto

    kept = {"", *(weight.name for weight in traced.graph.initializer)}
    copies = []
    for node in traced.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = prefix + node.name
        for names in (copy.input, copy.output):
            names[:] = [name if name in kept else prefix + name for name in names]
        copies.append(copy)
    return copies


def _view(graph: _Graph, pixels: str, size: str, wanted: str, *, config: SegmenterConfig) -> str:
    """Resize (3, H, W) as 8-bit images are, normalise; both mirror images (2, 3, h, w)."""
    view = graph.add("Unsqueeze", graph.antialiased(pixels, size, wanted), graph.numbers(0))
    view = graph.add("Div", view, graph.value(255, np.float32))
    for kind, values in (("Sub", config.mean), ("Div", config.std)):
        view = graph.add(kind, view, graph.value(np.reshape(values, (1, 3, 1, 1)), np.float32))
    return graph.add("Concat", view, graph.mirrored(view), axis=0)


def _padded(graph: _Graph, view: str, size: str, stride: int) -> str:
    """Pad (2, 3, h, w) with zeros, at the right and at the bottom, to a multiple of the stride."""
    left = graph.add("Mod", graph.add("Neg", size), graph.numbers(stride))
    ends = graph.add("Concat", graph.numbers(0, 0, 0, 0, 0, 0), left, axis=0)
    return graph.add("Pad", view, ends)


def _of_grid(graph: _Graph, scores: str, working: str, labels: int) -> str:
    return graph.resized(scores, graph.numbers(1, labels), working)


def _of_logits(graph: _Graph, scores: str, working: str, labels: int, *, stride: int) -> str:
    """Probabilities (1, L, h, w) of logits (2, L, h', w') of mirror images that were padded."""
    grid = graph.add("Slice", graph.add("Shape", scores), graph.numbers(2), graph.numbers(4))
    padded = graph.add("Mul", grid, graph.numbers(stride))
    pixels = graph.resized(scores, graph.numbers(2, labels), padded)
    axes = graph.numbers(2, 3)
    pixels = graph.add("Slice", pixels, graph.numbers(0, 0), working, axes)
    both = graph.add("Softmax", pixels, axis=1)
    ends = graph.numbers(0), graph.numbers(1), graph.numbers(2)
    plain = graph.add("Slice", both, ends[0], ends[1])
    other = graph.mirrored(graph.add("Slice", both, ends[1], ends[2]))
    return graph.add("Div", graph.add("Add", plain, other), graph.value(2, np.float32))


def _packed(graph: _Graph, traced: Any, config: SegmenterConfig) -> Any:  # noqa: ANN401 - onnx's
    from onnx import TensorProto, helper

    labels = len(config.classes) + 1
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["H", "W", 3])
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.UINT8, ["H", "W"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [labels, "H", "W"]),
    ]
    constants = [*traced.graph.initializer, *graph.constants]
    whole = helper.make_graph(graph.nodes, "isim_segmenter", [image], outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    # The newest that the runtimes of two years ago read.
    model = helper.make_model(whole, opset_imports=opsets, ir_version=9, producer_name="isim")
    names = json.dumps(["background", *config.classes])
    helper.set_model_props(model, {"classes": names, "method": config.method, "opset": str(OPSET)})
    return model
