import numpy as np
import pytest
from PIL import Image

from isim.reporting import plots

CLASSES = ["background", "badger", "duck"]


def draw_curves(values, path):
    rows = [{"round": n, "cam_miou": value} for n, value in enumerate(values, start=1)]
    plots.curves(rows, "round", {"cam_miou": "CAM"}, "mIoU (%)", path=path, scale=100)


def draw_bars(values, path):
    plots.class_bars(CLASSES, {"CAM": values, "pseudo-label": values}, "IoU", path)


def draw_confusion(values, path):
    counts = np.diag(np.nan_to_num(values) * 100).astype(int)
    plots.confusion_heatmap(counts, CLASSES, path)


@pytest.mark.parametrize("draw", [draw_curves, draw_bars, draw_confusion])
def test_plots_show_their_values_and_are_reproducible(draw, tmp_path):
    values = {"a": [0.2, 0.4, 0.6], "b": [0.2, 0.4, 0.6], "c": [0.6, 0.0, np.nan]}
    for name, figures in values.items():
        draw(figures, tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in values)
    # Equal plots must be equal files, or DVC sees a change in every run.
    assert a == b != c
    assert np.array(Image.open(tmp_path / "a.png").convert("L")).std() > 5


def test_nothing_is_drawn_of_figures_that_are_not_known(tmp_path):
    draw_curves([np.nan, np.nan], tmp_path / "curves.png")
    plots.class_ious(CLASSES, {}, tmp_path / "bars.png")
    draw_confusion([0.0, np.nan, 0.0], tmp_path / "confusion.png")
    assert list(tmp_path.iterdir()) == []
    # A curve that is known keeps another one from the legend alone.
    rows = [{"round": 1, "a": 0.5, "b": np.nan}]
    plots.curves(rows, "round", {"a": "a", "b": "b"}, "", path=tmp_path / "both.png")
    plots.curves(rows, "round", {"a": "a"}, "", path=tmp_path / "one.png")
    both, one = ((tmp_path / f"{name}.png").read_bytes() for name in ("both", "one"))
    assert both == one
