"""Bytes a rank holds while it trains: parameters, gradients, optimizer state, activations and the largest temporary.

Arithmetic on the configuration; nothing is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...kernels.cross_entropy.chunks import aligned, chunk_columns, chunk_rows
from ...models.config import ModelConfig
from ...models.mixer_config import AttentionConfig, HeadsConfig, MixerConfig, RGLRUConfig, ShortConvConfig
from ...models.tiles import TILE
from .activations import activation_bytes, block_input_bytes, head_bytes, host_bytes, logits_at_once, mixed_bytes
from .load import Load

# Multiprocessors of an H100: they decide how many rows of logits the loss makes at a time.
PROCESSORS = 132
# DeepSpeed's defaults and ours: elements reduced at a time, and elements that stage 3 may hold gathered.
BUCKET, MOST_LIVE = 2**26, 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; `host` lies in host memory, and `temporary_name` says what the largest temporary is."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    temporary_name: str
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes in GPU memory when most is held: all activations, and the largest temporary above them."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


def memory(load: Load, stage: int = 0) -> Memory:
    """What a rank of a pipeline stage holds; the first tensor rank's, which has the most."""
    states = _states(load, stage)
    states["host"] += host_bytes(load, stage)
    name, temporary = max(temporaries(load, stage).items(), key=lambda entry: entry[1])
    return Memory(**states, activations=activation_bytes(load, stage), temporary=temporary, temporary_name=name)


def stage_params(load: Load, stage: int) -> int:
    """Parameters on a rank of a pipeline stage."""
    model, tensor = load.model, load.dims.tensor
    blocks = sum(_block_params(model, name, tensor) for name in load.stage_mixers(stage))
    first, last = stage == 0, stage == load.dims.pipeline - 1
    tables = first + last - (model.tie_embeddings and first and last)
    return blocks + tables * -(-model.vocab_size // tensor) * model.width + last * model.width


def _block_params(model: ModelConfig, name: str, tensor: int) -> int:
    """Parameters of a block on a rank: divided ones, and those that each tensor rank holds whole."""
    width, options = model.width, model.mixer_config(name)
    norms, bias = 2 * width, model.mlp.bias * width
    mixer, whole = options.num_params(width), _whole_params(options, width, tensor)
    return norms + (mixer - whole) // tensor + whole + (model.mlp.num_params(width) - bias) // tensor + bias


def _whole_params(options: MixerConfig, width: int, tensor: int) -> int:
    """A mixer's output bias, and key and value projections of heads fewer than ranks."""
    if isinstance(options, AttentionConfig):
        heads = options.key_heads(width)
        return options.output_bias * width + (2 * width * heads * options.head_dim if heads % tensor else 0)
    return width if isinstance(options, RGLRUConfig | ShortConvConfig) and options.bias else 0


def _states(load: Load, stage: int) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state, on the device and in host memory.

    Gradients are accumulated in fp32. bf16 has fp32 masters beside the parameters; DeepSpeed keeps them for fp32 too,
    where stage 0's parameters are the masters. Masters and both moments take 12 bytes.
    """
    dims, params = load.dims, stage_params(load, stage)
    share = -(-params // load.copies)
    state = (12 if load.precision == "bf16" or dims.zero else 8) * (share if dims.zero else params)
    return {
        "parameters": load.element * (share if dims.zero == 3 else params),
        "gradients": 4 * (share if dims.zero >= 2 else params),
        "optimizer": 0 if dims.offload_optimizer else state,
        # AdamW on the host has a gradient there too.
        "host": state + 4 * share if dims.offload_optimizer else 0,
    }


def temporaries(load: Load, stage: int = 0) -> dict[str, int]:
    """The bytes of what lives for a moment beside all activations, by its name.

    The loss runs before any block's backward pass, and what it kept is gone by then.
    """
    last = stage == load.dims.pipeline - 1
    name = "an MLP's gradients" if load.checkpointing == "none" else "a block computed again"
    backward = max(_block_backward(load, mixer) for mixer in load.stage_mixers(stage))
    found = {name: max(0, backward - last * head_bytes(load))}
    if last:
        found["the loss"] = _loss_temporary(load)
    if load.dims.zero >= 2:
        found["a bucket of gradients"] = BUCKET * (4 + load.element)
    if load.dims.zero == 3:
        live = min(stage_params(load, stage), MOST_LIVE) * load.element
        found = {f"{name}, parameters gathered": size + live for name, size in found.items()}
    return found


def _loss_temporary(load: Load) -> int:
    """Logits and gradients of kernels/cross_entropy/chunks.py, and the copy of a weight that is rounded up.

    Without tensor ranks the forward pass makes the gradients, which `head_bytes` counts, and the backward pass scaled
    ones, when the logits are gone. Of few rows in bf16 `head_bytes` counts the logits, and the backward pass makes the
    table's gradient from them. With tensor ranks the backward pass makes both gradients, and rounds a sum when the
    logits are gone.
    """
    width, tokens, element = load.model.width, load.tokens, load.element
    vocabulary = -(-load.model.vocab_size // load.dims.tensor)
    columns = aligned(vocabulary, element)
    table, hidden = columns * width, tokens * width
    copy = (columns != vocabulary) * table * element
    if logits_at_once(load):
        gradients = (table + hidden) * element
        return gradients + (tokens * columns * element if load.dims.tensor > 1 else 0)
    logits = min(tokens, chunk_rows(tokens, width, PROCESSORS)) * columns * element + copy
    if load.dims.tensor == 1:
        return max(logits, (vocabulary * width + hidden) * element)
    if tokens >= vocabulary:
        gradients, summed = 4 * table + hidden * element, vocabulary * width
    else:
        step = min(vocabulary, chunk_columns(tokens, vocabulary, width, PROCESSORS))
        logits = tokens * (step + columns - vocabulary) * element + copy
        gradients, summed = table * element + 4 * hidden, hidden
    return gradients + max(logits, summed * element if element < 4 else 0)


def _block_backward(load: Load, name: str) -> int:
    """What a block's backward pass takes beside what the block kept: of that of its MLP or its mixer, the more.

    The MLP's: the outputs' gradient and the inputs'; with nothing computed again also that of the product, or of the
    normed input from each of its readers; else those of a tile. The mixer's: its output's gradient and three of its
    inner width, as the gates', the scan's inputs' and the other branch's are. A mixer computed again is all there.
    """
    width, inner = load.tokens * load.model.width * load.element, _inner_bytes(load, name)
    if load.checkpointing == "none":
        hidden = load.tokens * load.model.mlp.hidden_size(load.model.width) // load.dims.tensor * load.element
        return max(hidden + width, 4 * width, width + 3 * inner)
    both = 2 * block_input_bytes(load) + _tile_bytes(load)
    if load.checkpointing == "selective":
        return max(both, width + 3 * inner)
    # Of "full" the block's input is kept; of "offload" it was fetched, and the next is on its way.
    fetched = 2 * block_input_bytes(load) if load.checkpointing == "offload" else 0
    again = mixed_bytes(load, name) - block_input_bytes(load)
    return again + fetched + max(block_input_bytes(load) + both, width + 3 * inner)


def _inner_bytes(load: Load, name: str) -> int:
    """What a mixer's output projection reads."""
    options, width = load.model.mixer_config(name), load.model.width
    if isinstance(options, RGLRUConfig | ShortConvConfig):
        inner = options.channels(width)
    else:
        assert isinstance(options, HeadsConfig)
        inner = options.query_heads(width) * options.head_dim
    return load.tokens * inner // load.dims.tensor * load.element


def _tile_bytes(load: Load) -> int:
    """An MLP's tile and its gradients, the sums over tiles of those of the parameters, and one tile's."""
    mlp, width = load.model.mlp, load.model.width
    tokens = min(TILE, load.residual_tokens) * load.tokens // load.residual_tokens
    hidden = mlp.hidden_size(width) // load.dims.tensor
    of_tokens = tokens * (4 * hidden + 4 * width) * load.element
    return of_tokens + (4 + load.element) * mlp.num_params(width) // load.dims.tensor


def as_mapping(held: Memory) -> dict[str, int | str]:
    """The bytes by name, and their total."""
    return {field.name: getattr(held, field.name) for field in fields(held)} | {"total": held.total}
