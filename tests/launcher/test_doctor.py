"""The doctor finds what is there, says what is not, and survives whatever a broken machine throws at it."""

import os
import sys

import pytest
from rich.console import Console

from longscan.launcher.cluster import doctor

EXPECTED = {"Python", "PyTorch", "NCCL", "gloo", "deepspeed", "megatron-core", "Ray", "Slurm", "CPU cores", "memory"}
EXPECTED |= {"/dev/shm", "disk here", "open files", "Triton"}


def test_every_subject_has_a_row_and_every_row_a_detail():
    rows = doctor.examine().rows
    assert {row.check for row in rows} >= EXPECTED
    assert {row.status for row in rows} <= {"ok", "warn", "missing"}
    assert all(row.detail for row in rows)
    found = {row.check: row for row in rows}
    assert (found["Python"].status, found["gloo"].status) == ("ok", "ok")
    assert doctor.examine().to_json()[0] == {"check": "Python", "status": "ok", "detail": found["Python"].detail}


@pytest.mark.parametrize("error", [RuntimeError("driver/library mismatch\nmore"), ImportError(""), OSError(5, "io")])
def test_a_check_that_raises_becomes_a_row(error, monkeypatch):
    def broken():
        raise error
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"PyTorch": broken, "Python": doctor._python})
    torch, python = doctor.examine().rows
    assert (torch.check, torch.status) == ("PyTorch", "missing")
    assert type(error).__name__ in torch.detail
    assert "\n" not in torch.detail
    assert python.status == "ok"


def fake_sinfo(folder, body: str) -> None:
    file = folder / "sinfo"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ("echo 'gpu*    4 nodes up'; echo 'cpu 2 nodes up'", "ok", "gpu* 4 nodes up; cpu 2 nodes up"),
        ("echo 'cannot reach the controller' >&2; exit 1", "missing", "cannot reach the controller"),
    ],
)
def test_slurm(body, status, detail, tmp_path, monkeypatch):
    fake_sinfo(tmp_path, body)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    ((_, found, text),) = doctor._slurm()
    assert (found, detail in text) == (status, True)


def test_what_is_not_installed_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert {row[1] for check in (doctor._packages, doctor._ray, doctor._triton) for row in check()} == {"missing"}


def test_the_table_keeps_brackets(capsys):
    doctor.Findings([doctor.Row("a", "warn", "[red] is a word")]).show(Console(file=sys.stdout, width=80))
    assert "[red] is a word" in capsys.readouterr().out
