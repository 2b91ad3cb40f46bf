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
