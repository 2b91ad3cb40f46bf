"""Stage export_cams: what is stored, and checkpoints that are none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from isim import engine
from isim.data.dataset import load_prepared
from isim.data.files import read_cam
from isim.errors import UserError
from isim.models import cam
from isim.regeneration import CamSettings, cams
from isim.stages import export_cams


@pytest.fixture
def trained(finished_project, tmp_path, recorder):
    """A project of the test's own, trained but without CAMs."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    shutil.rmtree(root / "data/cams")
    shutil.rmtree(root / "reports/export_cams")
    return root


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_stored_cams_are_the_areas_of_the_full_ones(trained, tiny, stride):
    params = tiny.export_cams.model_copy(update={"stride": stride, "splits": ("val",)})
    with engine.intra_op_threads(1):
        export_cams.run(params, trained)
        network, config = cam.load(trained / "models/train_cam/model.safetensors")
        items = load_prepared(trained / "data/prepared", None).split("val")
        settings = CamSettings((1.0,), True, "fp32")
        full = list(cams(network, config, items, settings, torch.device("cpu")))
    assert sorted(path.name for path in (trained / "data/cams").iterdir()) == ["val"]
    for item, planes in full:
        stored, ids, size = read_cam(trained / f"data/cams/val/{item.id}.npz")
        assert (ids == item.class_ids).all() and size == (64, 64)
        side = 64 // stride
        means = planes.view(len(ids), side, stride, side, stride).mean((2, 4))
        # Half precision, and bf16 where the machine computes it.
        torch.testing.assert_close(torch.from_numpy(stored), means, rtol=0, atol=0.05)
        assert stored.min() >= 0 and stored.max() <= 1
    report = json.loads((trained / "reports/export_cams/metrics.json").read_text())["val"]
    assert report["images"] == 8
    difference = report["cam_miou_stored"] - report["cam_miou_full_size"]
    assert report["stride_difference"] == pytest.approx(difference)
    if stride == 1:
        assert abs(difference) < 0.005, "only half precision differs"


def test_the_difference_of_the_stride_is_what_evaluate_sees(finished_project):
    """Both enlarge the stored CAMs, by different libraries."""
    exported = json.loads((finished_project / "reports/export_cams/metrics.json").read_text())
    scored = json.loads((finished_project / "reports/evaluate/metrics.json").read_text())
    for split in ("train", "val"):
        stored = exported[split]["cam_miou_stored"]
        assert stored == pytest.approx(scored[split]["cam_miou"], abs=2e-3)


def test_odd_sizes_round_up():
    full = torch.rand(2, 33, 50, generator=torch.Generator().manual_seed(0))
    small = export_cams._shrink(full, 4)
    assert small.shape == (2, 9, 13)
    assert export_cams._grow(small, (33, 50)).shape == full.shape
    assert export_cams._shrink(full[:0], 4).shape == (0, 9, 13)
    assert export_cams._grow(small[:0], (33, 50)).shape == (0, 33, 50)


def test_a_checkpoint_that_is_none_names_the_command(trained, tiny):
    path = trained / "models/train_cam/model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="isim train-cam"):
        export_cams.run(tiny.export_cams, trained)
    path.unlink()
    with pytest.raises(UserError, match="isim train-cam"):
        export_cams.run(tiny.export_cams, trained)
    assert not (trained / "data/cams").exists()


def test_an_unknown_split_names_the_known(trained, tiny):
    params = tiny.export_cams.model_copy(update={"splits": ("train", "trainaug")})
    with pytest.raises(UserError, match="no split 'trainaug'.*train, val"):
        export_cams.run(params, trained)
    assert not (trained / "data/cams").exists()


@pytest.mark.parametrize("blocked", [".isim/resume", "data/cams", "reports/export_cams"])
def test_a_folder_that_cannot_be_written_is_named(blocked, trained, tiny):
    (trained / blocked).parent.mkdir(exist_ok=True)
    shutil.rmtree(trained / blocked, ignore_errors=True)
    (trained / blocked).touch()
    with pytest.raises(UserError, match=f"cannot write .*{blocked}"):
        export_cams.run(tiny.export_cams, trained)
