"""The map over images: each one once, resumable, shared by processes, bounded in memory.

The network goes on to the next images while helper threads finish the last ones. Whatever a pass
computes, here alone folders are made, journals kept and shared, tensors moved to the host, and
progress is told. After kill -9 the same call computes the images that are missing; the result is
that of any number of processes.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from isim.data.prepared import Item
from isim.passes.journal import Journal, Line
from isim.runtime import atomic, helpers, processes, progress
from isim.runtime.here import Here

if TYPE_CHECKING:
    from isim.passes.stream import Arrays, Compute, OnGroup


class Passed(NamedTuple):
    """Lines of all images in their order; how many were computed now, and in how many seconds."""

    lines: list[Line]
    computed: int
    seconds: float

    @property
    def speed(self) -> dict[str, float]:
        """Seconds, and images a second (nan if none was computed), by their names in reports."""
        speed = self.computed / self.seconds if self.computed else math.nan
        return {"seconds": self.seconds, "images_per_second": speed}


def image(
    here: Here,
    items: Sequence[Item],
    finish: Callable[..., Line],
    *,
    name: str | None,
    outs: Mapping[Path, str] = {},
    compute: "Compute | None" = None,
    on_group: "OnGroup | None" = None,
) -> Passed:
    """Map every image once.

    Args:
        here: The stage: device, and resume folder of the journal `<name>.jsonl`.
        items: Images, of all processes together.
        finish: The last part for one image, called in a helper thread: the item, then an array
            or None for each tensor that `compute` (or `on_group`) gave. It writes the image's
            files last, and returns its figures, a JSON object.
        name: Name of the journal, also shown with the progress. None: nothing is kept, as the
            result is gone with this run anyway.
        outs: Folder -> suffix of the files `<id><suffix>` that a finished image has there.
        compute: Images of one size to tensors of each, on the device; None: nothing is computed
            before `finish`.
        on_group: What a GPU computes for a group of images of any sizes, before their tensors
            leave it; not called on a CPU.

    Raises:
        UserError: From the functions, or a journal that cannot be written.
    """
    start = time.perf_counter()

    def line_of(task: tuple[Item, "Arrays"]) -> Line:
        item, arrays = task
        return {"id": item.id, **finish(item, *arrays())}

    with nullcontext() if name is None else _journal(here, name, outs) as journal:
        known = {} if journal is None else _known(journal, outs)
        missing = [item for item in items if item.id not in known]
        own = processes.mine(missing)
        tasks: Iterable[tuple[Item, Arrays]] = ((item, tuple) for item in own)
        if compute is not None:
            # A stage without networks never loads torch.
            from isim.passes import stream

            tasks = stream.results(own, compute, on_group, here.device)
        added: list[Line] = []
        lines = helpers.in_threads(line_of, tasks)
        for line in progress.track(lines, name or "", len(own)):
            if journal is not None:
                journal.add(line)
            added.append(line)
    for told in processes.gather(added):
        known |= {line["id"]: line for line in told}
    seconds = time.perf_counter() - start
    return Passed([known[item.id] for item in items], len(missing), seconds)


def _journal(here: Here, name: str, outs: Iterable[Path]) -> Journal:
    path = here.resume / f"{name}.jsonl"
    for folder in (path.parent, *outs):
        atomic.make_directory(folder)
    return Journal(path, processes.rank())


def _known(journal: Journal, outs: Mapping[Path, str]) -> dict[str, Line]:
    """Read the lines of images whose files are all there; no process writes before all know."""
    lines = {}
    if processes.is_main():
        lines = journal.read()
        for folder, suffix in outs.items():
            # A loss of power can leave a name without its contents.
            whole = (path for path in folder.rglob(f"*{suffix}") if path.stat().st_size)
            there = {path.relative_to(folder).as_posix() for path in whole}
            lines = {id_: line for id_, line in lines.items() if f"{id_}{suffix}" in there}
    return processes.broadcast(lines)
