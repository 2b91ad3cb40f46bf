"""VOC's annotations: names of objects, not of parts; damaged ones are problems of their files."""

import pytest

from isim.data.formats import annotation
from isim.errors import UserError


def test_names_of_objects_and_of_the_image(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        "<annotation><filename> b.jpg </filename><object><name> dog </name><part><name>head</name>"
        "</part></object><object><name>cat</name></object><object><name>dog</name></object>"
        "</annotation>"
    )
    assert annotation.names(path) == (("cat", "dog"), "b.jpg")
    (row,) = annotation.read(tmp_path, [path]).rows
    assert (row.image, row.otherwise, row.labels) == ("a", "b.jpg", ("cat", "dog"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<annotation>", "is not a readable annotation"),
        (b'<?xml version="1.0" encoding="none"?><a/>', "is not a readable annotation"),
        (b"<html><body/></html>", "its root is <html>, not <annotation>"),
        (b'<annotation xmlns="a"><object><name>b</name></object></annotation>', "its root is"),
        (b"<annotation><object><name> </name></object></annotation>", "an object has no name"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "declares a DOCTYPE; remove it"),
    ],
)
def test_damaged_ones_are_refused_and_problems_of_a_folder(tmp_path, data, words):
    path = tmp_path / "a.xml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        annotation.names(path)
    found = annotation.read(tmp_path, [path])
    assert found.rows == () and words in found.problems[0].what
