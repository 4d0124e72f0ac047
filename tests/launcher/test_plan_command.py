"""`longscan plan` as a user meets it."""

import json

import pytest

from longscan.launcher import cli

BATCH = ("batch.tokens=4096", "batch.micro_rows=1")
SMALL = ("griffin-tiny", "model.vocab_size=320", "stages=[{seq_len: 512, tokens: 1M}]", *BATCH)


@pytest.fixture
def plan(capsys):
    """Runs `longscan plan`; gives exit code, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, " ".join(captured.err.split())

    return run


def test_a_layout_is_printed(plan):
    code, out, _ = plan(*SMALL, "--gpus", 4, "parallel.context=2")
    assert code == 0
    assert "4 GPUs: data 2 x context 2 x tensor 1 x pipeline 1" in out
    for word in ("parameters", "gradients", "optimizer", "activations", "largest temporary", "carry", "fits"):
        assert word in out


def test_json_holds_every_rank_and_byte(plan):
    code, out, _ = plan(*SMALL, "--gpus", 4, "parallel.context=2", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["notes"] == []
    assert [(rank["data"], rank["context"]) for rank in found["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    (stage,) = found["stages"]
    parts = ("parameters", "gradients", "optimizer", "activations", "temporary")
    assert stage["total"] == sum(stage[part] for part in parts)
    assert stage["layers"] == [0, 1, 2]
    assert found["layout"]["data"] == 2 and found["micro_batches"] == 4


def test_a_corpus_is_not_needed(plan):
    code, out, _ = plan("griffin-1.3b", "--json")
    found = json.loads(out)
    assert code == 0 and "a vocabulary of 32,000 is assumed" in found["notes"][0]


def test_the_stage_that_takes_most_is_planned(plan):
    stages = "stages=[{seq_len: 512, tokens: 1M}, {seq_len: 2048, tokens: 1M, micro_rows: 2}]"
    code, out, _ = plan(*SMALL, stages, "--json")
    found = json.loads(out)
    assert code == 0 and (found["seq_len"], found["micro_rows"]) == (2048, 2)


def test_recomputation_is_the_configurations(plan):
    totals = []
    for mode in ("none", "full"):
        _, out, _ = plan(*SMALL, f"run.activation_checkpoint={mode}", "--json")
        totals.append(json.loads(out)["stages"][0]["activations"])
    assert totals[0] > totals[1]


def test_what_does_not_fit_is_told_with_a_remedy(plan):
    code, out, _ = plan("griffin-1.3b", "--gpu", "l40s")
    assert code == 0
    assert "does not fit" in out and "  with " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "3", "parallel.tensor=3"], "parallel.tensor=3 does not divide model.rg_lru.gate_blocks=4"),
        (["--gpus", "4", "parallel.context=3"], "parallel.context=3 does not divide the row length 512"),
        (["--gpus", "2", "parallel.context=4"], "but 2 are to be started"),
        (["--gpu", "h1"], "unknown GPU 'h1'"),
        (["run.activation_checkpoint=some"], "run.activation_checkpoint is 'some'"),
        (["--simulate", "--gpus", "4"], "begins at 8 GPUs"),
        (["--simulate", "--measured", "nowhere.jsonl"], "holds no results"),
    ],
)
def test_bad_layouts_are_refused_before_anything_starts(plan, arguments, said):
    code, _, error = plan(*SMALL, *arguments)
    assert code == 2
    assert said in error


def test_a_study_is_printed_and_drawn(plan, tmp_path):
    image = tmp_path / "simulate.png"
    arguments = ("griffin-1.3b", "--simulate", "--gpus", 16, "--lengths", "32Ki", "--plot", image)
    code, out, error = plan(*arguments)
    assert code == 0 and "rows of 32,768 scale to" in out and "context ranks" in out
    assert image.read_bytes().startswith(b"\x89PNG") and "wrote" in error
    code, _, error = plan(*arguments)
    assert code == 1 and "name another file" in error


def test_a_study_as_json(plan):
    code, out, _ = plan("griffin-1.3b", "--simulate", "--gpus", 16, "--lengths", "32Ki,64Ki", "--json")
    found = json.loads(out)
    assert code == 0
    assert [entry["seq_len"] for entry in found["lengths"]] == [32768, 65536]
    for entry in found["lengths"]:
        assert [step["gpus"] for step in entry["steps"]] == [8, 16]
        for step in entry["steps"]:
            assert sum(step["terms"].values()) == pytest.approx(step["seconds"], rel=1e-3)
    assert found["carries"][0]["ranks"] == 2
