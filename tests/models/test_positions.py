"""Positions: rotations, sinusoids, ALiBi's slopes, and models that differ in nothing else."""

import math

import pytest
import torch

from longscan.kernels import Segments, rotary
from longscan.models import LanguageModel, config_from_mapping
from longscan.models.config import told_positions, with_positions
from longscan.models.positions import alibi_slopes, rotary_table, sinusoids


def test_scores_depend_on_distance_alone_however_far():
    """fp32 scores at position a million are those at position 0: angles are formed in fp64."""
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(position: int) -> float:
        tables = [rotary_table(torch.tensor([[p]]), 64, 10000.0, torch.float32) for p in (position + 37, position)]
        return (rotary(q, *tables[0]) * rotary(k, *tables[1])).sum().item()

    assert abs(score(1_000_000) - score(0)) < 1e-4


def released_slopes(heads: int) -> list[float]:
    """The slopes as the ALiBi paper and its code define them, by recursion."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    power = 2 ** int(math.log2(heads))
    return released_slopes(power) + released_slopes(2 * power)[0::2][: heads - power]


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 40])
def test_slopes_are_the_released_ones(heads):
    ours = alibi_slopes(heads, torch.device("cpu"))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.tolist(), released_slopes(heads), rtol=1e-6, atol=0)


def test_slopes_of_eight_heads():
    assert alibi_slopes(8, torch.device("cpu")).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(8, torch.device("cpu"), 0.25).tolist() == [2.0**-h / 4 for h in range(1, 9)]


@pytest.mark.parametrize(("position", "key"), [("rope", "rope_base"), ("alibi", "alibi_scale")])
@pytest.mark.parametrize("mixer", ["attention", "local_attention"])
def test_other_positions_make_the_model_that_was_built_with_them(position, key, mixer):
    options = {"heads": 3, "head_dim": 8, "position": position}
    shape = {"vocab_size": 32, "width": 24, "layers": 2, "pattern": [mixer, "rg_lru"], "rg_lru": {"gate_blocks": 1}}
    config = config_from_mapping({**shape, mixer: options})
    changed = with_positions(config, **{key: 0.25 if position == "alibi" else 500.0})
    assert told_positions(config) == told_positions(changed) == {position}
    logits = {}
    for name, built in (("before", config), ("built", changed), ("changed", config)):
        model = LanguageModel(built).double()
        model.init_weights(0)
        if name == "changed":
            model.use_positions(changed)
            assert model.config == changed
        tokens = torch.arange(20).view(1, 20)
        logits[name] = model(tokens, Segments.whole(1, 20))
        stepped, carry = [], model.init_carry(1)
        for token in tokens.unbind(1):
            step, carry = model.step(token, carry)
            stepped.append(step)
        torch.testing.assert_close(torch.stack(stepped, 1), logits[name])
    assert torch.equal(logits["built"], logits["changed"])
    assert not torch.allclose(logits["built"], logits["before"])


def test_sinusoids_are_the_papers():
    table = sinusoids(torch.tensor([[0, 3, 1000]]), 6, torch.float64)[0]
    for row, position in zip(table, (0, 3, 1000), strict=True):
        angles = [position / 10000 ** (2 * i / 6) for i in range(3)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row.tolist(), expected, rtol=1e-12, atol=1e-12)


TWINS = {
    "rope": {"attention": {"head_dim": 8, "position": "rope"}},
    "alibi": {"attention": {"head_dim": 8, "position": "alibi"}},
    "sinusoidal": {"attention": {"head_dim": 8, "position": "none"}, "position_embedding": "sinusoidal"},
    "none": {"attention": {"head_dim": 8, "position": "none"}},
}


def test_twins_differ_in_positions_only(make_config, tokens):
    """Same parameters in all four; the same first token's logits but for the sinusoids, others differ."""
    logits = {}
    for name, fields in TWINS.items():
        model = LanguageModel(make_config(pattern=["attention"], embedding_scale=True, **fields))
        model.init_weights(0)
        logits[name] = model.double()(tokens, Segments.whole(2, 31))
        model.load_state_dict(dict(model.state_dict()), strict=True)
    for name in ("rope", "alibi"):
        torch.testing.assert_close(logits[name][:, 0], logits["none"][:, 0], rtol=1e-12, atol=1e-12)
    for name in ("rope", "alibi", "sinusoidal"):
        assert ((logits[name][:, 20] - logits["none"][:, 20]).norm(dim=-1) > 1e-2).all(), name


@pytest.mark.parametrize("name", ["sinusoidal", "none"])
def test_only_positions_tell_permuted_pasts_apart(make_config, tokens, name):
    """Without positions one layer of attention sees its past as a set; with sinusoids it does not."""
    model = LanguageModel(make_config(layers=1, pattern=["attention"], embedding_scale=True, **TWINS[name]))
    model.init_weights(0)
    model.double()
    swapped = tokens.clone()
    swapped[:, [3, 9]] = tokens[:, [9, 3]]
    last = [model(each, Segments.whole(2, 31))[:, -1] for each in (tokens, swapped)]
    difference = (last[0] - last[1]).norm(dim=-1)
    changed = tokens[:, 3] != tokens[:, 9]
    assert changed.any()
    assert (difference < 1e-12).all() if name == "none" else (difference[changed] > 1e-6).all()
