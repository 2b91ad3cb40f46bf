"""C++ kernels of `isim/cpp`: compiled once a machine, kept, and called without the GIL."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
from pathlib import Path

from filelock import FileLock

from isim.atomic import atomic_path
from isim.errors import UserError

SOURCES = Path(__file__).parent / "cpp"
# The parts of -ffast-math that the kernels profit from and that keep the order of operations. Not
# the flag itself: with it a shared library makes the whole process round tiny numbers to zero.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"),
)


class Unavailable(Exception):
    """The kernels cannot be compiled here; the message says why, in one line."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Load `isim/cpp/<name>.cpp`, compiling it if this machine has not done so yet.

    The library is kept below `$ISIM_CACHE`, else `$XDG_CACHE_HOME/isim` or `~/.cache/isim`, under
    a digest of its source, the compiler and the processor. Several processes that need it at once
    compile it once. ctypes calls release the GIL: kernels run side by side in threads.

    Args:
        name: File without suffix.

    Raises:
        Unavailable: There is no C++ compiler, or it fails, or no folder can be written.
    """
    source = SOURCES / f"{name}.cpp"
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    built = _cache() / f"{name}-{_digest(source, compiler)}.so"
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(built.with_suffix(".lock")):
                if not built.exists():
                    _compile(compiler, source, built)
        return ctypes.CDLL(str(built))
    except (OSError, UserError) as error:
        raise Unavailable(f"{built}: {error}") from error


def _cache() -> Path:
    if chosen := os.environ.get("ISIM_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "isim"
    try:
        return Path.home() / ".cache/isim"
    except RuntimeError as error:
        raise Unavailable(f"no folder for compiled kernels ({error}); set ISIM_CACHE") from error


def _digest(source: Path, compiler: list[str]) -> str:
    """Of all that the library depends on, 16 hex digits."""
    total = hashlib.sha256(source.read_bytes())
    total.update(f"{compiler} {FLAGS} {_processor()}".encode())
    try:
        total.update(subprocess.check_output([*compiler, "--version"], stderr=subprocess.STDOUT))
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(
            f"no C++ compiler '{shlex.join(compiler)}' ({error}); install g++ or set CXX"
        ) from error
    return total.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # x86 calls them flags, Arm Features.
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.machine()
    )


def _compile(compiler: list[str], source: Path, built: Path) -> None:
    with atomic_path(built) as temporary:
        done = subprocess.run(
            [*compiler, *FLAGS, str(source), "-o", str(temporary)], capture_output=True, text=True
        )
        if done.returncode:
            first = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise Unavailable(f"{shlex.join(compiler)} cannot compile {source.name}: {first}")
