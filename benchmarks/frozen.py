"""Method frozen against the bare arithmetic that it cannot do without.

- Features: the pass that decodes, resizes, computes and stores them, against the bare encoder's
  forward passes over the same pixels, prepared beforehand, in as many threads.
- A head's training on cached features, against the same steps on random numbers that are in memory
  in the type that is computed in: what is more is reading and choosing patches.
- CAMs of a round, by a head on cached features, walked along cosine affinities: the pass that reads
  them, against the same arithmetic on features that are in memory.
- Dense affinities of a batch of images of one size, against one image after the other.

The encoder is a preset's with random weights, which cost what trained ones do; the images are the
VOC sample's where it is there. `--features` measures the first row alone and tells the peak memory:

    python benchmarks/frozen.py --preset voc-frozen-dinov2-base --features
"""

import argparse
import resource
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from isim.data import files
from isim.data.prepared import Item
from isim.experiments import preset
from isim.labels.dense import batched as dense
from isim.models import cam, folding, frozen
from isim.models.cam import CamConfig
from isim.models.frozen import FrozenNetwork
from isim.params import Head
from isim.passes import cams
from isim.passes.features import Features
from isim.runtime import devices
from isim.runtime.here import Here
from isim.training import heads

GRID = 1024


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preset", default="voc-sample-fast")
    parser.add_argument("--features", action="store_true", help="the first row alone")
    given = parser.parse_args()
    print(harness.machine())
    params = preset.parameters(given.preset).train_cam
    with tempfile.TemporaryDirectory() as folder:
        items = harness.items(given.images, Path(folder) / "data")
        config = cam.configure(params, tuple(map(str, range(len(items[0].known_label)))))
        network = cam.build(config)
        assert isinstance(network, FrozenNetwork)
        network.eval()
        place = Path(folder) / "project/.isim/resume"
        place.mkdir(parents=True)
        here = Here(place)
        rows = [extraction(here, network, config, items, given.repeats)]
        if given.features:
            # Linux counts in kibibytes.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"peak memory {peak:.1f} GiB")
        else:
            head = params.frozen.head.model_copy(update={"steps": given.steps})
            rows.append(training(here, network, config, items, head, repeats=given.repeats))
            rows.append(cached_round(here, network, config, items, given.repeats))
            rows.append(affinities(given.repeats))
    harness.report(rows)


def extraction(
    here: Here, network: FrozenNetwork, config: CamConfig, items: Sequence[Item], repeats: int
) -> harness.Row:
    """Compare the pass with bare forward passes."""
    encoder = folding.for_inference(
        network.encoder, lambda e, x: e(x)[-1], here.device, devices.DTYPES[here.precision]
    )
    pixels = []
    for item in items:
        image = torch.from_numpy(files.read_image(item.image)).permute(2, 0, 1)[None]
        view = frozen.views(image.to(here.device), config.sides[0], config)
        both = torch.cat([view, view.flip(-1)])
        pixels.append(both.contiguous(memory_format=torch.channels_last))
    threads = torch.get_num_threads() if here.device.type == "cpu" else 1

    @torch.inference_mode()
    def forward(view: Tensor) -> None:
        with devices.autocast(here.precision, here.device):
            encoder(view)

    def bare() -> None:
        with (
            devices.intra_op_threads(1),
            ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool,
        ):
            list(pool.map(forward, pixels))

    def cached() -> None:
        features = Features(here, network, config)
        for path in features.folder.glob("*.npy"):
            path.unlink()
        features.prepare(items)

    data = f"{harness.data_name(items)}, {config.encoder}, {config.sides[0]} px, {here.precision}"
    case = harness.Case("features of a frozen encoder", data, ">= 0.87", "the same maps")
    return harness.compare(case, bare, cached, units=len(items), repeats=repeats)


def training(
    here: Here,
    network: FrozenNetwork,
    config: CamConfig,
    items: Sequence[Item],
    params: Head,
    *,
    repeats: int,
) -> harness.Row:
    """Compare a head's steps with the same arithmetic on numbers that are at hand."""
    features = Features(here, network, config)
    features.prepare(items)
    patches = heads.Patches(items, features.of, here.device)
    network.centre[:], network.spread[:], _ = patches.means()
    labelled = [torch.randint(21, (h * w,)).to(torch.uint8).numpy() for h, w in patches.sizes]

    with_head = replace(config, head_kind=params.kind, head_width=params.width)
    network.head = frozen.new_head(network, with_head).to(here.device)
    rows = torch.randn(params.batch, len(network.centre), device=here.device)
    target = torch.randint(21, (params.batch,), device=here.device)

    def bare() -> None:
        head = network.head
        assert head is not None
        optimizer = torch.optim.AdamW(head.parameters(), lr=params.rate)
        for _ in range(params.steps):
            with devices.autocast(here.precision, here.device):
                scores = head(rows, params.dropout)
            loss = F.cross_entropy(scores.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def cached() -> None:
        heads.train_head(here, network, patches, labelled, params=params, seed=(0,))

    data = f"{len(items)} images, {len(network.centre)} channels, {params.batch} patches a step"
    case = harness.Case("head on cached features", data, ">= 0.8")
    return harness.compare(case, bare, cached, units=params.steps, repeats=repeats)


def cached_round(
    here: Here, network: FrozenNetwork, config: CamConfig, items: Sequence[Item], repeats: int
) -> harness.Row:
    """Compare a round's pass over cached features with its arithmetic; the network has its head."""
    features = Features(here, network, config)
    features.prepare(items)
    held = [(features.tensor(item), torch.from_numpy(item.class_ids)) for item in items]
    threads = torch.get_num_threads() if here.device.type == "cpu" else 1

    def planes(given: tuple[Tensor, Tensor]) -> Tensor:
        return network.planes(*given, config)

    def bare() -> None:
        with (
            devices.intra_op_threads(1),
            ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool,
        ):
            list(pool.map(planes, held))

    def cached() -> None:
        for _ in cams.grids(here, features, config, items):
            pass

    data = f"{harness.data_name(items)}, {config.sides[0]} px, affinity {config.affinity}"
    case = harness.Case("CAMs of a cached round", data, ">= 0.8", "the same planes")
    return harness.compare(case, bare, cached, units=len(items), repeats=repeats)


def affinities(repeats: int) -> harness.Row:
    """Compare a batch of images of one size with one after the other."""
    features = torch.randn(8, GRID, 472)

    def batched() -> None:
        dense.cosine(features, 0.1, 3.0)

    def single() -> None:
        for each in features:
            dense.cosine(each, 0.1, 3.0)

    case = harness.Case("dense affinities, batched", f"8 images of {GRID} patches", ">= 0.9")
    return harness.compare(case, single, batched, units=len(features), repeats=repeats)


if __name__ == "__main__":
    main()
