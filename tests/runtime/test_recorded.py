"""What a stage has read is compared with what DVC will record of it."""

import pytest

from isim.errors import UserError
from isim.runtime import identity, recorded


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Makes a project, whose stage `evaluate` runs under DVC."""
    monkeypatch.setenv("DVC_STAGE", "sub/dvc.yaml:evaluate@labels0")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {evaluate: {params: [evaluate, masks.size], deps: [data/prepared/list, cams]}}"
    )
    write(tmp_path / "params.yaml", "evaluate: {steps: 1}\nmasks: {size: 1, other: 1}")
    for name in ("data/prepared/list", "data/prepared/other", "cams/a", "masks/a"):
        write(tmp_path / name, "old")
    yield tmp_path
    recorded.forget()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def reads_of(root):
    names = {"prepared": "data/prepared", "cam": "cams/a", "masks 1": "masks", "gone": "cams/b"}
    return {name: root / path for name, path in names.items()}


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("params.yaml", "evaluate: {steps: 2}\nmasks: {size: 1}", "evaluate.steps in params.yaml"),
        ("params.yaml", "masks: {size: 2}", "evaluate.steps in params.yaml and 1 more changed"),
        ("params.yaml", "evaluate: {steps: 1}\nmasks: {size: 1, other: 2}", ""),
        ("data/prepared/other", "new", "data/prepared changed"),
        ("cams/a", "new", "cams/a changed"),
        ("cams/a", "old", ""),
        ("cams/b", "new", "cams/b changed"),
        ("cams/c", "new", ""),
        ("masks/a", "new", ""),
    ],
)
def test_what_dvc_records_must_be_as_it_was_read(project, path, text, words):
    before = recorded.of_stage(project, reads_of(project))
    hashes = identity.of_inputs(reads_of(project))
    before.require_same(hashes)
    write(project / path, text)
    if words:
        with pytest.raises(UserError, match=words):
            before.require_same(hashes)
    else:
        before.require_same(hashes)


def test_parameters_are_compared_with_those_that_were_read(project):
    """Libraries and networks are loaded in between."""
    recorded.remember(project)
    write(project / "params.yaml", "evaluate: {steps: 2}\nmasks: {size: 1}")
    with pytest.raises(UserError, match=r"evaluate\.steps in params\.yaml changed while"):
        recorded.of_stage(project, {}).require_same({})
    recorded.forget()
    recorded.of_stage(project, {}).require_same({})


def test_without_dvc_nothing_is_recorded(project, monkeypatch):
    monkeypatch.delenv("DVC_STAGE")
    recorded.remember(project)
    assert recorded.of_stage(project, reads_of(project)) is None
