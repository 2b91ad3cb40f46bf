"""Labels that AffinityNet's pixel pairs are made of (paper 4.1.6; spec 6)."""

import numpy as np
from numpy.typing import NDArray

IGNORE = 255


def affinity_label(
    confident_foreground: NDArray[np.uint8], confident_background: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Keep what two dCRF results agree on.

    Both start from the same CAMs. Against a high background plane (0.30) few pixels are
    foreground, so that these are sure to be; against a low one (0.10) few are background, and
    these are sure. A sure class is believed where the other map names it, too, and sure
    background where the other map has background:

    | high plane says | low plane says | label |
    |---|---|---|
    | class c | class c | c |
    | background | background | background |
    | background | any class | IGNORE: neither is sure |
    | class c | background | IGNORE: both are sure, and disagree (PSA: background) |
    | class c | another class | IGNORE: they disagree on the class (PSA: c) |
    | IGNORE in either | | IGNORE: padding |

    The two rows where PSA's code lets one map win can only come from the dCRF, which redraws
    borders; spec 6 leaves disagreement out. A pair that is left out costs little, as there are
    many, but one of wrong labels joins two objects.

    Args:
        confident_foreground: (H, W) labels of the run with the high plane.
        confident_background: (H, W) labels of the run with the low plane.

    Returns:
        (H, W) labels: 0, a class, or 255.
    """
    agreed = confident_foreground == confident_background
    return np.where(agreed, confident_foreground, np.uint8(IGNORE))


def reduce_label(label: NDArray[np.uint8], stride: int) -> NDArray[np.uint8]:
    """Sample labels at the pixels of AffinityNet's map, nearest neighbour.

    A pixel of the map gets the label at the centre of the area that it covers, which is where
    bilinear resizing of features and CAMs places it (`nearest-exact` in torch).

    Args:
        label: (..., H, W) labels.
        stride: Of the map, in pixels.

    Returns:
        (..., ceil(H / stride), ceil(W / stride)) labels.
    """
    rows, columns = (_centres(side, stride) for side in label.shape[-2:])
    return label[..., rows[:, None], columns]


def _centres(side: int, stride: int) -> NDArray[np.int64]:
    count = -(-side // stride)
    # floor((i + 1/2) * side / count) in integers.
    return (2 * np.arange(count) + 1) * side // (2 * count)
