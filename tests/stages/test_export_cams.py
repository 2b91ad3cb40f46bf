"""Stage export_cams: a folder of CAMs and figures for each split."""

from support.projects import items_of, names_in

from isim.data.files import read_cam, read_threshold


def test_each_split_has_its_cams_and_figures(run, finished, recorder):
    report = run("export_cams", finished, splits=("val",), precision="fp32")
    # Those of the splits before are gone.
    assert names_in(finished / "data/cams") == {"threshold", "val"}
    assert read_threshold(finished / "data/cams") == report["threshold"] == 0.3
    items = items_of(finished, "val")
    assert names_in(finished / "data/cams/val") == {item.id for item in items}
    planes, ids, size = read_cam(finished / f"data/cams/val/{items[0].id}.npz")
    assert (ids == items[0].class_ids).all() and size == (64, 64)
    assert planes.shape == (len(ids), 16, 16)
    assert report["val"]["images"] == 8 and report["precision"] == "fp32"
    assert {k: recorder.figures[f"val_{k}", None] for k in report["val"]} == report["val"]
