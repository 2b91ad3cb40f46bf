"""Comparisons with references in one table, as `make bench` runs them.

Each file runs in a process of its own, after the other. The table is printed and written to
reports/benchmarks.md, with the machine and the date; docs/performance.md keeps such tables.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

# Files beside this one, with options that make all of them take less than ten minutes on two cores.
RUNS = (
    ("crf.py", "--images", "6"),
    ("regeneration.py", "--images", "4"),
    ("random_walk.py",),
    ("training.py",),
    ("crf_gpu.py",),
)


def main() -> int:
    """Run all; the exit code is that of the last one that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks.md"))
    out = parser.parse_args().out
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        lines.touch()
        for name, *options in RUNS:
            print(f"== {name}", flush=True)
            command = [sys.executable, str(Path(__file__).parent / name), *options]
            done = subprocess.run(command, env=os.environ | {"ISIM_BENCH": str(lines)})
            code = done.returncode or code
        table = harness.table(harness.read_rows(lines))
    title = f"{datetime.date.today()}, {harness.machine()}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{title}\n\n{table}\n")
    print(f"\n{out}: {title}\n\n{table}")
    return code


if __name__ == "__main__":
    sys.exit(main())
