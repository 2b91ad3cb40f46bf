"""Files of tags."""

import pytest

from isim.data.formats.tags import tags_of
from isim.errors import UserError


def test_tags_by_name(tmp_path):
    path = tmp_path / "tags.csv"
    path.write_text('\ufeffimage,tags\na.jpg,cat; dog\n"box/b, c.png",\nplain,cat\n', "utf-8")
    assert tags_of(path) == {"a": ("cat", "dog"), "box/b, c": (), "plain": ("cat",)}


@pytest.mark.parametrize("text", ["image,tags\na.jpg,cat,dog\n", "image\na.jpg\n", None])
def test_other_files_are_one_line(text, tmp_path):
    path = tmp_path / "tags.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"tags\.csv"):
        tags_of(path)
