"""What a mixer may know of the sequence outside its piece, and what it hands on.

A SequenceContext belongs to one mixer's pass over one piece. It answers what lies to the left and takes what leaves
on the right, so that a mixer is written once whether the left is nothing, the last chunk or another rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import Segments
from ..kernels.from_right import FromRight

Summarize = Callable[[], tuple[Tensor, Tensor]]
Halo = Callable[[], Tensor]
Halos = Callable[[], list[Tensor]]


class Entry(NamedTuple):
    """A state that enters on the left, and what then enters on the right in the backward pass.

    Attributes:
        state: called, the state, None for zero. It may be under way: what can be computed without it goes first.
        from_right: for the op that takes the state, under the same name.
    """

    state: Callable[[], Tensor | None]
    from_right: FromRight | None = None


class SequenceContext(Protocol):
    """The piece's documents and its two ends.

    A name stands for one quantity of the mixer (`"conv"`, `"keys"`, `"state"`) and is used once a pass.
    """

    @property
    def segments(self) -> Segments:
        """The documents of the piece."""
        ...

    def left_halo(self, name: str, x: Tensor, n: int | None, alone: bool = False) -> tuple[Tensor, Halo]:
        """(x [B, T, ...], its halo): called, the n entries [B, n, ...] left of x, zeros where nothing is; or
        [B, 0, ...], where no segment of the piece continues. The last n entries of both leave on the right under
        `name`. A halo may be under way: what can be computed without it goes before the call.

        The x returned is the one to go on with: to its gradient is added what its entries are used for on the right, in
        place where that gradient is `alone`, that is one op reads this x and its backward pass gives it new memory.

        With n None, all entries of the documents that continue into the piece, right-aligned, or more: what lies
        before a document's start is masked by the mixer, never read."""
        ...

    def left_halos(self, entries: dict[str, Tensor], n: int | None, alone: bool = False) -> tuple[list[Tensor], Halos]:
        """`left_halo` of several x by their names, which travel together; all have one dtype."""
        ...

    def initial_state(self, name: str, summarize: Summarize) -> Entry:
        """The state that enters on the left; `summarize` gives what this piece does to a state, and needs no
        gradient."""
        ...

    def leave(self, name: str, state: Tensor) -> None:
        """Takes the state that leaves on the right."""
        ...


class LocalContext:
    """The context of one device: nothing on the left, or the carry that an earlier chunk left.

    Without a carry nothing is kept for the right either, which is training. With one (`init_carry` for the first
    chunk), `leaving` holds the mixer's next carry after the pass.
    """

    def __init__(self, segments: Segments, carry: dict[str, Tensor] | None = None) -> None:
        self.segments = segments
        self.carry = carry
        self.leaving: dict[str, Tensor] = {}

    def left_halo(self, name: str, x: Tensor, n: int | None, alone: bool = False) -> tuple[Tensor, Halo]:
        """x and the carry's entries under `name`; none without a carry."""
        if self.carry is None:
            return x, lambda: x[:, :0]
        halo = self.carry[name]
        assert n in (None, halo.shape[1]), f"carry {name!r} holds {halo.shape[1]} entries, the mixer asks for {n}"
        self.leaving[name] = torch.cat([halo, x], dim=1) if n is None else roll_in(halo, x)
        return x, lambda: halo

    def left_halos(self, entries: dict[str, Tensor], n: int | None, alone: bool = False) -> tuple[list[Tensor], Halos]:
        """Each as in `left_halo`."""
        halos = [self.left_halo(name, x, n)[1] for name, x in entries.items()]
        return list(entries.values()), lambda: [halo() for halo in halos]

    def initial_state(self, name: str, summarize: Summarize) -> Entry:
        """The carry's state; `summarize` is never called."""
        return Entry(lambda: None if self.carry is None else self.carry[name])

    def leave(self, name: str, state: Tensor) -> None:
        """Keeps the state for the next carry."""
        if self.carry is not None:
            self.leaving[name] = state


def roll_in(kept: Tensor, x: Tensor) -> Tensor:
    """The last n entries of `kept` [B, n, ...] followed by `x` [B, T, ...]; reads no more than those."""
    n, tokens = kept.shape[1], x.shape[1]
    if tokens >= n:
        return x[:, tokens - n :]
    return torch.cat([kept[:, tokens:], x], dim=1)


@dataclass(frozen=True)
class Carry:
    """All that a model keeps of the tokens it has read; without full attention its size does not depend on how many.

    Attributes:
        layers: for each block the named tensors of its mixer, [B, ...].
        position: int64 [B], how many tokens of its running document each row has read.
    """

    layers: list[dict[str, Tensor]]
    position: Tensor

    def next_segments(self, tokens: int) -> Segments:
        """The segments of a further piece of `tokens` tokens that begins no document, except where none has begun."""
        bounds = torch.arange(self.position.shape[0] + 1, device=self.position.device) * tokens
        doc_start = (-self.position).repeat_interleave(tokens)
        return Segments(bounds.to(torch.int32), self.position > 0, doc_start.to(torch.int32))
