"""Runs stages in several processes at once, as torchrun would start them, for tests.

Reads one step a line, as JSON, and forks its processes: imports take longer than tiny stages. A
step is {"roots": the project folder of each host, "processes": how many on each, "stage" or
"function", "arguments", "changes", "moment", "count", "victim"}: the process of rank `victim` dies
by SIGKILL at the `count`-th `moment`, a key of MOMENTS. Answers with a line: by rank {"code": as of
subprocess, "images": label maps and CAMs that it wrote, "losses": its part of the loss of every
step, "said": what it wrote to standard output and error}.
"""

import contextlib
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import squares
import torch

from isim import params
from isim.data import files
from isim.errors import UserError
from isim.models import norm
from isim.passes.journal import Journal
from isim.reporting import tracking
from isim.runtime import checkpoint, identity, processes
from isim.training import meter

# Before any fork.
for path in (identity.PACKAGE / "stages").glob("[a-z]*.py"):
    importlib.import_module(f"isim.stages.{path.stem}")
# No torchrun is there to end those that wait for it, and no slow disk.
processes.TOGETHER_SECONDS = processes.VISIBLE_SECONDS = 0.3


def normalise(root):
    """Do one step of a small network on a part of a batch; each process writes its result."""
    from timm.layers.norm_act import BatchNormAct2d

    # Much of what the sums add cancels out: single precision would leave few digits.
    whole = torch.randn(8, 3, 7, 9, generator=torch.Generator().manual_seed(0)).double() * 2 + 3
    # All get the weights of rank 0.
    torch.manual_seed(processes.rank())
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), BatchNormAct2d(4)
    ).to(torch.float64, memory_format=torch.channels_last)
    for parameter in network[1:].parameters():
        torch.nn.init.normal_(parameter)
    norm.synchronise(network)
    images = processes.mine(whole).requires_grad_()
    (network(images) ** 3).sum().backward()
    processes.sum_gradients(network.parameters())
    result = network.state_dict() | {"images": images.grad}
    result |= {f"{name}.grad": weight.grad for name, weight in network.named_parameters()}
    torch.save(result, root / f"result{processes.rank()}.pt")


def tell(root):
    rank, ranks = processes.rank(), range(processes.world())
    nan, total = float("nan"), sum(ranks)
    assert str(processes.gather({"a": rank, "b": nan})) == str([{"a": r, "b": nan} for r in ranks])
    assert processes.broadcast(rank) == 0
    assert processes.sum_figures({"a": rank, "b": 0.5}) == {"a": total, "b": 0.5 * len(ranks)}
    weights = torch.full((2, 2), float(rank)).t()
    assert processes.total(weights).tolist() == [[total] * 2] * 2
    processes.equalise([weights])
    assert weights.tolist() == [[0, 0], [0, 0]]


def fail(root):
    raise UserError("all fail alike")


def fail_alone(root):
    if processes.rank() == 1:
        raise UserError("one fails")
    processes.barrier()


def square(root):
    """Map numbers with helpers; each process writes down what all have made."""
    os.environ["ISIM_WORKERS"] = "2"
    passed = squares.square(root)
    (root / f"result{processes.rank()}").write_text(json.dumps([passed.lines, passed.computed]))


def watch(owner, name, note, first=False):
    """Call `note` with the arguments of each call of a function, after it or before it."""
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        result = None if first else function(*arguments, **options)
        note(*arguments, **options)
        return function(*arguments, **options) if first else result

    setattr(owner, name, wrapped)


def report_work(path):
    """Write down what was done, a line at once: the file outlives the process."""
    path.touch()

    def note(word, value):
        with path.open("a") as file:
            file.write(json.dumps([word, value]) + "\n")

    for name in ("write_label_map", "write_cam"):
        watch(files, name, lambda path, *_: note("images", f"{path.parent.name}/{path.name}"))
    watch(meter.Meter, "add", lambda _, loss, terms: note("losses", loss.item()))


def to(pattern, folder="resume"):
    """A test whether a complete file gets such a name."""
    return lambda _, path: path.match(pattern) and folder in path.parts


def is_half_removed(path, **_):
    if not path.name.startswith(".removing-") or not path.exists():
        return False
    for part in sorted(path.iterdir())[1:]:
        part.unlink() if part.is_file() else remove(part)
    return True


def is_half_written(journal, line):
    return line["id"] == "05" and journal._file.write(b'{"id": "0')


remove = shutil.rmtree
# Before a call, of those that fit; where the name begins with "after", after it.
MOMENTS = {
    "before a step of the optimizer": (torch.optim.SGD, "step"),
    "after a state was saved": (checkpoint, "save_state"),
    "after a label map": (files, "write_label_map"),
    "after a CAM": (files, "write_cam"),
    "after a ground truth was read": (files, "read_truth"),
    "after a line of a journal": (Journal, "add"),
    "within a line of a journal": (Journal, "add", is_half_written),
    "after a folder was copied": (shutil, "copytree"),
    "when a measurement is renamed": (Path, "replace", to("measured_*.json")),
    "when a CAM is renamed": (Path, "replace", to("*.npz")),
    "when a model is renamed": (Path, "replace", to("round_*.safetensors")),
    "when a label map is renamed": (Path, "replace", to("*.png")),
    "when a number is renamed": (Path, "replace", to("*.txt", "out")),
    "when a refined prediction is renamed": (Path, "replace", to("*.png", "val_crf")),
    "when the resume folder is renamed": (Path, "rename"),
    "when a part of a removed folder is gone": (shutil, "rmtree", is_half_removed),
}


def die_at(moment, count):
    owner, name, *fits = MOMENTS[moment]
    calls = itertools.count(1)

    def die(*arguments, **options):
        if all(fit(*arguments, **options) for fit in fits) and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(owner, name, die, first=not moment.startswith("after"))


def live(step, rank, port):
    count = step["processes"]
    total = count * len(step["roots"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    values = (rank, total, rank % count, count, rank // count, port)
    os.environ |= dict(zip(names, map(str, values), strict=True)) | {"MASTER_ADDR": "localhost"}
    root = Path(step["roots"][rank // count])
    tracking.stage_run = lambda *_, **__: contextlib.nullcontext(tracking.NoRun())
    if rank == step.get("victim"):
        die_at(step["moment"], step["count"])
    with processes.started(root / ".isim"):
        if "function" in step:
            globals()[step["function"]](root)
            return
        section = getattr(params.load(root / "params.yaml"), step["stage"])
        section = section.model_copy(update=step.get("changes", {}))
        run = sys.modules[f"isim.stages.{step['stage']}"].run
        run(section, *step.get("arguments", ()), root)


def fork(step, rank, port, folder):
    child = os.fork()
    if child:
        return child
    # Nothing may hang when another process dies: the test then fails.
    signal.alarm(60)
    status = 1
    try:
        said = os.open(folder / f"said{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        report_work(folder / f"work{rank}")
        live(step, rank, port)
        status = 0
    except UserError as error:
        print(f"isim: error: {error}", file=sys.stderr)
        status = 2
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answer(step, folder):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    count = step["processes"] * len(step["roots"])
    children = [fork(step, rank, port, folder) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    answers = []
    for rank, code in enumerate(codes):
        said, work = folder / f"said{rank}", folder / f"work{rank}"
        did = {"code": code, "said": said.read_text(), "images": [], "losses": []}
        for line in work.read_text().splitlines():
            word, value = json.loads(line)
            did[word].append(value)
        answers.append(did)
    return answers


if __name__ == "__main__":
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(answer(json.loads(line), Path(name))), flush=True)
