"""The run folder: lines survive crashes, nothing is overwritten, one process at a time."""

import os
import subprocess
import sys
import warnings

import pytest

from longscan.errors import ConfigError, UserError
from longscan.launcher.run_folder import JsonLines, RunFolder, standing, write_new


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    made = RunFolder.create(tmp_path / "runs" / "one")
    made.save_config("a: 1\n")
    return made


def test_a_new_folder_has_its_rooms(folder):
    assert folder.exists
    assert {entry.name for entry in folder.path.iterdir()} == {"config.yaml", "checkpoints", "tensorboard", "evals"}
    assert RunFolder.open(folder.path) == folder
    assert RunFolder.create(folder.path) == folder


def test_fresh_refuses_a_run_that_took_a_step_and_takes_what_took_none(folder, tmp_path):
    assert RunFolder.create(folder.path, fresh=True) == folder
    folder.metrics.append({"step": 1})
    with pytest.raises(ConfigError, match="already holds a run and --fresh never overwrites"):
        RunFolder.create(folder.path, fresh=True)
    RunFolder.create(tmp_path / "two", fresh=True)
    RunFolder.create(tmp_path / "two", fresh=True)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis.tex but no config.yaml"):
        RunFolder.create(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder.create(tmp_path / "file" / "run")


@pytest.mark.parametrize(("name", "message"), [("nothing", "does not exist"), (".", "holds no run")])
def test_opening_no_run_is_refused(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        RunFolder.open(tmp_path / name)


def test_a_changed_config_is_added_and_the_newest_stands(folder):
    assert folder.save_config("a: 1\n").name == "config.yaml"
    assert folder.save_config("a: 2\n").name == "config-2.yaml"
    for number in range(3, 12):
        folder.save_config(f"a: {number}\n")
    assert folder.config_file.name == "config-11.yaml"
    assert (folder.path / "config.yaml").read_text() == "a: 1\n"


def test_lines_come_back_in_order(tmp_path):
    lines = JsonLines(tmp_path / "x.jsonl")
    assert lines.read() == []
    for step in range(3):
        lines.append({"step": step, "text": "é\n"})
    assert [record["step"] for record in lines.read()] == [0, 1, 2]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append({"loss": float("nan"), "norm": float("inf"), "ok": 1.5})
    assert lines.read() == [{"loss": None, "norm": None, "ok": 1.5}]


def test_every_way_of_tearing_the_last_line_loses_that_line_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    lines.append({"step": 2, "loss": 1.25})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lines.append({"step": 3})
            assert [record["step"] for record in lines.read()] == [1, 3]
        assert len(caught) == (1 if cut > first else 0)
        assert not caught or "x.jsonl:2 is not a whole record" in str(caught[0].message)
    path.write_bytes(whole[:-1])
    lines.append({"step": 3})
    assert [record["step"] for record in lines.read()] == [1, 2, 3]


def test_the_highest_incarnation_of_a_step_stands():
    records = [
        {"step": 2, "incarnation": 1, "loss": 2.0},
        {"step": 1, "incarnation": 1, "loss": 1.0},
        {"step": 3, "incarnation": 1, "loss": 3.0},
        {"step": 2, "incarnation": 2, "loss": 2.5},
        {"step": 2, "incarnation": 1, "loss": 9.0},
    ]
    assert [(r["step"], r["loss"]) for r in standing(records)] == [(1, 1.0), (2, 2.5), (3, 3.0)]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "x.jsonl")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(UserError, match="the disk is full"):
        lines.append({"step": 1})
    monkeypatch.undo()
    lines.append({"step": 2})
    with pytest.warns(UserWarning):
        assert lines.read() == [{"step": 2}]


def test_write_new_never_replaces(tmp_path):
    write_new(tmp_path / "a", "1")
    with pytest.raises(UserError, match="File exists"):
        write_new(tmp_path / "a", "2")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a", "1")]


HOLD = """
import sys
from longscan.launcher.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(folder):
    with folder.lock():
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by pid {holder.pid} on "), folder.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder.lock():
        pass


@pytest.mark.parametrize(
    "act", [lambda folder: folder.ledger.append({"step": 1}), lambda folder: folder.lock().__enter__()]
)
def test_a_folder_that_may_not_be_written_is_said(folder, act, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="cannot write to .*: Permission denied"):
        act(folder)
