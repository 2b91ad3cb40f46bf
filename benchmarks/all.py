"""Comparisons with references in one table, as `make bench` runs them.

Each file runs in a process of its own, after the other. The table is printed and written to
reports/benchmarks.md, with the machine and the date; docs/performance.md keeps such tables.

    ISIM_BENCH_AVX512=0 python benchmarks/all.py    # as on a CPU with AVX2 alone
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

# All of them, on two cores.
SECONDS = 570
# Files beside this one with their options, and the second by which each should be through: from
# there on it measures everything once.
RUNS = (
    (150, "crf.py", "--images", "6"),
    (300, "regeneration.py", "--images", "4"),
    (330, "random_walk.py"),
    (380, "frozen.py", "--images", "12"),
    (SECONDS, "training.py"),
    (SECONDS, "crf_gpu.py"),
)
# Training in fp32, without bf16, takes three times as long.
FEWER = ("--images", "32", "--repeats", "1")


def main() -> int:
    """Run all; the exit code is that of the last one that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks.md"))
    out = parser.parse_args().out
    code, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        lines.touch()
        for end, name, *options in RUNS:
            print(f"== {name}", flush=True)
            if name == "training.py" and "bf16" not in harness.instruction_sets():
                options += FEWER
            command = [sys.executable, str(Path(__file__).parent / name), *options]
            environment = {"ISIM_BENCH": str(lines), "ISIM_BENCH_UNTIL": str(start + end)}
            done = subprocess.run(command, env=os.environ | environment)
            code = done.returncode or code
        table = harness.table(harness.read_rows(lines))
    title = f"{datetime.date.today()}, {harness.machine()}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{title}\n\n{table}\n")
    print(f"\n{out}: {title}\n\n{table}")
    return code


if __name__ == "__main__":
    sys.exit(main())
