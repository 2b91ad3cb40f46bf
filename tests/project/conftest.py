"""What tests of projects share."""

import pytest


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine without a GPU and without weights at hand."""
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    monkeypatch.setenv("ISIM_SHARED", str(tmp_path / "shared"))
