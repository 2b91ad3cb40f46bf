"""Several processes make what one makes, each image once, and go on when one of them died."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from test_resume import environment, outs, without_times
from timm.layers.norm_act import BatchNormAct2d

from isim import distributed, engine, launcher, tracking
from isim.batches import CropBatches
from isim.errors import UserError
from isim.journal import Journal

HERE = Path(__file__).parent
KILLED = -int(signal.SIGKILL)
# Without dropout, whose draws are other ones in every process.
PLAIN = {"method": "unetcam_bilinear", "precision": "fp32"}
FROZEN = PLAIN | {"encoder_norm": "frozen"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs a step of many_processes.py; what each rank did."""
    log = tmp_path_factory.mktemp("nursery") / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(HERE / "many_processes.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as nursery,
    ):

        def step(roots, processes, **what):
            roots = [str(root) for root in (roots if isinstance(roots, list) else [roots])]
            what |= {"roots": roots, "processes": processes}
            nursery.stdin.write(json.dumps(what) + "\n")
            nursery.stdin.flush()
            line = nursery.stdout.readline()
            assert line, log.read_text()
            return json.loads(line)

        yield step


@pytest.fixture(scope="module")
def copies(prepared_project, tmp_path_factory):
    """A function that makes one more copy of the prepared project."""

    def copy():
        root = tmp_path_factory.mktemp("processes") / "project"
        shutil.copytree(prepared_project, root)
        return root

    return copy


def assert_all_ended(ranks):
    assert [rank["code"] for rank in ranks] == [0] * len(ranks), [rank["said"] for rank in ranks]


def images(ranks):
    return [name for rank in ranks for name in rank["images"]]


def losses(ranks):
    """Loss of every step: the sum of the processes' parts."""
    return np.sum([rank["losses"] for rank in ranks], axis=0)


@pytest.fixture(scope="module")
def frozen(copies, run):
    """A project that one process has trained, and what it did."""
    root = copies()
    ranks = run(root, 1, stage="train_cam", changes=FROZEN)
    assert_all_ended(ranks)
    return root, ranks


def assert_close_reports(found, expected):
    """Equal but for the times and the last digits of what depends on sums of floats."""
    names = {str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    for name in names:
        if name.endswith((".csv", ".json")):
            ours, theirs = without_times(found / name), without_times(expected / name)
            ours, theirs = ([ours], [theirs]) if isinstance(ours, dict) else (ours, theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert one.keys() == other.keys()
                for key, value in other.items():
                    try:
                        assert float(one[key]) == pytest.approx(float(value), abs=1e-4, nan_ok=True)
                    except (TypeError, ValueError):
                        assert one[key] == value, (name, key)


def test_two_processes_train_as_one_does(frozen, copies, run):
    expected, alone = frozen
    root = copies()
    ranks = run(root, 2, stage="train_cam", changes=FROZEN)
    assert_all_ended(ranks)
    assert losses(ranks) == pytest.approx(losses(alone), abs=1e-4)
    assert len(losses(alone)) == 6 and all(rank["losses"] for rank in ranks)
    # Two rounds of 16 label maps, and CAMs of the two images that are drawn.
    assert sorted(images(ranks)) == sorted(images(alone))
    assert len(images(alone)) == 2 * (16 + 2) == len(set(images(alone)))
    assert all(len(rank["images"]) >= 16 for rank in ranks)
    labels = {name: data for name, data in outs(expected).items() if "pseudo_labels" in name}
    ours = outs(root)
    assert len(labels) == 32 and [name for name in labels if ours[name] != labels[name]] == []
    assert_close_reports(root / "reports", expected / "reports")
    assert [rank["said"] != "" for rank in ranks] == [True, False]
    assert not (root / ".isim/resume/train_cam").exists()


def test_batch_statistics_are_those_of_the_whole_batch_however_uneven_the_shares(copies, run):
    changes = PLAIN | {"epochs": 2}
    one = run(copies(), 1, stage="train_cam", changes=changes)
    three = run(copies(), 3, stage="train_cam", changes=changes)
    assert_all_ended(one + three)
    assert len(losses(one)) == 4
    assert losses(three) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("processes", [2, 3])
def test_normalisation_of_processes_is_that_of_one(run, tmp_path, processes):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), BatchNormAct2d(4)
    )
    for module in network[1:]:
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
    # Much of what the sums add cancels out: single precision would leave few digits.
    network.double()
    whole = torch.randn(8, 3, 7, 9, dtype=torch.float64) * 2 + 3
    torch.save(network.state_dict(), tmp_path / "start.pt")
    torch.save(whole, tmp_path / "images.pt")
    assert_all_ended(run(tmp_path, processes, function="normalise"))
    whole.requires_grad_()
    (network(whole) ** 3).sum().backward()
    expected = network.state_dict()
    expected |= {f"{name}.grad": weight.grad for name, weight in network.named_parameters()}
    for rank in range(processes):
        found = torch.load(tmp_path / f"result{rank}.pt", weights_only=True)
        torch.testing.assert_close(
            found.pop("images"), whole.grad[rank::processes], rtol=1e-5, atol=1e-5
        )
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_all_other_stages_make_what_one_process_makes(frozen, tmp_path, run):
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two):
        shutil.copytree(frozen[0], root)
    stages = {
        "export_cams": (),
        "train_affinity": (),
        "random_walk": (),
        "train_segmenter": ("seeds",),
        "evaluate": (),
    }
    # Without dropout and batch statistics, whose order of summation shows after a few steps.
    changes = {"method": "deeplabv2", "encoder_norm": "frozen"}
    for stage, arguments in stages.items():
        what = {"stage": stage, "arguments": arguments}
        what["changes"] = {"precision": "fp32"} if stage != "evaluate" else {}
        if stage == "train_segmenter":
            what["changes"] |= changes
        alone, ranks = run(one, 1, **what), run(two, 2, **what)
        assert_all_ended(alone + ranks)
        assert sorted(images(ranks)) == sorted(images(alone)), stage
        assert stage == "evaluate" or all(rank["images"] for rank in ranks), stage
        if alone[0]["losses"]:
            assert losses(ranks) == pytest.approx(losses(alone), abs=1e-4)
    assert_close_reports(two / "reports", one / "reports")
    expected, found = outs(one), outs(two)
    maps = [name for name in expected if name.startswith("data/") and name.endswith(".png")]
    assert len(maps) == 32 + 16 + 32 + 16
    assert [name for name in maps if found[name] != expected[name]] == []


def finished(root):
    """Ids in the journals of the first round, with repetitions."""
    journals = root.glob(".isim/resume/train_cam/*/round_01/progress.jsonl*")
    return [json.loads(line)["id"] for path in journals for line in path.read_text().splitlines()]


def test_a_run_whose_processes_die_goes_on_with_any_number_of_them(frozen, copies, run):
    expected, alone = frozen
    root = copies()

    def die(processes, victim, moment, count):
        ranks = run(
            root,
            processes,
            stage="train_cam",
            changes=FROZEN,
            victim=victim,
            moment=moment,
            count=count,
        )
        codes = [rank["code"] for rank in ranks]
        # The others notice it and leave; nobody waits.
        assert codes[victim] == KILLED
        assert set(codes) - {KILLED} <= {distributed.LOST}, [rank["said"] for rank in ranks]
        return ranks

    in_epoch = die(2, 1, "before a step of the optimizer", 2)
    assert images(in_epoch) == []
    first = die(2, 1, "after a label map", 4)
    done = finished(root)
    assert len(done) == len(set(done)) >= 3 + 3
    # Other processes take over what is left, and nothing else.
    second = die(3, 0, "after a label map", 2)
    again = finished(root)
    assert len(again) == len(set(again)) > len(done)
    assert not set(done) & {Path(name).stem for name in images(second) if name.endswith(".png")}
    later = die(2, 0, "before a step of the optimizer", 2)
    # The rest of the round; the epoch that died is the second.
    assert len(again) + len([name for name in images(later) if name.endswith(".png")]) == 16
    assert len(first[0]["losses"]) == 2
    rest = run(root, 1, stage="train_cam", changes=FROZEN)
    assert_all_ended(rest)
    assert len(losses(rest)) == 4
    assert losses(rest) == pytest.approx(losses(alone)[2:], abs=1e-4)
    assert_close_reports(root / "reports", expected / "reports")


def test_hosts_that_share_no_disk_end_with_the_same_files(frozen, copies, run):
    hosts = [copies(), copies()]
    what = {"stage": "train_cam", "changes": FROZEN}
    # The state of one host alone is enough to go on from.
    ranks = run(hosts, 1, **what, victim=1, moment="after a label map", count=4)
    assert [rank["code"] for rank in ranks] == [distributed.LOST, KILLED]
    (state,) = hosts[1].glob(".isim/resume/train_cam/*/state.safetensors")
    state.unlink()
    ranks = run(hosts, 1, **what)
    assert_all_ended(ranks)
    assert len(losses(ranks)) == 4 and all(rank["images"] for rank in ranks)
    assert_close_reports(hosts[1] / "reports", hosts[0] / "reports")
    ours, theirs = map(outs, hosts)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert ours.keys() == theirs.keys() == outs(frozen[0]).keys() and different == []
    labels = {name: data for name, data in outs(frozen[0]).items() if "pseudo_labels" in name}
    assert all(ours[name] == data for name, data in labels.items())


def test_hosts_whose_inputs_differ_are_refused(copies, run):
    hosts = [copies(), copies()]
    with (hosts[1] / "data/prepared/train.csv").open("a") as file:
        file.write("\n")
    ranks = run(hosts, 1, stage="train_cam")
    assert [rank["code"] for rank in ranks] == [2, 2]
    # Once on every host.
    assert all("the hosts of this run differ" in rank["said"] for rank in ranks)
    # A command has silenced PyTorch's own warnings before it loads PyTorch, unlike these forks.
    assert [rank["said"].count("isim: error") for rank in ranks] == [1, 1], ranks


def test_hosts_of_another_network_or_other_rounds_are_refused_at_once(frozen, tmp_path, run):
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        shutil.copytree(frozen[0], host)
        (host / "data/cams/train").mkdir(parents=True)
    other = hosts[1] / "params.yaml"
    text = other.read_text()
    other.write_text(text.replace("method: deeplabcam", "method: cam", 1))
    assert other.read_text() != text
    shutil.rmtree(hosts[1] / "data/pseudo_labels/round_02")
    for stage in ("train_cam", "evaluate"):
        ranks = run(hosts, 1, stage=stage)
        assert [rank["code"] for rank in ranks] == [2, 2]
        assert all("the hosts of this run differ" in rank["said"] for rank in ranks)


def test_files_of_each_host_reach_all_others(run, tmp_path):
    hosts = [tmp_path / name for name in "abc"]
    contents = {"a": {"one": b"1", "deep/empty": b""}, "b": {}, "c": {"two": b"22", "one": b"1"}}
    for host in hosts:
        for name, data in contents[host.name].items():
            path = host / "shared" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (host / "shared").mkdir(parents=True, exist_ok=True)
        (host / "shared/.tmp-half").write_bytes(b"x")
        (host / f"shared/{host.name}.jsonl").write_bytes(b"{}\n")
    before = (hosts[2] / "shared/one").stat().st_ino
    assert_all_ended(run(hosts, 1, function="share"))
    for host in hosts:
        found = {
            str(path.relative_to(host / "shared")): path.read_bytes()
            for path in (host / "shared").rglob("*")
            if path.is_file()
        }
        own = {".tmp-half": b"x", f"{host.name}.jsonl": b"{}\n"}
        assert found == {"one": b"1", "deep/empty": b"", "two": b"22"} | own
    assert (hosts[2] / "shared/one").stat().st_ino == before, "what is there is not sent"


def test_an_error_of_all_or_of_one_is_told_once(run, tmp_path):
    for function, text in (("fail", "all fail alike"), ("fail_alone", "one fails")):
        ranks = run(tmp_path, 2, function=function)
        said = "".join(rank["said"] for rank in ranks)
        assert said == f"isim: error: {text}\n"
        assert {rank["code"] for rank in ranks} <= {2, distributed.LOST}


def isim(root, *command, **changes):
    """The real command, in two processes without helpers."""
    return subprocess.Popen(
        [sys.executable, "-m", "isim", *command],
        cwd=root,
        env=environment(ISIM_PROCESSES="2", PYTHONPATH=str(HERE.parent), **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_launcher_ends_as_its_processes_do(copies):
    root = copies()
    with isim(root, "evaluate") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err == f"isim: error: {root}/data/cams holds no CAMs; run `isim export-cams` first\n"
    process = isim(root, "train-cam")
    resume = root / ".isim/resume/train_cam"
    while not any(resume.glob("*/pseudo_labels/round_01/*.png")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    victims = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    victims[0].kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("isim: error: one of the processes was ended by SIGKILL")
    assert err.count("\n") == 1
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert any(resume.glob("*/state.safetensors"))
    process = isim(root, "train-cam")
    while not any(resume.glob("*/round_01.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert out.count("continues after epoch") == 1
    assert psutil.wait_procs(workers, timeout=30)[1] == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"ISIM_PROCESSES": "1"}, []),
        ({"ISIM_PROCESSES": "4"}, ["--standalone", "--nproc-per-node", "4"]),
        ({"ISIM_TORCHRUN": "--nnodes 2 --rdzv-id 'a b'"}, ["--nnodes", "2", "--rdzv-id", "a b"]),
        (
            {"ISIM_TORCHRUN": "--nnodes 2", "ISIM_PROCESSES": "8"},
            ["--nnodes", "2", "--nproc-per-node", "8"],
        ),
    ],
)
def test_the_environment_says_how_many_processes(monkeypatch, settings, expected):
    for name in ("ISIM_PROCESSES", "ISIM_TORCHRUN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert launcher.options() == expected


def test_wrong_settings_are_named(monkeypatch):
    for value in ("0", "two", ""):
        monkeypatch.setenv("ISIM_PROCESSES", value)
        with pytest.raises(UserError, match="ISIM_PROCESSES"):
            launcher.options()
    with pytest.raises(UserError, match="ISIM_TORCHRUN: unrecognized arguments: --bogus"):
        launcher.launch(["--bogus"], ["evaluate"])


def put_in_group(monkeypatch, **values):
    monkeypatch.setattr(distributed, "_group", distributed._Group(**values))


def test_one_process_does_everything_and_starts_nothing(tmp_path):
    with distributed.started(tmp_path):
        assert distributed.mine([1, 2, 3]) == [1, 2, 3]
        assert distributed.gather("a") == ["a"] and distributed.broadcast(None) is None
        distributed.share(tmp_path)
        assert not torch.distributed.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_a_batch_smaller_than_the_processes_is_refused(monkeypatch, tiny):
    put_in_group(monkeypatch, rank=1, world=9, local_world=9)
    with pytest.raises(UserError, match="a batch of 8 images cannot be shared by 9"):
        CropBatches(range(100), tiny.train_cam, torch.device("cpu"))


def test_processes_of_a_host_share_its_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("ISIM_WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    put_in_group(monkeypatch, rank=5, world=8, local_rank=1, local_world=4)
    assert engine.worker_count() == 2
    monkeypatch.setenv("ISIM_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="4 processes on a host with 1 GPUs"):
        engine.default_device()
    monkeypatch.setenv("ISIM_DEVICE", "cpu:0")
    with pytest.raises(UserError, match="'cpu:0' is one device for 4 processes"):
        engine.default_device()
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    assert engine.default_device() == torch.device("cpu")


def test_only_rank_0_is_tracked(monkeypatch, tmp_path, tiny):
    put_in_group(monkeypatch, rank=1, world=2, local_rank=1, local_world=2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with tracking.stage_run("train_cam", tiny.train_cam, tmp_path, {}) as run:
        run.metrics({"a": 1.0}, step=1)
        run.headline({"a": 1.0})
        run.table("t", [{"a": 1}])
        run.tag("a", "b")
        run.image("a", np.zeros((1, 1, 3), np.uint8), step=0)
        run.artifact_file(tmp_path / "none")
        run.register_model("m", tmp_path / "none")
        run.flush()


def test_all_journals_are_read_and_each_process_writes_its_own(monkeypatch, tmp_path):
    for name, ids in (("p.jsonl", "ab"), ("p.jsonl.1", "c"), ("p.jsonl.7", "d"), ("px.jsonl", "e")):
        text = "".join(json.dumps({"id": id_}) + "\n" for id_ in ids)
        (tmp_path / name).write_text(text + '{"id": "ha')
    with Journal(tmp_path / "p.jsonl") as journal:
        assert journal.lines.keys() == set("abcd")
    put_in_group(monkeypatch, rank=1, world=2)
    with Journal(tmp_path / "p.jsonl") as journal:
        assert journal.lines == {}, "what there is, rank 0 tells"
        journal.add({"id": "f"})
    assert (tmp_path / "p.jsonl.1").read_text() == '{"id": "c"}\n{"id": "f"}\n'
