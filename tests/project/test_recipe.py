"""The README's recipe, word for word: outside of the clone, by what is installed, to the end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import installs
from support.photos import put
from support.projects import read_report

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().partition("\n## Your own images\n")[2]
RECIPE = re.search(r"(?:^    .*\n)+", SECTION, re.M)[0].splitlines()
COMMANDS = [line.partition(" #")[0].strip() for line in RECIPE]
ENCODER = "tf_efficientnet_lite2.in1k"
# What the masks of a second project change.
WITH_MASKS = "dvc repro evaluate train_segmenter@labels1"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Variables of a shell in which a wheel of this isim is installed, built without a network."""
    base = tmp_path_factory.mktemp("installed")
    built = installs.wheel(base)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    target = base / "site"
    subprocess.run([*pip, "--target", target, built], check=True)
    shutil.rmtree(base / "isim")
    # In the place of timm's download; a person without a network does the same.
    weights = base / f"shared/weights/{ENCODER}.safetensors"
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(timm.create_model(ENCODER.partition(".")[0]).state_dict(), weights)
    paths = (target / "bin", Path(sys.executable).parent, os.environ["PATH"])
    return installs.environment(
        base / "dvc",
        PATH=os.pathsep.join(map(str, paths)),
        PYTHONPATH=str(target),
        ISIM_SHARED=str(base / "shared"),
    )


@pytest.fixture(scope="module")
def run(installed):
    """A function that runs lines in a shell, in a folder: exit code, all that they print."""

    def call(folder, *lines):
        done = subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            cwd=folder,
            env=installed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A folder after the recipe, and what it printed; photographs without masks, tags beside."""
    base = tmp_path_factory.mktemp("person")
    put(base / "made", 18, tags="../tags.csv")
    (base / "made/images").rename(base / "photos")
    shutil.copytree(base / "photos", base / "new_photos")
    for path in sorted((base / "new_photos").iterdir())[2:]:
        path.unlink()
    code, printed = run(base, *COMMANDS[1:])
    assert code == 0, printed
    return base, printed


@pytest.fixture(scope="module")
def beside(run, finished):
    """A second project in the same folder, with masks, by the same commands and fewer steps."""
    base, _ = finished
    photos = put(base / "more", 12, masks=True)
    few = "train_cam.frozen.rounds=1 train_cam.frozen.head.steps=20 train_segmenter.head.steps=20"
    lines = [f"isim init berries {few} --images more", "cd berries", WITH_MASKS, "isim results"]
    code, printed = run(base, *lines)
    assert code == 0, printed
    return photos, base / "berries", printed


def status(run, project):
    """Stages that DVC would run again, with why."""
    code, printed = run(project, "dvc status --json")
    assert code == 0, printed
    return json.loads(printed)


def test_the_recipe_begins_with_the_installation_of_this_package():
    assert COMMANDS[0].startswith("pip install") and COMMANDS[1].startswith("isim init")
    assert len(COMMANDS) < 10 and "dvc repro" in COMMANDS


def test_the_recipe_runs_to_the_end_without_masks(finished):
    base, printed = finished
    project = base / "fruit"
    for words in ("18 images", "0 masks", "train_cam.encoder", "the file is there", "plan, from"):
        assert words in printed, printed
    assert "no plan" not in printed and "Traceback" not in printed
    rounds = [path.name for path in sorted((project / "data/pseudo_labels").iterdir())]
    assert rounds == ["round_01", "round_02", "round_03"]
    prepared = json.loads((project / "data/prepared/dataset.json").read_text())
    trained = prepared["splits"]["train"]
    assert len(list((project / "data/pseudo_labels/round_03").glob("*.png"))) == trained
    assert (project / "models/train_segmenter/last_round/model.safetensors").exists()
    assert len(list((project / "data/masks").glob("*.png"))) == 18
    assert (project / "reports/index.html").exists()
    assert len(list((project / "masks").glob("*.png"))) == 2, "of new_photos"
    exported = json.loads((project / "coco.json").read_text())
    assert len(exported["images"]) == 18 and exported["annotations"]
    assert not (project / "photos").exists() and not (project / "images").exists()


def test_git_keeps_parameters_and_figures_and_no_result(run, finished):
    project = finished[0] / "fruit"
    code, printed = run(project, "git add .", "git diff --cached --name-only")
    assert code == 0
    names = {line for line in printed.splitlines() if not line.startswith(".dvc/")}
    ours = {"params.yaml", "dvc.yaml", "dvc.lock", "isim.lock", "README.md"}
    # What the person has asked for by name.
    names -= {name for name in names if name == "coco.json" or name.startswith("masks/")}
    figures = {name for name in names if re.fullmatch(r"reports/.*/metrics\.json", name)}
    assert names - figures == ours | {".gitignore", ".dvcignore"} and len(figures) > 5


def test_the_recipe_runs_with_masks_beside_another_project(beside, finished):
    _, project, printed = beside
    assert "12 masks" in printed and "ground_truth" in printed
    report = read_report(project, "train_cam")
    assert report["scored_images"] > 0 and report["rounds"] == 1
    assert (project / "models/train_segmenter/ground_truth/model.safetensors").exists()
    assert (finished[0] / "fruit/dvc.lock").exists()


def test_a_second_repro_runs_nothing_in_either(run, finished, beside):
    for project, repro in ((finished[0] / "fruit", "dvc repro"), (beside[1], WITH_MASKS)):
        code, printed = run(project, repro)
        assert code == 0 and "Running stage" not in printed, printed
    assert status(run, finished[0] / "fruit") == {}


def test_an_edited_label_a_replaced_image_and_an_added_one_are_noticed(run, finished):
    base, _ = finished
    project, tags = base / "fruit", base / "tags.csv"
    image, added = base / "photos/photo_03.jpg", base / "photos/photo_99.jpg"
    kept = {path: path.read_bytes() for path in (tags, image)}

    def noticed():
        return [str(found) for found in status(run, project).get("prepare", [])]

    tags.write_text(tags.read_text().replace("photo_03.jpg,", "photo_03.jpg,fox;"))
    assert "tags.csv" in noticed()[0]
    code, printed = run(project, "dvc repro prepare")
    assert code == 0 and "Running stage 'prepare'" in printed, printed
    assert "train_cam" in status(run, project)
    tags.write_bytes(kept[tags])
    Image.open(image).rotate(90).save(image)
    assert "photos" in noticed()[0]
    image.write_bytes(kept[image])
    shutil.copy(image, added)
    assert "photos" in noticed()[0]
    added.unlink()
    # As it was, nothing is left to do: DVC takes it from its cache.
    code, printed = run(project, "dvc repro")
    assert code == 0 and "Running stage" not in printed, printed


def test_a_changed_mask_is_noticed(run, beside):
    photos, project, _ = beside
    mask = photos / "masks/photo_03.png"
    kept = mask.read_bytes()
    assert "prepare" not in status(run, project)
    Image.open(mask).rotate(180).save(mask)
    assert "prepare" in status(run, project)
    mask.write_bytes(kept)
    assert "prepare" not in status(run, project)


def test_another_isim_is_refused_until_an_upgrade(run, finished):
    project = finished[0] / "fruit"
    path = project / "isim.lock"
    kept = path.read_text()
    path.write_text(re.sub(r"code: .*", "code: other", kept))
    code, printed = run(project, "isim prepare")
    assert code == 2 and printed.count("\n") == 1 and "isim upgrade" in printed
    assert {*status(run, project)} >= {"prepare", "train_cam", "evaluate"}
    code, printed = run(project, "isim upgrade")
    assert code == 0 and "other" in printed and path.read_text() == kept
    assert status(run, project) == {}


def test_a_project_is_not_made_twice(run, finished):
    base, _ = finished
    before = (base / "fruit/params.yaml").read_bytes()
    code, printed = run(base, COMMANDS[1])
    assert code == 2 and printed.count("\n") == 1 and "already has a params.yaml" in printed
    assert (base / "fruit/params.yaml").read_bytes() == before
