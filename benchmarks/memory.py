"""Peak memory of a regeneration with 562 images against one with 100: a stream keeps neither.

Each count runs in a process of its own; its peak is the proportional set size summed over its
process tree, sampled ten times a second. Scale 0.5 and one mean-field step keep the run short:
neither changes what an image in flight holds at full size. The 100 are spread evenly over the
562 ordered by size, so that the largest image is in both.

Real images are taken from `$ISIM_SHARED` (default ../shared) where it exists, generated ones
otherwise. The ratio is the result.

    python benchmarks/memory.py [--counts 100 562]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil


def run(count: int, among: int) -> None:
    """Regenerate the pseudo-labels of `count` images in this process."""
    import harness
    import regeneration

    from isim.data import files
    from isim.passes import pseudo_labels
    from isim.runtime import devices
    from isim.runtime.here import Here

    with tempfile.TemporaryDirectory() as name:
        here = Here(Path(name))
        chosen = harness.items(among, here.resume)
        chosen.sort(key=lambda item: files.image_size(item.image))
        # Evenly over the sizes, with the largest: its CAMs are what either count must hold.
        places = np.linspace(0, len(chosen) - 1, count).round().astype(int)
        params = regeneration.section()
        short = {"scales": (0.5,), "crf": params.crf.model_copy(update={"steps": 1})}
        net, config = regeneration.network(params)
        devices.place(net, here.device)
        pseudo_labels.regenerate(
            here,
            net,
            config,
            [chosen[place] for place in places],
            params=params.model_copy(update=short),
            name="round_01",
        )


def peak_gigabytes(count: int, among: int) -> float:
    """Highest summed PSS of a process that runs `count` images, in GB."""
    command = [sys.executable, __file__, "--counts", str(count), str(among), "--run"]
    process = psutil.Popen(command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    peak = 0
    while process.poll() is None:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue  # it has just ended
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 1e9


def main() -> None:
    """Print the peak of each count and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=(100, 562))
    parser.add_argument("--run", action="store_true", help="only the first, in this process")
    options = parser.parse_args()
    few, many = options.counts
    if options.run:
        run(few, many)
        return
    peaks = [peak_gigabytes(count, many) for count in (few, many)]
    for count, peak in zip((few, many), peaks, strict=True):
        print(f"{count} images: peak {peak:.2f} GB")
    print(f"ratio {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
