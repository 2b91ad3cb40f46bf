"""Stage prepare: what it writes loads again, and a failure leaves nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
from support.projects import read_report, read_rows
from support.sources import DEVKIT, SOURCES, SPLITS, contents, make, section

from isim.data import prepared
from isim.data.sources import readers
from isim.errors import UserError
from isim.runtime.identity import md5
from isim.stages import prepare


@pytest.fixture
def project(tmp_path, recorder, monkeypatch):
    """An empty project, beside the folder `raw` that its data is read from."""
    monkeypatch.setenv("ISIM_DATA", str(tmp_path / "raw"))
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def devkit(project, make_devkit):
    return make_devkit(project.parent / "raw" / DEVKIT, SPLITS)


def outs(project):
    return [contents(project / folder) for folder in ("data", "reports")]


@pytest.mark.parametrize("name", SOURCES)
def test_what_was_read_loads_again_and_is_written_the_same_again(name, project, make_devkit):
    raw, out = project.parent / "raw", project / "data/prepared"
    make(name, raw, make_devkit)
    generated = name in readers.GENERATED
    # Generated data has no folder that could be missing.
    params = section(name, **({"root": "$UNSET_VARIABLE"} if generated else {}))
    prepare.run(params, project)
    written = outs(project)
    prepare.run(params, project)
    assert outs(project) == written
    # Lists hold on another machine, and images stay where they are.
    assert not any(str(project.parent).encode() in data for data in written[0].values())
    source = readers.read(params, out if generated else raw, out)
    data = prepared.load(project)
    assert data.classes == source.classes
    assert {k: tuple(i.id for i in items) for k, items in data.splits.items()} == source.splits
    for item in (item for items in data.splits.values() for item in items):
        entry = source.entries[item.id]
        assert (item.image, item.mask) == (entry.image, entry.mask)
        assert (item.image_label is None) == (entry.labels is None)
        if entry.labels is not None:
            assert {source.classes[id_ - 1] for id_ in item.class_ids} == set(entry.labels)


def test_lists_manifest_figures_and_counts(project, recorder, devkit, capsys, monkeypatch):
    tables = {}
    monkeypatch.setattr(recorder, "table", tables.__setitem__, raising=False)
    (devkit / "SegmentationClass/b.png").unlink()
    prepare.run(section("voc"), project)
    about = json.loads((project / "data/prepared/dataset.json").read_text())
    assert (about["root"], about["source"]) == ("$ISIM_DATA", "voc")
    assert about["splits"] == {"train": 2, "val": 1, "test": 1}
    manifest = {row["path"]: row for row in read_rows(project / "data/prepared/manifest.csv")}
    assert len(manifest) == 4 + 2
    row, image = manifest[f"{DEVKIT}/JPEGImages/a.jpg"], devkit / "JPEGImages/a.jpg"
    assert (row["md5"], int(row["bytes"])) == (md5(image), image.stat().st_size)
    figures = read_report(project, "prepare")
    assert figures == {name: value for (name, _), value in recorder.figures.items()}
    assert (figures["classes"], figures["images"]) == (20, 4)
    assert (figures["train.images"], figures["train.masks"], figures["test.masks"]) == (2, 1, 0)
    assert figures["val.labels_per_image"] == 2 and "test.labels_per_image" not in figures
    rows = read_rows(project / "reports/prepare/counts.csv")
    counts = {(row["split"], row["class"]): tuple(row.values())[2:] for row in rows}
    assert len(counts) == len(tables["counts"]) == 3 * 20
    assert list(rows[0]) == ["split", "class", "images", "masks", "pixels"]
    assert (counts["train", "cat"], counts["test", "cat"]) == (("2", "1", "32"), ("0", "0", "0"))
    told = capsys.readouterr().out.splitlines()
    assert "train: 2 images, 1 masks, 2.00 labels an image" in told
    assert "test: 1 images, 0 masks, labels unknown" in told


def test_notes_figures_and_disagreements_are_told(project, make_devkit, capsys, caplog):
    make("voc with sbd", project.parent / "raw", make_devkit)
    devkit = project.parent / "raw" / DEVKIT
    (devkit / "JPEGImages/t.jpg").unlink()
    path = devkit / "Annotations/a.xml"
    path.write_text(path.read_text().replace("cat", "cow"))
    prepare.run(section("voc with sbd"), project)
    assert list(prepared.load(project).splits) == ["train", "val", "trainaug"]
    assert not (project / "data/prepared/test.csv").exists()
    figures = read_report(project, "prepare")
    assert (figures["trainaug.images"], figures["trainaug.official"]) == (3, 0)
    assert figures["train.labels_without_pixels"] == figures["train.pixels_without_label"] == 1
    assert figures["val.labels_without_pixels"] == 0
    told = [record.getMessage() for record in caplog.records]
    assert "a: without a pixel in the mask: cow; in the mask without a tag: cat" in told
    assert told[0].startswith("classes without a training image: 17, such as: class 'aeroplane'")
    out = capsys.readouterr().out
    rows = read_rows(project / "reports/prepare/problems.csv")
    assert len(rows) > len(told) and f"\n{len(rows)} warnings: reports/prepare/problems.csv" in out
    assert {row["severity"] for row in rows} == {"warning"}
    assert {row["kind"] for row in rows} >= {"tags that a mask contradicts"}
    assert "\ntest: 1 of its 1 images are not in" in out
    assert "\ntrainaug is a part or variant of, not the official list of 10,582 images\n" in out


def test_images_that_leave_val_are_told(project, devkit, caplog):
    prepare.run(section("voc"), project)
    (devkit / "ImageSets/Segmentation/train.txt").write_text("a\nc\n")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("b\n")
    # As DVC does before it runs a stage.
    shutil.rmtree(project / "data/prepared")
    prepare.run(section("voc"), project)
    words = "val is not that of the last run: 1 images went to train, 1 came from there, such as c"
    assert any(words in record.getMessage() for record in caplog.records)
    prepare.run(section("voc"), project)
    rows = read_rows(project / "reports/prepare/problems.csv")
    assert "val has changed" not in {row["kind"] for row in rows}


def test_failure_leaves_everything_as_it_was(project, devkit, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    prepare.run(section("voc"), project)
    before = outs(project)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_lists", full)
        with pytest.raises(UserError, match=r"cannot write .*prepared: No space left on device"):
            prepare.run(section("voc"), project)
    (devkit / "JPEGImages/a.jpg").unlink()
    (devkit / "JPEGImages/c.jpg").write_bytes((devkit / "JPEGImages/b.jpg").read_bytes()[:500])
    with pytest.raises(UserError, match=r"^the data has 2 problems"):
        prepare.run(section("voc"), project)
    problems = Path("prepare/problems.csv")
    after = outs(project)
    text = after[1].pop(problems).decode()
    assert before[1].pop(problems) and after == before
    assert "a.jpg is missing" in text and "c.jpg is unreadable" in text
    assert [path.name for path in (project / "data").iterdir()] == ["prepared"]
