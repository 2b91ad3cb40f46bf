"""Compiling kernels: once, kept, and one line where it cannot be done."""

import subprocess
import sys

import pytest

from isim import compiled


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """An empty folder of sources and an empty cache."""
    monkeypatch.setattr(compiled, "SOURCES", tmp_path)
    monkeypatch.setenv("ISIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    compiled.library.cache_clear()
    yield tmp_path
    compiled.library.cache_clear()


def answer(folder, value):
    text = f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {value}; }}'
    (folder / "trial.cpp").write_text(text)


def test_a_kernel_is_compiled_once_and_anew_when_its_source_changes(sources):
    answer(sources, 1)
    assert compiled.library("trial").answer() == 1
    (built,) = (sources / "cache").glob("*.so")
    before = built.stat().st_mtime_ns

    compiled.library.cache_clear()
    assert compiled.library("trial").answer() == 1
    assert built.stat().st_mtime_ns == before

    compiled.library.cache_clear()
    answer(sources, 2)
    assert compiled.library("trial").answer() == 2
    assert len(list((sources / "cache").glob("*.so"))) == 2


def test_processes_that_need_it_at_once_compile_it_once(sources, monkeypatch):
    answer(sources, 3)
    # Stands for the compiler, and leaves a line a compilation.
    wrapper = sources / "counting-g++"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo once >> {sources}/calls;; esac\n'
        'exec g++ "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    code = (
        "import pathlib, sys; from isim import compiled;"
        f"compiled.SOURCES = pathlib.Path({str(sources)!r});"
        "sys.exit(compiled.library('trial').answer() != 3)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (sources / "calls").read_text() == "once\n"


def test_without_a_compiler_the_reason_is_given(sources, monkeypatch):
    answer(sources, 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(compiled.Unavailable, match="no-such-compiler.*install g\\+\\+ or set CXX"):
        compiled.library("trial")


def test_without_a_home_folder_the_reason_is_given(sources, monkeypatch):
    answer(sources, 1)
    for name in ("ISIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    with pytest.raises(compiled.Unavailable, match="home directory.*set ISIM_CACHE"):
        compiled.library("trial")


def test_the_first_complaint_of_the_compiler_is_given(sources):
    (sources / "trial.cpp").write_text("int answer( { }")
    with pytest.raises(compiled.Unavailable, match="trial.cpp.*error"):
        compiled.library("trial")
    assert not list((sources / "cache").glob("*.so"))
