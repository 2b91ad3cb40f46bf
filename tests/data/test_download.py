"""Archives: used where they are, downloaded with resume, checked, extracted within bounds."""

import hashlib
import http.server
import io
import tarfile
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.data import download
from isim.data.download import Archive, extract, fetch, obtain
from isim.errors import UserError

FOLDER = "kit/VOC"


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
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size, info.mode = len(content), 0o600
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` at any address; `resumes` honours Range, `stop_after` hangs up early."""

    def __init__(self, data):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.resumes, self.stop_after, self.status = data, True, None, None
        self.ranges = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/files/kit.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        data, status = self.server.data, self.server.status or 200
        if wanted and self.server.resumes:
            data, status = data[int(wanted.removeprefix("bytes=").rstrip("-")) :], 206
            status = status if data else 416
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.server.stop_after])

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(data):
    with Server(data) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def archive_of(server, md5=None):
    return Archive(server.url, md5 or hashlib.md5(server.data).hexdigest(), FOLDER)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_download_check_and_extract(tmp_path):
    with serving(make_tar()) as server:
        folder = obtain(archive_of(server), tmp_path / "raw", download=True)
    assert folder == tmp_path / "raw/kit/VOC"
    assert (folder / "a.txt").read_bytes() == b"a" * 5000
    # Only the folder that is used; no temporary files.
    assert names(tmp_path / "raw") == ["kit", "kit.tar"]
    assert names(tmp_path / "raw/kit") == ["VOC"]


def test_what_is_there_is_used_without_the_web(tmp_path):
    data = make_tar()
    archive = Archive("http://127.0.0.1:9/kit.tar", hashlib.md5(data).hexdigest(), FOLDER)
    (tmp_path / "kit.tar").write_bytes(data)
    assert (obtain(archive, tmp_path, download=False) / "a.txt").exists()
    (tmp_path / "kit.tar").unlink()
    assert obtain(archive, tmp_path, download=False) == tmp_path / FOLDER


def test_lost_connection_is_resumed(tmp_path):
    data = make_tar()
    with serving(data) as server:
        server.stop_after = 40
        with pytest.raises(UserError, match=f"lost after 40 of {len(data)} bytes; run the same"):
            obtain(archive_of(server), tmp_path, download=True)
        assert names(tmp_path) == ["kit.tar.part"]
        server.stop_after = None
        obtain(archive_of(server), tmp_path, download=True)
        assert server.ranges == [None, "bytes=40-"]
    assert (tmp_path / "kit.tar").read_bytes() == data


@given(st.integers(0, 60))
def test_any_part_is_continued(tmp_path_factory, done):
    folder = tmp_path_factory.mktemp("part")
    data = bytes(range(60))
    (folder / "x.part").write_bytes(data[:done])
    with serving(data) as server:
        fetch(server.url, folder / "x")
    assert (folder / "x").read_bytes() == data
    assert names(folder) == ["x"]


def test_server_that_does_not_resume_sends_the_whole(tmp_path):
    (tmp_path / "x.part").write_bytes(b"old")
    with serving(b"whole") as server:
        server.resumes = False
        fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_damaged_download_is_removed_so_that_the_next_run_can_mend_it(tmp_path):
    with serving(make_tar()) as server:
        archive = archive_of(server)
        good, server.data = server.data, server.data[::-1]
        with pytest.raises(UserError, match=f"instead of {archive.md5}; run the same command"):
            obtain(archive, tmp_path, download=True)
        assert names(tmp_path) == []
        server.data = good
        obtain(archive, tmp_path, download=True)


def test_a_users_archive_with_another_md5_is_refused_and_kept(tmp_path):
    (tmp_path / "kit.tar").write_bytes(make_tar())
    archive = Archive("http://127.0.0.1:9/kit.tar", "0" * 32, FOLDER)
    with pytest.raises(UserError, match="instead of 0{32}; delete it and fetch it again"):
        obtain(archive, tmp_path, download=True)
    assert names(tmp_path) == ["kit.tar"]


def test_unreachable_server_and_refusal(tmp_path):
    archive = Archive("http://127.0.0.1:9/kit.tar", "0" * 32, FOLDER)
    with pytest.raises(UserError, match="cannot download http://127.0.0.1:9/kit.tar") as caught:
        obtain(archive, tmp_path, download=True)
    assert f"put the file at {tmp_path / 'kit.tar'}" in str(caught.value)
    with serving(b"") as server:
        server.status = 404
        with pytest.raises(UserError, match="404 Not Found"):
            obtain(archive_of(server), tmp_path, download=True)


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with serving(make_tar()) as server, pytest.raises(UserError, match="cannot write below"):
        obtain(archive_of(server), tmp_path / "file" / "raw", download=True)


def test_full_disk_while_downloading(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_save", full)
    with serving(make_tar()) as server:
        with pytest.raises(UserError, match="cannot write below .*: No space left on device"):
            obtain(archive_of(server), tmp_path, download=True)


@pytest.mark.parametrize(
    "members",
    [
        {"kit/VOC/a": b"", "../evil": b"x"},
        {"kit/VOC/a": b"", "kit/VOC/../../../evil": b"x"},
        {"kit/VOC/a": b"", "/evil": b"x"},
        {"kit/VOC/a": b"", "kit/VOC/link": "/etc/passwd"},
        {"kit/VOC/up": "../..", "kit/VOC/up/evil": b"x"},
    ],
)
def test_archives_that_leave_the_folder_are_refused(tmp_path, members):
    root = tmp_path / "root"
    root.mkdir()
    (root / "kit.tar").write_bytes(make_tar(members))
    with pytest.raises(UserError, match="could leave the folder"):
        extract(root / "kit.tar", FOLDER, root)
    assert names(root) == ["kit.tar"]
    assert names(tmp_path) == ["root"]


@pytest.mark.parametrize("data", [b"", b"no archive", make_tar()[:-40], make_tar({"other": b""})])
def test_archives_that_are_no_use_are_refused(tmp_path, data):
    (tmp_path / "kit.tar").write_bytes(data)
    with pytest.raises(UserError, match="no usable tar archive|holds no folder kit/VOC"):
        extract(tmp_path / "kit.tar", FOLDER, tmp_path)
    assert names(tmp_path) == ["kit.tar"]
