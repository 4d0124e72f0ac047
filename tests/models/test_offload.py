"""What autograd keeps, kept in host memory: the same bits back, memory used again, copies begun in time."""

from contextlib import nullcontext

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import offload
from longscan.models.offload import HostStore


class Stream:
    """Does everything at once, as a CPU does, and notes who waits for what."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the event of {event}")


@pytest.fixture
def log():
    return []


@pytest.fixture
def taken(monkeypatch, log):
    """Has a CPU stand for the GPU; the list of all chunks ever taken."""
    found = []
    current = Stream("compute", log)
    monkeypatch.setattr(offload, "CHUNK", 64)
    monkeypatch.setattr(offload, "_goes", lambda x: x.numel() > 0)
    monkeypatch.setattr(offload, "_pinned", lambda: found.append(torch.empty(64, dtype=torch.uint8)) or found[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append("kept for copies"), raising=False
    )
    return found


def chain(x, depth=4):
    """A graph that keeps `depth` tensors of x's shape, and what it computes."""
    for _ in range(depth):
        x = x.sin()
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (16, 2), (1,), (7, 31)])
def test_the_same_bits_come_back(taken, shape, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    store = HostStore()
    for make in (lambda: x, lambda: x[:, ::2] if x.ndim > 1 else x, lambda: x.t() if x.ndim > 1 else x):
        (expected,) = torch.autograd.grad(chain(make()).sum(), x)
        with store.keeping():
            y = chain(make())
        (found,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(found, expected)
    assert taken


def test_memory_is_that_of_what_is_in_flight(taken):
    """Several passes, forward and backward in turns as a pipeline has them, take no more than the most at once."""
    store, x = HostStore(), torch.randn(4, 10, requires_grad=True)
    each = 4 * 3  # chunks of 64 bytes, of 160
    passes = []
    for step in range(3):
        for _ in range(2):
            with store.keeping():
                passes.append(chain(x))
        assert len(taken) == 2 * each
        torch.autograd.grad(passes.pop(0).sum(), x)
        with store.keeping():
            passes.append(chain(x[:2]))
        while passes:
            torch.autograd.grad(passes.pop(0).sum(), x)
        assert len(taken) == 2 * each, step
        assert len(store._free) == 2 * each


def test_each_copy_waits_for_its_memory_and_the_next_sets_out_ahead(taken, log):
    x = torch.randn(4, requires_grad=True)
    store = HostStore()
    with store.keeping():
        y = chain(x, depth=3)
    assert log == ["copies waits for compute", "kept for copies"] * 3
    log.clear()
    torch.autograd.grad(y.sum(), x)
    fetch = ["copies waits for compute", "copies records"]
    arrives = "compute waits for the event of copies"
    assert log == [*fetch, arrives, *fetch, arrives, *fetch, arrives]


def test_a_graph_that_is_dropped_disturbs_nobody(taken):
    store, x = HostStore(), torch.randn(40, requires_grad=True)
    with store.keeping():
        chain(x)
    with store.keeping():
        y = chain(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.autograd.grad(chain(x).sum(), x)[0])


def test_a_second_backward_pass_is_refused(taken):
    x = torch.randn(4, requires_grad=True)
    with HostStore().keeping():
        y = x.sin()
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(AssertionError, match="serves one pass"):
        torch.autograd.grad(y.sum(), x)


def test_a_model_sends_the_inputs_of_its_blocks_alone(taken, make_model, tokens, segments):
    results = []
    for mode in ("full", "offload"):
        model = make_model(options={"activation_checkpoint": mode})
        loss = model(tokens, segments).square().sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    config = make_model().config
    assert len(taken) == config.layers * -(-tokens.numel() * config.width * 8 // 64)


def test_a_cpu_keeps_what_it_keeps(make_model, tokens, segments):
    model = make_model(options={"activation_checkpoint": "offload"})
    model(tokens, segments).sum().backward()
    assert model._host._stream is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gpu_gives_the_bits_of_full(make_model, dtype):
    """Over several steps of two passes in flight, so that host memory is used again while copies are under way."""
    tokens = torch.randint(0, 50, (2, 1, 4096), generator=torch.Generator().manual_seed(0)).cuda()
    segments = Segments.from_lengths([[1000, 3, 3093]], device="cuda")
    results = []
    for mode in ("full", "full", "offload"):
        model = make_model(dtype, {"activation_checkpoint": mode}, width=256, layers=6).cuda()
        for _ in range(3):
            losses = [model(each, segments).float().logsumexp(-1).sum() for each in tokens]
            for loss in losses:
                loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    full, again, offloaded = results
    for name, gradient in full.items():
        assert torch.equal(again[name], gradient), f"{name} does not repeat"
        assert torch.equal(offloaded[name], gradient), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_holds_less(make_model):
    tokens, held = torch.zeros(1, 32768, dtype=torch.int64, device="cuda"), []
    segments = Segments.whole(1, 32768, device="cuda")
    for mode in ("full", "offload"):
        model = make_model(torch.bfloat16, {"activation_checkpoint": mode}, width=256, layers=12).cuda()
        before = torch.cuda.memory_allocated()
        hidden = model.hidden(tokens, segments)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del hidden, model
    inputs = 12 * 32768 * 256 * 2
    assert held[0] - held[1] > 0.9 * inputs
