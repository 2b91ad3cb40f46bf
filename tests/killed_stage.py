"""Runs stages in processes of their own that die by SIGKILL at chosen moments.

Reads one step a line from standard input, as JSON, and forks a process for it, since imports
take longer than the stages of preset `tiny`. A step is {"root", "stage", "arguments": what the
stage takes beside its section and the root, "changes": {parameter: value}, "moment": a key of
MOMENTS or null, "count"}: the process dies at the `count`-th such moment. Answers each with a
line {"signal", "epochs": trained, "images": finished}.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from isim import engine, params, regeneration, segmenter_training, tracking, training
from isim.data import files
from isim.stages import export_cams, random_walk, train_affinity, train_cam, train_segmenter

STAGES = {
    "train_cam": train_cam,
    "export_cams": export_cams,
    "train_segmenter": train_segmenter,
    "train_affinity": train_affinity,
    "random_walk": random_walk,
}
remaining = 0


def die():
    global remaining
    remaining -= 1
    if remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, when=lambda *_: True):
    """Make `owner.name` die before it works, if `when` says yes to its arguments."""
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        if when(*arguments):
            die()
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


def after(owner, name):
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        result = function(*arguments, **options)
        die()
        return result

    setattr(owner, name, wrapped)


def half_removed():
    """Die when the resume folder is removed, all but one of its entries gone."""
    remove = shutil.rmtree

    def wrapped(path, **options):
        if Path(path).parent.name == "train_cam" and "resume" in Path(path).parts:
            for entry in Path(path).iterdir():
                if entry.is_dir():
                    remove(entry)
                elif entry.name != "state.safetensors":
                    entry.unlink()
            die()
        return remove(path, **options)

    shutil.rmtree = wrapped


MOMENTS = {
    "before a step of the optimizer": lambda: before(torch.optim.SGD, "step"),
    "after a state was saved": lambda: after(engine, "save_state"),
    "after a label map": lambda: after(files, "write_label_map"),
    "before an image is scored": lambda: before(regeneration, "score"),
    "when a measurement is renamed": lambda: before(
        Path, "replace", lambda _, to: to.name.startswith("measured_")
    ),
    "after a CAM": lambda: after(files, "write_cam"),
    "when a CAM is renamed": lambda: before(Path, "replace", lambda _, to: to.suffix == ".npz"),
    "when a model is renamed": lambda: before(
        Path, "replace", lambda _, to: to.name.startswith("round_") and to.suffix == ".safetensors"
    ),
    "when a label map is renamed": lambda: before(
        Path, "replace", lambda _, to: to.suffix == ".png" and "resume" in to.parts
    ),
    "when a refined prediction is renamed": lambda: before(
        Path, "replace", lambda _, to: to.suffix == ".png" and to.parent.name == "val_crf"
    ),
    "after a folder was copied": lambda: after(shutil, "copytree"),
    "when the resume folder is removed": half_removed,
}


class NoTracking:
    def __getattr__(self, name):
        return lambda *_, **__: None


@contextmanager
def no_tracking(*_):
    yield NoTracking()


def count_work(pipe):
    """Send what was done through the pipe, which outlives the process."""
    label, store = files.write_label_map, files.write_cam

    def counting(train):
        def train_epoch(*arguments):
            row = train(*arguments)
            os.write(pipe, f"{arguments[4]}\n".encode())
            return row

        return train_epoch

    def write_label_map(*arguments):
        label(*arguments)
        os.write(pipe, b"image\n")

    def write_cam(path, *arguments):
        store(path, *arguments)
        if path.parent.name in ("train", "val"):
            os.write(pipe, b"image\n")

    for module in (training, segmenter_training, train_affinity):
        module.train_epoch = counting(module.train_epoch)
    files.write_label_map = write_label_map
    files.write_cam = write_cam


def live(step, pipe):
    global remaining
    tracking.stage_run = no_tracking
    count_work(pipe)
    if step["moment"]:
        remaining = step["count"]
        MOMENTS[step["moment"]]()
    root = Path(step["root"])
    section = getattr(params.load(root / "params.yaml"), step["stage"])
    section = section.model_copy(update=step["changes"])
    STAGES[step["stage"]].run(section, *step["arguments"], root)


def fork(step):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Standard output is for the answers.
            os.dup2(2, 1)
            live(step, writing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading) as stream:
        work = stream.read().split()
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{step} failed")
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "epochs": [int(word) for word in work if word != "image"],
        "images": work.count("image"),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)
