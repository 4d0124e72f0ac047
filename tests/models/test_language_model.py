"""The model as a whole: pieces, steps, initialisation, precision and options."""

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ConfigError
from longscan.kernels import Segments
from longscan.models import LanguageModel, LocalBackend, num_params
from longscan.models.backend import lookup

PATTERNS = {
    "griffin": ["rg_lru", "rg_lru", "local_attention"],
    "hawk": ["rg_lru"],
    "based": ["short_conv", "taylor_attention", "local_attention"],
    "transformer": ["attention"],
    "linearized": ["linearized_attention"],
}
EVERY_MIXER = ["attention", "linearized_attention", "local_attention", "rg_lru", "short_conv", "taylor_attention"]


def loss_gradients(model, logits, labels):
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("cuts", [[1], [12], [5, 13, 14, 30]], ids=str)
def test_whole_equals_pieces(make_model, tokens, segments, pattern, cuts):
    model = make_model(pattern=pattern, position_embedding="sinusoidal")
    carry, pieces = model.init_carry(2), []
    for begin, end in zip([0, *cuts], [*cuts, 31], strict=True):
        hidden, carry = model.extend(tokens[:, begin:end], carry, segments.split(begin, end))
        pieces.append(model.head(hidden))
    whole, split = model(tokens, segments), torch.cat(pieces, dim=1)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-11)
    labels = tokens.roll(-1, 1)
    expected, actual = (loss_gradients(model, logits, labels) for logits in (whole, split))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)
    assert carry.position.tolist() == [18, 31]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_prefill_and_steps_equal_forward(make_model, tokens, pattern, chunk):
    model = make_model(pattern=pattern, position_embedding="sinusoidal")
    whole = model(tokens, Segments.whole(2, 31))
    logits, carry = model.prefill(tokens[:, :20], chunk=chunk)
    torch.testing.assert_close(logits, whole[:, 19], rtol=1e-9, atol=1e-11)
    for t in range(20, 31):
        logits, carry = model.step(tokens[:, t], carry)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pattern", [p for n, p in PATTERNS.items() if n != "transformer"], ids=str)
def test_the_carry_does_not_grow(make_model, pattern):
    model = make_model(torch.float32, pattern=pattern)
    long_prompt = torch.zeros(1, 200, dtype=torch.int64)
    shapes = []
    for length in (1, 200):
        _, carry = model.prefill(long_prompt[:, :length])
        shapes.append([{name: tensor.shape for name, tensor in layer.items()} for layer in carry.layers])
    assert shapes[0] == shapes[1]


def test_values_come_from_names_alone(make_model, make_config):
    """The same parameter has the same values whatever was drawn before it, and differs from every other."""
    long, short = (LanguageModel(make_config(layers=layers)) for layers in (6, 3))
    torch.manual_seed(1)
    long.init_weights(5)
    short.init_weights(5)
    values = dict(long.named_parameters())
    for name, parameter in short.named_parameters():
        if "output.weight" not in name and "down.weight" not in name:  # their variance depends on the depth
            assert torch.equal(parameter, values[name]), name
    drawn = [p.flatten()[:4] for p in values.values() if p.numel() > 4 and p.any()]
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn)
    other = LanguageModel(make_config())
    other.init_weights(6)
    assert not torch.equal(other.embedding.weight, short.embedding.weight)


def test_meta_build_gives_the_same_values(make_config):
    plain = LanguageModel(make_config())
    plain.init_weights(0)
    with torch.device("meta"):
        lazy = LanguageModel(make_config())
    assert all(parameter.is_meta for parameter in lazy.parameters())
    lazy.to_empty(device="cpu")
    lazy.init_weights(0)
    for (name, parameter), other in zip(plain.named_parameters(), lazy.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_initial_loss_is_that_of_guessing(make_config, tokens):
    model = LanguageModel(make_config(vocab_size=50))
    model.init_weights(0)
    loss = F.cross_entropy(model(tokens, Segments.whole(2, 31)).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert abs(loss.item() - torch.tensor(50.0).log().item()) < 1.0


def test_what_does_not_decay(make_config):
    model = LanguageModel(make_config(tie_embeddings=False, layers=6, pattern=EVERY_MIXER))
    kept = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        rg_lru = any(part in name for part in ("a_param", "gate_a", "gate_x"))
        assert (name in kept) == (rg_lru or parameter.ndim == 1), name


def test_untied_scaled_and_capped(make_model, tokens, segments):
    model = make_model(tie_embeddings=False, embedding_scale=True, logit_soft_cap=2.0)
    assert sum(p.numel() for p in model.parameters()) == num_params(model.config)
    logits = model(tokens, segments)
    raw = model.hidden(tokens, segments) @ model.unembedding.weight.T
    torch.testing.assert_close(logits, 2 * torch.tanh(raw / 2))
    factor = 5.65625  # sqrt(32) in bf16
    torch.testing.assert_close(model.embed(tokens, segments.positions), model.embedding.weight[tokens] * factor)


def test_activation_checkpointing_changes_nothing(make_model, tokens, segments):
    results = []
    for mode in ("none", "selective", "full"):
        model = make_model(options={"activation_checkpoint": mode})
        results.append(loss_gradients(model, model(tokens, segments), tokens.roll(-1, 1)))
    # What is computed again has the MLP in tiles, whose products may round another way.
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_activation_checkpointing_keeps_less(make_model, tokens, segments):
    kept = []
    for mode in ("none", "selective", "full"):
        model, saved = make_model(options={"activation_checkpoint": mode}), {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.hidden(tokens, segments)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in parameters))
    none, selective, full = kept
    assert selective < 0.75 * none
    assert full < 0.5 * selective


def test_precisions(make_model, tokens, segments):
    exact = make_model()(tokens, segments)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = make_model(dtype)
        logits = model(tokens, segments)
        assert logits.dtype == dtype
        assert (logits.double() - exact).norm() / exact.norm() < bound
        stepped, _ = model.step(tokens[:, 0], model.init_carry(2))
        assert stepped.dtype == dtype


def test_another_backend_makes_every_layer(make_config):
    """All matrices come from the backend, so a backend that divides them is enough for tensor parallelism."""
    made = []

    class Recording(LocalBackend):
        def column_linear(self, *arguments):
            return self._note(super().column_linear(*arguments))

        def row_linear(self, *arguments):
            return self._note(super().row_linear(*arguments))

        def head_linear(self, *arguments):
            return self._note(super().head_linear(*arguments))

        def block_diagonal_linear(self, *arguments):
            return self._note(super().block_diagonal_linear(*arguments))

        def embedding(self, *arguments):
            return self._note(super().embedding(*arguments))

        def _note(self, layer):
            made.extend(layer.parameters())
            return layer

    model = LanguageModel(make_config(layers=6, pattern=EVERY_MIXER), backend=Recording())
    from_backend = {id(parameter) for parameter in made}
    others = [name for name, parameter in model.named_parameters() if id(parameter) not in from_backend]
    own = ("scale", "a_param", "conv_weight", "conv_bias", "query_map", "key_map")
    assert all(name.endswith(own) for name in others), others


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_it_learns(make_config, pattern):
    """A text of period 5 is soon predicted, its first tokens aside."""
    model = LanguageModel(make_config(pattern=pattern))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(5).repeat(4, 7) * 9 + torch.arange(4)[:, None]
    for _ in range(40):
        logits = model(text[:, :-1], Segments.whole(4, 34))
        loss = F.cross_entropy(logits[:, 5:].flatten(0, 1), text[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 8e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_gpu_agrees(make_model, tokens, segments, pattern, dtype, bound):
    """Logits, gradients and steps on a GPU, the kernels chosen by "auto", against fp64 on the CPU."""
    exact, model = make_model(pattern=pattern), make_model(dtype, pattern=pattern).cuda()
    labels = tokens.roll(-1, 1)
    expected, actual = exact(tokens, segments), model(tokens.cuda(), segments.to("cuda"))
    assert (actual.double().cpu() - expected).norm() / expected.norm() < bound
    _, exact_gradients = loss_gradients(exact, expected, labels)
    _, gradients = loss_gradients(model, actual.float(), labels.cuda())
    for (name, _), ours, wanted in zip(model.named_parameters(), gradients, exact_gradients, strict=True):
        assert (ours.double().cpu() - wanted).norm() <= 3 * bound * wanted.norm() + 1e-6, name
    logits, carry = model.prefill(tokens[:, :20].cuda(), chunk=8)
    stepped, _ = model.step(tokens[:, 20].cuda(), carry)
    whole = exact(tokens, Segments.whole(2, 31))
    for ours, wanted in ((logits, whole[:, 19]), (stepped, whole[:, 20])):
        assert (ours.double().cpu() - wanted).norm() / wanted.norm() < bound


def test_bad_options_are_refused(make_config):
    with pytest.raises(ConfigError, match="vocab_size=0"):
        LanguageModel(make_config(vocab_size=0))
    with pytest.raises(ConfigError, match="activation_checkpoint='some'"):
        LanguageModel(make_config(), activation_checkpoint="some")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_embedding_of_frequent_tokens_repeats_its_gradient():
    tokens = torch.randint(50, (1, 4096), generator=torch.Generator().manual_seed(0)).cuda()
    table, upstream = torch.randn(50, 256, device="cuda", requires_grad=True), torch.randn(1, 4096, 256, device="cuda")
    first, *others = (torch.autograd.grad(lookup(tokens, table), table, upstream)[0] for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
