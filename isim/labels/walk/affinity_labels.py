"""Labels that AffinityNet's pixel pairs are made of (paper 4.1.6; spec 6)."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from isim.metrics import IGNORE

Integer = TypeVar("Integer", bound=np.integer[Any])


def affinity_label(
    confident_foreground: NDArray[np.uint8], confident_background: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Keep what two dCRF results (H, W) of the same CAMs agree on: (H, W) labels, else IGNORE.

    Against a high background plane (0.30) what is foreground is sure to be; against a low one
    (0.10) what is background is:

    | high plane says | low plane says | label |
    |---|---|---|
    | class c | class c | c |
    | background | background | background |
    | background | any class | IGNORE: neither is sure |
    | class c | background | IGNORE: both are sure, and disagree (PSA: background) |
    | class c | another class | IGNORE: they disagree on the class (PSA: c) |
    | IGNORE in either | | IGNORE: padding |

    The two rows where PSA's code lets one map win can only come from the dCRF, which redraws
    borders. A pair that is left out costs little, but one of wrong labels joins two objects.
    """
    agreed = confident_foreground == confident_background
    return np.where(agreed, confident_foreground, np.uint8(IGNORE))


def reduce_label(label: NDArray[Integer], stride: int) -> NDArray[Integer]:
    """Sample (..., H, W) labels, or places, at a map's (..., ceil(H / stride), ceil(W / stride)).

    A pixel of the map gets the label at the centre of the area that it covers, which is where
    bilinear resizing of features and CAMs places it (`nearest-exact` in torch).
    """
    rows, columns = (_centres(side, stride) for side in label.shape[-2:])
    return label[..., rows[:, None], columns]


def _centres(side: int, stride: int) -> NDArray[np.int64]:
    count = -(-side // stride)
    # floor((i + 1/2) * side / count) in integers.
    return (2 * np.arange(count) + 1) * side // (2 * count)
