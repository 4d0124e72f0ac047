"""One body for every mixer: whole, split, step by step and packed are the same function, and nothing leaks."""

from dataclasses import fields

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import LocalBackend, LocalContext
from longscan.models.mixer_config import DECAY_INITS, FEATURE_MAPS, LOCAL_BRANCHES
from longscan.models.mixers import MIXERS, Mixer

WIDTH, TOKENS = 32, 31


def inputs(dtype=torch.float64, batch=2, tokens=TOKENS):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


def keeps_everything(mixer: Mixer) -> bool:
    """Whether the carry grows by each token: full attention's does, no other's."""
    return getattr(mixer, "keys_seen", 0) is None


def run_split(mixer: Mixer, x, segments: Segments, cuts: list[int]):
    carry = mixer.init_carry(x.shape[0], x.device, x.dtype)
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        context = LocalContext(segments.split(begin, end), carry)
        outputs.append(mixer(x[:, begin:end], context))
        assert context.leaving.keys() == carry.keys()
        growth = (end - begin) * keeps_everything(mixer)
        for name, left in context.leaving.items():
            assert left.shape == (len(x), carry[name].shape[1] + growth, *carry[name].shape[2:])
        carry = context.leaving
    return torch.cat(outputs, dim=1), carry


def gradients(mixer: Mixer, x, run) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])]


@pytest.mark.parametrize("cuts", [[1], [12], [13, 14], [3, 9, 10, 25], list(range(1, TOKENS))], ids=str)
def test_whole_equals_split(make_mixer, segments, cuts):
    mixer, x = make_mixer(), inputs()
    whole = gradients(mixer, x, lambda x: mixer(x, LocalContext(segments)))
    split = gradients(mixer, x, lambda x: run_split(mixer, x, segments, cuts)[0])
    for expected, actual in zip(whole, split, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_option_is_in_some_case(make_config, variants, name):
    """Each field has two values among the cases, and one with a list of choices has all of them.

    Linearized attention inherits a field that it has no use for.
    """
    cases = [make_config(**{name: options}).mixer_config(name) for options in variants[name].values()]
    choices = {"decay_init": DECAY_INITS, "feature_map": FEATURE_MAPS, "local": LOCAL_BRANCHES}
    choices["position"] = getattr(cases[0], "positions", ())
    without = {"alibi_scale"} if "alibi" not in choices["position"] else set()
    for option in (option for option in fields(cases[0]) if option.name not in without):
        values = {str(getattr(case, option.name)) for case in cases}
        assert len(values) > 1, f"{name}.{option.name} is always {values}"
        assert values.issuperset(choices.get(option.name, ())), f"{name}.{option.name} is only ever {values}"


class SummarizingContext(LocalContext):
    """Answers from the carry as LocalContext does, and notes what the piece says that it does to a state."""

    def __init__(self, segments: Segments, carry: dict[str, torch.Tensor]) -> None:
        super().__init__(segments, carry)
        self.foretold: dict[str, torch.Tensor] = {}

    def initial_state(self, name, summarize):
        entry = super().initial_state(name, summarize)
        state, transition = summarize()
        self.foretold[name] = transition * entry.state() + state
        return entry


def test_summaries_foretell_the_states(make_mixer, segments):
    """What context ranks fold, transition * entering + state, is the state that leaves."""
    mixer, x = make_mixer(), inputs()
    carry = mixer.init_carry(2, x.device, x.dtype)
    for begin, end in ((0, 3), (3, 9), (9, 10), (10, 25), (25, TOKENS)):
        context = SummarizingContext(segments.split(begin, end), carry)
        mixer(x[:, begin:end], context)
        assert context.foretold.keys() == {"state"} & carry.keys()
        for name, foretold in context.foretold.items():
            torch.testing.assert_close(foretold, context.leaving[name], rtol=1e-9, atol=1e-11)
        carry = context.leaving


def test_gradients_reach_every_parameter(make_mixer):
    mixer, x = make_mixer(), inputs(tokens=70)
    y = mixer(x, LocalContext(Segments.whole(2, 70)))
    found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    for (name, parameter), gradient in zip(mixer.named_parameters(), found, strict=True):
        assert gradient.ne(0).float().mean() > 0.9, name
        assert gradient.shape == parameter.shape


def test_forward_equals_steps(make_mixer, segments):
    mixer, x = make_mixer(), inputs()
    whole, carry = run_split(mixer, x, segments, [])
    stepped = mixer.init_carry(2, x.device, x.dtype)
    for t in range(TOKENS):
        y, stepped = mixer.step(x[:, t], stepped, segments.positions[:, t])
        torch.testing.assert_close(y, whole[:, t], rtol=1e-9, atol=1e-11)
    _, after_step = mixer.step(x[:, 0], stepped, segments.positions[:, -1] + 1)
    _, after_whole = mixer.step(x[:, 0], carry, segments.positions[:, -1] + 1)
    for name in after_whole:
        torch.testing.assert_close(after_step[name], after_whole[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["attention", "linearized_attention", "local_attention", "taylor_attention"])
def test_a_step_takes_the_implementation_asked_for(make_config, name):
    mixer = MIXERS[name](make_config(pattern=[name]), LocalBackend(), "fast")
    carry = mixer.init_carry(2, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="implementation='fast'"):
        mixer.step(inputs(torch.float32)[:, 0], carry, torch.zeros(2, dtype=torch.int64))


def test_packed_equals_separate(make_mixer):
    mixer, x = make_mixer(), inputs(batch=1)
    packed = mixer(x, LocalContext(Segments.from_lengths([[12, 1, 18]])))
    for begin, end in ((0, 12), (12, 13), (13, 31)):
        alone = mixer(x[:, begin:end], LocalContext(Segments.whole(1, end - begin)))
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("at", [0, 5, 12, 13, 20])
def test_nothing_leaks(make_mixer, segments, at):
    """A changed token moves not one bit before itself, in another document or in another row."""
    mixer, x = make_mixer(torch.float32), inputs(torch.float32)
    changed = x.clone()
    changed[0, at] += 3
    before, after = (mixer(each, LocalContext(segments)) for each in (x, changed))
    end = next(end for end in (12, 13, 31) if at < end)
    moved = (before != after).any(-1)
    assert not moved[1].any()
    assert not moved[0, :at].any()
    assert not moved[0, end:].any()
    assert moved[0, at]


def test_gradients_stay_in_the_document(make_mixer, segments):
    mixer, x = make_mixer(torch.float32), inputs(torch.float32).requires_grad_()
    y = mixer(x, LocalContext(segments))
    (grad,) = torch.autograd.grad(y[0, 16].square().sum(), x)
    touched = grad.ne(0).any(-1)
    assert not touched[1].any()
    assert not touched[0, :13].any()
    assert not touched[0, 17:].any()
    assert touched[0, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_low_precision_is_near_fp64(make_mixer, segments, dtype):
    exact = make_mixer()(inputs(), LocalContext(segments))
    mixer = make_mixer(dtype)
    y = mixer(inputs(dtype), LocalContext(segments))
    assert y.dtype == dtype
    error = (y.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    carry = mixer.init_carry(2, y.device, dtype)
    stepped, _ = mixer.step(inputs(dtype)[:, 0], carry, torch.zeros(2, dtype=torch.int64))
    assert (stepped.double() - exact[:, 0]).norm() / exact[:, 0].norm() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_halo_of_zeros_equals_no_halo(make_mixer, segments):
    """What a context with nothing on its left may answer: nothing, or zeros that the documents' starts mask."""
    mixer, x = make_mixer(), inputs()
    with_zeros, _ = run_split(mixer, x, segments, [])
    torch.testing.assert_close(with_zeros, mixer(x, LocalContext(segments)), rtol=1e-9, atol=1e-11)
