"""The RG-LRU's gate projections on one GPU for benchmarks.kernels, alone and with the recurrence they feed.

python -m benchmarks.kernels_block_diagonal --tune    times the kernels' tiles, and cuBLAS without copies, pass by pass
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longscan.kernels import gate_projections, rg_lru
from longscan.kernels.block_diagonal import kernel, reference
from longscan.kernels.block_diagonal.kernel import Tile

from .gpu_timing import Work, time_or_error

TOKENS, WIDTH, BLOCKS = 32768, 2560, 16
SIDE = WIDTH // BLOCKS


class _Both(torch.autograd.Function):
    """The first of two tensors; on the way back the second's gradient is `other`, so that each has its own memory."""

    @staticmethod
    def forward(ctx, one: Tensor, two: Tensor, other: Tensor) -> Tensor:
        ctx.other = other
        return one.view_as(one)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.other, None


def works() -> Iterator[Work]:
    """Both gates by ours and cuBLAS; then with rg_lru, whose gradient of x is added to that of the gates."""
    size, flops = TOKENS * WIDTH * 2, 2 * 2 * TOKENS * SIDE * WIDTH
    inputs = _inputs()
    other, shape = torch.randn_like(inputs[0]), f"(1, {TOKENS}, {BLOCKS}x{SIDE}) bf16"

    def gates(impl: str, inputs: list[Tensor], project: Callable[..., tuple[Tensor, Tensor]]) -> Work:
        # Reads x, writes both gates; backward reads x and both gradients, writes dx.
        call = _joined(project, other.view(inputs[0].shape))
        return Work(f"gates {shape}", inputs, call, 3 * size, 7 * size, flops, 3 * flops, impl)

    yield gates("longscan", inputs, gate_projections)
    yield gates("torch bmm and bias (B, T, D)", inputs, reference.forward)
    own = [_draw(BLOCKS, TOKENS, SIDE), *_inputs()[1::2]]
    yield gates("torch bmm (N, T, S), no bias", own, lambda x, a, g: (torch.bmm(x, a), torch.bmm(x, g)))

    a_param = torch.full((WIDTH,), -4.0, device="cuda", requires_grad=True)
    for impl, project in (("longscan", gate_projections), ("torch bmm and bias, longscan rg_lru", reference.forward)):

        def whole(x: Tensor, *rest: Tensor, project: Callable[..., tuple[Tensor, Tensor]] = project) -> Tensor:
            return rg_lru(x, *project(x, *rest[:-1]), rest[-1])[0]

        name = f"gates + rg_lru {shape}"
        yield Work(name, [*inputs, a_param], whole, 7 * size, 22 * size, flops, 3 * flops, impl)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _inputs() -> list[Tensor]:
    """x, then weight and bias of both gates."""
    weights = [(_draw(BLOCKS, SIDE, SIDE).detach() * SIDE**-0.5).requires_grad_() for _ in range(2)]
    return [_draw(1, TOKENS, WIDTH), weights[0], _draw(WIDTH), weights[1], _draw(WIDTH)]


def _joined(project: Callable[..., tuple[Tensor, Tensor]], other: Tensor) -> Callable[..., Tensor]:
    """`project` as a function of one output, at no cost."""
    return lambda *inputs: _Both.apply(*project(*inputs), other)


# rows, warps, stages; then programs an SM, and the side kept whole
FORWARD = [(128, 8, 1), (64, 4, 1, 3, 64), (64, 4, 1), (64, 4, 1, 2, 64), (64, 8, 1), (128, 8, 1, 1, 64)]
INPUTS = [(128, 8, 1), (64, 4, 1), (64, 4, 1, 2, 64), (64, 8, 1), (128, 8, 1, 1, 64)]
WEIGHTS = [(64, 8, 3), (64, 8, 4), (32, 8, 4), (64, 8, 2), (64, 4, 3, 2, 64)]


def candidates() -> None:
    """Prints the time of each tile and of cuBLAS with strided outputs, a pass at a time."""
    x, weight_a, bias_a, weight_x, bias_x = inputs = [t.detach() for t in _inputs()]
    da, dg = (torch.randn_like(x) for _ in range(2))
    passes = {
        "FORWARD": (FORWARD, lambda: kernel.forward(*inputs)),
        "INPUTS": (INPUTS, lambda: kernel.input_gradient(da, dg, weight_a, weight_x)),
        "WEIGHTS": (WEIGHTS, lambda: kernel.weight_gradients(da, dg, x, weight_a)),
    }
    for attribute, (tiles, run) in passes.items():
        chosen = getattr(kernel, attribute)
        for tile in tiles:
            setattr(kernel, attribute, Tile(*tile))
            print(f"gates {attribute} {tile}: {time_or_error(run)}", flush=True)
        setattr(kernel, attribute, chosen)
    for label, run in _cublas(x, weight_a, bias_a, da).items():
        print(f"one gate by cuBLAS, {label}: {time_or_error(run)}", flush=True)


def _cublas(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """The passes of one gate, read and written in place in (B, T, D) by leading dimensions."""
    x, dy, out = (t.view(-1, BLOCKS, SIDE).transpose(0, 1) for t in (x, dy, torch.empty_like(x)))
    biases = bias.view(BLOCKS, 1, SIDE).expand_as(out)
    return {
        "FORWARD without bias": lambda: torch.bmm(x, weight, out=out),
        "FORWARD": lambda: torch.baddbmm(biases, x, weight, out=out),
        "INPUTS": lambda: torch.bmm(dy, weight.mT, out=out),
        "INPUTS of the second gate": lambda: torch.baddbmm(out, dy, weight.mT, out=out),
        "WEIGHTS without bias": lambda: torch.bmm(x.mT, dy),
        "bias": lambda: dy.sum(1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    if parser.parse_args().tune:
        candidates()
