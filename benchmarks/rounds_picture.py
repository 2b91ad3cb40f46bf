"""Draw the picture of the README: images of a finished run, and their labels after each round.

python benchmarks/rounds_picture.py . docs/rounds.png        # after `make demo`
"""

import argparse
from pathlib import Path

from isim.data import prepared
from isim.reporting import pictures


def main() -> None:
    """Write the picture of a few images, evenly spread over the training split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=4)
    given = parser.parse_args()
    items = pictures.choose(prepared.load(given.project).split("train"), given.images)
    rounds = sorted(given.project.glob("data/pseudo_labels/round_*"))
    pictures.write_png(given.out, pictures.rounds_grid(items, rounds))


if __name__ == "__main__":
    main()
