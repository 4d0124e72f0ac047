"""Works of the layers around the mixers: RMSNorm, the MLP's gate, rotary positions; ours is plain torch.

Peers: torch.compile of the same functions, and Liger's kernels where installed. Liger's rotation overwrites its inputs
and its gates' backward pass what they saved; their floor counts as if they did not. `--check` prints errors.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call

from longscan.models.mlp import ACTIVATIONS
from longscan.models.norm import RMSNorm
from longscan.models.positions import rotary_table, rotate

from .gpu_timing import Work

TOKENS, WIDTH, HIDDEN = 32768, 2560, 7680
HEADS, HEAD_DIM = 16, 128
EPS = 1e-6

Layer = Callable[..., Tensor]


def works(tokens: int = TOKENS) -> Iterator[Work]:
    """Every layer by every implementation, ours first."""
    yield from norm_works(tokens)
    yield from gate_works(tokens, "geglu", "gelu")
    yield from gate_works(tokens, "swiglu", "silu")
    for rotated in (HEAD_DIM, HEAD_DIM // 2):
        yield from rotary_works(tokens, rotated)


def norm_works(tokens: int) -> Iterator[Work]:
    """RMSNorm of the residual stream: reads x, writes y; backward reads x and dy, writes dx."""
    x, scale = _draw(1, tokens, WIDTH), _draw(WIDTH)
    norm = RMSNorm(WIDTH, EPS).to(x.device, x.dtype)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return functional_call(norm, {"scale": scale}, (x,))

    yield from _each(f"rms_norm ({tokens}, {WIDTH}) bf16", [x, scale], (2, 5), ours, liger_norm)


def gate_works(tokens: int, name: str, activation: str) -> Iterator[Work]:
    """act(gate) * up: reads both, writes y; backward reads both and dy, writes both gradients."""
    act, inputs = ACTIVATIONS[activation], [_draw(1, tokens, HIDDEN) for _ in range(2)]

    def ours(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    yield from _each(f"{name} ({tokens}, {HIDDEN}) bf16", inputs, (3, 8), ours, lambda: liger_gate(activation))


def rotary_works(tokens: int, rotated: int) -> Iterator[Work]:
    """Queries with their first dims rotated: read and written once each way."""
    q = _draw(1, tokens, HEADS, HEAD_DIM)
    table = rotary_table(torch.arange(tokens, device="cuda")[None], rotated, 10000.0, torch.float32)
    name = f"rotary ({tokens}, {HEADS}, {HEAD_DIM}), {rotated} dims rotated, bf16"
    yield from _each(name, [q], (2, 4), lambda q: rotate(q, *table), lambda: liger_rotary(rotated, *table))


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _each(
    name: str, inputs: list[Tensor], passes: tuple[int, int], ours: Layer, liger: Callable[[], Layer]
) -> Iterator[Work]:
    """The works of one layer; `passes` over its first input's bytes, forward and with backward, are the floor."""
    forward, both = (count * inputs[0].nbytes for count in passes)
    yield Work(name, inputs, ours, forward, both)
    yield Work(name, inputs, torch.compile(ours), forward, both, impl="torch.compile")
    if importlib.util.find_spec("liger_kernel"):
        yield Work(name, inputs, liger(), forward, both, impl="Liger")


def liger_norm() -> Layer:
    """Our formula: everything in fp32, the scale around zero; the gradient given is left as it is."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, scale: LigerRMSNormFunction.apply(x, scale, EPS, 1.0, "gemma", False)


def liger_gate(activation: str) -> Layer:
    """Overwrites gate and up by their gradients."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = {"gelu": LigerGELUMulFunction, "silu": LigerSiLUMulFunction}[activation]
    return lambda gate, up: function.apply(gate, up)


def liger_rotary(rotated: int, cos: Tensor, sin: Tensor) -> Layer:
    """Overwrites its queries by the rotated ones."""
    from liger_kernel.ops.rope import LigerRopeFunction

    key = torch.zeros(1, 1, cos.shape[1], HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def run(q: Tensor) -> Tensor:
        return LigerRopeFunction.apply(q.transpose(1, 2), key, cos, sin, None, 1, rotated)[0].transpose(1, 2)

    return run


def check(tokens: int = 300) -> None:
    """Prints each implementation's relative error of the output and of each gradient, against ours in float64."""
    exact: dict[str, list[Tensor]] = {}
    for work in works(tokens):
        if work.impl == "longscan":
            exact[work.name] = _results(work.call, [t.detach().double() for t in work.inputs])
        found = _results(work.call, [t.detach().clone() for t in work.inputs])
        errors = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact[work.name], strict=True)]
        print(work.name, "|", work.impl, "|", " ".join(f"{error:.1e}" for error in errors), flush=True)


def _results(call: Layer, inputs: list[Tensor]) -> list[Tensor]:
    y = call(*[t.requires_grad_() for t in inputs])
    grad = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(torch.bfloat16)
    value = y.detach().clone()
    return [value, *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def main() -> None:
    """`--check` prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", required=True)
    parser.parse_args()
    check()


if __name__ == "__main__":
    main()
