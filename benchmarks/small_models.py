"""Trains the small preset of each family on the same text and scores it on the same held-out text.

    python -m benchmarks.small_models --text SITE_PACKAGES [--work FOLDER] [--gpus N] [FAMILY...] [KEY=VALUE...]

The Python sources are prepared once with a BPE of their own; then the families train by `launcher/presets/small.yaml`,
one a GPU at a time, and each is scored at its training length and beyond, and by whether a token repeats what stood
before (`recall`). All share data, order of rows, batch, learning rate and seed; `KEY=VALUE` changes them for all and
stands in what is recorded. What a family reached is recorded when it ends, its curve beside it, and
`docs/small-models.md` is written at the end. `--here` trains in this process, for a debugger or a profiler, and
records nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import queue
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longscan.data import HeldoutRows
from longscan.data.bpe import train_bpe
from longscan.launcher.config import Config, resolve
from longscan.launcher.elastic.supervisor import train
from longscan.launcher.evals.extrapolate import score
from longscan.launcher.evals.heldout import choose_text
from longscan.launcher.run_folder import RunFolder
from longscan.launcher.trained import open_trained
from longscan.launcher.validate import check_run
from longscan.models import num_params

from . import record as recording
from . import small_models_page as page
from .recall import losses_by_kind

# Begun in this order: first those that take longest and the transformer that all are compared with.
FAMILIES = ("linearized", "griffin", "based", "llama", "hawk", "alibi", "rope", "sinusoidal")
VOCABULARY = 16384
# Text that the BPE is trained on: enough for so small a vocabulary, and counted in seconds.
SAMPLE_BYTES = 64 << 20
HELDOUT = 0.02
# Held-out rows of the figure that the families are compared by.
VALIDATED = 768
NEVER = 10**6
# Row lengths scored, as multiples of the trained one.
SCORED = (0.25, 1, 2, 4, 8)
SCORED_TOKENS = 512 << 10
# Steps whose mean is a point of a curve.
POINT = 10
RESULT = "result.json"


@dataclass(frozen=True)
class Task:
    """A family to train: its preset `family-size`, the folder of corpus and runs, and what `small` is changed by."""

    family: str
    size: str
    work: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """What is trained: the preset and the changes."""
        return " ".join((f"{self.family}-{self.size}", *self.overrides))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.work / re.sub(r"[^\w.=-]+", "_", self.name)

    def config(self) -> Config:
        """The checked configuration. Only the last step is validated and saved, and no process is started."""
        fixed = {
            "model.preset": f"{self.family}-{self.size}",
            "data.corpora": f"[{self.work / 'corpus'}]",
            "run.folder": self.folder,
            "run.launcher": "inline",
            "run.workers": 1,
            "parallel.zero": 0,
            "checkpoint.every": NEVER,
            "validation.every": NEVER,
            "validation.rows": VALIDATED,
            "logging.tensorboard": "false",
        }
        return check_run(resolve("small", [*(f"{key}={value}" for key, value in fixed.items()), *self.overrides]))[0]


def prepare(text: Path, work: Path, vocabulary: int) -> None:
    """Makes the corpus, unless it is there, by the command line: its processes must not each import this module."""
    if not text.is_dir():
        sys.exit(f"--text is {text}, which is no folder")
    pattern, tokenizer = "**/*.py", work / "tokenizer.json"
    work.mkdir(parents=True, exist_ok=True)
    if not tokenizer.exists():
        train_bpe([str(text)], tokenizer, vocabulary, pattern=pattern, heldout=HELDOUT, sample_bytes=SAMPLE_BYTES)
    command = [sys.executable, "-c", "from longscan.launcher.cli import main; main()", "prepare", str(text)]
    options = ["-o", work / "corpus", "--tokenizer", tokenizer, "--pattern", pattern, "--heldout", HELDOUT]
    subprocess.run([*command, *map(str, options)], check=True)


def measure(task: Task, threads: int) -> dict[str, Any]:
    """Trains a family in this process, scores it, and returns what is written to its `result.json`."""
    began, config = time.perf_counter(), task.config()
    config.run.threads = threads
    train(config, fresh=True)
    trained_in = time.perf_counter() - began
    steps, trained = RunFolder.open(task.folder).metrics.standing(), open_trained(task.folder)
    trained_length = config.stages[-1].seq_len
    lengths = [int(trained_length * factor) for factor in SCORED]
    corpus = trained.open_corpus()
    text = choose_text(corpus, trained.tokenizer, lengths[-1], SCORED_TOKENS)
    scores = {length: score(trained.model, text, length) for length in lengths}
    validated = HeldoutRows(corpus, trained_length)
    result = {
        "parameters": num_params(replace(config.model, vocab_size=0)),
        "tokens": sum(step["tokens"] for step in steps),
        "length": trained_length,
        "heldout": heldout(task.folder),
        "scored text": text.kind,
        "by length": {length: scored.bits_per_byte for length, scored in scores.items()},
        "last quarter by length": {length: scored.last_quarter for length, scored in scores.items()},
        "share and nats by kind": losses_by_kind(trained.model, validated, config.validation.rows),
        "tokens per second": statistics.median(step["tokens_per_second"] for step in steps),
        "memory": max(step["memory_bytes"] for step in steps),
        "training seconds": trained_in,
        "seconds": time.perf_counter() - began,
    }
    (task.folder / RESULT).write_text(json.dumps(result, indent=1))
    return result


def heldout(folder: Path) -> float:
    """The held-out bits a byte after the last step."""
    scored = [event for event in RunFolder.open(folder).events.read() if event["event"] == "validated"]
    return scored[-1]["heldout_bits_per_byte"]


def curve(folder: Path) -> Iterator[tuple[int, int, float, float]]:
    """(step, tokens so far, loss, bits a byte) for every POINT steps of a run, means over them."""
    steps, tokens = RunFolder.open(folder).metrics.standing(), 0
    for begin in range(0, len(steps), POINT):
        some = steps[begin : begin + POINT]
        tokens += sum(step["tokens"] for step in some)
        means = (statistics.fmean(step[key] for step in some) for key in ("loss", "bits_per_byte"))
        yield some[-1]["step"], tokens, *(round(mean, 5) for mean in means)  # type: ignore[misc]


def run_all(tasks: Sequence[Task], gpus: int, deadline: float) -> list[str]:
    """Runs each task in a process of its own, one a GPU at a time, and records it; returns what failed, and why.

    What still runs `deadline` seconds from now is ended; its curve so far is kept.
    """
    ends, failed = time.monotonic() + deadline, []
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(gpus):
        free.put(gpu)

    def run(task: Task) -> str:
        gpu = free.get()
        try:
            return run_one(task, gpu, gpus, ends - time.monotonic())
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpus) as pool:
        running = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(running):
            task, problem = running[future], future.result()
            if problem:
                failed.append(f"{task.name}: {problem}, see {task.folder}.log")
            note(task)
    return failed


def run_one(task: Task, gpu: int, gpus: int, seconds: float) -> str:
    """Trains a family on a GPU in a new process; returns what went wrong, or nothing."""
    if seconds <= 0:
        return "no time was left to begin it"
    threads = max(1, (os.cpu_count() or 1) // gpus)
    options = ["--here", "--work", str(task.work), "--size", task.size, "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.small_models", *options, task.family, *task.overrides]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[gpu], "PYTHONUNBUFFERED": "1"}
    with open(f"{task.folder}.log", "w") as log:
        place: dict[str, Any] = {"cwd": recording.ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
        try:
            code = subprocess.run(command, timeout=seconds, **place).returncode
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
    lines = Path(f"{task.folder}.log").read_text().splitlines()
    return f"exit status {code}{f': {lines[-1]}' if lines else ''}" if code else ""


def note(task: Task) -> None:
    """Records what a family reached, and its curve, whole or not."""
    if (task.folder / "metrics.jsonl").exists():
        keep_curve(task)
    if not (task.folder / RESULT).exists():
        return
    result = json.loads((task.folder / RESULT).read_text())
    bits = {f"bits per byte in rows of {length}": value for length, value in result["by length"].items()}
    kinds = result["share and nats by kind"].items()
    figures = {
        page.PARAMETERS: (result["parameters"], "parameters", None),
        page.TOKENS: (result["tokens"], "tokens", None),
        page.HELDOUT: (result["heldout"], "bits/byte", None),
        **{metric: (value, "bits/byte", None) for metric, value in bits.items()},
        **{page.share_of(kind): (share, "of tokens", None) for kind, (share, _) in kinds},
        **{page.nats_of(kind): (nats, "nats/token", None) for kind, (_, nats) in kinds},
        page.RATE: (result["tokens per second"], "/s", None),
        page.MEMORY: (result["memory"] / 2**30, "GiB", None),
        page.SECONDS: (result["seconds"], "s", page.BUDGET),
    }
    for metric, (value, unit, floor) in figures.items():
        recording.record(page.BENCH, task.name, "longscan", metric, value, unit, floor)


def keep_curve(task: Task) -> None:
    """Puts the family's curve among those kept, in the place of an older one."""
    file = page.curves_file()
    kept = [line for line in page.read_curves(file) if line["preset"] != task.name]
    new = [dict(zip(page.CURVE, (task.name, *point), strict=True)) for point in curve(task.folder)]
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, page.CURVE, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/small_models"), help="folder for corpus and runs")
    parser.add_argument("--text", type=Path, help="folder of Python sources; not needed with --here")
    parser.add_argument(
        "--gpus", type=int, default=max(1, torch.cuda.device_count()), help="of those visible, how many to use"
    )
    parser.add_argument("--size", default="small", help="which preset of each family")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens of the BPE")
    parser.add_argument("--deadline", type=float, help="seconds after which all is ended; 9 minutes a family and GPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a family; 0 = all cores")
    parser.add_argument("--here", action="store_true", help="train in this process")
    parser.add_argument("what", nargs="*", metavar="FAMILY or KEY=VALUE", help=f"of {', '.join(FAMILIES)}; all")
    options = parser.parse_args(arguments)
    options.overrides = tuple(word for word in options.what if "=" in word)
    options.families = [word for word in options.what if "=" not in word] or list(FAMILIES)
    unknown = set(options.families) - set(FAMILIES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no family; known: {', '.join(FAMILIES)}")
    if not options.here and options.text is None:
        parser.error("name the folder of Python sources with --text")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares the corpus, trains and scores the families, writes the page; exits 1 where one failed."""
    began, options = time.monotonic(), parse(arguments)
    work = options.work.resolve()
    tasks = [Task(family, options.size, work, options.overrides) for family in options.families]
    if options.here:
        for task in tasks:
            print(json.dumps(measure(task, options.threads)))
        return
    deadline = options.deadline or page.BUDGET * math.ceil(len(tasks) / options.gpus)
    prepare(options.text, work, options.vocabulary)
    print(f"prepared in {time.monotonic() - began:.0f} s", file=sys.stderr)
    failed = run_all(tasks, options.gpus, deadline - (time.monotonic() - began))
    page.write()
    print(f"{len(tasks) - len(failed)} of {len(tasks)} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
