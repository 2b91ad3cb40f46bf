"""C++ kernels of `isim/labels`: compiled once a machine, kept, and called without the GIL."""

import ctypes
import functools
import os
import shlex
import stat
import subprocess
import warnings
from pathlib import Path

from filelock import FileLock

from isim.errors import UserError
from isim.runtime import identity, paths
from isim.runtime.atomic import atomic_path

SOURCES = Path(__file__).parent.parent / "labels"
# The parts of -ffast-math that the kernels profit from and that keep the order of operations. Not
# the flag itself: with it a shared library makes the whole process round tiny numbers to zero.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"),
)
# Modes of a file that group or others can write.
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
CRF_BACKENDS = ("auto", "pydensecrf", "compiled", "torch")


class Unavailable(Exception):
    """A kernel that cannot be had here; the message says why, in one line."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Load `isim/labels/<name>/kernel.cpp`, compiling it if this machine has not done so yet.

    The library is kept below `$ISIM_CACHE`, else `$XDG_CACHE_HOME/isim` or `~/.cache/isim`, under
    a digest of its source, the compiler and the processor, with its checksum beside it: one that
    is not whole, or not this user's alone, is compiled anew. Several processes that need it at once
    compile it once. ctypes calls release the GIL: kernels run side by side in threads. Raises
    Unavailable when there is no C++ compiler, or it fails, or no folder can be written, or others
    can write there.
    """
    source = SOURCES / name / "kernel.cpp"
    compiler = paths.words_of("CXX", "g++")
    built = _cache() / f"{name}-{_digest(source, compiler)}.so"
    try:
        _own(built.parent)
        if not _is_sound(built):
            with FileLock(built.with_suffix(".lock")):
                if not _is_sound(built):
                    _compile(compiler, source, built)
        return ctypes.CDLL(str(built))
    except (OSError, UserError) as error:
        raise Unavailable(f"{built}: {error}") from error


@functools.cache
def available(name: str, otherwise: str) -> bool:
    """Tell whether `library(name)` can be had; if not, say once what is done otherwise, and why."""
    try:
        library(name)
    except Unavailable as error:
        warnings.warn(f"{otherwise}: {error}", stacklevel=2)
        return False
    return True


def crf_backend() -> str:
    """Read from `$ISIM_CRF` what computes dense CRFs; by default `auto`, the fastest there is.

    Raises UserError when it is none of `CRF_BACKENDS`.
    """
    chosen = os.environ.get("ISIM_CRF") or "auto"
    if chosen not in CRF_BACKENDS:
        raise UserError(f"ISIM_CRF: there is no '{chosen}'; use {', '.join(CRF_BACKENDS)}")
    return chosen


def crf_used(device: str) -> str:
    """Resolve what computes dCRFs of results on a device: torch, compiled or pydensecrf.

    Raises UserError as `crf_backend`.
    """
    chosen = crf_backend()
    if chosen in ("auto", "torch"):
        if device == "cuda":
            return "torch"
        told = "the dCRF is computed by pydensecrf, slowly"
        return "compiled" if available("crf", told) else "pydensecrf"
    return chosen


def _cache() -> Path:
    # A folder of their own: that of all caches may be one that others can write to.
    if chosen := os.environ.get("ISIM_CACHE"):
        return Path(chosen) / "kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isim/kernels"
    except RuntimeError as error:
        raise Unavailable(f"no folder for compiled kernels ({error}); set ISIM_CACHE") from error


def _digest(source: Path, compiler: list[str]) -> str:
    # Names the version and what -march=native stands for: unlike machines may share a home folder.
    asked = [*compiler, *FLAGS, "-###", "-E", "-x", "c++", os.devnull]
    try:
        plan = subprocess.check_output(asked, stderr=subprocess.STDOUT)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"no C++ compiler '{shlex.join(compiler)}' ({error}); install g++ or set CXX"
        raise Unavailable(reason) from error
    return identity.sha256(source.read_bytes() + plan)[:16]


def _own(folder: Path) -> None:
    """Make the folder of kernels; what others can write is not loaded. OSError passes."""
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise Unavailable(
            f"{folder} belongs to another user, who could put code there; set ISIM_CACHE"
        )
    if status.st_mode & _OTHERS:
        # A generous umask has made it so.
        folder.chmod(status.st_mode & 0o777 & ~_OTHERS)


def _is_sound(built: Path) -> bool:
    """Tell whether a kernel is what was compiled, and no other user can have put it there."""
    try:
        for path in (built, _checksum(built)):
            status = path.lstat()
            own = status.st_uid == os.geteuid() and not status.st_mode & _OTHERS
            if not own or not stat.S_ISREG(status.st_mode):
                return False
        return _checksum(built).read_text(encoding="ascii") == identity.sha256(built.read_bytes())
    except (OSError, ValueError):
        return False


def _checksum(built: Path) -> Path:
    return built.with_suffix(".sha256")


def _compile(compiler: list[str], source: Path, built: Path) -> None:
    for path in (_checksum(built), built):
        # Maybe a link, or another user's.
        path.unlink(missing_ok=True)
    with atomic_path(built, durable=True) as temporary:
        done = subprocess.run(
            [*compiler, *FLAGS, str(source), "-o", str(temporary)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            first = done.stderr.partition("\n")[0]
            raise Unavailable(f"{shlex.join(compiler)} cannot compile {source}: {first}")
        temporary.chmod(0o700)
        digest = identity.sha256(temporary.read_bytes())
    with atomic_path(_checksum(built), durable=True) as temporary:
        temporary.write_text(digest, encoding="ascii")
        temporary.chmod(0o600)
