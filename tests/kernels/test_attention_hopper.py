"""Attention's forward kernel for Hopper GPUs: on one held to float64; anywhere, what its compilation leaves."""

import itertools

import pytest
import torch
from sass import printed
from test_attention import kernel_against_bar, make, slopes_of

from longscan.kernels import attention
from longscan.kernels.attention import reference
from longscan.kernels.attention.scoring import Scoring

pytest.importorskip("triton")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of capability 9.0")]
BF16 = torch.bfloat16
# (heads, key heads, ALiBi, documents, dtype, head dim); each compiles one kernel.
KINDS = [
    (4, 4, "", False, BF16, 128),
    (4, 4, "steep", True, BF16, 128),
    (10, 1, "", True, BF16, 128),
    (10, 1, "flat", False, torch.float16, 128),
    (6, 2, "steep", True, BF16, 128),
    (16, 1, "", False, BF16, 128),
    (3, 1, "steep", False, BF16, 128),
    (4, 4, "flat", True, BF16, 64),
    (6, 2, "", False, torch.float16, 64),
    (10, 1, "", True, BF16, 256),
    (4, 4, "steep", False, BF16, 256),
]
# Tokens, window, halo.
SHAPES = [*itertools.product((128, 129, 300, 1000), (None, 1, 100, 512), (0, 37)), (1, None, 5), (64, 30, 0)]


def forward(q, k, v, scoring):
    """By the kernel for Hopper, however few tokens there are."""
    from longscan.kernels.attention import hopper, kernel

    return hopper.forward(q, k, v, kernel.largest_norms(q, k, scoring), scoring)


def kernel_on(device, inputs, scoring):
    """As kernel.forward does where another GPU is the current one."""
    from longscan.kernels.attention import kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LEAST_TOKENS", 1)
        return kernel.forward(*(t.to(device) for t in inputs), scoring._replace(slopes=scoring.slopes.to(device)))


def inputs_of(heads, key_heads, slopes, dtype, batch, tokens, halo=0, seed=0, dim=128):
    """q, k, v and slopes on the GPU; steep ones end the reach of heads within these lengths."""
    inputs = [t.detach().cuda() for t in make(batch, tokens, heads, key_heads, halo, dtype, dim, dim, seed)]
    found = {"": None, "steep": slopes_of(heads, "cuda") * 4, "flat": slopes_of(heads, "cuda") / 4096}[slopes]
    return inputs, found


def check(y, lse, inputs, scoring):
    """At most twice the reference's error at the same precision and a rounding; of the statistics, fp32's roundings."""
    exact, exact_lse = reference.forward(*(t.double() for t in inputs), scoring)
    near, _ = reference.forward(*inputs, scoring)
    errors = [float((t.double() - exact).norm() / exact.norm()) for t in (y, near)]
    assert y.dtype == inputs[0].dtype and y.isfinite().all()
    assert errors[0] <= 2 * errors[1] + torch.finfo(y.dtype).eps, f"{errors[0]:.1e}, reference {errors[1]:.1e}"
    # Four roundings of what may be as large as the bias of a block's length.
    largest = 0 if scoring.slopes is None else float(scoring.slopes.max()) * reference.LOG2_E * 128
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=5e-6 + largest * 2**-22)


@pytest.mark.parametrize("kind", KINDS, ids=str)
class TestAgainstFloat64:
    pytestmark = on_hopper

    def test_within_bar_at_every_shape(self, kind, random_segments):
        heads, key_heads, slopes, documents, dtype, dim = kind
        for seed, (batch, (tokens, window, halo)) in enumerate(itertools.product((1, 2), SHAPES)):
            inputs, given = inputs_of(heads, key_heads, slopes, dtype, batch, tokens, halo, seed, dim)
            doc_start = None
            if documents and tokens > 1:
                doc_start = random_segments(batch, tokens, seed, "cuda").doc_start.view(batch, tokens)
            scoring = Scoring(doc_start, given, window, -halo, dim**-0.5)
            y, lse = forward(*inputs, scoring)
            check(y, lse, inputs, scoring)
            assert all(torch.equal(a, b) for a, b in zip((y, lse), forward(*inputs, scoring), strict=True))


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("slopes", ["", "flat"])
    def test_statistics_are_the_triton_kernels(self, slopes):
        """So that its backward passes can take them."""
        from longscan.kernels.attention import kernel

        inputs, given = inputs_of(4, 4, slopes, BF16, 1, 1000)
        scoring = Scoring(None, given, None, 0, 128**-0.5)
        y, lse = forward(*inputs, scoring)
        other_y, other_lse = kernel.forward(*inputs, scoring)
        torch.testing.assert_close(lse, other_lse, rtol=1e-6, atol=5e-6)
        assert float((y - other_y).float().norm() / y.float().norm()) < torch.finfo(BF16).eps

    def test_split_with_a_halo_is_the_whole(self):
        inputs, slopes = inputs_of(4, 4, "steep", BF16, 2, 1000)
        whole = Scoring(None, slopes, 200, 0, 128**-0.5)
        cut, halo = 437, 199
        q, k, v = inputs
        left = forward(*(t[:, :cut].contiguous() for t in inputs), whole)
        rest = (q[:, cut:], k[:, cut - halo :], v[:, cut - halo :])
        right = forward(*(t.contiguous() for t in rest), whole._replace(key_offset=-halo))
        check(torch.cat([left[0], right[0]], 1), torch.cat([left[1], right[1]], 2), inputs, whole)

    @pytest.mark.parametrize("heads", [(4, 4), (16, 1)], ids=str)
    def test_what_lies_behind_a_batch_row_is_not_seen(self, heads):
        """The next row's keys, and what follows the last row's, beyond the end of a block of keys."""
        (q, k, v), _ = inputs_of(*heads, "", BF16, 2, 300)
        padded = [torch.full((3, *t.shape[1:]), torch.nan, device="cuda", dtype=BF16) for t in (k, v)]
        scoring = Scoring(None, None, None, 0, 128**-0.5)
        exact = forward(q, k, v, scoring)
        for row in (0, 1):
            for buffer, t in zip(padded, (k, v), strict=True):
                buffer.fill_(torch.nan)[row] = t[row]
            y, lse = forward(q, *(buffer[:2] for buffer in padded), scoring)
            assert torch.equal(y[row], exact[0][row]) and torch.equal(lse[row], exact[1][row])

    def test_infinities_in_q_or_k_shorten_no_reach(self):
        """A value of NaN at the first key spreads to every later row of the head that has one."""
        (q, k, v), _ = inputs_of(4, 4, "", BF16, 1, 1000)
        v[:, 0] = torch.nan
        scoring = Scoring(None, torch.ones(4, device="cuda") * 4, None, 0, 128**-0.5)
        met = forward(q, k, v, scoring)[0].isnan().all(-1)
        assert met[:, :128].all() and not met[:, 128:].any()
        k[0, 1, 2, 3] = torch.inf
        met = forward(q, k, v, scoring)[0].isnan().any(-1)
        assert met[:, :, 2].all() and not met[:, 128:, [0, 1, 3]].any()

    # As test_attention's cases; the backward passes are the Triton kernels'.
    @pytest.mark.parametrize(
        "case",
        [
            (1, 300, 4, 4, 0, 128, 128, None, False, True, BF16),
            (2, 300, 10, 1, 37, 128, 128, 200, True, False, BF16),
            (2, 300, 10, 1, 37, 256, 256, 200, True, False, BF16),
        ],
        ids=str,
    )
    def test_the_op_and_its_gradients(self, case, random_segments, monkeypatch, caplog):
        from longscan.kernels import dispatch
        from longscan.kernels.attention import kernel

        monkeypatch.setattr(kernel, "LEAST_TOKENS", 1)
        dispatch.log_choice.cache_clear()
        with caplog.at_level("INFO", logger="longscan"):
            kernel_against_bar(case, "cuda", random_segments)
        assert "attention forward on cuda in bfloat16: hopper" in caplog.text

    def test_a_cuda_graph_replays_it(self, monkeypatch):
        """The descriptors of keys and values are recorded with their addresses."""
        from longscan.kernels.attention import kernel

        monkeypatch.setattr(kernel, "LEAST_TOKENS", 1)
        inputs, slopes = inputs_of(4, 4, "steep", BF16, 2, 300)
        attention(*inputs, alibi_slopes=slopes)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = attention(*inputs, alibi_slopes=slopes)
        for seed in (1, 2):
            for place, new in zip(inputs, inputs_of(4, 4, "steep", BF16, 2, 300, seed=seed)[0], strict=True):
                place.copy_(new)
            graph.replay()
            assert torch.equal(y, attention(*inputs, alibi_slopes=slopes))

    @pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
    def test_it_runs_where_its_inputs_are(self):
        inputs, slopes = inputs_of(4, 4, "steep", BF16, 2, 300)
        scoring = Scoring(None, slopes, None, 0, 128**-0.5)
        exact = forward(*inputs, scoring)
        there = kernel_on("cuda:1", inputs, scoring)
        assert all(torch.equal(a, b.cuda()) for a, b in zip(exact, there, strict=True))

    def test_places_beyond_32_bits(self):
        """More than 2^31 numbers in q, k, v and y."""
        tokens, window = 2**20 + 64, 256
        inputs = [torch.randn(1, tokens, 16, 128, device="cuda", dtype=BF16) for _ in range(3)]
        scoring = Scoring(None, None, window, 0, 128**-0.5)
        y, lse = forward(*inputs, scoring)
        q, k, v = (t[:, -n:].clone() for t, n in zip(inputs, (window, 2 * window, 2 * window), strict=True))
        last, last_lse = forward(q, k, v, scoring._replace(key_offset=-window))
        torch.testing.assert_close(y[:, -window:], last, rtol=2**-6, atol=2**-8)
        torch.testing.assert_close(lse[..., -window:], last_lse, rtol=1e-6, atol=5e-6)

    def test_compiled_code_has_the_same_bits(self):
        from longscan.kernels.attention import kernel

        inputs, slopes = inputs_of(4, 4, "steep", BF16, 1, kernel.LEAST_TOKENS)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs, alibi_slopes=slopes), attention(*inputs, alibi_slopes=slopes))

    def test_what_it_covers(self):
        from longscan.kernels.attention import kernel

        tokens = kernel.LEAST_TOKENS
        inputs, _ = inputs_of(4, 2, "", BF16, 1, tokens)
        plain = Scoring(None, None, None, 0, 1.0)
        assert kernel.covers(*inputs, plain) and kernel.covers(*(t.half() for t in inputs), plain)
        assert not kernel.covers(*(t.float() for t in inputs), plain)
        assert not kernel.covers(*(t[:, 1:] for t in inputs), plain)
        assert not kernel.covers(*inputs, plain._replace(key_offset=-1))
        assert not kernel.covers(*inputs, plain._replace(window=kernel.NARROW))
        assert kernel.covers(*inputs, plain._replace(window=kernel.NARROW + 1))
        halo, _ = inputs_of(4, 2, "", BF16, 1, tokens, 9)
        assert kernel.covers(*halo, plain._replace(key_offset=-9)) and not kernel.covers(*halo, plain)
        narrow = [t[..., :32].contiguous() for t in inputs]
        assert not kernel.covers(*narrow, plain) and not kernel.covers(*inputs[:2], narrow[2], plain)
        k = inputs[1]
        askew = torch.empty(k.numel() + 1, device="cuda", dtype=BF16)[1:].view_as(k).copy_(k)
        assert not kernel.covers(inputs[0], askew, inputs[2], plain), "TMA takes addresses of 16 bytes"


def test_a_cpu_is_not_covered():
    from longscan.kernels.attention import kernel

    inputs = [t.detach() for t in make(1, kernel.LEAST_TOKENS, 1, 1, 0, torch.float16, 128, 128)]
    assert not kernel.covers(*inputs, Scoring(None, None, None, 0, 1.0))


SCRIPT = """
import re, subprocess, sys, tempfile
from triton import knobs
from sass import compiled, lost
from longscan.kernels.attention import kernel
assert not any(name.endswith("attention.hopper") for name in sys.modules), "imported where it may not run"
from longscan.kernels.attention import hopper


def kind(dtype, dim, name):
    if name.endswith("_desc"):
        return f"tensordesc<{dtype}[1, {hopper.KEYS[dim]}, {dim}],{hopper.RING!r}>"
    if name[:2] != "p_":
        return "fp32" if name == "factor" else "i32"
    return {"p_q": f"*{dtype}", "p_y": f"*{dtype}", "p_doc_start": "*i32"}.get(name, "*fp32")


def output(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


for heads, groups, biased, documents, dtype, dim in CASES:
    absent = ([] if biased else ["p_slopes", "p_norms"]) + ([] if documents else ["p_doc_start"])
    constants = {"HEADS": heads, "GROUPS": groups, "DIM": dim, "BLOCK_N": hopper.KEYS[dim]} | dict.fromkeys(absent)
    built = compiled(hopper._forward_by_groups, constants, lambda name: kind(dtype, dim, name), num_warps=4)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = f"{folder}/kernel.cubin", f"{folder}/kernel.ptx"
        open(cubin, "wb").write(built.asm["cubin"])
        open(ptx, "w").write(built.asm["ptx"])
        usage = output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        said = output(knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", "-v", ptx, "-o", f"{folder}/again.cubin")
        listing = output(knobs.nvidia.cuobjdump.path, "-sass", cubin)
    registers, stack = (int(re.search(rf"{name}:(\\d+)", usage)[1]) for name in ("REG", "STACK"))
    kinds = [name for name in ("HGMMA", "UTMALDG.3D", "USETMAXREG") if name in listing]
    print(registers, stack, built.metadata.shared, kinds, "serialized" in said, lost(built.asm["cubin"]))
"""


# Of the kinds of other head dims, the ends: what takes fewest registers, and most.
EDGES = [((16, 1), False, False), ((10, 10), True, True)]


def check_build(cases, tmp_path):
    for line in printed(f"CASES = {cases}\n{SCRIPT}", tmp_path):
        registers, stack, shared, rest = line.split(maxsplit=3)
        # 3 warp groups of these registers fill a multiprocessor's; they hand each other some.
        assert int(registers) <= 168 and int(stack) <= 256 and int(shared) <= 227 * 1024, line
        assert rest == "['HGMMA', 'UTMALDG.3D', 'USETMAXREG'] False []", line


@pytest.mark.timeout(300)
def test_it_compiles_for_sm_90(tmp_path):
    check_build([(10, 10, True, True, "bf16", 128)], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_kind_compiles_for_sm_90(tmp_path):
    kinds = itertools.product([(16, 1), (16, 16), (6, 3), (10, 10)], (False, True), (False, True))
    others = [(*heads, *rest, "bf16", dim) for dim in (64, 256) for heads, *rest in EDGES]
    cases = [*((*heads, *rest, "bf16", 128) for heads, *rest in kinds), (16, 1, True, False, "fp16", 128), *others]
    check_build(cases, tmp_path)
