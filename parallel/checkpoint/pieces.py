"""What this rank holds of one logical tensor, in the words of PyTorch's distributed checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..optimizer import Fragment
from .boxes import Box, boxes_of_range


class Pieces:
    """Boxes of one logical tensor with their data; implements the checkpointable-tensor protocol.

    Attributes:
        shape: the logical tensor's.
        data: each box's elements, a view of that box's shape.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, data: dict[Box, Tensor]):
        self.shape = shape
        self.dtype = dtype
        self.data = data

    @staticmethod
    def of(shape: tuple[int, ...], fragments: Iterable[Fragment]) -> Pieces:
        """Returns the boxes of `fragments`, which may be none, as views of their memory."""
        data: dict[Box, Tensor] = {}
        for fragment in fragments:
            begin = 0
            for part in boxes_of_range(fragment.sizes, fragment.start, fragment.start + fragment.data.numel()):
                offsets = tuple(a + b for a, b in zip(fragment.offsets, part.offsets, strict=True))
                data[Box(offsets, part.sizes)] = fragment.data.narrow(0, begin, part.volume).view(part.sizes)
                begin += part.volume
        return Pieces(shape, torch.float32, data)

    def size(self) -> torch.Size:
        """The logical tensor's shape, as the load planner asks for it."""
        return torch.Size(self.shape)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.data]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        offsets = tuple(index.offset or ())
        return next(tensor for box, tensor in self.data.items() if box.offsets == offsets)


def pieces_of(shapes: dict[str, tuple[int, ...]], fragments: Iterable[Fragment]) -> dict[str, Pieces]:
    """Returns every logical tensor of `shapes` with what `fragments` hold of it, possibly nothing."""
    held = defaultdict(list)
    for fragment in fragments:
        held[fragment.name].append(fragment)
    assert held.keys() <= shapes.keys(), f"fragments of unknown tensors: {sorted(held.keys() - shapes.keys())}"
    return {name: Pieces.of(shape, held[name]) for name, shape in shapes.items()}
