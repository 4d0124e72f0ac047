"""linear_cross_entropy held to torch's own cross entropy in float64."""

import pytest
import torch

from longscan.kernels.cross_entropy import chunks, linear_cross_entropy, loss_from_pieces, vocabulary_pieces

OPTIONS = [
    {},
    {"z_loss": 0.01},
    {"label_smoothing": 0.1},
    {"soft_cap": 2.0},
    {"z_loss": 0.01, "label_smoothing": 0.1, "soft_cap": 3.0},
]
options_given = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")


def make(rows, width, vocabulary, dtype=torch.float64, device="cpu", seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=rng, dtype=torch.float64) * 2 * width**-0.5
    labels = torch.randint(vocabulary, (rows,), generator=rng)
    labels[1::5] = -100
    return [t.to(device, dtype).requires_grad_() for t in (hidden, weight)], labels.to(device)


def naive(hidden, weight, labels, z_loss=0.0, label_smoothing=0.0, soft_cap=0.0, reduction="sum"):
    logits = hidden @ weight.t()
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * torch.logsumexp(logits, 1) ** 2 * (labels != -100)
    return losses.sum() if reduction == "sum" else losses


def with_gradients(function, inputs, seed=1):
    loss = function(*inputs)
    grad = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, grad)]


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 7 rows, so that a few rows make several."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows: 7)


@options_given
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_reference_is_cross_entropy(rows, reduction, options, short_chunks):
    inputs, labels = make(rows, 6, 11)
    options = {**options, "reduction": reduction}
    actual = with_gradients(lambda *a: linear_cross_entropy(*a, labels, **options), inputs)
    exact = with_gradients(lambda *a: naive(*a, labels, **options), inputs)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@options_given
def test_gradcheck(options, short_chunks):
    inputs, labels = make(9, 3, 5)
    for reduction in ("sum", "none"):
        run = lambda *a, r=reduction: linear_cross_entropy(*a, labels, **options, reduction=r)  # noqa: E731
        assert torch.autograd.gradcheck(run, inputs)


@options_given
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_slices_of_the_vocabulary_combine(implementation, options, device, short_chunks):
    """Pieces of three slices, combined as tensor parallelism does, are the whole, and so are their gradients."""
    dtype = torch.float64 if implementation == "reference" else torch.float32
    inputs, labels = make(12, 6, 21, dtype, device)
    rest = dict(options)
    cap = rest.pop("soft_cap", 0.0)

    def combined(hidden, weight):
        slices = [
            vocabulary_pieces(hidden, part, labels, vocab_start=start, soft_cap=cap, implementation=implementation)
            for start, part in zip((0, 8, 16), weight.split(8), strict=True)
        ]
        highest, total, target, spread = (torch.stack(t) for t in zip(*slices, strict=True))
        most = highest.detach().amax(0)
        whole = (most, (total * (highest.detach() - most).exp()).sum(0), target.sum(0), spread.sum(0))
        return loss_from_pieces(whole, labels, 21, **rest)

    exact = with_gradients(
        lambda *a: naive(*a, labels.cpu(), **options, reduction="none"),
        [t.detach().cpu().double().requires_grad_() for t in inputs],
    )
    tolerance = 1e-10 if implementation == "reference" else 2e-6
    for a, e in zip(with_gradients(combined, inputs), exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=tolerance, atol=tolerance)


def kernel_against_bar(dtype, options, shape, device):
    """The kernel's error against float64 is at most twice the reference's at the same precision, and a rounding."""
    inputs, labels = make(*shape, dtype, device)
    exact = with_gradients(
        lambda *a: naive(*a, labels.cpu(), **options), [t.detach().cpu().double().requires_grad_() for t in inputs]
    )
    kernel, again, reference = (
        with_gradients(lambda *a, i=i: linear_cross_entropy(*a, labels, **options, implementation=i), inputs)
        for i in ("triton", "triton", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True)), "other bits the second time"
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for k, r, e in zip(kernel, reference, exact, strict=True):
        errors = [float((t.cpu().double() - e).norm() / e.norm()) for t in (k, r)]
        assert k.dtype == r.dtype and errors[0] <= 2 * errors[1] + floor, errors


@options_given
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernel_within_bar(dtype, options, device, short_chunks):
    kernel_against_bar(dtype, options, (10, 6, 37), device)


def test_kernel_over_many_blocks(device, monkeypatch):
    from longscan.kernels.cross_entropy import kernel

    monkeypatch.setattr(kernel, "BLOCK", 16)
    kernel_against_bar(torch.float32, OPTIONS[-1], (6, 5, 53), device)


@pytest.mark.gpu
@options_given
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 64, 257), (2500, 128, 32000), (1100, 72, 50257)], ids=str)
def test_kernel_within_bar_on_gpu(shape, dtype, options):
    kernel_against_bar(dtype, options, shape, "cuda")


def test_ignored_rows_count_for_nothing(device):
    (hidden, weight), labels = make(10, 6, 11, torch.float32, device)
    kept = labels != -100
    whole = with_gradients(lambda *a: linear_cross_entropy(*a, labels, implementation="triton"), [hidden, weight])
    few = [hidden.detach()[kept].requires_grad_(), weight]
    part = with_gradients(lambda *a: linear_cross_entropy(*a, labels[kept], implementation="triton"), few)
    assert (whole[1][~kept] == 0).all()
    torch.testing.assert_close(whole[1][kept], part[1])
    torch.testing.assert_close(whole[2], part[2])
    torch.testing.assert_close(whole[0], part[0])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_only_ignored_rows_are_zero(implementation, device):
    inputs, labels = make(1, 6, 11, torch.float32, device)
    labels.fill_(-100)
    for options in OPTIONS:
        found = with_gradients(
            lambda *a, o=options: linear_cross_entropy(*a, labels, **o, implementation=implementation), inputs
        )
        assert all((t == 0).all() for t in found)


def test_without_gradients_it_is_the_same_loss(device):
    (hidden, weight), labels = make(10, 6, 11, torch.float32, device)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, labels, implementation="triton")
    torch.testing.assert_close(quiet, linear_cross_entropy(hidden, weight, labels, implementation="triton").detach())


def test_chunks_hold_an_eighth_of_the_logits():
    assert all(chunks.chunk_rows(rows) < rows / 8 for rows in (16384, 10000, 131072))
    assert chunks.chunk_rows(5) == chunks.FEWEST_ROWS and chunks.chunk_rows(10**6) == chunks.MOST_ROWS


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_without_graph_breaks(reduction):
    inputs, labels = make(10, 6, 11, torch.float32)

    def run(hidden, weight):
        return linear_cross_entropy(hidden.square(), weight, labels, reduction=reduction).sum()

    expected = torch.autograd.grad(run(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one)


def test_bad_arguments_are_named():
    (hidden, weight), labels = make(4, 3, 5)
    with pytest.raises(ValueError, match=r"weight has shape \[5, 3\], expected \[any, 2\]"):
        linear_cross_entropy(hidden[:, :2], weight, labels)
    with pytest.raises(ValueError, match=r"labels has shape \[3\]"):
        linear_cross_entropy(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"labels holds 5, expected \[0, 5\)"):
        linear_cross_entropy(hidden, weight, labels.fill_(5))
    with pytest.raises(TypeError, match=r"labels is torch.float32"):
        linear_cross_entropy(hidden, weight, labels.float())
    with pytest.raises(TypeError, match=r"expected one dtype"):
        linear_cross_entropy(hidden.float(), weight, labels)
    with pytest.raises(ValueError, match=r"reduction='mean'"):
        linear_cross_entropy(hidden, weight, labels, reduction="mean")
    with pytest.raises(ValueError, match=r"label_smoothing=1"):
        linear_cross_entropy(hidden, weight, labels, label_smoothing=1)
    with pytest.raises(ValueError, match=r"ignore_index=0"):
        linear_cross_entropy(hidden, weight, labels, ignore_index=0)
    with pytest.raises(ValueError, match=r"soft_cap=-1"):
        linear_cross_entropy(hidden, weight, labels, soft_cap=-1)
