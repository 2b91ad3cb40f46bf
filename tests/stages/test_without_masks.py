"""Data without any mask: every stage runs through, and says that nothing could be scored."""

from support.projects import drop_masks, names_in, read_rows

from isim.reporting import results


def test_data_without_any_mask_runs_through_and_says_so(run, project, recorder):
    for split in ("train", "val"):
        drop_masks(project, split)
    plain = {"crf_after": False}
    trained = run("train_cam", project)
    assert {step for _, step in recorder.pictures} == {1, 2}, "pictures need no mask"
    assert trained["scored_images"] == 0 and trained["images"] == 16
    assert trained["cam_miou"] is trained["pseudo_label_miou"] is None
    rounds = read_rows(project / "reports/train_cam/rounds.csv")
    assert {row["cam_miou"] for row in rounds} == {"nan"}
    assert "cam_miou_full_size" not in run("export_cams", project)["train"]
    learned = run("train_affinity", project, epochs=1)
    assert learned["sure_accuracy"] is None and 0 < learned["sure_share"] < 1
    walked = run("random_walk", project, splits=("train", "val"), **plain)["val"]
    assert walked["walk_miou"] is None and "walk_crf_miou" not in walked
    plain |= {"epochs": 1, "method": "deeplabv2"}
    predicted = run("train_segmenter", project, "last_round", **plain)["splits"]["val"]
    assert predicted["scored_images"] == 0 and predicted["miou"] is None
    assert "crf_miou" not in predicted
    scored = run("evaluate", project)
    assert scored["val"]["images"] == 0 and scored["val"]["cam_miou_oracle"] is None
    assert scored["round_01"] == dict.fromkeys(scored["round_01"])
    # Label maps there are, and none after a dCRF.
    made = {"pseudo_labels/round_02": 16, "random_walk/train": 16, "random_walk/val": 8}
    made["predictions/last_round/val"] = 8
    assert {name: len(names_in(project / "data" / name)) for name in made} == made
    assert names_in(project / "data/random_walk") == {"train", "val"}
    assert names_in(project / "data/predictions/last_round") == {"val"}
    table = results.table(project)
    assert "nan" not in table and "None" not in table
