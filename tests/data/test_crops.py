"""Crops are reproducible, and those of plain transforms of image and label."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from isim.data.crops import CropDataset, epoch_order
from isim.data.files import read_label_map, write_label_map
from isim.data.prepared import Item
from isim.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def make_items(folder, *sizes, pixels=noise):
    items = []
    for number, (height, width) in enumerate(sizes):
        label = np.zeros((height, width), np.uint8)
        label[height // 3 :, : width // 2] = 5
        label[: height // 2, width // 4 :] = 20
        Image.fromarray(pixels(height, width)).save(folder / f"{number}.png")
        write_label_map(folder / f"{number}_label.png", label)
        mask = folder / f"{number}_label.png"
        items.append(Item(str(number), folder / f"{number}.png", mask, np.ones(20, np.float32)))
    return items


def dataset(items, seed=3, crop=48, scales=None, labelled=True, epoch=0):
    masks = {item.id: item.mask for item in items}
    data = CropDataset(items, crop, MEAN, STD, seed=seed, labels=[masks.__getitem__], scales=scales)
    data.set_epoch(epoch)
    if labelled:
        data.use_labels(0)
    return data


@pytest.mark.parametrize("scales", [None, (0.5, 1.5)])
def test_crops_are_those_of_the_plain_transforms(tmp_path, scales):
    """Resize, RandomCrop, flip over whole images, with the draws of the item's generator.

    The longer side, or the factor of the image's size, is the first of them.
    """

    items = make_items(tmp_path, (61, 97), (90, 40), (30, 20))
    data, padded = dataset(items, scales=scales), set()
    fill = {tv_tensors.Image: [round(255 * value) for value in MEAN], tv_tensors.Mask: 255}
    move = v2.Compose([v2.RandomCrop(48, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()])

    def straightforward(image, label):
        longer = torch.rand(()) if scales else torch.randint(48, 97, ())
        scale = 0.5 + float(longer) if scales else int(longer) / max(label.shape)
        size = [round(side * scale) for side in label.shape]
        pixels = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), size)
        nearest = v2.InterpolationMode.NEAREST_EXACT
        mask = v2.functional.resize(torch.from_numpy(label)[None], size, interpolation=nearest)
        return move(tv_tensors.Image(pixels), tv_tensors.Mask(mask))

    for epoch in range(8):
        data.set_epoch(epoch)
        for index, item in enumerate(items):
            state = np.random.SeedSequence([3, epoch, index]).generate_state(1, np.uint64)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(state[0]))
                image, label = np.array(Image.open(item.image)), read_label_map(item.mask)
                pixels, mask = straightforward(image, label)
            found, label = data[index]["image"], data[index]["label"]
            # In 8-bit levels: it is normalised on the device only.
            assert found.shape == (48, 48, 3) and label.shape == (48, 48)
            assert found.dtype == label.dtype == torch.uint8
            # A level: torchvision rounds in another order where it does not resize channels-last.
            assert (found.permute(2, 0, 1) - pixels.float()).abs().max() <= 1
            # Where a centre falls between two pixels, floats may choose either.
            assert (label != mask[0]).float().mean() < 0.012
            padded.add(255 in label)
    assert padded == {True, False}


def test_large_photos_are_decoded_at_the_size_that_the_crop_needs(tmp_path):
    """Only what is finer than the crop's pixels is left out; labels keep their own size."""
    rows, columns = np.mgrid[:640, :800]
    smooth = np.stack([rows / 3, columns / 4, (rows + columns) / 6], -1).astype(np.uint8)
    (item,) = make_items(tmp_path, (640, 800), pixels=lambda *_: smooth)
    Image.fromarray(smooth).save(tmp_path / "0.jpg", quality=95)
    png, jpg = (
        dataset([replace(item, image=item.image.with_suffix(suffix))], crop=64)[0]
        for suffix in (".png", ".jpg")
    )
    assert (png["image"] - jpg["image"].float()).abs().max() < 6
    assert torch.equal(png["label"], jpg["label"])


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_crops_depend_on_seed_epoch_and_index_only(tmp_path):
    items = make_items(tmp_path, *[(60, 90)] * 3)
    data = dataset(items, epoch=4)
    expected = [data[index] for index in range(3)]
    assert not equal(expected[0], expected[1])
    torch.rand(5)
    before = torch.random.get_rng_state()
    assert equal(data[2], expected[2])
    assert torch.equal(before, torch.random.get_rng_state())
    assert equal(dataset(items, epoch=4)[1], expected[1])
    for change in ({"epoch": 5}, {"epoch": 4, "seed": 4}):
        assert not equal(dataset(items, **change)[1], expected[1])


def test_workers_change_nothing_and_see_the_epoch(tmp_path):
    data = dataset(make_items(tmp_path, *[(60, 90)] * 4))
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        for number, batch in enumerate(loader):
            for place in (0, 1):
                found = {key: value[place] for key, value in batch.items()}
                assert equal(found, data[2 * number + place])


def test_labels_are_ignored_at_first_and_refused_if_unusable(tmp_path):
    (item,) = make_items(tmp_path, (20, 80))
    assert (dataset([item], labelled=False)[0]["label"] == 255).all()
    for value, size in ((20, (20, 80)), (21, (20, 80)), (0, (19, 80))):
        label = np.full(size, 255, np.uint8)
        label[3, 4] = value
        write_label_map(item.mask, label)
        told = "holds label 21 of 0..20" if value else "is 80x19 pixels, its image 80x20"
        refused = pytest.raises(UserError, match=f"0_label.png {told}")
        with nullcontext() if value == 20 else refused:
            assert dataset([item])[0]["label"].shape == (48, 48)
    with pytest.raises(UserError, match="classes of image 0 are unknown"):
        dataset([replace(item, image_label=None)], labelled=False)[0]


def test_epoch_order():
    order = epoch_order(50, 1, 2)
    assert order.dtype == np.int64 and sorted(order) == list(range(50))
    assert np.array_equal(order, epoch_order(50, 1, 2))
    for other in ((1, 3), (2, 2)):
        assert not np.array_equal(order, epoch_order(50, *other))
