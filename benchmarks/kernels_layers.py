"""Works of the layers around the mixers: RMSNorm, the MLP's gate, rotary positions, each as the models run it.

Norm and rotation are ours, the gate is Liger's kernel. Peers: the same in plain PyTorch, that under torch.compile, and
where installed Liger's norm and its rotation, which overwrites its queries. Liger's gates overwrite what they saved in
the backward pass; their floor counts as if they did not. `--check` prints errors, `--tune` the time of each tile of the
rotation, the norm, and the sums of what programs leave of a gradient.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from longscan.kernels import partials, rotary
from longscan.kernels.rms_norm import kernel as norms
from longscan.kernels.rotary import kernel, reference
from longscan.models.mlp import ACTIVATIONS, gated
from longscan.models.norm import RMSNorm
from longscan.models.positions import rotary_table

from .gpu_timing import Work, milliseconds, time_or_error

TOKENS, WIDTH, HIDDEN = 32768, 2560, 7680
HEADS, HEAD_DIM = 16, 128
BASE = 10000.0
EPS = 1e-6

Layer = Callable[..., Tensor]


def works(tokens: int = TOKENS) -> Iterator[Work]:
    """Every layer by every implementation, ours first."""
    yield from norm_works(tokens)
    yield from gate_works(tokens, "geglu", "gelu")
    yield from gate_works(tokens, "swiglu", "silu")
    for rotated in (HEAD_DIM, HEAD_DIM // 2):
        yield from rotary_works(tokens, HEADS, rotated)
    yield from rotary_works(tokens, 1, HEAD_DIM // 2)
    yield table_work(tokens)


def norm_works(tokens: int) -> Iterator[Work]:
    """RMSNorm of the residual stream: reads x, writes y; backward reads x and dy, writes dx."""
    x, scale = _draw(1, tokens, WIDTH), _draw(WIDTH)
    norm = RMSNorm(WIDTH, EPS).to(x.device, x.dtype)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return functional_call(norm, {"scale": scale}, (x,))

    def plain(x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + scale.float(), EPS).to(x.dtype)

    name = f"rms_norm ({tokens}, {WIDTH}) bf16"
    yield from _each(name, [x, scale], (2, 5), ours, plain)
    if importlib.util.find_spec("liger_kernel"):
        yield Work(name, [x, scale], liger_norm(), 2 * x.nbytes, 5 * x.nbytes, impl="Liger")


def gate_works(tokens: int, name: str, activation: str) -> Iterator[Work]:
    """act(gate) * up: reads both, writes y; backward reads both and dy, writes both gradients."""
    act, inputs = ACTIVATIONS[activation], [_draw(1, tokens, HIDDEN) for _ in range(2)]
    title = f"{name} ({tokens}, {HIDDEN}) bf16"
    yield from _each(title, inputs, (3, 8), partial(gated, activation), lambda gate, up: act(gate) * up)


def rotary_works(tokens: int, heads: int, rotated: int) -> Iterator[Work]:
    """Queries, or the keys of one head, with their first dims rotated: read and written once each way."""
    q, table = _draw(1, tokens, heads, HEAD_DIM), _table(_positions(tokens), rotated)
    name = f"rotary ({tokens}, {heads}, {HEAD_DIM}), {rotated} dims rotated, bf16"
    yield from _each(name, [q], (2, 4), lambda q: rotary(q, *table), lambda q: reference.forward(q, *table))
    if importlib.util.find_spec("liger_kernel"):
        passes = (2 * q.nbytes, 4 * q.nbytes)
        yield Work(name, [q], liger_rotary(rotated, *table), *passes, impl="Liger in place")


def table_work(tokens: int) -> Work:
    """The cosines and sines of half a head, which each layer makes for its queries and keys."""
    positions, rotated = _positions(tokens), HEAD_DIM // 2
    size = positions.nbytes + tokens * rotated * 4
    return Work(f"rotary_table ({tokens}, {rotated}) fp32", [positions], lambda p: _table(p, rotated)[0], size, size)


def _positions(tokens: int) -> Tensor:
    return torch.arange(tokens, device="cuda")[None]


def _table(positions: Tensor, rotated: int) -> tuple[Tensor, Tensor]:
    return rotary_table(positions, rotated, BASE, torch.float32)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _each(name: str, inputs: list[Tensor], passes: tuple[int, int], ours: Layer, plain: Layer) -> Iterator[Work]:
    """The works of one layer; `passes` over its first input's bytes, forward and with backward, are the floor."""
    forward, both = (count * inputs[0].nbytes for count in passes)
    yield Work(name, inputs, ours, forward, both)
    yield Work(name, inputs, plain, forward, both, impl="torch")
    yield Work(name, inputs, torch.compile(plain), forward, both, impl="torch.compile")


def liger_norm() -> Layer:
    """Liger's norm, told to leave the gradient that comes in as it is, and to give a program a row."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, scale: LigerRMSNormFunction.apply(x, scale, EPS, 1.0, "gemma", False, True)


def liger_rotary(rotated: int, cos: Tensor, sin: Tensor) -> Layer:
    """Liger's rotation, with one key beside the queries."""
    from liger_kernel.ops.rope import LigerRopeFunction

    key = torch.zeros(1, 1, cos.shape[1], HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def run(q: Tensor) -> Tensor:
        return LigerRopeFunction.apply(q.transpose(1, 2), key, cos, sin, None, 1, rotated)[0].transpose(1, 2)

    return run


def check(tokens: int = 300) -> None:
    """Prints each implementation's relative error of the output and of each gradient, against ours in float64."""
    exact: dict[str, list[Tensor]] = {}
    for work in works(tokens):
        if not work.leaves:
            continue
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


# pairs, group, warps
TILES = [(2048, 16, 4), (4096, 16, 8), (1024, 16, 4), (1024, 16, 2), (4096, 16, 4), (2048, 8, 4), (1024, 8, 4)]


def candidates() -> None:
    """Prints the time of each tile of the rotation, and of the norm's passes, alone."""
    cases = [(16, HEAD_DIM), (16, HEAD_DIM // 2), (1, HEAD_DIM // 2)]
    drawn = [(_draw(1, TOKENS, heads, HEAD_DIM).detach(), *_table(_positions(TOKENS), dims)) for heads, dims in cases]
    chosen = kernel.TILE
    for tile in TILES:
        kernel.TILE = kernel.Tile(*tile)
        times = [milliseconds(lambda case=case: kernel.rotate(*case, False), 10) for case in drawn]
        print(tile, *(f"{heads} heads {dims} dims {ms:.4f} ms" for (heads, dims), ms in zip(cases, times, strict=True)))
    kernel.TILE = chosen
    norm_candidates()
    sum_candidates()


# numbers, values, stages, warps a multiprocessor; the last two concern the backward pass alone.
FORWARD_NORMS = [(4096, 32), (4096, 16), (2048, 16), (8192, 32), (2048, 8)]
BACKWARD_NORMS = [
    (2048, 16, 3, 12),
    (2048, 16, 3, 16),
    (2048, 16, 3, 8),
    (2048, 16, 2, 12),
    (2048, 16, 4, 12),
    (2048, 8, 3, 16),
    (2048, 32, 3, 8),
    (4096, 16, 3, 16),
]
# Numbers a row: of the residual stream, and of a head.
NORM_WIDTHS = (1024, 2048, 2560, 4096, 5120, 64, 128)
# Parts a step, columns, warps; then what is summed: parts and their numbers.
SUMS = [(512, 16, 8), (256, 16, 8), (128, 16, 4), (64, 32, 4), (1024, 8, 8), (16, 256, 4), (16, 128, 4), (8, 512, 4)]
SUMMED = [(264, 2560), (396, 2560), (2048, 2560), (64, 5120), (256, 5 * 2560), (64, 2 * 16 * 160 * 160)]
SUMMED += [(2, 8192 * 128), (8, 2048 * 128)]


def norm_candidates() -> None:
    """Prints the time of each tile of the norm at NORM_WIDTHS, of as many numbers."""
    cases = [_norm_inputs(TOKENS * WIDTH // width, width) for width in NORM_WIDTHS]
    standing = norms.FORWARD, norms.BACKWARD
    for sizes in FORWARD_NORMS:
        norms.FORWARD = norms.Tile(*sizes)
        print("forward", norms.FORWARD, *(time_or_error(partial(norms.forward, x, s, EPS)) for _, x, s, _ in cases))
    for sizes in BACKWARD_NORMS:
        norms.BACKWARD = norms.Tile(*sizes)
        print("backward", norms.BACKWARD, *(time_or_error(partial(norms.backward, *case, True)) for case in cases))
    norms.FORWARD, norms.BACKWARD = standing


def sum_candidates() -> None:
    """Prints the time of each way to add up partial sums, torch.sum's first."""
    inputs = [torch.randn(*shape, device="cuda") for shape in SUMMED]
    print("torch.sum", *(time_or_error(partial(torch.sum, each, 0)) for each in inputs))
    standing = partials.SUM_TILE, partials.FEW_TILE
    for sizes in SUMS:
        partials.SUM_TILE = partials.FEW_TILE = dict(zip(standing[0], sizes, strict=True))
        run = partial(partials.sum_partials, dtype=torch.bfloat16)
        print("sum_partials", sizes, *(time_or_error(partial(run, each)) for each in inputs))
    partials.SUM_TILE, partials.FEW_TILE = standing


def _norm_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, x, scale, the reciprocals of the roots)."""
    dy, x, scale = (_draw(*shape).detach() for shape in ((rows, width), (rows, width), (width,)))
    return dy, x, scale, norms.forward(x, scale, EPS)[1]


def main() -> None:
    """`--check` prints the errors, `--tune` the times of the tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if options.check:
        check()
    if options.tune:
        candidates()


if __name__ == "__main__":
    main()
