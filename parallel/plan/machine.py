"""What GPUs and the links between them can do, and what a collective over them costs.

Rates a GPU reaches are shares of its data sheet's, as measured on one H100 (docs/kernels-measured.md). Links are
inputs: their defaults are data sheets' rates times what large NCCL messages usually reach of them, and no measurement
of this project stands behind them yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigError

GIB = 2**30
# A product of 8192 x 8192 matrices in bf16, and a copy inside the memory, on an H100 SXM, over its data sheet's rates.
MATMUL_SHARE, COPY_SHARE = 803.7 / 989.4, 2.998 / 3.35
# Of a link's rate, what is left for the data of a large collective.
LINK_SHARE, NETWORK_SHARE = 0.8, 0.9
# Left free: what the CUDA context, cuBLAS and NCCL take, and the share lost between the allocator's blocks.
RESERVE, FRAGMENTED = 1.5 * GIB, 0.06


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        name: for people.
        memory: bytes, as CUDA reports them.
        peak: dense bf16 FLOP/s.
        bandwidth: bytes/s of its memory.
        link: bytes/s to the others of its node, one way.
    """

    name: str
    memory: int
    peak: float
    bandwidth: float
    link: float

    @property
    def usable(self) -> int:
        """Bytes that tensors may take."""
        return int((self.memory - RESERVE) * (1 - FRAGMENTED))

    @property
    def matmul(self) -> float:
        """FLOP/s of a large product."""
        return self.peak * MATMUL_SHARE

    @property
    def copy(self) -> float:
        """Bytes/s, read and written, of a large copy."""
        return self.bandwidth * COPY_SHARE


GPUS = {
    "a100-40gb": Gpu("A100 SXM 40 GB", int(39.4 * GIB), 312e12, 1.555e12, 300e9),
    "a100": Gpu("A100 SXM 80 GB", int(79.1 * GIB), 312e12, 2.039e12, 300e9),
    "l40s": Gpu("L40S 48 GB", int(44.4 * GIB), 362e12, 0.864e12, 32e9),
    "h100": Gpu("H100 SXM 80 GB", int(79.1 * GIB), 989.4e12, 3.35e12, 450e9),
    "h200": Gpu("H200 SXM 141 GB", int(139.7 * GIB), 989.4e12, 4.8e12, 450e9),
    "b200": Gpu("B200 SXM 180 GB", int(178.3 * GIB), 2250e12, 7.7e12, 900e9),
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`."""
    if name.lower() not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Link:
    """What joins the ranks of a group: bytes/s a rank, and seconds a message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, with a network adapter for each GPU.

    Attributes:
        gpu: what the nodes hold.
        node: GPUs of a node.
        intra_bandwidth: bytes/s between two GPUs of a node; 0: LINK_SHARE of the data sheet's.
        inter_bandwidth: bytes/s of a GPU's adapter; 400 Gbit/s by default.
        intra_latency, inter_latency: seconds of one message inside and between nodes.
        start: seconds until a collective's first message leaves.
        launch: seconds from one small kernel to the next.
        host_link, host_memory: bytes/s a GPU has to host memory, and AdamW has there.
    """

    gpu: Gpu
    node: int = 8
    intra_bandwidth: float = 0.0
    inter_bandwidth: float = 50e9 * NETWORK_SHARE
    intra_latency: float = 3e-6
    inter_latency: float = 8e-6
    start: float = 10e-6
    launch: float = 5e-6
    host_link: float = 50e9
    host_memory: float = 25e9

    def local(self, size: int, stride: int) -> int:
        """How many of a group's `size` ranks, `stride` apart, share a node."""
        return max(1, min(size, self.node // stride))

    def link(self, size: int, local: int) -> Link:
        """The link of a group of `size` ranks, `local` on each node, whose adapters carry its rings together."""
        intra = self.intra_bandwidth or self.gpu.link * LINK_SHARE
        if size <= local:
            return Link(intra, self.intra_latency)
        return Link(min(intra, local * self.inter_bandwidth), self.inter_latency)

    def gather(self, size: int, local: int, each: float) -> float:
        """Seconds of an all-gather of `each` bytes a rank, or of the reduce-scatter that is its adjoint.

        `(p - 1) n / bandwidth + log2(p) latency`: the bytes of a ring, the messages of a tree (Thakur, Rabenseifner and
        Gropp, 2005).
        """
        if size == 1:
            return 0.0
        link = self.link(size, local)
        return self.start + math.ceil(math.log2(size)) * link.latency + (size - 1) * each / link.bandwidth

    def reduce(self, size: int, local: int, whole: float) -> float:
        """Seconds of an all-reduce of `whole` bytes: a reduce-scatter and an all-gather of its parts, begun once."""
        return 2 * self.gather(size, local, whole / size) - self.start if size > 1 else 0.0

    def send(self, size: int, local: int, amount: float) -> float:
        """Seconds of `amount` bytes from one rank of a group to the next, the slowest pair's."""
        if size == 1:
            return 0.0
        link = self.link(size, 1 if size > local else size)
        return self.start + link.latency + amount / link.bandwidth
