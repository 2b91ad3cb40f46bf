"""Batches: which images come when, what becomes of them, and errors of what loads them."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from isim.data.crops import CropDataset, epoch_order
from isim.errors import UserError
from isim.runtime import processes


@pytest.mark.parametrize(
    ("batch", "size", "steps"), [(2, 2, 4), (3, 3, 2), (5, 5, 1), (8, 8, 1), (9, 8, 1)]
)
def test_only_full_batches_but_at_least_one(batch, size, steps, make, monkeypatch):
    get, read, sets = CropDataset.__getitem__, [], []
    monkeypatch.setattr(CropDataset, "__getitem__", lambda s, i: read.append(i) or get(s, i))
    crops = make(batch=batch).crops
    assert (crops.size, crops.steps) == (size, steps)
    for epoch in (1, 2):
        read.clear()
        assert [len(found["image"]) for found in crops.epoch(epoch)] == [size] * steps
        assert read == epoch_order(8, crops.params.seed, epoch)[: size * steps].tolist()
        sets.append(set(read))
    # Those that are left out differ every epoch.
    assert (sets[0] != sets[1]) == (batch in (3, 5))


def test_crops_are_normalised_on_the_device_as_the_settings_say(make, items):
    crops = make(seed=5, scales=(0.5, 1.5)).crops
    data = crops.dataset
    assert (data.items, data.crop, data.seed, data.scales) == (items, 32, 5, (0.5, 1.5))
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = next(crops.epoch(1))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "image": (torch.float32, (4, 3, 32, 32)),
        "image_label": (torch.float32, (4, 3)),
        "label": (torch.int64, (4, 32, 32)),
    }
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    for place, index in enumerate(epoch_order(8, 5, 1)[:4]):
        crop = data[index]
        image = (crop["image"] / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
        torch.testing.assert_close(batch["image"][place], image.permute(2, 0, 1))
        assert torch.equal(batch["label"][place], crop["label"].long())
        assert torch.equal(batch["image_label"][place], crop["image_label"])


def test_processes_share_a_batch_and_one_without_an_image_is_refused(make, monkeypatch):
    whole = [batch["image"] for batch in make().crops.epoch(2)]
    for rank in range(3):
        monkeypatch.setattr(processes, "_group", processes._Group(rank=rank, world=3))
        shares = [batch["image"] for batch in make().crops.epoch(2)]
        assert [share.tolist() for share in shares] == [step[rank::3].tolist() for step in whole]
    with pytest.raises(UserError, match="a batch of 2 images cannot be shared by 3 processes"):
        make(batch=2)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_one_line_from_helpers_too(workers, make, items, tmp_path, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", workers)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    broken = [replace(item, image=tmp_path / "broken.jpg", mask=None) for item in items]
    with pytest.raises(UserError, match=r"\Aimage .*broken\.jpg is unreadable.*\Z"):
        list(make(items=broken).crops.epoch(1))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)"),
    ],
)
def test_a_container_with_little_shared_memory_is_told(error, make, monkeypatch):
    """It is not the disk that is full."""
    monkeypatch.setenv("ISIM_WORKERS", "1")
    crops = make().crops

    def fail(*_arguments):
        raise error

    monkeypatch.setattr(CropDataset, "__getitem__", fail)
    with pytest.raises(UserError, match=r"\Ano shared memory is left .*--shm-size.*\Z"):
        list(crops.epoch(1))


def test_a_helper_that_dies_is_one_line(make, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "1")
    crops = make().crops
    monkeypatch.setattr(CropDataset, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"\A.*data loader process died.*ISIM_WORKERS than 1.*\Z"):
        list(crops.epoch(1))
