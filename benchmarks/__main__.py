"""Runs every benchmark that needs no GPU, one after the other: `python -m benchmarks`."""

import subprocess
import sys

CPU = ("prepare", "loading", "row_lookup", "checkpoint", "trainer_overhead")

if __name__ == "__main__":
    failed = [name for name in CPU if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
