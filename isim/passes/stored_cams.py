"""CAMs of a split, stored at a stride (spec 4), and what the stride costs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.seeds import batched as seeds
from isim.models.cam import CamConfig, CamNetwork
from isim.params import ExportCams, chosen
from isim.passes import cams, counts, each
from isim.passes.features import Features
from isim.passes.stream import Array, Tensors
from isim.runtime.here import Here


def export(
    here: Here,
    network: CamNetwork | Features,
    config: CamConfig,
    items: Sequence[Item],
    *,
    params: ExportCams,
    split: str,
) -> dict[str, float]:
    """Write the CAMs of a split to `cams/<split>` in the resume folder.

    Returns images, images per second, megabytes; where any image has a mask, the mIoU of the seeds
    at full size and at the stride, and their difference. Raises UserError for an unreadable image
    or a failed write.
    """
    folder = here.resume / "cams" / split
    num_labels = len(config.classes) + 1
    threshold = chosen(params.threshold)
    make = cams.maker(here, network, config, params)

    def exported(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        """(K', h, w) CAMs at the stride; (H, W) uint8 seeds of full CAMs and of the stored."""
        found: list[Tensors] = []
        for item, full in zip(batch, make(batch, images), strict=True):
            small = _resize(full, [-(-side // params.stride) for side in full.shape[1:]], "area")
            # As `evaluate` grows them, through the stored float16.
            grown = _resize(small.half().float(), full.shape[1:], "bilinear")
            ids = torch.from_numpy(item.class_ids)
            peaks = [seeds.peak(planes, ids) for planes in (full, grown)]
            found.append((small, *(seeds.cut(*peak, threshold) for peak in peaks)))
        return found

    def finish(item: Item, planes: Array, full: Array, stored: Array) -> dict[str, Any]:
        line = counts.scored(item, {"full": full, "stored": stored}, num_labels)
        files.write_cam(folder / f"{item.id}.npz", planes, item.class_ids, full.shape)
        return line

    done = each.image(here, items, finish, name=split, outs={folder: ".npz"}, compute=exported)
    report = {
        "images": len(items),
        "images_per_second": done.speed["images_per_second"],
        "megabytes": sum(path.stat().st_size for path in folder.rglob("*.npz")) / 1e6,
    }
    if any(item.mask for item in items):
        found = (counts.total(done.lines, k, (num_labels, num_labels)) for k in ("full", "stored"))
        full, stored = map(metrics.miou, found)
        report |= {"cam_miou_full_size": full, "cam_miou_stored": stored}
        report["stride_difference"] = stored - full
    return report


def _resize(planes: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize (K', H, W), where K' may be 0."""
    if len(planes) == 0:
        return planes.new_zeros(0, *size)
    return F.interpolate(planes[None], size, mode=mode)[0]
