"""The time of a training step under a layout, by plain formulas, and where more GPUs stop helping.

A step is the sum of its terms, each what it adds to the slowest rank's time: work on its pieces (`work.py`),
collectives (`machine.py`), the pipeline's bubble and the update. Nothing overlaps unless `overlap` says so, as the
engine has it. Under pipeline parallelism each micro-batch costs what the slowest stage takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ...models.config import flops_per_token
from ..dims import ParallelDims
from .activations import block_input_bytes
from .load import Load
from .machine import Cluster
from .memory import stage_params
from .work import (
    RATIOS,
    SUMMARIES,
    Op,
    Ratio,
    halo_elements,
    loss_ops,
    mixer_ops,
    mlp_ops,
    state_elements,
)

RECOMPUTED, TENSOR, CARRIES, HALOS = "recomputation", "tensor collectives", "context carries", "context halos"
BUBBLE, TRANSFERS = "pipeline bubble", "pipeline transfers"
GRADIENTS, GATHERED, UPDATE = "gradient reduction", "parameter gather", "optimizer"
OFFLOADED = "checkpoints to the host and back"
# Ranks above which states are gathered and folded inside nodes first; of one left rank a fold costs two small kernels.
FLAT_RANKS, FOLD_KERNELS = 16, 2


@dataclass(frozen=True)
class Step:
    """A simulated step.

    Attributes:
        load: what is trained, and the layout.
        terms: seconds by what they are spent on.
        peak: the GPU's dense bf16 FLOP/s.
    """

    load: Load
    terms: Mapping[str, float]
    peak: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.terms.values())

    @property
    def tokens(self) -> int:
        """Tokens of the step, over all replicas."""
        load = self.load
        return load.dims.data * load.micro_batches * load.micro_rows * load.seq_len

    @property
    def rate(self) -> float:
        """Tokens a second, over all GPUs."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (`flops_per_token`) over what the GPUs' data sheets allow."""
        return flops_per_token(self.load.model, self.load.seq_len) * self.rate / (self.peak * self.load.dims.world_size)

    @property
    def overhead(self) -> str:
        """The largest term that one GPU alone would not have."""
        shared = {name: seconds for name, seconds in self.terms.items() if name in SHARED}
        return max(shared, key=lambda name: shared[name]) if any(shared.values()) else "none"


SHARED = (SUMMARIES, TENSOR, CARRIES, HALOS, BUBBLE, TRANSFERS, GRADIENTS, GATHERED)


def simulate(
    load: Load, cluster: Cluster, ratios: Mapping[str, Ratio] = RATIOS, overlap: float = 0.0, by_node: bool = True
) -> Step:
    """The step of `load` on `cluster`.

    Args:
        load: in bf16; the rates of fp32 were not measured.
        cluster: GPUs and links.
        ratios: of ops to their floors.
        overlap: share of the last micro-batch's time that hides the reduction of gradients.
        by_node: carries of more than FLAT_RANKS context ranks are gathered and folded inside nodes first, as the
            engine does.
    """
    if load.precision != "bf16":
        raise ConfigError(f"precision is {load.precision}; steps are simulated in bf16, whose rates were measured")
    stages = [_micro_batch(load, stage, cluster, ratios, by_node) for stage in range(load.dims.pipeline)]
    slowest = max(stages, key=lambda terms: sum(terms.values()))
    each = sum(slowest.values())
    terms = {name: load.micro_batches * seconds for name, seconds in slowest.items()}
    terms |= _pipeline(load, cluster, each) | _update(load, cluster, overlap * each)
    return Step(load, terms, cluster.gpu.peak)


def _micro_batch(
    load: Load, stage: int, cluster: Cluster, ratios: Mapping[str, Ratio], by_node: bool
) -> dict[str, float]:
    """Seconds by term of a micro-batch, forward and backward, on a rank of a stage."""
    terms: dict[str, float] = {RECOMPUTED: 0.0}
    again = {"none": (), "selective": ("mlp",)}.get(load.checkpointing, ("mixer", "mlp"))
    for name in load.stage_mixers(stage):
        for part, ops in (("mixer", mixer_ops(load, name)), ("mlp", mlp_ops(load))):
            _add(terms, ops, cluster, ratios, part in again)
    if stage == load.dims.pipeline - 1:
        _add(terms, loss_ops(load), cluster, ratios, False)
    terms[OFFLOADED] = _offloaded(load, stage, cluster, terms)
    return terms | _exchanges(load, stage, cluster, len(again), by_node)


def _offloaded(load: Load, stage: int, cluster: Cluster, terms: Mapping[str, float]) -> float:
    """What copies of block inputs to host memory and back add: either way the time that the passes do not hide."""
    if load.checkpointing != "offload":
        return 0.0
    copied = len(load.stage_mixers(stage)) * block_input_bytes(load) / cluster.host_link
    # What is computed again is the forward pass.
    forward = terms[RECOMPUTED]
    return max(0.0, copied - forward) + max(0.0, copied - (sum(terms.values()) - forward))


def _add(
    terms: dict[str, float], ops: Iterable[Op], cluster: Cluster, ratios: Mapping[str, Ratio], again: bool
) -> None:
    for op in ops:
        forward, both = op.seconds(cluster, ratios)
        terms[op.term] = terms.get(op.term, 0.0) + both
        terms[RECOMPUTED] += forward * again


def _exchanges(load: Load, stage: int, cluster: Cluster, again: int, by_node: bool) -> dict[str, float]:
    """The collectives of a micro-batch inside a replica.

    Tensor ranks sum a block's two outputs forward and the gradients of its two inputs backward, and again what is
    computed again; the first and last stage, embedding and head. All of it counts, though products run beside most
    (`parallel.products`). Context ranks exchange once each way.
    """
    dims, mixers = load.dims, load.stage_mixers(stage)
    ends = (stage == 0) + (stage == dims.pipeline - 1)
    hidden = load.tokens * load.model.width * load.element
    sums = len(mixers) * (4 + again) + ends
    forwards = 2 if again == 2 else 1
    found = {
        TENSOR: sums * cluster.reduce(dims.tensor, cluster.local(dims.tensor, 1), hidden),
        CARRIES: 0.0,
        HALOS: 0.0,
    }
    for name in mixers if dims.context > 1 else ():
        options = load.model.mixer_config(name)
        state, transition = (4 * load.micro_rows * count for count in state_elements(load, options))
        if state:
            found[CARRIES] += forwards * carry_seconds(dims, cluster, state + transition, by_node)
            found[CARRIES] += carry_seconds(dims, cluster, state, by_node)
        for entries, elements in halo_elements(load, options):
            moved = load.micro_rows * entries * elements * load.element
            local = cluster.local(dims.context, dims.tensor)
            found[HALOS] += (forwards + 1) * cluster.send(dims.context, local, moved) if moved else 0.0
    return found


def carry_seconds(dims: ParallelDims, cluster: Cluster, each: float, by_node: bool = False) -> float:
    """Seconds of gathering `each` bytes of every context rank and folding those of one side.

    The bytes do not depend on the tokens; they grow with the ranks, (cp - 1) x each, and with them the fold. By node,
    k ranks of a node and then cp / k nodes exchange (k - 1) + (cp / k - 1) times `each`, folded in k + cp / k steps.
    """
    ranks, local = dims.context, cluster.local(dims.context, dims.tensor)
    fold = FOLD_KERNELS * (cluster.launch + 1.5 * each / cluster.gpu.copy)
    if not by_node or ranks <= FLAT_RANKS or local == 1:
        return cluster.gather(ranks, local, each) + ranks * fold
    nodes = -(-ranks // local)
    return cluster.gather(local, local, each) + cluster.gather(nodes, 1, each) + (local + nodes) * fold


def _pipeline(load: Load, cluster: Cluster, each: float) -> dict[str, float]:
    """The bubble, (p - 1) / v micro-batches (arXiv 2104.04473), and the hidden states and gradients that are sent."""
    dims = load.dims
    hidden = load.residual_tokens * load.model.width * load.element
    stride = dims.tensor * dims.context
    hops = 2 * (dims.interleave * load.micro_batches + dims.pipeline - 1)
    sent = cluster.send(dims.pipeline, cluster.local(dims.pipeline, stride), hidden)
    return {BUBBLE: (dims.pipeline - 1) / dims.interleave * each, TRANSFERS: hops * sent}


def _update(load: Load, cluster: Cluster, hidden: float) -> dict[str, float]:
    """Gradients summed in fp32 over all copies, once a step or, from stage 2, a micro-batch; then AdamW.

    AdamW reads and writes master and moments, reads the gradient twice and writes the parameter: 34 bytes.
    """
    dims, copies = load.dims, load.copies
    params = max(stage_params(load, stage) for stage in range(dims.pipeline))
    local = _local_copies(dims, cluster)
    share = params / copies if dims.zero else params
    scatter = cluster.gather(copies, local, 4 * params / copies)
    gather = cluster.gather(copies, local, 2 * params / copies)
    reduction = load.micro_batches * scatter if dims.zero >= 2 else cluster.reduce(copies, local, 4 * params)
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * load.micro_batches}[dims.zero]
    update = 34 * share / cluster.gpu.copy
    if dims.offload_optimizer:
        update = 6 * share / cluster.host_link + 30 * share / cluster.host_memory
    return {GRADIENTS: max(0.0, reduction - hidden), GATHERED: gathers * gather, UPDATE: update}


def _local_copies(dims: ParallelDims, cluster: Cluster) -> int:
    """Copies of a parameter inside a node: context ranks lie next to each other, data ranks a replica apart."""
    return cluster.local(dims.context, dims.tensor) * cluster.local(dims.data, dims.replica_size)
