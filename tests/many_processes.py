"""Runs stages in several processes at once, as torchrun would start them, for tests.

Reads one step a line from standard input, as JSON, and forks the processes of it, since imports
take longer than the stages of preset `tiny`. A step is {"roots": the project folder of each host,
"processes": how many on each, "stage" or "function", "arguments", "changes", "moment", "count",
"victim"}: as in killed_stage.py, the process of rank `victim` dies at the `count`-th `moment`.
Answers each with a line: by rank {"code": as of subprocess, "images": label maps and CAMs that it
wrote, "losses": its part of the loss of every step, "said": what it wrote to standard error}.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import killed_stage
import torch

from isim import distributed, meter, params, tracking
from isim.data import files
from isim.errors import UserError
from isim.models import norm
from isim.stages import evaluate

# No torchrun is there to end those that wait for it.
distributed.TOGETHER_SECONDS = 0.3
STAGES = killed_stage.STAGES | {"evaluate": evaluate}


def normalise(root):
    """One step of a small network on a part of a batch; what came out, by rank, in `root`."""
    from timm.layers.norm_act import BatchNormAct2d

    torch.manual_seed(distributed.rank())
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), BatchNormAct2d(4)
    ).to(torch.float64, memory_format=torch.channels_last)
    if distributed.is_main():
        # Others get these weights from rank 0.
        network.load_state_dict(torch.load(root / "start.pt", weights_only=True))
    norm.synchronise(network)
    images = distributed.mine(torch.load(root / "images.pt", weights_only=True))
    images.requires_grad_()
    (network(images) ** 3).sum().backward()
    distributed.sum_gradients(network.parameters())
    result = network.state_dict() | {"images": images.grad}
    result |= {f"{name}.grad": weight.grad for name, weight in network.named_parameters()}
    torch.save(result, root / f"result{distributed.rank()}.pt")


def share(root):
    distributed.share(root / "shared")
    lines = distributed.gather({"writer": distributed.is_writer(), "number": float("nan")})
    assert str(lines) == str([{"writer": True, "number": float("nan")}] * distributed.world())


def fail(root):
    raise UserError("all fail alike")


def fail_alone(root):
    if distributed.rank() == 1:
        raise UserError("one fails")
    distributed.barrier()


FUNCTIONS = {"normalise": normalise, "share": share, "fail": fail, "fail_alone": fail_alone}


def report_work(pipe):
    """Send what was done through the pipe, which outlives the process."""

    def after(module, name, tell):
        function = getattr(module, name)

        def wrapped(*arguments):
            result = function(*arguments)
            os.write(pipe, f"{tell(*arguments)}\n".encode())
            return result

        setattr(module, name, wrapped)

    for name in ("write_label_map", "write_cam"):
        after(files, name, lambda path, *_: f"image {path.parent.name}/{path.name}")
    after(meter.Meter, "add", lambda _, loss, terms: f"loss {loss.item()}")


def live(step, rank, port, pipe):
    count = step["processes"]
    total = count * len(step["roots"])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    values = (rank, total, rank % count, count, rank // count, port)
    os.environ |= dict(zip(names, map(str, values), strict=True)) | {"MASTER_ADDR": "localhost"}
    root = Path(step["roots"][rank // count])
    tracking.stage_run = killed_stage.no_tracking
    report_work(pipe)
    if step.get("moment") and rank == step["victim"]:
        killed_stage.remaining = step["count"]
        killed_stage.MOMENTS[step["moment"]]()
    with distributed.started(root / ".isim"):
        if "function" in step:
            FUNCTIONS[step["function"]](root)
            return
        section = getattr(params.load(root / "params.yaml"), step["stage"])
        section = section.model_copy(update=step.get("changes", {}))
        STAGES[step["stage"]].run(section, *step.get("arguments", ()), root)


def fork(step, rank, port, said):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            live(step, rank, port, writing)
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
    os.close(writing)
    return child, reading


def answer(step):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = range(step["processes"] * len(step["roots"]))
    texts = [tempfile.TemporaryFile("w+") for _ in ranks]
    forked = [fork(step, rank, port, texts[rank]) for rank in ranks]
    codes = {}
    # Nothing may hang when a process dies: what lives on is killed, and the test then fails.
    end = time.monotonic() + 60
    while len(codes) < len(forked):
        for rank, (child, _) in enumerate(forked):
            if rank not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    answers = []
    for rank, (_, reading) in enumerate(forked):
        with open(reading) as stream:
            work = [line.split() for line in stream]
        texts[rank].seek(0)
        answers.append(
            {
                "code": codes[rank],
                "images": [value for word, value in work if word == "image"],
                "losses": [float(value) for word, value in work if word == "loss"],
                "said": texts[rank].read(),
            }
        )
    return answers


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
