"""mIoU over the epochs of several runs, read from DVC without a checkout."""

import signal
import sys

import numpy as np
import pytest
from PIL import Image

from isim import cli, curves
from isim.errors import UserError

PIPELINE = """\
stages:
  train_cam:
    cmd: python report.py
    params:
      - train_cam
    outs:
      - reports/train_cam/miou.csv
plots:
  - mIoU over the epochs:
      x: epoch
      y:
        reports/train_cam/miou.csv:
          - cam_miou
          - pseudo_label_miou
"""
SCRIPT = """\
import os
from ruamel.yaml import YAML
crop = YAML().load(open("params.yaml"))["train_cam"]["crop"]
os.makedirs("reports/train_cam", exist_ok=True)
with open("reports/train_cam/miou.csv", "w") as file:
    file.write("epoch,round,cam_miou,pseudo_label_miou\\n")
    file.write(f"1,1,{crop / 1000},0.5\\n2,,0.4,\\n3,2,0.45,nan\\n")
"""


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to the plot."""
    found = {}
    monkeypatch.setattr(curves.viz, "epoch_curves", lambda *given: found.update(given=given))
    return found


def draw(*given, with_workspace=False):
    return curves.draw(*given, with_workspace=with_workspace)


def report(root, text="epoch,round,cam_miou,pseudo_label_miou\n1,1,0.25,0.5\n2,,0.4,\n"):
    path = root / curves.REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_experiments_are_drawn_with_what_differs(make_repository, drawn, tmp_path):
    folder, call = make_repository(PIPELINE, SCRIPT)
    run = ("dvc", "exp", "run", "--quiet", "--temp", "-n")
    call(*run, "larger", "-S", "train_cam.crop=320")
    out = tmp_path / "x.png"
    assert draw(folder, ["larger"], "cam_miou", out) == ["larger"]
    assert list(drawn["given"][0]) == ["larger"]
    assert draw(folder, ["larger"], "cam_miou", out, with_workspace=True) == ["workspace", "larger"]
    lines, _, path = drawn["given"]
    assert path == out
    assert lines == {
        "workspace: crop=256": [(1, 25.6, True), (2, 40.0, False), (3, 45.0, True)],
        "larger: crop=320": [(1, 32.0, True), (2, 40.0, False), (3, 45.0, True)],
    }
    # The workspace is what HEAD holds: one line. Figures that are not there are no points.
    found = draw(folder, ["HEAD"], "pseudo_label_miou", out, with_workspace=True)
    assert found == ["HEAD"]
    assert drawn["given"][0] == {"HEAD": [(1, 50.0, True)]}
    with pytest.raises(UserError, match="no experiment or git revision 'smaller'"):
        draw(folder, ["larger", "smaller"], "cam_miou", out)

    # What DVC draws of several runs is of the same files.
    call("dvc", "plots", "diff", "HEAD", "larger")
    page = (folder / "dvc_plots/index.html").read_text()
    assert "0.256" in page and "0.32" in page and "larger" in page

    call("git", "rm", "-r", "--quiet", "dvc.yaml", "dvc.lock")
    call("git", "commit", "--quiet", "--message", "nothing was run")
    with pytest.raises(UserError, match=r"HEAD has no reports/train_cam/miou\.csv.*train_cam"):
        draw(folder, ["HEAD"], "cam_miou", out)


def test_the_workspace_alone_is_drawn(tmp_path):
    report(tmp_path)
    for name in ("a", "b"):
        assert draw(tmp_path, [], "cam_miou", tmp_path / f"{name}.png") == ["workspace"]
    report(tmp_path, "epoch,round,cam_miou,pseudo_label_miou\n1,,0.25,\n2,1,0.4,0.5\n")
    draw(tmp_path, [], "cam_miou", tmp_path / "c.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2], "the rounds are marked"
    assert np.array(Image.open(tmp_path / "a.png").convert("L")).std() > 5


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (None, [], "dvc repro train_cam"),
        (None, ["--workspace"], "dvc repro train_cam"),
        ("epoch,round,cam_miou\n1,1,0.3\n", ["--column", "val"], "no 'val'; choose one of cam_"),
        ("epoch,round,cam_miou\n1,1,nan\n", [], "no image of the split has a mask"),
        ("epoch,round,cam_miou\n1,1,high\n", [], "workspace is damaged"),
        ("epoch\n1\n", [], "workspace is damaged"),
        # Before anything is read.
        (None, ["--out", "x.pdf"], "--out: x.pdf does not end in .png"),
        (None, ["--out", "x"], "--out: x does not end in .png"),
        (None, ["--out", "."], "--out: . is a folder; name a PNG file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(text, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        report(tmp_path, text)
    monkeypatch.setattr(sys, "argv", ["isim", "curves", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("isim: error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "reports/curves.png").exists()
