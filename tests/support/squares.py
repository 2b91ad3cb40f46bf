"""Numbers squared as a pass maps images, in this process or in others."""

import json
from pathlib import Path

from isim.data.prepared import Item
from isim.passes import each
from isim.runtime import atomic
from isim.runtime.here import Here

ITEMS = tuple(Item(f"{number:02d}", Path(), None, None) for number in range(12))
IDS = [item.id for item in ITEMS]
LINES = [{"id": id_, "square": int(id_) ** 2} for id_ in IDS]


def square(root):
    """Square the numbers in a folder, with a file and a line for each."""

    def finish(item):
        atomic.write_text(root / f"out/{item.id}.txt", "squared")
        return {"square": int(item.id) ** 2}

    return each.image(Here(root), ITEMS, finish, name="squares", outs={root / "out": ".txt"})


def noted(root, journals="squares.jsonl*"):
    """Numbers of the whole lines in journals."""
    texts = [path.read_text() for path in root.glob(journals)]
    return [json.loads(line)["id"] for text in texts for line in text.split("\n")[:-1]]
