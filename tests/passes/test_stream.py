"""Images stream through a network: bounded, the largest first, in batches on a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.images import opened

from isim.passes import stream
from isim.runtime import memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (2, 1), (2, 4)])
def test_the_largest_image_comes_first_and_few_are_decoded_ahead(
    workers, threads, items, read_ids, monkeypatch
):
    monkeypatch.setenv("ISIM_WORKERS", str(workers))
    monkeypatch.setattr(stream, "TRIM_EVERY", 3)
    seen, trimmed = [], []
    monkeypatch.setattr(memory, "trim_freed_memory", lambda: trimmed.append(len(seen)))
    torch.set_num_threads(threads)

    def compute(_, images):
        assert torch.get_num_threads() == 1
        return images

    for item, _ in stream.computed(compute, items * 4, CPU):
        assert len(read_ids) <= len(seen) + 1 + (2 * threads if workers else 0)
        seen.append(int(item.id))
    assert torch.get_num_threads() == threads
    # Those of one size one after another, in the order given.
    assert seen == [0, 3, 5] * 4 + [2] * 4 + [1, 6] * 4 + [4] * 4
    assert trimmed == list(range(2, 28, 3))


@pytest.mark.parametrize(("held", "threads"), [(99, 8), (7.9, 3), (0.5, 1)])
def test_threads_take_as_many_images_as_half_the_memory_holds(held, threads, items, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "1")
    torch.set_num_threads(8)
    pages = int(held * stream.BYTES_PER_PIXEL * 48 * 64)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1}.get)
    assert stream._threads(items) == threads and stream._threads([]) == 0


def test_a_gpu_gets_batches_of_one_size_and_bounded_pixels(items, read_ids, monkeypatch):
    monkeypatch.setattr(stream, "DECODED_AHEAD", 2)
    monkeypatch.setattr(stream, "FILLING_PIXELS", 2 * 48 * 64)
    batches = []

    def compute(batch, images):
        assert len(read_ids) <= sum(map(len, batches)) + len(batch) + 2 + 1
        assert images.is_contiguous(memory_format=torch.channels_last)
        batches.append([int(item.id) for item in batch])
        return images

    chosen = [items[place] for place in (0, 3, 5, 2, 1, 6, 4)]
    found = list(stream._computed_in_batches(compute, chosen, CPU))
    assert all(torch.equal(image, opened(item)[1][0]) for item, image in found)
    assert batches == [[0, 3], [5], [2], [1, 6], [4]]


def test_what_a_gpu_does_follows_from_its_memory_and_the_backend(monkeypatch):
    small = SimpleNamespace(total_memory=8_000_000_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: small)
    assert stream.batch_pixels(CUDA) == 488_281 < stream.batch_pixels(CPU)
    assert stream.groups(CUDA) and not stream.groups(CPU)
    for backend in ("auto", "torch", "compiled", "pydensecrf"):
        monkeypatch.setenv("ISIM_CRF", backend)
        assert stream.refines(CUDA) == (backend in ("auto", "torch")) and not stream.refines(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_leave_a_gpu_as_arrays():
    plane = torch.arange(6.0).view(2, 3)
    array, nothing = stream._leaving([plane.to(CUDA).flip(-1), None])()
    assert np.array_equal(array, plane.flip(-1)) and nothing is None
