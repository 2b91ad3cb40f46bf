"""isim predict: files, folders, tags, what is left out, what stays as it was."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image
from support import checkpoints
from support.networks import CLASSES

from isim.data import files
from isim.errors import UserError
from isim.experiments import preset
from isim.labels.clean.clean import clean
from isim.passes import export, predict
from isim.passes.predict import Options


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {n: checkpoints.save(n, folder / n) for n in ("frozen_segmenter", "frozen")}


@pytest.fixture
def photos(tmp_path):
    """A folder with a subfolder, and what no tool makes a mask of."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "trip/b.jpg", ".hidden/c.png", "trip/@eaDir/b.jpg")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number + 10).integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(noise).resize((80, 60)).save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(paths, out, root, model, **options):
    return predict.run(paths, out, Options(model=model, **options), root)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_subfolders_are_kept_and_all_is_written(photos, models, tmp_path):
    out = tmp_path / "out"
    wanted = {"overlay": True, "probabilities": True, "crf": True}
    assert run([photos], out, tmp_path, models["frozen_segmenter"], **wanted) == 0
    ends = (".npz", ".png", "_overlay.jpg")
    assert names(out) == sorted(
        ["classes.json", *(f"{id_}{end}" for id_ in ("a", "trip/b") for end in ends)]
    )
    assert [entry["name"] for entry in json.loads((out / "classes.json").read_text())][1:] == [
        *CLASSES
    ]
    with Image.open(out / "a.png") as mask, np.load(out / "a.npz") as arrays:
        assert mask.mode == "P" and mask.size == (80, 60)
        planes = arrays["probabilities"].astype(np.float32)
        assert planes.shape == (4, 60, 80) and np.allclose(planes.sum(0), 1, atol=0.01)
        expected = clean(planes.argmax(0).astype(np.uint8), 0.001, 0.001)
        assert (np.array(mask) == expected).mean() > 0.99
    # A second run takes nothing of the first for an image, though it lies inside.
    inside = photos / "masks"
    for _ in range(2):
        assert run([photos], inside, tmp_path, models["frozen_segmenter"]) == 0
        assert names(inside) == ["a.png", "classes.json", "trip/b.png"]


def test_a_file_that_cannot_be_read_is_told_and_left_out(photos, models, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    files.write_label_map(out / "broken.png", np.ones((2, 2), np.uint8))
    assert run([photos], out, tmp_path, models["frozen_segmenter"]) == 1
    told = capsys.readouterr().err
    assert "left out: image" in told and "broken.jpg" in told and "1 of 3 files" in told
    assert (files.read_label_map(out / "broken.png") == 1).all(), "what was there stays"
    assert (out / "trip/b.png").exists() and not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("nothing", ["", "None"])
def test_tags_leave_no_other_class(nothing, photos, models, tmp_path, capsys):
    tags, out = tmp_path / "tags.csv", tmp_path / "out"
    # `none` alone is an empty cell, here as in the data.
    tags.write_text(f"image,tags\na.png,cat\nb,{nothing}\n")
    for options in (
        {"model": models["frozen_segmenter"]},
        {"model": models["frozen"], "by_cam": 1, "threshold": 0.5},
    ):
        given = {"tags": tags, "cleaned": False, **options}
        model = given.pop("model")
        assert run([photos], out, tmp_path, model, **given) == 0
        assert set(np.unique(files.read_label_map(out / "a.png"))) == {0, 2}
        assert not files.read_label_map(out / "trip/b.png").any(), "no tag: background"
    tags.write_text("image,tags\na.png,cat\nz.png,lion\n")
    assert run([photos], out, tmp_path, models["frozen"], tags=tags, by_cam=True) == 1
    told = capsys.readouterr().err
    assert "1 of 2 images have no row" in told and f"1 rows of {tags} are of no image given" in told


@pytest.mark.parametrize(
    ("rows", "own", "others"),
    [
        (["trip/b.jpg,cat", "z/photos/trip/b.jpg,dog", "old/b.jpg,dog"], "cat,dog", 1),
        (["old/b,dog", "photos/old/b,dog", "b,cat"], "cat", 2),
        (["/x/trip/b.jpg,cat", r"C:\trip\b.jpg,dog"], "cat,dog", 0),
        (["p/b.jpg,dog", "{photos}/trip/b.jpg,cat", "q/b.jpg,dog"], "cat", 2),
        (["/x/old/b.jpg,cat", "old/b.jpg,dog"], "cat,dog", 0),
        (["old/b.jpg,cat"], "cat", 0),
    ],
)
def test_rows_of_an_image_are_those_with_its_path(rows, own, others, photos, tmp_path, capsys):
    path = tmp_path / "tags.csv"
    path.write_text("\n".join(["image,tags", *rows, ""]).replace("{photos}", str(photos)))
    images = {"b": photos / "trip/b.jpg"}
    (found,) = predict._known(path, images, ["dog", "cat"]).values()
    assert [("dog", "cat")[tag - 1] for tag in reversed(found)] == own.split(",")
    told = f"isim: {others} rows of {path} are of no image given\n" if others else ""
    assert capsys.readouterr().err == told


def test_one_file_by_two_paths_has_one_mask(photos, models, tmp_path):
    paths = [photos, photos / "trip/../a.png"]
    assert run(paths, tmp_path / "out", tmp_path, models["frozen_segmenter"]) == 0
    assert names(tmp_path / "out") == ["a.png", "classes.json", "trip/b.png"]


def test_what_is_not_sure_is_255(photos, models, tmp_path):
    model, out = models["frozen_segmenter"], tmp_path / "out"
    run([photos / "a.png"], out, tmp_path, model, cleaned=False, probabilities=True)
    plain = files.read_label_map(out / "a.png")
    with np.load(out / "a.npz") as arrays:
        sure = arrays["probabilities"].max(0)
    run([photos / "a.png"], out, tmp_path, model, cleaned=False, min_confidence=0.6)
    found = files.read_label_map(out / "a.png")
    near = np.abs(sure - 0.6) < 0.01
    assert ((found == 255) == (sure < 0.6))[~near].all()
    assert (found == plain)[found != 255].all() and 0 < (found == 255).mean() < 1


@pytest.mark.parametrize(
    ("paths", "options", "words"),
    [
        (["missing.jpg"], {}, "missing.jpg does not exist"),
        (["empty"], {}, "no images in"),
        (["photos"], {"by_cam": True}, "--cam needs --tags"),
        (["photos"], {"by_cam": True, "tags": "t", "probabilities": True}, "add --crf"),
        (["photos"], {"tags": "wrong.csv"}, "no classes of the model, such as 'lion'"),
        (["photos", "other/a.png"], {}, "would have one mask"),
        (["photos"], {"threshold": 0.5}, "--threshold is of --cam"),
        (["photos"], {"out": "wrong.csv"}, "wrong.csv is a file; name a folder"),
        (
            ["photos"],
            {"tags": "two.csv"},
            "line 3: p/a and q/a would both be image a; take",
        ),
        (["photos"], {"tags": "twice.csv"}, "twice.csv line 2: x is the name of several images"),
        (["other"], {"out": "other"}, "would lie beside images"),
        (["other/a.png"], {"out": "other"}, "would lie beside images"),
        (["other/sub"], {"out": "other"}, "would lie beside images"),
        (["photos"], {"out": "photos/trip"}, "would lie beside images"),
    ],
)
def test_wrong_usage_is_one_line(paths, options, words, photos, models, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other/sub").mkdir(parents=True)
    for place in (tmp_path / "other", tmp_path / "other/sub"):
        os.link(photos / "a.png", place / "a.png")
    if "twice.csv" in options.values():
        for place in (photos / "trip", photos / "home"):
            place.mkdir(exist_ok=True)
            os.link(photos / "a.png", place / "x.png")
    (tmp_path / "twice.csv").write_text("image,tags\nx,cat\n")
    (tmp_path / "two.csv").write_text("image,tags\np/a,cat\nq/a,cat\n")
    (tmp_path / "wrong.csv").write_text("image,tags\na,lion\n")
    given = {k: tmp_path / v if k in ("tags", "out") else v for k, v in options.items()}
    out = given.pop("out", tmp_path / "out")
    with pytest.raises(UserError, match=words) as caught:
        run([tmp_path / path for path in paths], out, tmp_path, models["frozen_segmenter"], **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path)) * 2
    assert not (tmp_path / "out").exists() and not [*tmp_path.rglob("classes.json")]


def test_names_are_one_in_both_forms_of_unicode_until_they_are_exported(photos, models, tmp_path):
    name = unicodedata.normalize("NFD", "Äpfel/é")
    (photos / name).parent.mkdir()
    (photos / "a.png").rename(photos / f"{name}.png")
    tags, out = tmp_path / "tags.csv", tmp_path / "out"
    tags.write_text("image,tags\nÄpfel/é.png,cat\nb,dog\n")
    model = models["frozen"]
    assert run([photos], out, tmp_path, model, tags=tags, by_cam=True) == 0
    assert names(out) == sorted(["classes.json", "Äpfel/é.png", "trip/b.png"])
    exported = export.Options(source=str(out), images=photos)
    assert "of 2 images" in export.run("coco", tmp_path / "all.json", exported, tmp_path)
    alone = tmp_path / "alone"
    assert run([photos / f"{name}.png"], alone, tmp_path, models["frozen_segmenter"]) == 0
    assert names(alone) == sorted(["classes.json", "é.png"])


def test_sixteen_bits_are_read_by_the_range_of_the_project(models, tmp_path, capsys):
    photos, out, model = tmp_path / "photos", tmp_path / "out", models["frozen_segmenter"]
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (6, 8)).repeat(8, 0).repeat(8, 1)
    Image.fromarray(noise.astype(np.uint16) * 10).save(photos / "deep.png")
    Image.fromarray(noise.astype(np.uint8)).save(photos / "plain.png")
    assert run([photos], out, tmp_path, model, cleaned=False) == 1
    assert "deep.png has more than 8 bits" in capsys.readouterr().err
    preset.write("own-images", tmp_path / "params.yaml")
    text = (tmp_path / "params.yaml").read_text()
    changed = text.replace("sixteen_bit: refuse", "sixteen_bit: [0, 2550]")
    assert changed != text
    (tmp_path / "params.yaml").write_text(changed)
    assert run([photos], out, tmp_path, model, cleaned=False) == 0
    deep, plain = (files.read_label_map(out / f"{name}.png") for name in ("deep", "plain"))
    assert (deep == plain).all()
    overlays = export.Options(source=str(out), images=photos)
    assert "2 overlays" in export.run("overlay", tmp_path / "overlays", overlays, tmp_path)
