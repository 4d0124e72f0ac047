"""short_conv on one GPU for benchmarks.kernels; `--tune` times the ways to cut it into programs.

python -m benchmarks.kernels_short_conv --tune
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longscan.kernels import short_conv
from longscan.kernels.short_conv import kernel
from longscan.kernels.short_conv.kernel import Tile

from .gpu_timing import Work, time_or_error

WIDTH = 2560
HEADS = 16
SHAPES = ((4, 8192, WIDTH), (1, 32768, WIDTH))
LENGTHS = (2048, 8192, 131072)
# Taps, filters and activation beside the four taps a channel of the other works.
FILTERS = ((4, WIDTH, "silu"), (3, HEADS, None), (64, WIDTH, None))


def works() -> Iterator[Work]:
    """Ours and the peers: by shape with four taps, other filters at the first shape, then by length at one row."""
    for shape in SHAPES:
        yield from conv_works(*shape)
    for taps, filters, activation in FILTERS:
        yield from conv_works(*SHAPES[0], taps, filters, activation)
    for tokens in LENGTHS:
        yield from conv_works(1, tokens, WIDTH)


def conv_works(
    batch: int, tokens: int, width: int, taps: int = 4, filters: int | None = None, activation: str | None = None
) -> Iterator[Work]:
    """One shape by everybody: forward reads x and writes y; backward reads x and dy and writes dx."""
    filters = filters or width
    x, weight = _draw(batch, tokens, width), _draw(filters, taps)
    size = x.nbytes
    kind = f"{taps} taps" + (f" {filters} heads" if filters < width else "") + (f" {activation}" if activation else "")
    name = f"short_conv ({batch}, {tokens}, {width}) {kind} bf16"

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return short_conv(x, weight, activation=activation)[0]

    yield Work(name, [x, weight], ours, 2 * size, 5 * size)
    if filters == width:
        for impl, call in _peers(activation):
            yield Work(name, [x, weight], call, 2 * size, 5 * size, impl=impl)
        inputs = [_draw(batch, width, tokens), _draw(width, 1, taps)]
        if activation is None:
            yield Work(name, inputs, _cudnn, 2 * size, 5 * size, impl="torch conv1d (B, D, T)")


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _peers(activation: str | None) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Those that take our layout and are installed."""
    yield "torch.compile shifted sum", torch.compile(lambda x, weight: _shifted(x, weight, activation), dynamic=False)
    if importlib.util.find_spec("fla") is None:
        return
    from fla.modules.causal_conv1d import causal_conv1d

    version = importlib.metadata.version("fla-core")
    yield f"fla-core {version}", lambda x, weight: causal_conv1d(x, weight, activation=activation)[0]


def _shifted(x: Tensor, weight: Tensor, activation: str | None) -> Tensor:
    tokens, taps = x.shape[1], weight.shape[1]
    left = torch.nn.functional.pad(x, (0, 0, taps - 1, 0)).float()
    y = sum(left[:, s : s + tokens] * weight[:, s].float() for s in range(taps))
    return (y if activation is None else torch.nn.functional.silu(y)).to(x.dtype)


def _cudnn(x: Tensor, weight: Tensor) -> Tensor:
    taps, tokens = weight.shape[2], x.shape[2]
    return torch.nn.functional.conv1d(x, weight, padding=taps - 1, groups=x.shape[1])[..., :tokens]


# rows, steps, block, warps
NARROW = {
    "FORWARD": [(16, 8, 64, 4), (8, 16, 64, 4), (8, 8, 64, 2), (8, 8, 128, 4), (4, 16, 128, 4), (16, 8, 64, 8)],
    "BACKWARD": [
        (8, 16, 64, 4),
        (8, 8, 64, 4),
        (16, 8, 32, 4),
        (16, 8, 64, 8),
        (16, 16, 64, 8),
        (8, 32, 64, 4),
        (16, 8, 64, 4),
        (4, 16, 128, 4),
        (16, 16, 32, 4),
    ],
}
WIDE = {
    "FORWARD": [(8, 16, 64, 4), (16, 8, 64, 8), (4, 16, 128, 4)],
    "BACKWARD": [(16, 8, 64, 8), (16, 16, 64, 8), (16, 16, 32, 8)],
}


def candidates() -> None:
    """Prints the time of each cut at the first shape, the pass alone: four taps plain, then with all, then 64 taps."""
    batch, tokens, width = SHAPES[0]
    x, dy, narrow, wide = (
        t.detach() for t in (_draw(*SHAPES[0]), _draw(*SHAPES[0]), _draw(width, 4), _draw(width, 64))
    )
    bias, tail = (t.detach() for t in (_draw(width), _draw(batch, 3, width)))
    positions = (torch.arange(tokens, device="cuda") % 1000).expand(batch, -1)
    for label, weight, others, tiles in (
        ("4 taps", narrow, (None,) * 4, NARROW),
        ("4 taps, documents, SiLU", narrow, (None, None, positions, "silu"), NARROW),
        ("4 taps, bias, tail, documents, SiLU", narrow, (bias, tail, positions, "silu"), NARROW),
        ("64 taps", wide, (None,) * 4, WIDE),
    ):
        passes = {
            "FORWARD": lambda w=weight, o=others: kernel.forward(x, w, *o),
            "BACKWARD": lambda w=weight, o=others: kernel.backward(dy, x, w, *o),
        }
        for attribute, run in passes.items():
            chosen = getattr(kernel, attribute)
            for tile in tiles[attribute]:
                setattr(kernel, attribute, (Tile(*tile),) * 2)
                print(f"{label} {attribute} {tile}: {time_or_error(run)}", flush=True)
            setattr(kernel, attribute, chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    if parser.parse_args().tune:
        candidates()
