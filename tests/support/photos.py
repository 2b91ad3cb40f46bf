"""Photographs as a person would have them: a folder of JPEGs, a file of tags, maybe masks."""

import shutil

from PIL import Image

from isim.data.sources import shapes
from isim.experiments import preset
from isim.params import Shapes


def put(folder, count, *, masks=False, tags="labels.csv"):
    """Write generated photographs `images/*.jpg`, their tags and, if wanted, `masks/*.png`.

    `tags` is the path of the file, relative to the folder.
    """
    made = folder.parent / f".{folder.name}"
    params = preset.parameters("tiny").prepare
    size = Shapes(train=count, val=1, size=96)
    source = shapes.read(params.model_copy(update={"shapes": size}), made, made)
    for name in ("images", "masks") if masks else ("images",):
        (folder / name).mkdir(parents=True)
    rows = ["image,labels"]
    for number, id_ in enumerate(source.splits["train"]):
        entry = source.entries[id_]
        rows.append(f"photo_{number:02d}.jpg,{';'.join(entry.labels)}")
        Image.open(entry.image).save(folder / f"images/photo_{number:02d}.jpg", quality=95)
        if masks:
            shutil.copy(entry.mask, folder / f"masks/photo_{number:02d}.png")
    (folder / tags).write_text("\n".join(rows) + "\n")
    shutil.rmtree(made)
    return folder
