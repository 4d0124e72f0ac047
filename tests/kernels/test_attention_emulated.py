"""Attention's forward kernel for Hopper GPUs in an emulator: what it computes, and that the emulator sees it broken."""

import importlib.util
import itertools
import re

import pytest
import torch
from test_attention import make, slopes_of
from test_attention_hopper import check

from longscan.kernels.attention.scoring import Scoring

pytest.importorskip("triton")

BF16, FP16 = torch.bfloat16, torch.float16
# (batch, tokens, heads, key heads, halo, window, documents, factor of ALiBi's slopes or 0, dtype). With a factor of 4
# the reach of some heads ends within these lengths.
CASES = [
    (1, 37, 1, 1, 0, None, False, 0, BF16),
    (1, 300, 4, 4, 0, None, False, 2**-12, BF16),
    (2, 150, 4, 4, 37, 100, True, 4, BF16),
    (1, 300, 10, 1, 0, None, True, 4, BF16),
    (2, 129, 3, 1, 0, None, False, 4, FP16),
    (1, 140, 16, 1, 9, 100, True, 0, BF16),
    (1, 64, 6, 2, 37, 30, False, 0, BF16),
    (1, 300, 16, 1, 0, 1, False, 0, BF16),
    (1, 1, 3, 1, 5, None, False, 0, BF16),
    # Rows that meet more blocks than the rings hold, of either kind.
    (1, 700, 1, 1, 0, None, False, 1, BF16),
    (1, 900, 1, 1, 70, 500, False, 0, BF16),
]
KINDS = [(4, 4, False, 0), (4, 4, True, 4), (10, 1, True, 0), (3, 1, False, 4), (6, 2, True, 1), (16, 1, False, 0)]
SHAPES = itertools.product((128, 129, 300), (None, 1, 100, 200), (0, 37))
MANY_CASES = [
    (2, tokens, heads, key_heads, halo, window, documents, steepness, BF16)
    for (heads, key_heads, documents, steepness), (tokens, window, halo) in itertools.product(KINDS, SHAPES)
]


def emulated(q, k, v, scoring, module=None, seed=0):
    from gluon_emulator import Kernel

    from longscan.kernels.attention import hopper

    module = module or hopper
    norms = torch.cat([t.float().square().sum(-1).amax(1) for t in (q, k)], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_forward_by_groups", Kernel(module._forward_by_groups, seed))
        return module.forward(q, k, v, None if scoring.slopes is None else norms, scoring)


def inputs_of(case, random_segments, dim=128):
    """q, k, v and Scoring."""
    batch, tokens, heads, key_heads, halo, window, documents, steepness, dtype = case
    inputs = [t.detach() for t in make(batch, tokens, heads, key_heads, halo, dtype, dim, dim)]
    slopes = slopes_of(heads) * steepness if steepness else None
    doc_start = random_segments(batch, tokens, device="cpu").doc_start.view(batch, tokens) if documents else None
    return inputs, Scoring(doc_start, slopes, window, -halo, dim**-0.5)


def check_case(case, random_segments, dim=128):
    inputs, scoring = inputs_of(case, random_segments, dim)
    check(*emulated(*inputs, scoring), inputs, scoring)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_bar(case, random_segments):
    check_case(case, random_segments)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[6]], ids=str)
def test_other_head_dims_within_bar(case, dim, random_segments):
    check_case(case, random_segments, dim)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_many_within_bar(case, random_segments):
    check_case(case, random_segments)


@pytest.mark.parametrize("heads", [(4, 4), (16, 1)], ids=str)
def test_what_lies_behind_a_batch_row_is_not_seen(heads, random_segments):
    """NaN in the next row's keys, or in the one's before."""
    inputs, scoring = inputs_of((2, 140, *heads, 0, None, False, 0, BF16), random_segments)
    exact = emulated(*inputs, scoring)
    for row in (0, 1):
        q, k, v = (t.clone() for t in inputs)
        k[1 - row], v[1 - row] = torch.nan, torch.nan
        y, lse = emulated(q, k, v, scoring)
        assert torch.equal(y[row], exact[0][row]) and torch.equal(lse[row], exact[1][row])


def test_reach_ends_and_infinity_does_not_shorten_it(random_segments):
    """NaN as a value at the first key comes to every later row that meets its block."""
    (q, k, v), scoring = inputs_of((1, 500, 2, 2, 0, None, False, 1, BF16), random_segments)
    scoring = scoring._replace(slopes=torch.full((2,), 4.0))
    v[:, 0] = torch.nan
    met = emulated(q, k, v, scoring)[0].isnan().all(-1)
    assert met[:, :128].all() and not met[:, 384:].any()
    k[0, 1, 1, 3] = torch.inf
    met = emulated(q, k, v, scoring)[0].isnan().any(-1)
    assert met[:, :, 1].all() and not met[:, 384:, 0].any()


def test_bits_are_the_same_whatever_partition_runs_first(random_segments):
    inputs, scoring = inputs_of((1, 700, 1, 1, 0, 300, True, 1, BF16), random_segments)
    first, *others = (emulated(*inputs, scoring, seed=seed) for seed in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# (what breaks it, a line or several of hopper.py, what stands there instead, what the emulator says).
BROKEN = {
    "keys never released": (r" +mbarrier.arrive\(k_empty.index\(s % STAGES\), count=1\)\n", "", "deadlock.*k_empty"),
    "values never released": (r" +mbarrier.arrive\(v_empty.index\(before\), count=1\)\n", "", "deadlock.*v_empty"),
    "released by one of two": (r"init\(k_empty.index\(i\), count=CONSUMERS", "init(k_empty.index(i), count=1", "k_"),
    "released too early": (
        r"( +b_y, _ = warpgroup_mma_wait\(0, deps=.*\n)( +mbarrier.arrive\(v_empty.*before.*\n)",
        r"\2\1",
        r"writes v_ring.*not released|reads v_ring.* before what .* writes has come",
    ),
    "loaded too early": (r" +mbarrier.wait\(v_empty.*\n", "", r"copy by _load_keys \(2\) writes v_ring.*not released"),
    "a wrong phase to load": (r"\(\(s // STAGES\) & 1\) \^ 1", "(s // STAGES) & 1", "deadlock.*k_empty"),
    "a wrong phase to read": (
        r"v_full.index\(last % STAGES\), \(last // STAGES\) & 1",
        "v_full.index(last % STAGES), (last // STAGES) & 1 ^ 1",
        "deadlock.*v_full|reads v_ring",
    ),
    "keys read too early": (r" +mbarrier.wait\(k_full.*\n", "", "reads k_ring"),
    "values read too early": (r" +mbarrier.wait\(v_full.*before\), phase\)\n( +b_y = warp)", r"\1", "reads v_ring"),
    "more bytes expected": (r"expect\(v_full.index\(stage\), ", "expect(v_full.index(stage), 2 * ", "deadlock.*v_full"),
    "a block nobody wants": (r"range\(0, blocks\)", "range(0, blocks + 1)", "ends before what a copy"),
    "no fence": (r" +fence_async_shared\(\)\n( +o_query)", r"\1", r"no fence.*q_all\[[01]\]"),
    "scores still in flight": (r"wait\(1, deps=\[b_s\]", "wait(2, deps=[b_s]", "waits for a product with 2 after it"),
    "y still in flight": (r"wait\(0, deps=\[b_y, b_p\]", "wait(1, deps=[b_y, b_p]", "waits for a product with 1"),
    "a turn not given": (r" +mbarrier.arrive\(turns.*\n", "", "deadlock.*turns"),
    "rows beyond the last": (r", mask=inside, other=0.0", "", "places .* of a tensor of 51200"),
    "a stage that is not there": (r"stage = s % STAGES", "stage = s", "there is no 2 among 2 entries"),
    "an unknown word": (r"gl.exp2", "gl.exp", "has no attribute 'exp'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_copy_is_found(name, tmp_path, random_segments):
    """In each of several orders that the partitions may run in."""
    from gluon_emulator import Fault

    from longscan.kernels.attention import hopper

    pattern, instead, said = BROKEN[name]
    with open(hopper.__file__) as file:
        source, count = re.subn(pattern, instead, file.read())
    assert count, "hopper.py has no such line"
    path = tmp_path / "broken.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("longscan.kernels.attention.broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    inputs, scoring = inputs_of((1, 400, 1, 1, 0, None, False, 0, BF16), random_segments)
    for seed in range(3):
        with pytest.raises((Fault, AttributeError), match=said):
            emulated(*inputs, scoring, broken, seed)
