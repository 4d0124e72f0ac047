"""The loss module held to torch's cross entropy over the model's whole logits."""

import pytest
import torch
from tiny_model import make_batch
from torch.nn.functional import cross_entropy

from longscan.kernels.segments import Segments
from longscan.models import LanguageModel
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel.loss import LossModule


def tiny(**changes) -> LanguageModel:
    mapping = load_preset("griffin-tiny") | {"vocab_size": 65} | changes
    model = LanguageModel(config_from_mapping(mapping)).double()
    model.init_weights(5)
    return model


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("changes", [{}, {"logit_soft_cap": 2.0}, {"tie_embeddings": False}], ids=str)
def test_loss_and_gradients_are_those_of_whole_logits(changes, z_loss):
    model, batch = tiny(**changes), make_batch(1, rows=3)
    batch.labels[0, :2] = torch.tensor([0, 64])
    value = LossModule(model, z_loss=z_loss)(batch)
    found = [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]

    logits = model(batch.inputs, Segments.whole(*batch.inputs.shape)).flatten(0, 1)
    labels = batch.labels.flatten()
    exact = cross_entropy(logits, labels, reduction="sum")
    exact = exact + z_loss * (logits.logsumexp(1).square() * (labels >= 0)).sum()
    expected = [exact.detach(), *torch.autograd.grad(exact, list(model.parameters()))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_without_gradients_it_is_the_same_bits():
    module, batch = LossModule(tiny().float()), make_batch(1, rows=3)
    with torch.no_grad():
        quiet = module(batch)
    assert torch.equal(quiet, module(batch).detach())
