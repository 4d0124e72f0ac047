"""Installs longscan and its pinned dependencies into the running virtual environment, PyTorch first.

PyTorch comes first because a package that asks for torch before it is there would take the largest CUDA build. What
will be fetched, and how large it is, is said before it is fetched. Uses the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pip(*arguments: str, capture: bool = False) -> str:
    """Runs pip with `arguments`; returns what it printed when `capture` is set."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    # setuptools warns at length about a package whose root is the repository, which is meant.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        sys.exit(f"error: pip {' '.join(arguments[:3])} ... failed; its message is above.")
    return done.stdout or ""


def pinned_torch() -> str:
    """The torch requirement of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("#")[0].strip() for line in lines if line.startswith("torch=="))


def size_of(url: str) -> int:
    """Bytes behind `url`; 0 where the server does not say."""
    if url.startswith("file:"):
        return os.stat(urllib.request.url2pathname(urllib.parse.urlparse(url).path)).st_size
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except OSError:
        return 0


def describe_torch(requirement: str, index: list[str]) -> str:
    """One line: which PyTorch build will be installed and how much is fetched for it."""
    plan = json.loads(pip("install", "--dry-run", "--report", "-", *index, requirement, capture=True))
    packages = plan["install"]
    torch = next(p for p in packages if p["metadata"]["name"] == "torch")
    sizes = [size_of(p["download_info"]["url"]) for p in packages]
    cuda = [p["metadata"]["name"] for p in packages if p["metadata"]["name"].startswith(("nvidia", "cuda"))]
    kind = f"CUDA build, {len(cuda)} CUDA packages" if cuda else "CPU build"
    unknown = f" ({sizes.count(0)} of unknown size)" if 0 in sizes else ""
    hint = "; TORCH_INDEX=<address of a PyTorch index> takes another build" if cuda and not index else ""
    total = f"{sum(sizes) / 2**20:,.0f} MiB in {len(packages)} packages{unknown}"
    return f"PyTorch {torch['metadata']['version']}, {kind}: {total}{hint}"


def main() -> None:
    """Installs torch, then longscan with its development tools, under constraints.txt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-index", default="", help="a PyTorch package index")
    options = parser.parse_args()
    index = ["--index-url", options.torch_index] if options.torch_index else []
    requirement = pinned_torch()
    try:
        print(f"PyTorch {metadata.version('torch')} is already installed")
    except metadata.PackageNotFoundError:
        print(describe_torch(requirement, index), flush=True)
        pip("install", *index, requirement)
    print("installing longscan and its other dependencies (about 1.7 GB on disk)", flush=True)
    pip("install", "--constraint", "constraints.txt", "--editable", ".[dev]")


if __name__ == "__main__":
    main()
