"""Stage 9: make the page reports/index.html.

It shows the data, every image with its mask, the worst first, and how far the masks can be trusted;
no ground truth is needed. What stages have not made is left out.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from isim import stage
from isim.data import files, prepared
from isim.data.prepared import Item, Prepared
from isim.params import Report
from isim.passes import overviews
from isim.passes.journal import Line
from isim.passes.overviews import Frame, Made
from isim.reporting import pictures, results
from isim.reporting.page import content, judge, render, sources
from isim.reporting.page.judge import Row
from isim.reporting.page.sources import Places
from isim.runtime import atomic, figures
from isim.stage import Stage

# Threshold where there are no CAMs that tell theirs.
THRESHOLD = 0.3
_INDEX = "index.html"


def run(params: Report, root: Path) -> None:
    """Run the stage: what others made to reports/index.html, reports/page and reports/report.

    Raises UserError for no prepared data, an unreadable image or label map, or a failed write.
    """
    data = prepared.load(root)
    every = sources.images(data)
    items = [item for item, _ in every.values()]
    places = Places(root, data.splits)
    made = {item.id: _made(number, item, places) for number, item in enumerate(items)}
    reads = {path: root / path for path in sources.READ}
    with stage.opened("report", params, root, reads=reads) as here:
        cam = figures.read(root / "reports/train_cam")
        cams = root / "data/cams"
        told = (cams / "threshold.json").exists()
        threshold = files.read_threshold(cams) if told else THRESHOLD
        frame = Frame(here.resume / "page", params, threshold, len(data.classes) + 1)
        lines = overviews.make(here, items, made, frame)
        disputes = judge.disputes(content.rows(root / "reports/train_cam/tags.csv"))
        judged = [
            judge.image(
                item,
                every[item.id][1],
                line,
                classes=data.classes,
                disputed=len(disputes.get(item.id, ())),
                covering=params.covering,
            )
            for item, line in zip(items, lines, strict=True)
        ]
        rows = judge.ranked(judged, lines)
        chosen = _chosen(items, made, params.sheet)
        sheet = overviews.sheet(here, chosen, made, frame)
        here.publish({"page": "reports/page"})
        found = judge.together(rows, lines, frame.num_labels)
        found["threshold"] = threshold
        classes = judge.classes(data.classes, items, lines)
        here.log("", {k: v for k, v in found.items() if isinstance(v, int | float)})
        shown = _shown(data, items, rows, lines, disputes=disputes) | {
            "classes": classes,
            "summary": content.summary(found, cam),
            "found": found,
            "sheet": _sheet(sheet, made, params, threshold),
        }
        here.report(partial(_report, rows, shown))


def _made(number: int, item: Item, places: Places) -> Made:
    """Find the files of an image."""
    maps = {
        overviews.MASK: places.mask(item),
        overviews.PSEUDO: places.pseudo_label(item),
        overviews.SEGMENTER: places.segmenter(item),
        overviews.TRUTH: item.mask,
    }
    there = {name: path for name, path in maps.items() if path is not None}
    return Made(number, there, places.cam(item), places.steps(item))


def _chosen(items: Sequence[Item], made: Mapping[str, Made], count: int) -> list[Item]:
    """Choose images for the contact sheet: evenly spread over those with CAMs and an object."""
    known = [item for item in items if item.image_label is not None and item.image_label.any()]
    return pictures.choose([item for item in known if made[item.id].cam], count)


def _shown(
    data: Prepared,
    items: Sequence[Item],
    rows: Sequence[Row],
    lines: Sequence[Line],
    *,
    disputes: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    """Collect what the template shows that hangs on no report of the masks."""
    tags = [None if item.image_label is None else (item.class_ids - 1).tolist() for item in items]
    colors = content.colors(len(data.classes))
    named = {"classes": data.classes, "colors": colors}
    return {
        "gallery": render.gallery(rows, lines, tags, disputes, **named),
        "names": data.classes,
        "colors": colors,
        "splits": content.splits(data),
        "pairs": content.together(data.classes, items),
    }


def _sheet(
    lines: Sequence[Line], made: Mapping[str, Made], params: Report, threshold: float
) -> dict[str, Any]:
    """Collect the contact sheet: a column a threshold and a step, a row an image."""
    count = len(params.thresholds)
    there = {name for line in lines for name in line["steps"]}
    steps = [name for name in (*sources.STEPS, overviews.TRUTH) if name in there]
    rows = []
    for line in lines:
        places = {name: count + place for place, name in enumerate(line["steps"])}
        columns = [*range(count), *(places.get(name) for name in steps)]
        cells = [(place, None if place is None else line["shares"][place]) for place in columns]
        row = {"id": line["id"], "size": line["size"], "number": made[line["id"]].number}
        rows.append(row | {"cells": cells, "layers": len(line["shares"])})
    heads = [f"{value:g}" for value in params.thresholds]
    return {"thresholds": heads, "steps": steps, "rows": rows, "threshold": threshold}


def _report(rows: Sequence[Row], shown: Mapping[str, Any], here: Stage) -> None:
    """Write tables, figures and the page."""
    found = shown["found"]
    reports = here.root / "reports"
    here.publish({_INDEX: "reports/index.html"})
    atomic.write_csv(here.reports / "images.csv", rows)
    here.figures(found, {"agreement": found.get("agreement", nan)})
    here.table("classes", shown["classes"])
    here.tracked.headline({k: v for k, v in found.items() if isinstance(v, int | float)})
    page = render.page(
        {
            **shown,
            "problems": content.problems(reports),
            "charts": content.curves(reports),
            "tables": results.tables(here.root),
        }
    )
    atomic.write_text(here.resume / _INDEX, page)
