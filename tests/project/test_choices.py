"""What a new project's parameters become, by the data, the machine and the wishes."""

import shutil

import pytest
from PIL import Image
from support.photos import put

from isim.data.sources import folder as source
from isim.errors import UserError
from isim.experiments import overlay, preset
from isim.params import validate
from isim.project import choices
from isim.project.choices import Wishes

pytestmark = pytest.mark.usefixtures("bare_machine")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of 12 generated photographs, without and with masks."""
    base = tmp_path_factory.mktemp("photos")
    return {masks: put(base / f"masks_{masks}", 12, masks=masks) for masks in (False, True)}


def make(tmp_path, images, **wishes):
    return choices.make(Wishes(images, **wishes), tmp_path / "project")


@pytest.mark.parametrize("masks", [False, True])
def test_everything_that_was_chosen_stands_in_the_parameters(masks, photos, tmp_path):
    made = make(tmp_path, photos[masks])
    plain = overlay.plain(made.yaml)
    assert validate(plain, "made") == made.params
    for choice in made.choices:
        value = plain
        for part in choice.name.split("."):
            value = value[part]
        assert value == choice.value and choice.why
    sets = ["last_round", "ground_truth"] if masks else ["last_round"]
    assert [entry.name for entry in made.params.label_sets] == sets
    assert made.params.prepare.root == str(photos[masks])
    # The comments of all parameters.
    assert made.yaml.count("# ") > 80
    text = "\n".join(made.lines())
    assert "12 images" in text and f"{12 * masks} masks" in text and "badger" in text


def test_without_images_held_out_no_stage_asks_for_them(photos, tmp_path, monkeypatch):
    look = choices.look

    def without_val(*given):
        source = look(*given)
        source.splits["train"] += source.splits.pop("val")
        return source

    monkeypatch.setattr(choices, "look", without_val)
    params = make(tmp_path, photos[False]).params
    assert params.train_cam.eval_split == "none"
    assert params.export_cams.splits == params.train_segmenter.eval_splits == ("train",)


def test_images_of_unknown_tags_are_predicted_alone(photos, tmp_path, monkeypatch):
    look = choices.look

    def with_unlabelled(*given):
        source = look(*given)
        source.splits["unlabelled"] = source.splits["val"][:1]
        return source

    monkeypatch.setattr(choices, "look", with_unlabelled)
    params = make(tmp_path, photos[False]).params
    assert params.train_segmenter.eval_splits == ("val", "unlabelled")
    assert params.export_cams.splits == ("train", "val")


@pytest.mark.parametrize(
    ("device", "size", "side"),
    [
        ("cpu", 96, 256),
        ("cpu", 400, 416),
        ("cpu", 3000, 512),
        ("cuda", 3000, 768),
        ("cuda", 700, 704),
    ],
)
def test_the_side_is_the_measured_one_or_that_of_smaller_images(device, size, side):
    found, why = choices._side([(size // 2, size), (20, 20), (size, size // 2)], device)
    assert found == side and why


@pytest.mark.parametrize(
    ("wishes", "scales"),
    [
        ({}, (1.0, 1.25)),
        ({"settings": ["train_cam.features.sides=[768]"]}, (0.75, 1.0)),
        ({"settings": ["train_cam.features.sides=[2048]"]}, (0.75, 1.0)),
        ({"settings": ["train_cam.features.scales=[1.0]"]}, (1.0,)),
        ({"preset": "voc-frozen-clip-base"}, (1.0,)),
    ],
)
def test_cams_are_averaged_over_the_scales_that_were_measured(wishes, scales, photos, tmp_path):
    params = make(tmp_path, photos[False], **wishes).params
    assert params.train_cam.features.scales == scales


@pytest.mark.parametrize(
    ("images", "side", "expected"),
    [(2, 256, 256), (14, 256, 512), (100, 256, 4096), (14, 512, 2048), (562, 512, 4096)],
)
def test_a_batch_holds_a_part_of_the_patches(images, side, expected):
    params = preset.parameters("own-images")
    sides = params.train_cam.features.model_copy(update={"sides": (side,)})
    sections = ("train_cam", "train_segmenter")
    update = {n: getattr(params, n).model_copy(update={"features": sides}) for n in sections}
    found = choices._batches(params.model_copy(update=update), images)
    assert {choice.value for choice in found} == ({expected} if expected < 4096 else set())


@pytest.mark.parametrize(
    ("images", "cam", "segmenter"),
    [(2, 100, 100), (14, 100, 100), (160, 70, 42), (562, 20, 12), (10_582, 10, 10)],
)
def test_epochs_of_networks_that_are_trained_make_so_many_steps(images, cam, segmenter):
    own = preset.parameters("own-images")
    assert choices._epochs(own, images) == []
    update = {
        "train_cam": own.train_cam.model_copy(update={"method": "deeplabcam"}),
        "train_segmenter": own.train_segmenter.model_copy(update={"method": "deeplabv3"}),
    }
    params = own.model_copy(update=update)
    found = {choice.name: choice for choice in choices._epochs(params, images)}
    assert found["train_cam.epochs"].value == cam
    assert found["train_segmenter.epochs"].value == segmenter
    assert f"{images} images" in found["train_cam.epochs"].why and "700" in (
        found["train_cam.epochs"].why
    )
    values = {name.rpartition(".")[2]: choice.value for name, choice in found.items()}
    del values["epochs"]
    made = params.train_cam.model_copy(update={"epochs": cam, **values})
    # Checked as the parameters are, and as many rounds as there were.
    assert type(made).model_validate(made.model_dump()) == made
    assert made.certain_rounds == params.train_cam.certain_rounds
    one = choices._epochs(own.model_copy(update={"train_cam": update["train_cam"]}), images)
    assert {choice.name.partition(".")[0] for choice in one} == {"train_cam"}


def test_epochs_of_a_trained_method_stand_with_their_reason(photos, tmp_path):
    wanted = ["train_cam.method=deeplabcam", "train_segmenter.method=deeplabv3"]
    made = make(tmp_path, photos[False], settings=[*wanted, "train_segmenter.epochs=7"])
    params, lines = made.params, "\n".join(made.lines())
    assert (params.train_cam.epochs, params.train_segmenter.epochs) == (100, 7)
    assert "train_cam.epochs" in lines and "1 steps an epoch: 700 steps" in lines
    assert not any("features" in choice.name for choice in made.choices), "of method frozen"
    # Of another preset they are a part.
    tiny = make(tmp_path, photos[False], preset="tiny").params
    assert tiny.train_cam.epochs == preset.parameters("tiny").train_cam.epochs


def test_what_is_chosen_depends_on_what_was_set(photos, tmp_path):
    params = make(tmp_path, photos[False], settings=["prepare.val_fraction=0"]).params
    assert params.train_cam.eval_split == "none"
    assert params.export_cams.splits == params.train_segmenter.eval_splits == ("train",)


def test_weights_are_a_file_that_is_there_else_timm_s(photos, tmp_path):
    path = tmp_path / "shared/weights/tf_efficientnet_lite2.in1k.safetensors"
    made = make(tmp_path, photos[False])
    assert made.params.train_cam.weights == made.params.train_segmenter.weights == "imagenet"
    assert "without a network" in "\n".join(made.lines())
    path.parent.mkdir(parents=True)
    path.touch()
    assert make(tmp_path, photos[False]).params.train_cam.weights == str(path)
    own = make(tmp_path, photos[False], weights=str(path), encoder="test_resnet").params
    assert (own.train_segmenter.encoder, own.train_cam.weights) == ("test_resnet", str(path))
    assert make(tmp_path, photos[False], weights="none").params.train_cam.weights == "none"


def test_settings_come_last_and_the_preset_first(photos, tmp_path):
    settings = ["train_cam.frozen.rounds=1", "export_cams.splits=[train]", "label_sets=[]"]
    settings.append("train_cam.encoder=test_resnet")
    made = make(tmp_path, photos[False], settings=settings)
    params, names = made.params, [choice.name for choice in made.choices]
    assert len(names) == len(set(names)), "each is told once"
    assert params.train_cam.frozen.rounds == 1 and params.export_cams.splits == ("train",)
    assert params.label_sets == ()
    tiny = make(tmp_path, photos[False], preset="tiny").params
    assert tiny.train_cam.method == "deeplabcam" and tiny.prepare.source == "folder"
    # Without images the data are the preset's.
    assert make(tmp_path, None, preset="tiny").params.prepare.source == "shapes"


def test_thresholds_of_trained_cams_are_not_those_of_heads(photos, tmp_path):
    frozen = make(tmp_path, photos[False]).params
    assert (frozen.train_cam.threshold, frozen.random_walk.threshold) == (0.5, 0.5)
    params = make(tmp_path, photos[False], settings=["train_cam.method=deeplabcam"]).params
    sections = (params.train_cam, params.export_cams, params.evaluate)
    assert [section.threshold for section in sections] == ["auto"] * 3
    assert params.random_walk.threshold == 0.3


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"images": "nowhere"}, "--images: .*nowhere does not exist"),
        ({"labels": "nowhere.csv"}, "--labels: .*nowhere.csv does not exist"),
        ({"weights": "nowhere.safetensors"}, "--weights: no file"),
        ({"settings": ["train_cam.seed"]}, "NAME=VALUE"),
        ({"settings": ["train_cam.sead=1"]}, "sead.*did you mean seed"),
        ({"settings": ["train_cam.seed=[1"]}, "NAME=VALUE"),
        ({"settings": ["a." * 5000 + "b=1"]}, "NAME=VALUE"),
        ({"preset": "tony"}, "unknown preset tony"),
    ],
)
def test_wrong_wishes_are_one_line(wishes, expected, photos, tmp_path):
    paths = {k: tmp_path / v if k in ("images", "labels") else v for k, v in wishes.items()}
    with pytest.raises(UserError, match=expected) as error:
        make(tmp_path, **{"images": photos[False], **paths})
    assert "\n" not in str(error.value)


def test_a_label_file_beside_the_images_is_named(tmp_path):
    photos, beside = put(tmp_path / "my photos.v2", 12), tmp_path / "my photos.v2.csv"
    assert make(tmp_path, photos).params.prepare.labels == "auto"
    (photos / "labels.csv").rename(beside)
    made = make(tmp_path, photos)
    assert made.params.prepare.labels == str(beside)
    (choice,) = (choice for choice in made.choices if choice.name == "prepare.labels")
    assert choice.why == "found beside the folder of the images"


@pytest.mark.parametrize(
    ("there", "given", "refused"),
    [
        (["masks"], "masks", None),
        (["SegmentationClass"], "SegmentationClass", None),
        (["masks", "SegmentationClass"], "SegmentationClass", "move masks away$"),
        (["masks"], "../drawn", "not from .*drawn; move masks away, and link yours: ln -s"),
        ([], "../drawn", "move them there, or link them: ln -s .*drawn .*/masks"),
    ],
)
def test_masks_are_those_that_were_given_or_refused(there, given, refused, tmp_path):
    assert choices.MASKS == source._MASKS
    photos = put(tmp_path / "photos", 12, masks=True)
    (photos / "masks").rename(tmp_path / "drawn")
    for name in there:
        shutil.copytree(tmp_path / "drawn", photos / name)
    if not refused:
        made = make(tmp_path, photos, masks=photos / given)
        assert "12 masks" in made.lines()[0]
        return
    with pytest.raises(UserError, match=refused) as error:
        make(tmp_path, photos, masks=photos / given)
    assert "\n" not in str(error.value)


def test_masks_elsewhere_are_read_by_a_link(tmp_path):
    photos = put(tmp_path / "photos", 12, masks=True)
    (photos / "masks").rename(tmp_path / "drawn")
    (photos / "masks").symlink_to(tmp_path / "drawn")
    assert "12 masks" in make(tmp_path, photos, masks=tmp_path / "drawn").lines()[0]


def test_faults_of_the_lists_are_told_and_left_to_prepare(tmp_path):
    photos = put(tmp_path / "photos", 12)
    (photos / "images/photo_03.jpg").unlink()
    Image.new("RGB", (8, 8)).save(photos / "images/photo_02.jpg")
    lines = make(tmp_path, photos).lines()
    assert "photo_03.jpg" in lines[1] and "1 problem" in lines[1] and "dvc repro" in lines[1]
    assert "8x8 to 96x96 pixels" in lines[0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [(["z.jpg,a"], "of 12: labels.csv line 2: z.jpg is missing"), ([], "names no image")],
)
def test_images_without_any_label_are_refused_with_the_reason(photos, tmp_path, rows, words):
    shutil.copytree(photos[False], tmp_path / "own")
    (tmp_path / "own/labels.csv").write_text("\n".join(["image,labels", *rows, ""]))
    with pytest.raises(UserError, match=words):
        make(tmp_path, tmp_path / "own")
