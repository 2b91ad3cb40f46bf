"""Values and colours of masks become class ids; those that are no class's are named."""

import re

import numpy as np
import pytest
from PIL import Image

from isim.data import files
from isim.data.formats import masks
from isim.errors import UserError

CLASSES = ("cat", "dog")


def scheme(root, problems=None, **values):
    given = {int(k[1:]): v for k, v in values.items()}
    return masks.scheme(CLASSES, given, root, [] if problems is None else problems)


def read(root, image, **values):
    image.save(root / "m.png")
    return masks.read(root / "m.png", scheme(root, **values))


def colors(*pixels):
    return Image.fromarray(np.array([pixels], np.uint8))


def test_colours_of_voc_or_of_a_table(tmp_path):
    row = [(128, 0, 0), (0, 128, 0), (0, 0, 0), (224, 224, 192)]
    values, simple = read(tmp_path, colors(*row))
    assert values.tolist() == [[1, 2, 0, 255]] and not simple
    (tmp_path / "colors.txt").write_text(
        "dog: 128, 0, 0\nvoid #e0e0c0\n\ncat 0;128 0\n".replace(";", " ")
    )
    assert read(tmp_path, colors(*row))[0].tolist() == [[2, 1, 0, 255]]
    # A palette has colours, too, which a table gives a meaning.
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette(files.voc_palette().tobytes())
    assert read(tmp_path, image)[0].tolist() == [[0, 2, 1]]
    (tmp_path / "colors.txt").unlink()
    values, simple = read(tmp_path, image)
    assert values.tolist() == [[0, 1, 2]] and simple


def test_transparent_pixels_are_background(tmp_path):
    pixels = np.array([[[128, 0, 0, 255], [0, 128, 0, 0]]], np.uint8)
    assert read(tmp_path, Image.fromarray(pixels))[0].tolist() == [[1, 0]]


def test_grey_pixels_in_three_channels_are_values(tmp_path):
    grey = colors((0, 0, 0), (2, 2, 2), (255, 255, 255))
    assert read(tmp_path, grey)[0].tolist() == [[0, 2, 255]]
    assert read(tmp_path, grey, v2="cat", v255="dog")[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("image", "values", "words"),
    [
        (
            colors((1, 2, 3), (128, 0, 0), (3, 2, 1)),
            {},
            r"2 colours .* such as \(1, 2, 3\); list the",
        ),
        (Image.fromarray(np.array([[7, 0, 9]], np.uint8)), {"v7": "cat"}, "does not name: 9; name"),
        (Image.fromarray(np.array([[700]], np.uint16)), {}, "has values above 255"),
    ],
)
def test_what_is_no_class_is_named(tmp_path, image, values, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, image, **values)


@pytest.mark.parametrize(
    "line", ["cat 128 0", "cat 1 2 300", "128 0 0", "cat #12345", "bird 1 2 4"]
)
def test_lines_of_a_table_that_are_none_are_told(tmp_path, line):
    (tmp_path / "colours.txt").write_text(f"# a comment\ndog 1 2 3\n{line}\n")
    problems = []
    found = scheme(tmp_path, problems)
    (problem,) = problems
    assert re.search(r"colours.txt line 3: (expected .*found|'bird' is no class)", problem.what)
    assert problem.error and not found.complete
    # What was told once is not told again for each mask.
    values, simple = masks.read(_saved(tmp_path, colors((9, 9, 9), (1, 2, 3))), found)
    assert (values == 255).all() and values.shape == (1, 2) and not simple


def test_names_of_one_meaning_may_share_a_colour(tmp_path):
    lines = "void 224 224 192\nignore #e0e0c0\ncat 1 2 3\ncat:1,2,3::\n"
    (tmp_path / "colors.txt").write_text(lines)
    assert _told(tmp_path) == []
    (tmp_path / "colors.txt").write_text(f"{lines}dog 224 224 192\n")
    (problem,) = _told(tmp_path)
    assert problem.what.endswith("line 5: 'dog' has the colour of line 1; change one")


def test_all_faults_of_a_table_and_of_the_values_are_told(tmp_path):
    (tmp_path / "colors.txt").write_text("cat 1 2\ncat 1 2 3\nbird 3 2 1\n")
    problems = []
    scheme(tmp_path, problems, v7="cow", v255="dog", v9="hen")
    assert [problem.kind for problem in problems] == [
        *(2 * ["mask_values of no class"] + 2 * ["table of colours"])
    ]
    (tmp_path / "colors.txt").write_bytes(b"\xff\xfec")
    (problem,) = _told(tmp_path)
    assert "UTF-8" in problem.what and problem.file == str(tmp_path / "colors.txt")


def _told(root):
    problems = []
    scheme(root, problems)
    return problems


def _saved(root, image):
    image.save(root / "m.png")
    return root / "m.png"


def test_values_name_classes_or_what_is_none(tmp_path):
    found = scheme(tmp_path, v255="dog", v7="background", v9="ignore")
    assert dict(found.values) == {255: 2, 7: 0, 9: 255}
    assert found.complete
    problems = []
    assert not scheme(tmp_path, problems, v255="Dog").complete
    assert "prepare.mask_values: 'Dog' is no class; known: cat, dog" in problems[0].what
