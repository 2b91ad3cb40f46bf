"""Archives: used where they are, downloaded with resume, checked, extracted within bounds."""

import http.server
import io
import socket
import tarfile
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.data.sources import download
from isim.data.sources.download import Archive, extract, fetch, obtain
from isim.errors import UserError
from isim.runtime.identity import md5_of

FOLDER = "kit/VOC"
NOWHERE = Archive("http://127.0.0.1:9/kit.tar", "0" * 32, FOLDER)


@pytest.fixture(autouse=True, scope="module")
def no_proxy():
    """The servers below are local, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield


def make_tar(members=None):
    """A gzipped tar; a member's value is its bytes, or a link's target as text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in (members or {"kit/VOC/a.txt": b"a" * 5000, "kit/x.txt": b"x"}).items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname, content = tarfile.SYMTYPE, content, b""
            info.size, info.mode = len(content), 0o600
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` at any address; `resumes` honours Range, `stop_after` hangs up early."""

    resumes, stop_after, status = True, None, 200
    # What it says its length is (0: as it is, None: nothing), and what it sends without end.
    length, drip, pause = 0, b"", 0.02

    @property
    def archive(self):
        url = f"http://127.0.0.1:{self.server_port}/files/kit.tar"
        return Archive(url, md5_of(self.data), FOLDER)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted, data, status = self.headers.get("Range"), self.server.data, self.server.status
        self.server.ranges.append(wanted)
        if wanted and self.server.resumes:
            data = data[int(wanted.removeprefix("bytes=").rstrip("-")) :]
            status = 206 if data else 416
        self.send_response(status)
        if self.server.length is not None:
            self.send_header("Content-Length", str(self.server.length or len(data)))
        self.end_headers()
        self.wfile.write(data[: self.server.stop_after])
        with suppress(OSError):
            while self.server.drip:
                self.wfile.write(self.server.drip)
                time.sleep(self.server.pause)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(data):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.data, server.ranges = data, []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_download_check_and_extract_and_no_web_for_what_is_there(tmp_path):
    root = tmp_path / "raw"
    with serving(make_tar()) as server:
        archive, folder = server.archive, obtain(server.archive, root, download=True)
    assert folder == root / FOLDER
    assert (folder / "a.txt").read_bytes() == b"a" * 5000
    # Only the folder that is used; no temporary files.
    assert names(root) == ["kit", "kit.tar"] and names(root / "kit") == ["VOC"]
    (folder / "a.txt").unlink()
    folder.rmdir()
    assert (obtain(archive, root, download=False) / "a.txt").exists()
    (root / "kit.tar").unlink()
    assert obtain(archive, root, download=False) == folder


def test_lost_connection_is_resumed(tmp_path):
    data = make_tar()
    with serving(data) as server:
        server.stop_after = 40
        with pytest.raises(UserError, match=f"lost after 40 of {len(data)} bytes; run the same"):
            obtain(server.archive, tmp_path, download=True)
        assert names(tmp_path) == ["kit.tar.part"]
        server.stop_after = None
        obtain(server.archive, tmp_path, download=True)
        assert server.ranges == [None, "bytes=40-"]
    assert (tmp_path / "kit.tar").read_bytes() == data


@given(st.integers(0, 60), st.booleans())
def test_any_part_is_continued_or_replaced_where_the_server_cannot(tmp_path_factory, done, resumes):
    folder = tmp_path_factory.mktemp("part")
    data = bytes(range(60))
    (folder / "x.part").write_bytes(data[:done] if resumes else b"old")
    with serving(data) as server:
        server.resumes = resumes
        fetch(server.archive.url, folder / "x")
    assert (folder / "x").read_bytes() == data
    assert names(folder) == ["x"]


def test_a_damaged_download_is_removed_for_the_next_run_a_users_archive_kept(tmp_path):
    with serving(make_tar()) as server:
        archive = server.archive
        good, server.data = server.data, server.data[::-1]
        with pytest.raises(UserError, match=f"instead of {archive.md5}; run the same command"):
            obtain(archive, tmp_path, download=True)
        assert names(tmp_path) == []
        server.data = good
        obtain(archive, tmp_path / "again", download=True)
    (tmp_path / "kit.tar").write_bytes(good)
    with pytest.raises(UserError, match=r"instead of 0{32}; delete it and fetch it again"):
        obtain(NOWHERE, tmp_path, download=True)
    assert names(tmp_path) == ["again", "kit.tar"]


def test_what_keeps_a_download_from_coming_is_told(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=f"cannot download {NOWHERE.url}") as caught:
        obtain(NOWHERE, tmp_path, download=True)
    assert f"put the file at {tmp_path / 'kit.tar'}" in str(caught.value)
    (tmp_path / "file").write_text("")
    with serving(make_tar()) as server:
        with pytest.raises(UserError, match="cannot write below"):
            obtain(server.archive, tmp_path / "file" / "raw", download=True)
        server.status = 404
        with pytest.raises(UserError, match="404: Not Found"):
            obtain(server.archive, tmp_path, download=True)
        server.status = 200
        monkeypatch.setattr(download, "_save", full)
        with pytest.raises(UserError, match=r"cannot write below .*: No space left on device"):
            obtain(server.archive, tmp_path, download=True)


@pytest.mark.parametrize(
    "members",
    [
        {"../evil": b"x"},
        {"kit/VOC/../../../evil": b"x"},
        {"/evil": b"x"},
        {"kit/VOC/link": "/etc/passwd"},
        {"kit/VOC/up": "../..", "kit/VOC/up/evil": b"x"},
    ],
)
def test_archives_that_leave_the_folder_are_refused(tmp_path, members):
    root = tmp_path / "root"
    root.mkdir()
    (root / "kit.tar").write_bytes(make_tar({"kit/VOC/a": b""} | members))
    with pytest.raises(UserError, match="could leave the folder"):
        extract(root / "kit.tar", FOLDER, root)
    assert names(root) == ["kit.tar"] and names(tmp_path) == ["root"]


@pytest.mark.parametrize(
    "data",
    [b"", b"no archive", make_tar()[:-40], make_tar({"other": b""})],
    # An archive holds the time at which it was made.
    ids=["empty", "text", "cut", "another folder"],
)
def test_archives_that_are_no_use_are_refused(tmp_path, data):
    (tmp_path / "kit.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"no usable tar archive|holds no folder kit/VOC"):
        extract(tmp_path / "kit.tar", FOLDER, tmp_path)
    assert names(tmp_path) == ["kit.tar"]


def test_a_server_that_drips_or_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WINDOW_SECONDS", 0.2)
    with serving(b"x") as server:
        server.length, server.drip = None, b"x"
        with pytest.raises(UserError, match=r"bytes in 0 s are too few; run the same command"):
            fetch(server.archive.url, tmp_path / "kit.tar")
        monkeypatch.setattr(download, "MOST_BYTES", 1 << 20)
        server.drip, server.pause = bytes(1 << 17), 0
        with pytest.raises(UserError, match="more than there should be"):
            fetch(server.archive.url, tmp_path / "other.tar")
        server.length = 1 << 60
        with pytest.raises(UserError, match="no archive that is known"):
            fetch(server.archive.url, tmp_path / "third.tar")
        server.drip = b""
    assert (tmp_path / "other.tar.part").stat().st_size < 2 << 20


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/kit.tar"
        refused = pytest.raises(UserError, match="no answer within")
        with refused:
            fetch(address, tmp_path / "kit.tar")


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST_UNPACKED", 4000)
    monkeypatch.setattr(download, "LEAST_UNPACKED", 4000)
    (tmp_path / "kit.tar").write_bytes(make_tar())
    with pytest.raises(UserError, match="unpacks to far more"):
        extract(tmp_path / "kit.tar", FOLDER, tmp_path)
    assert names(tmp_path) == ["kit.tar"]
