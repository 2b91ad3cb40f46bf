import pytest

from isim.reporting.page import charts


def test_a_chart_has_a_line_a_column_inside_its_frame():
    rows = [{"epoch": n, "loss": 1 / n, "other": ""} for n in range(1, 6)]
    found = charts.chart("Losses", rows, "epoch", {"loss": "loss", "other": "o"}, y_label="loss")
    (line,) = found.lines
    assert line.name == "loss" and len(line.dots) == 5 and line.points.count(",") == 5
    for across, down, text in line.dots:
        assert charts.LEFT <= across <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= down <= charts.HEIGHT - charts.BOTTOM
        assert text.startswith("loss, epoch")
    downs = [down for _, down, _ in line.dots]
    assert downs == sorted(downs), "a loss that falls goes down"
    assert [text for _, text in found.x_ticks] == ["1", "2", "3", "4", "5"]
    assert found.y_ticks[0][1] == "0"


def test_nothing_is_drawn_of_what_is_not_known():
    rows = [{"round": "1", "miou": "nan"}, {"round": "2", "miou": ""}, {"round": "3"}]
    assert charts.chart("mIoU", rows, "round", {"miou": "CAM"}, y_label="%") is None
    assert charts.chart("mIoU", [], "round", {"miou": "CAM"}, y_label="%") is None


def test_one_point_and_equal_values_have_an_axis():
    rows = [{"round": "1", "miou": "0.5"}]
    found = charts.chart("mIoU", rows, "round", {"miou": "CAM"}, y_label="%", scale=100)
    assert found.lines[0].dots[0][2] == "CAM, round 1: 50" and len(found.y_ticks) > 2
    flat = [{"round": str(n), "miou": "0"} for n in range(3)]
    assert charts.chart("mIoU", flat, "round", {"miou": "CAM"}, y_label="%").lines


@pytest.mark.parametrize(
    ("cell", "expected"), [("0.5", 0.5), (3, 3.0), ("", None), ("nan", None), (None, None)]
)
def test_cells_are_finite_numbers_or_nothing(cell, expected):
    assert charts.number(cell) == expected
