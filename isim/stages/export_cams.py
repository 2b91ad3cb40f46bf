"""Stage 3: write the final network's CAMs to data/cams."""

from pathlib import Path

from isim import stage
from isim.data import prepared
from isim.models import cam
from isim.params import ExportCams
from isim.passes import features, stored_cams
from isim.runtime import atomic, devices, progress


def run(params: ExportCams, root: Path) -> None:
    """Run the stage: data/prepared and models/train_cam to data/cams and reports.

    Raises UserError for no checkpoint, no prepared data, an unknown split, an unreadable image.
    """
    data = prepared.load(root)
    chosen = {split: data.split(split) for split in params.splits}
    network, config = cam.load(root / "models/train_cam/model.safetensors")

    reads = {name: root / name for name in ("data/prepared", "models/train_cam")}
    with stage.opened("export_cams", params, root, reads=reads) as here:
        devices.place(network, here.device)
        every = [item for items in chosen.values() for item in items]
        source = features.ready(here, network, config, every)
        if params.threshold == "auto":
            params = params.model_copy(update={"threshold": config.threshold})
        atomic.write_json(here.resume / "cams/threshold.json", {"threshold": params.threshold})
        figures: dict[str, dict[str, float]] = {}
        for split, items in chosen.items():
            figures[split] = stored_cams.export(
                here, source, config, items, params=params, split=split
            )
            here.log(split, figures[split])
            progress.tell(f"export_cams: {len(items)} CAMs of {split}")
        here.publish({"cams": "data/cams"})
        about = {"precision": here.precision, "threshold": params.threshold, **figures}
        here.report(lambda here: here.figures(about, {}))
