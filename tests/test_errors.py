"""The boundary of reading: one line, regular files, bounds; every reader with damaged files."""

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import fuzz
from support.runs import environment

from isim import errors, params
from isim.data import files, prepared
from isim.data.formats import annotation, instances, labels
from isim.errors import UserError
from isim.models import encoder
from isim.runtime import paths
from isim.runtime.identity import md5

READERS = {reader.name: reader for reader in fuzz.READERS}
# Readers that build a network for each file, or parse a long one.
SLOW = {"cam.safetensors", "frozen.safetensors", "seg.safetensors", "params.yaml"}


def refusal(read, *arguments):
    """The error of a call: one line of fewer than 300 printable characters."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    told = str(caught.value)
    assert told.isprintable() and len(told) < 300
    return told


@given(st.text(max_size=2000), st.text(st.characters(codec="utf-8", exclude_characters=";")))
def test_any_text_becomes_one_line_that_ends_with_the_remedy(text, more):
    remedy = errors.printable(f"do {more}".strip())[:150].strip()
    told = str(UserError(f"{text}; {remedy}"))
    assert told.isprintable() and len(told) <= errors.LONGEST
    whole = f"{text}; {remedy}"
    if errors.without_secrets(whole) == whole and len(remedy.split(" ")[0]) < 50:
        assert told.endswith(remedy[-40:])
    assert str(UserError(told)) == told


def test_a_limit_reserves_no_memory(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert errors.contents(tmp_path / "x", 1 << 60) == b"abc" * 1_000_000
    with pytest.raises(UserError, match=r"more than the 3\.0 MB"):
        errors.contents(tmp_path / "x", 2_999_999)
    # Nothing tells how long it is.
    with pytest.raises(UserError, match="longer than such a file"):
        errors.contents(Path("/proc/self/maps"), 100)


def test_the_middle_of_long_values_is_cut_and_details_are_lines_of_their_own():
    told = str(UserError(f"cannot read /data/{'a' * 3_000_000}/x.png (odd); replace it"))
    assert told.startswith("cannot read /data/aaa") and told.endswith("a/x.png (odd); replace it")
    assert str(UserError("two\nfaults", "one\x1b", "other")) == "two\\nfaults\n  one\\x1b\n  other"


@pytest.mark.parametrize(
    "address",
    ["http://me:se/cr@t@host/x", "mysql://me:secret@host", "http://host/?a=1&password=secret"],
)
def test_addresses_lose_their_passwords(address):
    told = str(UserError(f"cannot reach {address}; mend it"))
    assert "secret" not in told and "cr@t" not in told and "host" in told


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        # The name of a socket may have 107 characters.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def _circle(path):
    path.symlink_to(path.name)


ODD = {"pipe": _pipe, "socket": _socket, "folder": Path.mkdir, "circle": _circle}
ODD["device"] = lambda path: path.symlink_to("/dev/zero")


def in_time(call, *arguments):
    """Call in a thread that is not waited for."""
    found = []

    def run():
        try:
            call(*arguments)
        except Exception as error:
            found.append(error)
        else:
            found.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits for a file that is none"
    return found[0]


@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_opened(kind, tmp_path):
    path = tmp_path / "x.png"
    ODD[kind](path)
    for read in (
        files.read_image,
        files.read_label_map,
        files.read_cam,
        params.load,
        labels.of_file,
    ):
        told = in_time(read, path)
        assert isinstance(told, UserError), told
    if kind not in ("circle", "folder"):
        assert isinstance(in_time(md5, path), UserError)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_a_pipe_at_once(name, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    told = in_time(READERS[name].read, path)
    # Where files may be missing, a pipe may pass for none.
    if name not in ("sbd.mat", "colors.txt", "list.txt", "state.safetensors"):
        assert isinstance(told, UserError), told
        assert "pipe" in str(told) or "missing" in str(told)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_gives_a_value_or_one_line_whatever_a_file_holds(name, tmp_path):
    fuzz.fuzz(READERS[name], tmp_path, range(3 if name in SLOW else 30))


@given(st.binary(max_size=300))
@pytest.mark.parametrize("name", ["image.png", "cam.npz", "a.xml", "table.csv", "weights.pth"])
def test_any_bytes_are_read_or_refused(name, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    fuzz.check(READERS[name], path)


def _bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


def _png(width, height):
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = stream.getvalue()
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


@pytest.mark.parametrize("make", [_bmp, _png])
@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000), (2**31 - 1, 3)])
def test_headers_of_huge_images_are_refused(make, size, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(make(*size))
    for read in (files.read_image, files.read_raw_mask, files.image_size):
        told = refusal(read, path)
        assert "pixels" in told or "unreadable" in told


@pytest.mark.parametrize(
    ("cam", "ids", "size"),
    [
        (np.full((2, 3, 4), np.nan, np.float16), [1, 2], [9, 14]),
        (np.full((2, 3, 4), np.inf, np.float16), [1, 2], [9, 14]),
        (np.full((2, 3, 4), 2, np.float16), [1, 2], [9, 14]),
        (np.zeros((2, 3, 4), np.float32), [1, 2], [9, 14]),
        (np.zeros((2, 3, 4), bool), [1, 2], [9, 14]),
        (np.zeros((3, 4), np.float16), [1, 2], [9, 14]),
        (np.zeros((2, 0, 4), np.float16), [1, 2], [9, 14]),
        (np.zeros((2, 3, 4), np.float16), [1], [9, 14]),
        (np.zeros((2, 3, 4), np.float16), [1.0, 2.0], [9, 14]),
        (np.zeros((2, 3, 4), np.float16), [1, 2], [9, 0]),
        (np.zeros((2, 3, 4), np.float16), [1, 2], [9, 14, 3]),
    ],
)
def test_cams_of_another_form_are_refused(cam, ids, size, tmp_path):
    np.savez(tmp_path / "a.npz", cam=cam, class_ids=np.array(ids), size=np.array(size))
    assert "is not a CAM file" in refusal(files.read_cam, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("grid", "fits"),
    [
        ((9, 14), True),
        ((5, 7), True),
        ((3, 4), True),
        ((1, 2), True),
        ((1, 1), True),
        ((1, 4), False),
        ((3, 7), False),
        ((7, 14), False),
        ((10, 15), False),
        ((18, 28), False),
    ],
)
def test_cams_have_the_shape_of_their_image_at_a_stride(grid, fits, tmp_path):
    Image.new("RGB", (14, 9)).save(tmp_path / "i.png")
    ids = np.array([1, 2])
    files.write_cam(tmp_path / "a.npz", np.zeros((2, *grid)), ids, (9, 14))
    given = tmp_path / "a.npz", tmp_path / "i.png", ids
    if fits:
        assert files.read_cam_of(*given)[0].shape == (2, *grid)
    else:
        assert "at no stride" in refusal(files.read_cam_of, *given)


def test_a_cam_file_that_asks_for_all_the_memory_is_refused(tmp_path):
    header = io.BytesIO()
    about = {"descr": "<f2", "fortran_order": False, "shape": (1, 200_000, 200_000)}
    np.lib.format.write_array_header_1_0(header, about)
    small = io.BytesIO()
    np.save(small, np.array([1]))
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", packed) as archive:
            archive.writestr("cam.npy", header.getvalue() + bytes(1000))
            archive.writestr("class_ids.npy", small.getvalue())
            archive.writestr("size.npy", small.getvalue())
        refusal(files.read_cam, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (True, "bool, no weights"),
        (1j, "complex64, no weights"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_none_are_refused(value, words, suffix, tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / f"w{suffix}"
    tensors = {"conv1.weight": torch.full((2, 2), value)}
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    assert words in refusal(encoder.read, path, fuzz._Weights())


def test_weights_that_unpack_to_more_than_the_file_are_refused(tmp_path):
    import torch

    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1).expand(10**9)}, path)
    assert "larger than the file" in refusal(encoder.read, path, fuzz._Weights())
    torch.save({"w": torch.zeros(10**5)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "p.pth", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert "packed" in refusal(encoder.read, tmp_path / "p.pth", fuzz._Weights())


@pytest.mark.parametrize("name", ["params.yaml", "tags.csv", "tags.txt", "a.xml", "tags.json"])
def test_files_too_large_to_be_what_they_claim_are_refused_unread(name, tmp_path):
    path = tmp_path / name
    path.touch()
    os.truncate(path, 4 << 30)
    read = {"params.yaml": params.load, "a.xml": annotation.names}.get(name, labels.of_file)
    assert "more than the" in refusal(read, path)


def test_a_line_longer_than_those_of_any_table_is_refused(tmp_path):
    (tmp_path / "tags.csv").write_text("image,labels\na.jpg," + "x" * (2 << 20))
    assert "line 2 has" in refusal(labels.of_file, tmp_path / "tags.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_a_dtd_is_refused_in_any_encoding(encoding, tmp_path):
    head = {"latin-1": '<?xml version="1.0" encoding="latin-1"?>'}.get(encoding, "")
    if encoding.startswith("utf-16-"):
        head = "\ufeff"
    text = f'{head}<!DOCTYPE a [<!ENTITY b "cat">]><a><object><name>&b;</name></object></a>'
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert "DOCTYPE" in refusal(annotation.names, tmp_path / "a.xml")


def test_yaml_that_unfolds_to_all_the_memory_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    (tmp_path / "params.yaml").write_text("\n".join([*lines, "prepare: *a29", ""]))
    refusal(params.load, tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "outline",
    [
        [[0, 0, 1e9, 0, 5, 5]],
        [[0, 0, float("nan"), 0, 5, 5]],
        {"counts": [0, 10**9], "size": [9, 14]},
        {"counts": "PPYo1", "size": [10**5, 10**6]},
        {"counts": [-1, 200], "size": [9, 14]},
        "x",
        7,
    ],
)
def test_outlines_that_would_end_python_are_refused(outline, tmp_path):
    import json

    one = fuzz.COCO["annotations"][0] | {"segmentation": outline}
    (tmp_path / "coco.json").write_text(json.dumps(fuzz.COCO | {"annotations": [one]}))
    found = instances.read(tmp_path / "coco.json")
    assert "is unusable" in refusal(found.mask, 1, {"cat": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.csv": "id,image,mask\n/etc/x,i.jpg,\n"}, "no relative path"),
        ({"train.csv": "id,image,mask\n../x,i.jpg,\n"}, "no relative path"),
        ({"train.csv": "id,image,mask\na,../../i.jpg,\n"}, "no relative path"),
        ({"train.csv": "id,image,mask\na,/etc/passwd,\n"}, "no relative path"),
        ({"train.csv": "id,image,mask\na,i.jpg,\na,i.jpg,\n"}, "a is there twice"),
        ({"labels.csv": "id,labels,known\na,cat,1\na,dog,1\n"}, "a is there twice"),
        ({"labels.csv": "id,labels,known\na,cat,yes\n"}, "known: yes"),
        ({"labels.csv": "id,labels,known\na,cow,1\n"}, "is damaged"),
        ({"train.csv": f"id,image,mask\n{'a' * 300},i.jpg,\n"}, "too long"),
        ({"train.csv": "id,image,mask\n"}, "train.csv lists 0 images of 1"),
        ({"classes": ["cat", "cat"]}, "cat is there twice"),
        ({"classes": ["cat", "d\x1bog"]}, "control characters"),
        ({"classes": ["cat", " dog"]}, "blanks around it"),
        ({"classes": ["cat", ""]}, "no name"),
        ({"classes": [True, 1]}, "no list of names"),
        ({"splits": {"../x": 1}}, "path of a file"),
        ({"splits": {"/x": 1}}, "path of a file"),
    ],
)
def test_prepared_data_from_elsewhere_are_checked(change, words, tmp_path):
    import json

    folder = tmp_path / prepared.FOLDER
    folder.mkdir(parents=True)
    about = {"format": 2, "root": "prepared:", "classes": ["cat", "dog"], "splits": {"train": 1}}
    tables = {
        "train.csv": "id,image,mask\na,i.jpg,\n",
        "labels.csv": "id,labels,known\na,cat;dog,1\n",
    }
    for name, text in (tables | change).items():
        if name.endswith(".csv"):
            (folder / name).write_text(text)
        else:
            about[name] = text
    (folder / "dataset.json").write_text(json.dumps(about))
    assert words in refusal(prepared.load, tmp_path)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_a_number_in_a_variable_is_plain_and_bounded(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISIM_WORKERS", text)
        if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= 64:
            assert paths.number_of("ISIM_WORKERS", 0, 64) == int(text)
        else:
            assert "ISIM_WORKERS" in refusal(paths.number_of, "ISIM_WORKERS", 0, 64)


@pytest.mark.parametrize(
    "variables",
    [
        {"ISIM_WORKERS": "²"},
        {"ISIM_WORKERS": "99999999999999999999"},
        {"ISIM_PROCESSES": "٣x"},
        {"ISIM_PROCESSES": "-1"},
        {"ISIM_TORCHRUN": "'"},
        {"LOCAL_RANK": "0", "WORLD_SIZE": "²"},
        {"LOCAL_RANK": "0"},
    ],
)
def test_odd_variables_are_one_line(variables, tmp_path):
    (tmp_path / "params.yaml").write_text((fuzz.ROOT / "params.yaml").read_text())
    done = _isim(tmp_path, "export-cams", **variables)
    (line,) = done.stderr.splitlines()[-1:]
    assert done.returncode == 2 and len(line) < 300 and "Traceback" not in done.stderr
    assert line.startswith("isim: error: ") or "prepare" in line


def _isim(root, *command, **variables):
    where = {"cwd": root, "env": environment(PYTHONPATH=fuzz.ROOT, **variables)}
    command = [sys.executable, "-c", "from isim.cli import main; main()", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **where)


@pytest.mark.parametrize("project", [True, False])
def test_an_unknown_error_keeps_its_traceback_in_a_file(project, tmp_path):
    code = (
        "import sys; from isim import cli; from isim.reporting import results\n"
        "def fail(root): raise LookupError('o\\x1bdd http://me:secret@host')\n"
        "results.table = fail; sys.argv = ['isim', 'results']; cli.main()"
    )
    if project:
        (tmp_path / "params.yaml").touch()
    where = {"cwd": tmp_path, "env": environment(PYTHONPATH=fuzz.ROOT, TMPDIR=str(tmp_path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **where)
    assert done.returncode == 1 and "secret" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("isim: error: LookupError: o\\x1bdd") and len(line) < 300
    (kept,) = tmp_path.rglob("isim-*.txt")
    assert (kept.parent == tmp_path / ".isim/errors") == project and kept.name in line
    text = kept.read_text()
    assert "in fail" in text and "secret" not in text and kept.stat().st_mode & 0o077 == 0
