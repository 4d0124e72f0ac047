"""linear_cross_entropy held to torch's own cross entropy in float64."""

import importlib
import math
from typing import get_args

import pytest
import torch

from longscan.kernels.cross_entropy import chunks, linear_cross_entropy, loss_from_pieces, op, vocabulary_pieces

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
    """Chunks of 7 rows or 3 columns, so that a few rows or columns make several."""
    monkeypatch.setattr(chunks, "at_once", lambda *_: False)
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(chunks, "chunk_columns", lambda *_: 3)


@pytest.fixture(params=[1, 16])
def alignment(request, monkeypatch):
    """Rows of logits as long as the vocabulary, and rounded up."""
    monkeypatch.setattr(chunks, "ALIGNED", request.param)


aligned = pytest.mark.usefixtures("alignment")


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
@pytest.mark.parametrize("rows", [4, 12])
def test_slices_of_the_vocabulary_combine(rows, implementation, options, device, short_chunks):
    """Pieces of three slices, combined as tensor parallelism does, are the whole, and so are their gradients.

    Slices of 8, 8 and 5: of 4 rows the backward pass goes by columns, of 12 by rows.
    """
    dtype = torch.float64 if implementation == "reference" else torch.float32
    inputs, labels = make(rows, 6, 21, dtype, device)
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
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kernel_within_bar(reduction, dtype, options, device, short_chunks):
    kernel_against_bar(dtype, {**options, "reduction": reduction}, (10, 6, 37), device)


@options_given
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("rows", [30, 300], ids=["one chunk", "chunks"])
def test_16_bits_are_as_exact_as_autograd(rows, reduction, options, device, monkeypatch):
    """Of many chunks thanks to sums in fp32, of a single one because its products round once.

    On a CPU the reference's: Triton's interpreter cuts off where bf16 is rounded.
    """
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(chunks, "chunk_columns", lambda *_: 16)
    inputs, labels = make(rows, 24, 37, torch.bfloat16, device)
    assert chunks.at_once(rows, 24) == (rows == 30)
    options = {**options, "reduction": reduction}
    run = lambda *a: linear_cross_entropy(*a, labels, **options)  # noqa: E731
    found, plain = (with_gradients(f, inputs) for f in (run, lambda *a: naive(*a, labels, **options)))
    exact = with_gradients(
        lambda *a: naive(*a, labels.cpu(), **options), [t.detach().cpu().double().requires_grad_() for t in inputs]
    )
    for ours, theirs, e in zip(found, plain, exact, strict=True):
        errors = [float((t.cpu().double() - e).norm() / e.norm()) for t in (ours, theirs)]
        assert errors[0] <= 1.2 * errors[1] + torch.finfo(torch.bfloat16).eps / 4, errors


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(10, 11), (40, 11), (40, 53)], ids=["few", "by rows", "by columns"])
def test_what_chunks_add_up_is_in_fp32(rows, vocabulary, dtype, reduction, monkeypatch):
    """A single chunk adds nothing up; a sum of losses in fp16 has chunks always."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(chunks, "chunk_columns", lambda *_: 16)
    accumulate, found = chunks._accumulate, []

    def noted(into, *factors, first):
        found.append(into.dtype)
        accumulate(into, *factors, first=first)

    monkeypatch.setattr(chunks, "_accumulate", noted)
    inputs, labels = make(rows, 6, vocabulary, dtype)
    with_gradients(lambda *a: linear_cross_entropy(*a, labels, reduction=reduction), inputs)
    if rows == 10 and (reduction == "none" or dtype == torch.bfloat16):
        assert not found
    else:
        by_columns = vocabulary > rows and reduction == "none"
        assert found == [torch.float32] * (4 if by_columns else -(-rows // 7))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_of_many_rows_in_fp16_is_scaled_before_it_is_rounded(reduction):
    """The gradient of its sum is above what fp16 holds."""
    hidden = torch.randn(1000, 512, generator=torch.Generator().manual_seed(0))
    hidden[:, 3] = 100.0
    inputs = [hidden.half().requires_grad_(), torch.zeros(64, 512, dtype=torch.float16, requires_grad=True)]
    loss = linear_cross_entropy(*inputs, torch.zeros(1000, dtype=torch.int64), reduction=reduction).sum() / 1000
    gradient = torch.autograd.grad(loss, inputs)[1]
    torch.testing.assert_close(gradient[0, 3].item(), -100 * 63 / 64, rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@aligned
def test_kernel_over_many_blocks(reduction, options, device, monkeypatch):
    from longscan.kernels.cross_entropy import kernel

    for size, value in {"WHOLE": 0, "BLOCK": 16, "SUMS": 8, "PART": 8}.items():
        monkeypatch.setattr(kernel, size, value)
    kernel_against_bar(torch.float32, {**options, "reduction": reduction}, (6, 5, 53), device)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("vocabulary", [3, 48, 53])
@aligned
def test_kernel_of_programs_that_stay(vocabulary, reduction, options, device, monkeypatch):
    """One program works on many rows; a row's columns are read by fours, or one by one."""
    from longscan.kernels.cross_entropy import kernel

    monkeypatch.setattr(kernel, "processors", lambda _: 1)
    monkeypatch.setattr(kernel, "PROCESSOR_WARPS", 1)
    kernel_against_bar(torch.float32, {**options, "reduction": reduction}, (9, 5, vocabulary), device)


@aligned
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(4, 3), (4, 37), (40, 37)])
def test_columns_beyond_the_vocabulary_count_for_nothing(rows, vocabulary, dtype, whole, device, monkeypatch):
    """All logits are so low that a column of zeros beyond them would be all of the softmax, and its weight infinite."""
    from longscan.kernels.cross_entropy import kernel

    if not whole:
        monkeypatch.setattr(kernel, "WHOLE", 0)
    hidden = torch.ones(rows, 2, device=device, dtype=dtype, requires_grad=True)
    weight = torch.full((vocabulary, 2), -100.0, device=device, dtype=dtype, requires_grad=True)
    labels = torch.arange(rows, device=device) % vocabulary
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, implementation="triton").sum()
        dhidden, dweight = torch.autograd.grad(loss, [hidden, weight])
        torch.testing.assert_close(loss.item(), rows * math.log(vocabulary), rtol=1e-3, atol=0)
        assert dhidden.isfinite().all() and dweight.isfinite().all()


@pytest.mark.gpu
@options_given
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 64, 257), (2500, 128, 32000), (1100, 72, 50257), (1100, 488, 50257)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kernel_within_bar_on_gpu(reduction, shape, dtype, options):
    kernel_against_bar(dtype, {**options, "reduction": reduction}, shape, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 1000)], ids=str)
def test_scaling_rounds_once(shape, dtype, device):
    """A factor that 16 bits cannot hold, on gradients in fp32 and in 16 bits."""
    from longscan.kernels.cross_entropy import kernel, reference

    factor = torch.tensor(1.0001, device=device)
    for given in (torch.float32, torch.float16):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, given)
        expected = (tensor.float() * factor).to(dtype)
        for module in (kernel, reference):
            found = module.scaled(tensor, factor, dtype)
            assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_loss_scale_is_not_rounded_to_the_gradients_dtype(implementation, device):
    inputs, labels = make(10, 6, 37, torch.float16, device)
    loss = linear_cross_entropy(*inputs, labels, implementation=implementation)
    ones, scaled = (
        torch.autograd.grad(loss, inputs, torch.tensor(f, device=device), retain_graph=True) for f in (1.0, 1.0003)
    )
    assert torch.equal(scaled[0], (ones[0].float() * 1.0003).half()) and not torch.equal(scaled[0], ones[0])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_statistics_in_place(implementation, device):
    softmax = importlib.import_module(f"longscan.kernels.cross_entropy.{implementation.replace('triton', 'kernel')}")
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.tensor([0, 36, 37, -1, 5], device=device)
    held = torch.full((4, 7), float("nan"), device=device)
    given = tuple(row[1:6] for row in held)
    alone = tuple(torch.empty(5, device=device) for _ in held)
    for out in (given, alone):
        softmax.statistics(logits, labels, 0.0, out)
    assert torch.equal(torch.stack(alone), held[:, 1:6])
    assert held[:, [0, 6]].isnan().all()


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


SIZES = [(16384, 2560, 32000), (32768, 2048, 50257), (131072, 1024, 32000), (10000, 512, 256000)]


@pytest.mark.parametrize(("rows", "width", "vocabulary"), SIZES)
def test_chunks_hold_an_eighth_of_the_logits_beyond_gradients(rows, width, vocabulary):
    """Of 16-bit inputs: in bytes, without the gradients, one fp32 gradient of the weight and a copy of it."""
    eighth = 2 * rows * vocabulary // 8
    wide, narrow = 4 * vocabulary * width, 2 * vocabulary * width
    held = 2 * chunks.aligned(vocabulary, 2) * chunks.chunk_rows(rows, width, 132)
    assert held - narrow <= eighth  # the forward pass: the weight's gradient is in fp32 only
    held = 2 * rows * chunks.chunk_columns(rows, vocabulary, width, 132)
    assert rows >= vocabulary or held + 2 * rows * width - wide <= eighth


@pytest.mark.parametrize(("vocabulary", "element", "columns"), [(50257, 2, 50272), (50264, 2, 50264), (10, 4, 16)])
def test_rows_of_logits_begin_at_16_bytes(vocabulary, element, columns):
    assert chunks.aligned(vocabulary, element) == columns


def test_chunks_fill_the_processors():
    assert chunks.chunk_rows(16384, 2560, 132) == 3328  # 26 x 10 tiles: two rounds of 132 less 4
    assert chunks.chunk_rows(16384, 2048, 132) == 4096  # 32 x 8 tiles
    assert chunks.chunk_columns(16384, 32000, 2560, 132) == 8448  # 66 x 10 tiles: five rounds
    assert chunks.chunk_rows(700, 2560, 132) == 700
    assert chunks.chunk_rows(10**6, 64, 1) == chunks.MOST_ROWS


@pytest.mark.parametrize(
    ("rows", "width", "single"),
    [(700, 64, False), (4096, 2560, True), (8192, 4096, True), (9362, 4096, True), (9363, 4096, False)],
)
def test_few_rows_are_one_chunk(rows, width, single):
    assert chunks.at_once(rows, width) == single
    # Bytes of logits, of an eighth and of an fp32 sum, a token of the vocabulary.
    assert (2 * rows <= 2 * (rows // 8) + 4 * width) == single


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_without_graph_breaks(reduction):
    inputs, labels = make(10, 6, 11, torch.float32)

    def run(hidden, weight):
        return linear_cross_entropy(hidden.square(), weight, labels, reduction=reduction).sum()

    expected = torch.autograd.grad(run(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(10, 11), (40, 11), (40, 53)], ids=["few", "by rows", "by columns"])
@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_gradient_of_one_input_alone(frozen, rows, vocabulary, reduction, compiled, monkeypatch):
    """The other's is not made if it is the weight's: a product less, and no sum of its size."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(chunks, "chunk_columns", lambda *_: 16)
    inputs, labels = make(rows, 6, vocabulary, torch.bfloat16)
    run = lambda *a: linear_cross_entropy(*a, labels, reduction=reduction).sum()  # noqa: E731
    expected = torch.autograd.grad(run(*inputs), inputs)
    inputs[frozen].requires_grad_(False)
    made = []
    if frozen == 1:
        monkeypatch.setattr(chunks, "_accumulate", lambda into, *a, **_: made.append(into))
        monkeypatch.setattr(chunks, "weight_gradient", lambda *a: made.append(a))
    (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(*inputs).backward()
    assert not made and inputs[frozen].grad is None
    # Compiled code adds chunks up where eager code has one; beside a frozen weight all chunks are of rows.
    otherwise = compiled or (frozen == 1 and reduction == "none" and vocabulary > rows)
    tolerance = torch.finfo(torch.bfloat16).eps if otherwise else 0
    torch.testing.assert_close(inputs[1 - frozen].grad, expected[1 - frozen], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_few_rows_beside_a_frozen_weight_have_chunks(reduction, monkeypatch):
    """With no gradient of the weight to make of them, all logits at once would only take memory."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_: 7)
    logits, rows = chunks._logits, []
    monkeypatch.setattr(chunks, "_logits", lambda hidden, *a: rows.append(len(hidden)) or logits(hidden, *a))
    (hidden, weight), labels = make(10, 6, 11, torch.bfloat16)
    linear_cross_entropy(hidden, weight.detach(), labels, reduction=reduction).sum().backward()
    assert max(rows) == 7


@pytest.mark.parametrize("rows", [10, 40], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_changes_nothing(autocast, rows):
    inputs, labels = make(rows, 6, 11, torch.bfloat16)
    with torch.autocast("cpu", autocast):
        loss = linear_cross_entropy(*inputs, labels)
        found = torch.autograd.grad(loss, inputs)
    expected = linear_cross_entropy(*inputs, labels)
    for one, other in zip((loss, *found), (expected, *torch.autograd.grad(expected, inputs)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [10, 40], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_a_derivative_of_gradients_is_refused(frozen, rows):
    inputs, labels = make(rows, 6, 11, torch.bfloat16)
    inputs[frozen].requires_grad_(False)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(*inputs, labels), inputs[1 - frozen], create_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward through longscan"):
        gradient.float().sum().backward()


@pytest.mark.parametrize("rows", [10, 40], ids=["one chunk", "chunks"])
def test_a_second_backward_pass_finds_the_same(rows):
    inputs, labels = make(rows, 6, 11, torch.bfloat16)
    loss = linear_cross_entropy(*inputs, labels)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_operators_say_what_they_return():
    inputs, labels = make(10, 16, 11, torch.bfloat16)
    for keep in get_args(chunks.Keep):
        hidden, weight = inputs[0], inputs[1].detach() if keep == "nothing" else inputs[1]
        torch.library.opcheck(op._forward.operator, [hidden, weight, labels, -100, 0.0, 0.0, 0.0, keep, "reference"])
    dlogits = torch.randn(10, 16, dtype=torch.bfloat16)
    torch.library.opcheck(op._weight_gradient.operator, [dlogits, inputs[0].detach(), 11])
    torch.library.opcheck(op._pieces.operator, [*inputs, labels, 0.0, "reference"])
    with torch.no_grad():
        pieces = op._pieces(*inputs, labels, 0.0, "reference")
    for frozen in (False, True):
        given = [*(t.detach() for t in inputs), labels, *pieces, 0.0, frozen, "reference"]
        torch.library.opcheck(op._pieces_backward.operator, given)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_once_for_any_number_of_rows(reduction):
    """Below and above those that are one chunk."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *a: linear_cross_entropy(*a, reduction=reduction).sum(), fullgraph=True, backend="aot_eager"
    )
    for rows in (10, 40):
        (hidden, weight), labels = make(rows, 6, 11, torch.bfloat16)
        for tensor in (hidden, labels):
            torch._dynamo.mark_dynamic(tensor, 0, min=2, max=5000)
        with torch.compiler.set_stance("fail_on_recompile" if rows == 40 else "default"):
            found = torch.autograd.grad(compiled(hidden, weight, labels), [hidden, weight])
        expected = torch.autograd.grad(
            linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum(), [hidden, weight]
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


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
