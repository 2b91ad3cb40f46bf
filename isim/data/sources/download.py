"""Official archives: use what is there, else download (resumable), check, extract safely."""

import contextlib
import gzip
import queue
import shutil
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import URLError
from urllib.request import Request, urlopen

from filelock import FileLock

from isim.errors import UserError, reason, regular
from isim.runtime import progress
from isim.runtime.identity import md5

# No official archive has more bytes: a server that never ends would fill the disk.
MOST_BYTES = 16 << 30
# Seconds that a server has to begin its answer, and in which `LEAST` bytes of it must come: one
# that drips would be waited for, for weeks.
ANSWER_SECONDS, WINDOW_SECONDS, LEAST = 120.0, 120.0, 1 << 20
# Bytes that an archive unpacks to: at most, and for a small one; in between this often its own.
MOST_UNPACKED, LEAST_UNPACKED, MOST_RATIO = 64 << 30, 1 << 30, 50
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Archive:
    """A tar archive on the web: its address, its md5 and the one folder in it that is used."""

    url: str
    md5: str
    folder: str


def obtain(archive: Archive, root: Path, download: bool) -> Path:
    """Make `root/<archive.folder>` exist: as it is, from an archive in `root`, or from the web.

    Raises:
        UserError: Nothing is there and `download` is off; the download, the md5 or the
            extraction failed; `root` cannot be written.
    """
    folder, file = root / archive.folder, root / archive.url.rpartition("/")[2]
    if folder.is_dir():
        return folder
    if not file.exists() and not download:
        raise UserError(
            f"neither {folder} nor {file} exists; put one of them there, point prepare.root to "
            "it, or set prepare.download: true"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Two runs that share a data folder must not append to one download.
        with FileLock(root / f".{file.name}.lock"):
            if not folder.is_dir():
                ours = not file.exists()
                if ours:
                    fetch(archive.url, file)
                _check(archive, file, ours)
                extract(file, archive.folder, root)
    except OSError as error:
        raise UserError(
            f"cannot write below {root}: {error.strerror or error}; free space or fix the "
            "permissions and run the same command again"
        ) from error
    return folder


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`, continuing from `<path>.part` where that exists.

    Raises:
        UserError: The server cannot be reached, refuses or hangs up; what has arrived is kept.
        OSError: The file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    if part.exists():
        regular(part)
    start = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with contextlib.closing(_answer(request)) as reply:
            # 200 instead of 206: the server does not resume and sends the whole file.
            _save(reply, part, start if reply.status == HTTPStatus.PARTIAL_CONTENT else 0)
    except (URLError, ConnectionError, TimeoutError, HTTPException, ValueError) as error:
        # Asked for bytes behind the end: the part is the whole, its md5 will tell.
        if getattr(error, "code", None) != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise UserError(
                f"cannot download {url}: {str(error).strip('<>') or reason(error)}; run the same "
                f"command again to resume, or put the file at {path}"
            ) from error
    part.replace(path)


def _answer(request: Request) -> HTTPResponse:
    """Send a request; TimeoutError if the answer does not begin, a header a time, for long."""
    found: queue.SimpleQueue[HTTPResponse | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(urlopen(request, timeout=60))
        except Exception as error:
            found.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _save(reply: HTTPResponse, part: Path, start: int) -> None:
    length = reply.headers.get("Content-Length")
    total = start + int(length) if length else None
    if total is not None and not 0 <= total <= MOST_BYTES:
        raise ValueError(f"{total} bytes are no archive that is known")
    size = None if total is None else total / 1e6
    with (
        part.open("ab" if start else "wb") as stream,
        progress.task(f"download of {part.stem}", size, "MB", before=start / 1e6) as loaded,
    ):
        done, began, before = start, time.monotonic(), start
        # What is there: a whole chunk may never be.
        while chunk := reply.read1(_CHUNK):
            stream.write(chunk)
            loaded.add(len(chunk) / 1e6)
            done += len(chunk)
            if done > (MOST_BYTES if total is None else total):
                raise ValueError(f"it goes on after {done} bytes, more than there should be")
            if time.monotonic() - began > WINDOW_SECONDS:
                if done - before < LEAST:
                    raise TimeoutError(
                        f"{done - before} bytes in {WINDOW_SECONDS:.0f} s are too few"
                    )
                began, before = time.monotonic(), done
    # A lost connection looks like the end of the file.
    if total is not None and done < total:
        raise ConnectionError(f"the connection was lost after {done} of {total} bytes")


def _check(archive: Archive, file: Path, ours: bool) -> None:
    found = md5(file)
    if found == archive.md5:
        return
    # A damaged download would be found again, and refused again, by the next run.
    if ours:
        file.unlink()
    fix = "run the same command again" if ours else "delete it and fetch it again"
    raise UserError(
        f"{file} has the md5 {found} instead of {archive.md5}; {fix}, or put the archive of "
        f"{archive.url} there"
    )


def extract(archive: Path, folder: str, destination: Path) -> None:
    """Extract one folder of a tar archive to `destination/folder`, whole or not at all.

    Raises:
        UserError: The archive is damaged, lacks the folder, or has a member that is absolute,
            climbs by `..`, or is no plain file or folder.
        OSError: The disk cannot be written.
    """
    target = destination / folder
    regular(archive)
    with tempfile.TemporaryDirectory(prefix=".extract-", dir=destination) as name:
        try:
            with tarfile.open(archive) as tar:
                # What could leave the folder is refused below; the filter, which Python has since
                # 3.11.4, also tames permissions.
                tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                room = max(min(MOST_UNPACKED, MOST_RATIO * archive.stat().st_size), LEAST_UNPACKED)
                for member in progress.track(tar, f"extract {archive.name}", unit="file"):
                    path = PurePosixPath(member.name)
                    below = path.is_relative_to(folder)
                    links = below and not (member.isfile() or member.isdir())
                    if path.is_absolute() or ".." in path.parts or links:
                        raise UserError(
                            f"{archive} holds {member.name}, which could leave the folder; do not "
                            "trust this file, fetch the official one"
                        )
                    room -= member.size
                    if room < 0:
                        raise UserError(
                            f"{archive} unpacks to far more than an archive of its size holds; do "
                            "not trust this file, fetch the official one"
                        )
                    if below:
                        tar.extract(member, name)
        # A full disk is no fault of the archive.
        except (UserError, OSError) as error:
            if isinstance(error, gzip.BadGzipFile):
                raise _unusable(archive, error) from error
            raise
        # tarfile meets damage with whatever its parsers stumble over.
        except Exception as error:
            raise _unusable(archive, error) from error
        found = Path(name) / folder
        if not found.is_dir():
            raise UserError(f"{archive} holds no folder {folder}; put the official archive there")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found, target)


def _unusable(archive: Path, error: Exception) -> UserError:
    return UserError(
        f"{archive} is no usable tar archive ({reason(error)}); delete it and fetch it again"
    )
