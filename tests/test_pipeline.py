"""The real pipeline under DVC and MLflow: preset `tiny` in a repository of its own."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support import installs

from isim.experiments import overlay, preset

ROOT = Path(__file__).parent.parent
PIPELINE = overlay.plain((ROOT / "dvc.yaml").read_text())
LABEL_SETS = [entry.name for entry in preset.parameters("tiny").label_sets]
SEGMENTERS = [f"train_segmenter@labels{place}" for place in range(len(LABEL_SETS))]
STAGES = [
    stage
    for name in PIPELINE["stages"]
    for stage in (SEGMENTERS if name == "train_segmenter" else [name])
]
# The segmenter of the ground truth does not depend on the training.
CEILING = SEGMENTERS[LABEL_SETS.index("ground_truth")]
AFTER_TRAINING = [stage for stage in STAGES[1:] if stage != CEILING]


def run(folder, *command, **changes):
    """Standard output of a command that must succeed, free of the caller's settings."""
    # The code that is run is the code that DVC sees, as in a clone that was installed.
    own = {"PYTHONPATH": str(folder), "ISIM_WORKERS": "0"} | changes
    environment = installs.environment(folder.parent / "dvc_state", **own)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commit(folder, message):
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", message)


def stages_run(output):
    return [stage for stage in STAGES if f"Running stage '{stage}'" in output]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A repository like a fresh clone of this one, with preset `tiny` run and committed."""
    folder = tmp_path_factory.mktemp("pipeline") / "project"
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        # A listed file can be deleted in the working tree.
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "config", "user.name", "Tester")
    run(folder, "git", "config", "user.email", "tester@example.org")
    run(folder, "isim", "preset", "tiny")
    commit(folder, "Start")
    assert stages_run(run(folder, "dvc", "repro")) == STAGES
    commit(folder, "Run tiny")
    return folder


@pytest.fixture
def project(finished):
    """The finished repository, whatever the test before left behind."""
    run(finished, "git", "checkout", "--quiet", "--", ".")
    run(finished, "dvc", "checkout", "--force", "--quiet")
    return finished


def test_a_run_leaves_a_clean_tree_and_the_result_table(project):
    assert run(project, "git", "status", "--porcelain") == ""
    table = run(project, "isim", "results")
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows if len(row) == 6 and row[0].isdigit()] == ["1", "2"]
    assert {"train", "val"} <= {row[0] for row in rows if row}
    assert {*LABEL_SETS} <= {row[0] for row in rows if row}
    for place in ("reports/", "data/pseudo_labels/", "make ui"):
        assert place in table


def test_a_second_repro_runs_nothing(project):
    assert stages_run(run(project, "dvc", "repro")) == []


def test_an_edited_file_runs_the_stages_again_that_need_it_and_no_other(project):
    def changed(*files):
        before = {project / file: (project / file).read_text() for file in files}
        for path, text in before.items():
            path.write_text(f"{text}# An edit.\n")
        status = json.loads(run(project, "dvc", "status", "--json"))
        for path, text in before.items():
            path.write_text(text)
        return [stage for stage in STAGES if stage in status]

    # Label maps are scored without a network.
    scored = ("prepare", "evaluate", "report")
    assert changed("isim/models/unet.py") == [name for name in STAGES if name not in scored]
    assert changed("isim/stages/evaluate.py") == ["evaluate"]
    assert changed("isim/data/sources/voc.py") == ["prepare"]
    assert changed("isim/cli.py", "isim/reporting/plots.py", "isim/experiments/paper.yaml") == []


def test_all_plots_are_drawn(project):
    run(project, "dvc", "plots", "show")
    page = (project / "dvc_plots/index.html").read_text()
    for plot in PIPELINE["plots"]:
        assert next(iter(plot.values()))["title"] in page


def test_push_then_pull_one_round_then_everything_elsewhere(project):
    run(project, "dvc", "push", "--run-cache")
    clone = project.parent / "clone"
    run(project, "git", "clone", "--quiet", str(project), str(clone))
    remote = str(project / "dvc-remote")
    run(clone, "dvc", "remote", "modify", "--local", "local", "url", remote)

    run(clone, "dvc", "pull", "data/pseudo_labels/round_02")
    labels = sorted(path.name for path in (project / "data/pseudo_labels/round_02").iterdir())
    assert len(labels) > 1
    pulled = [path for path in (clone / "data").glob("*/**/*") if path.is_file()]
    assert sorted(path.name for path in pulled) == labels
    assert {path.parent for path in pulled} == {clone / "data/pseudo_labels/round_02"}
    assert [path.name for path in (clone / "models").iterdir()] == ["README.md"]

    run(clone, "dvc", "pull")
    assert stages_run(run(clone, "dvc", "repro")) == []
    assert run(clone, "git", "status", "--porcelain") == ""
    for name in ("data/cams/val", "data/pseudo_labels/round_01", "models/train_cam"):
        here, there = ([p.name for p in sorted((f / name).iterdir())] for f in (project, clone))
        assert here == there != []


def test_experiments_keep_their_results_and_runs_and_going_back_runs_nothing(project, monkeypatch):
    lock = (project / "dvc.lock").read_text()

    # Half the rounds, too: what is trained on the last one must not miss the others.
    changes = ("-S", "train_cam.seed=1", "-S", "train_cam.round_every=2")
    done = run(project, "dvc", "exp", "run", "--name", "other-seed", *changes)
    assert stages_run(done) == AFTER_TRAINING
    assert [path.name for path in (project / "data/pseudo_labels").iterdir()] == ["round_01"]
    assert (project / "dvc.lock").read_text() != lock

    run(project, "isim", "preset", "tiny")
    back = run(project, "dvc", "repro")
    assert stages_run(back) == []
    assert back.count("is cached - skipping run") == len(AFTER_TRAINING)
    assert (project / "dvc.lock").read_text() == lock
    assert run(project, "git", "status", "--porcelain") == "", "figures are the first run's again"

    options = ("--temp", "--name", "in-a-copy", "-S", "evaluate.threshold=0.45")
    done = run(project, "dvc", "exp", "run", *options, ISIM_PROCESSES="2")
    assert stages_run(done) == ["evaluate", "report"]
    assert run(project, "git", "status", "--porcelain") == "", "the copy leaves this tree alone"

    names = run(project, "dvc", "exp", "list", "--name-only").split()
    assert sorted(names) == ["in-a-copy", "other-seed"]
    figures = run(project, "dvc", "exp", "show", "--csv")
    assert all(name in figures for name in names)
    # Set before the import, which would start to send usage figures.
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    check_tracking(project)


def check_tracking(project):
    """Every execution is one parent run with a child a stage that ran, in one database."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("isim")
    assert experiment.artifact_location == (project / "mlartifacts").as_uri()
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    runs = [run for run in runs if run.data.tags["stage"] != "pictures"]
    parents = {run.info.run_id: run for run in runs if run.data.tags["stage"] == "pipeline"}
    children: dict[str, list[str]] = {}
    for child in runs:
        if child.info.run_id not in parents:
            parent = parents[child.data.tags["mlflow.parentRunId"]]
            name = parent.data.tags["isim.pipeline"]
            children.setdefault(name, []).append(child.data.tags["stage"])
    assert sorted(children.pop("other-seed")) == sorted(
        name.split("@")[0] for name in AFTER_TRAINING
    )
    assert sorted(children.pop("in-a-copy")) == ["evaluate", "report"]
    (first,) = children.values()
    assert sorted(first) == sorted(stage.split("@")[0] for stage in STAGES)
    names = {run.data.tags.get("label_set") for run in runs}
    assert names == {None, *LABEL_SETS}


def test_an_affinity_without_training_skips_train_affinity(project):
    path = project / "params.yaml"
    kept, network = path.read_text(), project / "models/train_affinity/model.safetensors"
    assert kept.count("  affinity: net\n") == 1 and network.exists()
    path.write_text(kept.replace("  affinity: net\n", "  affinity: cosine\n"))
    done = run(project, "dvc", "repro", "random_walk")
    assert stages_run(done) == ["train_affinity", "random_walk"]
    assert "train_affinity: skipped, as random_walk.affinity is cosine" in done
    assert not network.exists()
    assert "random walk" in run(project, "isim", "results")
    path.write_text(kept)
    assert stages_run(run(project, "dvc", "repro", "random_walk")) == []
    assert network.exists(), "it comes from the cache"
