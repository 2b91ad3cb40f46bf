"""Freed memory stays with the process where that is asked for."""

import ctypes
import json
import subprocess
import sys

import pytest

# In a process of its own: what pytest has allocated would blur the figures.
MEMORY = """
import json, psutil
from isim.runtime import memory

found = {}

def note(name):
    found[name] = psutil.Process().memory_info().rss / 2**20

def fill(size):
    return [b"x" * size for _ in range(2**28 // size)]

note("start")
with memory.keep_freed_memory():
    for name, size in (("large", 2**24), ("small", 2**16)):
        fill(size)
        note(f"{name}, freed")
        memory.trim_freed_memory()
        note(f"{name}, trimmed")
    with memory.keep_freed_memory():
        pass
    fill(2**24)
    note("nested, freed")
note("after")
holes = fill(2**16)[::64]
note("holes")
memory.trim_freed_memory()
note("holes, trimmed")
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt"
)
def test_freed_memory_is_kept_inside_the_block_until_it_is_trimmed():
    """In MiB of resident memory, 256 a time; large blocks first, before the heap has their room."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    grown = {name: value - found["start"] for name, value in found.items()}
    for name in ("small, freed", "nested, freed", "large, freed", "holes"):
        assert grown[name] > 160, (name, found)
    for name in ("small, trimmed", "large, trimmed", "after", "holes, trimmed"):
        assert grown[name] < 96, (name, found)
