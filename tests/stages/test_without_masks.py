"""Data without any mask: every stage runs through, and says that nothing could be scored."""

import re

import numpy as np
from PIL import Image
from support.projects import CARDS, drop_masks, names_in, read_rows

from isim.reporting import results

NOT_A_NUMBER = re.compile(r"\b(nan|NaN|None)\b")


def test_data_without_any_mask_runs_through_and_says_so(run, project, recorder, capsys):
    for split in ("train", "val"):
        drop_masks(project, split)
    plain = {"crf_after": False}
    trained = run("train_cam", project)
    assert {step for _, step in recorder.pictures} == {0, 1}, "pictures need no mask"
    assert trained["scored_images"] == 0 and trained["images"] == 16
    assert trained["cam_miou"] is trained["pseudo_label_miou"] is None
    rounds = read_rows(project / "reports/train_cam/rounds.csv")
    assert {row["cam_miou"] for row in rounds} == {""}
    assert all(0 <= float(row["coverage"]) <= 1 for row in rounds)
    assert "cam_miou_full_size" not in run("export_cams", project)["train"]
    learned = run("train_affinity", project, epochs=1)
    assert learned["sure_accuracy"] is None and 0 < learned["sure_share"] < 1
    walked = run("random_walk", project, splits=("train", "val"), **plain)["val"]
    assert walked["walk_miou"] is None and "walk_crf_miou" not in walked
    plain |= {"epochs": 1, "method": "deeplabv2"}
    predicted = run("train_segmenter", project, "last_round", **plain)["val"]
    assert predicted["scored_images"] == 0 and predicted["miou"] is None
    assert "crf_miou" not in predicted
    scored = run("evaluate", project)
    assert scored["val"]["images"] == 0 and scored["val"]["cam_miou_oracle"] is None
    judged = run("report", project)
    assert judged["scored_images"] == 0 and 0 <= judged["agreement"] <= 1
    assert scored["round_01"] == dict.fromkeys(scored["round_01"])
    # Label maps there are, and none after a dCRF.
    made = {"pseudo_labels/round_02": 16, "random_walk/train": 16, "random_walk/val": 8}
    made["predictions/last_round/val"] = 8
    assert {name: len(names_in(project / "data" / name) - CARDS) for name in made} == made
    assert names_in(project / "data/random_walk") == {"train", "val"} | CARDS
    assert names_in(project / "data/predictions/last_round") == {"val"} | CARDS
    told = capsys.readouterr()
    assert "no masks to score" in told.out + told.err
    assert_nothing_is_empty(project, told.out + told.err + results.table(project))


def assert_nothing_is_empty(root, told):
    """No output says nan, no chart is without a curve, no panel is blank."""
    assert not NOT_A_NUMBER.search(told), told
    texts = [p for p in (root / "reports").rglob("*") if p.suffix in (".csv", ".html")]
    assert {"index.html", "rounds.csv", "sweep.csv", "images.csv"} <= {p.name for p in texts}
    for path in texts:
        words = re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.S)
        assert not NOT_A_NUMBER.search(words), path
    # What JSON knows no number for is null there, which programs read as not known.
    for path in (root / "reports").rglob("*.json"):
        assert "NaN" not in path.read_text(), path
    pictures = sorted((root / "reports").rglob("*.png"))
    drawn = [path for path in pictures if "page" not in path.relative_to(root).parts]
    assert {path.name for path in drawn} >= {"losses.png", "loss.png", "rounds.png"}
    assert not [path.name for path in drawn if re.match("confusion|per_class|miou", path.name)]
    for path in drawn:
        image = np.asarray(Image.open(path).convert("L"), int)
        assert image.std() > 5, f"{path} is blank"
        # A blank panel is a cell of a strip that is white all over.
        if path.parent.name in ("pictures", "train", "val") and "loss" not in path.name:
            white = (image > 250).all(0)
            widths = [len(run) for run in "".join("w" if w else " " for w in white).split()]
            assert max(widths, default=0) < 20, f"{path} has a blank panel"
