"""Results made up for the tests, in a folder of their own."""

import json

import pytest

from longscan.benchmarks import figures

BASE = {"bench": "kernels", "unit": "ms", "floor": None, "device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2"}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes figures, given as dicts of what differs, one second apart, as the only results there are."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path)

    def write(*lines: dict) -> None:
        text = ""
        for second, line in enumerate(lines):
            date = f"2026-01-01T00:00:{second:02d}+00:00"
            text += json.dumps(BASE | {"commit": "c", "date": date} | line) + "\n"
        (tmp_path / "some.jsonl").write_text(text)

    return write
