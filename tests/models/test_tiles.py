"""The MLP in tiles of tokens: gradients of the whole, in tiles of any length, computed once and handed out once."""

import pytest
import torch

from longscan.models import LocalBackend, tiles
from longscan.models.mlp import MLP
from longscan.models.norm import RMSNorm
from longscan.models.parameters import init_parameters

MODES = ("selective", "full", "offload")
MLPS = {
    "gated": {"mlp": {"hidden": 80}},
    "plain": {"mlp": {"hidden": 80, "gated": False, "activation": "relu", "bias": True}, "norm": "layer"},
}


def trained(make_model, tokens, segments, mode, **fields):
    """The hidden states of a model in that mode, and the gradients of all parameters."""
    model = make_model(options={"activation_checkpoint": mode}, **fields)
    hidden = model.hidden(tokens, segments)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden)
    return [hidden.detach(), *torch.autograd.grad((hidden * weight).sum(), list(model.parameters()))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mlp", MLPS.values(), ids=MLPS)
@pytest.mark.parametrize("tile", [2, 14, 61, 62])
def test_tiles_of_any_length_give_the_whole(monkeypatch, make_model, tokens, segments, tile, mlp, mode):
    expected = trained(make_model, tokens, segments, "none", **mlp)
    monkeypatch.setattr(tiles, "TILE", tile)
    found = trained(make_model, tokens, segments, mode, **mlp)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tile", [5, 62])
def test_every_mode_has_the_same_bits(monkeypatch, make_model, tokens, segments, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    results = [trained(make_model, tokens, segments, mode) for mode in MODES]
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("rows, tokens, tile", [(1, 31, 31), (2, 31, 30), (3, 7, 2), (1, 100, 33), (5, 1, 2)])
def test_tiles_cover_every_token_once(monkeypatch, rows, tokens, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    x = torch.arange(tokens).expand(rows, tokens)
    pieces = [x[:, each] for each in tiles._tiles(x)]
    assert torch.equal(torch.cat(pieces, dim=1), x)
    assert all(piece.numel() <= max(tile, rows) for piece in pieces)
    assert len(pieces) == 1 or rows * tokens > tile


def test_sums_over_tiles_round_once(monkeypatch, make_config):
    """In bf16 a gradient over many tiles is about as near to the exact one as that of the whole."""
    norm, mlp = RMSNorm(32, 1e-6), MLP(make_config(), LocalBackend())
    for module in (norm, mlp):
        init_parameters(module, 0)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, 2048, 32, generator=generator).bfloat16() for _ in range(2))

    def gradients(dtype):
        parameters = [*norm.to(dtype).parameters(), *mlp.to(dtype).parameters()]
        return torch.autograd.grad(mlp(x.to(dtype), norm=norm), parameters, dy.to(dtype))

    whole, exact = gradients(torch.bfloat16), gradients(torch.float64)
    monkeypatch.setattr(tiles, "TILE", 8)
    for tiled, once, reference in zip(gradients(torch.bfloat16), whole, exact, strict=True):
        assert tiled.dtype == torch.bfloat16
        errors = [(each.double() - reference).norm() / reference.norm() for each in (tiled, once)]
        assert errors[0] < 2 * errors[1], errors


@pytest.mark.parametrize("mode, times", [("none", 1), ("selective", 2), ("full", 2)])
def test_it_is_computed_again_once(monkeypatch, make_model, tokens, segments, mode, times):
    """Each tile forward, and once more for its gradients, whatever is around it."""
    monkeypatch.setattr(tiles, "TILE", 16)
    feed, seen = MLP._feed, []
    monkeypatch.setattr(MLP, "_feed", lambda self, x: seen.append(x.shape[:2].numel()) or feed(self, x))
    trained(make_model, tokens, segments, mode)
    assert sum(seen) == times * tokens.numel() * make_model().config.layers
    assert max(seen) <= (62 if mode == "none" else 16)


def test_a_parameter_gets_one_gradient(monkeypatch, make_model, tokens, segments):
    """Its hooks see the sum over the tiles, once, before it is accumulated and after."""
    monkeypatch.setattr(tiles, "TILE", 5)
    model, calls = make_model(options={"activation_checkpoint": "full"}), {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.setdefault(name, []).append(grad.clone()))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls[name].append(p.grad.clone()))
    model.hidden(tokens, segments).square().sum().backward()
    assert len(calls) == len(list(model.parameters()))
    for name, (before, after) in calls.items():
        assert torch.equal(before, after), name


def test_frozen_parameters_get_none(monkeypatch, make_model, tokens, segments):
    monkeypatch.setattr(tiles, "TILE", 5)
    gradients = []
    for mode in ("none", "full"):
        model = make_model(options={"activation_checkpoint": mode})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp.gate" in name or "mixer.output" in name)
        model.hidden(tokens, segments).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, tiled = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(tiled[name], gradient, rtol=1e-11, atol=1e-13)


def test_without_gradients_nothing_is_kept(monkeypatch, make_model, tokens, segments):
    monkeypatch.setattr(tiles, "TILE", 5)
    expected = make_model().hidden(tokens, segments)
    for mode in MODES:
        with torch.no_grad():
            found = make_model(options={"activation_checkpoint": mode}).hidden(tokens, segments)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
