"""isim: from image tags to pixel masks (ISIM, weakly supervised segmentation)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isim.api import CamModel, Prediction, Project, Segmenter, dense_crf

__all__ = ["CamModel", "Prediction", "Project", "Segmenter", "dense_crf"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - of several kinds
    """Import what notebooks use when it is asked for: networks take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module 'isim' has no attribute '{name}'")
    from isim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """Names for completion."""
    return [*__all__, *globals()]
