"""A twin matches its teacher's attention, and adapters: what they change, what they leave, and that they merge."""

import dataclasses

import pytest
import torch

from longscan.data.batch import IGNORED_LABEL
from longscan.errors import ConfigError
from longscan.kernels import Segments
from longscan.models import LanguageModel, config_from_mapping, load_preset, num_params
from longscan.models.adapter import merge_adapters
from longscan.models.linearize import (
    AttentionTransfer,
    added_parameters,
    first_values,
    frozen_parameters,
    mixer_parameters,
    softmax_attention,
    twin_config,
)
from longscan.models.sequence import LocalContext

LENGTHS = [[13, 27], [40]]
EVERY_LINEAR = ["query", "key", "value", "output", "gate", "up", "down"]


def llama(**changes):
    return config_from_mapping(load_preset("llama-tiny") | {"vocab_size": 50} | changes)


def twin(**options):
    config = twin_config(llama())
    mixer = dataclasses.replace(config.linearized_attention, group=8, conv_taps=5)
    lora = dataclasses.replace(config.lora, **options)
    return dataclasses.replace(config, linearized_attention=mixer, lora=lora)


def built(config, kind=LanguageModel, dtype=torch.float64, seed=1):
    model = kind(config)
    model.init_weights(seed)
    return model.to(dtype)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (2, 41), generator=generator)
    labels = tokens[:, 1:].masked_fill(torch.rand(2, 40, generator=generator) < 0.2, IGNORED_LABEL)
    return tokens[:, :-1], labels, Segments.from_lengths(LENGTHS)


def transfer_loss(model, seed=0):
    tokens, labels, segments = batch(seed)
    return model.cross_entropy(model.hidden(tokens, segments), labels, ignore_index=IGNORED_LABEL, z_loss=0.0)


def test_the_teacher_is_in_the_twin():
    teacher, student = built(llama()), built(twin())
    own = student.state_dict()
    assert added_parameters(twin()) == own.keys() - teacher.state_dict().keys() == mixer_parameters(student)
    student.load_state_dict({**own, **teacher.state_dict()})
    tokens, _, segments = batch()
    x = teacher.blocks[0].mixer_norm(teacher.embed(tokens, segments.positions))
    expected = teacher.blocks[0].mixer(x, LocalContext(segments))
    found = softmax_attention(student.blocks[0].mixer, x, LocalContext(segments))
    assert torch.equal(found, expected)
    assert student.blocks[0].mixer.keys_seen == 8
    assert not torch.allclose(student.blocks[0].mixer(x, LocalContext(segments)), expected)


def test_what_a_twin_adds_is_drawn_alone_as_with_all_the_rest():
    config = twin(rank=2)
    expected, names = built(config, dtype=torch.float32, seed=3).state_dict(), sorted(added_parameters(config))
    found = dict(zip(names, first_values(config, 3, names), strict=True))
    assert all(torch.equal(found[name], expected[name]) for name in names)
    other = dict(zip(names, first_values(config, 4, names), strict=True))
    assert not torch.equal(other[name := "blocks.1.mixer.query_map"], found[name])


def test_the_loss_is_the_mean_relative_error_of_teacher_forced_blocks():
    teacher, student = built(llama()), built(twin(), AttentionTransfer).train()
    teacher.load_state_dict({name: t for name, t in student.state_dict().items() if name in teacher.state_dict()})
    tokens, labels, segments = batch()
    inputs, taught = [], []

    def note(module, x, y):
        inputs.append(x[0])
        taught.append(y)

    for block in teacher.blocks:
        block.mixer.register_forward_hook(note)
    teacher.hidden(tokens, segments)
    counts = labels != IGNORED_LABEL
    expected = []
    for block, x, y in zip(student.blocks, inputs, taught, strict=True):
        error = (block.mixer(x, LocalContext(segments)) - y).pow(2).sum(-1) / y.pow(2).sum(-1)
        expected.append(error[counts].sum())
    expected = torch.stack(expected)
    torch.testing.assert_close(transfer_loss(student), expected.mean(), rtol=1e-12, atol=0)
    transfer_loss(student)
    torch.testing.assert_close(student.reset_errors().double(), 2 * expected, rtol=1e-6, atol=0, check_dtype=False)
    assert not student.reset_errors().any()


def test_chunks_of_blocks_make_the_loss_in_parts_and_ask_nothing_of_what_they_read():
    student = built(twin(), AttentionTransfer).train()
    tokens, labels, segments = batch()
    x, parts = student.embed(tokens, segments.positions), []
    for layer in range(student.config.layers):
        x = x.detach().requires_grad_()
        after, errors = student.chunk(range(layer, layer + 1), x, segments)
        parts.append(student.cross_entropy(errors, labels, ignore_index=IGNORED_LABEL))
        parts[-1].backward()
        assert torch.equal(x.grad, torch.zeros_like(x)) and not after.requires_grad
        x = after
    found = {name: p.grad for name, p in student.named_parameters()}
    errors = student.reset_errors()
    student.zero_grad()
    whole = transfer_loss(student)
    whole.backward()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    assert torch.equal(errors, student.reset_errors())
    assert found.keys() == dict(student.named_parameters()).keys()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-15)


def test_evaluation_is_the_twins_own_language_modelling():
    student, plain = built(twin(), AttentionTransfer).eval(), built(twin())
    tokens, labels, segments = batch()
    assert torch.equal(student.hidden(tokens, segments), plain.hidden(tokens, segments))
    options = {"ignore_index": IGNORED_LABEL, "z_loss": 0.0}
    found, expected = (m.cross_entropy(m.hidden(tokens, segments), labels, **options) for m in (student, plain))
    assert torch.equal(found, expected)


def test_transfer_lowers_the_error_and_trains_the_mixers_alone():
    model = built(twin(), AttentionTransfer, torch.float32).train()
    model.frozen = frozen_parameters(model, "mixers")
    model.freeze()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for step in range(60):
        loss = transfer_loss(model, step % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == mixer_parameters(model)
    assert model.frozen.isdisjoint(mixer_parameters(model)) and model.frozen <= model.no_weight_decay()


@pytest.mark.parametrize("linears", [["query", "value"], EVERY_LINEAR], ids=len)
def test_adapters_change_nothing_until_trained_and_merge_into_the_weights(linears):
    config = twin(rank=3, alpha=6.0, linears=linears)
    model, plain = built(config), built(twin())
    assert num_params(config) == sum(p.numel() for p in model.parameters())
    tokens, _, segments = batch()
    expected = plain(tokens, segments)
    assert torch.equal(model(tokens, segments), expected)
    model.frozen = frozen_parameters(model, "lora")
    model.freeze()
    model(tokens, segments).sum().backward()
    given = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert given == {name for name in model.state_dict() if ".adapter." in name}
    assert len(given) == 2 * config.layers * len(linears)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.up"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    adapted = model(tokens, segments)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    carry, stepped = model.init_carry(2), None
    for token in tokens[:, :13].T:
        stepped, carry = model.step(token, carry)
    alone = model(tokens[:, :13], Segments.from_lengths([[13], [13]]))
    torch.testing.assert_close(stepped, alone[:, -1], rtol=1e-9, atol=1e-11)
    merge_adapters(model)
    torch.testing.assert_close(model(tokens, segments), adapted, rtol=1e-10, atol=1e-12)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".adapter." not in name})
    torch.testing.assert_close(plain(tokens, segments), adapted, rtol=1e-10, atol=1e-12)


def test_what_each_choice_freezes():
    model = LanguageModel(twin(rank=2))
    names = {name for name, _ in model.named_parameters()}
    adapters = {name for name in names if ".adapter." in name}
    assert frozen_parameters(model, "all") == adapters
    assert frozen_parameters(model, "lora") == names - adapters
    assert names - frozen_parameters(model, "mixers") == mixer_parameters(model)
    assert {name.rpartition(".")[2] for name in mixer_parameters(model)} == {
        "conv_weight",
        "global_scale",
        "query_map",
        "key_map",
    }


def test_what_cannot_be_linearized_or_adapted():
    for preset in ("griffin-tiny", "alibi-tiny"):
        with pytest.raises(ConfigError, match="cannot be linearized"):
            twin_config(config_from_mapping(load_preset(preset)))
    for lora, message in (
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2, "linears": ["queries"]}, "'queries' is not one of query"),
        ({"rank": 2, "alpha": 0.0}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            llama(lora=lora)
    with pytest.raises(ConfigError, match="needs mixers with attention; model.pattern has rg_lru"):
        config_from_mapping(load_preset("griffin-tiny") | {"lora": {"rank": 2}})
