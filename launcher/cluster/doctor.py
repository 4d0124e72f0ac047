"""What this machine can run: one row a check, each tried for real where that is cheap, none of which can crash.

It changes nothing. Invariant: a check that fails says what it tried and what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OK, WARN, MISSING = "ok", "warn", "missing"
COLOURS = {OK: "green", WARN: "yellow", MISSING: "red"}
GIB = 2**30
SECONDS_A_COMMAND = 10


@dataclass(frozen=True)
class Row:
    """One finding: `status` is ok, warn (works with a drawback) or missing."""

    check: str
    status: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """What the doctor found, in the order looked at."""

    rows: list[Row]

    def to_json(self) -> list[dict[str, Any]]:
        """One object a check."""
        return [asdict(row) for row in self.rows]

    def show(self, console: Console) -> None:
        """Prints the rows as a table."""
        table = Table(box=None, pad_edge=False)
        for name in ("check", "status", "detail"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(row.check, f"[{COLOURS[row.status]}]{row.status}[/]", row.detail.replace("[", r"\["))
        console.print(table)


def examine() -> Findings:
    """Every check in order; one that raises becomes a row that says so."""
    rows: list[Row] = []
    for name, check in CHECKS.items():
        try:
            rows += [Row(found, status, detail) for found, status, detail in check()]
        except Exception as error:  # a broken installation may raise anything, and is what the doctor is asked about
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            rows.append(Row(name, MISSING, f"{type(error).__name__}: {reason}"))
    return Findings(rows)


Finding = tuple[str, str, str]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield "Python", OK if good else MISSING, version if good else f"{version}; longscan needs 3.11 or newer"


def _packages() -> Iterator[Finding]:
    for name in ("deepspeed", "liger-kernel", "megatron-core", "webdataset", "omegaconf", "tokenizers"):
        version = _version(name)
        yield name, OK if version else MISSING, version or f"not installed; pip install {name}"


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield "PyTorch", OK, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    yield from _gpus(torch)


def _gpus(torch: Any) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            yield "GPU", WARN, "this machine has NVIDIA tools, but PyTorch is a CPU build; install a CUDA build"
        else:
            yield "GPU", WARN, "none that PyTorch sees; training runs on the CPU in fp32"
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        bf16 = "" if major >= 8 else "; no bf16, set precision=fp32"
        detail = f"{name}, sm_{major}{minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{bf16}"
        yield f"GPU {index}", WARN if bf16 else OK, detail


def _collectives() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield "torch.distributed", MISSING, "not in this build of PyTorch; install another"
        return
    if dist.is_nccl_available() and torch.cuda.is_available():
        from torch.cuda import nccl

        yield "NCCL", OK, ".".join(map(str, nccl.version()))
    else:
        yield "NCCL", WARN, "not usable here; needed only for GPUs"
    yield "gloo", *_try_gloo(dist, torch)


def _try_gloo(dist: Any, torch: Any) -> tuple[str, str]:
    """Forms a group of one on the loopback address and sums over it."""
    if not dist.is_gloo_available():
        return MISSING, "not in this build of PyTorch; needed to train on CPUs"
    with tempfile.TemporaryDirectory() as folder:
        group = dist.ProcessGroupGloo(dist.FileStore(f"{folder}/store", 1), 0, 1)
        value = torch.ones(1)
        group.allreduce([value]).wait()
    return OK, "a group of one was formed"


def _triton() -> Iterator[Finding]:
    version = _version("triton")
    if version is None:
        yield "Triton", MISSING, "not installed; kernels run as their PyTorch references"
        return
    import torch

    if torch.cuda.is_available():
        yield "Triton", OK, f"{version}, compiles for this GPU"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        yield "Triton", OK, f"{version}, in its interpreter (TRITON_INTERPRET=1): slow, for tests"
    else:
        yield (
            "Triton",
            WARN,
            f"{version}, no GPU: kernels run as their PyTorch references (TRITON_INTERPRET=1 tests them)",
        )
    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("cc") is None:
        yield "C compiler", MISSING, "no gcc or cc found; Triton needs one on a GPU machine"


def _ray() -> Iterator[Finding]:
    version = _version("ray")
    if version is None:
        yield "Ray", MISSING, "not installed; pip install ray, or train with run.launcher=inline"
        return
    address = os.environ.get("RAY_ADDRESS")
    where = f"joins the cluster at RAY_ADDRESS={address}" if address else "starts a private one on this machine"
    yield "Ray", OK, f"{version}; training {where}"


def _slurm() -> Iterator[Finding]:
    if shutil.which("sinfo") is None:
        yield "Slurm", WARN, "no sinfo on the path; needed only to submit to a Slurm cluster"
        return
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%P %D nodes %a"], capture_output=True, text=True, timeout=SECONDS_A_COMMAND
    )
    if done.returncode:
        yield "Slurm", MISSING, f"sinfo fails: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
    else:
        partitions = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
        yield "Slurm", OK, "; ".join(partitions[:6]) or "no partitions"


def _cpu_and_memory() -> Iterator[Finding]:
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    limits = [f"{usable} usable"] if usable != cores else []
    limits += [f"limited to {quota:g} by the container"] if quota and quota < usable else []
    yield "CPU cores", OK, ", ".join([str(cores), *limits])
    available, total = _memory()
    low = available < 4 * GIB
    yield "memory", WARN if low else OK, f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"


def _space() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        low = free < GIB
        advice = "; Ray and NCCL want 1 GiB or more (docker: --shm-size)" if low else ""
        yield "/dev/shm", WARN if low else OK, f"{free / GIB:.1f} GiB free{advice}"
    else:
        yield "/dev/shm", MISSING, "not there; Ray and NCCL need it"
    usage = shutil.disk_usage(".")
    low = usage.free < 10 * GIB
    yield (
        "disk here",
        WARN if low else OK,
        f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {Path.cwd()}",
    )


def _files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft < 4096
    advice = "; Ray wants 4096 or more: ulimit -n 65536" if low else ""
    yield "open files", WARN if low else OK, f"limit {soft} (at most {hard}){advice}"


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": _python,
    "PyTorch": _torch,
    "collectives": _collectives,
    "Triton": _triton,
    "packages": _packages,
    "Ray": _ray,
    "Slurm": _slurm,
    "CPU and memory": _cpu_and_memory,
    "space": _space,
    "open files": _files,
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> tuple[int, int]:
    """Bytes available and in all; the container's limit where it is the lower one."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit = _read_number("/sys/fs/cgroup/memory.max")
    if limit and limit < total:
        return min(available, int(limit - (_read_number("/sys/fs/cgroup/memory.current") or 0))), int(limit)
    return available, total


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _read_number(path: str) -> float | None:
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):
        return None
