"""Tensors kept for the backward pass in host memory: copied out while the forward pass goes on, fetched ahead.

For checkpoints, of which the backward pass needs one at a time in the reverse order: the one after the next stays where
it is. Pinned memory is taken as it is first needed and used again by every later pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Bytes of pinned memory taken at a time: what any tensor is cut into, so that no shape has memory of its own.
CHUNK = 2**25


@dataclass(eq=False)
class _Sent:
    """A tensor in host memory.

    Attributes:
        shape, options: its own; it comes back contiguous.
        chunks: its bytes.
        before: what was sent before it in the same pass, which the backward pass needs after it.
        fetched: the tensor on its device, once its copy has begun, and the event of the copy's end.
    """

    shape: torch.Size
    options: dict[str, Any]
    chunks: list[Tensor]
    before: _Sent | None
    fetched: tuple[Tensor, Any] | None = None


class HostStore:
    """Keeps in host memory what autograd saves of CUDA tensors inside `keeping()`; others stay where they are.

    All copies, of either direction, are in order on one stream, so that a chunk can be given away as soon as the copy
    from it is asked for. The host never waits for one.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._stream: Any = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """One forward pass."""
        last: _Sent | None = None

        def pack(x: Tensor) -> Tensor | _Sent:
            nonlocal last
            if not _goes(x):
                return x
            last = self._send(x, last)
            return last

        def unpack(kept: Tensor | _Sent) -> Tensor:
            return self._take(kept) if isinstance(kept, _Sent) else kept

        with saved_tensors_hooks(pack, unpack):
            yield

    def _send(self, x: Tensor, before: _Sent | None) -> _Sent:
        data = _bytes(x.detach().contiguous())
        parts = data.split(CHUNK)
        chunks = [self._free.pop() if self._free else _pinned() for _ in parts]
        stream = self._following(x.device)
        with torch.cuda.stream(stream):
            for chunk, part in zip(chunks, parts, strict=True):
                chunk[: len(part)].copy_(part, non_blocking=True)
        data.record_stream(stream)
        return _Sent(x.shape, {"dtype": x.dtype, "device": x.device}, chunks, before)

    def _take(self, sent: _Sent) -> Tensor:
        """The tensor, when the current stream comes to it; the one before it sets out."""
        x, arrived = sent.fetched or self._fetch(sent)
        torch.cuda.current_stream(x.device).wait_event(arrived)
        sent.fetched, before, sent.before = None, sent.before, None
        if before is not None and before.chunks:
            before.fetched = self._fetch(before)
        return x

    def _fetch(self, sent: _Sent) -> tuple[Tensor, Any]:
        assert sent.chunks, "a tensor fetched from host memory a second time: a graph kept there serves one pass"
        x = torch.empty(sent.shape, **sent.options)
        # After what the memory that x got was used for.
        stream = self._following(x.device)
        with torch.cuda.stream(stream):
            for chunk, part in zip(sent.chunks, _bytes(x).split(CHUNK), strict=True):
                part.copy_(chunk[: len(part)], non_blocking=True)
        self._free += sent.chunks
        sent.chunks = []
        return x, stream.record_event()

    def _following(self, device: torch.device) -> Any:
        """The stream of copies, behind all that the current one was given so far."""
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream


def _goes(x: Tensor) -> bool:
    return x.is_cuda


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _pinned() -> Tensor:
    return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
