"""A person's own folder: each usual form is read, each fault that people meet is told in words."""

import csv
import json
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from support.sources import make_folder, put_photos, section, write_instances

from isim.data.files import read_label_map, write_label_map
from isim.data.problems import refuse, warnings
from isim.data.sources import folder
from isim.data.sources.review import review
from isim.data.sources.source import Treatment, examine
from isim.errors import UserError

SIX = [f"{name}.jpg" for name in "abcdef"]


def read(root, **changes):
    return folder.read(section("folder", **changes), root, root / "out")


def checked(root, **changes):
    """What stage prepare would make of a folder: the examined source and all problems."""
    params = section("folder", **changes)
    shown = None if params.sixteen_bit == "refuse" else params.sixteen_bit
    treatment = Treatment(root / "out", params.unreadable == "skip", shown)
    found = examine(folder.read(params, root, root / "out"), treatment)
    return found, [*found.problems, *review(found.source, found.results)]


def labels(source):
    return {id_: entry.labels for id_, entry in source.entries.items()}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def rows(*lines, name="labels.csv", header="image,labels"):
    return lambda root: write(root / name, "\n".join([header, *lines, ""]))


def photos(*names):
    return lambda root: put_photos(root, names)


def annotation(*names, file="other.jpg"):
    objects = "".join(f"<object><name>{name}</name></object>" for name in names)
    return f"<annotation><filename>{file}</filename>{objects}</annotation>"


def annotations(folder="Annotations", **objects):
    def make(root):
        for id_, names in objects.items():
            write(root / folder / f"{id_}.xml", annotation(*names))

    return make


def coco(root):
    images = [
        {"id": n, "file_name": f"{c}.jpg", "height": 6, "width": 8} for n, c in enumerate("abc")
    ]
    given = [{"image_id": 0, "category_id": 4}, {"image_id": 0, "category_id": 3}]
    given.append({"image_id": 1, "category_id": 3})
    # An exporter's own category, which no object has.
    categories = [{"id": 0, "name": "things"}, {"id": 3, "name": "y"}, {"id": 4, "name": "x"}]
    write_instances(root / "annotations/instances_default.json", categories, images, given)


# What a, b and c show in all of the forms below; d, where it is there, has unknown tags.
FORMS = {
    "semicolons in cells": rows("a.jpg,x; y", "b.jpg,y", "c.jpg,"),
    "bars in cells": rows("a.jpg,y|x", "b.jpg,y", "c.jpg,"),
    "commas in quoted cells": rows('a.jpg,"x, y"', "b.jpg,y", "c.jpg,"),
    "commas without quotes": rows("a.jpg,x,y", "b.jpg,y", "c.jpg,"),
    "lists of Python": rows("a.jpg,\"['x', 'y']\"", "b.jpg,\"['y']\"", "c.jpg,[]"),
    "semicolons between cells": rows("a.jpg;x,y", "b.jpg;y", "c.jpg;", header="image;labels"),
    "tabs": rows("a.jpg\tx;y", "b.jpg\ty", "c.jpg\t", header="Image\tTags", name="tags.tsv"),
    "bars between cells": rows("a.jpg|x,y", "b.jpg|y", "c.jpg|", header="file|class"),
    "other header": rows("1,a.jpg,x;y", "2,b.jpg,y", "3,c.jpg,", header="id,File Name,CATEGORIES"),
    "ids alone": rows("a,x;y", "b,y", "c,", header="ID,label"),
    "paths of another machine": rows("/home/u/p/a.jpg,x;y", "C:\\p\\b.jpg,y", "./c.jpg,"),
    "a row a label": rows("a.jpg,x", "b.jpg,y", "a.jpg,y", "c.jpg,"),
    "a column a class": rows("a.jpg,1,1", "b.jpg,1,0", "c.jpg,0,0", header="image,y,x"),
    "crosses": rows("a.jpg,x,x", "b.jpg,X,", "c.jpg,,", header="name,y,x", name="some.csv"),
    "Excel's separator": rows("a.jpg;x,y", "b.jpg;y", "c.jpg;", header="sep=;\nimage;labels"),
    "byte-order mark": rows("a.jpg,x;y", "b.jpg,y", "c.jpg,", header="\ufeffimage,labels"),
    "UTF-16": lambda root: (root / "labels.csv").write_bytes(
        "image,labels\r\na.jpg,x;y\r\nb.jpg,y\r\nc.jpg,\r\n".encode("utf-16")
    ),
    "JSON lines": lambda root: write(
        root / "metadata.jsonl",
        '{"file_name": "a.jpg", "tags": ["y", "x"]}\n\n{"file_name": "b.jpg", "tags": "y"}\n'
        '{"file_name": "c.jpg", "tags": []}\n{"file_name": "d.jpg", "tags": null}\n',
    ),
    "JSON list": lambda root: write(
        root / "labels.json",
        json.dumps([{"image": n, "labels": [*x]} for n, x in (("a", "xy"), ("b", "y"), ("c", ""))]),
    ),
    "JSON mapping": lambda root: write(
        root / "labels.json", '{"a.jpg": ["x", "y"], "b.jpg": "y", "c.jpg": []}'
    ),
    "COCO": coco,
    "VOC beside": annotations(folder=".", a=["x", "y", "x"], b=["y"], c=[]),
    "VOC apart": annotations(a=["x", "y"], b=["y"], c=[]),
    "VOC by file name": lambda root: [
        write(root / f"Annotations/{n}.xml", annotation(*names, file=f"{c}.jpg"))
        for n, c, names in ((1, "a", "xy"), (2, "b", "y"), (3, "c", ""))
    ],
}  # fmt: skip


@pytest.mark.parametrize("place", [".", "images"])
@pytest.mark.parametrize("form", FORMS)
def test_labels_of_every_form_are_read_alike(tmp_path, form, place):
    put_photos(tmp_path / "p" / place, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    if form == "VOC beside":
        annotations(folder=place, a=["x", "y", "x"], b=["y"], c=[])(tmp_path / "p")
    else:
        FORMS[form](tmp_path / "p")
    source = read(tmp_path / "p")
    assert {problem.kind for problem in source.problems} <= {"columns that are not used"}
    assert labels(source) == {"a": ("x", "y"), "b": ("y",), "c": (), "d": None}
    assert source.classes == ("x", "y")
    assert source.splits["unlabelled"] == ("d",)
    assert sorted(source.splits["train"] + source.splits["val"]) == ["a", "b", "c"]


def test_a_folder_for_each_class(tmp_path):
    put_photos(tmp_path, ["cat/1.jpg", "cat/two/1.jpg", "Ape/1.png", "none/3.jpg", "rest.jpg"])
    put_photos(tmp_path, [".ipynb_checkpoints/cat/9.jpg", "cat/@eaDir/1.jpg", "cat/.1.jpg"])
    (tmp_path / "cat/Thumbs.db").touch()
    (tmp_path / ".DS_Store").touch()
    source = read(tmp_path)
    expected = {"cat/1": ("cat",), "cat/two/1": ("cat",), "Ape/1": ("Ape",), "none/3": ()}
    assert labels(source) == expected | {"rest": None}
    assert source.classes == ("Ape", "cat")
    assert [problem.kind for problem in source.problems] == ["folders in those of classes"]
    assert "folder none: 1 images that show none of the classes" in source.notes


def test_an_image_in_the_folders_of_two_classes_has_both(tmp_path):
    put_photos(tmp_path, ["cat/1.jpg", "dog/2.jpg"])
    shutil.copy(tmp_path / "cat/1.jpg", tmp_path / "dog/1.jpg")
    source = read(tmp_path)
    assert labels(source) == {"cat/1": ("cat", "dog"), "dog/2": ("dog",)}
    assert any(note.startswith("1 files are copies in other folders") for note in source.notes)


def test_folders_of_splits_above_those_of_classes(tmp_path):
    names = ["train/cat/1.jpg", "train/dog/1.jpg", "valid/cat/2.jpg", "test/dog/3.jpg"]
    put_photos(tmp_path, names)
    source = read(tmp_path)
    assert source.classes == ("cat", "dog")
    assert set(source.splits["train"]) == {"train/cat/1", "train/dog/1"}
    assert set(source.splits["val"]) == {"valid/cat/2", "test/dog/3"}
    assert "split test: its 1 images count as val" in source.notes


def test_label_files_are_found_or_must_be_named(tmp_path):
    root = tmp_path / "photos"
    put_photos(root, SIX)
    with pytest.raises(UserError, match=r"has no labels: neither a file such as labels.csv"):
        read(root)
    rows("a,x", "b,")(tmp_path)
    (tmp_path / "labels.csv").rename(tmp_path / "photos.csv")
    assert read(root).entries["a"].labels == ("x",)
    (told,) = (p for p in read(root).problems if p.kind == "labels beside the images")
    assert not told.error and "photos.csv lies outside" in told.what
    rows("a,y", "b,", name="one.csv")(root)
    assert read(root).classes == ("y",)
    rows("a,z", "b,", name="two.csv")(root)
    with pytest.raises(UserError, match=r"2 files may hold the labels \(photos/one.csv, .*name on"):
        read(root)
    assert read(root, labels="two.csv").classes == ("z",)
    named = read(root, labels=str(tmp_path / "photos.csv"))
    assert named.classes == ("x",) and named.problems == ()
    rows("a,u", "b,", name="Labels.csv")(root)
    assert read(root).classes == ("u",)
    with pytest.raises(UserError, match=r"prepare.labels: .*three.csv does not exist"):
        read(root, labels="three.csv")


def test_names_in_nfc_and_nfd_are_one_and_any_script_will_do(tmp_path):
    names = [unicodedata.normalize("NFD", "é.jpg"), "日本.png", "große/ü ñ.jpg"]
    put_photos(tmp_path / "images", names)
    rows("é.jpg,x", unicodedata.normalize("NFD", "große/ü ñ.jpg") + ",Å", "日本,")(tmp_path)
    source = read(tmp_path)
    assert labels(source) == {"é": ("x",), "日本": (), "große/ü ñ": ("Å",)}
    assert source.problems == ()


def test_classes_are_in_natural_order_or_that_of_their_file(tmp_path):
    make_folder(tmp_path, ["a,10", "b,2", "c,1", "d,Bus", "e,apple", "f,"], SIX)
    assert read(tmp_path).classes == ("1", "2", "10", "apple", "Bus")
    write(tmp_path / "classes.txt", "Bus\n\n1\n2\n10\napple\nlater\n")
    assert read(tmp_path).classes == ("Bus", "1", "2", "10", "apple", "later")


SPLIT_ROWS = ["a,x,train", "b,x,Val", "c,,test", "d,,training", "e,y,validation", "f,y,"]


def test_a_split_column_is_honoured(tmp_path):
    make_folder(tmp_path, SPLIT_ROWS, SIX, header="image,labels,split")
    source = read(tmp_path)
    assert source.splits == {"train": ("a", "d", "f"), "val": ("b", "c", "e")}
    assert "split test: its 1 images count as val" in source.notes
    assert "split: 1 labelled images have none, and are in train" in source.notes


@pytest.mark.parametrize("place", [".", "ImageSets/Main"])
@pytest.mark.parametrize(
    ("lists", "train", "val", "left_out"),
    [
        ({"val": "b.jpg\nc\n"}, "adef", "bc", ""),
        ({"train": "a\nd.jpg\n\n"}, "ad", "bcef", ""),
        ({"train": "a\nd\n", "val": "b\n", "test": "c\n"}, "ad", "bc", "ef"),
    ],
)
def test_lists_of_images_are_honoured(tmp_path, place, lists, train, val, left_out):
    make_folder(tmp_path, ["a,x", "b,x", "c,", "d,", "e,y", "f,y"], SIX)
    for name, text in lists.items():
        write(tmp_path / place / f"{name}.txt", text)
    source = read(tmp_path)
    assert source.splits == {"train": tuple(train), "val": tuple(val)}
    told = [problem.file for problem in source.problems if not problem.error]
    assert told == list(left_out)


def test_val_fraction_zero_makes_no_val(tmp_path):
    make_folder(tmp_path, ["a,x", "b,"], SIX[:3])
    assert read(tmp_path, val_fraction=0).splits == {"train": ("a", "b"), "unlabelled": ("c",)}


def mask(root, name, values, mode=None, **options):
    path = root / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)


HALF = np.zeros((6, 8), np.uint8)
HALF[:, :4] = 1
RED = np.zeros((6, 8, 3), np.uint8)
RED[:, :4, 0] = 128


@pytest.mark.parametrize(
    ("name", "values", "table", "mask_values", "converted"),
    [
        ("a.png", HALF, "", {}, False),
        ("a.bmp", HALF, "", {}, True),
        ("a.tif", HALF, "", {}, True),
        ("a.png", HALF * 255, "", {255: "x"}, True),
        ("a.png", HALF * 9, "", {9: "x", 0: "background"}, True),
        ("a.png", RED, "", {}, True),
        ("a.png", RED, "x 128 0 0\ny #00ff00", {}, True),
        ("a.png", RED, "# label:color:parts:actions\nx:128,0,0::\nbackground:0,0,0::\n", {}, True),
        ("a.png", np.repeat(HALF[..., None] * 255, 3, 2), "", {255: "x"}, True),
        ("a.png", np.repeat(HALF[..., None], 3, 2), "", {}, True),
        ("a.png", 1 - HALF, "", {0: "x", 1: "background"}, True),
    ],
)  # fmt: skip
def test_masks_of_every_form_become_class_ids(
    tmp_path, name, values, table, mask_values, converted
):
    make_folder(tmp_path, ["a,x", "b,y", "c,"], SIX[:3])
    mask(tmp_path, name, values)
    if table:
        write(tmp_path / "labelmap.txt", table)
    found, problems = checked(tmp_path, mask_values=mask_values)
    refuse(problems)
    result = found.results["a"]
    assert result.mask == (tmp_path / ("out/masks/a.png" if converted else "masks/a.png"))
    assert np.array_equal(read_label_map(result.mask), HALF)
    # What is remembered is the file that the person has.
    assert result.files[1][0] == tmp_path / "masks" / name


def test_outlines_of_coco_become_masks(tmp_path):
    put_photos(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    images = [
        {"id": n, "file_name": f"{c}.jpg", "height": 6, "width": 8} for n, c in enumerate("abc")
    ]
    square = {"segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]], "area": 9}
    given = [{"image_id": 0, "category_id": 3} | square, {"image_id": 1, "category_id": 3}]
    write_instances(tmp_path / "_a.coco.json", [{"id": 3, "name": "x"}], images, given)
    found, problems = checked(tmp_path)
    refuse(problems)
    assert (read_label_map(found.results["a"].mask) == 1).sum() == 9
    assert found.results["b"].mask is found.results["c"].mask is None


def with_outlines(root):
    put_photos(root, ["a.jpg", "b.jpg", "c.jpg"])
    images = [
        {"id": n, "file_name": f"{c}.jpg", "height": 6, "width": 8} for n, c in enumerate("abc")
    ]
    square = {"category_id": 3, "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]], "area": 9}
    given = [{"image_id": number} | square for number in (0, 1)]
    write_instances(root / "_a.coco.json", [{"id": 3, "name": "x"}], images, given)


def test_a_file_takes_the_place_of_an_outline_in_its_own_image_alone(tmp_path):
    with_outlines(tmp_path)
    mask(tmp_path, "a.png", HALF * 255)
    found, problems = checked(tmp_path, mask_values={255: "x"})
    refuse(problems)
    # An outline's mask has class ids, whatever values the files have.
    for id_, pixels in (("a", 24), ("b", 9)):
        assert (read_label_map(found.results[id_].mask) == 1).sum() == pixels
    (note,) = (note for note in found.source.notes if note.startswith("masks:"))
    assert note == (
        "masks: 1, drawn from the outlines in _a.coco.json; 1 others have a file, which counts "
        "instead of their outlines"
    )


@pytest.mark.parametrize(("ids", "error"), [("", True), ("d", True), ("cd", False)])
def test_masks_of_0_and_255_are_refused_if_most_that_hold_255_are_so(tmp_path, ids, error):
    make_folder(tmp_path, ["a,x", "b,x", "c,x", "d,x", "e,y", "f,"], SIX)
    for id_ in "abcd":
        mask(tmp_path, f"{id_}.png", np.where(HALF, 255, 1 if id_ in ids else 0))
    # A class without 255 tells nothing of what 255 means.
    mask(tmp_path, "e.png", HALF)
    _, problems = checked(tmp_path)
    (problem,) = (problem for problem in problems if problem.kind == "masks of 0 and 255")
    assert problem.error == error
    assert f"({4 - len(ids)}, such as {tmp_path}/masks/a.png)" in problem.what


def test_none_as_the_only_label_says_that_there_is_none(tmp_path):
    make_folder(tmp_path, ["a,x", "b,None", "c,none", "d,", "e,y"], SIX)
    source = read(tmp_path)
    assert source.classes == ("x", "y") and source.problems == ()
    assert source.entries["b"].labels == source.entries["c"].labels == ()
    assert "labels: `none`, none of the classes, in 2 rows" in source.notes


@pytest.mark.parametrize("name", ["none", "None", "nan", "?"])
@pytest.mark.parametrize("form", ["voc", "coco"])
def test_an_object_s_class_may_have_any_name(tmp_path, form, name):
    put_photos(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    if form == "voc":
        annotations(a=["x", name], b=[name], c=[])(tmp_path)
    else:
        images = [
            {"id": n, "file_name": f"{c}.jpg", "height": 6, "width": 8} for n, c in enumerate("abc")
        ]
        given = [{"image_id": i, "category_id": c} for i, c in ((0, 1), (0, 2), (1, 2))]
        categories = [{"id": 1, "name": "x"}, {"id": 2, "name": name}]
        write_instances(tmp_path / "all.json", categories, images, given)
    source = read(tmp_path)
    assert source.problems == () and set(source.classes) == {"x", name}
    assert {id_: set(own) for id_, own in labels(source).items()} == {
        "a": {"x", name}, "b": {name}, "c": set()
    }  # fmt: skip
    assert not any("none of the classes" in note for note in source.notes)


@pytest.mark.parametrize("name", ["none", "NA", "-"])
def test_classes_that_are_listed_may_have_any_name(tmp_path, name):
    make_folder(tmp_path, ["a,x", f"b,{name}", "c,"], SIX)
    write(tmp_path / "classes.txt", f"x\n{name}\n")
    source = read(tmp_path)
    assert source.entries["b"].labels == (name,) and source.problems == ()


@pytest.mark.parametrize("name", ["masks", "images", "annotations"])
def test_a_class_with_the_name_of_a_folder_of_another_use_is_told(tmp_path, name):
    put_photos(tmp_path, ["cat/1.jpg", "dog/2.jpg", f"{name}/3.jpg", f"{name}/4.jpg"])
    if name == "images":
        rows("3,x", "4,")(tmp_path)
    (problem,) = read(tmp_path).problems
    words = {
        "masks": "none of its 2 files has the",
        "images": "2 images",
        "annotations": "2 images",
    }
    assert words[name] in problem.what and problem.error == (name == "masks")


def test_names_of_classes_in_nfc_and_nfd_are_one_in_every_file(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "pâté") for form in ("NFC", "NFD"))
    write_instances(
        tmp_path / "labels.json",
        [{"id": 1, "name": nfd}, {"id": 2, "name": "b"}],
        [
            {"id": 1, "file_name": "a.jpg", "height": 6, "width": 8},
        ],
        [{"image_id": 1, "category_id": 1, "area": 9, "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}],
    )
    put_photos(tmp_path / "images", ["a.jpg", "b.jpg"])
    write(tmp_path / "classes.txt", f"b\n{nfd}\n")
    write(tmp_path / "colors.txt", f"{nfd} 200 0 0\nb 0 200 0\n")
    found, problems = checked(tmp_path, mask_values={7: nfd}, val_fraction=0)
    refuse(problems)
    assert found.source.classes == ("b", nfc) and labels(found.source)["a"] == (nfc,)
    assert found.results["a"].pixels.tolist() == [39, 0, 9]
    assert {*found.source.scheme.values.values(), *found.source.scheme.colors.values()} == {1, 2}


@pytest.mark.parametrize("own", ["a.xml", "sub/a.xml"])
def test_an_annotation_does_not_add_to_the_image_of_another_one(tmp_path, own):
    put_photos(tmp_path / "images", [own.replace(".xml", ".jpg"), "b.jpg"])
    write(tmp_path / f"Annotations/{own}", annotation("x", file="a.jpg"))
    write(tmp_path / "Annotations/b.XML", annotation("y", file="b.jpg"))
    _, problems = checked(tmp_path, val_fraction=0)
    refuse(problems)
    # Of one more annotator, or copied with an image that is gone.
    write(tmp_path / f"Annotations/{own[:-5]}c.xml", annotation("y", file="a.jpg"))
    found, problems = checked(tmp_path, val_fraction=0)
    refuse(problems)
    assert labels(found.source)[own[:-4]] == ("x", "y")
    (problem,) = [one for one in problems if one.kind == "two annotations of one image"]
    assert "which has the labels of both; is another image missing?" in problem.what


def test_an_annotation_of_another_folder_is_that_of_another_image(tmp_path):
    put_photos(tmp_path / "images", ["a.jpg", "b.jpg"])
    for path, name in (("one/1.xml", "x"), ("one/2.xml", "y"), ("two/1.xml", "y")):
        write(tmp_path / f"Annotations/{path}", annotation(name, file="a.jpg"))
    write(tmp_path / "Annotations/b.xml", annotation("y"))
    _, problems = checked(tmp_path, val_fraction=0)
    (problem,) = [problem for problem in problems if problem.error]
    assert problem.what.startswith("two/1.xml: one/a.jpg and two/a.jpg would both be image a; is")


def test_rows_of_one_image_by_the_paths_of_several_people_are_taken_together(tmp_path):
    paths = ["/home/anna/p/images/a.jpg,x", r"C:\ben\images\a.jpg,y", "../images/a.jpg,z", "b.jpg,"]
    make_folder(tmp_path, [*paths, "p/images/a.jpg,x"], SIX)
    source = read(tmp_path)
    refuse(source.problems)
    assert labels(source)["a"] == ("x", "y", "z")


@pytest.mark.parametrize("outlined", [0, 1, 2])
def test_two_entries_of_one_image_are_one_unless_a_mask_is_drawn(tmp_path, outlined):
    put_photos(tmp_path / "images", ["a.jpg", "b.jpg"])
    names = {1: "a.jpg", 2: "images/a.jpg", 3: "b.jpg", 4: "b.jpg"}
    entries = [
        {"id": number, "file_name": name, "height": 6, "width": 8} for number, name in names.items()
    ]
    square = {"area": 9, "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}
    objects = [
        {"image_id": number, "category_id": number, **(square if number <= outlined else {})}
        for number in (1, 2)
    ]
    # The other entry of this image has no object.
    objects += [{"image_id": 3, "category_id": 1, **square}]
    categories = [{"id": number, "name": name} for number, name in ((1, "x"), (2, "y"), (3, "z"))]
    write_instances(tmp_path / "labels.json", categories, entries, objects)
    source = read(tmp_path)
    assert labels(source) == {"a": ("x", "y"), "b": ("x",)}
    assert source.entries["a"].mask is None
    assert (read_label_map(source.entries["b"].mask) == 1).sum() == 9
    told = [problem.what for problem in source.problems if problem.error]
    assert len(told) == (outlined > 0)
    assert all(
        "images 1 and 2 are both a, of which one mask is drawn; give" in what for what in told
    )
    # A file of a mask counts instead.
    mask(tmp_path, "a.png", HALF)
    refuse(read(tmp_path).problems)


def test_categories_without_an_object_are_no_classes_unless_they_are_listed(tmp_path):
    coco_of_other_size(tmp_path, "y")
    words = "labels.json: 1 categories without an object are no classes, such as y"
    source = read(tmp_path)
    assert source.classes == ("x",) and words in source.notes
    write(tmp_path / "classes.txt", "y\nx\n")
    source = read(tmp_path)
    assert source.classes == ("y", "x") and not any("categories" in note for note in source.notes)


@pytest.mark.parametrize("count", [0, 300])
def test_an_impossible_number_of_classes_is_told_alone(tmp_path, count):
    make_folder(tmp_path, ["a.jpg," + ";".join(map(str, range(count))), "b.jpg,"], SIX)
    (problem,) = read(tmp_path).problems
    assert problem.kind == "number of classes"


def test_sizes_of_outlines_are_those_of_the_image(tmp_path):
    path = coco_of_other_size(tmp_path)
    _, problems = checked(tmp_path, val_fraction=0)
    (problem,) = [problem for problem in problems if problem.error]
    assert "mend its width and height in the label file" in problem.what
    assert str(tmp_path / "out") not in problem.what and path.exists()


def test_blanks_before_names_of_files_do_not_matter(tmp_path):
    put_photos(tmp_path / "images", [" a.jpg", "b.jpg", " c.jpg"])
    rows(" a.jpg,x", " b.jpg,y", "c.jpg,")(tmp_path)
    source = read(tmp_path)
    assert labels(source) == {" a": ("x",), "b": ("y",), " c": ()}
    (problem,) = source.problems
    assert "c.jpg is taken for  c, whose name differs in case or blanks" in problem.what


def coco_of_other_size(root, *more):
    put_photos(root / "images", ["a.jpg", "b.jpg"])
    one = {"id": 1, "file_name": "a.jpg", "height": 8, "width": 6}
    square = {"image_id": 1, "category_id": 1, "area": 9, "segmentation": [[1, 1, 4, 1, 4, 4]]}
    other = {"id": 2, "file_name": "b.jpg", "height": 6, "width": 8}
    categories = [{"id": number, "name": name} for number, name in enumerate(("x", *more), start=1)]
    write_instances(root / "labels.json", categories, [one, other], [square])
    return root / "labels.json"


def nested_photo(root):
    put_photos(root / "images", ["one/x.jpg", "two/x.jpg"])


def exif_photo(root):
    image = Image.new("RGB", (8, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "images/a.jpg", exif=exif)
    mask(root, "a.png", HALF)


def deep_photo(root):
    image = Image.fromarray(np.full((6, 8), 40000, np.uint16))
    image.save(root / "images/a.jpg", format="PNG")


def put(name, data=b"no image"):
    def make(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return make


def masks_of(name, values):
    return lambda root: mask(root, name, values)


PLAIN = ("a.jpg,x", "b.jpg,y", "c.jpg,", "d.jpg,x;y")
# Rows of labels.csv, further files, the kind of problem, words that tell it.
FAULTS = [
    (PLAIN, put("images/a.jpg"), "unreadable image", "a.jpg is unreadable (not an image); replace"),
    ((*PLAIN, "z.jpg,x"), None, "missing image", "labels.csv line 6: z.jpg is missing"),
    ((*PLAIN, "e.png,x"), None, "missing image", "is missing; is e with another suffix meant?"),
    ((*PLAIN, "/,x"), None, "missing image", "labels.csv line 6: / is missing"),
    ((*PLAIN, "z.cr2,x"), put("images/z.cr2"), "format that is not read", "z.cr2 is in a format"),
    ((*PLAIN, "z,x"), put("images/s/z.svg"), "format that is not read", "line 6: z is in a format"),
    ((*PLAIN, "x.jpg,x"), nested_photo, "name that is not clear", "x.jpg is the name of several"),
    (PLAIN, photos("images/a.png"), "two files of one id", "a.png and a.jpg share one id"),
    ((*PLAIN, "e.jpg,Background"), None, "background as a class", "leave the cell empty"),
    ((*PLAIN, "e.jpg"), None, "unusable row", "line 6 has no cell of labels; write an"),
    ((*PLAIN, ",x"), None, "unusable row", "line 6 names no image; found: ,x"),
    (PLAIN[:3], put("classes.txt", b"x\nz"), "unknown class", "line 3: unknown class 'y'"),
    (PLAIN, put("train.txt", b"a\nq"), "list names no image", "train.txt line 2: 'q' is no image"),
    (
        PLAIN,
        lambda root: (put("train.txt", b"a\nb")(root), put("val.txt", b"b")(root)),
        "image in two lists",
        "b is in train.txt, too",
    ),
    (PLAIN, put("classes.txt", b"x\ny\xff"), "list of classes", "cannot read"),
    (PLAIN, put("train.txt", b"a\xff"), "unreadable list", "train.txt ("),
    (PLAIN, put("colors.txt", b"x 1 2"), "table of colours", "line 1: expected a class"),
    (PLAIN, put("colors.txt", b"z 1 2 3"), "table of colours", "line 1: 'z' is no class"),
    (("a.jpg,", "b.jpg,"), None, "number of classes", "has 0 classes; 1 to 254 are possible"),
    ((*PLAIN, "e.jpg,nan"), None, "labels that name nothing", "line 6: is `nan` a class?"),
    ((*PLAIN, "e.jpg,x;none"), None, "none beside other labels", "line 6: `none` stands beside"),
    (PLAIN, masks_of("a.png", HALF * 255), "masks of 0 and 255", "prepare.mask_values: {255: x}"),
    (PLAIN, masks_of("a.png", HALF * 3), "mask of other values", "outside 0..2 and 255: 3"),
    (PLAIN, masks_of("a.png", HALF[1:]), "mask of another size", "8x5 pixels, its image a.jpg 8x6"),
    (PLAIN, exif_photo, "mask of another size", "turned by its EXIF orientation, turn the mask"),
    (PLAIN, masks_of("a.jpg", HALF), "mask in a format that is not read", "a.jpg is in a form"),
    (PLAIN, masks_of("s/a.png", HALF), "mask without an image", "s/a.png is the mask of no image"),
    (PLAIN, masks_of("a.png", RED + 1), "unreadable mask", "has 2 colours that are no class's"),
    (PLAIN, deep_photo, "unreadable image", "more than 8 bits a channel; set prepare.sixteen_bit"),
    (("a.jpg,x", "b.jpg,x"), None, "one class without negatives", "nothing can be learnt; add"),
    ((*PLAIN, "p/e.jpg,x", "q/e.jpg,y"), None, "two names of one image",
     "line 7: p/e.jpg and q/e.jpg would both be image e"),
    (PLAIN, put("colors.txt", b"x 1 2 3\ny 1 2 3"), "table of colours", "line 2: 'y' has the col"),
]  # fmt: skip
# Likewise, of what is only odd.
ODDITIES = [
    (("A.JPG,x", *PLAIN[1:]), None, "names that differ in case", "A.JPG is taken for a, whose"),
    (("a.jpg,X", *PLAIN[1:]), None, "labels that differ in case", "'X' and 'x' differ in case"),
    (('a.jpg,"x, y;z"', *PLAIN), None, "names with a comma", "the class 'x, y' has a comma"),
    (('"a,b.jpg",x', *PLAIN), photos("images/a,b.jpg"), "names with a comma", "image a,b has a"),
    (PLAIN, None, "classes with few training images", "class 'x' has 2 images in train"),
    (PLAIN, put("classes.txt", b"x\ny\nz"), "classes without a training image", "'z' has no image"),
    ((*PLAIN, "e.jpg,z"), put("val.txt", b"e"), "classes without a training image", "'z' has no"),
    (("a.jpg,x;y", "d.jpg,x;y", "b.jpg,y", "c.jpg,"), None, "classes that always occur together",
     "class 'x' never occurs without 'y' in train: a CAM cannot tell"),
    (("a.jpg,x;y", "b.jpg,y"), None, "tags that never differ", "of train has the tag 'y'"),
    (PLAIN, masks_of("a.png", HALF * 2), "tags that a mask contradicts",
     "a: without a pixel in the mask: x; in the mask without a tag: y"),
    (PLAIN, lambda root: put_photos(root / "images", ["e.jpg"], (80, 60)), "sizes far apart",
     "the longer side of e is 80 pixels, of half of the images 8"),
    (PLAIN, lambda root: put("images/s/a.jpg", (root / "images/a.jpg").read_bytes())(root),
     "images of the same content", "the images a and s/a have the same content"),
    (PLAIN, put("images/z.mp4"), "format that is not read", "z.mp4 is in a format"),
    (PLAIN, photos("1.jpg", "more/2.png"), "images that are not read",
     "2 images, such as {root}/1.jpg, do not lie in {root}/images: they are not read; move"),
    (PLAIN, photos("JPEGImages/1.jpg"), "images that are not read", "1 images, such as"),
    ((*PLAIN, "e.jpg,x + y"), None, "classes made of others", "'x + y' is made of the names of"),
    (("a.jpg,0", "b.jpg,1"), None, "classes that are answers", "the classes are 0, 1; if these"),
    ((*PLAIN, "a.jpg,"), None, "rows that disagree", "a has a row without labels and one with"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "make", "kind", "words"), FAULTS)
def test_faults_are_errors_in_words(tmp_path, lines, make, kind, words):
    make_folder(tmp_path, lines, SIX)
    if make:
        make(tmp_path)
    _, problems = checked(tmp_path, val_fraction=0)
    (problem, *more) = [problem for problem in problems if problem.error]
    assert problem.kind == kind and words in problem.what, problem
    assert not more and len(problem.what) < 400 and "\n" not in problem.what
    with pytest.raises(UserError, match=r"^the data has 1 problem: "):
        refuse(problems)


@pytest.mark.parametrize(("lines", "make", "kind", "words"), ODDITIES)
def test_oddities_are_warnings_in_words(tmp_path, lines, make, kind, words):
    make_folder(tmp_path, lines, SIX)
    if make:
        make(tmp_path)
    _, problems = checked(tmp_path, val_fraction=0)
    refuse(problems)
    words = words.replace("{root}", str(tmp_path))
    found = [problem.what for problem in problems if problem.kind == kind]
    assert any(words in what for what in found), problems
    assert any(kind in line or words in line for line in warnings(problems))


def test_faults_of_all_kinds_are_told_at_once(tmp_path):
    lines = ["a.jpg,dog", "b.png,", "c.JPG,fly", "d.jpg,dog", "a,cat", "../labels.csv,dog", "x"]
    make_folder(tmp_path, lines, ("a.jpg", "b.png", "c.JPG", "e.jpg", "e.png"))
    write(tmp_path / "classes.txt", "cat\ndog")
    write_label_map(tmp_path / "masks/f.png", np.zeros((6, 8), np.uint8))
    (tmp_path / "images/b.png").write_bytes(b"")
    _, problems = checked(tmp_path)
    with pytest.raises(UserError) as caught:
        refuse(problems)
    head, *found = str(caught.value).splitlines()
    assert head == "the data has 7 problems; mend it and run `isim prepare` again"
    for words in (
        "e.png and e.jpg share one id",
        "labels.csv line 8 has no cell of labels",
        "labels.csv line 4: unknown class 'fly'",
        "d.jpg is missing",
        "../labels.csv is missing",
        "f.png is the mask of no image",
        "b.png is unreadable",
    ):
        assert sum(words in line for line in found) == 1, words


def test_faults_of_classes_colours_and_values_are_told_with_the_others(tmp_path):
    make_folder(tmp_path, [*PLAIN, "lost.jpg,x"], SIX)
    write(tmp_path / "classes.txt", "x\ny\nx\n")
    write(tmp_path / "colors.txt", "x 1 2 3\ny #12\n")
    # Colours that no line gives, and a size that is wrong whatever they mean.
    mask(tmp_path, "a.png", RED + 7)
    mask(tmp_path, "b.png", RED[1:])
    (tmp_path / "images/d.jpg").write_bytes(b"")
    _, problems = checked(tmp_path, mask_values={9: "z"}, val_fraction=0)
    assert [problem.kind for problem in problems if problem.error] == [
        "list of classes",
        "mask_values of no class",
        "table of colours",
        "missing image",
        "mask of another size",
        "unreadable image",
    ]


def test_what_cannot_be_read_is_left_out_where_that_is_asked_for(tmp_path):
    make_folder(tmp_path, [*PLAIN, "z.jpg,x", "y.heif,x"], SIX)
    put("images/a.jpg")(tmp_path)
    put("images/y.heif")(tmp_path)
    mask(tmp_path, "b.png", HALF[1:])
    (tmp_path / "masks/b.png").write_bytes(b"")
    found, problems = checked(tmp_path, unreadable="skip", val_fraction=0)
    refuse(problems)
    assert set(found.source.entries) == set("bcdef")
    told = " ".join(problem.what for problem in problems if not problem.error)
    for words in ("images/a.jpg is unreadable", "z.jpg is missing", "y.heif", "masks/b.png is unr"):
        assert words in told
    assert found.results["b"].mask is None


def test_a_range_shows_images_of_sixteen_bits(tmp_path):
    make_folder(tmp_path, PLAIN, SIX)
    deep_photo(tmp_path)
    found, problems = checked(tmp_path, sixteen_bit=(0, 40000), val_fraction=0)
    refuse(problems)
    result = found.results["a"]
    assert result.image == tmp_path / "out/images/a.png"
    assert result.files[0][0] == tmp_path / "images/a.jpg"
    assert (np.array(Image.open(result.image)) == 255).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a.jpg,dog\n", "must begin with a header such as image,labels, .*found: a.jpg,dog"),
        (b"", "found: an empty file"),
        (b"image,labels\n\xff\xfe,dog\n", "cannot read .*UTF-8"),
        (b"image,size\na.jpg,7\n", "has neither a column of labels.*found: image,size"),
        (b"image,labels\n", "the table labels.csv names no image; write a row for each"),
        (b"image,cat,dog\n", "the table labels.csv names no image; write a row for each"),
        (b"image,labels\na,x\n" + b"b," + b"y" * 200_000, "field larger than field limit"),
    ],
)
def test_label_files_that_are_none_are_shown(tmp_path, data, words):
    put_photos(tmp_path / "images", SIX)
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path)) and "\n" not in str(caught.value)


def test_folders_that_are_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; put the images there, or mend"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no image that can be read; put some there"):
        read(tmp_path)
    put("a.cr2")(tmp_path)
    with pytest.raises(UserError, match=r"holds no image .*a.cr2 is in a format that is not read"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["Background\nx\ny", "x\nx\ny", "x;y"])
def test_classes_are_named_once_and_background_is_none(tmp_path, text):
    make_folder(tmp_path, PLAIN, SIX)
    write(tmp_path / "classes.txt", text)
    (problem,) = read(tmp_path).problems
    assert problem.error and "must name each class once" in problem.what


def test_surplus_cells_and_unknown_columns_are_told(tmp_path):
    make_folder(
        tmp_path, ["a.jpg,nice,x,y", "b.jpg,,x", "c.jpg,,"], SIX, header="image,note,labels"
    )
    source = read(tmp_path)
    assert "1 rows have more cells than the header, such as line 2" in "; ".join(source.notes)
    assert [problem.what for problem in source.problems] == [
        "labels.csv: column 'note' is not used"
    ]


def test_names_of_columns_as_spreadsheets_quote_them(tmp_path):
    put_photos(tmp_path, SIX)
    with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=";", quoting=csv.QUOTE_ALL)
        writer.writerows(
            [["Image Name", "Labels"], ["a.jpg", "x;y"], ["b.jpg", "y"], ["c.jpg", ""]]
        )
    assert labels(read(tmp_path))["a"] == ("x", "y")
