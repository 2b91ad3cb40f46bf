"""The page as text: content and data put into its template.

Everything is escaped: class names and ids may hold any characters. Style and script stand in the
page itself, its pictures lie beside it in `page/`; it needs no network.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from isim.reporting.page import charts
from isim.reporting.page.judge import Row
from isim.reporting.page.sources import LAYERS

_SIZES = ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")


def page(shown: Mapping[str, Any]) -> str:
    """Render the page; `shown` are the values that templates/index.html.j2 names."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("isim.reporting.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    size = {name.lower(): getattr(charts, name) for name in _SIZES}
    return environment.get_template("index.html.j2").render(shown, **size)


def gallery(
    rows: Sequence[Row],
    lines: Sequence[Mapping[str, Any]],
    tags: Sequence[Sequence[int] | None],
    disputes: Mapping[str, Sequence[Row]],
    *,
    classes: Sequence[str],
    colors: Sequence[str],
) -> dict[str, Any]:
    """Collect what the page's script shows of each image, in lists for a small file.

    `tags` are the class numbers, from 0, of each image. An image is [id, splits, width, height,
    tags, [[class, share in thousandths] ..], layers, doubt, agreement, stable, coverage, parts,
    iou, empty, covering, [[class, tagged, probability] ..]]; figures are in thousandths, and null
    where they are not known.
    """
    places = {name: place for place, name in enumerate(classes)}
    images = []
    for row, line, known in zip(rows, lines, tags, strict=True):
        pixels = dict(line.get("pixels", ()))
        total = max(sum(pixels.values()), 1)
        shares = sorted(((-n, label - 1) for label, n in pixels.items() if label), key=lambda p: p)
        names = ("doubt", "agreement", "stable", "coverage", "parts", "iou")
        figures = [row[name] if name == "parts" else _thousandths(row[name]) for name in names]
        disputed = [
            [places[entry["class"]], int(entry["tagged"]), _thousandths(entry["probability"])]
            for entry in disputes.get(row["id"], ())
            if entry["class"] in places
        ]
        height, width = line["size"]
        present = [[label, max(1, round(-1000 * n / total))] for n, label in shares]
        layers = [LAYERS.index(name) for name in line["layers"]]
        head = [row["id"], row["splits"], width, height, known, present, layers]
        images.append([*head, *figures, row["empty"], row["covering"], disputed])
    return {"classes": classes, "colors": colors, "layers": LAYERS, "images": images}


def _thousandths(value: float | None) -> int | None:
    return None if value is None else round(1000 * value)
