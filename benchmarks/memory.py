"""Peak memory of a regeneration with 562 images against one with 100: a stream keeps neither.

Each count runs in a process of its own; its peak is the proportional set size summed over its
process tree, sampled ten times a second. Scale 0.5 and one mean-field step keep the run short:
neither changes what an image in flight holds at full size. The 100 are spread evenly over the
562 ordered by size, so that the largest image is in both.

Real images are taken from `$ISIM_SHARED` (default ../shared) where it exists, generated ones
otherwise. The ratio is the result.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

COUNTS = (100, 562)


def run(count: int) -> None:
    """Regenerate the pseudo-labels of `count` images in this process."""
    from harness import items
    from regeneration import CRF, THRESHOLD, network

    from isim import engine
    from isim.data import files
    from isim.regeneration import CamSettings, regenerate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device = engine.default_device()
        chosen = items(COUNTS[-1], folder)
        chosen.sort(key=lambda item: files.image_size(item.image))
        # Evenly over the sizes, with the largest: its CAMs are what either count must hold.
        places = np.linspace(0, len(chosen) - 1, count).round().astype(int)
        net, config = network()
        engine.place(net, device)
        settings = CamSettings((0.5,), True, engine.resolve_precision("auto", device))
        regenerate(
            net,
            config,
            [chosen[place] for place in places],
            folder / "labels",
            folder / "scratch",
            settings,
            THRESHOLD,
            CRF.model_copy(update={"steps": 1}),
            (),
            device,
        )


def peak_gigabytes(count: int) -> float:
    """Highest summed PSS of a process that runs `count` images, in GB."""
    command = [sys.executable, __file__, str(count)]
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
    peaks = [peak_gigabytes(count) for count in COUNTS]
    for count, peak in zip(COUNTS, peaks, strict=True):
        print(f"{count} images: peak {peak:.2f} GB")
    print(f"ratio {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(int(sys.argv[1]))
    else:
        main()
