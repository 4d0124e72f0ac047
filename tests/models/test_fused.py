"""Norms and gates on a GPU held to the plain ones in float64, and what runs where."""

import subprocess
import sys

import pytest
import torch

from longscan.kernels import Segments
from longscan.models import fused
from longscan.models.mlp import gated
from longscan.models.norm import RMSNorm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def norm(x, scale):
    return torch.func.functional_call(RMSNorm(x.shape[-1], 1e-6), {"scale": scale}, (x,))


# What the models call: our norm and Liger's gates on CUDA, plain PyTorch in float64 and on a CPU.
FUNCTIONS = {"norm": norm, "gelu": lambda a, b: gated("gelu", a, b), "silu": lambda a, b: gated("silu", a, b)}


def results(function, inputs):
    """The output and all gradients; the gradient that came in stays what it was."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    value = y.detach().clone()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    kept = grad.clone()
    gradients = torch.autograd.grad(y, inputs, grad)
    assert torch.equal(grad, kept)
    return [value, *gradients]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [48, 2560, 7680])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernel_within_bar(name, width, dtype):
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 137, width), (width,) if name == "norm" else (3, 137, width)]
    inputs = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    function = FUNCTIONS[name]
    exact, rounded = results(function, [t.double() for t in inputs]), results(function, inputs)
    found, again = (results(function, [t.cuda() for t in inputs]) for _ in range(2))
    for f, a, r, e in zip(found, again, rounded, exact, strict=True):
        assert f.dtype == dtype
        assert torch.equal(f, a), "other bits the second time"
        errors = [float((t.cpu().double() - e).norm() / e.norm()) for t in (f, r)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps, errors


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mixer", ["attention", "linearized_attention", "local_attention", "rg_lru", "short_conv"])
def test_made_again_activations_are_not_those_written_over(mixer, make_model, tokens):
    """Every gradient of a model that recomputes its activations, in fp32 on a GPU, is that of float64 on a CPU."""
    gradients = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        options = {"activation_checkpoint": "full"}
        model = make_model(dtype, options, pattern=[mixer], layers=2).to(device)
        logits = model(tokens.to(device), Segments.from_lengths([[12, 1, 18], [31]], device=device))
        logits.square().sum().backward()
        gradients.append({name: p.grad.cpu().double() for name, p in model.named_parameters()})
    exact, found = gradients
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_a_cpu_and_float64_take_plain_torch():
    assert not fused.runs(torch.zeros(2))
    assert not fused.runs(torch.zeros(2, dtype=torch.float64))


def test_a_cpu_run_imports_no_liger():
    script = """
import sys, torch
from longscan.models.mlp import gated
from longscan.models.norm import RMSNorm
gated("gelu", RMSNorm(4, 1e-6)(torch.ones(2, 4)), torch.ones(2, 4))
print([m for m in sys.modules if m.split(".")[0] in ("liger_kernel", "triton")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_liger_brings_no_library_that_it_only_looks_for(tmp_path):
    for name in ("peft", "transformers"):
        (tmp_path / f"{name}.py").write_text("import scipy_and_the_like")
    script = """
import sys
from longscan.models import fused
print(sorted(fused._functions()), [m for m in ("peft", "transformers") if m in sys.modules])
import peft
"""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "['gelu', 'silu'] []"
    assert done.stderr.strip().endswith("No module named 'scipy_and_the_like'"), "afterwards it is there for others"
