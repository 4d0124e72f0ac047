"""Sampling."""

import pytest
import torch

from longscan.errors import UserError
from longscan.kernels import Segments
from longscan.models import generate
from longscan.models.generate import sample

PROMPT = [3, 14, 15, 9, 2, 6]


def test_greedy_takes_the_argmax_of_the_full_forward(make_model):
    model, text = make_model(), list(PROMPT)
    drawn = list(generate(model, PROMPT, 20, temperature=0, chunk=4))
    for token in drawn:
        logits = model(torch.tensor([text]), Segments.whole(1, len(text)))
        assert token == logits[0, -1].argmax().item()
        text.append(token)
    assert len(drawn) == 20


def test_the_seed_decides(make_model):
    model = make_model(torch.float32)
    first, again, other = (list(generate(model, PROMPT, 30, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_it_ends_before_the_stop_token(make_model):
    model = make_model(torch.float32)
    text = list(generate(model, PROMPT, 30, seed=1))
    stop = text[5]
    assert list(generate(model, PROMPT, 30, seed=1, stop_id=stop)) == text[: text.index(stop)]


def test_padding_ids_are_never_drawn(make_model):
    model = make_model(torch.float32)
    assert max(generate(model, PROMPT, 60, temperature=5.0, vocab_size=10)) < 10


@pytest.mark.parametrize(
    "options, allowed",
    [({"top_k": 2}, {0, 2}), ({"top_k": 1}, {2}), ({"top_p": 0.6}, {0, 2}), ({"top_p": 0.4}, {2}), ({}, {0, 1, 2, 3})],
    ids=str,
)
def test_truncation(options, allowed):
    logits = torch.tensor([0.3, 0.15, 0.5, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    drawn = {sample(logits, generator=generator, **arguments) for _ in range(300)}
    assert drawn == allowed


def test_temperature_reshapes_the_distribution():
    logits = torch.tensor([0.6, 0.4]).log()
    generator = torch.Generator().manual_seed(0)
    share = sum(sample(logits, 0.5, 0, 1.0, generator) == 0 for _ in range(4000)) / 4000
    assert abs(share - 0.36 / 0.52) < 0.03


@pytest.mark.parametrize(
    "prompt, options, words",
    [
        ([], {}, "holds no token"),
        ([50], {}, "token 50 is outside the model's vocabulary of 50"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"temperature": float("inf")}, "temperature=inf"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"seed": 2**64}, "seed=18446744073709551616"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"top_k": -1}, "top_k=-1"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(make_model, prompt, options, words):
    with pytest.raises(UserError, match=words):
        generate(make_model(torch.float32), prompt, 5, **options)
