"""Contact sheets."""

import numpy as np

from isim.reporting import gallery, pictures


def test_a_sheet_is_bounded_and_holds_what_fits(tmp_path):
    sizes = {"a/wide": (50, 3000), "b": (40, 60), "high": (9000, 30)}
    for name, (height, width) in sizes.items():
        picture = np.full((height, width, 3), 128, np.uint8)
        pictures.write_png(tmp_path / f"{name}.png", picture)
    paths = gallery.found(tmp_path, 10)
    assert [path.name for path in paths] == ["wide.png", "b.png", "high.png"]
    sheet = gallery.sheet(paths, tmp_path)
    # The wide one is made smaller, the other stays, the high one is left out.
    assert sheet.shape == (50 * gallery.WIDTH // 3000 + 40 + 2 * gallery.CAPTION, gallery.WIDTH, 3)
    assert len(gallery.found(tmp_path, 2)) == 2


def test_no_picture_makes_no_sheet(tmp_path):
    assert gallery.found(tmp_path / "none", 5) == [] and gallery.sheet([], tmp_path) is None
