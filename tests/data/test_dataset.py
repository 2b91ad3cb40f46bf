"""Prepared data loads as written; crops are reproducible and keep image and label aligned."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from isim.data.dataset import CropDataset, Item, epoch_order, load_prepared
from isim.data.files import read_label_map, write_label_map
from isim.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def write_prepared(directory: Path, root: str = "prepared:", format_: int = 1) -> None:
    directory.mkdir(exist_ok=True)
    about = {"format": format_, "source": "voc", "root": root, "classes": ["cat", "dog"]}
    about["splits"] = {"train": 2, "val": 1, "test": 0}
    (directory / "dataset.json").write_text(json.dumps(about))
    (directory / "labels.csv").write_text("id,labels\na,cat;dog\nb,dog\nc,cat\n")
    (directory / "train.csv").write_text(
        "id,image,mask\nb,i/b.jpg,prepared:masks/b.png\na,i/a.jpg,\n"
    )
    (directory / "val.csv").write_text("id,image,mask\nc,i/c.jpg,m/c.png\n")
    (directory / "test.csv").write_text("id,image,mask\n")


def test_load_prepared(tmp_path):
    write_prepared(tmp_path, root="$ROOT/voc")
    prepared = load_prepared(tmp_path, lambda text: Path(text.replace("$ROOT", "/r")))
    assert prepared.classes == ("cat", "dog")
    b, a = prepared.split("train")
    assert (b.id, b.image, b.mask) == ("b", Path("/r/voc/i/b.jpg"), tmp_path / "masks/b.png")
    assert (a.id, a.mask) == ("a", None)
    assert a.image_label.dtype == np.float32
    assert a.image_label.tolist() == [1, 1]
    assert b.image_label.tolist() == [0, 1]
    assert prepared.split("val")[0].mask == Path("/r/voc/m/c.png")


def test_images_inside_the_prepared_folder(tmp_path):
    write_prepared(tmp_path)
    assert load_prepared(tmp_path, Path).split("val")[0].image == tmp_path / "i/c.jpg"


def test_unknown_and_empty_splits(tmp_path):
    write_prepared(tmp_path)
    prepared = load_prepared(tmp_path, Path)
    with pytest.raises(UserError, match="no split 'trainaug'.*train, val, test"):
        prepared.split("trainaug")
    with pytest.raises(UserError, match="'test' is empty"):
        prepared.split("test")


def test_unknown_labels_are_given_to_who_can_do_without(tmp_path):
    write_prepared(tmp_path)
    (tmp_path / "labels.csv").write_text("id,labels\na,cat\nb,\nc,cat\n")
    prepared = load_prepared(tmp_path, Path)
    b, a = prepared.split("train", labelled=False)
    assert b.image_label is None
    assert a.known_label.tolist() == [1, 0]
    with pytest.raises(UserError, match="classes of image b are unknown"):
        _ = b.known_label
    with pytest.raises(UserError, match=r"split 'train' are unknown \(1 of 2 images\)"):
        prepared.split("train")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    crops = CropDataset([replace(b, image=tmp_path / "b.png")], 8, MEAN, STD, 0, [])
    with pytest.raises(UserError, match="classes of image b are unknown"):
        crops[0]


def test_missing_damaged_and_foreign_prepared_data(tmp_path):
    with pytest.raises(UserError, match="dataset.json is missing; run `isim prepare`"):
        load_prepared(tmp_path, Path)
    write_prepared(tmp_path, format_=2)
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        load_prepared(tmp_path, Path)
    write_prepared(tmp_path)
    (tmp_path / "labels.csv").write_text("id,labels\na,cow\n")
    with pytest.raises(UserError, match="damaged.*run `isim prepare` again"):
        load_prepared(tmp_path, Path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_prepared(tmp_path, Path)


def make_items(folder: Path, sizes: list[tuple[int, int]]) -> tuple[list[Item], dict[str, Path]]:
    """Images whose red channel is the label map (in tens), so that alignment can be checked."""
    items, labels = [], {}
    for number, (height, width) in enumerate(sizes):
        label = np.zeros((height, width), np.uint8)
        label[height // 3 :, : width // 2] = 5
        label[: height // 2, width // 4 :] = 20
        pixels = np.stack([label * 10] * 3, axis=-1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        write_label_map(folder / f"{number}_label.png", label)
        items.append(Item(str(number), folder / f"{number}.png", None, np.ones(20, np.float32)))
        labels[str(number)] = folder / f"{number}_label.png"
    return items, labels


def dataset(items, labels, seed=3, crop=48):
    data = CropDataset(items, crop, MEAN, STD, seed, [labels.__getitem__] if labels else [])
    if labels:
        data.use_labels(0)
    return data


def planes(sample):
    """The crop as (3, crop, crop) in 8-bit levels: it is normalised on the device only."""
    assert sample["image"].dtype == torch.uint8
    return sample["image"].permute(2, 0, 1).float()


def is_mean_colour(image, where) -> bool:
    colour = torch.tensor([round(255 * value) for value in MEAN])
    return bool((image[:, where] == colour[:, None]).all())


def test_crop_shapes_types_and_alignment(tmp_path):
    items, labels = make_items(tmp_path, [(60, 90), (90, 40)])
    data = dataset(items, labels)
    seen_padding = False
    for epoch in range(12):
        data.set_epoch(epoch)
        for sample in data:
            image, label = planes(sample), sample["label"]
            assert image.shape == (3, 48, 48)
            assert label.shape == (48, 48) and label.dtype == torch.uint8
            assert set(label.unique().tolist()) <= {0, 5, 20, 255}
            inside = label != 255
            # Bilinear pixels blend at edges only; nearest labels never do.
            agree = (image[0, inside] - label[inside].int() * 10).abs() < 25
            assert agree.float().mean() > 0.9
            seen_padding |= bool((~inside).any())
            assert is_mean_colour(image, ~inside)
    assert seen_padding


def test_longer_side_is_drawn_from_crop_to_twice_crop(tmp_path):
    items, _ = make_items(tmp_path, [(20, 80)])
    data = dataset(items, None, crop=32)
    heights = set()
    pixels = np.full((20, 80, 3), 255, np.uint8)
    Image.fromarray(pixels).save(items[0].image)
    for epoch in range(60):
        heights.add(white_rows(data, epoch))
    # Height is a quarter of the longer side: 8..16 pixels of white.
    assert min(heights) == 8
    assert max(heights) == 16


def first_draw(epoch, draw, seed=3, index=0):
    """What `draw` gives first with the generator of an item."""
    with torch.random.fork_rng(devices=[]):
        state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        return draw()


def white_rows(data, epoch):
    data.set_epoch(epoch)
    return int((planes(data[0]).amax(dim=(0, 2)) > 200).sum())


def test_the_longer_side_is_the_first_draw(tmp_path):
    items, _ = make_items(tmp_path, [(20, 80)])
    Image.fromarray(np.full((20, 80, 3), 255, np.uint8)).save(items[0].image)
    data = dataset(items, None, crop=32)
    for epoch in range(20):
        longer = first_draw(epoch, lambda: int(torch.randint(32, 65, ())))
        assert white_rows(data, epoch) == round(20 * longer / 80)


def test_scales_draw_a_factor_of_the_image_whatever_its_size(tmp_path):
    items, _ = make_items(tmp_path, [(20, 80)])
    heights = []
    for size in ((20, 80), (24, 30)):
        Image.fromarray(np.full((*size, 3), 255, np.uint8)).save(items[0].image)
        data = CropDataset(items, 40, MEAN, STD, 3, [], scales=(0.5, 1.5))
        for epoch in range(40):
            factor = 0.5 + first_draw(epoch, lambda: float(torch.rand(())))
            assert white_rows(data, epoch) == round(size[0] * factor)
            heights.append(white_rows(data, epoch) / size[0])
    assert min(heights) < 0.6 and max(heights) > 1.4
    data = CropDataset(items, 40, MEAN, STD, 3, [], scales=(1.25, 1.25))
    assert {white_rows(data, epoch) for epoch in range(5)} == {30}


def test_a_label_that_is_no_class_is_an_error_that_names_the_file(tmp_path):
    items, labels = make_items(tmp_path, [(20, 80)])
    label = np.full((20, 80), 255, np.uint8)
    label[3, 4] = 20
    write_label_map(labels["0"], label)
    assert dataset(items, labels)[0]["label"].shape == (48, 48)
    label[3, 4] = 21
    write_label_map(labels["0"], label)
    with pytest.raises(UserError, match=r"0_label\.png holds label 21 of 0\.\.20"):
        dataset(items, labels)[0]


def test_scaled_crops_are_padded_and_aligned(tmp_path):
    items, labels = make_items(tmp_path, [(60, 90)])
    data = CropDataset(items, 48, MEAN, STD, 3, [labels.__getitem__], scales=(0.5, 1.5))
    data.use_labels(0)
    padding = []
    for epoch in range(12):
        data.set_epoch(epoch)
        image, label = planes(data[0]), data[0]["label"]
        assert image.shape == (3, 48, 48) and label.shape == (48, 48)
        inside = label != 255
        agree = (image[0, inside] - label[inside].int() * 10).abs() < 25
        assert agree.float().mean() > 0.9
        assert is_mean_colour(image, ~inside)
        padding.append(bool((~inside).any()))
    assert any(padding) and not all(padding)


@pytest.mark.parametrize("scales", [None, (0.5, 1.5)])
def test_crops_are_those_of_the_plain_transforms(tmp_path, scales):
    """Resize, RandomCrop, flip over whole images, with the draws of the item's generator."""
    items, labels = make_items(tmp_path, [(61, 97), (90, 40), (30, 20)])
    for item in items:
        size = read_label_map(labels[item.id]).shape
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(noise).save(item.image)
    data = CropDataset(items, 48, MEAN, STD, 3, [labels.__getitem__], scales=scales)
    data.use_labels(0)
    fill = {tv_tensors.Image: [round(255 * v) for v in MEAN], tv_tensors.Mask: 255}
    move = v2.Compose([v2.RandomCrop(48, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()])

    def straightforward(image, label):
        longer = max(label.shape)
        if scales:
            scale = 0.5 + float(torch.rand(()))
        else:
            scale = int(torch.randint(48, 97, ())) / longer
        size = [round(side * scale) for side in label.shape]
        pixels = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), size)
        nearest = v2.InterpolationMode.NEAREST_EXACT
        mask = v2.functional.resize(torch.from_numpy(label)[None], size, interpolation=nearest)
        return move(tv_tensors.Image(pixels), tv_tensors.Mask(mask))

    for epoch in range(8):
        data.set_epoch(epoch)
        for index, item in enumerate(items):
            image = np.array(Image.open(item.image))
            draw = partial(straightforward, image, read_label_map(labels[item.id]))
            pixels, mask = first_draw(epoch, draw, index=index)
            found = data[index]
            # A level: torchvision rounds in another order where it does not resize channels-last.
            assert (planes(found) - pixels.float()).abs().max() <= 1
            # Where a centre falls between two pixels, floats may choose either.
            assert (found["label"] != mask[0]).float().mean() < 0.05


def test_large_photos_are_decoded_at_the_size_that_the_crop_needs(tmp_path):
    """What is left out is finer than the crop's pixels; labels keep their own size."""
    rows, columns = np.mgrid[:640, :800]
    smooth = np.stack([rows / 3, columns / 4, (rows + columns) / 6], -1).astype(np.uint8)
    crops = []
    for suffix in ("jpg", "png"):
        Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", **{"quality": 95})
        items = [Item("a", tmp_path / f"a.{suffix}", None, np.ones(20, np.float32))]
        write_label_map(tmp_path / "label.png", np.full((640, 800), 7, np.uint8))
        crops.append(dataset(items, {"a": tmp_path / "label.png"}, crop=64)[0])
    assert (planes(crops[0]) - planes(crops[1])).abs().max() < 6
    assert torch.equal(crops[0]["label"], crops[1]["label"])


def test_without_labels_everything_is_ignored(tmp_path):
    items, _ = make_items(tmp_path, [(50, 50)])
    assert (dataset(items, None)[0]["label"] == 255).all()


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_crops_depend_on_seed_epoch_and_index_only(tmp_path):
    items, labels = make_items(tmp_path, [(60, 90)] * 3)
    data = dataset(items, labels)
    data.set_epoch(4)
    expected = [data[index] for index in range(3)]
    assert not equal(expected[0], expected[1])
    torch.rand(5)
    before = torch.random.get_rng_state()
    assert equal(data[2], expected[2])
    assert torch.equal(before, torch.random.get_rng_state())
    again = dataset(items, labels)
    again.set_epoch(4)
    assert equal(again[1], expected[1])
    again.set_epoch(5)
    assert not equal(again[1], expected[1])
    other = dataset(items, labels, seed=4)
    other.set_epoch(4)
    assert not equal(other[1], expected[1])


def test_flips_happen_and_can_be_switched_off(tmp_path):
    ramp = np.tile(np.arange(0, 240, 3, dtype=np.uint8)[None, :, None], (80, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    items = [Item("ramp", tmp_path / "ramp.png", None, np.ones(1, np.float32))]
    for flip, expected in ((True, {True, False}), (False, {True})):
        data = CropDataset(items, 32, MEAN, STD, 0, [], flip=flip)
        rising = set()
        for epoch in range(20):
            data.set_epoch(epoch)
            row = data[0]["image"][16, :, 0].int()
            rising.add(bool(row[-1] > row[0]))
        assert rising == expected


def test_workers_change_nothing_and_see_the_epoch(tmp_path):
    items, labels = make_items(tmp_path, [(60, 90)] * 4)
    data = dataset(items, labels)
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        batches = list(loader)
        for index in range(4):
            batch = {key: value[index % 2] for key, value in batches[index // 2].items()}
            assert equal(batch, data[index])


def test_label_of_another_size_is_refused(tmp_path):
    items, labels = make_items(tmp_path, [(60, 90)])
    write_label_map(labels["0"], read_label_map(labels["0"])[:-1])
    with pytest.raises(UserError, match=r"0_label.png is 90x59 pixels but .*0.png is 90x60"):
        dataset(items, labels)[0]


def test_epoch_order():
    order = epoch_order(50, 1, 2)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, epoch_order(50, 1, 2))
    assert not np.array_equal(order, epoch_order(50, 1, 3))
    assert not np.array_equal(order, epoch_order(50, 2, 2))
