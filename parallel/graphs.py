"""Micro-batches as CUDA graphs: forward, backward and the adding up of gradients in one launch.

A graph repeats its kernels at the addresses that they were recorded with. What changes from one micro-batch to the
next, its tensors and the number that its loss is divided by, is copied to where the graph reads it. What the host
decides by, shapes and whether every row is one document, says which graph it is; it asks the GPU for no value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..models import LanguageModel

Work = Callable[[], Tensor]


class Recorder(Protocol):
    """What runs work and records it to be repeated."""

    def run(self, work: Work) -> Tensor:
        """Does the work, and prepares what it takes to record it."""
        ...

    def record(self, work: Work) -> Work:
        """Returns what does the work again each time, with the same tensors; here nothing is computed."""
        ...

    def forget(self) -> None:
        """Begins anew, after all that was recorded was let go."""
        ...


class CudaRecorder:
    """Records on the stream that it runs work on: cuBLAS's workspaces and autograd's nodes belong to a stream.

    Graphs share one pool of memory, for each is done with it before the next begins.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"run.cuda_graphs is true and the device is {device.type}; set run.cuda_graphs=false")
        self._stream: Any = torch.cuda.Stream(device)
        self.forget()

    def run(self, work: Work) -> Tensor:
        """On the stream, between what the current one was given before and after."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Work) -> Work:
        """A graph, launched on the current stream; meanwhile other threads pin batches and ask for NCCL's events."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def forget(self) -> None:
        """Takes another pool: one whose graphs are gone is not to be used again."""
        self._pool = torch.cuda.graph_pool_handle()


@dataclass
class _Place:
    """Where the micro-batches of one key are read, and what repeats their work once it was recorded."""

    batch: Batch
    replay: Work | None = None


class MicroBatchGraphs:
    """Learns from micro-batches: of each key the first one eagerly, all others by a graph, recorded when it is needed.

    A key is the same on every rank of a replica, so that these record and replay together, as NCCL asks of them. All
    graphs are dropped where the model has got other positions or other parameters to train.

    Memory: a graph keeps what its micro-batch takes at the peak, and nobody else can use that. Evaluation and the
    update take theirs on top. The first micro-batch of a key does not: it lets go of the other keys' graphs, which are
    recorded anew where they come again. Rows of a stage that is over so keep nothing. Recording empties PyTorch's
    cache.

    Args:
        learn: adds the gradients of a micro-batch's loss over a divisor, and returns the loss; called again and again
            with the same tensors, it finds all it needs in them and in the model's parameters, at their addresses.
        model: whose loss it is.
        device: where it is computed.
        recorder: a CudaRecorder unless given.
    """

    def __init__(
        self,
        learn: Callable[[Batch, Tensor], Tensor],
        model: LanguageModel,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        self._learn, self._model, self._device = learn, model, device
        self._recorder = recorder or CudaRecorder(device)
        self._parameters = list(model.parameters())
        # Of whole numbers: of the loss and this the quotient has the loss's dtype.
        self._divisor = torch.zeros((), dtype=torch.int64, device=device)
        self._places: dict[tuple[torch.Size, bool], _Place] = {}
        self._trained: tuple[Any, list[bool]] | None = None

    def __call__(self, piece: Batch, whole: bool, divisor: int) -> Tensor:
        """Adds the gradients of the piece's loss over `divisor`; returns the loss, to be read before the next call.

        Args:
            piece: this rank's tokens of the rows, in host memory or on the device.
            whole: whether each of the rows, as all context ranks together hold them, is one document.
            divisor: the step's.
        """
        self._drop_if_changed()
        self._divisor.fill_(divisor)
        key = (piece.inputs.shape, whole)
        begun = key in self._places
        if not begun:
            self._drop_graphs()
            self._places[key] = _Place(_room_for(piece, whole, self._device))
        place = self._places[key]
        _fill(place.batch, piece)
        work = partial(self._learn, place.batch, self._divisor)
        if not begun:
            return self._recorder.run(work)
        place.replay = place.replay or self._recorder.record(work)
        return place.replay()

    def drop(self) -> None:
        """Lets go of every graph and its memory, which must be before NCCL's groups end."""
        self._drop_graphs()
        self._places.clear()

    def _drop_graphs(self) -> None:
        for place in self._places.values():
            place.replay = None
        self._recorder.forget()

    def _drop_if_changed(self) -> None:
        trained = (self._model.config, [parameter.requires_grad for parameter in self._parameters])
        if trained != self._trained:
            self.drop()
            self._trained = trained


def _tensors(batch: Batch) -> dict[str, Tensor]:
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _room_for(piece: Batch, whole: bool, device: torch.device) -> Batch:
    """A batch like `piece` on the device, without values, for any number of documents unless rows are whole."""
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in _tensors(piece).items()}
    if not whole:
        tensors["cu_seqlens"] = tensors["cu_seqlens"].new_empty(piece.inputs.numel() + 1)
    return replace(piece, rows=(), text_bytes=0.0, **tensors)


def _fill(room: Batch, piece: Batch) -> None:
    """Copies the piece; the last bound of its documents is repeated, for kernels go by `doc_start`."""
    for name, tensor in _tensors(piece).items():
        there = getattr(room, name)
        there[len(tensor) :].fill_(piece.inputs.numel())
        there[: len(tensor)].copy_(tensor, non_blocking=True)
