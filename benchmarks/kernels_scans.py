"""linear_scan and rg_lru on one GPU; `--tune` times the ways to cut them into programs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from longscan.kernels import linear_scan, rg_lru
from longscan.kernels.linear_scan import kernel as scan_kernel
from longscan.kernels.linear_scan.chain import Tile
from longscan.kernels.rg_lru import kernel as gated_kernel

from .gpu_timing import Work, time_or_error

SHAPES = ((1, 32768, 2560), (8, 2048, 2560))
LENGTHS = (2048, 8192, 131072)
WIDTH = 2560


def works() -> Iterator[Work]:
    """Every op at every shape of the table, then by length at one row."""
    shapes = (*SHAPES, *((1, tokens, WIDTH) for tokens in LENGTHS))
    for shape in shapes:
        yield scan_work(*shape)
        yield from scan_peers(*shape)
    for shape in shapes:
        yield rg_lru_work(*shape)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def scan_work(batch: int, tokens: int, width: int) -> Work:
    """linear_scan: reads x and log_a, writes h; backward reads dh, log_a and h, writes dx and dlog_a."""
    x, log_a = _draw(batch, tokens, width), -_draw(batch, tokens, width).exp()
    size = x.nbytes
    name = f"linear_scan ({batch}, {tokens}, {width}) bf16"
    return Work(name, [x.requires_grad_(), log_a.requires_grad_()], lambda *a: linear_scan(*a)[0], 3 * size, 8 * size)


def scan_peers(batch: int, tokens: int, width: int) -> Iterator[Work]:
    """accelerated-scan in its own layout [B, D, T], powers of two only; fla's HGRN scan in ours."""
    name = f"linear_scan ({batch}, {tokens}, {width}) bf16"
    size = batch * tokens * width * 2
    try:
        from accelerated_scan.scalar import scan
    except ImportError:
        pass
    else:
        gates = _draw(batch, width, tokens).sigmoid().requires_grad_()
        if 32 <= tokens <= 65536:
            inputs = [gates, _draw(batch, width, tokens).requires_grad_()]
            yield Work(name, inputs, scan, 3 * size, 8 * size, impl="accelerated-scan (B, D, T)")
    try:
        from fla.ops.hgrn import chunk_hgrn
    except ImportError:
        return
    inputs = [_draw(batch, tokens, width).requires_grad_(), (-_draw(batch, tokens, width).exp()).requires_grad_()]
    yield Work(name, inputs, lambda *a: chunk_hgrn(*a)[0], 3 * size, 8 * size, impl="fla chunk_hgrn")


def rg_lru_work(batch: int, tokens: int, width: int) -> Work:
    """rg_lru: reads x and both gates, writes h; backward reads those, h and dh, writes three gradients."""
    inputs = [_draw(batch, tokens, width) for _ in range(3)]
    inputs.append(torch.full((width,), -4.0, device="cuda"))
    size = inputs[0].nbytes
    leaves = [tensor.requires_grad_() for tensor in inputs]
    name = f"rg_lru ({batch}, {tokens}, {width}) bf16"
    return Work(name, leaves, lambda *a: rg_lru(*a)[0], 4 * size, 12 * size)


# rows, steps, block, warps, registers, skip
SCAN_FORWARD = [(16, 16, 32, 8, None, skip) for skip in (1, 2)] + [(8, 16, 64, 8, None, skip) for skip in (1, 2)]
SCAN_FORWARD += [(4, 16, 64, 4, None, 1), (4, 16, 64, 4, 96, 1), (8, 8, 64, 8, None, 1), (8, 16, 32, 4, 96, 1)]
SCAN_BACKWARD = SCAN_FORWARD
GATED_FORWARD = [(16, 8, 32, 8, 64, 1), (16, 8, 32, 8, 64, 2), (16, 16, 32, 8, 96, 1), (8, 8, 64, 8, 64, 1)]
GATED_FORWARD += [(8, 8, 32, 4, 64, 1), (8, 8, 32, 4, 64, 2), (4, 8, 64, 4, 64, 1)]
GATED_BACKWARD = [(16, 8, 32, 8, 128, 1), (16, 8, 32, 8, 128, 2), (8, 8, 32, 4, 128, 1), (8, 4, 64, 8, 104, 1)]


def candidates() -> None:
    """Prints the time of each cut at both shapes, the pass alone."""
    for module, make, forwards, backwards in (
        (scan_kernel, scan_work, SCAN_FORWARD, SCAN_BACKWARD),
        (gated_kernel, rg_lru_work, GATED_FORWARD, GATED_BACKWARD),
    ):
        for shape in SHAPES:
            work = make(*shape)
            inputs = [t.detach() for t in work.inputs]
            h, final = module.forward(*inputs, None, None)
            dh, dfinal = torch.randn_like(h), torch.zeros_like(final)
            saved = (inputs[1], h) if module is scan_kernel else (*inputs, h)
            passes = {
                "FORWARD": (forwards, lambda m=module, i=inputs: m.forward(*i, None, None)),
                "BACKWARD": (
                    backwards,
                    lambda m=module, s=saved, g=(dh, dfinal): m.backward(*g, None, *s, None, None),
                ),
            }
            for attribute, (tiles, run) in passes.items():
                chosen = getattr(module, attribute)
                for tile in tiles:
                    setattr(module, attribute, (Tile(*tile),) * 2)
                    print(f"{work.name} {attribute} {tile}: {time_or_error(run)}", flush=True)
                setattr(module, attribute, chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    if parser.parse_args().tune:
        candidates()
