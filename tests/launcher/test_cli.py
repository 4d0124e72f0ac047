"""The command line as a user meets it: exit codes, one sentence an error, JSON on standard output, quick help."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from longscan import __version__
from longscan.launcher import cli
from longscan.launcher.config import resolve

HEAVY = ("torch", "ray", "deepspeed", "omegaconf", "matplotlib", "webdataset", "pyarrow")


@pytest.fixture
def longscan(capsys):
    """Runs a command in this process; gives exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = ["train", "griffin-tiny", f"data.corpora={corpus}", "run.threads=1", "logging.tensorboard=false"]
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "checkpoint.every=2", "checkpoint.keep_last=9", "--run", str(folder), "--stop-at", "3"])
    assert exit.value.code == 0
    return folder


def test_help_needs_no_heavy_library():
    code = (
        "import sys\nfrom longscan.launcher import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as exit:\n    assert not exit.code, exit.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    for command in ("prepare", "train", "eval", "generate", "config", "doctor", "models", "plan", "convert", "bench"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["prepare"],
        ["train"],
        ["eval"],
        ["eval", "extrapolate"],
        ["generate"],
        ["config"],
        ["doctor"],
        ["models"],
        ["plan"],
        ["convert"],
        ["linearize"],
        ["bench"],
        ["bench", "kernels"],
    ],
)
def test_every_command_explains_itself(command):
    done = CliRunner().invoke(cli.app, [*command, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output
    if command[0] not in ("doctor", "eval"):
        assert f"longscan {command[0]} " in done.output


def commands_of(command):
    """The command and all below it."""
    return [command, *(c for sub in getattr(command, "commands", {}).values() for c in commands_of(sub))]


def test_no_option_is_shown_by_its_own_name():
    """typer 0.27.0 to 0.27.2 take such a metavar, CONFIG of --config, for the name: the option is --CONFIG there."""
    options = [p for c in commands_of(typer.main.get_command(cli.app)) for p in c.params if p.opts[0].startswith("-")]
    assert len(options) > 20
    assert not [p.name for p in options if p.metavar and p.metavar.lower() == p.name.lower()]


def test_version(longscan):
    assert longscan("--version") == (0, f"longscan {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "griffin-tiny", "--frsh"], "No such option"),
        (["train", "griffin-tiny", "--stop-at", "x"], "Invalid value"),
        (["train", "griffin-tiny", "lr=3"], "error: unknown key lr; did you mean optimizer.lr?"),
        (["train", "griffin-tinny"], "did you mean griffin-tiny?"),
        (["train", "griffin-tiny"], "data.corpora is empty"),
        (["train", "griffin-tiny", "data.corpora=nowhere"], "nowhere; check the path, or make it with"),
        (["config"], "name a configuration"),
        (["config", "griffin-tiny", "nonsense"], "'nonsense' is not an override"),
        (["prepare", "/nowhere/at/all", "-o", "OUT"], "/nowhere/at/all"),
        (["prepare", "python-stdlib"], "Missing option"),
        (["prepare", "/", "-o", "OUT", "--shard-mib", "nan"], "--shard-mib is nan"),
        (["eval", "extrapolate", "nowhere"], "nowhere does not exist"),
        (["generate", "nowhere", "x"], "nowhere does not exist"),
    ],
)
def test_bad_usage_exits_2_with_a_sentence(arguments, message, longscan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = longscan(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_prepare_prints_a_table_or_json(longscan, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcdef":
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 500)
    (tmp_path / "texts" / "bad.txt").write_bytes(b"\xff\xfe")
    command = ["prepare", tmp_path / "texts", "-o", tmp_path / "corpus", "--heldout", "0.2", "--workers", "1"]
    code, out, _ = longscan(*command)
    assert code == 0
    assert "train" in out
    assert "heldout" in out
    assert "skipped 1" in out
    code, out, _ = longscan(*command, "--json")
    report = json.loads(out)
    assert report["already_there"] is True
    assert sum(split["bytes"] for split in report["splits"].values()) == 3000
    code, _, err = longscan(*command[:-2], "--field", "body")
    assert code == 2
    assert "error:" in err


def test_config_prints_yaml_that_reads_back(longscan, corpus, tmp_path):
    code, out, err = longscan("config", "griffin-demo", f"data.corpora={corpus}", "optimizer.lr=1e-3")
    assert code == 0
    assert re.fullmatch(r"ready to train: [\d,]{9,} parameters", err)
    (tmp_path / "mine.yaml").write_text(out)
    config = resolve(str(tmp_path / "mine.yaml"))
    assert (config.optimizer.lr, config.model.vocab_size) == (1e-3, 320)
    code, out, _ = longscan("config", "griffin-demo", f"data.corpora={corpus}", "--json")
    assert json.loads(out)["model"]["vocab_size"] == 320


def test_config_says_what_is_missing_and_lists_keys(longscan):
    code, out, err = longscan("config", "griffin-tiny")
    assert (code, out[:6]) == (0, "model:")
    assert "not ready to train: data.corpora is empty" in err
    code, out, _ = longscan("config", "--keys", "--json")
    keys = {key["name"]: key for key in json.loads(out)}
    assert keys["optimizer.lr"] == {
        "name": "optimizer.lr",
        "type": "float",
        "default": 1e-3,
        "meaning": "peak learning rate",
    }
    assert longscan("config", "--keys")[0] == 0


def test_train_again_resumes_and_fresh_refuses(trained, corpus, longscan):
    assert (trained / "checkpoints" / "step-3").is_dir()
    code, _, err = longscan("train", trained, "--fresh")
    assert code == 2
    assert "--fresh never overwrites" in err
    code, _, err = longscan("train", trained, "--stop-at", "4")
    assert code == 0
    assert f"stopped: {trained}; the same command resumes it" in err
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert [file.name for file in trained.glob("config*.yaml")] == ["config.yaml"]


def test_init_from_begins_a_new_run_with_those_weights(trained, corpus, longscan, tmp_path):
    command = ["train", "griffin-tiny", f"data.corpora={corpus}", "run.threads=1", "logging.tensorboard=false"]
    code, _, _ = longscan(*command, "--run", tmp_path / "new", "--init-from", trained, "--stop-at", "1")
    assert code == 0
    assert (tmp_path / "new" / "checkpoints" / "step-1").is_dir()
    code, _, err = longscan(*command, "--run", tmp_path / "other", "--init-from", tmp_path / "nothing")
    assert code == 2
    assert "nothing does not exist" in err


def test_generate_continues_the_prompt_and_repeats_itself(trained, longscan, monkeypatch):
    code, first, _ = longscan("generate", trained, "word12 ", "--tokens", "12", "--seed", "3")
    assert code == 0
    assert first.startswith("word12 ")
    assert longscan("generate", trained, "word12 ", "--tokens", "12", "--seed", "3")[1] == first
    code, _, err = longscan("generate", trained, "x", "--temperature", "-1")
    assert code == 2
    assert "temperature" in err
    code, out, err = longscan("generate", trained, "a\udcff")
    assert (code, out) == (2, "")
    assert "the prompt is not UTF-8" in err
    code, _, err = longscan("generate", trained, "x", "--device", "gpu")
    assert code == 2
    assert "'gpu'; it must be one of auto, cpu, cuda" in err


def test_extrapolate_writes_its_results_beside_the_table(trained, longscan):
    options = ["--lengths", "32,64,128", "--tokens", "512"]
    code, out, err = longscan("eval", "extrapolate", trained, *options)
    assert code == 0
    assert "(trained)" in out
    assert "xz -9" in out
    assert "extrapolation.png" in err
    code, out, _ = longscan("eval", "extrapolate", trained / "checkpoints" / "step-2", *options, "--json")
    result = json.loads(out)
    assert result["step"] == 2
    assert [score["length"] for score in result["lengths"]] == [32, 64, 128]
    assert json.loads((trained / "evals" / "extrapolation-2.json").read_text()) == result
    code, _, err = longscan("eval", "extrapolate", trained, "--lengths", "48,64")
    assert code == 2
    assert "48, which does not divide the longest, 64" in err
    code, _, err = longscan("eval", "extrapolate", trained, *options, "--output", trained / "config.yaml")
    assert code == 2
    assert "cannot write results into" in err
    code, _, err = longscan("eval", "extrapolate", trained, "--lengths", "64", "--tokens", "0")
    assert code == 2


def test_a_run_generates_without_its_corpus(trained, corpus, longscan):
    away = corpus.rename(corpus.with_name("away"))
    try:
        code, out, err = longscan("generate", trained, "def", "--tokens", "3")
    finally:
        away.rename(corpus)
    assert (code, out[:3]) == (0, "def"), err


def test_a_corpus_of_another_tokenizer_is_refused(trained, longscan, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words " * 200)
    assert longscan("prepare", text, "-o", tmp_path / "bpe", "--train-bpe", "270")[0] == 0
    code, _, err = longscan("eval", "extrapolate", trained, "--lengths", "64", "--corpus", tmp_path / "bpe")
    assert code == 2
    assert "was trained with bytes" in err


def test_a_real_process_ends_in_one_sentence_and_the_right_code(tmp_path):
    script = Path(sys.executable).with_name("longscan")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "longscan.launcher.cli"]
    done = subprocess.run([*command, "train", "griffin-tiny", "lr=1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown key lr; did you mean optimizer.lr?\n"
    assert done.stdout == ""


def test_an_interrupt_exits_130(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as exit:
        cli.main([])
    assert exit.value.code == 130
