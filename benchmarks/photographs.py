"""Peak memory and seconds of `isim predict` and of stage masks' CAM path on a large photograph.

Run it in a project with trained networks, or name one:

    python benchmarks/photographs.py --project PROJECT
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from isim.data import prepared

WIDTH, HEIGHT = 6000, 4000


def main() -> None:
    """Print a row a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, default=Path())
    project = parser.parse_args().project.resolve()
    data = prepared.load(project)
    model = next(project.glob("models/train_segmenter/*/model.safetensors"))
    item = next(item for item in data.splits["train"] if len(item.class_ids) > 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A photograph's statistics: an image of the data set, larger, with noise.
        with Image.open(item.image) as small:
            pixels = np.asarray(small.convert("RGB").resize((WIDTH, HEIGHT)), np.int16)
        noise = np.random.default_rng(0).integers(-9, 10, pixels.shape, np.int16)
        image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
        image.save(folder / "large.jpg", quality=95)
        tags = ";".join(data.classes[k - 1] for k in item.class_ids)
        (folder / "tags.csv").write_text(f"image,tags\nlarge.jpg,{tags}\n")
        cam = ["--cam", "--tags", "tags.csv", "--threshold", "0.5", "--model"]
        cam.append(str(project / "models/train_cam/model.safetensors"))
        ways = {
            "segmenter": ["--model", str(model)],
            "segmenter, dCRF": ["--model", str(model), "--crf"],
            "all outputs": ["--model", str(model), "--crf", "--overlay", "--probabilities"],
            "CAM of tags": cam,
            "CAM of tags, dCRF": [*cam, "--crf"],
        }
        print(f"{WIDTH}x{HEIGHT}, {len(data.classes)} classes, {len(item.class_ids)} tags\n")
        print("| way | peak memory | seconds |")
        print("|---|---|---|")
        for way, options in ways.items():
            start = time.perf_counter()
            command = [sys.executable, "-m", "isim", "predict", "large.jpg", "--out", "out"]
            process = subprocess.Popen([*command, *options], cwd=folder)
            # The usage of this child alone: `resource` knows the largest of all.
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{way} failed")
            taken = time.perf_counter() - start
            print(f"| {way} | {usage.ru_maxrss / 1e6:.2f} GB | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
