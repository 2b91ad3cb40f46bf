"""Paths as parameters write them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.errors import UserError
from isim.runtime.paths import home, resolve_path


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("DVC_ROOT", "ISIM_DATA", "ISIM_SHARED"):
        monkeypatch.delenv(name, raising=False)


def test_paths_have_defaults_and_follow_the_environment(monkeypatch, tmp_path):
    assert resolve_path("$ISIM_DATA", tmp_path) == tmp_path / "data/raw"
    assert resolve_path("${ISIM_SHARED}/w", tmp_path) == tmp_path.parent / "shared/w"
    monkeypatch.setenv("ISIM_DATA", str(tmp_path / "elsewhere"))
    assert resolve_path("$ISIM_DATA/voc", Path("/nowhere")) == tmp_path / "elsewhere/voc"


def test_paths_are_anchored_on_the_repository_of_dvc(monkeypatch, tmp_path):
    """`dvc exp run --temp` works in a copy: DVC_ROOT names the repository."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert home(Path("/copy")) == tmp_path
    assert resolve_path("mine", Path("/copy")) == tmp_path / "mine"


def test_an_unset_variable_in_a_path_is_an_error(tmp_path):
    for text in ("$ISIM_NO_SUCH_VARIABLE/x", "a$/b"):
        with pytest.raises(UserError, match="not set"):
            resolve_path(text, tmp_path)


def test_an_address_is_no_path_and_its_password_not_told(tmp_path):
    with pytest.raises(UserError, match="is an address, no path; fetch") as caught:
        resolve_path("https://me:hidd3n@host/x.safetensors", tmp_path)
    assert "hidd3n" not in str(caught.value)


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20))
def test_a_plain_relative_path_stays_below_the_home(name):
    root = Path(__file__).parent
    assert resolve_path(name, root).parent == home(root)
