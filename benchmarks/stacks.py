"""Stacks of blocks with the shapes of a preset, divided over ranks as in training; no embedding, head or update."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.models import LanguageModel, Part
from longscan.models.config import config_from_mapping, load_preset
from longscan.parallel import ParallelDims, collectives, make_backend
from longscan.parallel.context import piece_of
from longscan.parallel.groups import layout_groups
from longscan.parallel.loss import LossModule

from .ranks import compile_kernels
from .steps import VOCABULARY, batch_of, fill, load_of, release


@dataclass(frozen=True)
class Shape:
    """Which blocks of a preset, of how many rows of how many tokens, and what of a block is computed again."""

    preset: str
    layers: range
    rows: int
    tokens: int
    recompute: str = "none"

    @property
    def name(self) -> str:
        """For people; the same for every layout."""
        first, last = self.layers[0], self.layers[-1]
        blocks = f"block {first} ({self.mixer})" if first == last else f"blocks {first} to {last}"
        recompute = "" if self.recompute == "none" else f", recompute {self.recompute}"
        return f"{self.preset} {blocks}, {self.rows} x {self.tokens} tokens{recompute}"

    @property
    def mixer(self) -> str:
        """The first block's."""
        return config_from_mapping(load_preset(self.preset)).mixers[self.layers[0]]


class Stack:
    """The blocks on this rank, in bf16, their input and the gradient of their output.

    Attributes:
        loss: the module that training calls; `loss.context` is the group it exchanges with.
    """

    def __init__(self, shape: Shape, dims: ParallelDims, device: torch.device):
        release(device)
        torch.manual_seed(0)
        self.layers, groups = shape.layers, layout_groups(dims)
        # One block more than is built: after the last one training computes the loss.
        layers = {"layers": shape.layers.stop + 1, "vocab_size": VOCABULARY}
        config = config_from_mapping({**load_preset(shape.preset), **layers})
        part = Part(frozenset(shape.layers), first=False, last=False)
        with torch.device(device):
            model = LanguageModel(
                config, make_backend(config, dims), activation_checkpoint=shape.recompute, part=part
            ).bfloat16()
        fill(model)
        self.loss = LossModule(model, groups.context)
        batch = batch_of(load_of(shape.preset, dims, shape.tokens, shape.rows, 1, shape.recompute))
        if groups.context is not None:
            batch = piece_of(batch, groups.context.rank(), groups.context.size())
        self.batch = type(batch)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(batch).items()})
        tokens = batch.inputs.shape[1] // (dims.tensor if dims.sequence_parallel else 1)
        place = {"device": device, "dtype": torch.bfloat16}
        self.x = torch.randn(shape.rows, tokens, config.width, requires_grad=True, **place)
        self.gradient = torch.randn(shape.rows, tokens, config.width, **place)
        compile_kernels(self.step, device)

    def forward(self) -> Tensor:
        """The hidden states after the blocks."""
        return self.loss(self.batch, self.layers, self.x)

    def step(self) -> Tensor:
        """Forward and backward; the hidden states after the blocks.

        No gradient is there before or after, so that in a CUDA graph each repeat writes them anew, and adds to none.
        """
        y = self.forward()
        y.backward(self.gradient)
        self.forget()
        return y.detach()

    def forget(self) -> None:
        """Drops the gradients."""
        self.x.grad = None
        for parameter in self.loss.parameters():
            parameter.grad = None


class Traffic(TorchDispatchMode):
    """Counts the bytes this rank receives inside, by how: "states" from gathers, "halos" from single ranks.

    Anything else a rank may send is "other".
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D102
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in ("_allgather_base_", "allgather_into_tensor_coalesced_"):
            self.bytes["states"] += _size(args[0]) - _size(args[1])
        elif name == "recv_":
            self.bytes["halos"] += _size(args[0])
        elif name != "send":
            self.bytes["other"] += _size(args[0])


def _size(tensors: Tensor | list[Tensor]) -> int:
    return sum(t.nbytes for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


def silent_group(ranks: int) -> dist.ProcessGroup:
    """A group of all ranks whose collectives return at once and move nothing; collective.

    With it a stack does all of its work but the exchange; what it computes is wrong.
    """
    # Its import makes the backend known.
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    group = dist.new_group(list(range(ranks)), backend="fake")
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def zeros_received() -> Iterator[None]:
    """What exchanges fill is zero before. A silent group leaves it so: fresh memory may hold NaN, and a GPU multiplies
    NaN at a higher clock than numbers, by which a stack once seemed to lose 8% of its time to exchanges."""
    with patch.object(collectives, "_room", lambda like, *shape: like.new_zeros(shape)):
        yield
