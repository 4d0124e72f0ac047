"""What is trained and how it is laid out: all that the bytes and the time of a step depend on."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.config import ModelConfig
from ...models.mixer_config import AttentionConfig, HeadsConfig
from ..dims import ParallelDims

ELEMENT = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Load:
    """A model, its rows and a layout.

    Attributes:
        model: its vocabulary filled in.
        dims: a layout that the model and the rows divide by.
        seq_len: tokens of a row.
        micro_rows: rows of a micro-batch.
        micro_batches: micro-batches a replica takes a step.
        precision: "bf16" or "fp32".
        checkpointing: what of a block is computed again, one of `models.block.ACTIVATION_CHECKPOINTS`.
        cuda_graphs: whether micro-batches are to be CUDA graphs, which not every layout can be.
    """

    model: ModelConfig
    dims: ParallelDims
    seq_len: int
    micro_rows: int = 1
    micro_batches: int = 1
    precision: str = "bf16"
    checkpointing: str = "none"
    cuda_graphs: bool = False

    @property
    def fits_graphs(self) -> bool:
        """Whether nothing of a micro-batch is the host's work: DeepSpeed's hooks, a pipeline's turns, copies to it."""
        return self.dims.zero == 0 and self.dims.pipeline == 1 and self.checkpointing != "offload"

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return ELEMENT[self.precision]

    @property
    def piece(self) -> int:
        """Tokens of a row that lie on a rank."""
        return self.seq_len // self.dims.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that lie on a rank."""
        return self.micro_rows * self.piece

    @property
    def residual_tokens(self) -> int:
        """Those of them whose residual stream lies here."""
        return self.tokens // self.dims.tensor if self.dims.sequence_parallel else self.tokens

    @property
    def copies(self) -> int:
        """Ranks that hold the same box of every parameter."""
        return self.dims.data * self.dims.context

    def stage_mixers(self, stage: int) -> list[str]:
        """The mixers of the blocks that a pipeline rank holds."""
        chunks = self.dims.chunks(self.model.layers)[stage :: self.dims.pipeline]
        return [self.model.mixers[layer] for chunk in chunks for layer in chunk]


def local_heads(load: Load, options: HeadsConfig) -> tuple[int, int]:
    """Query heads and key heads of a rank."""
    heads = options.query_heads(load.model.width) // load.dims.tensor
    if not isinstance(options, AttentionConfig):
        return heads, heads
    return heads, max(1, options.key_heads(load.model.width) // load.dims.tensor)
