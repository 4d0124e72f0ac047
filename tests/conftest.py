"""What every test shares: one thread a process, so that two cores can serve two workers and bits repeat."""

import os
import sys
from pathlib import Path

# `python -m pytest` puts the working folder on the path, where transformers, which probes for a distribution called
# `kernels`, would find ours and fail.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
