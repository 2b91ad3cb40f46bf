"""Compare the results of two runs of the pipeline, file by file.

    python benchmarks/references.py RUN REFERENCE

Both are project folders after `dvc repro` with the same parameters, on the same machine and with
`OMP_NUM_THREADS=1`. Label maps, CAMs, predictions and checkpoints must be equal to the byte, and
so must reports, apart from what tells of time. Prints what differs; the exit code is 1 then.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isim.runtime import identity

FOLDERS = ("data", "models", "reports")
# Figures that tell of a machine's speed, not of a result.
TIMES = {"seconds", "images_per_second", "waiting_share"}


def content(path: Path) -> str:
    """Digest a file, without times."""
    if path.suffix == ".json":
        text = json.dumps(without_times(json.loads(path.read_text())), sort_keys=True)
        return identity.md5_of(text.encode())
    if path.suffix == ".csv" and "reports" in path.parts:
        with path.open(newline="") as stream:
            rows = without_times(list(csv.DictReader(stream)))
        return identity.md5_of(json.dumps(rows).encode())
    return identity.md5(path)


def without_times(tree: Any) -> Any:  # noqa: ANN401 - JSON
    """Drop the figures named in TIMES from a JSON tree."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def results(project: Path) -> dict[str, str]:
    """Digests of all result files of a project, by path."""
    files = (
        path
        for folder in FOLDERS
        for path in sorted((project / folder).rglob("*"))
        # The words of a fresh clone are no result.
        if path.is_file() and path.name not in ("README.md", ".gitignore")
    )
    return {path.relative_to(project).as_posix(): content(path) for path in files}


def differences(run: dict[str, str], reference: dict[str, str]) -> Iterator[str]:
    """Name the files that only one has, or that differ."""
    for path in sorted(run.keys() | reference.keys()):
        if path not in run:
            yield f"missing: {path}"
        elif path not in reference:
            yield f"new: {path}"
        elif run[path] != reference[path]:
            yield f"differs: {path}"


def main() -> int:
    """Compare; the exit code tells whether all is equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("reference", type=Path)
    arguments = parser.parse_args()
    run, reference = results(arguments.run), results(arguments.reference)
    found = list(differences(run, reference))
    for line in found:
        print(line)
    print(f"{len(reference)} files, {len(found)} differ")
    return int(bool(found) or not reference)


if __name__ == "__main__":
    sys.exit(main())
