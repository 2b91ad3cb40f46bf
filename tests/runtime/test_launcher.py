"""The environment says how many processes a command has."""

import signal

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


@pytest.mark.parametrize("ignored", [False, True])
def test_what_nohup_has_ignored_stays_so(monkeypatch, ignored):
    """Torchrun would listen, and end hours of training when the terminal is closed."""
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    given = []
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    monkeypatch.setattr("torch.distributed.run.run", given.append)
    monkeypatch.setattr(launcher.ending, "allow", lambda seconds: None)
    monkeypatch.setattr(launcher.logging, "disable", lambda level: None)
    with pytest.raises(SystemExit):
        launcher.launch(["--standalone"], ["evaluate"])
    assert ("SIGHUP" in given[0].signals_to_handle) != ignored
