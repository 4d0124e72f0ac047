"""linear_scan and rg_lru, reference and kernel, held to a three-line recurrence in float64."""

import pytest
import torch
from torch import Tensor

from longscan.kernels import Segments, linear_scan, linear_scan_summarize, rg_lru, rg_lru_summarize

OPS = {"linear_scan": linear_scan, "rg_lru": rg_lru}
SUMMARIES = {"linear_scan": linear_scan_summarize, "rg_lru": rg_lru_summarize}
WIDE = {torch.float64: torch.float64}

both_ops = pytest.mark.parametrize("name", OPS)
both_implementations = pytest.mark.parametrize("implementation", ["reference", "triton"])


def make(name: str, batch: int, tokens: int, width: int, dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
    """The op's inputs, initial state last."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x, one, two = (draw(batch, tokens, width) for _ in range(3))
    sequences = [x, -0.3 * one.exp()] if name == "linear_scan" else [x, one, two]
    vectors = [draw(batch, width)] if name == "linear_scan" else [draw(width), draw(batch, width)]
    wide = WIDE.get(dtype, torch.float32)
    inputs = [t.to(device, dtype) for t in sequences] + [t.to(device, wide) for t in vectors]
    return [t.requires_grad_() for t in inputs]


def recurrence(name: str, inputs: list[Tensor], segments: Segments | None) -> tuple[Tensor, Tensor]:
    """The op as its docstring states it, token by token."""
    *inputs, h = inputs
    resets = torch.zeros(inputs[0].shape[:2], dtype=torch.bool) if segments is None else segments.resets.cpu()
    if name == "linear_scan":
        u, a = inputs[0], inputs[1].exp()
        a = a.masked_fill(resets[..., None], 0)
    else:
        x, gate_a, gate_x, a_param = inputs
        a = torch.exp(-8 * torch.sigmoid(gate_a) * torch.nn.functional.softplus(a_param))
        a = a.masked_fill(resets[..., None], 0)
        u = torch.sqrt(1 - a**2) * torch.sigmoid(gate_x) * x
    states = []
    for t in range(u.shape[1]):
        h = a[:, t] * h + u[:, t]
        states.append(h)
    return torch.stack(states, 1), h


def with_gradients(function, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs and the gradients of every input for random gradients of every output."""
    outputs = function(*inputs)
    rng = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def run(name: str, inputs: list[Tensor], segments, implementation: str) -> list[Tensor]:
    return with_gradients(lambda *a: OPS[name](*a, segments, implementation=implementation), inputs)


def run_exact(name: str, inputs: list[Tensor], segments) -> list[Tensor]:
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    return with_gradients(lambda *a: recurrence(name, list(a), segments), wide)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.cpu().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def assert_within_bar(kernel: list[Tensor], reference: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """The kernel's error is at most twice the reference's at the same precision, and a rounding of the dtype."""
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for position, (k, r, e) in enumerate(zip(kernel, reference, exact, strict=True)):
        assert k.dtype == r.dtype
        assert error(k, e) <= 2 * error(r, e) + floor, (
            f"output {position}: {error(k, e):.1e}, reference {error(r, e):.1e}"
        )


@both_ops
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("tokens", [1, 31, 63, 65, 500, 2100])
def test_reference_is_the_recurrence(name, documents, tokens, random_segments):
    inputs = make(name, 2, tokens, 3)
    segments = random_segments(2, tokens, device="cpu") if documents else None
    for actual, exact in zip(run(name, inputs, segments, "reference"), run_exact(name, inputs, segments), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-10)


@both_ops
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_gradcheck(name, documents, random_segments):
    inputs = make(name, 2, 35, 1)
    segments = random_segments(2, 35, device="cpu") if documents else None
    assert torch.autograd.gradcheck(lambda *a: OPS[name](*a, segments), inputs)
    assert torch.autograd.gradcheck(lambda *a: SUMMARIES[name](*a, segments), inputs[:-1])


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 5), (1, 63, 40), (1, 65, 40), (2, 5, 130)], ids=lambda s: "x".join(map(str, s))
)
def test_kernel_within_bar(name, dtype, shape, device, random_segments):
    inputs = make(name, *shape, dtype=dtype, device=device)
    segments = random_segments(*shape[:2]) if shape[1] > 1 else None
    kernel, reference = (run(name, inputs, segments, implementation) for implementation in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(name, inputs, segments), dtype)


@both_ops
@pytest.mark.parametrize("skip", [1, 2])
def test_kernel_over_many_pieces(name, skip, device, monkeypatch):
    cut_short(monkeypatch, skip)
    inputs = make(name, 2, 29, 20, torch.float32, device)
    segments = Segments.from_lengths([[29], [4, 9, 16]], [3, 0], device)
    kernel, reference = (run(name, inputs, segments, implementation) for implementation in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(name, inputs, segments), torch.float32)


def test_kernel_at_500_tokens(device):
    inputs = make("linear_scan", 1, 500, 3, torch.float32, device)
    kernel, reference = (run("linear_scan", inputs, None, implementation) for implementation in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact("linear_scan", inputs, None), torch.float32)


def cut_short(monkeypatch, skip: int = 2) -> None:
    """Lets the kernels cut tiles of 4 tokens, so that a short row has several."""
    from longscan.kernels.linear_scan.chain import Tile

    cut(monkeypatch, Tile(rows=2, steps=2, block=16, warps=2, skip=skip))


def cut(monkeypatch, tile) -> None:
    """Lets the kernels cut all rows into such tiles."""
    from longscan.kernels.linear_scan import kernel as scan
    from longscan.kernels.rg_lru import kernel as gated

    for module in (scan, gated):
        for passes in ("FORWARD", "BACKWARD", "SUMMARY"):
            monkeypatch.setattr(module, passes, (tile,) * 2)


@both_ops
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("skip", [1, 2])
def test_wide_tiles(name, block, skip, device, monkeypatch):
    """Channels polled in one part and in two, some of them beyond the width."""
    from longscan.kernels.linear_scan.chain import Tile

    cut(monkeypatch, Tile(rows=2, steps=2, block=block, warps=2, skip=skip))
    inputs = make(name, 2, 15, 70, torch.float32, device)
    kernel, reference = (run(name, inputs, None, implementation) for implementation in ("triton", "reference"))
    assert_within_bar(kernel, reference, run_exact(name, inputs, None), torch.float32)


@both_ops
def test_words_are_left_clear(name, device, monkeypatch):
    """By every pass and by shapes of other sizes, whose words lie elsewhere."""
    from longscan.kernels.linear_scan import chain

    monkeypatch.setattr(chain, "_WORDS", words := {})
    for skip, block in ((1, 16), (2, 16), (1, 64), (2, 64)):
        cut(monkeypatch, chain.Tile(rows=2, steps=2, block=block, warps=2, skip=skip))
        for shape in ((2, 29, 20), (1, 5, 3), (1, 17, 70)):
            inputs = make(name, *shape, torch.float32, device)
            for function, given in ((OPS[name], inputs), (SUMMARIES[name], inputs[:-1])):
                with_gradients(lambda *a, f=function: f(*a, implementation="triton"), given)
                (left,) = words.values()
                assert left.numel() and not left.any()


def test_words_that_are_not_kept(device, monkeypatch):
    """Those of a pass that fails, and of one that takes many."""
    from longscan.kernels.linear_scan import chain

    like = torch.empty(0, device=device)
    monkeypatch.setattr(chain, "_WORDS", words := {})
    with pytest.raises(ZeroDivisionError), chain._words(like, 1):
        raise ZeroDivisionError
    assert not words
    monkeypatch.setattr(chain, "MOST", 3)
    for count, left in ((4, 0), (2, 2), (4, 2), (3, 3), (1, 3)):
        with chain._words(like, count) as lent:
            assert len(lent) >= count
        assert sum(map(len, words.values())) == left


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_factors_that_overflow_leave_zeros_zero(device, monkeypatch):
    """The product of factors above 1 may be infinite; no state is multiplied by it."""
    for skip in (1, 2):
        cut_short(monkeypatch, skip)
        x = torch.zeros(1, 24, 3, device=device)
        x[:, 20] = 1
        log_a = torch.full_like(x, 12.0)
        log_a[:, 18:] = -0.1
        kernel, reference = (linear_scan(x, log_a, implementation=i)[0] for i in ("triton", "reference"))
        torch.testing.assert_close(kernel, reference)


@pytest.mark.gpu
@both_ops
@pytest.mark.parametrize("cut_into", [(16, 16, 32, 1), (16, 16, 32, 2), (8, 16, 64, 1), (8, 16, 64, 2)])
def test_thousands_of_programs(name, cut_into, device, monkeypatch):
    """Where many wait for others' states at once, what one warp has seen another may not have.

    The interpreter runs a program at a time.
    """
    from longscan.kernels.linear_scan.chain import Tile

    rows, steps, block, skip = cut_into
    inputs = [t.detach() for t in make(name, 1, 16384, 2560, torch.float32, device)]
    want, last = OPS[name](*inputs, implementation="reference")
    cut(monkeypatch, Tile(rows, steps, block, warps=8, skip=skip))
    for _ in range(5):
        h, final = OPS[name](*inputs, implementation="triton")
        torch.testing.assert_close(h, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@both_ops
def test_words_of_a_graph(name, device):
    """A CUDA graph has words of its own, so that its replay on one stream meets no eager pass on another."""
    from longscan.kernels.linear_scan import chain

    inputs = [t.detach() for t in make(name, 1, 4096, 256, torch.float32, device)]
    want, _ = OPS[name](*inputs)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        OPS[name](*inputs)
    torch.cuda.synchronize()
    before, graph = [id(words) for words in chain._WORDS.values()], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        h, _ = OPS[name](*inputs)
    assert [id(words) for words in chain._WORDS.values()] == before
    for _ in range(20):
        h.zero_()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            graph.replay()
        between, _ = OPS[name](*inputs)
        torch.cuda.synchronize()
        assert torch.equal(h, want) and torch.equal(between, want)


@pytest.mark.gpu
def test_under_graphs_of_torch_compile(device):
    """They keep what is allocated on their stream while a graph is prepared, and refuse what lives on."""
    x, log_a, state = (t.detach().requires_grad_() for t in make("linear_scan", 1, 4096, 64, torch.float32, device))

    def loss(x, log_a):
        return linear_scan(x, log_a, state.detach())[0].square().mean()

    compiled = torch.compile(loss, mode="reduce-overhead")
    want = torch.autograd.grad(loss(x, log_a), (x, log_a))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(compiled(x, log_a), (x, log_a))
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other)


@both_ops
@both_implementations
@pytest.mark.parametrize("seed", range(2))
def test_split_invariance(name, implementation, seed, device, random_segments, monkeypatch):
    """A sequence in three pieces through the state equals the whole, gradients too."""
    cut_short(monkeypatch)
    tokens = 97 if implementation == "reference" else 21
    dtype = torch.float64 if implementation == "reference" else torch.float32
    segments = random_segments(2, tokens, seed)
    cuts = sorted(torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[:2].add(1).tolist())
    sequences = 2 if name == "linear_scan" else 3

    def whole(*inputs):
        return OPS[name](*inputs, segments, implementation=implementation)

    def split(*inputs):
        *shared, state = inputs[sequences:]
        outputs = []
        for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True):
            piece = [t[:, begin:end] for t in inputs[:sequences]]
            h, state = OPS[name](*piece, *shared, state, segments.split(begin, end), implementation=implementation)
            outputs.append(h)
        return torch.cat(outputs, 1), state

    inputs = make(name, 2, tokens, 4, dtype, device)
    tolerance = 1e-11 if implementation == "reference" else 3e-6
    for one, many in zip(with_gradients(whole, inputs), with_gradients(split, inputs), strict=True):
        torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)


@both_ops
@both_implementations
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_summary_is_what_the_piece_does(name, implementation, documents, device, monkeypatch):
    """final == transition * initial + state, as values and as functions of every input."""
    cut_short(monkeypatch)
    tokens = 70 if implementation == "reference" else 13
    dtype = torch.float64 if implementation == "reference" else torch.float32
    segments = Segments.from_lengths([[tokens], [4, tokens - 4]], [5, 5], device) if documents else None
    inputs = make(name, 2, tokens, 4, dtype, device)

    def final(*inputs):
        return OPS[name](*inputs, segments, implementation=implementation)[1:]

    def composed(*inputs):
        state, transition = SUMMARIES[name](*inputs[:-1], segments, implementation=implementation)
        assert not documents or (transition[1] == 0).all()
        return (transition * inputs[-1] + state,)

    tolerance = 1e-11 if implementation == "reference" else 3e-6
    for one, other in zip(with_gradients(final, inputs), with_gradients(composed, inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@both_ops
@both_implementations
def test_no_leaks(name, implementation, device):
    """A changed token moves no bit before it and none in other documents; gradients mirror that."""
    tokens, at = 40, 13
    segments = Segments.from_lengths([[8, 12, 20]], [3], device)
    inputs = make(name, 1, tokens, 4, torch.float32, device)
    sequences = 2 if name == "linear_scan" else 3
    changed = [t.detach().clone().requires_grad_() for t in inputs]
    with torch.no_grad():
        for t in changed[:sequences]:
            t[:, at] *= 1.5

    def outputs_and_gradients(inputs, at=None):
        h, _ = OPS[name](*inputs, segments, implementation=implementation)
        grad = torch.ones_like(h)
        if at is not None:
            grad[:, at] += 1
        return h.detach(), torch.autograd.grad(h, inputs[:sequences], grad)

    before, gradients = outputs_and_gradients(inputs)
    after, _ = outputs_and_gradients(changed)
    moved = (before != after).any(-1)[0].nonzero().view(-1).tolist()
    assert moved and min(moved) == at and max(moved) < 20
    _, others = outputs_and_gradients(inputs, at)
    for one, other in zip(gradients, others, strict=True):
        moved = (one != other).any(-1)[0].nonzero().view(-1).tolist()
        assert moved and min(moved) >= 8 and max(moved) == at


@both_ops
@both_implementations
def test_same_bits_twice(name, implementation, device, random_segments):
    inputs = make(name, 2, 35, 4, torch.float32, device)
    segments = random_segments(2, 35)
    one, two = (run(name, inputs, segments, implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@both_implementations
def test_extreme_decays_stay_finite(implementation, device):
    x = torch.full((1, 9, 4), 3.0, device=device, requires_grad=True)
    log_a = torch.tensor([0.0, -1e-7, -80.0, -1e4], device=device).expand(1, 9, 4).clone().requires_grad_()
    h, final = linear_scan(x, log_a, implementation=implementation)
    assert torch.equal(h[0, :, 3], x[0, :, 3]) and torch.allclose(h[0, :, 0], 3.0 * torch.arange(1, 10, device=device))
    assert all(g.isfinite().all() for g in torch.autograd.grad((h.sum(), final.sum()), (x, log_a)))


@both_implementations
def test_square_root_has_a_bounded_derivative(implementation, device):
    """At a = 1 the normaliser is 0 and its slope is taken as 1000: log_a moves by -2 * 1000 * i x."""
    wide = {"device": device, "requires_grad": True}
    x, gate_x = torch.ones(1, 1, 1, **wide), torch.zeros(1, 1, 1, **wide)
    gate_a = torch.zeros(1, 1, 1, **wide)
    a_param = torch.full((1,), -40.0, **wide)
    h, _ = rg_lru(x, gate_a, gate_x, a_param, implementation=implementation)
    gradient = torch.autograd.grad(h.sum(), a_param)[0]
    # dlog_a / da_param = -8 r sigmoid(a_param), r = 1/2; i = 1/2.
    expected = -2 * 1000 * 0.5 * -8 * 0.5 * torch.sigmoid(a_param.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


def test_small_decays_keep_precision(device):
    """sqrt(1 - a^2) to fp32 precision where a rounds to within 1e-6 of 1."""
    inputs = [torch.ones(1, 1, 64), torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), torch.linspace(-16, 2, 64)]
    exact = rg_lru(*(t.double() for t in inputs))[0].to(device)
    for implementation in ("reference", "triton"):
        h, _ = rg_lru(*(t.to(device) for t in inputs), implementation=implementation)
        torch.testing.assert_close(h.double(), exact, rtol=2e-6, atol=0)


@both_ops
def test_strided_inputs(name, device):
    inputs = make(name, 2, 6, 8, torch.float32, device)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in inputs]
    for implementation in ("reference", "triton"):
        for one, other in zip(
            run(name, inputs, None, implementation), run(name, strided, None, implementation), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_bad_arguments_are_named():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"log_a has shape \[2, 5, 4\], expected \[2, 5, 3\]"):
        linear_scan(x, torch.zeros(2, 5, 4))
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        linear_scan(x.long(), x)
    with pytest.raises(ValueError, match=r"initial_state has shape \[3\]"):
        linear_scan(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"segments describe 2 rows of 4 tokens, expected 2 of 5"):
        rg_lru(x, x, x, torch.zeros(3), None, Segments.whole(2, 4))
    with pytest.raises(ValueError, match=r"a_param has shape \[4\]"):
        rg_lru(x, x, x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"x has shape \[2, 0, 3\]"):
        linear_scan(x[:, :0], x[:, :0])
