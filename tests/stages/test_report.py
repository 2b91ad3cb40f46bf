"""Stage report: the page and tables of a finished project, of one without anything, and again."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import projects

from isim.data import prepared
from isim.experiments import overlay
from isim.reporting.page import sources

PIPELINE = Path(__file__).parents[2] / "dvc.yaml"
EXTERNAL = re.compile(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(["']?https?:""")


def page_of(root):
    return (root / "reports/index.html").read_text()


def gallery_of(root):
    tag = r'<script type="application/json" id="gallery">(.*?)</script>'
    script = re.search(tag, page_of(root))
    return json.loads(script[1])


def test_dvc_knows_all_that_the_page_is_made_from():
    deps = overlay.plain(PIPELINE.read_text())["stages"]["report"]["deps"]
    assert set(sources.READ) == {dep for dep in deps if not dep.startswith("isim/")}


def test_a_page_of_a_finished_project(run, finished, recorder):
    report = run("report", finished)
    assert report["images"] == report["with_mask"] + 8 == 24, "val has no segmenter's prediction"
    assert report["scored_images"] == 16 and report["miou_low"] <= report["miou"]
    page, gallery = page_of(finished), gallery_of(finished)
    assert not EXTERNAL.search(page), "it must need no network"
    for heading in ("Images", "Thresholds", "Classes", "Data", "Curves", "Scores"):
        assert f"<h2>{heading}</h2>" in page
    ids = {item.id for split in ("train", "val") for item in projects.items_of(finished, split)}
    assert {image[0] for image in gallery["images"]} == ids
    folder = finished / "reports/page/000"
    assert len(list(folder.glob("*.jpg"))) == 24 and len(list(folder.glob("*.png"))) == 24
    rows = projects.read_rows(finished / "reports/report/images.csv")
    assert [row["id"] for row in rows] == [image[0] for image in gallery["images"]]
    assert [row["class"] for row in projects.read_rows(finished / "reports/report/classes.csv")]
    assert ("agreement", 0) not in recorder.figures and ("coverage", None) in recorder.figures


def test_a_page_of_prepared_data_alone(run, project):
    report = run("report", project)
    assert report["images"] == 24 and report["with_mask"] == 0 and "agreement" not in report
    page = page_of(project)
    assert "nan" not in page.lower().replace("nano", "") and "<h2>Thresholds" not in page
    assert "<h2>Scores" not in page and "<h2>Curves" not in page


def test_masks_of_data_masks_are_shown_first(run, finished):
    folder = finished / "data/masks"
    folder.mkdir()
    for item in projects.items_of(finished, "val"):
        shutil.copy(item.mask, folder / f"{item.id}.png")
        # A final mask has no ignored pixels.
        from isim.data import files

        label = files.read_label_map(item.mask)
        files.write_label_map(folder / f"{item.id}.png", label % 255)
    report = run("report", finished)
    assert report["with_mask"] == 24
    rows = {r["id"]: r for r in projects.read_rows(finished / "reports/report/images.csv")}
    assert all(float(rows[i.id]["iou"]) == 1 for i in projects.items_of(finished, "val"))


@pytest.mark.parametrize("name", ["</script><b>x", 'it\'s "quoted" & <i>', "ábc 猫 🐈"])
def test_names_of_classes_and_images_are_escaped(name, run, finished):
    data = finished / "data/prepared"
    about = json.loads((data / "dataset.json").read_text())
    first = about["classes"][0]
    about["classes"][0] = name
    (data / "dataset.json").write_text(json.dumps(about))
    from csv import DictReader

    from isim.runtime import atomic

    with (data / "labels.csv").open(newline="") as stream:
        rows = [
            {**row, "labels": ";".join(name if n == first else n for n in row["labels"].split(";"))}
            for row in DictReader(stream)
        ]
    atomic.write_csv(data / "labels.csv", rows)
    assert prepared.load(finished).classes[0] == name
    run("report", finished)
    page = page_of(finished)
    assert gallery_of(finished)["classes"][0] == name
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<b>x" not in page and "<i>" not in page.partition("<script")[0]


def test_the_same_page_again_and_old_pictures_are_gone(run, finished):
    run("report", finished)
    first = page_of(finished)
    stale = finished / "reports/page/000/000099.jpg"
    stale.touch()
    run("report", finished)
    assert page_of(finished) == first and not stale.exists()
