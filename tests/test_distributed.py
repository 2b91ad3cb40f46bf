"""Several processes make what one makes, each image once, and go on when one of them died."""

import re
import signal

import numpy as np
import psutil
import pytest
import torch
from ruamel.yaml import YAML
from support.runs import family, isim, outs, wait_for, without_times

from isim.runtime.processes import LOST

KILLED = -int(signal.SIGKILL)
# Without dropout, whose draws are other ones in every process.
PLAIN = {"method": "unetcam_bilinear", "precision": "fp32"}
FROZEN = {"stage": "train_cam", "changes": PLAIN | {"encoder_norm": "frozen"}}


@pytest.fixture(scope="module")
def run(nursery):
    return nursery


@pytest.fixture(scope="module")
def frozen(copies, run):
    """A project that one process has trained, and what it did."""
    root = copies()
    ranks = run(root, 1, **FROZEN)
    assert_all_ended(ranks)
    return root, ranks


def assert_all_ended(ranks):
    assert [rank["code"] for rank in ranks] == [0] * len(ranks), [rank["said"] for rank in ranks]


def images(ranks):
    return sorted(name for rank in ranks for name in rank["images"])


def losses(ranks):
    """Loss of every step: the sum of the processes' parts."""
    return np.sum([rank["losses"] for rank in ranks], axis=0)


def maps(root):
    return {k: v for k, v in outs(root).items() if k.startswith("data/") and k.endswith(".png")}


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
    ranks = run(root, 2, **FROZEN)
    assert_all_ended(ranks)
    assert losses(ranks) == pytest.approx(losses(alone), abs=1e-4)
    assert len(losses(alone)) == 6 and all(rank["losses"] for rank in ranks)
    # Two rounds of 16 label maps, and CAMs of the two images that are drawn.
    assert images(ranks) == images(alone)
    assert len(images(alone)) == 2 * (16 + 2) == len(set(images(alone)))
    assert all(len(rank["images"]) >= 16 for rank in ranks)
    assert len(maps(root)) == 32 and maps(root) == maps(expected)
    assert_close_reports(root / "reports", expected / "reports")
    assert [rank["said"] != "" for rank in ranks] == [True, False]
    assert not (root / ".isim/resume/train_cam").exists()


def test_batch_statistics_are_those_of_the_whole_batch_however_uneven_the_shares(copies, run):
    step = {"stage": "train_cam", "changes": PLAIN | {"epochs": 2}}
    one, three = run(copies(), 1, **step), run(copies(), 3, **step)
    assert_all_ended(one + three)
    assert len(losses(one)) == 4
    assert losses(three) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("processes", [2, 3])
def test_normalisation_of_processes_is_that_of_one(run, tmp_path, processes):
    assert_all_ended(run(tmp_path, 1, function="normalise"))
    expected = torch.load(tmp_path / "result0.pt", weights_only=True)
    assert_all_ended(run(tmp_path, processes, function="normalise"))
    for rank in range(processes):
        found = torch.load(tmp_path / f"result{rank}.pt", weights_only=True)
        own = expected | {"images": expected["images"][rank::processes]}
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


FP32 = {"precision": "fp32"}
# Without dropout and batch statistics, whose order of summation shows after a few steps.
SEGMENTER = FP32 | {"method": "deeplabv2", "encoder_norm": "frozen"}
OTHERS = (
    {"stage": "export_cams", "changes": FP32},
    {"stage": "train_affinity", "changes": FP32},
    {"stage": "random_walk", "changes": FP32},
    {"stage": "train_segmenter", "arguments": ["seeds"], "changes": SEGMENTER},
    {"stage": "evaluate"},
)


def test_all_other_stages_make_what_one_process_makes(frozen, copies, run):
    one, two = copies(frozen[0]), copies(frozen[0])
    for step in OTHERS:
        alone, ranks = run(one, 1, **step), run(two, 2, **step)
        assert_all_ended(alone + ranks)
        assert images(ranks) == images(alone), step
        assert step["stage"] == "evaluate" or all(rank["images"] for rank in ranks), step
        assert losses(ranks) == pytest.approx(losses(alone), abs=1e-4)
    assert_close_reports(two / "reports", one / "reports")
    assert len(maps(one)) == 32 + 16 + 32 + 16
    assert maps(two) == maps(one)


def test_two_processes_make_what_one_makes_on_frozen_encoders(copies, run):
    """Each image's features are computed once, by one of them."""
    one, two = copies(), copies()
    for root in (one, two):
        put_frozen(root)
    for step in (
        {"stage": "train_cam"},
        {"stage": "export_cams", "changes": FP32},
        {"stage": "train_segmenter", "arguments": ["last_round"]},
    ):
        alone, ranks = run(one, 1, **step), run(two, 2, **step)
        assert_all_ended(alone + ranks)
        assert images(ranks) == images(alone), step
        assert all(rank["images"] for rank in ranks), step
    assert len(maps(one)) == 2 * 16 + 2 * 8 and maps(two) == maps(one)
    assert_close_reports(two / "reports", one / "reports")
    kept = [
        {p.name: p.read_bytes() for p in root.glob(".isim/features/*/*")} for root in (one, two)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 16 + 8


def put_frozen(root):
    """Give a project's trainings method frozen."""
    path = root / "params.yaml"
    tree = YAML(typ="safe").load(path.read_text())
    for name in ("train_cam", "train_segmenter"):
        tree[name] |= FP32 | {"method": "frozen", "encoder": "test_efficientnet"}
        tree[name]["features"]["sides"] = [64]
    for section in (tree["train_cam"]["frozen"], tree["train_segmenter"]):
        section["head"] |= {"width": 16, "steps": 20}
    tree["train_cam"]["frozen"] |= {"rounds": 2, "classifier_steps": 20}
    tree["train_cam"]["threshold"] = 0.5
    YAML().dump(tree, path)


def test_a_run_whose_processes_die_goes_on_with_any_number_of_them(frozen, copies, run):
    """Each image and each epoch once (images by themselves: tests/passes/test_each.py)."""
    expected, alone = frozen
    root = copies()

    def maps_until_death(count, victim, moment, at):
        ranks = run(root, count, **FROZEN, victim=victim, moment=moment, count=at)
        codes = [rank["code"] for rank in ranks]
        # The others notice it and leave; nobody waits.
        assert codes[victim] == KILLED
        assert set(codes) - {KILLED} <= {LOST}, [rank["said"] for rank in ranks]
        return [name for name in images(ranks) if name.endswith(".png")]

    assert maps_until_death(2, 1, "before a step of the optimizer", 2) == []
    # The round after the first epoch; the epoch that dies at last is the second.
    made = maps_until_death(2, 1, "after a label map", 4)
    made += maps_until_death(3, 0, "after a label map", 2)
    made += maps_until_death(2, 0, "before a step of the optimizer", 2)
    # Those at which a process died may have to be done again.
    assert len(set(made)) == 16 and len(made) <= 16 + 2 + 3
    rest = run(root, 1, **FROZEN)
    assert_all_ended(rest)
    assert len(losses(rest)) == 4
    assert losses(rest) == pytest.approx(losses(alone)[2:], abs=1e-4)
    assert_close_reports(root / "reports", expected / "reports")


def test_hosts_that_share_no_folder_are_refused(run, tmp_path):
    hosts = [tmp_path / "a", tmp_path / "b"]
    ranks = run(hosts, 1, function="tell")
    assert [rank["code"] for rank in ranks] == [2, 2]
    # One line a host.
    for host, rank in zip(hosts, ranks, strict=True):
        told = f"isim: error: the hosts of this run do not share the project folder {host}; start"
        assert rank["said"].startswith(told) and rank["said"].count("\n") == 1
    assert_all_ended(run([hosts[0], hosts[0]], 2, function="tell"))
    assert [list(host.rglob("*")) for host in hosts] == [[hosts[0] / ".isim"], []]


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_tell_each_other(run, tmp_path, processes):
    assert_all_ended(run(tmp_path, processes, function="tell"))


def test_an_error_of_all_or_of_one_is_told_once(run, tmp_path):
    for function, text in (("fail", "all fail alike"), ("fail_alone", "one fails")):
        ranks = run(tmp_path, 2, function=function)
        said = "".join(rank["said"] for rank in ranks)
        assert said == f"isim: error: {text}\n"
        assert {rank["code"] for rank in ranks} <= {2, LOST}


def test_the_launcher_ends_as_its_processes_do(copies):
    root = copies()
    resume = root / ".isim/resume/train_cam"

    def start_and_wait_for(pattern):
        process = isim(root, "train-cam", ISIM_PROCESSES="2")
        wait_for(process, lambda: any(resume.glob(pattern)))
        return process, family(process)

    def end(process, workers):
        told = process.communicate(timeout=60)
        assert psutil.wait_procs(workers, timeout=30)[1] == []
        return process.returncode, *told

    code, out, err = end(isim(root, "evaluate", ISIM_PROCESSES="2"), [])
    # Where the start takes long, it tells so.
    assert code == 2 and re.fullmatch(r"(evaluate: .*\n)*", out)
    assert err == f"isim: error: {root}/data/cams holds no CAMs; run `isim export-cams` first\n"
    process, workers = start_and_wait_for("*/pseudo_labels/round_01/*.png")
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    code, out, err = end(process, workers)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("isim: error: one of the processes was ended by SIGKILL")
    assert any(resume.glob("*/state.safetensors"))
    process, workers = start_and_wait_for("*/round_01.json")
    process.terminate()
    code, out, err = end(process, workers)
    assert (code, err) == (128 + signal.SIGTERM, "")
    assert out.count("continues after epoch") == 1
