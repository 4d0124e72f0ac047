"""`longscan models`: its rows, its JSON, its page."""

import json
from pathlib import Path

import pytest

from longscan.launcher import cli
from longscan.launcher.models_report import FAMILIES, ModelsReport, in_units
from longscan.models.config import config_from_mapping, flops_per_token, load_preset, num_params, preset_names

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def output(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["models", *arguments])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_the_table_has_every_preset_whole_and_is_that_of_the_page(capsys):
    lines = [line.rstrip() for line in output(capsys).splitlines()]
    assert sorted(line.split()[0] for line in lines[1:]) == preset_names()
    assert not [line for line in lines if "\u2026" in line or len(line) > cli.PIPE_WIDTH]
    block = PAGE.read_text().split("```text\n")[1].split("```")[0]
    assert block.splitlines() == lines, "paste the output of `longscan models | cat` into docs/models.md"


def test_json_has_the_exact_figures(capsys):
    rows = {row["preset"]: row for row in json.loads(output(capsys, "--json"))}
    assert sorted(rows) == preset_names()
    config = config_from_mapping(load_preset("based-1.4b") | {"vocab_size": 50264})
    row = rows["based-1.4b"]
    assert (row["family"], row["published"], row["parameters"]) == ("based", "1.35B", num_params(config))
    assert row["parameters"] - row["parameters_without_embedding"] == 50264 * 1792
    assert row["difference"] == pytest.approx(num_params(config) / 1.35e9 - 1)
    assert row["flops_per_token_2k"] == flops_per_token(config, 2048)
    assert row["flops_per_token_32k"] == flops_per_token(config, 32768)
    assert rows["griffin-tiny"]["published"] is None
    assert rows["griffin-tiny"]["difference"] is None


def test_a_carry_grows_in_full_attention_alone():
    rows = {row.preset: row for row in ModelsReport.of_all().rows}
    assert rows["llama-7b"].carry_bytes_32k == 2 * 2 * 4096 * 32 * 32768
    assert rows["griffin-7b"].carry_bytes_32k < rows["llama-7b"].carry_bytes_32k / 1000


def test_families_come_together_the_smallest_first():
    rows = ModelsReport.of_all().rows
    assert list(dict.fromkeys(row.family for row in rows)) == list(FAMILIES.values())
    for family in FAMILIES.values():
        sizes = [row.parameters_without_embedding for row in rows if row.family == family]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (999, "999"),
        (999.5, "1.00K"),
        (1000, "1.00K"),
        (113.9e6, "114M"),
        (9.999e6, "10.0M"),
        (1.35e9, "1.35G"),
    ],
)
def test_units(number, text):
    assert in_units(number) == text
