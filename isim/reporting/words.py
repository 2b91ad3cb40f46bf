"""Figures in words, for those who have no masks to compare with."""

import math
from collections.abc import Mapping
from typing import Any

# Least value and words, the highest first.
_LEARNT = ((0.9, "are learnt"), (0.7, "are mostly learnt"), (0.4, "are half learnt"))
_AGREE = ((0.75, "agree"), (0.5, "mostly agree"), (0.3, "agree in part"))


def tags_learnt(class_map: float) -> str:
    """Tell how well a network knows the tags, by the mean average precision over the classes."""
    return f"tags {_rated(class_map, _LEARNT, 'are hardly learnt')}, mAP {class_map:.2f}"


def agree(one: str, other: str, agreement: float) -> str:
    """Tell how far two label maps of the same images agree, by the mean IoU of their foreground."""
    rated = _rated(agreement, _AGREE, "hardly agree")
    return f"{one} and {other} {rated}, IoU {agreement:.2f}"


def miou(name: str, value: float, coverage: float | None = None) -> str:
    """Tell a mIoU in percent; without masks what there is instead, the share that is labelled."""
    if math.isfinite(value):
        return f"{name} mIoU {100 * value:.2f}"
    covers = "" if coverage is None else f" covers {100 * coverage:.0f} % of the pixels"
    return f"{name}{covers or ' made'} (no masks to score it)"


def interval(figures: Mapping[str, Any], name: str = "miou") -> str:
    """Return the bootstrap interval of a mIoU in percent, such as 51.2 to 58.4; "" without one."""
    bounds = [figures.get(f"{name}_{end}") for end in ("low", "high")]
    if any(bound is None or math.isnan(bound) for bound in bounds):
        return ""
    return " to ".join(f"{100 * float(bound or 0):.1f}" for bound in bounds)


def _rated(value: float, steps: tuple[tuple[float, str], ...], least: str) -> str:
    return next((words for bound, words in steps if value >= bound), least)
