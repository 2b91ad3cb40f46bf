"""Official archives: use what is there, else download (resumable), check, extract safely."""

import contextlib
import http.client
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from tqdm import tqdm

from isim.data.files import file_md5
from isim.errors import UserError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Archive:
    """A tar archive on the web: its address, its md5 and the one folder in it that is used."""

    url: str
    md5: str
    folder: str

    @property
    def name(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[-1]


def obtain(archive: Archive, root: Path, download: bool) -> Path:
    """Make `root/<archive.folder>` exist: as it is, from an archive in `root`, or from the web.

    Raises:
        UserError: Nothing is there and `download` is off; the download, the md5 or the
            extraction failed; `root` cannot be written.
    """
    folder, file = root / archive.folder, root / archive.name
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
        with FileLock(root / f".{archive.name}.lock"):
            if not folder.is_dir():
                if not file.exists():
                    fetch(archive.url, file)
                    _check(archive, file, ours=True)
                else:
                    _check(archive, file, ours=False)
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
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)) as reply:
            # 200 instead of 206: the server does not resume and sends the whole file.
            start = start if reply.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            _save(reply, part, start)
    except urllib.error.HTTPError as error:
        # Asked for bytes behind the end: the part is the whole, its md5 will tell.
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _no_download(url, path, f"{error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _no_download(url, path, error.reason) from error
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise _no_download(url, path, error) from error
    part.replace(path)


def _save(reply: http.client.HTTPResponse, part: Path, start: int) -> None:
    length = reply.headers.get("Content-Length")
    total = start + int(length) if length else None
    with (
        part.open("ab" if start else "wb") as stream,
        tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        while data := reply.read(CHUNK):
            stream.write(data)
            bar.update(len(data))
        done = stream.tell()
    # A lost connection looks like the end of the file.
    if total is not None and done < total:
        raise ConnectionError(f"the connection was lost after {done} of {total} bytes")


def _no_download(url: str, path: Path, reason: object) -> UserError:
    return UserError(
        f"cannot download {url}: {reason}; run the same command again to resume, or put the "
        f"file at {path}"
    )


def _check(archive: Archive, file: Path, ours: bool) -> None:
    found = file_md5(file)
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
    with tempfile.TemporaryDirectory(prefix=".extract-", dir=destination) as name:
        try:
            with tarfile.open(archive) as tar:
                for member in tqdm(tar, desc=f"extract {archive.name}", disable=None):
                    if _is_below(member, folder, archive):
                        _extract_member(tar, member, name)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise UserError(
                f"{archive} is no usable tar archive ({error}); delete it and fetch it again"
            ) from error
        found = Path(name) / folder
        if not found.is_dir():
            raise UserError(f"{archive} holds no folder {folder}; put the official archive there")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found, target)


def _is_below(member: tarfile.TarInfo, folder: str, archive: Path) -> bool:
    path = PurePosixPath(member.name)
    below = path.is_relative_to(folder)
    plain = member.isfile() or member.isdir()
    if path.is_absolute() or ".." in path.parts or (below and not plain):
        raise UserError(
            f"{archive} holds {member.name}, which could leave the folder; do not trust this "
            "file, fetch the official one"
        )
    return below


def _extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: str) -> None:
    # `_is_below` has refused what could leave the folder; the filter also tames permissions.
    # Python before 3.11.4 does not know it.
    if sys.version_info >= (3, 11, 4):
        tar.extract(member, folder, filter="data")
    else:
        tar.extract(member, folder, set_attrs=False)
