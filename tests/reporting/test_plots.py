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


def name_of(draw):
    return draw.__name__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", [draw_bars, draw_confusion, draw_curves], ids=name_of)
@pytest.mark.parametrize(
    "name",
    [
        "$x^{$",
        "a$b$c",
        r"\\frac{$",
        "_hidden",
        "猫",
        "\u0627\u0644",
        "tab\there",
        "\x1b[31m",
        "x" * 5000,
    ],
)
def test_any_name_can_be_drawn(draw, name, tmp_path, monkeypatch):
    """A formula that is none, a glyph that the font has not, or a warning about it would raise."""
    monkeypatch.setattr(f"{__name__}.CLASSES", ["background", name, "duck"])
    draw([0.2, 0.4, 0.6], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert max(image.size) < 2000


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("badger", "badger"),
        ("Käfer", "Käfer"),
        ("$x$", r"\$x\$"),
        ("猫", r"\u732b"),
        ("a\tb", r"a\u0009b"),
        ("_a", " _a"),
        ("x" * 41, "x" * 19 + "..." + "x" * 18),
    ],
)
def test_names_are_drawn_as_they_are_or_by_code_points(name, drawn):
    assert plots.drawable(name) == drawn


def test_many_classes_are_drawn_at_a_bounded_size(tmp_path):
    count = 200
    confusion = np.random.default_rng(0).integers(0, 9, (count, count))
    names = [f"class {number}" for number in range(count)]
    plots.confusion_heatmap(confusion, names, tmp_path / "confusion.png")
    plots.class_ious(names, {"train": confusion, "val": confusion}, tmp_path / "bars.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert max(image.size) <= plots.HIGHEST * 120


def test_of_many_classes_the_lowest_and_the_highest_are_shown():
    values = np.r_[np.nan, np.linspace(0, 1, 200)]
    shown = plots._shown(values)
    assert shown.tolist() == [*range(1, 31), *range(171, 201)]
    assert len(plots._shown(np.full(200, np.nan))) == plots.MANY
    assert plots._shown(values[:60]).tolist() == list(range(60))
