"""The environment says how many processes a command has."""

import pytest

from isim.errors import UserError
from isim.runtime import launcher


@pytest.mark.parametrize(
    ("count", "others", "expected"),
    [
        (None, None, []),
        ("1", None, []),
        ("4", None, ["--standalone", "--nproc-per-node", "4"]),
        (None, "--nnodes 2 --rdzv-id 'a b'", ["--nnodes", "2", "--rdzv-id", "a b"]),
        ("8", "--nnodes 2", ["--nnodes", "2", "--nproc-per-node", "8"]),
    ],
)
def test_the_environment_says_how_many_processes(monkeypatch, count, others, expected):
    for name, value in (("ISIM_PROCESSES", count), ("ISIM_TORCHRUN", others)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launcher.options() == expected


def test_wrong_settings_are_named(monkeypatch):
    for value in ("0", "two", ""):
        monkeypatch.setenv("ISIM_PROCESSES", value)
        with pytest.raises(UserError, match="ISIM_PROCESSES"):
            launcher.options()
    with pytest.raises(UserError, match="ISIM_TORCHRUN: unrecognized arguments: --bogus"):
        launcher.launch(["--bogus"], ["evaluate"])


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ("--nproc-per-node=99999999", "99999999 processes, more than 1024"),
        ("; rm -rf x", "; is no option"),
        ("script.py", r"script\.py is no option"),
    ],
)
def test_settings_that_torchrun_would_take_are_bounded(monkeypatch, others, words):
    monkeypatch.setenv("ISIM_TORCHRUN", others)
    with pytest.raises(UserError, match=f"ISIM_TORCHRUN: {words}"):
        launcher.launch(launcher.options(), ["export-cams"])
