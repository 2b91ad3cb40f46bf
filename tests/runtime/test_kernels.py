"""Compiling kernels: once, kept, and one line where it cannot be done."""

import os
import subprocess
import sys

import pytest

from isim.errors import UserError
from isim.runtime import identity, kernels


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """A function that writes a kernel `trial` with a result; the cache is `tmp_path`."""
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    monkeypatch.setenv("ISIM_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    def write(value):
        body = f"int answer() {{ return {value}; }}"
        (tmp_path / "trial").mkdir(exist_ok=True)
        (tmp_path / "trial/kernel.cpp").write_text(
            f'extern "C" __attribute__((visibility("default"))) {body}'
        )
        kernels.library.cache_clear()

    yield write
    kernels.library.cache_clear()
    kernels.available.cache_clear()


@pytest.mark.filterwarnings("error")
def test_a_kernel_is_compiled_once_and_anew_when_its_source_changes(answer, tmp_path):
    answer(1)
    assert kernels.library("trial").answer() == 1 and kernels.available("trial", "is slow")
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    answer(1)
    assert kernels.library("trial").answer() == 1 and built.stat().st_mtime_ns == before
    answer(2)
    assert kernels.library("trial").answer() == 2 and len(list(tmp_path.rglob("*.so"))) == 2


def test_processes_that_need_it_at_once_compile_it_once(answer, tmp_path, monkeypatch):
    answer(3)
    # Stands for the compiler, and leaves a line a compilation.
    wrapper = tmp_path / "counting-g++"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-E*) ;; *) echo once >> {tmp_path}/calls;; esac\nexec g++ "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    code = (
        "import pathlib, sys; from isim.runtime import kernels;"
        f"kernels.SOURCES = pathlib.Path({str(tmp_path)!r});"
        "sys.exit(kernels.library('trial').answer() != 3)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "once\n"


LOAD = (
    "import pathlib, sys; from isim.runtime import kernels;"
    "kernels.SOURCES = pathlib.Path(sys.argv[1]);"
    "sys.exit(kernels.library('trial').answer())"
)


def load(folder):
    """Exit code of a process that loads the kernel: its answer, or how it died."""
    return subprocess.run([sys.executable, "-c", LOAD, folder]).returncode


def cut(share):
    def damage(built):
        os.truncate(built, int(built.stat().st_size * share))

    return damage


def plant(built):
    """Put a kernel there, whole, that answers otherwise."""
    source = built.with_suffix(".cpp")
    source.write_text('extern "C" int answer() { return 66; }')
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", built], check=True)


def plant_with_checksum(built):
    plant(built)
    built.with_suffix(".sha256").write_text(identity.sha256(built.read_bytes()))
    built.chmod(0o777)


def plant_link(built):
    other = built.with_name("other.so")
    built.rename(other)
    plant(other)
    built.symlink_to(other)
    built.with_suffix(".sha256").write_text(identity.sha256(other.read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        *map(cut, (0, 0.01, 0.3, 0.7, 0.99)),
        plant,
        plant_with_checksum,
        plant_link,
        lambda built: built.with_suffix(".sha256").unlink(),
        lambda built: built.with_suffix(".sha256").write_bytes(b"\xff"),
        lambda built: built.chmod(0o720),
    ],
)
def test_a_damaged_or_planted_kernel_is_compiled_anew_and_never_loaded(damage, answer, tmp_path):
    answer(7)
    assert load(tmp_path) == 7
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    damage(built)
    assert load(tmp_path) == 7
    assert built.stat().st_mtime_ns != before and not built.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_kernels_of_another_user_are_not_loaded(answer, tmp_path):
    answer(7)
    assert load(tmp_path) == 7
    (built,) = tmp_path.rglob("*.so")
    plant(built)
    built.with_suffix(".sha256").write_text(identity.sha256(built.read_bytes()))
    os.chown(built, 12345, -1)
    assert load(tmp_path) == 7
    os.chown(built.parent, 12345, -1)
    with pytest.raises(kernels.Unavailable, match="belongs to another user"):
        kernels.library("trial")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_kernels_are_this_users_alone_whatever_the_umask(umask, answer, tmp_path, monkeypatch):
    answer(7)
    cache = tmp_path / "deep/cache"
    monkeypatch.setenv("ISIM_CACHE", str(cache))
    before = os.umask(umask)
    try:
        assert load(tmp_path) == 7
        (cache / "kernels").chmod(0o777)
        cache.chmod(0o1777)
        assert load(tmp_path) == 7
    finally:
        os.umask(before)
    modes = [path.stat().st_mode for path in (cache / "kernels", *cache.rglob("*.s*"))]
    assert len(modes) == 3 and not any(mode & 0o022 for mode in modes)
    assert cache.stat().st_mode & 0o7777 == 0o1777, "that of all caches is the user's"


def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


def no_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ISIM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)


@pytest.mark.parametrize(
    ("value", "prepare", "reason"),
    [
        ("1;;}; int other( {", lambda _: None, r"trial/kernel\.cpp: .*error"),
        ("1", no_compiler, r"no-such-compiler.*install g\+\+ or set CXX"),
        ("1", no_home, r"home directory.*set ISIM_CACHE"),
    ],
)
def test_without_a_kernel_the_reason_is_given_once(
    value, prepare, reason, answer, tmp_path, monkeypatch
):
    answer(value)
    prepare(monkeypatch)
    with pytest.raises(kernels.Unavailable, match=reason):
        kernels.library("trial")
    with pytest.warns(UserWarning, match=f"numpy is slow: .*{reason}") as caught:
        assert not any(kernels.available("trial", "numpy is slow") for _ in range(3))
    assert len(caught) == 1 and not list(tmp_path.rglob("*.so"))


def test_the_dense_crf_is_computed_by_what_is_asked_for(monkeypatch):
    for given in ("", *kernels.CRF_BACKENDS):
        monkeypatch.setenv("ISIM_CRF", given)
        assert kernels.crf_backend() == (given or "auto")
    monkeypatch.setenv("ISIM_CRF", "gpu")
    told = "^ISIM_CRF: there is no 'gpu'; use auto, pydensecrf, compiled, torch$"
    with pytest.raises(UserError, match=told):
        kernels.crf_backend()
